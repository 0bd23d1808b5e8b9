"""Few products instead of `n`: colours, seeds, and entries read off the products.

Columns that share no row may be summed into one product, so that the number of
products is the number of colours of the columns (Curtis, Powell and Reid, 1974, "On
the estimation of sparse Jacobian matrices"). Rows likewise, with the transpose.
"""

import warnings
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact

from ._pattern import optional
from ._structure import Structure

MISSING = (
    "`SparseDirect` needs `{}` for this sparsity pattern ({}). Install it with `pip "
    "install eqximplicit[sparse]`, or pass another `linear_solver`, for example "
    "`AutoLinearSolver()`."
)


class Colouring:
    """Which columns (`"fwd"`) or rows (`"rev"`) go into which product.

    **Attributes:**

    - `colours`: int32 array of shape `(n,)`.
    - `count`: the number of products.
    - `mode`: `"fwd"` for products with `A`, `"rev"` for products with its transpose.
    """

    colours: np.ndarray
    count: int
    mode: Literal["fwd", "rev"]

    def __init__(self, colours: np.ndarray, mode: Literal["fwd", "rev"]) -> None:
        self.colours = colours.astype(np.int32)
        self.count = int(colours.max(initial=-1)) + 1
        self.mode = mode

    def seeds(self, dtype: np.dtype) -> Inexact[Array, "count n"]:
        """The right factors of the products: zeros and ones."""
        product = jnp.arange(self.count, dtype=jnp.int32)[:, None]
        return (jnp.asarray(self.colours)[None, :] == product).astype(dtype)

    def entries(
        self, products: Inexact[Array, "count n"], rows: np.ndarray, cols: np.ndarray
    ) -> Inexact[Array, " nnz"]:
        """The entries at `rows`, `cols` from the products with the seeds."""
        seed, place = (cols, rows) if self.mode == "fwd" else (rows, cols)
        return products[self.colours[seed], place]


def colour(structure: Structure) -> Colouring:
    """A colouring of a pattern: cyclic for bands, by asdex otherwise.

    **Raises:** `ImportError` when asdex is needed and missing.
    """
    size = structure.size
    width = structure.lower + structure.upper + 1
    if structure.kind != "sparse":
        return Colouring(np.arange(size) % min(width, size), "fwd")
    if structure.nearly_full:
        return Colouring(np.arange(size), "fwd")
    return _by_asdex(structure)


def _by_asdex(structure: Structure) -> Colouring:
    asdex = optional("asdex")
    if asdex is None:
        raise ImportError(MISSING.format("asdex", structure))
    shape = (structure.size, structure.size)
    pattern = asdex.SparsityPattern.from_coo(structure.rows, structure.cols, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as many colours as columns: still right
        found = asdex.jacobian_coloring_from_sparsity(pattern)
    return Colouring(np.asarray(found.colors), found.mode)


def bands(
    products: Inexact[Array, "count n"], lower: int, upper: int
) -> list[Inexact[Array, " n"]]:
    """Diagonal `k - lower` of the matrix as item `k`, indexed by row.

    By comparisons that fuse into one loop: an order of magnitude faster than a gather
    on CPU. Entries outside the matrix are zero.
    """
    count, size = products.shape
    row = lax.iota(jnp.int32, size)
    phase = lax.rem(row, np.int32(count))
    wraps = count < lower + upper + 1
    out = []
    for offset in range(-lower, upper + 1):
        # Colour `c` is that of column `row + offset`.
        picked = products[offset % count]
        for c in range(count):
            if (c - offset) % count != 0:
                picked = jnp.where(phase == (c - offset) % count, products[c], picked)
        if wraps:
            col = row + offset
            picked = jnp.where((col >= 0) & (col < size), picked, 0)
        out.append(picked)
    return out
