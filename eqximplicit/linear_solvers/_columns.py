"""The columns of a linear map, all at once, without products with unit vectors.

`jax.vmap` over unit vectors multiplies whatever a map does first by the identity. Where
that is a dense layer, it is three times the work of elimination. Here unit vectors stay
a diagonal, one number for each, until an operation mixes entries; a contraction of a
diagonal is the other operand, scaled.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from ._equation import as_function, CALLS, Equation, evaluated, variables


class Diagonal(NamedTuple):
    """`entries[i]` in column `start + i`, by flat index `i`, and zero in the others."""

    entries: Array
    start: int


class Columns(NamedTuple):
    """The value in every column, along the first axis."""

    array: Inexact[Array, "n ..."]


# Anything else is a constant, the same in every column.
Value: TypeAlias = Any
Rule: TypeAlias = Callable[[int, Equation, list[Value]], list[Value] | None]


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
    units = Diagonal(lax.full(struct.shape, 1, struct.dtype), 0)
    [image] = _evaluate(n, closed.jaxpr, closed.consts, [units])
    return _in_full(n, image, closed.jaxpr.outvars[0].aval)


def _evaluate(
    n: int, jaxpr: jex.Jaxpr, consts: Sequence[Value], args: Sequence[Value]
) -> list[Value]:
    step = functools.partial(_step, n)
    return evaluated(jaxpr, consts, args, step, lambda atom: atom.val)


def _step(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    if not any(isinstance(x, Diagonal) for x in ins):
        return _in_each(n, eqn, ins)
    if eqn.primitive.name in CALLS:
        body = eqn.params["jaxpr"]
        return _evaluate(n, body.jaxpr, body.consts, ins)
    rule = _RULES.get(eqn.primitive.name)
    mixed = any(isinstance(x, Columns) for x in ins)
    outs = None if rule is None or mixed else rule(n, eqn, ins)
    return _in_each(n, eqn, ins) if outs is None else outs


def _in_each(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    """By `jax.vmap` over the columns."""
    read = variables(eqn, ins)
    call = as_function(eqn, list(read))
    lanes = [0 if isinstance(x, Diagonal | Columns) else None for x in read.values()]
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
    if not isinstance(x, Diagonal):
        return jnp.broadcast_to(jnp.asarray(x, aval.dtype), (n, *aval.shape))
    flat = lax.reshape(x.entries, (x.entries.size,))
    rows = _placed(n, _tied(flat, 1, flat.shape, {0: 0}), x.start)
    return lax.reshape(rows, (n, *x.entries.shape))


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


# --- What keeps a diagonal ------------------------------------------------------------


def _elementwise(n: int, eqn: Equation, ins: list[Value]) -> list[Value] | None:
    del n
    aval, found = eqn.outvars[0].aval, [x for x in ins if isinstance(x, Diagonal)]
    starts = {x.start for x in found}
    if len(starts) > 1 or any(x.entries.shape != aval.shape for x in found):
        return None
    # What is added beside a diagonal is zero, or the map would not be linear.
    operands = [x.entries if isinstance(x, Diagonal) else x for x in ins]
    return [Diagonal(eqn.primitive.bind(*operands, **eqn.params), starts.pop())]


def _sum_of_two(n: int, eqn: Equation, ins: list[Value]) -> list[Value] | None:
    both = all(isinstance(x, Diagonal) for x in ins)
    return _elementwise(n, eqn, ins) if both else None


def _reshaped(n: int, eqn: Equation, ins: list[Value]) -> list[Value] | None:
    del n
    shape, (entries, start) = eqn.outvars[0].aval.shape, ins[0]
    turned = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if turned or math.prod(shape) != entries.size:
        return None
    return [Diagonal(lax.reshape(entries, shape), start)]


def _sliced(n: int, eqn: Equation, ins: list[Value]) -> list[Value] | None:
    del n
    entries, start = ins[0]
    if entries.ndim != 1 or eqn.params["strides"] not in (None, (1,)):
        return None
    [first] = eqn.params["start_indices"]
    return [Diagonal(eqn.primitive.bind(entries, **eqn.params), start + first)]


def _split(n: int, eqn: Equation, ins: list[Value]) -> list[Value] | None:
    del n
    entries, start = ins[0]
    if entries.ndim != 1:
        return None
    outs = list[Value]()
    for part in eqn.primitive.bind(entries, **eqn.params):
        outs.append(Diagonal(part, start))
        start += part.size
    return outs


# --- What mixes entries ---------------------------------------------------------------


def _summed(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    entries, start = ins[0]
    kept = [a for a in range(entries.ndim) if a not in eqn.params["axes"]]
    ties = {axis: at for at, axis in enumerate(kept)}
    rows = _tied(entries, entries.ndim, eqn.outvars[0].aval.shape, ties)
    return [Columns(_placed(n, rows, start))]


def _contracted(n: int, eqn: Equation, ins: list[Value]) -> list[Value]:
    side = int(isinstance(ins[1], Diagonal))
    (entries, start), aval = ins[side], eqn.outvars[0].aval
    (mine, theirs), (batch, their_batch) = (
        pair[:: -1 if side else 1] for pair in eqn.params["dimension_numbers"]
    )
    other, rank = jnp.asarray(ins[1 - side], aval.dtype), entries.ndim
    free = [a for a in range(other.ndim) if a not in (*theirs, *their_batch)]
    kept = [a for a in range(rank) if a not in (*mine, *batch)]
    # Each axis of the other operand is one of the entries, or follows them.
    into = dict(zip((*theirs, *their_batch), (*mine, *batch), strict=True))
    into.update({a: rank + i for i, a in enumerate(free)})
    order, axes = sorted(into, key=into.__getitem__), sorted(into.values())
    shape = (*entries.shape, *(other.shape[a] for a in free))
    rows = lax.broadcast_in_dim(lax.transpose(other, order), shape, axes)
    scales = lax.broadcast_in_dim(entries.astype(aval.dtype), shape, range(rank))
    # The value has the axes of the batch, then what is left of one, then of the other.
    first = len(batch) + (len(free) if side else 0)
    ties = {axis: at for at, axis in enumerate(batch)}
    ties.update({axis: first + at for at, axis in enumerate(kept)})
    block = _tied(lax.mul(scales, rows), rank, aval.shape, ties)
    return [Columns(_placed(n, block, start))]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "neg copy copy_p convert_element_type mul div select_n".split(), _elementwise
    ),
    **dict.fromkeys("add add_any sub".split(), _sum_of_two),
    **dict.fromkeys("reshape squeeze broadcast_in_dim".split(), _reshaped),
    "slice": _sliced,
    "split": _split,
    "reduce_sum": _summed,
    "dot_general": _contracted,
}
