"""How a matrix of known sparsity is read, checked and solved: one plan per pattern.

A plan is static (hashed by identity, shared through a cache); the entries of the
matrix are arrays that its methods take first. `transposed` asks for the transpose.
"""

import abc
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from .._state import every, peak
from ._blocks import Blocks
from ._coloring import bands, colour, Colouring, MISSING
from ._klu import klu, klu_solve
from ._pattern import MOST_CACHED, Structure

Backend = Literal["auto", "klu", "blocks"]


class Solved(NamedTuple):
    """A solution and what was measured of it.

    `condition` estimates the norm of the inverse of the matrix scaled to entries of at
    most one (for a dominant diagonal it is a bound).
    """

    x: Inexact[Array, " n"]
    trusted: Bool[Array, ""]
    residual: Float[Array, ""]
    condition: Float[Array, ""]


class AbstractPlan(abc.ABC):
    """The static half of a sparse matrix; its entries are a pytree of arrays."""

    structure: Structure
    colouring: Colouring

    @abc.abstractmethod
    def read(self, products: Inexact[Array, "count n"]) -> Any:
        """The entries, from the products with `colouring.seeds()`."""

    @abc.abstractmethod
    def agrees(
        self, values: Any, probe: np.ndarray, image: Inexact[Array, " n"], rtol: float
    ) -> Bool[Array, ""]:
        """Whether the matrix maps `probe` (positive) to `image`, up to `rtol`."""

    @abc.abstractmethod
    def solve(self, values: Any, b: Inexact[Array, " n"], transposed: bool) -> Solved:
        """The solution, and whether to trust it."""


@functools.lru_cache(maxsize=64)
def generic_vector(size: int) -> np.ndarray:
    """A vector in [1/2, 3/2] without a pattern, not orthogonal to a constant."""
    return np.random.default_rng(0).uniform(0.5, 1.5, size)


def _power(dtype: Any, power: float) -> float:
    return float(jnp.finfo(dtype).eps) ** power


def _or_one(scale: Array) -> Array:
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _top(x: Array) -> Array:
    return peak(x, axis=0)


def _trusted(residual: Array, size: Array, top: Array) -> Bool[Array, "*k"]:
    """A small backward error, and a matrix that is not (nearly) singular.

    All are largest absolute values of a scaled system: the residual, the solution, and
    the right-hand side.
    """
    backward = residual <= _power(residual.dtype, 0.75) * (size + top)
    return backward & (size <= _power(residual.dtype, -0.8) * top)


class DiagonalPlan(AbstractPlan):
    """Diagonal matrices: entries of shape `(n,)`."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.colouring = colour(structure)

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
        trusted = every((values != 0) & jnp.isfinite(values) & jnp.isfinite(x))
        return Solved(x, trusted, _top(values * x - b), jnp.ones_like(_top(b)))


_Bands = tuple[Inexact[Array, " n"], Inexact[Array, " n"], Inexact[Array, " n"]]


def _flip(values: _Bands) -> _Bands:
    """The three diagonals of the transpose, indexed by row."""
    lower, middle, upper = values
    return jnp.pad(upper[:-1], (1, 0)), middle, jnp.pad(lower[1:], (0, 1))


def _band_solve(values: _Bands, b: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    return jax.lax.linalg.tridiagonal_solve(*values, b[:, None])[:, 0]


def _band_apply(values: _Bands, x: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
    lower, middle, upper = values
    wide = jnp.pad(x, (1, 1))
    return lower * wide[:-2] + middle * x + upper * wide[2:]


def _row_scale(values: _Bands) -> Float[Array, " n"]:
    lower, middle, upper = (jnp.abs(v) for v in values)
    return _or_one(jnp.maximum(middle, jnp.maximum(lower, upper)))


def _margin(values: _Bands) -> Float[Array, ""]:
    """How dominant the diagonal is, relative to the largest entry of each row."""
    lower, middle, upper = (jnp.abs(v) for v in values)
    return jnp.min((middle - lower - upper) / _row_scale(values))


def _is_dominant(values: _Bands) -> Bool[Array, ""]:
    """Whether `_margin` is above rounding; without a division, which is slow."""
    lower, middle, upper = (jnp.abs(v) for v in values)
    return every(middle - lower - upper > _power(middle.dtype, 0.5) * middle)


class TridiagonalPlan(AbstractPlan):
    """Tridiagonal matrices: three diagonals of shape `(n,)`, indexed by row.

    By Varah (1975, "A lower bound for the smallest singular value of a matrix"),
    theorem 1, a dominant diagonal bounds the inverse, by rows or by columns, so that
    only without it a generic right-hand side has to be solved for too.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.colouring = colour(structure)

    def read(self, products: Inexact[Array, "count n"]) -> _Bands:
        lower, upper = self.structure.lower, self.structure.upper
        found = iter(bands(products, lower, upper))
        zero = jnp.zeros_like(products[0])
        first = next(found) if lower else zero
        return first, next(found), next(found) if upper else zero

    def agrees(
        self,
        values: _Bands,
        probe: np.ndarray,
        image: Inexact[Array, " n"],
        rtol: float,
    ) -> Bool[Array, ""]:
        wide = np.pad(probe.astype(image.dtype), (1, 1))
        shifted = (wide[:-2], wide[1:-1], wide[2:])
        terms = [v * jnp.asarray(s) for v, s in zip(values, shifted, strict=True)]
        seen, size = sum(terms), sum(jnp.abs(t) for t in terms)
        return every(jnp.abs(seen - image) <= rtol * size)

    def solve(
        self, values: _Bands, b: Inexact[Array, " n"], transposed: bool
    ) -> Solved:
        flipped = _flip(values)
        matrix = flipped if transposed else values
        x = _band_solve(matrix, b)
        accurate = _small_backward_error(matrix, x, b)

        def dominant() -> tuple[Array, Array]:
            return accurate, jnp.zeros_like(b[0]).real

        def unsure() -> tuple[Array, Array]:
            return _examined(matrix, x, b)

        sure = _is_dominant(values) | _is_dominant(flipped)
        trusted, estimate = jax.lax.cond(sure, dominant, unsure)
        bound = 1 / jnp.maximum(_margin(values), _margin(flipped))
        condition = jnp.where(sure, bound, estimate)
        return Solved(x, trusted, _top(_band_apply(matrix, x) - b), condition)


def _small_backward_error(values: _Bands, x: Array, b: Array) -> Bool[Array, ""]:
    """Row by row; sharp for a dominant diagonal (Higham, 2002, section 9.6)."""
    residual = jnp.abs(_band_apply(values, x) - b)
    lower, middle, upper = (jnp.abs(v) for v in values)
    size = _band_apply((lower, middle, upper), jnp.abs(x)) + jnp.abs(b)
    return every(residual <= _power(b.dtype, 0.75) * size)


def _examined(values: _Bands, x: Array, b: Array) -> tuple[Array, Array]:
    """Whether to trust the solution `x` of `b`, and the estimated condition."""
    scale = _row_scale(values).astype(b.dtype)
    w = jnp.asarray(generic_vector(b.size).astype(b.dtype))
    scaled = jnp.stack([b / scale, w], axis=1)
    x = jnp.stack([x, _band_solve(values, w * scale)], axis=1)
    image = jax.vmap(_band_apply, in_axes=(None, 1), out_axes=1)(values, x)
    residual = image / scale[:, None] - scaled
    trusted = every(_trusted(_top(residual), _top(x), _top(scaled)))
    return trusted, _top(x[:, 1]) / _top(w)


_Entries = tuple[Inexact[Array, " nnz"], Inexact[Array, " n"], Inexact[Array, " n"]]


class SparsePlan(AbstractPlan):
    """General patterns, by KLU or by a block LU.

    Entries: `(scaled, rows, cols)` with `A = diag(rows) A' diag(cols)`, and entries of
    at most one in `A'`, of shape `(nnz,)`.
    """

    blocks: tuple[Blocks, Blocks] | None

    def __init__(self, structure: Structure, backend: Backend) -> None:
        self.structure = structure
        self.colouring = colour(structure)
        self.use_klu = _use_klu(structure, backend)
        everywhere = self.use_klu and jax.default_backend() == "cpu"
        self.blocks = None if everywhere else _both_ways(structure)

    def read(self, products: Inexact[Array, "count n"]) -> _Entries:
        rows, cols = self.structure.rows, self.structure.cols
        values = self.colouring.entries(products, rows, cols)
        scales: list[Array] = []
        for index in (rows, cols):
            top = jax.ops.segment_max(jnp.abs(values), index, self.structure.size)
            scales.append(_or_one(jnp.maximum(top, 0)).astype(values.dtype))
            values = values / scales[-1][index]
        return values, scales[0], scales[1]

    def agrees(
        self,
        values: _Entries,
        probe: np.ndarray,
        image: Inexact[Array, " n"],
        rtol: float,
    ) -> Bool[Array, ""]:
        scaled, rows, cols = values
        terms = (
            scaled * (cols * jnp.asarray(probe.astype(cols.dtype)))[self.structure.cols]
        )
        both = jnp.stack([terms, jnp.abs(terms).astype(terms.dtype)], axis=1)
        total = self._sum(both, self.structure.rows)
        error = jnp.abs(rows * total[:, 0] - image)
        return every(error <= rtol * (rows * total[:, 1]).real)

    def solve(
        self, values: _Entries, b: Inexact[Array, " n"], transposed: bool
    ) -> Solved:
        scaled, row_scale, col_scale = values
        if transposed:
            row_scale, col_scale = col_scale, row_scale
        w = jnp.asarray(generic_vector(b.size).astype(b.dtype))
        rhs = jnp.stack([b / row_scale, w], axis=1)
        x, size = self._solve(scaled, rhs, transposed)
        rows, cols = self._index(transposed)
        residual = self._sum(scaled[:, None] * x[cols], rows) - rhs
        trusted = every(_trusted(_top(residual), size, _top(rhs)))
        norm = _top(residual[:, 0] * row_scale)
        return Solved(x[:, 0] / col_scale, trusted, norm, size[1] / _top(w))

    def _solve(
        self, scaled: Array, rhs: Array, transposed: bool
    ) -> tuple[Inexact[Array, "n k"], Float[Array, " k"]]:
        """The solution, and its largest absolute value, column by column."""

        def by_klu(scaled: Array, rhs: Array) -> tuple[Array, Array]:
            return klu_solve(*self._index(transposed), scaled, rhs)

        def by_blocks(scaled: Array, rhs: Array) -> tuple[Array, Array]:
            assert self.blocks is not None
            x = self.blocks[int(transposed)].solve(scaled, rhs)
            return x, _top(x)

        if not self.use_klu:
            return by_blocks(scaled, rhs)
        if self.blocks is None:
            return by_klu(scaled, rhs)
        return jax.lax.platform_dependent(scaled, rhs, cpu=by_klu, default=by_blocks)

    def _sum(self, terms: Array, rows: np.ndarray) -> Array:
        return jax.ops.segment_sum(terms, rows, self.structure.size)

    def _index(self, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        rows, cols = self.structure.rows, self.structure.cols
        return (cols, rows) if transposed else (rows, cols)


def _use_klu(structure: Structure, backend: Backend) -> bool:
    if backend == "blocks" or (structure.nearly_full and backend == "auto"):
        return False
    if klu() is None and backend == "klu":
        raise ImportError(MISSING.format("klujax", structure))
    return klu() is not None


def _both_ways(structure: Structure) -> tuple[Blocks, Blocks]:
    return Blocks(structure), Blocks(structure.transpose())


@functools.lru_cache(maxsize=MOST_CACHED)
def plan_for(structure: Structure, backend: Backend) -> AbstractPlan:
    """The plan of a pattern: made once, and shared.

    **Raises:** `ImportError` when an optional dependency is needed and missing.
    """
    if structure.kind == "diagonal":
        return DiagonalPlan(structure)
    if structure.kind == "tridiagonal":
        return TridiagonalPlan(structure)
    return SparsePlan(structure, backend)
