"""How large the entries of a state are, and whether they are finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float

from ._custom_types import PyTree
from ._reduce import anywhere, is_few, largest
from ._state import real_dtype


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every entry of every leaf is finite."""
    return _nowhere([~jnp.isfinite(x) for x in jtu.tree_leaves(tree)])


def every(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether all flags are set, for the body of a small loop: see `_reduce.py`.

    As a maximum: XLA makes one kernel of that for the CPU, and three of `jnp.all`.
    """
    unset = largest(_unset(flags))
    return lax.eq(unset, lax.full_like(unset, 0))


def _unset(flags: Bool[Array, "..."]) -> Float[Array, "..."]:
    zero, one = (lax.full_like(flags, x, jnp.float32) for x in (0, 1))
    return lax.select(flags, zero, one)


def _nowhere(leaves: list[Bool[Array, "..."]]) -> Bool[Array, ""]:
    """Whether no flag of any leaf is set, by a reduction that has its own kernel."""
    found = [anywhere(flags)[0] for flags in leaves]
    return ~functools.reduce(lax.bitwise_or, found)


def nonzero_and_finite(
    a: PyTree[Array], b: PyTree[Array]
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether some entry of `a` is not zero, and every entry of `b` is finite."""
    zero = _nowhere([x != 0 for x in jtu.tree_leaves(a)])
    return ~zero, all_finite(b)


def peak(x: Array, axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest absolute entry: NaN if one is not finite, zero if there is none."""
    top = _top(x, axis)
    return lax.select(lax.is_finite(top), top, lax.full_like(top, jnp.nan))


def _top(x: Array, axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest absolute entry; NaN or infinite for a NaN, and zero if there is none.

    For the CPU, XLA's maximum of more than 4096 entries passes over a NaN (JAX 0.10).
    """
    size = lax.abs(x)
    if is_few(x):
        return largest(size, axis)
    size = lax.select(lax.ne(size, size), lax.full_like(size, jnp.inf), size)
    return largest(size, axis)


def max_abs(tree: PyTree[Array]) -> Float[Array, ""]:
    """The largest absolute entry of all leaves; NaN if any is not finite."""
    return _greatest_of(peak, tree)


def max_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """The largest absolute entry of all leaves; NaN or infinite for a NaN."""
    return _greatest_of(_top, tree)


def _greatest_of(
    of_leaf: Callable[[Array], Array], tree: PyTree[Array]
) -> Float[Array, ""]:
    dtype = real_dtype(tree)
    found = [of_leaf(x).astype(dtype) for x in jtu.tree_leaves(tree)]
    return functools.reduce(jnp.maximum, found)


def greatest(*values: Any) -> Any:
    """The greatest of some scalars; a number if all of them are."""
    if all(isinstance(value, (int, float)) for value in values):
        return max(values)
    return functools.reduce(jnp.maximum, values)
