"""What a Jacobian is like: its condition, weakest direction, and whether tags hold."""

import equinox as eqx
import lineax as lx
import numpy as np

from ._finding import Finding, number
from ._point import flat, Point, shares, SMALL, unflat
from ._subspace import explored, Map, units, Vector
from .linear_solvers._dense import singular_below


class Spectrum(eqx.Module):
    """The ends of the spectrum of `∂F/∂y`, from its matrix or from a part of it.

    **Attributes:**

    - `largest`, `smallest`: its singular values.
    - `null`: the direction that is weakest, flat, of length one.
    - `flat_basis`: left singular vectors of the singular values that are zero to
        working precision. Unless the matrix is claimed to be symmetric, in which case
        lengths mean something, both are judged in units in which all rows and columns
        are alike.
    - `lowest`: the lowest eigenvalue of the symmetric part, over `largest`.
    - `highest`: the highest one.
    - `explored`: the dimension of the subspace that this was measured in. Below the
        number of unknowns, the true ends are no nearer to each other, and there may be
        more flat directions.
    """

    largest: float
    smallest: float
    null: Vector
    flat_basis: Vector
    lowest: float
    highest: float
    explored: int

    @property
    def flats(self) -> int:
        """How many singular values are zero to working precision."""
        return self.flat_basis.shape[1]

    @property
    def least(self) -> str:
        """What goes before a figure that is only a bound."""
        return "at least " if self.explored < self.null.size else ""

    def without_flats(self, vector: Vector) -> Vector:
        """The part of a vector that is orthogonal to all flat directions."""
        return vector - self.flat_basis @ (self.flat_basis.T @ vector)

    @property
    def condition(self) -> float:
        """The ratio of the singular values; infinite for a singular matrix."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")


def matrix_of(point: Point) -> Vector | None:
    """The matrix of `∂F/∂y`, if it is small and finite."""
    if point.size > SMALL:
        return None
    matrix = np.asarray(point.untagged.as_matrix(), np.float64)
    return matrix if np.isfinite(matrix).all() else None


def spectrum_of(point: Point, matrix: Vector | None) -> Spectrum | None:
    """The spectrum of the matrix of a point, if there is one."""
    if matrix is None:
        return None
    eps, symmetric = point.eps, lx.is_symmetric(point.operator)
    u, s, vt = np.linalg.svd(matrix)
    top, null, alike = float(s[0]), vt[-1], s
    if not symmetric:
        scaled, units = _equilibrated(matrix)
        _, alike, vt = np.linalg.svd(scaled)
        null = vt[-1] * units / np.max(units)
    zero = alike <= singular_below(eps) * alike[0]
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2) / (top or 1.0)
    return Spectrum(
        largest=top,
        smallest=0.0 if alike[-1] <= eps * alike[0] else float(s[-1]),
        null=null / np.linalg.norm(null),
        flat_basis=u[:, zero],
        lowest=float(values[0]),
        highest=float(values[-1]),
        explored=point.size,
    )


def estimated(point: Point) -> Spectrum | None:
    """The spectrum along some hundred directions, for a system of any size.

    Those of a Krylov space, which has the ends of the spectrum first, and of inverse
    iteration, as long as it is cheap. Each figure is that of a direction at hand: what
    is found amiss is amiss, and what is not found may be.
    """
    symmetric, size = lx.is_symmetric(point.operator), point.size
    forth, back = _map(point.untagged), _map(point.untagged.transpose())
    part = explored(forth, None if symmetric else back, size, point.eps)
    if part is None:
        return None
    null, flats = part.weakest, part.flats
    smallest = float(np.linalg.norm(forth(null)))
    if not symmetric:
        rows, columns = units(forth, back, size)
        alike = explored(
            lambda v: rows * forth(columns * v),
            lambda v: columns * back(rows * v),
            size,
            point.eps,
        )
        if alike is None:
            return None
        null, flats = alike.weakest * columns / np.max(columns), alike.flats
    values = np.linalg.eigvalsh(_symmetric(part.basis.T @ part.image))
    return Spectrum(
        largest=part.top,
        smallest=0.0 if flats.size else smallest,
        null=null / np.linalg.norm(null),
        flat_basis=flats,
        lowest=float(values[0]) / (part.top or 1.0),
        highest=float(values[-1]) / (part.top or 1.0),
        explored=part.basis.shape[1],
    )


def _map(operator: lx.AbstractLinearOperator) -> Map:
    product, struct = eqx.filter_jit(operator.mv), operator.in_structure()
    return lambda vector: flat(product(unflat(vector, struct)))


def _symmetric(matrix: Vector) -> Vector:
    return (matrix + matrix.T) / 2


def _equilibrated(matrix: Vector) -> tuple[Vector, Vector]:
    """`R A C`, the largest entry of each row and column about one, and `C`.

    The diagonal scalings of Ruiz (*A scaling algorithm to equilibrate both rows and
    columns norms in matrices*, 2001).
    """
    columns = np.ones(len(matrix))
    for _ in range(10):
        sizes = np.abs(matrix)
        rows, cols = (np.sqrt(np.max(sizes, axis=axis)) for axis in (1, 0))
        rows, cols = (np.where(size > 0, size, 1) for size in (rows, cols))
        matrix = matrix / rows[:, None] / cols[None, :]
        columns = columns / cols
    return matrix, columns


def conditioning(point: Point, spectrum: Spectrum | None) -> list[Finding]:
    """Findings on a singular or ill-conditioned `∂F/∂y`."""
    if spectrum is None:
        return []
    where = f"weakest direction: {shares(spectrum.null, point.y)}"
    if spectrum.flats and lx.is_symmetric(point.operator):
        return [_flat_directions(spectrum, where)]
    if spectrum.flats:
        return [_singular(spectrum, where)]
    if spectrum.condition * point.eps**0.5 < 1:
        return []
    lost = number(spectrum.condition * point.eps)
    return [
        Finding(
            "warning",
            "The Jacobian `∂F/∂y` is ill-conditioned: the derivative may have few "
            "digits.",
            where,
            f"condition number {spectrum.least}{number(spectrum.condition)}, relative "
            f"error up to about {lost}",
            "Rescale the unknowns and equations, or use float64.",
        )
    ]


def _singular(spectrum: Spectrum, where: str) -> Finding:
    return Finding(
        "error",
        "The Jacobian `∂F/∂y` is singular at the solution, which is then no "
        "differentiable function of the parameters.",
        where,
        f"{spectrum.least}{spectrum.flats} of {spectrum.null.size} singular values are "
        f"zero to working precision, condition number {number(spectrum.condition)}",
        "Remove redundant equations or a symmetry, look for a multiple root, or pass "
        "`linear_solver=eqi.LeastNorm()` for the minimum-norm derivative; with "
        "`least_squares=True` if the parameters alone may leave no solution.",
    )


def _flat_directions(spectrum: Spectrum, where: str) -> Finding:
    return Finding(
        "warning",
        "The Hessian has flat directions, so the derivative is the minimum-norm one: "
        "it has no part along them.",
        where,
        f"{spectrum.least}{spectrum.flats} singular values are zero to working "
        "precision",
        "Differentiate a loss that does not change along them (its derivative is then "
        "right), or fix the symmetry; any other cotangent has a NaN derivative.",
    )


def probe(operator: lx.AbstractLinearOperator, vector: Vector) -> Vector:
    """`A v` for a flat vector `v`."""
    return flat(operator.mv(unflat(vector, operator.in_structure())))


def entrywise_asymmetry(matrix: Vector) -> float:
    """The largest `|aᵢⱼ - aⱼᵢ|`, relative to the diagonal's `sqrt(|aᵢᵢ aⱼⱼ|)`.

    So it does not depend on the units of the unknowns. For a zero on the diagonal, the
    largest entry of its row and column stands in.
    """
    sizes, diagonal = np.abs(matrix), np.abs(np.diag(matrix))
    largest = np.maximum(sizes.max(axis=0), sizes.max(axis=1))
    units = np.sqrt(np.where(diagonal > 0, diagonal, largest))
    scale = units[:, None] * units[None, :]
    return float(np.max(np.abs(matrix - matrix.T) / np.where(scale > 0, scale, 1)))


def asymmetry(point: Point, random: np.random.Generator) -> float:
    """`|uᵀAv - vᵀAu|` for two random vectors, relative to the sizes of both terms."""
    u, v = random.standard_normal((2, point.size))
    au, av = probe(point.operator, u), probe(point.operator, v)
    scale = np.linalg.norm(u) * np.linalg.norm(av)
    scale += np.linalg.norm(v) * np.linalg.norm(au)
    return float(abs(u @ av - v @ au) / (scale or 1.0))


def curvature(
    point: Point, spectrum: Spectrum | None, random: np.random.Generator
) -> tuple[float, float]:
    """The lowest and highest `vᵀAv`, relative to `‖v‖ ‖A‖`.

    From the spectrum, if there is one; along one random vector otherwise.
    """
    if spectrum is not None:
        return spectrum.lowest, spectrum.highest
    v = random.standard_normal(point.size)
    av = probe(point.operator, v)
    value = float(v @ av / ((np.linalg.norm(v) * np.linalg.norm(av)) or 1.0))
    return value, value


def _outside(matrix: Vector, rows: Vector, tag: object, k: Vector) -> Vector | None:
    """Entries of the columns `k` that a structural tag says are zero."""
    below, away = rows[:, None] - k[None, :], np.abs(rows[:, None] - k[None, :])
    masks: dict[object, Vector] = {
        lx.diagonal_tag: away > 0,
        lx.tridiagonal_tag: away > 1,
        lx.lower_triangular_tag: below < 0,
        lx.upper_triangular_tag: below > 0,
    }
    return matrix[masks[tag]] if tag in masks else None


def _structure_error(
    point: Point, tag: object, matrix: Vector | None, random: np.random.Generator
) -> float:
    n = point.size
    if matrix is None:
        k = np.array([random.integers(n)])
        columns = probe(point.operator, np.eye(1, n, int(k[0]))[0])[:, None]
    else:
        k, columns = np.arange(n), matrix
    outside = _outside(columns, np.arange(n), tag, k)
    if tag is lx.unit_diagonal_tag:
        outside = columns[k, np.arange(len(k))] - 1
    if outside is None or not outside.size:
        return 0.0
    return float(np.max(np.abs(outside)) / (np.max(np.abs(columns)) or 1.0))


def false_tags(
    point: Point,
    matrix: Vector | None,
    spectrum: Spectrum | None,
    random: np.random.Generator,
) -> list[Finding]:
    """Tags of the condition that one random probe (or a small matrix) refutes."""
    limit = point.eps**0.5
    found = list[Finding]()
    for tag in point.operator.tags:
        if tag is lx.symmetric_tag:
            size = asymmetry(point, random)
        elif tag is lx.positive_semidefinite_tag:
            size = max(-curvature(point, spectrum, random)[0], asymmetry(point, random))
        elif tag is lx.negative_semidefinite_tag:
            size = max(curvature(point, spectrum, random)[1], asymmetry(point, random))
        else:
            size = _structure_error(point, tag, matrix, random)
        if not size <= limit:
            found.append(_false_tag(tag, size))
    return found


def _false_tag(tag: object, size: float) -> Finding:
    name = f"lx.{tag!r}"
    return Finding(
        "error",
        f"The tag `{name}` is false for `∂F/∂y`, so a solver that relies on it solves "
        "another system.",
        "`condition.tags`",
        f"violated by {number(size)} of the operator's size",
        f"Drop the tag `{name}` from the condition.",
    )
