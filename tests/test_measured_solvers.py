"""Linear solvers tell what their answers are worth, in any units, and who gave them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import Checked

WIDE = np.random.default_rng(1).normal(size=(3, 5))


def solved(operator, vector, solver, **options):
    out = lx.linear_solve(operator, vector, solver, options=options, throw=False)
    return np.asarray(out.value), bool(out.result == lx.RESULTS.successful), out.stats


def gradient(residual, tags, dtype, solver=None, n=4):
    """That of the sum of the solution, which is claimed to be zero at zero."""
    condition, zero = eqi.Root(residual, tags=tags), jnp.zeros(n, dtype)
    adjoint = eqi.ImplicitAdjoint(solver or eqi.AutoLinearSolver())
    layer = eqi.ImplicitFunction(condition, lambda y0, a: y0, adjoint)
    return np.asarray(jax.grad(lambda a: layer(zero, a).sum())(zero))


# --- Not a number ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_operator_that_is_not_finite_is_a_failure_of_a_truncated_solve(bad):
    matrix = lx.MatrixLinearOperator(jnp.eye(2).at[0, 0].set(bad))
    assert not solved(matrix, jnp.ones(2), eqi.NormalCG(max_steps=50))[1]


def test_zero_is_the_answer_of_a_truncated_solve_to_zero_alone():
    solver = eqi.NormalCG(max_steps=3)
    regular = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
    x, good, _ = solved(regular, jnp.zeros(3), solver)
    assert good
    assert not np.any(x)
    singular = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 2.0, 0.0])))
    assert not solved(singular, jnp.array([0.0, 0.0, 1.0]), solver)[1]
    tall = lx.MatrixLinearOperator(jnp.eye(3, 2))
    assert solved(tall, jnp.array([0.0, 0.0, 1.0]), solver)[1]


def test_gradient_is_nan_where_the_jacobian_of_a_truncated_solve_is():
    residual = lambda y, a: y + jnp.sqrt(y**2) - a  # zero at zero, of no slope
    found = gradient(residual, (), jnp.float64, eqi.NormalCG(max_steps=50))
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    "solver", [eqi.Neumann(3), eqi.Nystrom(2, 0.1), eqi.Tikhonov(), eqi.NormalCG(2)]
)
def test_inexact_solver_refuses_a_nan_and_succeeds_without(solver):
    matrix = jnp.diag(jnp.linspace(0.5, 1.5, 6))
    for entry, good in ((1.0, True), (jnp.nan, False)):
        operator = lx.MatrixLinearOperator(
            matrix.at[0, 0].set(entry), lx.positive_semidefinite_tag
        )
        assert solved(operator, jnp.arange(1.0, 7.0), solver)[1] is good


# --- Units of equations and unknowns --------------------------------------------------

AUTOMATIC = [eqi.AutoLinearSolver(), lx.AutoLinearSolver(well_posed=True)]
RANGES = [(jnp.float32, 1e8, 1e-4), (jnp.float64, 1e14, 1e-9)]


@pytest.mark.parametrize("solver", AUTOMATIC, ids=["ours", "lineax"])
@pytest.mark.parametrize(
    "tag", [lx.diagonal_tag, lx.tridiagonal_tag, lx.lower_triangular_tag], ids=repr
)
@pytest.mark.parametrize(("dtype", "spread", "rtol"), RANGES)
def test_small_entry_of_a_diagonal_is_no_singular_system(
    tag, solver, dtype, spread, rtol
):
    slope = jnp.asarray([1 / spread, 1.0, 2.0, 3.0], dtype)
    found = gradient(lambda y, a: slope * y - a, tag, dtype, solver)
    np.testing.assert_allclose(found, 1 / np.asarray(slope), rtol=rtol)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("solver", AUTOMATIC, ids=["ours", "lineax"])
@pytest.mark.parametrize("tag", [lx.diagonal_tag, lx.tridiagonal_tag], ids=repr)
def test_scale_of_an_operator_does_not_make_it_singular(tag, solver, scale):
    slope = jnp.asarray([1.0, 2.0, 3.0, 4.0], jnp.float32) * jnp.float32(scale)
    found = gradient(lambda y, a: slope * y - a, tag, jnp.float32, solver)
    np.testing.assert_allclose(found * slope, 1, rtol=1e-5)


def test_diagonal_operator_with_a_small_entry_is_solved():
    entries = jnp.asarray([1e-8, 1.0, 2.0, 3.0], jnp.float32)
    operator = lx.DiagonalLinearOperator(entries)
    x, good, _ = solved(operator, jnp.ones_like(entries), eqi.AutoLinearSolver())
    assert good
    np.testing.assert_allclose(x, 1 / np.asarray(entries), rtol=1e-5)


def laplacian(n, ends):
    matrix = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    matrix[0, 0] = matrix[-1, -1] = ends
    return matrix


def tridiagonal(matrix, dtype):
    middle, lower, upper = (np.diag(matrix, k) for k in (0, -1, 1))
    bands = (jnp.asarray(band, dtype) for band in (middle, lower, upper))
    return lx.TridiagonalLinearOperator(*bands)


def in_units(matrix, kind, spread):
    n = len(matrix)
    units = np.random.default_rng(0).permutation(np.geomspace(1 / spread, 1, n))
    return units[:, None] * matrix if kind == "rows" else matrix * units[None, :]


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize(("dtype", "spread", "rtol"), RANGES)
def test_units_of_rows_and_columns_make_no_tridiagonal_system_singular(
    kind, dtype, spread, rtol
):
    matrix = in_units(laplacian(8, 3.0), kind, spread)
    operator = tridiagonal(matrix, dtype)
    for given, exact in ((operator, matrix), (operator.transpose(), matrix.T)):
        x, good, _ = solved(given, jnp.ones(8, dtype), eqi.AutoLinearSolver())
        assert good
        expected = np.linalg.solve(exact, np.ones(8))
        np.testing.assert_allclose(x, expected, rtol=rtol * 10)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize(("dtype", "spread", "rtol"), RANGES)
@pytest.mark.parametrize("n", [5, 200])
def test_singular_tridiagonal_system_is_found_in_any_units(
    kind, dtype, spread, rtol, n
):
    del rtol
    for some_spread in (1.0, spread):
        matrix = in_units(laplacian(n, 1.0), kind, some_spread)
        operator = tridiagonal(matrix, dtype)
        consistent = operator.mv(jnp.asarray(np.cos(np.arange(n)), dtype))
        assert not solved(operator, consistent, eqi.AutoLinearSolver())[1]


def test_zero_on_a_diagonal_is_singular_for_whatever_is_asked():
    entries = jnp.array([0.0, 1.0, 2.0, 3.0])
    operator = lx.DiagonalLinearOperator(entries)
    for vector in (jnp.ones(4), jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.zeros(4)):
        assert not solved(operator, vector, eqi.AutoLinearSolver())[1]


def test_row_that_is_left_unsolved_is_seen_among_larger_ones():
    # Elimination takes the small entry of the large row for its pivot.
    matrix = np.array([[20.0, 1e8, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    operator = tridiagonal(matrix, jnp.float32)
    vector = operator.mv(jnp.ones(3, jnp.float32))
    x, good, _ = solved(operator, vector, Checked(lx.Tridiagonal()))
    assert np.abs(x - 1).max() > 1e-2
    assert not good


def test_falsely_tagged_tridiagonal_system_is_a_failure():
    full = jnp.asarray(laplacian(6, 3.0)).at[0, 5].set(0.5)
    struct = jax.ShapeDtypeStruct((6,), full.dtype)
    operator = lx.FunctionLinearOperator(
        lambda x: full @ x, struct, tags=lx.tridiagonal_tag
    )
    assert not solved(operator, jnp.ones(6), eqi.AutoLinearSolver())[1]


# --- Units of the right-hand side -----------------------------------------------------

SOLVERS = {
    "positive": (eqi.AutoLinearSolver(), lx.positive_semidefinite_tag, 5),
    "triangular": (eqi.AutoLinearSolver(), lx.lower_triangular_tag, 5),
    "untagged": (eqi.AutoLinearSolver(), (), 50),
    "Krylov": (eqi.HybridKrylov(), (), 5),
    "conjugate gradients": (eqi.HybridKrylov(), lx.positive_semidefinite_tag, 5),
    "least norm": (eqi.LeastNorm(), (), 5),
    "Tikhonov": (eqi.Tikhonov(1e-6), (), 5),
    "Neumann": (eqi.Neumann(damping=0.4), (), 5),
    "normal CG": (eqi.NormalCG(rtol=1e-5), (), 5),
    "checked": (Checked(lx.LU()), (), 5),
}


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-18, 1e20, 1e30])
@pytest.mark.parametrize("name", SOLVERS)
def test_right_hand_side_of_any_size_is_answered(name, scale):
    solver, tags, n = SOLVERS[name]
    operator = lx.MatrixLinearOperator(2 * jnp.eye(n, dtype=jnp.float32), tags)
    vector = jnp.arange(1.0, n + 1, dtype=jnp.float32) * jnp.float32(scale)
    x, good, stats = solved(operator, vector, solver)
    assert good
    np.testing.assert_allclose(x, np.asarray(vector) / 2, rtol=1e-5)
    assert stats["residual_norm"] <= 1e-4 * scale * n**2


def test_warm_start_and_residual_are_in_the_units_of_the_right_hand_side():
    operator = lx.MatrixLinearOperator(2 * jnp.eye(5, dtype=jnp.float32))
    vector = jnp.full(5, 4e-24, jnp.float32)
    x, good, stats = solved(operator, vector, eqi.Neumann(1), y0=vector / 4)
    assert good
    np.testing.assert_allclose(x, 3e-24, rtol=1e-6)  # y0 + (b - A y0)
    np.testing.assert_allclose(stats["residual_norm"], 2e-24 * 5**0.5, rtol=1e-5)


def test_absolute_tolerance_is_in_the_units_of_the_right_hand_side():
    operator = lx.MatrixLinearOperator(2 * jnp.eye(5, dtype=jnp.float32))
    vector = jnp.full(5, 1e-12, jnp.float32)
    x, good, stats = solved(operator, vector, eqi.HybridKrylov(rtol=0.0, atol=1e-9))
    assert good
    assert (x == 0).all()
    assert stats["num_steps"] == 0


# --- Who has answered -----------------------------------------------------------------


def report(residual, n, solver, cotangent=None, tags=frozenset()):
    adjoint = eqi.ImplicitAdjoint(solver)
    layer = eqi.ImplicitFunction(eqi.Root(residual, tags), lambda y0, a: y0, adjoint)
    return eqi.gradient_report(layer, jnp.zeros(n), jnp.zeros(n), cotangent)


def test_report_names_the_iteration_that_stood_in_for_elimination():
    n = 3000
    stencil = jnp.asarray(np.arange(n) % 2 == 0, float)

    def residual(y, a):  # `pairs`, by shifts, whose bands are found
        right, left = jnp.append(y[1:], 0.0), jnp.append(0.0, y[:-1])
        return (y - stencil * right - (1 - stencil) * left) / 2 - a

    cotangent = jnp.asarray(np.tile([1.0, -1.0], n // 2))
    found = report(residual, n, eqi.AutoLinearSolver(), cotangent)
    assert found.solver == "HybridKrylov"
    assert "`SparseDirect` had no answer" in found.reason
    assert found.iterations is not None
    assert found.condition is None


def test_report_of_elimination_by_structure_has_its_estimate_and_no_steps():
    n = 600
    slope = jnp.linspace(2.0, 3.0, n)
    residual = lambda y, a: slope * y + 0.5 * jnp.append(y[1:], 0.0) - a
    found = report(residual, n, eqi.AutoLinearSolver())
    assert (found.solver, found.iterations) == ("SparseDirect", None)
    assert 1 < found.condition < 10


def test_report_names_the_direct_solver_that_stood_in_for_an_iteration():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)))
    found = report(lambda y, a: matrix @ y - a, 40, eqi.AutoLinearSolver())
    assert (found.solver, found.iterations) == ("DirectLU", None)
    assert "`HybridKrylov` had no answer" in found.reason
    assert found.num_bytes >= 2 * 40 * 40 * 8  # the matrix and its factors


def test_report_of_an_iteration_that_contracts_names_it():
    residual = lambda y, a: y - 0.1 * jnp.roll(y, 1) * jnp.arange(40.0) / 40 - a
    found = report(residual, 40, eqi.AutoLinearSolver())
    assert found.solver == "HybridKrylov"
    assert "had no answer" not in found.reason
    assert found.iterations > 3


@pytest.mark.parametrize("solver", [lx.LU(), lx.QR()])
def test_report_names_what_stands_in_for_a_factorisation(solver):
    matrix = jnp.asarray(laplacian(5, 3.0))
    found = report(lambda y, a: matrix @ y - a, 5, solver)
    assert found.solver == "DirectLU"
    assert f"for `lx.{type(solver).__name__}`" in found.reason
    assert found.num_bytes >= 2 * 5 * 5 * 8


def test_report_names_what_is_measured_and_not_the_measure():
    residual = lambda y, a: 2 * y - a
    automatic = report(residual, 5, eqi.AutoLinearSolver(), tags=lx.diagonal_tag)
    assert automatic.solver == "Diagonal"
    assert report(residual, 5, lx.GMRES(rtol=1e-9, atol=1e-9)).solver == "GMRES"


# --- Systems that are not square ------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [eqi.NormalCG(rtol=1e-12, atol=1e-12), eqi.NormalCG(5)]
)
@pytest.mark.parametrize("matrix", [WIDE, WIDE.T], ids=["wide", "tall"])
def test_normal_equations_start_where_they_are_told(matrix, solver):
    exact = np.arange(1.0, matrix.shape[1] + 1)
    operator, vector = lx.MatrixLinearOperator(jnp.asarray(matrix)), matrix @ exact
    vector = jnp.asarray(vector)
    x, good, _ = solved(operator, vector, solver, y0=jnp.asarray(exact))
    assert good
    np.testing.assert_allclose(x, exact, rtol=1e-12)
    x, good, _ = solved(operator, vector, solver, y0=jnp.asarray(exact + 1))
    assert good
    np.testing.assert_allclose(matrix @ x, vector, rtol=1e-9)


def test_start_that_does_not_fit_the_unknown_is_refused():
    operator = lx.MatrixLinearOperator(jnp.asarray(WIDE))
    with pytest.raises(ValueError, match="`y0` does not fit the unknown"):
        solved(operator, jnp.ones(3), eqi.NormalCG(5), y0=jnp.ones(3))


def test_normal_equations_begin_without_a_product_of_zero():
    matrix = lx.MatrixLinearOperator(jnp.eye(7) + 0.1)

    def compute(b):
        solver = eqi.NormalCG(5)
        return solver.compute(solver.init(matrix, {}), b, {})[0]

    equations = jax.make_jaxpr(compute)(jnp.ones(7)).eqns
    products = [eqn for eqn in equations if eqn.primitive.name == "dot_general"]
    of_matrix = [e for e in products if any(v.aval.shape == (7, 7) for v in e.invars)]
    assert len(of_matrix) == 2  # of the right-hand side, and of the answer


def krylov_space(matrix, b, steps):
    """An orthonormal basis of the span of `b`, `A b`, ..."""
    basis = [b]
    for _ in range(steps - 1):
        basis.append(matrix @ basis[-1])
    return np.linalg.qr(np.stack(basis, axis=1))[0]


@pytest.mark.parametrize("shape", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_normal_equations_find_the_best_of_their_space(shape, steps):
    draw = np.random.default_rng(steps)
    matrix, b = draw.normal(size=shape), draw.normal(size=shape[0])
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    if shape[0] < shape[1]:  # in the space of `b`, the least error of the minimum norm
        gram = matrix @ matrix.T
        space = krylov_space(gram, b, steps)
        gram = space.T @ gram @ space
        wanted = matrix.T @ space @ np.linalg.solve(gram, space.T @ b)
    else:  # the least residual
        space = krylov_space(matrix.T @ matrix, matrix.T @ b, steps)
        wanted = space @ np.linalg.lstsq(matrix @ space, b, rcond=None)[0]
    x, good, _ = solved(operator, jnp.asarray(b), eqi.NormalCG(steps))
    assert good
    np.testing.assert_allclose(x, wanted, rtol=1e-7, atol=1e-9)


def test_normal_equations_stay_at_the_solution_of_a_singular_system():
    rows = np.random.default_rng(5).normal(size=(9, 6))
    matrix = rows @ np.diag([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]) @ rows.T
    exact = np.linalg.pinv(matrix) @ (matrix @ np.ones(9))
    operator, b = lx.MatrixLinearOperator(jnp.asarray(matrix)), matrix @ np.ones(9)
    for steps in (6, 60, 600):
        x, good, _ = solved(operator, jnp.asarray(b), eqi.NormalCG(steps))
        assert good
        if steps > 6:
            np.testing.assert_allclose(x, exact, rtol=1e-4, atol=1e-5)


def test_normal_equations_with_a_preconditioner():
    draw = np.random.default_rng(6)
    turn, _ = np.linalg.qr(draw.normal(size=(6, 6)))
    near = turn @ np.diag(10.0 ** np.arange(6))  # not symmetric, nor is its inverse
    matrix = (np.eye(6) + 0.05 * draw.normal(size=(6, 6))) @ near
    inverse = lx.MatrixLinearOperator(jnp.asarray(np.linalg.inv(near)))
    b, operator = matrix @ np.ones(6), lx.MatrixLinearOperator(jnp.asarray(matrix))
    b = jnp.asarray(b)
    x, good, _ = solved(operator, b, eqi.NormalCG(6), preconditioner=inverse)
    assert good
    np.testing.assert_allclose(x, np.ones(6), rtol=1e-4)
    plain = solved(operator, b, eqi.NormalCG(6))[0]
    assert np.max(np.abs(np.asarray(plain) - 1)) > 1e-2


# --- Tolerances that are arrays -------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        eqi.AutoLinearSolver(rtol=1.0),
        eqi.HybridKrylov(rtol=1.0, fallback=eqi.DirectLU()),
        eqi.NormalCG(rtol=1.0),
    ],
    ids=["automatic", "fallback", "normal CG"],
)
def test_tolerance_may_be_traced(solver):
    draw = np.random.default_rng(7)
    matrix = np.eye(40) - 0.05 * draw.normal(size=(40, 40))

    def answer(rtol, a):
        exact = eqx.tree_at(lambda solver: solver.rtol, solver, rtol)
        adjoint = eqi.ImplicitAdjoint(exact)
        solve = lambda y0, a: jnp.linalg.solve(matrix, jnp.tanh(a))
        condition = eqi.Root(lambda y, a: matrix @ y - jnp.tanh(a))
        return eqi.ImplicitFunction(condition, solve, adjoint)(jnp.zeros(40), a)

    a = jnp.asarray(draw.normal(size=40))
    exact = np.linalg.solve(matrix, np.diag(1 - np.tanh(a) ** 2))
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jax.jit(jacobian(answer, argnums=1))(1e-9, a)
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-8)
