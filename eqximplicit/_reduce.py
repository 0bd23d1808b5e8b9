"""Sums and maxima, of few entries without a reduction.

XLA lays out the scratch of each reduction of a program in every call of it, in branches
that are not taken as well: some 0.2 us. A few entries are added up one by one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_FEW = 16
Axis = int | Sequence[int] | None


def total(x: Float[Array, "..."], axis: Axis = None) -> Float[Array, "..."]:
    """The sum over some axes, or all of them."""
    return _reduced(lax.add, jnp.sum, x, axis)


def largest(x: Float[Array, "..."], axis: Axis = None) -> Float[Array, "..."]:
    """The maximum of numbers that are not negative; zero if there is none."""
    return _reduced(lax.max, functools.partial(jnp.max, initial=0), x, axis)


def _reduced(
    op: Callable[[Array, Array], Array],
    reduce: Callable[..., Array],
    x: Array,
    axis: Axis,
) -> Array:
    every = range(x.ndim) if axis is None else axis
    axes = (every,) if isinstance(every, int) else tuple(every)
    if not axes:
        return x
    if len(axes) == 1 and _is_short(x.shape[axes[0]]) and _is_wide(x.dtype):
        return functools.reduce(op, _along(x, axes[0]))
    return reduce(x, axis=axes)


def _is_short(size: Any) -> bool:
    return isinstance(size, int) and 0 < size <= _FEW


def _is_wide(dtype: Any) -> bool:
    # Of lower precision, JAX adds up in float32.
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32


def _along(x: Array, axis: int) -> list[Array]:
    size = x.shape[axis]
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(size)]
