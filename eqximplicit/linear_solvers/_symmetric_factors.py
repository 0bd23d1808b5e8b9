"""Factors of a symmetric matrix, whatever it is: Cholesky's, or its eigenvectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._entries import peak
from .._lanes import any_lane
from .._reduce import anywhere
from .._state import known
from ._closed_form import inverse
from ._residual import epsilon
from ._small import dense, LARGEST

Cut = float | Array  # an array where it goes with a size that is symbolic
# The largest relative change of an inverse by rounding, by estimate.
_LARGEST_CHANGE = 0.25


class Spectral(NamedTuple):
    """Eigenvectors, inverse eigenvalues, and which of these were left out."""

    vectors: Float[Array, "n n"]
    weights: Float[Array, " n"]
    whole: Bool[Array, ""]
    soft: Bool[Array, ""]
    indefinite: Bool[Array, ""]


def spectral(matrix: Float[Array, "n n"], rcond: Cut, zero: Cut, null: Cut) -> Spectral:
    # What is indefinite is no minimum nearly reached, with directions nearly flat.
    values, vectors = jnp.linalg.eigh(matrix)
    sizes = jnp.abs(values)
    largest = jnp.maximum(sizes[0], sizes[-1])  # they ascend
    indefinite = values[0] < -(epsilon(matrix) ** 0.25) * largest
    keep = sizes > jnp.where(indefinite, null, rcond) * largest
    weights = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    without, soft = anywhere(~keep, ~keep & (sizes > zero * largest))
    return Spectral(vectors, weights, ~without, soft, indefinite)


def rows(x: Float[Array, "n ..."]) -> int | Array:
    """The number of rows, a scalar array if it is symbolic."""
    n: Any = x.shape[0]
    return n if isinstance(n, int) else jnp.asarray(n, x.dtype)


def definite_factor(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    # The health is NaN, and so fails every comparison, if there is no such factor.
    if known(matrix.shape[0]) <= LARGEST:
        found = inverse([list(row) for row in matrix])
        return dense(found.rows), found.left / found.terms
    factor = jnp.linalg.cholesky(matrix)
    return factor, jnp.min(jnp.diag(factor) ** 2 / jnp.diag(matrix))


def skew_inverse(
    matrix: Float[Array, "n n"], factor: Float[Array, "n n"], skewed: Bool[Array, ""]
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    """The inverse where `skewed`, else `factor`; and whether the inverse is regular.

    If the skew is rounding, so much is uncertain of the symmetric part as well. In a
    direction in which that is all there is, the inverse would be noise.
    """

    def inverted() -> tuple[Array, Array]:
        inverse = factor
        if known(matrix.shape[0]) > LARGEST:
            safe = jnp.where(
                skewed, matrix, jnp.eye(matrix.shape[0], dtype=matrix.dtype)
            )
            inverse = jnp.where(skewed, jnp.linalg.inv(safe), factor)
        change = jnp.linalg.norm(inverse) * jnp.linalg.norm(matrix - matrix.T)
        # The norm of a random matrix is less than that of its entries.
        return inverse, change <= _LARGEST_CHANGE * rows(matrix) ** 0.5

    return jax.lax.cond(any_lane(skewed), inverted, lambda: (factor, ~skewed))


def completed(
    definite: Bool[Array, ""],
    skewed: Bool[Array, ""],
    matrix: Float[Array, "n n"],
    factor: Float[Array, "n n"],
    cuts: tuple[Cut, Cut, Cut],
) -> Spectral:
    """`factor` where `definite`; if that is not all lanes, eigenvectors of the rest."""

    def by_lane() -> Spectral:
        found = spectral(matrix, *cuts)
        # No curvature at all tells nothing, whatever the right-hand side.
        told = definite | (~skewed & (peak(matrix) > 0))
        return Spectral(
            jnp.where(definite, factor, found.vectors),
            jnp.where(told, found.weights, jnp.nan),
            definite | found.whole,
            ~definite & found.soft,
            ~definite & found.indefinite,
        )

    no = ~definite
    return jax.lax.cond(
        any_lane(no), by_lane, lambda: Spectral(factor, factor[0], definite, no, no)
    )
