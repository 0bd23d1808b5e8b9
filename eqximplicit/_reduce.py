"""Sums and maxima, of few entries without a reduction of the compiler's own.

For a CPU XLA makes three kernels of a reduction over more than 32 entries, and lays out
the scratch of each reduction of a program in every call of it, in branches that are not
taken as well. On one device, up to 16 entries are taken one by one, and some thousand
(of flags, any number) in stages of 32, which XLA makes one kernel of. Over several
devices that would gather them, so the choice is the lowering's.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Inexact, Int

from ._placement import is_for_one_device

# Entries that are taken one by one; that XLA reduces in one kernel; and from how many
# on it calls a library for them, be they of one reduction or of many lanes.
FEW, _KERNEL, _MANY = 16, 32, 4096
OPERATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": lax.add,
    "max": lax.max,
    "or": lax.bitwise_or,
}
_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "max": functools.partial(jnp.max, initial=0),
    "or": lambda x, axis: lax.reduce_or(x, axis),
}
# The same where there are entries, of full precision.
_PLAIN: dict[str, Callable[..., Array]] = {
    "sum": lax.reduce_sum,
    "max": lax.reduce_max,
    "or": lax.reduce_or,
}
# Where every second stage starts from: XLA joins two that start from the same. The rest
# start as JAX does. No flag has that bit: there are at most so many.
_STARTS = {"sum": -0.0, "max": 0.0, "or": 1 << 30}
_FLAGS = 3
Axis = int | Sequence[int] | None

_reduce_p = Primitive("reduce_few")


def total(x: Inexact[Array, "..."], axis: Axis = None) -> Inexact[Array, "..."]:
    """The sum over some axes, or all of them."""
    return reduced(x, "sum", axis)


def largest(x: Float[Array, "..."], axis: Axis = None) -> Float[Array, "..."]:
    """The maximum of numbers that are not negative; zero if there is none."""
    return reduced(x, "max", axis)


def anywhere(*flags: Bool[Array, "..."]) -> list[Bool[Array, ""]]:
    """Which of some flags of one shape are set in any entry: one reduction for all."""
    assert len(flags) <= _FLAGS
    codes = [code(flag, k) for k, flag in enumerate(flags)]
    found = reduced(functools.reduce(lax.bitwise_or, codes), "or", None)
    return [is_set(found, k) for k in range(len(flags))]


def code(flag: Bool[Array, "..."], k: int = 0) -> Int[Array, "..."]:
    """A number for each flag: its `k`-th bit."""
    bit = lax.full_like(flag, 1 << k, jnp.int32)
    return lax.select(flag, bit, lax.full_like(bit, 0))


def is_set(found: Int[Array, ""], k: int = 0) -> Bool[Array, ""]:
    """The flag of a `code`; in a reduction of codes there may be other bits."""
    bit = lax.full_like(found, 1 << k)
    return lax.eq(lax.bitwise_and(found, bit), bit)


def is_few(x: Array) -> bool:
    """Whether a reduction of `x` takes its entries one by one."""
    return is_known(x, _axes(x, None), FEW)


def is_staged(x: Array) -> bool:
    """Whether a reduction of `x` has stages, unless there are many lanes of it."""
    axes = _axes(x, None)
    return is_known(x, axes, _MANY) and not is_known(x, axes, _KERNEL)


def is_known(x: Array, axes: tuple[int, ...], most: int) -> bool:
    """Whether so few, of full precision, and of a type that says nothing of devices."""
    count: Any = math.prod(x.shape[i] for i in axes)  # may be symbolic
    # Of lower precision, JAX adds up in float32.
    wide = not jnp.issubdtype(x.dtype, jnp.complexfloating) and x.dtype.itemsize >= 4
    sharding = getattr(getattr(x, "aval", None), "sharding", None)
    elsewhere = any(part is not None for part in getattr(sharding, "spec", ()))
    return isinstance(count, int) and 0 < count <= most and wide and not elsewhere


def _axes(x: Array, axis: Axis) -> tuple[int, ...]:
    wanted = range(x.ndim) if axis is None else axis
    return tuple(i % x.ndim for i in ((wanted,) if isinstance(wanted, int) else wanted))


def reduced(x: Array, kind: str, axis: Axis) -> Array:
    axes, most = _axes(x, axis), sys.maxsize if kind == "or" else _MANY
    if axes and is_known(x, axes, most):
        return _reduce_p.bind(x, kind=kind, axes=axes)
    return _on_devices(x, kind, axes) if axes else x


def _on_devices(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    """On any number of devices, which agree by `or` on booleans only."""
    if kind != "or":
        return _directly(x, kind, axes)
    bits = [lax.full_like(x, 1 << k, shape=()) for k in range(_FLAGS)]
    found = [jnp.any(lax.bitwise_and(x, bit) != 0, axis=axes) for bit in bits]
    codes = [jnp.where(f, bit, 0) for f, bit in zip(found, bits, strict=True)]
    return functools.reduce(lax.bitwise_or, codes)


def _directly(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    return _REDUCTIONS[kind](x, axis=axes)


def _one_by_one(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    x, axis = _joined(x, axes)
    rows = [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return functools.reduce(OPERATIONS[kind], rows)


def _in_stages(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    x, axis = _joined(x, axes)
    stage, other = _plainly, _apart
    while (size := x.shape[axis]) > _KERNEL:
        # Few columns, which the compiler takes one by one, in a loop over the rows.
        columns = min(-(-size // _KERNEL), _KERNEL)
        x = stage(_folded(x, axis, columns), kind, (axis + 1,))
        stage, other = other, stage
    return stage(x, kind, (axis,))


def _plainly(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    return _PLAIN[kind](x, axes)


def _apart(x: Array, kind: str, axes: tuple[int, ...]) -> Array:
    """The same as a reduction that XLA does not join with the one before."""
    start = lax.full_like(x, _STARTS[kind], shape=())
    return lax.reduce(x, start, lambda a, b: OPERATIONS[kind](a, b), axes)


def _joined(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """Axes beside each other as one, and which that is."""
    shape, first = x.shape, min(axes)
    count = math.prod(shape[i] for i in axes)
    return lax.reshape(x, (*shape[:first], count, *shape[first + len(axes) :])), first


def _folded(x: Array, axis: int, columns: int) -> Array:
    """One axis as two, with zeros at its end."""
    rows = -(-x.shape[axis] // columns)
    missing = rows * columns - x.shape[axis]
    if missing:
        padding = [(0, missing if i == axis else 0, 0) for i in range(x.ndim)]
        x = lax.pad(x, lax.full_like(x, 0, shape=()), padding)
    return lax.reshape(x, (*x.shape[:axis], rows, columns, *x.shape[axis + 1 :]))


def _lowered(ctx: Any, x: Any, *, kind: str, axes: tuple[int, ...]) -> Any:
    fn = functools.partial(_chosen(ctx, kind, axes), kind=kind, axes=axes)
    return mlir.lower_fun(fn, multiple_results=False)(ctx, x)


def _chosen(ctx: Any, kind: str, axes: tuple[int, ...]) -> Callable[..., Array]:
    shape = ctx.avals_in[0].shape
    count = math.prod(shape[i] for i in axes)
    if not is_for_one_device(ctx):
        return _on_devices
    if max(axes) - min(axes) >= len(axes):
        return _directly
    if count <= FEW and kind != "or":
        return _one_by_one
    on_cpu = tuple(ctx.module_context.platforms) == ("cpu",)
    whole: Any = math.prod(shape)  # may be symbolic
    by_library = kind != "or" and not (isinstance(whole, int) and whole < _MANY)
    staged = on_cpu and count > _KERNEL and not by_library
    return _in_stages if staged else _directly


def _abstract(x: Any, *, kind: str, axes: tuple[int, ...]) -> ShapedArray:
    del kind
    kept = [n for i, n in enumerate(x.shape) if i not in axes]
    return ShapedArray(tuple(kept), x.dtype)


def _jvp(primals: Any, tangents: Any, *, kind: str, axes: tuple[int, ...]) -> Any:
    fn = functools.partial(_directly, kind=kind, axes=axes)
    return jax.jvp(fn, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(ct: Any, x: Any, *, kind: str, axes: tuple[int, ...]) -> Any:
    assert kind == "sum"
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval)]
    kept = [i for i in range(len(x.aval.shape)) if i not in axes]
    return [lax.broadcast_in_dim(ct, x.aval.shape, kept)]


def _batch(args: Any, dims: Any, *, kind: str, axes: tuple[int, ...]) -> Any:
    (x,), (lane,) = args, dims
    shifted = tuple(axis + (lane <= axis) for axis in axes)
    return reduced(x, kind, shifted), lane - sum(axis < lane for axis in shifted)


_reduce_p.def_impl(_directly)
_reduce_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_reduce_p] = _jvp
ad.primitive_transposes[_reduce_p] = _transpose
batching.primitive_batchers[_reduce_p] = _batch
# One function of the program per shape, which the compiler inlines.
mlir.register_lowering(_reduce_p, _lowered, inline=False)
