"""A function of few numbers, evaluated entry by entry.

Under `vmap`, a vector of two entries is a strided matrix, and to put it together and to
take it apart again is a pass over memory each. Entry by entry, all of that is settled
when the function is traced; what is left is arithmetic on one long vector for each
number, as code by hand has it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array

from .._custom_types import PyTree, ShapeDtypeStruct
from ._closed_form import Scalars
from ._equation import as_function, CALLS, Equation, evaluated, variables
from ._moves import moved, MOVES
from ._small import entries

# A NumPy array of scalars for one with few entries, else a JAX array.
Value: TypeAlias = Any

# The entries of a matrix of three rows.
_FEW = 9
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne "
    "neg nextafter not or pow rem round rsqrt select_n sign sin sinh sqrt square sub "
    "tan tanh xor".split()
)
# A derivative would go through these once for each entry.
_LOOPS = ("while", "scan", "cond")
# Of more operations on entries, compilation takes longer than they save.
_LONGEST = 200


def entrywise(
    fn: Callable[[Any], tuple[PyTree[Array], Any]], struct: PyTree[ShapeDtypeStruct]
) -> Callable[[Scalars], tuple[Scalars, Any]] | None:
    """`fn` from the entries of its argument to those of its result, and what is beside.

    What `fn` reads is taken apart here, so once, if it is called in a loop. `None` for
    a long function, or one with loops.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(struct)
    if _length(closed.jaxpr) > _LONGEST:
        return None
    leaves, treedef = jtu.tree_leaves(struct), jtu.tree_structure(shapes)
    consts = list(map(_apart, closed.consts))

    def evaluate(scalars: Scalars) -> tuple[Scalars, Any]:
        found = _evaluate(closed.jaxpr, consts, _by_leaf(scalars, leaves))
        out, aux = jtu.tree_unflatten(treedef, map(_Held, found))
        numbers = [x for held in jtu.tree_leaves(out) for x in _entries(held.value)]
        return numbers, jtu.tree_map(lambda held: _together(held.value), aux)

    return evaluate


def _length(jaxpr: jex.Jaxpr) -> float:
    """The number of operations on entries."""
    eqns: Sequence[Equation] = jaxpr.eqns
    return sum(map(_count, eqns))


def _count(eqn: Equation) -> float:
    if eqn.primitive.name in _LOOPS:
        return math.inf
    if eqn.primitive.name in CALLS:
        return _length(eqn.params["jaxpr"].jaxpr)
    return sum(math.prod(v.aval.shape) for v in eqn.outvars if _is_few(v.aval))


class _Held:
    """A leaf of a pytree, which a NumPy array of scalars would not be."""

    def __init__(self, value: Value):
        self.value = value


def _by_leaf(scalars: Scalars, leaves: Sequence[Any]) -> list[Value]:
    values, start = list[Value](), 0
    for leaf in leaves:
        stop = start + math.prod(leaf.shape)
        few = _objects(scalars[start:stop], leaf.shape)
        values.append(few if few.size else jnp.zeros(leaf.shape, leaf.dtype))
        start = stop
    return values


def _objects(scalars: Sequence[Any], shape: tuple[int, ...]) -> Value:
    out = np.empty(len(scalars), object)
    for i, scalar in enumerate(scalars):
        out[i] = scalar
    return out.reshape(shape)


def _is_few(aval: Any) -> bool:
    if type(aval) is not ShapedArray or any(aval.sharding.spec):
        return False
    fixed = all(isinstance(n, int) for n in aval.shape)
    few = fixed and 0 < math.prod(aval.shape) <= _FEW
    return few and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _apart(x: Any) -> Value:
    if not _is_few(jax.typeof(x)):
        return x
    if np.shape(x) == ():
        return _objects([x], ())
    flat = lax.reshape(jnp.asarray(x), (math.prod(np.shape(x)),))
    scalars = [lax.index_in_dim(flat, i, keepdims=False) for i in range(flat.size)]
    return _objects(scalars, np.shape(x))


def _together(value: Value) -> Array:
    if isinstance(value, jax.Array):
        return value
    scalars = _entries(value)
    if value.shape == ():
        return scalars[0]
    return lax.reshape(jnp.stack(scalars), value.shape)


def _entries(value: Value) -> Scalars:
    if isinstance(value, jax.Array):
        return entries(value)
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in value.flat]


def _evaluate(
    jaxpr: jex.Jaxpr, consts: Sequence[Value], args: Sequence[Value]
) -> list[Value]:
    return evaluated(jaxpr, consts, args, _step, _literal)


def _literal(atom: Any) -> Value:
    return _objects([np.asarray(atom.val, atom.aval.dtype)[()]], ())


def _step(eqn: Equation, ins: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in CALLS:
        body = eqn.params["jaxpr"]
        return _evaluate(body.jaxpr, list(map(_apart, body.consts)), ins)
    few = all(_is_few(v.aval) for v in (*eqn.invars, *eqn.outvars))
    if few and name in _ELEMENTWISE:
        return [_each(eqn, ins)]
    if few and name in MOVES:
        return [moved(eqn, ins)]
    if few and name == "reduce_sum":
        return [_summed(ins[0], eqn.params["axes"])]
    if few and name == "dot_general" and _is_plain(eqn):
        return [_product(*ins, *eqn.params["dimension_numbers"][0])]
    return _as_it_is(eqn, ins)


def _as_it_is(eqn: Equation, ins: list[Value]) -> list[Value]:
    """On arrays: a loop, a function with a derivative of its own, or many entries."""
    read = variables(eqn, ins)
    call = as_function(eqn, list(read))
    return list(map(_apart, call(*map(_together, read.values()))))


def _each(eqn: Equation, ins: list[Value]) -> Value:
    wide = np.broadcast_arrays(*ins)
    rows = zip(*(x.flat for x in wide), strict=True)
    found = [eqn.primitive.bind(*row, **eqn.params) for row in rows]
    return _objects(found, wide[0].shape)


def _summed(x: Value, axes: Sequence[int]) -> Value:
    kept = [n for axis, n in enumerate(x.shape) if axis not in axes]
    flat = np.moveaxis(x, axes, range(len(axes))).reshape(-1, math.prod(kept))
    sums = [functools.reduce(lax.add, column) for column in flat.T]
    return _objects(sums, tuple(kept))


def _is_plain(eqn: Equation) -> bool:
    dtypes = {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}
    return len(dtypes) == 1 and not any(eqn.params["dimension_numbers"][1])


def _product(x: Value, y: Value, x_axes: Sequence[int], y_axes: Sequence[int]) -> Value:
    count = len(x_axes)
    x = np.moveaxis(x, x_axes, range(-count, 0))
    y = np.moveaxis(y, y_axes, range(-count, 0))
    shape = x.shape[: x.ndim - count] + y.shape[: y.ndim - count]
    n = math.prod(x.shape[x.ndim - count :])
    rows, columns = x.reshape(-1, n), y.reshape(-1, n)
    dots = [
        functools.reduce(lax.add, map(lax.mul, a, b)) for a in rows for b in columns
    ]
    return _objects(dots, shape)
