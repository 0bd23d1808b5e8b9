"""The sparsity of an operator, found once per structure while tracing."""

import importlib
import math
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import scipy.sparse as sp

from .._reach import inner_jaxprs
from ._propagate import (
    known_value,
    Pattern,
    propagate,
    TooDense,
    Traced,
    UnknownPrimitive as UnknownPrimitive,
)
from ._structure import MOST_CACHED, Structure

# asdex follows sets of Python integers, up to n^2 of them: by default only where that
# is a few megabytes.
FALLBACK_SIZE = 1000
# A pattern with more entries per row than this (in the mean) is called dense.
_ENTRIES_PER_ROW = 200
# And than this on the way, if only narrow patterns are looked for.
_ENTRIES_IF_NARROW = 8
# Unknowns times operations: about a second.
_MOST_WORK = 3 * 10**7


def optional(name: str) -> ModuleType | None:
    """The module of an optional dependency, or `None` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _fingerprint(jaxpr: jex.Jaxpr) -> tuple[Any, ...]:
    """A hashable name for what a jaxpr computes; constants count by shape only."""
    number: dict[Any, int] = {}

    def atom(v: Any) -> Any:
        if isinstance(v, jex.Literal):
            return ("literal", str(v.aval), _parameter(np.asarray(v.val)))
        return number.setdefault(v, len(number)), str(v.aval)

    heads = tuple(atom(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            eqn.primitive.name,
            tuple(atom(v) for v in eqn.invars),
            tuple((k, _parameter(v)) for k, v in sorted(eqn.params.items())),
            tuple(atom(v) for v in eqn.outvars),
        )
        for eqn in jaxpr.eqns
    )
    return heads, body, tuple(atom(v) for v in jaxpr.outvars)


def _parameter(value: Any) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        return _fingerprint(value.jaxpr), tuple(_constant_key(c) for c in value.consts)
    if isinstance(value, jex.Jaxpr):
        return _fingerprint(value)
    if isinstance(value, (tuple, list)):
        return tuple(_parameter(v) for v in value)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return repr(value)


def _constant_key(const: Any) -> Any:
    known = known_value(const)
    return None if known is None else _parameter(known)


def flat_size(struct: Any) -> int:
    """The number of entries of a pytree of arrays."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jtu.tree_leaves(struct))


def _propagated(closed: jex.ClosedJaxpr, size: int, limit: int) -> Pattern | None:
    consts = [Traced(known=known_value(c)) for c in closed.consts]
    args, start = [], 0
    for var in closed.jaxpr.invars:
        count = flat_size(var.aval)
        eye = sp.eye_array(count, size, k=start, dtype=bool, format="csr")
        args.append(Traced(eye))
        start += count
    outs = propagate(closed.jaxpr, consts, args, limit)
    rows = [
        sp.csr_array((flat_size(v.aval), size), dtype=bool)
        if t.pattern is None
        else t.pattern
        for v, t in zip(closed.jaxpr.outvars, outs, strict=True)
    ]
    return sp.csr_array(sp.vstack(rows, format="csr"))


def _by_asdex(asdex: ModuleType, closed: jex.ClosedJaxpr, size: int) -> Pattern:
    """The pattern by asdex: traced constants go in as arguments, as dummy zeros."""
    known = [known_value(c) for c in closed.consts]
    unknown = [i for i, k in enumerate(known) if k is None]
    avals = [closed.jaxpr.constvars[i].aval for i in unknown]
    dummies = [np.zeros(a.shape, a.dtype) for a in avals]
    x = [np.zeros(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]

    def linear(x: Sequence[Any], dummies: Sequence[Any]) -> Any:
        consts = list(known)
        for i, value in zip(unknown, dummies, strict=True):
            consts[i] = value
        as_function = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))
        return as_function(*x)

    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        found = asdex.jacobian_sparsity(linear, x, dummies, argnums=0)
    ones = np.ones(len(found.rows), bool)
    return sp.csr_array((ones, (found.rows, found.cols)), shape=(size, size))


_CACHE: dict[Any, Structure | None] = {}


def detect_structure(
    operator: lx.AbstractLinearOperator, *, fallback_size: int = FALLBACK_SIZE
) -> Structure | None:
    """The sparsity of an operator, from the jaxpr of its product with a vector.

    It holds for all values: floating-point values are never looked at, so that it
    works inside `jit`, `vmap` and `grad`, and the result is cached by the structure
    of the jaxpr. A primitive without a rule of our own is left to
    [asdex](https://github.com/adrhill/asdex), if it is installed.

    **Arguments:**

    - `operator`: a square lineax operator over any pytree.
    - `fallback_size`: above this many unknowns asdex is not asked, for it would need
        memory quadratic in the size if the operator turned out to be dense.

    **Returns:**

    A `Structure`; `None` when it cannot be told (asdex missing, or not asked).

    **Raises:** `ValueError` for an operator that is not square.
    """
    struct = operator.in_structure()
    size = flat_size(struct)
    if size != flat_size(operator.out_structure()):
        raise ValueError(
            "The sparsity is looked for in square operators only; got "
            f"{flat_size(operator.out_structure())} rows and {size} columns. Use "
            "`LeastNorm()`, or state the problem as least squares."
        )
    closed = jax.make_jaxpr(operator.mv)(struct)
    limit = max(size * size if size <= 1000 else 0, _ENTRIES_PER_ROW * size)
    return _cached(closed, size, limit, size <= fallback_size)


def narrow_structure(operator: lx.AbstractLinearOperator) -> Structure | None:
    """The sparsity of a square operator with a few entries per row, else `None`.

    At little cost: a product that mixes many entries ends the search at once. `None`
    also where products are computed in less precision than the vectors have, so that
    entries read off them would not be those of the operator.
    """
    struct = operator.in_structure()
    closed = jax.make_jaxpr(operator.mv)(struct)
    avals = list(_avals(closed.jaxpr))
    if not all(isinstance(d, int) for x in avals for d in getattr(x, "shape", ())):
        return None  # symbolic, for an export
    size = flat_size(struct)
    if size * len(avals) > _MOST_WORK:
        return None
    wanted = min(_bits_of(leaf) for leaf in jtu.tree_leaves(struct))
    if min(map(_bits_of, avals)) < wanted:
        return None
    found = _cached(closed, size, _ENTRIES_IF_NARROW * size, ask=False)
    return None if found is None or found.kind == "dense" else found


def _bits_of(aval: Any) -> float:
    dtype = getattr(aval, "dtype", np.dtype(bool))
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.finfo(dtype).bits if inexact else math.inf


def _avals(jaxpr: jex.Jaxpr) -> Iterator[Any]:
    """The types of all arrays that are given or computed anywhere."""
    for var in (*jaxpr.constvars, *jaxpr.invars):
        yield var.aval
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield var.aval
        for inner in inner_jaxprs(eqn):
            yield from _avals(inner)


def _cached(
    closed: jex.ClosedJaxpr, size: int, limit: int, ask: bool
) -> Structure | None:
    consts = tuple(_constant_key(c) for c in closed.consts)
    name = _fingerprint(closed.jaxpr), consts
    # What is found holds whatever was looked for; that nothing is, for this search.
    for key in (name, (name, limit, ask)):
        if key in _CACHE:
            return _CACHE[key]
    found = _detect(closed, size, limit, ask)
    if len(_CACHE) >= MOST_CACHED:
        _CACHE.pop(next(iter(_CACHE)))
    none = found is None or found.kind == "dense"
    _CACHE[(name, limit, ask) if none else name] = found
    return found


def _detect(
    closed: jex.ClosedJaxpr, size: int, limit: int, ask: bool
) -> Structure | None:
    try:
        return Structure(size, _propagated(closed, size, limit))
    except TooDense:
        return Structure(size, None)
    except UnknownPrimitive:
        asdex = optional("asdex") if ask else None
        if asdex is None:
            return None
        return Structure(size, _by_asdex(asdex, closed, size))
