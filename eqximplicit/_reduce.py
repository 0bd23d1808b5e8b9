"""Sums and maxima, of few entries without a reduction of the compiler's own.

XLA lays out the scratch of each reduction of a program in every call of it, in branches
that are not taken as well, and makes three kernels of one over more than 32 entries. On
one device, few entries are added up one by one, and some hundred in two stages, which
is for the body of a loop. Over several devices that would gather them, so the choice is
the lowering's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Inexact

from ._placement import is_for_one_device

# Entries that are taken one by one, and those that XLA reduces in one kernel.
_FEW, _KERNEL = 16, 32
_OPS: dict[str, Callable[[Array, Array], Array]] = {"sum": lax.add, "max": lax.max}
_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "max": functools.partial(jnp.max, initial=0),
}
Axis = int | Sequence[int] | None

_reduce_p = Primitive("reduce_few")


def total(x: Inexact[Array, "..."], axis: Axis = None) -> Inexact[Array, "..."]:
    """The sum over some axes, or all of them."""
    return _reduced(x, "sum", axis)


def largest(x: Float[Array, "..."], axis: Axis = None) -> Float[Array, "..."]:
    """The maximum of numbers that are not negative; zero if there is none."""
    return _reduced(x, "max", axis)


def is_few(x: Array, axis: int, most: int = _FEW) -> bool:
    """Whether so few, of full precision, and of a type that says nothing of devices."""
    size: Any = x.shape[axis]  # may be symbolic
    # Of lower precision, JAX adds up in float32.
    wide = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 32
    sharding = getattr(getattr(x, "aval", None), "sharding", None)
    anywhere = all(part is None for part in getattr(sharding, "spec", ()))
    few = isinstance(size, int) and 0 < size <= most
    return few and wide and anywhere


def _reduced(x: Array, kind: str, axis: Axis) -> Array:
    wanted = range(x.ndim) if axis is None else axis
    axes = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if not axes:
        return x
    if len(axes) == 1 and is_few(x, axes[0], _FEW * _KERNEL):
        return _reduce_p.bind(x, kind=kind, axis=axes[0])
    return _REDUCTIONS[kind](x, axis=axes)


def _directly(x: Array, kind: str, axis: int) -> Array:
    return _REDUCTIONS[kind](x, axis=axis)


def _in_stages(x: Array, kind: str, axis: int) -> Array:
    size = x.shape[axis]
    if size > _FEW:
        parts = -(-size // _KERNEL)
        x = _folded(x, axis, parts, -(-size // parts))
        x = _directly(x, kind, axis + 1)
    rows = [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return functools.reduce(_OPS[kind], rows)


def _folded(x: Array, axis: int, rows: int, columns: int) -> Array:
    """One axis as two, with zeros at its end."""
    missing = rows * columns - x.shape[axis]
    if missing:
        padding = [(0, missing if i == axis else 0, 0) for i in range(x.ndim)]
        x = lax.pad(x, lax.full_like(x, 0, shape=()), padding)
    return lax.reshape(x, (*x.shape[:axis], rows, columns, *x.shape[axis + 1 :]))


def _lowered(ctx: Any, x: Any, *, kind: str, axis: int) -> Any:
    chosen = _in_stages if is_for_one_device(ctx) else _directly
    fn = functools.partial(chosen, kind=kind, axis=axis)
    return mlir.lower_fun(fn, multiple_results=False)(ctx, x)


def _abstract(x: Any, *, kind: str, axis: int) -> ShapedArray:
    del kind
    return ShapedArray((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)


def _jvp(primals: Any, tangents: Any, *, kind: str, axis: int) -> Any:
    fn = functools.partial(_directly, kind=kind, axis=axis)
    return jax.jvp(fn, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(ct: Any, x: Any, *, kind: str, axis: int) -> Any:
    assert kind == "sum"
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval)]
    kept = [i for i in range(len(x.aval.shape)) if i != axis]
    return [lax.broadcast_in_dim(ct, x.aval.shape, kept)]


def _batch(args: Any, dims: Any, *, kind: str, axis: int) -> Any:
    (x,), (lane,) = args, dims
    shifted = axis + (lane <= axis)
    return _reduced(x, kind, shifted), lane - (lane > shifted)


_reduce_p.def_impl(_in_stages)
_reduce_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_reduce_p] = _jvp
ad.primitive_transposes[_reduce_p] = _transpose
batching.primitive_batchers[_reduce_p] = _batch
# One function of the program per shape, which the compiler inlines.
mlir.register_lowering(_reduce_p, _lowered, inline=False)
