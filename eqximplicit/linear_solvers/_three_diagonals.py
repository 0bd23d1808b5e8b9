"""Matrices of three diagonals: their algebra, and what tells of them in any units."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Inexact

from .._entries import every, max_abs
from .._lanes import any_lane
from ._dense import NOISE, singular_below
from ._plan import or_one
from ._residual import epsilon

# The lower, middle and upper entry of each row; zero where there is no column.
Bands = tuple[Inexact[Array, " n"], Inexact[Array, " n"], Inexact[Array, " n"]]


def bands_of(operator: lx.AbstractLinearOperator) -> Bands:
    """Those of an operator that lineax takes for tridiagonal."""
    middle, lower, upper = lx.tridiagonal(operator)
    return jnp.pad(lower, (1, 0)), middle, jnp.pad(upper, (0, 1))


def flip(bands: Bands) -> Bands:
    """Those of the transpose."""
    lower, middle, upper = bands
    return jnp.pad(upper[:-1], (1, 0)), middle, jnp.pad(lower[1:], (0, 1))


def band_solve(bands: Bands, b: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    return jax.lax.linalg.tridiagonal_solve(*bands, b[:, None])[:, 0]


def band_terms(bands: Bands, x: Inexact[Array, " n"]) -> list[Array]:
    """The three terms of each row of a product."""
    lower, middle, upper = bands
    wide = jnp.pad(x, (1, 1))
    return [lower * wide[:-2], middle * x, upper * wide[2:]]


def band_apply(bands: Bands, x: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    first, second, third = band_terms(bands, x)
    return first + second + third


def sizes(bands: Bands) -> Bands:
    """The absolute values of the entries."""
    lower, middle, upper = bands
    return jnp.abs(lower), jnp.abs(middle), jnp.abs(upper)


def row_scale(bands: Bands) -> Float[Array, " n"]:
    """The largest absolute entry of each row; one for a row of zeros."""
    lower, middle, upper = sizes(bands)
    return or_one(jnp.maximum(middle, jnp.maximum(lower, upper)))


def is_regular(bands: Bands, probe: Float[Array, " n"]) -> Bool[Array, ""]:
    """Whether a matrix is regular, in whatever units.

    Rows are scaled before columns, which undoes the units of the equations; that of the
    transpose, which is as regular, those of the unknowns.
    """
    upright = _is_tame(bands, probe)

    def either() -> Bool[Array, ""]:
        return upright | _is_tame(flip(bands), probe)

    return jax.lax.cond(any_lane(~upright), either, lambda: upright)


def _is_tame(bands: Bands, probe: Float[Array, " n"]) -> Bool[Array, ""]:
    # Scaled before it is solved: else the pivots of a singular one may be of any size.
    across, columns = _by_columns(bands)
    x = band_solve(flip(_over(across, columns)), probe)
    return max_abs(x) * singular_below(epsilon(probe)) < max_abs(probe)


def _by_columns(bands: Bands) -> tuple[Bands, Float[Array, " n"]]:
    """The transpose of the bands with their rows scaled, and its largest entries."""
    across = flip(_over(bands, row_scale(bands)))
    return across, row_scale(across)


def _over(bands: Bands, rows: Float[Array, " n"]) -> Bands:
    lower, middle, upper = bands
    return lower / rows, middle / rows, upper / rows


def is_exact(
    bands: Bands,
    x: Float[Array, " n"],
    b: Float[Array, " n"],
    left: Float[Array, " n"],
    limit: Any,
) -> Bool[Array, ""]:
    """Whether what is `left` of `b` is little of the terms of its row, row by row.

    So the units of a row have no say. Where entries of `x` are nothing but rounding, so
    are the terms: then it is rounding in a matrix whose rows and columns are scaled.
    What is smaller than all numbers counts as none.
    """
    _, columns = _by_columns(bands)
    lower, middle, upper = band_terms(sizes(bands), jnp.abs(x))
    terms = lower + middle + upper + jnp.abs(b)
    tiny = 4 * float(jnp.finfo(b.dtype).tiny)
    rounding = NOISE * epsilon(b) * max_abs(columns * x) + tiny
    return every(jnp.abs(left) <= limit * terms + rounding * row_scale(bands))
