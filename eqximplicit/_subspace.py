"""Directions in which a system too large for its matrix is weak, from products."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .linear_solvers._dense import singular_below

Vector = np.ndarray[Any, np.dtype[Any]]
Map = Callable[[Vector], Vector]

# Directions to look along, and numbers to keep.
_DIRECTIONS, _NUMBERS = 300, 2**24
# Up to so many unknowns, elimination gives weak directions in some seconds.
_ELIMINATED = 2048
# A cluster of atoms has six flat directions; each more is one more search.
_MOST_FLATS = 8
# Of a vector, beside those that are orthogonal to it, that rounding leaves.
_USED_UP = 1e-10


class Part(NamedTuple):
    """Orthonormal directions, and what `∂F/∂y` makes of them: an `n × k` matrix each.

    `top` is the largest singular value so far, and `flats` are flat directions.
    """

    basis: Vector
    image: Vector
    flats: Vector
    top: float

    @property
    def weakest(self) -> Vector:
        """The direction of the smallest singular value."""
        if self.flats.size:
            return self.flats[:, 0]
        return self.basis @ np.linalg.svd(self.image, full_matrices=False)[2][-1]


def explored(forth: Map, back: Map | None, size: int, eps: float) -> Part | None:
    """Directions of all sides of the spectrum; again beside each flat one found."""
    flats, top, weak = np.zeros((size, 0)), 0.0, _weak(forth, size)
    while True:
        basis, image = _krylov(forth, back, flats, weak)
        if not np.isfinite(image).all():
            return None
        _, s, vt = np.linalg.svd(image, full_matrices=False)
        top = max(top, float(s[0]))
        zero = s <= singular_below(eps) * top
        flats = np.concatenate([flats, basis @ vt[zero].T], axis=1)
        if not zero.any() or flats.shape[1] >= min(_MOST_FLATS, size):
            return Part(basis, image, flats, top)


def _weak(forth: Map, size: int) -> Vector:
    """Directions that inverse iteration finds weak; none where that takes long."""
    none = np.zeros((size, 0))
    if size > _ELIMINATED:
        return none
    matrix = np.stack([forth(column) for column in np.eye(size)], axis=1)
    shift = np.finfo(np.float64).eps * np.max(np.abs(matrix))
    if not np.isfinite(shift):
        return none
    with contextlib.suppress(np.linalg.LinAlgError):
        inverse = np.linalg.inv(matrix + shift * np.eye(size))
        weak = np.random.default_rng(0).standard_normal((size, _MOST_FLATS))
        for _ in range(3):
            weak = np.linalg.qr(inverse @ np.linalg.qr(inverse.T @ weak)[0])[0]
        return weak
    return none


def _krylov(
    forth: Map, back: Map | None, apart: Vector, weak: Vector
) -> tuple[Vector, Vector]:
    """An orthonormal basis of the powers of `A`, or of `AᵀA`, and `A` times it.

    It begins with `weak`, and is orthogonal to the columns of `apart`. A start whose
    powers are used up is followed by another.
    """
    random, (size, known) = np.random.default_rng(0), apart.shape
    count = max(1, min(size - known, _DIRECTIONS, _NUMBERS // size))
    basis = np.concatenate([apart, np.zeros((size, count))], axis=1)
    image, vector = np.zeros((size, count)), random.standard_normal(size)
    starts = [*weak.T, vector]
    for j in range(count):
        vector = starts[j] if j < len(starts) else vector
        others = basis[:, : known + j]
        new = _orthogonal(vector, others)
        if not np.linalg.norm(new) > _USED_UP * np.linalg.norm(vector):
            new = _orthogonal(random.standard_normal(size), others)
        basis[:, known + j] = new = new / np.linalg.norm(new)
        image[:, j] = forth(new)
        vector = image[:, j] if back is None else back(image[:, j])
    return basis[:, known:], image


def _orthogonal(vector: Vector, others: Vector) -> Vector:
    for _ in range(2):  # the first leaves its own rounding
        vector = vector - others @ (others.T @ vector)
    return vector


def units(forth: Map, back: Map, size: int) -> tuple[Vector, Vector]:
    """Rows and columns of `R A C` of a length near one, from products with signs.

    The iteration of `_equilibrated`, for lengths that are estimated: the squares of
    `A s` for random signs `s` have those of the rows as their mean.
    """
    random, rows, columns = np.random.default_rng(0), np.ones(size), np.ones(size)
    for _ in range(10):
        signs = random.choice([-1.0, 1.0], (2, 4, size))
        across = [rows * forth(columns * s) for s in signs[0]]
        down = [columns * back(rows * s) for s in signs[1]]
        rows, columns = rows / _root_length(across), columns / _root_length(down)
    return rows, columns


def _root_length(samples: list[Vector]) -> Vector:
    length = np.sqrt(np.sqrt(np.mean(np.square(samples), axis=0)))
    return np.where(length > 0, length, 1.0)
