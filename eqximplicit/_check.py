r"""Is this gradient right, and if not, why? All the witnesses, in one call."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
import numpy as np

from ._derivatives import Derivatives, derivatives, deviation, modes
from ._disagreement import disagreements
from ._finding import Finding, number, rendered, serious
from ._forward import (
    failed_solve,
    Forward,
    forward,
    inaccurate,
    not_a_minimum,
)
from ._inputs import guess, independent, static_arrays
from ._point import AnyLayer, examine, Point, Seed, SMALL, subject
from ._spectrum import (
    asymmetry,
    conditioning,
    entrywise_asymmetry,
    estimated,
    false_tags,
    matrix_of,
    Spectrum,
    spectrum_of,
)

Vector = np.ndarray[Any, np.dtype[Any]]


class ImplicitReport(eqx.Module):
    """Whether the implicit derivative of a layer is right; `print` it.

    All figures are dimensionless; `None` where one could not be measured.

    **Attributes:**

    - `findings`: what is the matter, each an [`eqximplicit.Finding`][].
    - `residual`: the largest absolute entry of the residual at the solution.
    - `tolerance`: what was asked for: `residual_tol`, or the solver's own.
    - `attainable`: the residual that one rounding of the state causes.
    - `distance`: roughly how far the value is from the solution, relative.
    - `condition`: the condition number of `∂F/∂y`; above 512 unknowns, a lower bound.
    - `difference_error`: the relative deviation of the implicit directional derivative
        from central differences of the solver, and `difference_noise`: theirs.
    - `unrolled_error`: its deviation from that of the solver's unrolled steps.
    - `transposition_error`: the deviation of reverse mode from forward mode, for an
        adjoint that has both.
    """

    findings: tuple[Finding, ...] = eqx.field(static=True)
    residual: float | None = eqx.field(static=True, default=None)
    tolerance: float | None = eqx.field(static=True, default=None)
    attainable: float | None = eqx.field(static=True, default=None)
    distance: float | None = eqx.field(static=True, default=None)
    condition: float | None = eqx.field(static=True, default=None)
    difference_error: float | None = eqx.field(static=True, default=None)
    difference_noise: float | None = eqx.field(static=True, default=None)
    unrolled_error: float | None = eqx.field(static=True, default=None)
    transposition_error: float | None = eqx.field(static=True, default=None)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that is more than a note."""
        return not serious(self.findings)

    def __str__(self) -> str:
        rows = {
            "residual": f"{number(self.residual)} (asked for {number(self.tolerance)}, "
            f"attainable {number(self.attainable)})",
            "distance from solution": f"{number(self.distance)}, relative",
            "condition number": number(self.condition),
            "against differences": f"{number(self.difference_error)} (their noise "
            f"{number(self.difference_noise)})",
            "against unrolled": number(self.unrolled_error),
            "reverse against forward": number(self.transposition_error),
        }
        return rendered("Implicit derivative", rows, self.findings)


def check_implicit(
    layer: AnyLayer, y0: Any = None, args: Any = None, *, key: Seed = None
) -> ImplicitReport:
    r"""Returns a report on whether the derivative of a layer is right, and if not, why.

    It solves about a dozen times and takes one directional derivative by the layer's
    own adjoint in forward and in reverse mode (or the one it has), by differences of
    the solver, and through the solver's steps where JAX can. It looks at the residual,
    at the jaxpr of the condition, at the tags, and at the spectrum of
    $\partial F/\partial y$: above 512 unknowns along some hundred directions only, as a
    note then says. For tests and notebooks, not for a training loop.

    A solver that is a bare callable is told `args` alone, so its parameters are moved
    there and not in the condition.

    **Arguments:**

    - `layer`: an [`eqximplicit.ImplicitFunction`][], or an
        [`eqximplicit.AbstractImplicitModule`][] (`args` is then the tuple of what
        follows `y0`).
    - `y0`, `args`: what the layer is called with.
    - `key`: a random key for the directions; always the same ones if `None`.

    **Returns:** an [`eqximplicit.ImplicitReport`][]; `print` it, or assert its `ok`.

    **Raises:** `TypeError` for another kind of layer; `ValueError` inside `jit`, and
    as [`eqximplicit.ImplicitFunction`][].

    !!! example

        ```python
        report = eqi.check_implicit(layer, y0, args)
        print(report)
        assert report.ok
        ```
    """
    seed = 0 if key is None else int(jax.random.bits(key))
    random = np.random.default_rng(seed)
    found = subject("check_implicit", layer, y0, args)
    static = static_arrays(found, found.theta.args)
    if static:  # nothing can be solved: such a layer refuses its input
        return ImplicitReport(tuple(static))
    return _check(examine(found), random)


def _check(point: Point, random: np.random.Generator) -> ImplicitReport:
    matrix = matrix_of(point)
    spectrum = estimated(point) if matrix is None else spectrum_of(point, matrix)
    measured = forward(point, matrix, random)
    project = _projection(point, spectrum)
    taken = derivatives(point, project, random)
    findings = [
        *failed_solve(point),
        *inaccurate(measured, point.eps),
        *independent(point),
        *false_tags(point, matrix, spectrum, random),
        *_missing_tag(point, matrix, random),
        *conditioning(point, spectrum),
        *_unexplored(spectrum, point.size),
        *not_a_minimum(point, spectrum),
        *([] if taken is None else disagreements(taken, point.eps)),
        *_missing_mode(point),
        *guess(point, project, random),
    ]
    return _report(tuple(findings), measured, spectrum, taken)


def _report(
    findings: tuple[Finding, ...],
    measured: Forward,
    spectrum: Spectrum | None,
    taken: Derivatives | None,
) -> ImplicitReport:
    unrolled = None if taken is None else taken.unrolled
    return ImplicitReport(
        findings,
        residual=measured.residual,
        tolerance=measured.tolerance,
        attainable=measured.attainable,
        distance=measured.distance,
        condition=None if spectrum is None else spectrum.condition,
        difference_error=None
        if taken is None
        else deviation(taken.implicit, taken.differences.value),
        difference_noise=None if taken is None else taken.relative_noise,
        unrolled_error=None
        if taken is None or unrolled is None
        else deviation(taken.implicit, unrolled),
        transposition_error=None if taken is None else taken.transposition,
    )


def _projection(point: Point, spectrum: Spectrum | None) -> Callable[[Vector], Vector]:
    """Onto the subspace in which the solution is unique."""
    flat_hessian = spectrum is not None and spectrum.flats > 0
    if spectrum is None or not flat_hessian or not lx.is_symmetric(point.operator):
        return lambda vector: vector
    return spectrum.without_flats


def _unexplored(spectrum: Spectrum | None, size: int) -> list[Finding]:
    if size <= SMALL:
        return []
    explored = 0 if spectrum is None else spectrum.explored
    return [
        Finding(
            "note",
            "`∂F/∂y` was examined along some directions only, and the distance from "
            "the solution not at all: what is weak or negative may have been missed.",
            "`∂F/∂y`",
            f"{explored} of {size} directions",
            "Check a smaller problem of the same kind too (up to 512 unknowns).",
        )
    ]


def _missing_mode(point: Point) -> list[Finding]:
    missing = {"forward", "reverse"} - modes(point)
    return [
        Finding(
            "note",
            f"The adjoint has no {mode} mode, so its modes were not compared.",
            "`adjoint`",
            "1 of 2 modes",
            f"For {mode} mode, use `eqi.UnrolledAdjoint(mode={mode!r})`, or "
            "`eqi.ImplicitAdjoint()`, which has both.",
        )
        for mode in missing
    ]


def _missing_tag(
    point: Point, matrix: Vector | None, random: np.random.Generator
) -> list[Finding]:
    if lx.is_symmetric(point.operator) or point.size < 2:
        return []
    error = asymmetry(point, random)
    if matrix is not None:
        error = max(error, entrywise_asymmetry(matrix))
    if not error <= 100 * point.eps:
        return []
    return [
        Finding(
            "note",
            "`∂F/∂y` looks symmetric, but the condition has no tag that says so.",
            "`condition.tags`",
            f"asymmetry {number(error)}",
            "If it always is, pass `tags=lx.symmetric_tag` for a cheaper linear solve.",
        )
    ]
