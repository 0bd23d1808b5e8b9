"""A block-tridiagonal LU in plain JAX, for banded systems on any platform.

Ordered by reverse Cuthill-McKee (Cuthill and McKee, 1969), a sparse matrix has a
small bandwidth `s`; cut into blocks of `s` it is block tridiagonal. Pivoting is
inside blocks only, hence stable for (block) diagonally dominant and for positive
definite matrices (Golub and Van Loan, "Matrix Computations", 4th ed., section 4.5);
the caller refines, and measures the residual. One block makes this a dense LU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Inexact
from scipy.sparse.csgraph import reverse_cuthill_mckee

from ._structure import Structure

_MAX_BYTES = 2**31
_MIN_BLOCK = 16

_Factor = tuple[Array, Array]  # LU and pivots of one block
_Step = tuple[_Factor, Array]


class Blocks:
    """Where the entries of a sparse matrix lie in a block-tridiagonal one.

    **Attributes:** `order`: the permutation, shape `(n,)`; `block`: the block size
    `s`; `count`: the number of blocks `m`; `place`: the flat positions of the entries
    in an array of shape `(m, s, 3, s)`, in which axis 2 is (left, diagonal, right).
    """

    order: np.ndarray
    block: int
    count: int
    place: np.ndarray

    def __init__(self, structure: Structure) -> None:
        size, rows, cols = structure.size, structure.rows, structure.cols
        ones = np.ones(rows.size, bool)
        matrix = sp.csr_array((ones, (rows, cols)), shape=(size, size))
        dense = structure.nearly_full
        order = np.arange(size) if dense else np.asarray(reverse_cuthill_mckee(matrix))
        position = np.empty(size, np.int64)
        position[order] = np.arange(size)
        band = int(np.abs(position[rows] - position[cols]).max(initial=0))
        self.order = order.astype(np.int32)
        self.block = size if dense else min(max(band, _MIN_BLOCK), size)
        self.count = -(-size // self.block)
        self.place = self._places(position[rows], position[cols])
        self._refuse_if_large(size)

    def _places(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        which = cols // self.block - rows // self.block + 1
        return (rows * 3 + which) * self.block + cols % self.block

    def _refuse_if_large(self, size: int) -> None:
        need = 3 * 8 * self.count * self.block**2
        if need > _MAX_BYTES:
            raise ValueError(
                f"`SparseDirect` without KLU would need {need:.1e} bytes for the "
                f"{size} unknowns of this operator (bandwidth {self.block} after "
                "reordering). Run it on CPU with `pip install eqximplicit[sparse]`, or "
                "pass an iterative `linear_solver`."
            )

    def factorised(
        self, values: Inexact[Array, " nnz"]
    ) -> Callable[[Inexact[Array, "n k"]], Inexact[Array, "n k"]]:
        """What solves the system, without any check of its quality."""
        size, m, s = self.order.size, self.count, self.block
        cells = jnp.zeros(m * s * 3 * s, values.dtype).at[self.place].add(values)
        cells = cells.reshape(m, s, 3, s)
        fill = jnp.arange(m * s, dtype=jnp.int32) >= size
        unit = fill.reshape(m, s, 1) & jnp.eye(s, dtype=bool)[None]
        left, right = cells[:, :, 0], cells[:, :, 2]
        factors = _eliminated(left, cells[:, :, 1] + unit.astype(values.dtype), right)

        def solve(rhs: Inexact[Array, "n k"]) -> Inexact[Array, "n k"]:
            columns = rhs.shape[1]
            b = jnp.pad(rhs[self.order], ((0, m * s - size), (0, 0)))
            x = _substituted(left, factors, b.reshape(m, s, columns))
            return jnp.zeros_like(rhs).at[self.order].set(x.reshape(-1, columns)[:size])

        return solve


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _eliminated(left: Array, middle: Array, right: Array) -> _Step:
    r"""Block LU: `S_i = D_i - L_i W_{i-1}`, `W_i = S_i^{-1} U_i`."""

    def eliminate(w: Array, blocks: tuple[Array, Array, Array]) -> tuple[Array, _Step]:
        left, middle, right = blocks
        factor = jsp.linalg.lu_factor(middle - _matmul(left, w))
        w = jsp.linalg.lu_solve(factor, right)
        return w, (factor, w)

    start = jnp.zeros_like(middle[0])
    return jax.lax.scan(eliminate, start, (left, middle, right))[1]


def _substituted(left: Array, factors: _Step, rhs: Array) -> Array:
    def forward(y: Array, x: tuple[Array, _Factor, Array]) -> tuple[Array, Array]:
        left, factor, b = x  # S_i y_i = b_i - L_i y_{i-1}
        y = jsp.linalg.lu_solve(factor, b - _matmul(left, y))
        return y, y

    def backward(x: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        w, y = step  # x_i = y_i - W_i x_{i+1}
        x = y - _matmul(w, x)
        return x, x

    (each, w), zero = factors, jnp.zeros_like(rhs[0])
    _, y = jax.lax.scan(forward, zero, (left, each, rhs))
    _, x = jax.lax.scan(backward, zero, (w, y), reverse=True)
    return x
