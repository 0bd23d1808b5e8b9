"""The diagonals of a linear map, from its jaxpr: no products, and nothing to read off.

A map of stencils (differences, fluxes, anything that only shifts and scales) has a
matrix of a few diagonals. Here each value on the way is those of its own matrix: to
scale a value scales them, to shift it moves them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Inexact

from .._entries import every
from ._equation import as_function, CALLS, Equation, evaluated, variables

# Values with more diagonals than this are not followed.
_MOST = 8


class Bands(NamedTuple):
    """Entry `i` of `diagonals[start]`, by flat index, is that in column `start + i`.

    Those in all other columns are zero, and so is an entry whose column there is not.
    """

    diagonals: dict[int, Array]


# Anything else is a constant: it does not depend on the vector.
Value: TypeAlias = Any
Rule: TypeAlias = Callable[[Equation, list[Value]], list[Value] | None]


class _Mixed(Exception):
    """A value has no few diagonals."""


class Derived(NamedTuple):
    """The diagonals of a square matrix, indexed by row.

    **Attributes:**

    - `diagonals`: that of number `k` has entry `i` in column `k + i`, or zero where
        there is none.
    - `linear`: whether what the map has beside a diagonal is zero, as it is if linear.
    """

    diagonals: dict[int, Inexact[Array, " n"]]
    linear: Bool[Array, ""]


def diagonals_of(
    linear: Callable[[Inexact[Array, " n"]], Inexact[Array, " n"]],
    struct: jax.ShapeDtypeStruct,
) -> Derived | None:
    """The diagonals of the matrix of a map, or `None` if it has not few.

    **Arguments:**

    - `linear`: the map.
    - `struct`: of a vector such as it takes.
    """
    closed, beside = jax.make_jaxpr(linear)(struct), list[Any]()
    try:
        [image] = _evaluate(closed.jaxpr, closed.consts, [units(struct)], beside)
    except _Mixed:
        return None
    if not isinstance(image, Bands):
        return None
    zero = [jnp.array(True), *(every(jnp.asarray(x) == 0) for x in beside)]
    return Derived(image.diagonals, functools.reduce(lax.bitwise_and, zero))


def units(struct: Any) -> Bands:
    """The vector itself, whose matrix is the identity."""
    return Bands({0: lax.full(struct.shape, 1, struct.dtype)})


def is_banded(ins: Sequence[Value]) -> bool:
    """Whether an operand depends on the vector by few diagonals."""
    return any(isinstance(x, Bands) for x in ins)


def followed(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    """What an equation makes of few diagonals, or `None` if not few others."""
    rule = _RULES.get(eqn.primitive.name)
    outs = None if rule is None else rule(eqn, ins)
    few = outs is not None and all(len(x.diagonals) <= _MOST for x in outs)
    return outs if few else None


def _evaluate(
    jaxpr: jex.Jaxpr,
    consts: Sequence[Value],
    args: Sequence[Value],
    beside: list[Any],
) -> list[Value]:
    step = functools.partial(_step, beside)
    return evaluated(jaxpr, consts, args, step, lambda atom: atom.val)


def _step(beside: list[Any], eqn: Equation, ins: list[Value]) -> list[Value]:
    if not is_banded(ins):
        read = variables(eqn, ins)
        return as_function(eqn, list(read))(*read.values())
    if eqn.primitive.name in CALLS:
        body = eqn.params["jaxpr"]
        return _evaluate(body.jaxpr, body.consts, ins, beside)
    outs = followed(eqn, ins)
    if outs is None:
        raise _Mixed
    if eqn.primitive.name in ("concatenate", "pad", "select_n"):
        operands = ins[1:] if eqn.primitive.name == "select_n" else ins
        constants = [x for x in operands if not isinstance(x, Bands)]
        if any(not isinstance(x, Tracer) and np.any(x) for x in constants):
            raise _Mixed  # an entry that may be cut off later, or not linear
        beside.extend(constants)
    return outs


# --- Arithmetic -----------------------------------------------------------------------


def _scaled(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    if isinstance(ins[1], Bands) and (
        eqn.primitive.name == "div" or is_banded(ins[:1])
    ):
        return None  # not linear
    return _elementwise(eqn, ins)


def _elementwise(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    if _is_repeated(eqn, ins):
        return None
    found = [x for x in ins if isinstance(x, Bands)]
    starts = sorted({start for x in found for start in x.diagonals})
    # What is added beside a diagonal is zero, or the map would not be linear.
    bind = lambda k: eqn.primitive.bind(*(_at(k, x) for x in ins), **eqn.params)
    return [Bands({start: bind(start) for start in starts})]


def _is_repeated(eqn: Equation, ins: list[Value]) -> bool:
    """Whether an operand of one entry along an axis is that of all along it."""
    avals = [v.aval for v, x in zip(eqn.invars, ins, strict=True) if is_banded([x])]
    return any(aval.shape != eqn.outvars[0].aval.shape for aval in avals)


def _at(start: int, x: Value) -> Value:
    if not isinstance(x, Bands):
        return x
    some = next(iter(x.diagonals.values()))
    return x.diagonals.get(start, lax.full_like(some, 0))


def _sum_of_two(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    x, y = ins
    if not isinstance(x, Bands) or not isinstance(y, Bands) or _is_repeated(eqn, ins):
        return None
    out, sub = dict(x.diagonals), eqn.primitive.name == "sub"
    for start, entries in y.diagonals.items():
        if start in out:
            out[start] = eqn.primitive.bind(out[start], entries, **eqn.params)
        else:
            out[start] = lax.neg(entries) if sub else entries
    return [Bands(out)]


# --- Moves that keep the order of the entries -----------------------------------------


def _reshaped(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    shape = eqn.outvars[0].aval.shape
    turned = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if turned or math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
        return None
    return [Bands({k: lax.reshape(x, shape) for k, x in ins[0].diagonals.items()})]


def _stride(shape: Sequence[int], axes: Sequence[int]) -> int | None:
    """How far apart, by flat index, neighbours along the one of `axes` are.

    `None` unless what is moved along it stays in one piece.
    """
    if len(axes) != 1 or math.prod(shape[: axes[0]]) != 1:
        return None
    return math.prod(shape[axes[0] + 1 :])


def _sliced(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = [a for a in range(len(shape)) if shape[a] != out[a]]
    if not axes:
        return ins
    stride, params = _stride(shape, axes), eqn.params
    if stride is None or params["strides"] not in (None, (1,) * len(shape)):
        return None
    first = int(params["start_indices"][axes[0]]) * stride
    diagonals = ins[0].diagonals.items()
    return [Bands({k + first: eqn.primitive.bind(x, **params) for k, x in diagonals})]


def _padded(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    shape, config = eqn.invars[0].aval.shape, eqn.params["padding_config"]
    axes = [a for a, padding in enumerate(config) if any(padding)]
    if is_banded(ins[1:]):
        return None
    if not axes:
        return ins[:1]
    stride = _stride(shape, axes)
    if stride is None or config[axes[0]][2]:
        return None
    before = int(config[axes[0]][0]) * stride
    # What a linear map pads with is zero.
    fill = lambda x: lax.pad(x, lax.full_like(x, 0, shape=()), config)
    return [Bands({k - before: fill(x) for k, x in ins[0].diagonals.items()})]


def _joined(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    axis, avals = int(eqn.params["dimension"]), [var.aval for var in eqn.invars]
    stride = _stride(avals[0].shape, [axis])
    if stride is None:
        return None
    sizes = [aval.shape[axis] * stride for aval in avals]
    places = list(itertools.accumulate(sizes[:-1], initial=0))
    found = [x.diagonals if isinstance(x, Bands) else {} for x in ins]
    pairs = list(zip(found, places, strict=True))

    def whole(start: int) -> Array:
        parts = [
            x[start + at] if start + at in x else lax.full(aval.shape, 0, aval.dtype)
            for (x, at), aval in zip(pairs, avals, strict=True)
        ]
        return eqn.primitive.bind(*parts, **eqn.params)

    starts = sorted({k - at for x, at in pairs for k in x})
    return [Bands({start: whole(start) for start in starts})]


def _split(eqn: Equation, ins: list[Value]) -> list[Value] | None:
    stride = _stride(eqn.invars[0].aval.shape, [int(eqn.params["axis"])])
    if stride is None:
        return None
    sizes = [int(size) * stride for size in eqn.params["sizes"]]
    places = itertools.accumulate(sizes[:-1], initial=0)
    parts = {
        k: eqn.primitive.bind(x, **eqn.params) for k, x in ins[0].diagonals.items()
    }
    return [
        Bands({k + at: x[number] for k, x in parts.items()})
        for number, at in enumerate(places)
    ]


_RULES: dict[str, Rule] = {
    **dict.fromkeys("mul div".split(), _scaled),
    **dict.fromkeys(
        "neg copy copy_p convert_element_type select_n".split(), _elementwise
    ),
    **dict.fromkeys("add add_any sub".split(), _sum_of_two),
    **dict.fromkeys("reshape squeeze broadcast_in_dim".split(), _reshaped),
    "slice": _sliced,
    "pad": _padded,
    "concatenate": _joined,
    "split": _split,
}
