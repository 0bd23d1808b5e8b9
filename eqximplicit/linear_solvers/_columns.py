"""The columns of a linear map, all at once, without products with unit vectors.

`jax.vmap` over unit vectors multiplies whatever a map does first by the identity. Where
that is a dense layer, it is three times the work of elimination. Here unit vectors stay
a diagonal, one number for each, or a few of them, until an operation mixes entries; a
contraction of a diagonal is the other operand, scaled.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._bands import Bands, followed, is_banded, units
from ._equation import as_function, CALLS, Equation, evaluated, variables


class Columns(NamedTuple):
    """The value in every column, along the first axis."""

    array: Inexact[Array, "n ..."]


# Anything but `Bands` and `Columns` is a constant, the same in every column.
Value: TypeAlias = Any


def columns_of(
    linear: Callable[[Float[Array, " n"]], Float[Array, " m"]],
    like: Float[Array, " n"],
) -> Float[Array, "n m"]:
    """The images of the unit vectors, one after the other: the transposed matrix.

    **Arguments:**

    - `linear`: a linear map.
    - `like`: a vector such as it takes.
    """
    struct = jax.eval_shape(lambda: like)
    closed, n = jax.make_jaxpr(linear)(struct), struct.shape[0]
    [image] = _evaluate(n, closed.jaxpr, closed.consts, [units(struct)])
    return _in_full(n, image, closed.jaxpr.outvars[0].aval)


def _evaluate(
    n: int, jaxpr: jex.Jaxpr, consts: Sequence[Value], args: Sequence[Value]
) -> list[Value]:
    step = functools.partial(_step, n)
    return evaluated(jaxpr, consts, args, step, lambda atom: atom.val)


def _step(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    if is_banded(ins) and eqn.primitive.name in CALLS:
        body = eqn.params["jaxpr"]
        return _evaluate(n, body.jaxpr, body.consts, ins)
    if not is_banded(ins) or any(isinstance(x, Columns) for x in ins):
        return _in_each(n, eqn, ins)
    outs = followed(eqn, ins)
    if outs is None and (mixing := _MIXING.get(eqn.primitive.name)):
        return [Columns(mixing(n, eqn, ins))]
    return _in_each(n, eqn, ins) if outs is None else outs


def _in_each(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    """By `jax.vmap` over the columns."""
    read = variables(eqn, ins)
    call = as_function(eqn, list(read))
    lanes = [0 if isinstance(x, Bands | Columns) else None for x in read.values()]
    if 0 not in lanes:
        return list(call(*read.values()))
    full = [
        x if lane is None else _in_full(n, x, var.aval)
        for (var, x), lane in zip(read.items(), lanes, strict=True)
    ]
    return list(map(Columns, jax.vmap(call, lanes, axis_size=n)(*full)))


def _in_full(n: int, x: Value, aval: Any) -> Inexact[Array, "n ..."]:
    if isinstance(x, Columns):
        return x.array
    if not isinstance(x, Bands):
        return jnp.broadcast_to(jnp.asarray(x, aval.dtype), (n, *aval.shape))
    wide = n, math.prod(aval.shape)
    column, row = (lax.broadcasted_iota(jnp.int32, wide, axis) for axis in (0, 1))
    out = lax.full(wide, 0, aval.dtype)
    for start, entries in x.diagonals.items():
        here = lax.eq(column, row + np.int32(start))
        out = lax.select(here, lax.broadcast_in_dim(entries.ravel(), wide, (1,)), out)
    return lax.reshape(out, (n, *aval.shape))


def _tied(
    block: Array, rank: int, shape: tuple[int, ...], ties: dict[int, int]
) -> Array:
    """The values of `shape`, one for each index of the first `rank` axes of `block`.

    The others are axes of the values. The rest of those are tied, each to one of the
    index: a value is zero where it differs from that.
    """
    wide = (*block.shape[:rank], *shape)
    free = [rank + a for a in range(len(shape)) if a not in ties.values()]
    out = lax.broadcast_in_dim(block, wide, (*range(rank), *free))
    for axis, tied in ties.items():
        i = lax.broadcasted_iota(jnp.int32, wide, axis)
        k = lax.broadcasted_iota(jnp.int32, wide, rank + tied)
        out = lax.select(lax.eq(i, k), out, lax.full_like(out, 0))
    return lax.reshape(out, (math.prod(wide[:rank]), *shape))


def _placed(n: int, rows: Array, start: int) -> Array:
    """Rows of `n`, from `start` on, of which the others are zero."""
    after = n - start - rows.shape[0]
    if start == 0 and after == 0:
        return rows
    padding = [(start, after, 0), *((0, 0, 0) for _ in rows.shape[1:])]
    return lax.pad(rows, lax.full_like(rows, 0, shape=()), padding)


# --- What mixes entries ---------------------------------------------------------------


def _summed(n: int, eqn: Equation, ins: list[Value]) -> Array:
    rank, aval = len(eqn.invars[0].aval.shape), eqn.outvars[0].aval
    kept = [a for a in range(rank) if a not in eqn.params["axes"]]
    ties = {axis: at for at, axis in enumerate(kept)}
    tied = lambda entries: _tied(entries, rank, aval.shape, ties)
    return _together(n, ins[0], tied)


def _together(n: int, x: Bands, rows: Callable[[Array], Array]) -> Array:
    """The sum over all diagonals; of each, `rows` has a value for each entry."""
    found = [_placed(n, rows(d), start) for start, d in x.diagonals.items()]
    return functools.reduce(lax.add, found)


def _contracted(n: int, eqn: Equation, ins: list[Value]) -> Array:
    side = int(isinstance(ins[1], Bands))
    aval, rank = eqn.outvars[0].aval, len(eqn.invars[side].aval.shape)
    (mine, theirs), (batch, their_batch) = (
        pair[:: -1 if side else 1] for pair in eqn.params["dimension_numbers"]
    )
    other = jnp.asarray(ins[1 - side], aval.dtype)
    free = [a for a in range(other.ndim) if a not in (*theirs, *their_batch)]
    kept = [a for a in range(rank) if a not in (*mine, *batch)]
    # Each axis of the other operand is one of the entries, or follows them.
    into = dict(zip((*theirs, *their_batch), (*mine, *batch), strict=True))
    into.update({a: rank + i for i, a in enumerate(free)})
    order, axes = sorted(into, key=into.__getitem__), sorted(into.values())
    shape = (*eqn.invars[side].aval.shape, *(other.shape[a] for a in free))
    rows = lax.broadcast_in_dim(lax.transpose(other, order), shape, axes)
    # The value has the axes of the batch, then what is left of one, then of the other.
    first = len(batch) + (len(free) if side else 0)
    ties = {axis: at for at, axis in enumerate(batch)}
    ties.update({axis: first + at for at, axis in enumerate(kept)})

    def tied(entries: Array) -> Array:
        scales = lax.broadcast_in_dim(entries.astype(aval.dtype), shape, range(rank))
        return _tied(lax.mul(scales, rows), rank, aval.shape, ties)

    return _together(n, ins[side], tied)


_MIXING: dict[str, Callable[[int, Equation, list[Value]], Array]] = {
    "reduce_sum": _summed,
    "dot_general": _contracted,
}
