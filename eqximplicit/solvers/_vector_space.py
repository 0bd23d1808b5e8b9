"""Linear algebra on pytrees, leaf by leaf: no ravel, every leaf keeps its dtype.

A state may hold float32 beside float64. Scalars (step lengths, inner products) then
live in the widest real dtype of the state, and are cast to a leaf's dtype where they
meet it, so that nothing is promoted behind the user's back. `lax` is used where it will
do: each operator of `jnp` is a `jit`, and is traced as one.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float

from .._entries import every, max_abs
from .._packed import merged
from .._reduce import total
from .._state import num_entries

T = TypeVar("T")


def real_dtype(tree: Any) -> jnp.dtype:
    """Returns the widest real floating dtype of the leaves (arrays or structs)."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    with jax.numpy_dtype_promotion("standard"):
        dtypes = [jnp.finfo(leaf.dtype).dtype for leaf in leaves]
        return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)


def resolution(tree: Any) -> float:
    """Returns the coarsest machine epsilon among the leaves."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)


def size(tree: Any) -> int:
    """Returns the number of scalar entries of all leaves."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    return sum(num_entries(leaf) for leaf in leaves)


def has_complex(tree: Any) -> bool:
    """Returns whether a leaf is complex."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    return any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves)


def one_dtype(tree: Any) -> bool:
    """Returns whether all leaves share one dtype."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    return len({jnp.dtype(leaf.dtype) for leaf in leaves}) <= 1


def _as(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else x.astype(dtype)


def add_scaled(x: T, scale: Float[Array, ""], direction: T) -> T:
    """Returns `x + scale * direction`."""
    return jtu.tree_map(
        lambda xi, di: lax.add(xi, lax.mul(_as(scale, xi.dtype), _as(di, xi.dtype))),
        x,
        direction,
    )


def scaled(scale: Float[Array, ""], x: T) -> T:
    """Returns `scale * x`."""
    return jtu.tree_map(lambda xi: lax.mul(_as(scale, xi.dtype), xi), x)


def minus(x: T, y: T) -> T:
    """Returns `x - y`."""
    return jtu.tree_map(lax.sub, x, y)


def plus(x: T, y: T) -> T:
    """Returns `x + y`."""
    return jtu.tree_map(lax.add, x, y)


def negative_conjugate(x: T) -> T:
    """Returns `-conj(x)`: the steepest descent direction of a JAX gradient `x`."""
    return jtu.tree_map(lambda xi: -jnp.conj(xi), x)


def zeros_like(x: T) -> T:
    """Returns zeros in place of arrays and structs, and every other leaf as it is."""

    def zero(leaf: Any) -> Any:
        if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return leaf

    return jtu.tree_map(zero, x)


def select(pred: Bool[Array, ""], x: T, y: T) -> T:
    """Returns `x` where `pred`, else `y`; leaves that are no arrays come from `x`."""

    def pick(xi: Any, yi: Any) -> Any:
        return lax.select(pred, xi, yi) if eqx.is_array(xi) else xi

    return jtu.tree_map(pick, x, y)


def dot(x: Any, y: Any, dtype: jnp.dtype) -> Float[Array, ""]:
    """Returns the real inner product `Re <x, y>`, summed in `dtype`."""

    def leaf(xi: Array, yi: Array) -> Array:
        return total(jnp.real(jnp.conj(xi) * yi)).astype(dtype)

    terms: list[Array] = jtu.tree_leaves(jtu.tree_map(leaf, x, y))
    return ft.reduce(jnp.add, terms, jnp.zeros((), dtype))


def length(x: Any, dtype: jnp.dtype) -> Float[Array, ""]:
    """Returns the Euclidean length of `x`, in `dtype`."""
    return jnp.sqrt(dot(x, x, dtype))


def in_one(scalars: Sequence[Array]) -> Array:
    """Returns the scalars (or arrays of one shape) along a leading axis.

    As `jnp.stack`, but elementwise: XLA compiles all that leads to the scalars into one
    kernel, where it makes a kernel of each operand of a concatenation. A kernel takes
    some 10 ms to compile.
    """
    shape = (len(scalars), *scalars[0].shape)
    return merged([jnp.broadcast_to(x, shape) for x in scalars])


def apart(stack: Array) -> list[Array]:
    """Returns the entries along the leading axis: the inverse of `in_one`."""
    return [
        jax.lax.index_in_dim(stack, i, keepdims=False) for i in range(stack.shape[0])
    ]


def lengths(xs: Sequence[Any], dtype: jnp.dtype) -> list[Float[Array, ""]]:
    """Returns the lengths of vectors of one space, without derivatives."""

    def leaf(*parts: Array) -> Array:
        stack = jax.lax.stop_gradient(in_one(parts))
        axes = tuple(range(1, stack.ndim))
        return total(jnp.real(jnp.conj(stack) * stack), axes).astype(dtype)

    terms: list[Array] = jtu.tree_leaves(jtu.tree_map(leaf, *xs))
    return apart(jnp.sqrt(ft.reduce(jnp.add, terms, jnp.zeros(len(xs), dtype))))


def norm_of(norm: Callable[[Any], Array], x: Any, dtype: jnp.dtype) -> Float[Array, ""]:
    """Returns `norm(x)` in `dtype`, with all leaves of `x` seen in one dtype."""
    target = dtype
    if has_complex(x):
        with jax.numpy_dtype_promotion("standard"):
            target = jnp.promote_types(dtype, jnp.complex64)
    x = jtu.tree_map(lambda xi: xi.astype(target), x)
    if norm is optx.max_norm:  # which passes over a NaN where XLA's maximum does
        return max_abs(x).astype(dtype)
    return norm(x).astype(dtype)


def all_finite(x: Any) -> Bool[Array, ""]:
    """Returns whether every entry is finite."""
    flags: list[Array] = [every(jnp.isfinite(xi)) for xi in jtu.tree_leaves(x)]
    return ft.reduce(jnp.logical_and, flags, jnp.array(True))


def equal(x: Any, y: Any) -> Bool[Array, ""]:
    """Returns whether all entries are equal."""
    same: list[Array] = jtu.tree_leaves(
        jtu.tree_map(lambda xi, yi: jnp.all(xi == yi), x, y)
    )
    return ft.reduce(jnp.logical_and, same, jnp.array(True))
