"""A function of two arguments, linearised along both by one evaluation.

Linearised along the parameters, and again along the state, a residual is traced twice;
and what both have in common is compiled twice, wherever XLA has rewritten one of them
before it looks for what they share. So there is one linear map of both tangents, which
is evaluated with one of them left out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.tree_util as jtu
from jax.interpreters import ad
from jaxtyping import Array

from ._custom_types import PyTree
from ._primitives import moving_part
from .linear_solvers._equation import as_function, CALLS, Equation, evaluated, variables


class _Linear(NamedTuple):
    """A value that is linear in the tangents: `None` for zero."""

    array: Array | None


_ZERO = _Linear(None)
_SUMS = ("add", "add_any")
# An array that no tangent moves, or a `_Linear`.
_Value = Any


class Linearised(eqx.Module):
    """The value of `fn(x, y)`, and its derivative along `x` and along `y`."""

    value: PyTree[Array]
    _consts: list[Any]
    _jaxpr: jex.Jaxpr = eqx.field(static=True)
    _split: int = eqx.field(static=True)  # how many leaves `x` has

    def along_x(self, tangent: PyTree[Array]) -> PyTree[Array]:
        zeros = [_ZERO] * (len(self._jaxpr.invars) - self._split)
        return self._image([*map(_Linear, jtu.tree_leaves(tangent)), *zeros])

    def along_y(self, tangent: PyTree[Array]) -> PyTree[Array]:
        zeros = [_ZERO] * self._split
        return self._image([*zeros, *map(_Linear, jtu.tree_leaves(tangent))])

    def _image(self, tangents: list[_Value]) -> PyTree[Array]:
        outs = _evaluate(self._jaxpr, self._consts, tangents)
        pairs = zip(outs, self._jaxpr.outvars, strict=True)
        leaves = [_in_full(out, var.aval) for out, var in pairs]
        return jtu.tree_unflatten(jtu.tree_structure(self.value), leaves)


def linearised(fn: Callable[[Any, Any], PyTree[Array]], x: Any, y: Any) -> Linearised:
    """`fn` at `x` and `y`, pytrees of arrays of inexact dtype."""
    value, push = jax.linearize(fn, x, y)
    closed = jax.make_jaxpr(push)(*jax.eval_shape(lambda: (x, y)))
    return Linearised(value, closed.consts, closed.jaxpr, len(jtu.tree_leaves(x)))


def _in_full(x: _Value, aval: Any) -> Any:
    array = x.array if isinstance(x, _Linear) else x
    zero: Any = ad.Zero
    return ad.instantiate_zeros(zero(aval)) if array is None else array


def _evaluate(
    jaxpr: jex.Jaxpr, consts: Sequence[_Value], args: Sequence[_Value]
) -> list[_Value]:
    return evaluated(jaxpr, consts, args, _step, lambda atom: atom.val)


def _step(eqn: Equation, ins: list[_Value]) -> Sequence[_Value]:
    arrays = [x.array for x in ins if isinstance(x, _Linear)]
    moved = [x for x in arrays if x is not None]
    if arrays and not moved:
        return [_ZERO] * len(eqn.outvars)
    if len(moved) == len(arrays):
        read = variables(eqn, [x.array if isinstance(x, _Linear) else x for x in ins])
        outs = as_function(eqn, list(read))(*read.values())
        return list(map(_Linear, outs)) if arrays else outs
    if eqn.primitive.name in _SUMS and moved[0].shape == eqn.outvars[0].aval.shape:
        return list(map(_Linear, moved))
    if eqn.primitive.name in CALLS:
        body = eqn.params["jaxpr"]
        return _evaluate(body.jaxpr, body.consts, ins)
    return _without_zeros(eqn, ins)


def _without_zeros(eqn: Equation, ins: list[_Value]) -> list[_Value]:
    """By JAX, which knows what is left of an equation where some tangents are zero."""
    read = variables(eqn, ins)
    call = as_function(eqn, list(read))
    moving = [isinstance(x, _Linear) and x is not _ZERO for x in read.values()]
    full = [_in_full(x, var.aval) for var, x in read.items()]
    from_moving, moved = moving_part(full, tuple(moving))
    _, push = jax.linearize(lambda moved: call(*from_moving(moved)), moved)
    return list(map(_Linear, push(moved)))
