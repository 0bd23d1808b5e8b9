"""Plans for diagonal and tridiagonal matrices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from .._custom_types import ShapeDtypeStruct
from .._entries import every, peak
from .._reduce import anywhere
from ._bands import diagonals_of
from ._coloring import bands, colour
from ._dense import NOISE
from ._plan import (
    AbstractPlan,
    eps_power,
    generic_vector,
    is_trusted,
    peaks,
    Solved,
)
from ._structure import Structure
from ._three_diagonals import (
    band_apply,
    band_solve,
    band_terms,
    Bands,
    flip,
    row_scale,
    sizes,
)


def _within(
    reach: int, linear: Callable[[Array], Array], struct: ShapeDtypeStruct
) -> tuple[list[Inexact[Array, " n"]], Bool[Array, ""]] | None:
    """The diagonals up to `reach` from the middle, or `None` if those are not all."""
    found = diagonals_of(linear, struct)
    if found is None or any(abs(start) > reach for start in found.diagonals):
        return None
    zero, reached = jnp.zeros(struct.shape, struct.dtype), range(-reach, reach + 1)
    return [found.diagonals.get(start, zero) for start in reached], found.linear


class DiagonalPlan(AbstractPlan):
    """Diagonal matrices: entries of shape `(n,)`."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.colouring = colour(structure)

    def derived(
        self, linear: Callable[[Array], Array], struct: ShapeDtypeStruct
    ) -> tuple[Inexact[Array, " n"], Bool[Array, ""]] | None:
        found = _within(0, linear, struct)
        return None if found is None else (found[0][0], found[1])

    def read(self, products: Inexact[Array, "1 n"]) -> Inexact[Array, " n"]:
        return products[0]

    def agrees(
        self, values: Inexact[Array, " n"], probe: np.ndarray, image: Array, rtol: float
    ) -> Bool[Array, ""]:
        seen = values * jnp.asarray(probe.astype(values.dtype))
        return every(jnp.abs(seen - image) <= rtol * jnp.abs(seen))

    def solve(
        self, values: Inexact[Array, " n"], b: Inexact[Array, " n"], transposed: bool
    ) -> Solved:
        del transposed
        x = b / values
        regular = every((values != 0) & jnp.isfinite(values))
        trusted = regular & every(jnp.isfinite(x))
        condition = jnp.where(regular, jnp.ones_like(peaks(b)), jnp.inf)
        return Solved(x, trusted, peaks(values * x - b), condition)


def _margin(values: Bands) -> Float[Array, ""]:
    """How dominant the diagonal is, relative to the largest entry of each row."""
    lower, middle, upper = sizes(values)
    return jnp.min((middle - lower - upper) / row_scale(values))


def _is_dominant(values: Bands) -> Bool[Array, " n"]:
    """Whether `_margin` is above rounding; without a division, which is slow."""
    lower, middle, upper = sizes(values)
    return middle - lower - upper > eps_power(middle.dtype, 0.5) * middle


class TridiagonalPlan(AbstractPlan):
    """Tridiagonal matrices: three diagonals of shape `(n,)`, indexed by row.

    By Varah (1975, "A lower bound for the smallest singular value of a matrix"),
    theorem 1, a dominant diagonal bounds the inverse, by rows or by columns, so that
    only without it a generic right-hand side has to be solved for too.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.colouring = colour(structure)

    def derived(
        self, linear: Callable[[Array], Array], struct: ShapeDtypeStruct
    ) -> tuple[Bands, Bool[Array, ""]] | None:
        found = _within(1, linear, struct)
        if found is None:
            return None
        (lower, middle, upper), is_linear = found
        return (lower, middle, upper), is_linear

    def read(self, products: Inexact[Array, "count n"]) -> Bands:
        lower, upper = self.structure.lower, self.structure.upper
        found = iter(bands(products, lower, upper))
        zero = jnp.zeros_like(products[0])
        first = next(found) if lower else zero
        return first, next(found), next(found) if upper else zero

    def agrees(
        self,
        values: Bands,
        probe: np.ndarray,
        image: Inexact[Array, " n"],
        rtol: float,
    ) -> Bool[Array, ""]:
        wide = np.pad(probe.astype(image.dtype), (1, 1))
        shifted = (wide[:-2], wide[1:-1], wide[2:])
        terms = [v * jnp.asarray(s) for v, s in zip(values, shifted, strict=True)]
        seen, size = sum(terms), sum(jnp.abs(t) for t in terms)
        return every(jnp.abs(seen - image) <= rtol * size)

    def solve(self, values: Bands, b: Inexact[Array, " n"], transposed: bool) -> Solved:
        flipped = flip(values)
        matrix = flipped if transposed else values
        x = band_solve(matrix, b)
        by_row, by_column = _is_dominant(values), _is_dominant(flipped)
        accurate = _small_backward_error(matrix, x, b)
        weak_row, weak_column, wrong = anywhere(~by_row, ~by_column, ~accurate)

        def dominant() -> tuple[Array, Array]:
            return ~wrong, jnp.zeros_like(b[0]).real

        def unsure() -> tuple[Array, Array]:
            return _examined(matrix, x, b)

        sure = ~(weak_row & weak_column)
        trusted, estimate = jax.lax.cond(sure, dominant, unsure)
        bound = 1 / jnp.maximum(_margin(values), _margin(flipped))
        condition = jnp.where(sure, bound, estimate)
        return Solved(x, trusted, peaks(band_apply(matrix, x) - b), condition)


def _small_backward_error(values: Bands, x: Array, b: Array) -> Bool[Array, " n"]:
    """Row by row; sharp for a dominant diagonal (Higham, 2002, section 9.6).

    Where the solution has decayed, all that is left of it is rounding relative to its
    largest entry, or was less than the smallest number. That many digits of its row are
    not asked for.
    """
    limit = eps_power(b.dtype, 0.75)
    rounding = NOISE * eps_power(b.dtype, 1) / limit * peak(x)  # NaN if `x` has one
    terms = band_terms(sizes(values), jnp.abs(x) + rounding)
    left = jnp.abs(band_apply(values, x) - b)
    return left <= limit * (sum(terms) + jnp.abs(b))


def _examined(values: Bands, x: Array, b: Array) -> tuple[Array, Array]:
    """Whether to trust the solution `x` of `b`, and the estimated condition."""
    scale = row_scale(values).astype(b.dtype)
    w = jnp.asarray(generic_vector(b.size).astype(b.dtype))
    generic = w * scale
    z = band_solve(values, generic)
    pairs = (x, b), (z, generic)
    left = [(band_apply(values, v) - rhs) / scale for v, rhs in pairs]
    tops = peak(jnp.stack([*left, x, z, b / scale, w]), axis=1)
    trusted = every(is_trusted(tops[:2], tops[2:4], tops[4:]))
    return trusted, tops[3] / tops[5]
