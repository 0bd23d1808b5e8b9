"""Whether the value is a solution: its residual, its tolerance, and the precision."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._condition import LeastSquares, Minimum
from ._entries import max_abs
from ._finding import Finding, number
from ._point import flat, is_iterative, Point, unflat
from ._solution import RESULTS
from ._spectrum import probe, Spectrum
from ._state import real_dtype
from .solvers._curvature import is_negative
from .solvers._default import fitted, with_tolerances
from .solvers.auto_root_finder import AutoRootFinder

Vector = np.ndarray[Any, np.dtype[Any]]

# A solver stops on its own measure of the error, which is not the residual's norm.
_SLACK = 10.0
# A derivative taken this far from the solution (relative) has about three digits.
_FAR = 1e-3
# Newton's step changes the Jacobian of a simple root by O(distance), of a double one by
# a half of it, of a triple one by 5/9.
_BENT = 0.1


class Forward(eqx.Module):
    """How good a solution is. Largest absolute entries, dimensionless.

    **Attributes:**

    - `residual`: the residual; `tolerance`: what was asked for, if anything was.
    - `attainable`: the residual that rounding of the state alone causes.
    - `distance`: `‖s‖ / ‖y‖` of the Newton step `s`, roughly how far off the solution
        is; `step`: `‖s‖` itself. `bend`: by how much `∂F/∂y · s` changes along it,
        relative; a half at a double root, and next to nothing at a simple one.
    """

    residual: float
    tolerance: float | None
    attainable: float
    distance: float | None
    step: float | None
    bend: float | None


def _tolerance(point: Point, attainable: float) -> float | None:
    layer = point.subject.layer
    if layer.residual_tol is not None:
        return layer.residual_tol
    if not is_iterative(layer):
        return None
    given = fitted(layer.solver, point.y)
    solver = with_tolerances(given, point.y)
    atol = getattr(solver, "atol", None)
    if atol is None:
        return None
    if isinstance(solver, AutoRootFinder):  # whose `rtol` is without effect
        return max(atol, attainable) if given.atol is None else float(atol)
    rtol = getattr(solver, "rtol", 0.0)
    return float(atol) + float(rtol) * float(max_abs(point.y))


def _attainable(point: Point, random: np.random.Generator) -> float:
    """The change of the residual as every entry of the state moves by one rounding."""

    def rounded(x: Any) -> Any:
        signs = random.choice([-1.0, 1.0], x.shape)
        step = jnp.asarray(float(jnp.finfo(x.dtype).eps) * signs, jnp.abs(x).dtype)
        return x + (x * step.astype(x.dtype))

    moved = point.residual(jtu.tree_map(rounded, point.y))
    change = jtu.tree_map(lambda a, b: a - b, moved, point.residual(point.y))
    return float(max_abs(change))


def _newton_step(
    point: Point, matrix: Vector | None
) -> tuple[float, float, float] | tuple[None, None, None]:
    """The length of the Newton step, relative and not, and the bend along it."""
    residual = flat(point.residual(point.y))
    if matrix is None or not np.isfinite(residual).all():
        return None, None, None
    step = -np.linalg.pinv(matrix, rcond=1e-10) @ residual
    moved = jtu.tree_map(lambda y, s: y + s, point.y, unflat(step, point.y))
    before, after = matrix @ step, probe(point.jacobian(moved), step)
    size, rate = np.linalg.norm(flat(point.y)), np.linalg.norm(before)
    bend = np.linalg.norm(after - before) / (rate or 1.0)
    length = float(np.linalg.norm(step))
    return length / float(size or 1.0), length, float(bend)


def forward(
    point: Point, matrix: Vector | None, random: np.random.Generator
) -> Forward:
    """Measures how good the solution is."""
    distance, step, bend = _newton_step(point, matrix)
    attainable = _attainable(point, random)
    return Forward(
        residual=float(point.solution.stats["residual_norm"]),
        tolerance=_tolerance(point, attainable),
        attainable=attainable,
        distance=distance,
        step=step,
        bend=bend,
    )


def failed_solve(point: Point) -> list[Finding]:
    """A finding if the solver says that it failed."""
    result = point.solution.result
    if bool(result == RESULTS.successful):
        return []
    message = " ".join(str(RESULTS[result]).split())
    return [
        Finding(
            "error",
            f"The forward solve failed, so the derivative is NaN. {message}",
            "`layer.solve(y0, args).result`",
            f"residual {number(float(point.solution.stats['residual_norm']))}",
            "Make the forward solve succeed first.",
        )
    ]


def inaccurate(measured: Forward, eps: float) -> list[Finding]:
    """Findings on a residual above its tolerance, or a tolerance below rounding."""
    found = list[Finding]()
    tolerance, attainable = measured.tolerance, measured.attainable
    floor = _SLACK * max(attainable, float(np.finfo(np.float64).tiny))
    unmet = tolerance is not None and measured.residual > _SLACK * tolerance
    far = measured.distance is not None and measured.distance > _FAR
    # At a solution that is zero, all that is left is of its size.
    within = eps**0.5 if tolerance is None else _SLACK * tolerance
    far = far and (measured.step or 0.0) > within
    if (unmet and measured.residual > floor) or far:
        found.append(_not_solved(measured))
    elif measured.bend is not None and measured.bend > _BENT:
        found.append(_multiple(measured))
    if tolerance is not None and tolerance < attainable:
        found.append(
            Finding(
                "warning",
                "The tolerance is below what this precision can resolve.",
                "the `rtol`/`atol` of `layer.solver`, or `residual_tol`",
                f"tolerance {number(tolerance)}, one rounding of the state moves the "
                f"residual by {number(attainable)} (epsilon {number(eps)})",
                "Loosen the tolerance, rescale the equations, or use float64.",
            )
        )
    return found


def _not_solved(measured: Forward) -> Finding:
    asked = measured.tolerance
    return Finding(
        "error",
        "The value is not a solution: the implicit derivative belongs to the solution "
        "of another equation, `F(y, θ) = F(y*, θ)`.",
        "`layer.solve(y0, args).value`",
        f"residual {number(measured.residual)}, tolerance "
        f"{'none given' if asked is None else number(asked)}, distance from the "
        f"solution about {number(measured.distance)} of its size",
        "Take more steps or a tighter tolerance; check that the condition is the "
        "equation that this solver solves (sign, damping); set `residual_tol`. To "
        "differentiate few steps on purpose, use `eqi.UnrolledAdjoint()`.",
    )


def _multiple(measured: Forward) -> Finding:
    return Finding(
        "warning",
        "The solution looks like a multiple root: the Jacobian vanishes with the "
        "residual, so it is known to a part of its digits only.",
        "`layer.solve(y0, args).value`",
        f"`∂F/∂y` changes by {number(measured.bend)} of itself over the distance "
        f"to the solution, {number(measured.distance)} of its size",
        "State an equation with a simple root (at a double root, its derivative), or "
        "move the parameters off the degenerate point.",
    )


def _is_saddle(point: Point, spectrum: Spectrum) -> bool:
    dtype = real_dtype(point.y)
    largest = jnp.asarray(spectrum.largest, dtype)
    lowest = jnp.asarray(spectrum.lowest * spectrum.largest, dtype)
    return bool(is_negative(lowest, largest, point.y, point.residual(point.y)))


def not_a_minimum(point: Point, spectrum: Spectrum | None) -> list[Finding]:
    """A finding if a claimed minimum has a direction of negative curvature."""
    extremal = isinstance(point.condition, (Minimum, LeastSquares))
    if not extremal or spectrum is None or not _is_saddle(point, spectrum):
        return []
    return [
        Finding(
            "error",
            "The value is a stationary point but no minimum: the Hessian has a "
            "direction of negative curvature.",
            "`layer.solve(y0, args).value`",
            f"lowest curvature {number(spectrum.lowest)} of the largest",
            "Perturb `y0` away from the symmetry or saddle, or use a solver that "
            "checks the curvature, such as `eqi.AutoMinimiser()`.",
        )
    ]
