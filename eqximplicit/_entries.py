"""How large the entries of a state are, and whether they are finite."""

import functools
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float

from ._custom_types import PyTree
from ._reduce import code, is_few, is_set, largest
from ._reduce_leaves import reduced_together
from ._state import real_dtype


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every entry of every leaf is finite."""
    endless = [code(~jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]
    return ~is_set(reduced_together(endless, "or"))


def every(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether all flags are set, for the body of a small loop: see `_reduce.py`.

    As a maximum: XLA makes one kernel of that for the CPU, and three of `jnp.all`.
    """
    unset = largest(_unset(flags))
    return lax.eq(unset, lax.full_like(unset, 0))


def _unset(flags: Bool[Array, "..."]) -> Float[Array, "..."]:
    zero, one = (lax.full_like(flags, x, jnp.float32) for x in (0, 1))
    return lax.select(flags, zero, one)


def nonzero_and_finite(
    a: PyTree[Array], b: PyTree[Array]
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether some entry of `a` is not zero, and every entry of `b` is finite.

    In one reduction where the leaves of both have the same shapes.
    """
    nonzero = [code(x != 0, 0) for x in jtu.tree_leaves(a)]
    endless = [code(~jnp.isfinite(x), 1) for x in jtu.tree_leaves(b)]
    if [x.shape for x in nonzero] == [x.shape for x in endless]:
        nonzero = endless = list(map(lax.bitwise_or, nonzero, endless))
    found, other = (reduced_together(codes, "or") for codes in (nonzero, endless))
    return is_set(found, 0), ~is_set(other, 1)


def peak(x: Array, axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest absolute entry: NaN if one is not finite, zero if there is none."""
    return _nan_unless_finite(largest(_size(x), axis))


def max_abs(tree: PyTree[Array]) -> Float[Array, ""]:
    """The largest absolute entry of all leaves; NaN if any is not finite."""
    return _nan_unless_finite(max_norm(tree))


def max_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """The largest absolute entry of all leaves; NaN or infinite for a NaN."""
    dtype = real_dtype(tree)
    sizes = [_size(x).astype(dtype) for x in jtu.tree_leaves(tree)]
    return reduced_together(sizes, "max")


def _nan_unless_finite(top: Float[Array, "..."]) -> Float[Array, "..."]:
    return lax.select(lax.is_finite(top), top, lax.full_like(top, jnp.nan))


def _size(x: Array) -> Float[Array, "..."]:
    """The absolute entries, of which a maximum is NaN or infinite for a NaN.

    For the CPU, XLA's maximum of more than 4096 entries passes over a NaN (JAX 0.10).
    """
    size = lax.abs(x)
    if is_few(x):
        return size
    return lax.select(lax.ne(size, size), lax.full_like(size, jnp.inf), size)


def greatest(*values: Any) -> Any:
    """The greatest of some scalars; a number if all of them are."""
    if all(isinstance(value, (int, float)) for value in values):
        return max(values)
    return functools.reduce(jnp.maximum, values)
