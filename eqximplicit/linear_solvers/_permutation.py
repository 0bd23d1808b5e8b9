"""The row exchanges of an LU factorisation, as indices to gather by.

In `matrix[rows] = L U`, elimination exchanged row `k` with row `pivots[k]`, one after
the other. JAX carries these exchanges out, on a CPU in a loop of six kernels. To follow
each row through them is a loop of one kernel, and in the other order gives the inverse.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# What JAX need not look for in these indices.
_PERMUTATION: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "wrap_negative_indices": False,
}


def permuted(
    b: Float[Array, " n"], pivots: Int[Array, " n"], *, inverse: bool = False
) -> Float[Array, " n"]:
    """`b[rows]`, or the vector of which that is `b`."""
    indices = lax.platform_dependent(
        pivots,
        cpu=functools.partial(by_following, inverse=inverse),
        default=functools.partial(by_exchanging, inverse=inverse),
    )
    return b.at[indices].get(**_PERMUTATION)


def by_following(pivots: Int[Array, " n"], *, inverse: bool) -> Int[Array, " n"]:
    n = pivots.size
    start = jnp.arange(n, dtype=pivots.dtype)

    def follow(step: Any, at: Int[Array, " n"]) -> Int[Array, " n"]:
        row = lax.convert_element_type(step if inverse else n - 1 - step, at.dtype)
        other = lax.dynamic_index_in_dim(
            pivots, row, keepdims=False, allow_negative_indices=False
        )
        row, other = (lax.broadcast(x, at.shape) for x in (row, other))
        back = lax.select(lax.eq(at, other), row, at)
        return lax.select(lax.eq(at, row), other, back)

    return lax.fori_loop(jnp.zeros_like(start[0]), n, follow, start)


def by_exchanging(pivots: Int[Array, " n"], *, inverse: bool) -> Int[Array, " n"]:
    rows = lax.linalg.lu_pivots_to_permutation(pivots, pivots.size)
    return jnp.argsort(rows).astype(rows.dtype) if inverse else rows
