"""`gradient_report` names the linear solver, why, how well, and what is wrong."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import TypeCheckError

import eqximplicit as eqi

A = np.array([[2.0, 1.0, 0.0], [0.3, 2.0, -1.0], [0.5, 0.0, 3.0]])
SPD = np.array([[2.0, 0.5, 0.1], [0.5, 1.5, -0.3], [0.1, -0.3, 1.0]])
GUESS = jnp.zeros(3)
TARGET = jnp.array([0.3, -0.2, 0.7])


def solve_linear(matrix):
    return lambda y0, target: jnp.linalg.solve(jnp.asarray(matrix), target)


def layer_of(matrix, linear_solver=None, tags=frozenset(), condition=eqi.Root):
    if condition is eqi.Minimum:
        fn = lambda y, b: y @ (jnp.asarray(matrix) @ y) / 2 - b @ y
    else:
        fn = lambda y, b: jnp.asarray(matrix) @ y - b
    adjoint = eqi.ImplicitAdjoint(linear_solver=linear_solver or eqi.AutoLinearSolver())
    return eqi.ImplicitFunction(condition(fn, tags), solve_linear(matrix), adjoint)


def report_of(*args, cotangent=None, **kwargs):
    layer = layer_of(*args, **kwargs)
    return eqi.gradient_report(layer, GUESS, TARGET, cotangent)


def whats(report):
    return " ".join(found.what for found in report.findings)


def test_healthy_system_is_reported_with_solver_reason_and_true_condition():
    report = report_of(A)
    assert report.findings == ()
    assert (report.solver, report.size, report.dtype) == ("DirectLU", 3, "float64")
    assert "3 unknowns" in report.reason
    assert report.residual < 1e-14
    np.testing.assert_allclose(report.condition, np.linalg.cond(A), rtol=1e-10)
    assert report.num_bytes >= 2 * 9 * 8  # the matrix and its inverse


SADDLE = lambda y, a: y[0] ** 2 - y[1] ** 2 + a * y[0] + 0.1 * y[1] ** 4
REFUSED = {
    "double root": (
        eqi.Root(lambda y, a: y**2 - a),
        optx.Newton(1e-8, 1e-8),
        (jnp.ones(1), 0.0),
        "multiple root: the Jacobian vanishes",
    ),
    "saddle": (
        eqi.Minimum(SADDLE),
        optx.BFGS(1e-8, 1e-8),
        (jnp.array([1.0, 0.0]), 1.0),
        "stationary point but no minimum",
    ),
    "no solution": (
        eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 2)),
        optx.GradientDescent(1e-10, 1e-3, 1e-3),
        (jnp.zeros(3), 2.0),
        "value is not a solution",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_derivative_that_the_layer_refuses_is_an_error(name):
    condition, solver, (y0, a), why = REFUSED[name]
    layer = eqi.ImplicitFunction(condition, solver, throw=False)
    assert np.isnan(jax.grad(lambda a: layer(y0, a).sum())(a))
    report = eqi.gradient_report(layer, y0, jnp.asarray(a))
    assert report.findings[0].severity == "error"
    assert "derivative of the layer is NaN" in whats(report)
    assert why in whats(report)


def test_error_of_a_flat_minimum_is_that_of_the_minimum_norm_in_single_precision():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
    matrix = q @ np.diag([0.0, *np.linspace(1, 5, 11)]) @ q.T
    hessian = jnp.asarray(matrix, jnp.float32)
    draws = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12)), jnp.float32)
    b, ct = draws @ hessian
    fn = lambda y, b: y @ (hessian @ y) / 2 - b @ y
    y = jnp.asarray(np.linalg.pinv(matrix) @ np.asarray(b, float), jnp.float32)
    layer = eqi.ImplicitFunction(eqi.Minimum(fn), lambda y0, b: y)
    report = eqi.gradient_report(layer, y, b, ct)
    assert report.solver == "DirectSymmetric"
    assert report.error < 1e-5


def test_tag_chooses_the_solver_that_the_report_names():
    report = report_of(SPD, tags=lx.positive_semidefinite_tag)
    assert report.solver == "DirectSymmetric"
    assert report.findings == ()


def test_matrix_free_solver_reports_its_iterations():
    report = report_of(np.eye(3) - 0.1 * A, eqi.HybridKrylov())
    assert report.solver == "HybridKrylov"
    assert report.iterations is not None
    assert report.iterations > 3
    assert report.residual < 1e-8


@pytest.mark.parametrize(
    ("tag", "matrix"),
    [
        (lx.symmetric_tag, A),
        (lx.positive_semidefinite_tag, np.diag([1.0, -1.0, 2.0])),
        (lx.negative_semidefinite_tag, SPD),
        (lx.diagonal_tag, SPD),
        (lx.tridiagonal_tag, SPD),
        (lx.lower_triangular_tag, A),
        (lx.upper_triangular_tag, A),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else repr(value),
)
def test_false_tag_is_an_error_that_names_the_tag(tag, matrix):
    report = report_of(matrix, eqi.DirectLU(), tags=tag)
    named = [f for f in report.findings if f"`lx.{tag!r}` is false" in f.what]
    assert [found.severity for found in named] == ["error"]


@pytest.mark.parametrize(
    ("tag", "matrix"),
    [
        (lx.symmetric_tag, SPD),
        (lx.positive_semidefinite_tag, SPD),
        (lx.negative_semidefinite_tag, -SPD),
        (lx.diagonal_tag, np.diag([1.0, -1.0, 2.0])),
        (lx.tridiagonal_tag, SPD - np.diag([0.1], 2) - np.diag([0.1], -2)),
        (lx.lower_triangular_tag, np.tril(A)),
        (lx.upper_triangular_tag, np.triu(A)),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else repr(value),
)
def test_true_tag_is_not_reported(tag, matrix):
    assert "is false" not in whats(report_of(matrix, eqi.DirectLU(), tags=tag))


def test_false_tag_is_seen_in_a_system_too_large_for_a_matrix():
    n = 600
    scale = jnp.linspace(1.0, 2.0, n)
    fn = lambda y, b: scale * y + 0.1 * jnp.roll(y, 1) - b
    layer = eqi.ImplicitFunction(
        eqi.Root(fn, lx.symmetric_tag), lambda y0, b: y0, eqi.ImplicitAdjoint()
    )
    report = eqi.gradient_report(layer, jnp.zeros(n), jnp.zeros(n))
    assert report.condition is None
    assert "`lx.symmetric_tag` is false" in whats(report)


def test_flat_direction_of_a_minimum_is_a_warning_and_the_derivative_exists():
    matrix = np.array([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]])
    layer = eqi.ImplicitFunction(
        eqi.Minimum(lambda y, b: y @ (jnp.asarray(matrix) @ y) / 2 - b @ y),
        lambda y0, b: jnp.linalg.pinv(jnp.asarray(matrix)) @ b,
    )
    balanced = jnp.array([1.0, -2.0, 1.0])
    report = eqi.gradient_report(layer, GUESS, balanced)
    (found,) = report.findings
    assert found.severity == "warning"
    assert "minimum-norm" in found.what
    assert "1 singular values" in found.how_bad
    assert report.error < 1e-12
    # A loss that moves along the flat direction has no derivative, and the report says.
    report = eqi.gradient_report(layer, GUESS, balanced, jnp.ones(3))
    assert "derivative is NaN" in whats(report)
    gradient = jax.grad(lambda b: layer(GUESS, b).sum())(balanced)
    assert np.isnan(gradient).all()


def test_singular_system_is_an_error_with_the_weak_direction_by_leaf():
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, a: {"p": y["p"] - a, "q": 0 * y["q"]}), lambda y0, a: y0
    )
    guess = {"p": jnp.array([1.0]), "q": jnp.array([2.0])}
    report = eqi.gradient_report(layer, guess, jnp.array([1.0]))
    found = [f for f in report.findings if "singular" in f.what]
    assert "100% in `y['q']`" in found[0].where
    assert report.condition == np.inf


def test_truncated_series_is_reported_as_inexact_with_its_true_error():
    matrix = np.eye(3) - 0.1 * A
    cotangent = jnp.array([1.0, 2.0, 3.0])
    report = report_of(matrix, eqi.Neumann(2), cotangent=cotangent)
    step = np.eye(3) - matrix.T
    approximate = cotangent + step @ cotangent
    exact = np.linalg.solve(matrix.T, cotangent)
    true_error = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(report.error, true_error, rtol=1e-9)
    (found,) = report.findings
    assert found.severity == "warning"
    assert "inexactly" in found.what


def test_complex_cotangent_is_that_of_jax():
    matrix = (1 + 2j) * A[:2, :2]
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, b: jnp.asarray(matrix) @ y - b),
        lambda y0, b: jnp.linalg.solve(jnp.asarray(matrix), b),
    )
    target = jnp.array([1.0 + 1j, 2.0])
    report = eqi.gradient_report(layer, target, target, jnp.array([1.0 + 2j, 1j]))
    assert report.size == 4
    assert report.findings == ()
    assert report.error < 1e-13


def test_failed_forward_solve_is_an_error():
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**2 + a))
    report = eqi.gradient_report(layer, jnp.array(1.0), jnp.array(1.0))
    assert "forward solve failed" in whats(report)


def test_matrix_that_does_not_fit_is_refused_with_its_bytes():
    solver = eqi.DirectLU(max_bytes=64)
    with pytest.raises(ValueError, match="72 bytes"):
        report_of(A, solver)


def test_adjoint_without_a_linear_solve_is_refused():
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, a: y - a), adjoint=eqi.UnrolledAdjoint()
    )
    with pytest.raises(TypeError, match="`UnrolledAdjoint`, which solves no linear"):
        eqi.gradient_report(layer, GUESS, TARGET)


def test_report_inside_a_trace_is_refused_by_name():
    layer = layer_of(A)
    with pytest.raises(ValueError, match=r"`args` is traced .*outside of `jit`"):
        jax.jit(lambda b: eqi.gradient_report(layer, GUESS, b).residual)(TARGET)


def test_report_of_something_else_is_refused():
    # The run-time type checker may be the one that refuses.
    with pytest.raises((TypeError, TypeCheckError), match=r"ImplicitFunction"):
        eqi.gradient_report(jnp.sin, GUESS, TARGET)


def test_report_fails_where_the_rule_does():
    singular = np.arange(1.0, 10.0).reshape(3, 3)
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, a: jnp.asarray(singular) @ (y - a)),
        lambda y0, a: a,
        eqi.ImplicitAdjoint(lx.QR()),
    )
    cotangent = jnp.array([1.0, 2.0, 4.0])
    gradient = jax.grad(lambda a: layer(GUESS, a) @ cotangent)(TARGET)
    assert np.isnan(gradient).all()
    report = eqi.gradient_report(layer, GUESS, TARGET, cotangent)
    assert "`QR` did not solve the adjoint system" in whats(report)


def test_error_is_that_of_a_regular_system_however_its_rows_are_scaled():
    scaled = np.diag([1e8, 1.0, 1e-6]) @ A
    report = report_of(scaled, cotangent=jnp.array([1.0, 2.0, 3.0]))
    assert report.error < 1e-8
    assert "singular" not in whats(report)


@pytest.mark.parametrize("cotangent", [jnp.ones(2), [jnp.ones(3)], 1j * np.ones(3)])
def test_cotangent_that_does_not_fit_is_refused(cotangent):
    with pytest.raises(ValueError, match="The cotangent|the cotangent"):
        report_of(A, cotangent=cotangent)


def banded_report(linear_solver):
    scale = jnp.linspace(2.0, 3.0, 600)
    fn = lambda y, b: scale * y + 0.5 * jnp.append(y[1:], 0.0) - b
    adjoint = eqi.ImplicitAdjoint(linear_solver)
    layer = eqi.ImplicitFunction(eqi.Root(fn), lambda y0, b: y0, adjoint)
    return eqi.gradient_report(layer, jnp.zeros(600), jnp.zeros(600))


def test_solver_has_its_public_name():
    assert banded_report(eqi.AutoLinearSolver()).solver == "SparseDirect"


def test_estimate_of_the_condition_stands_in_for_a_large_matrix():
    assert 1.0 < banded_report(eqi.SparseDirect()).condition < 10.0


def test_least_norm_that_fails_is_not_advised():
    matrix = np.diag([1.0, 2.0, 0.0])
    report = report_of(matrix, eqi.LeastNorm(), cotangent=jnp.ones(3))
    (found,) = [f for f in report.findings if "did not solve" in f.what]
    assert "LeastNorm(least_squares=True)" in found.remedy
    assert "LeastNorm()" not in found.remedy


def test_print_shows_figures_and_what_to_do():
    text = str(report_of(A, tags=lx.symmetric_tag))
    for word in (
        "not ok",
        "linear solver",
        "adjoint residual",
        "to do",
        "symmetric_tag",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) <= 88
