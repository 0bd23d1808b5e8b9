"""What the sparsity of an operator looks like."""

import copy
from typing import Literal

import numpy as np

from ._propagate import Pattern

Kind = Literal["diagonal", "tridiagonal", "banded", "sparse", "dense"]

MOST_CACHED = 256
# Bands wider than this are solved as general sparse matrices.
_MAX_BAND = 16


class Structure:
    """The sparsity of a square operator: what may be non-zero, for all values.

    Compared and hashed by identity: equal structures are the same object, since
    detection is cached.

    **Attributes:**

    - `kind`: `"diagonal"`, `"tridiagonal"`, `"banded"`, `"sparse"` or `"dense"`.
    - `size`: the number of unknowns `n`.
    - `nnz`: the number of entries that may be non-zero.
    - `lower`, `upper`: the number of sub- and superdiagonals, in the order of the
        flattened state.
    - `colours`: the number of products that give all entries. For `"sparse"` it is
        the largest number of entries in a row, which is a lower bound.
    - `rows`, `cols`: the entries, int32 arrays of shape `(nnz,)`, row by row; empty
        if dense.
    """

    kind: Kind
    size: int
    nnz: int
    lower: int
    upper: int
    colours: int
    rows: np.ndarray
    cols: np.ndarray

    def __init__(self, size: int, pattern: Pattern | None) -> None:
        self.size = size
        if pattern is None:
            self.kind, self.nnz, self.colours = "dense", size * size, size
            self.lower = self.upper = max(size - 1, 0)
            self.rows = self.cols = np.zeros(0, np.int32)
            return
        pattern.sum_duplicates()
        coo = pattern.tocoo()
        self.rows, self.cols = (x.astype(np.int32) for x in coo.coords)
        self.nnz = int(self.rows.size)
        offset = self.cols - self.rows
        self.upper = max(int(offset.max(initial=0)), 0)
        self.lower = max(-int(offset.min(initial=0)), 0)
        self.kind = _kind(self.lower, self.upper, size)
        per_row = int(np.diff(pattern.indptr).max(initial=0))
        width = self.lower + self.upper + 1
        self.colours = per_row if self.kind == "sparse" else width

    @property
    def nearly_full(self) -> bool:
        """Whether a dense factorisation is the better one: small, or a quarter full."""
        return self.size <= 64 or 4 * self.nnz > self.size**2

    def transpose(self) -> "Structure":
        """The structure of the transposed operator, with the entries in this order."""
        flipped = copy.copy(self)
        flipped.rows, flipped.cols = self.cols, self.rows
        flipped.lower, flipped.upper = self.upper, self.lower
        return flipped

    def __repr__(self) -> str:
        return (
            f"Structure({self.kind}, size={self.size}, nnz={self.nnz}, "
            f"lower={self.lower}, upper={self.upper}, colours={self.colours})"
        )


def _kind(lower: int, upper: int, size: int) -> Kind:
    if lower == upper == 0:
        return "diagonal"
    if lower <= 1 and upper <= 1:
        return "tridiagonal"
    return "banded" if lower + upper < min(_MAX_BAND, size) else "sparse"
