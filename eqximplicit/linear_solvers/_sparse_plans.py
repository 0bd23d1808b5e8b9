"""Plans for general patterns, and which plan a pattern is given."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Inexact
from scipy.sparse.csgraph import structural_rank

from .._entries import every
from ._banded_plans import DiagonalPlan, TridiagonalPlan
from ._blocks import Blocks
from ._coloring import colour, MISSING
from ._dense import NOISE
from ._klu import klu, klu_solve
from ._plan import (
    AbstractPlan,
    eps_power,
    generic_vector,
    is_trusted,
    or_one,
    peaks,
    Solved,
)
from ._structure import MOST_CACHED, Structure

# Corrections of a solution by blocks. Each takes as many digits as the factors have.
_REFINEMENTS = 2

Backend = Literal["auto", "klu", "blocks"]

_Entries = tuple[Inexact[Array, " nnz"], Inexact[Array, " n"], Inexact[Array, " n"]]


class SparsePlan(AbstractPlan):
    """General patterns, by KLU or by a block LU.

    Entries: `(scaled, rows, cols)` with `A = diag(rows) A' diag(cols)`, and entries of
    at most one in `A'`, of shape `(nnz,)`. A pattern that is singular for all values is
    never factorised: KLU would raise an error.
    """

    regular: bool
    blocks: tuple[Blocks, Blocks] | None

    def __init__(self, structure: Structure, backend: Backend) -> None:
        self.structure = structure
        self.colouring = colour(structure)
        self.use_klu = _use_klu(structure, backend)
        self.regular = _has_full_rank(structure)
        everywhere = self.use_klu and jax.default_backend() == "cpu"
        unused = everywhere or not self.regular
        self.blocks = None if unused else _both_ways(structure)

    def read(self, products: Inexact[Array, "count n"]) -> _Entries:
        rows, cols = self.structure.rows, self.structure.cols
        values = self.colouring.entries(products, rows, cols)
        scales: list[Array] = []
        for index in (rows, cols):
            top = jax.ops.segment_max(jnp.abs(values), index, self.structure.size)
            scales.append(or_one(jnp.maximum(top, 0)).astype(values.dtype))
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
        if not self.regular:
            return _unsolved(b)
        scaled, row_scale, col_scale = values
        if transposed:
            row_scale, col_scale = col_scale, row_scale
        w = jnp.asarray(generic_vector(b.size).astype(b.dtype))
        rhs = jnp.stack([b / row_scale, w], axis=1)
        x, size = self._solve(scaled, rhs, transposed)
        residual = self._product(scaled, x, transposed) - rhs
        trusted = every(is_trusted(peaks(residual), size, peaks(rhs)))
        norm = peaks(residual[:, 0] * row_scale)
        return Solved(x[:, 0] / col_scale, trusted, norm, size[1] / peaks(w))

    def _solve(
        self, scaled: Array, rhs: Array, transposed: bool
    ) -> tuple[Inexact[Array, "n k"], Float[Array, " k"]]:
        """The solution, and its largest absolute value, column by column."""

        def by_klu(scaled: Array, rhs: Array) -> tuple[Array, Array]:
            return klu_solve(*self._index(transposed), scaled, rhs)

        def by_blocks(scaled: Array, rhs: Array) -> tuple[Array, Array]:
            return self._refined(scaled, rhs, transposed)

        if not self.use_klu:
            return by_blocks(scaled, rhs)
        if self.blocks is None:
            return by_klu(scaled, rhs)
        return jax.lax.platform_dependent(scaled, rhs, cpu=by_klu, default=by_blocks)

    def _refined(
        self, scaled: Array, rhs: Array, transposed: bool
    ) -> tuple[Inexact[Array, "n k"], Float[Array, " k"]]:
        """The same by blocks; the solution is NaN where a row, however small, is not.

        Pivoting inside blocks alone may lose digits, in a part of the matrix of which
        no norm of the whole tells. Refinement brings them back, and makes the residual
        of each row small relative to its terms (R. Skeel, *Iterative refinement implies
        numerical stability for Gaussian elimination*, Math. Comp. 35 (1980)).
        """
        assert self.blocks is not None
        solve = self.blocks[int(transposed)].factorised(scaled)
        x = solve(rhs)
        for _ in range(_REFINEMENTS):
            x = x + solve(rhs - self._product(scaled, x, transposed))
        left = jnp.abs(rhs - self._product(scaled, x, transposed))
        sizes, size = jnp.abs(scaled), jnp.abs(x)
        terms = self._product(sizes, size, transposed) + jnp.abs(rhs)
        # Entries that are zero but for rounding, that of the rows they are in: what
        # those entries are in is rounding, too.
        across = self._product(sizes, terms, not transposed)
        noise = self._product(sizes, across, transposed)
        eps = eps_power(x.dtype, 1)
        rounding = NOISE * eps * (noise + eps * peaks(x)[None])
        sound = every(left <= eps_power(x.dtype, 0.75) * terms + rounding)
        return jnp.where(sound, x, jnp.nan), peaks(x)

    def _product(self, scaled: Array, x: Array, transposed: bool) -> Array:
        rows, cols = self._index(transposed)
        return self._sum(scaled[:, None] * x[cols], rows)

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


def _has_full_rank(structure: Structure) -> bool:
    """Whether a permutation makes a diagonal of places that may be non-zero."""
    size, rows, cols = structure.size, structure.rows, structure.cols
    matrix = sp.csr_array((np.ones(rows.size), (rows, cols)), shape=(size, size))
    return int(structural_rank(matrix)) == size


def _unsolved(b: Inexact[Array, " n"]) -> Solved:
    """What there is to say of a system that is singular, whatever its entries."""
    top = peaks(b)
    untrusted = jnp.zeros(top.shape, bool)
    return Solved(
        jnp.full_like(b, jnp.nan), untrusted, top, jnp.full_like(top, jnp.inf)
    )


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
