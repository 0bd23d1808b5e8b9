r"""Which linear system a derivative solves, by which solver, why, and how well."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array

from ._adjoint import ImplicitAdjoint
from ._custom_types import LinearSolver, PyTree
from ._finding import Finding, number, rendered, serious
from ._forward import failed_solve, forward, inaccurate, not_a_minimum
from ._linear_rule import factorised, LinearRule, transposed
from ._point import AnyLayer, examine, flat, implicit_adjoint, Point, subject, unflat
from ._spectrum import conditioning, false_tags, matrix_of, Spectrum, spectrum_of
from ._state import real_dtype, to_real
from ._vector import vector_at
from .linear_solvers import (
    AutoLinearSolver,
    Checked,
    DirectLU,
    DirectSymmetric,
    HybridKrylov,
    SparseDirect,
)
from .linear_solvers._dense import singular_below
from .linear_solvers._placed import OnOneDevice
from .linear_solvers._residual import scale, where, zeros_like
from .linear_solvers.checked import checked

Vector = np.ndarray[Any, np.dtype[Any]]
_GIVEN = "the `linear_solver` of the adjoint"
# They take no steps: those that are reported with their answer led to none.
_DIRECT = (DirectLU, DirectSymmetric, SparseDirect)


class GradientReport(eqx.Module):
    """How the reverse-mode derivative of a layer is computed; `print` it.

    **Attributes:**

    - `solver`: the class of the linear solver that has answered, and `reason`: why that
        one. It may be another than the one that was chosen first, where that failed.
    - `size`: the number of real unknowns, and `dtype`: the dtype they are solved in.
    - `residual`: `‖ȳ - (∂F/∂y)ᵀ x‖ / ‖ȳ‖` of the adjoint solve, measured. Euclidean,
        dimensionless.
    - `iterations`: the number of steps of the linear solver; `None` if it reports none.
    - `condition`: the condition number of `∂F/∂y`, for up to 512 unknowns; for more,
        the estimate of the linear solver, if it makes one.
    - `num_bytes`: what that solver keeps of `∂F/∂y` (a factorisation, say).
    - `error`: the relative error of the adjoint vector `x` against a dense solve, or
        the pseudo-inverse of a singular matrix, for up to 512 unknowns.
    - `findings`: what is the matter, each an [`eqximplicit.Finding`][].
    """

    solver: str = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    size: int = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    residual: float = eqx.field(static=True)
    iterations: int | None = eqx.field(static=True)
    condition: float | None = eqx.field(static=True)
    num_bytes: int = eqx.field(static=True)
    error: float | None = eqx.field(static=True)
    findings: tuple[Finding, ...] = eqx.field(static=True)

    def __str__(self) -> str:
        steps = self.iterations
        rows = {
            "linear solver": self.solver,
            "chosen because": self.reason,
            "unknowns": f"{self.size} ({self.dtype})",
            "adjoint residual": f"{number(self.residual)}, relative",
            "adjoint error": f"{number(self.error)}, relative",
            "iterations": "none reported" if steps is None else str(steps),
            "condition number": number(self.condition),
            "memory": f"{self.num_bytes} bytes",
        }
        return rendered("Gradient report", rows, self.findings)


class _Adjoint(eqx.Module):
    """The outcome of one transposed solve."""

    x: PyTree[Array]
    residual: Array
    successful: Array
    stats: dict[str, Any]


@eqx.filter_jit
def _solved(
    point: Point,
    transpose: lx.AbstractLinearOperator,
    adjoint: ImplicitAdjoint,
    ct: PyTree[Array],
) -> _Adjoint:
    """The adjoint system, solved by the very steps of the rule."""
    solver = checked(adjoint.linear_solver, point.operator)
    tags, trusted = point.condition.tags, jnp.asarray(True)
    rule = LinearRule(solver, adjoint.options, tags, trusted)
    y, value = (to_real(v, _dtype(ct)) for v in (point.y, point.residual(point.y)))
    asked, found = transposed(rule, factorised(rule, point.operator, value, y), ct)
    x = where(found.asked, found.x, zeros_like(found.x))
    x = x if asked.back is None else scale(asked.back, x)
    left = jtu.tree_map(jnp.subtract, ct, transpose.mv(x))
    residual = _norm(left) / jnp.maximum(_norm(ct), jnp.finfo(_dtype(ct)).tiny)
    return _Adjoint(x, residual, found.good & jnp.isfinite(residual), found.stats)


def _norm(tree: PyTree[Array]) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jtu.tree_leaves(tree)))


def _dtype(tree: PyTree[Array]) -> Any:
    return jtu.tree_leaves(tree)[0].dtype


class _Answerer(NamedTuple):
    """The solver that has answered, why it was that one, and for which it stands in."""

    solver: LinearSolver
    reason: str
    stands_for: str | None

    @property
    def name(self) -> str:
        return _name(self.solver)

    @property
    def words(self) -> str:
        other = "" if self.stands_for is None else f" for `{self.stands_for}`"
        return f"`{self.name}`{other}"


def _answerer(
    operator: lx.AbstractLinearOperator, adjoint: ImplicitAdjoint, stats: dict[str, Any]
) -> _Answerer:
    given, stands_for = adjoint.linear_solver, None
    solver, reason = checked(given, operator), f"it is {_GIVEN}"
    if isinstance(solver, AutoLinearSolver):
        solver, reason = solver.select(operator)
    elif not isinstance(solver, (type(given), Checked)):
        stands_for = _name(given)
        reason = f"it stands in for `lx.{stands_for}`, {_GIVEN}"
    turns = _in_turn(solver)
    number = min(int(stats.get("fallback", 0)), len(turns) - 1)
    if number > 0:
        failed = ", ".join(f"`{_name(solver)}`" for solver in turns[:number])
        reason = f"{reason}. Here {failed} had no answer, and this one is next"
    return _Answerer(turns[number], reason, stands_for)


def _name(solver: LinearSolver) -> str:
    return type(solver.solver if isinstance(solver, Checked) else solver).__name__


def _in_turn(solver: LinearSolver) -> list[LinearSolver]:
    """The solvers that are asked one after the other, until one has an answer."""
    if isinstance(solver, OnOneDevice):
        return [solver.direct, *_in_turn(solver.otherwise)]
    if isinstance(solver, HybridKrylov) and solver.fallback is not None:
        return [solver, solver.fallback]
    return [solver]


def _steps(solver: LinearSolver, stats: dict[str, Any]) -> int | None:
    steps = None if isinstance(solver, _DIRECT) else stats.get("num_steps")
    return None if steps is None else int(steps)


def _kept_bytes(
    solver: LinearSolver, operator: lx.AbstractLinearOperator, options: dict[str, Any]
) -> int:
    state = eqx.filter_eval_shape(solver.init, operator, options)
    kept = [x for x in jtu.tree_leaves(state) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(x.size * x.dtype.itemsize for x in kept)


def _default_cotangent(
    point: Point, spectrum: Spectrum | None, random: np.random.Generator
) -> PyTree[Array]:
    """A random cotangent, without a part along the flat directions of a Hessian."""
    ct = random.standard_normal(point.size)
    if spectrum is not None and spectrum.flats and lx.is_symmetric(point.operator):
        ct = spectrum.without_flats(ct)
    return unflat(ct, point.operator.in_structure())


def _as_cotangent(point: Point, cotangent: PyTree[Any]) -> PyTree[Array]:
    # JAX pairs cotangents without a conjugate; the real form pairs real with real.
    like = vector_at("cotangent", cotangent, "the solution", point.y)
    conjugate = jtu.tree_map(jnp.conj, like)
    return to_real(conjugate, real_dtype(point.y))


def _error(
    matrix: Vector | None, spectrum: Spectrum | None, x: Vector, ct: Vector, eps: float
) -> float | None:
    if matrix is None or spectrum is None:
        return None
    if spectrum.flats:
        exact = np.linalg.pinv(matrix.T, rcond=singular_below(eps)) @ ct
    else:
        exact = np.linalg.solve(matrix.T, ct)
    return float(np.linalg.norm(x - exact) / (np.linalg.norm(exact) or 1.0))


def _condition(spectrum: Spectrum | None, stats: dict[str, Any]) -> float | None:
    if spectrum is not None:
        return spectrum.condition
    estimate = stats.get("condition_estimate")
    return None if estimate is None or np.isnan(estimate) else float(estimate)


def gradient_report(
    layer: AnyLayer, y0: Any = None, args: Any = None, cotangent: Any = None
) -> GradientReport:
    r"""Returns how the derivative of a layer is computed, and how well.

    Solves the forward problem and the adjoint system
    $(\partial F/\partial y)^T x = \bar y$ outside of any derivative, and measures its
    residual. Then it takes the layer's own derivative, which is NaN where the value is
    not to be trusted, and says so. Never part of a training loop: it looks at values.

    **Arguments:**

    - `layer`: an [`eqximplicit.ImplicitFunction`][] whose adjoint is an
        [`eqximplicit.ImplicitAdjoint`][], or an
        [`eqximplicit.AbstractImplicitModule`][] (`args` is then the tuple of what
        follows `y0`).
    - `y0`, `args`: what the layer is called with.
    - `cotangent`: `ȳ`, structured as the solution: the derivative of your loss in `y`.
        Random by default, without a part along flat directions.

    **Returns:** a [`eqximplicit.GradientReport`][]; `print` it.

    **Raises:** `TypeError` for another kind of layer or adjoint; `ValueError` inside
    `jit`, for a cotangent that does not fit the solution, and whatever the linear
    solver refuses (a matrix that does not fit, say).

    !!! example

        ```python
        print(eqi.gradient_report(layer, y0, args))
        ```
    """
    point = examine(subject("gradient_report", layer, y0, args))
    adjoint = implicit_adjoint(point.subject.layer)
    if adjoint is None:
        raise TypeError(
            "`gradient_report` explains the linear solve of an `ImplicitAdjoint`; the "
            f"adjoint is `{type(point.subject.layer.adjoint).__name__}`, which solves "
            "no linear system. Use `check_implicit` to compare derivatives."
        )
    matrix, random = matrix_of(point), np.random.default_rng(0)
    spectrum = spectrum_of(point, matrix)
    if cotangent is None:
        ct = _default_cotangent(point, spectrum, random)
    else:
        ct = _as_cotangent(point, cotangent)
    solved = _solved(point, point.untagged.transpose(), adjoint, ct)
    error = _error(matrix, spectrum, flat(solved.x), flat(ct), point.eps)
    answerer = _answerer(point.operator, adjoint, solved.stats)
    findings = [
        *failed_solve(point),
        *false_tags(point, matrix, spectrum, random),
        *conditioning(point, spectrum),
        *_inexact(answerer, solved, error, point.eps),
        *_not_reused(adjoint),
    ]
    if not serious(findings) and _is_refused(point, ct):
        findings += _why_refused(point, matrix, spectrum, random)
    return GradientReport(
        solver=answerer.name,
        reason=answerer.reason,
        size=point.size,
        dtype=str(real_dtype(point.y)),
        residual=float(solved.residual),
        iterations=_steps(answerer.solver, solved.stats),
        condition=_condition(spectrum, solved.stats),
        num_bytes=_kept_bytes(answerer.solver, point.operator, adjoint.options),
        error=error,
        findings=tuple(findings),
    )


def _not_reused(adjoint: ImplicitAdjoint) -> list[Finding]:
    if not adjoint.reuse:
        return []
    return [
        Finding(
            "note",
            "The figures are without the preconditioner that `reuse` takes from the "
            "forward solver.",
            "`adjoint.reuse`",
            "iterations, residual and error",
            "`eqi.check_implicit` takes the derivative with it.",
        )
    ]


def _is_refused(point: Point, ct: PyTree[Array]) -> bool:
    """Whether the layer's own reverse mode has no number for this cotangent."""
    moving, resting = eqx.partition(point.subject.theta, eqx.is_inexact_array)

    def value(moving: Any) -> Any:
        return point.subject.solve(eqx.combine(moving, resting)).value

    # JAX pairs cotangents without a conjugate.
    ct_y = jtu.tree_map(jnp.conj, unflat(flat(ct), point.y))
    (pulled,) = eqx.filter_vjp(value, moving)[1](ct_y)
    return any(bool(jnp.isnan(x).any()) for x in jtu.tree_leaves(pulled))


def _why_refused(
    point: Point,
    matrix: Vector | None,
    spectrum: Spectrum | None,
    random: np.random.Generator,
) -> list[Finding]:
    return [
        Finding(
            "error",
            "The derivative of the layer is NaN, although the adjoint system has a "
            "solution: the value contradicts what its solver claims of it, as a "
            "multiple root does, a saddle, or a value that is no solution; or `∂F/∂θ` "
            "is not finite.",
            "the solution",
            f"largest residual {number(float(point.solution.stats['residual_norm']))}",
            "Tighten the solver's tolerance or start elsewhere; "
            "`eqi.check_implicit(layer, y0, args)` compares more.",
        ),
        *not_a_minimum(point, spectrum),
        *inaccurate(forward(point, matrix, random), point.eps),
    ]


def _inexact(
    answerer: _Answerer, solved: _Adjoint, error: float | None, eps: float
) -> list[Finding]:
    residual = float(solved.residual)
    figures = f"relative residual {number(residual)}, relative error {number(error)}"
    if not bool(solved.successful):
        other = "LeastNorm()"
        if answerer.name == "LeastNorm":  # which has found no solution
            other = "LeastNorm(least_squares=True)"
        return [
            Finding(
                "error",
                f"{answerer.words} did not solve the adjoint system for this "
                "cotangent, so the derivative is NaN.",
                "`adjoint.linear_solver`",
                figures,
                "Pass the cotangent of your own loss; if it fails too, use another "
                f"`linear_solver`, such as `eqi.{other}` for a singular system.",
            )
        ]
    if residual <= eps**0.5:
        return []
    return [
        Finding(
            "warning",
            "The adjoint system is solved inexactly, so the derivative is approximate.",
            f"`adjoint.linear_solver`, here {answerer.words}",
            figures,
            "If that is not on purpose, tighten its tolerance, give it more steps, or "
            "use `eqi.AutoLinearSolver()`.",
        )
    ]
