"""A value that contradicts what its solver claims of it has no derivative."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit._claim import is_saddle

# Badly conditioned, in units that differ by 1e4, and with a solution at the origin in
# one of them.
CURVATURE = np.array([1e4, 1.0, 3e-3])
CENTRE = np.array([1.0, 0.0, -2.0])
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
SINGLE = {"rtol": 1e-4, "atol": 1e-4}


def bowl(y, a):
    d = y - a * jnp.asarray(CENTRE, y.dtype)
    return jnp.sum(jnp.asarray(CURVATURE, y.dtype) * (jnp.cosh(d) - 1))


def slopes(d):
    return jnp.sqrt(jnp.asarray(CURVATURE, d.dtype)) * jnp.sinh(d)


def misfit(y, a):
    return slopes(y - a * jnp.asarray(CENTRE, y.dtype))


def contraction(y, a):
    return 0.5 * jnp.sin(y) + a * jnp.asarray(CENTRE, y.dtype)


def layer(condition, solver, max_steps=20_000):
    return eqi.ImplicitFunction(condition, solver, throw=False, max_steps=max_steps)


SOLVERS = {
    "BFGS": (eqi.Minimum(bowl), optx.BFGS),
    "NonlinearCG": (eqi.Minimum(bowl), optx.NonlinearCG),
    "gradient descent": (
        eqi.Minimum(bowl),
        lambda **tol: optx.GradientDescent(learning_rate=1e-4, **tol),
    ),
    "FIRE": (eqi.Minimum(bowl), eqi.FIRE),
    "Gauss-Newton": (eqi.LeastSquares(misfit), optx.GaussNewton),
    "Levenberg-Marquardt": (eqi.LeastSquares(misfit), optx.LevenbergMarquardt),
    "dogleg": (eqi.LeastSquares(misfit), optx.Dogleg),
    "Levenberg-Marquardt, root": (eqi.Root(misfit), optx.LevenbergMarquardt),
    "Newton": (eqi.Root(misfit), optx.Newton),
    "Picard": (eqi.FixedPoint(contraction), optx.FixedPointIteration),
}


# optimistix's trust regions keep a radius in double precision, beside any state.
DOUBLE_ONLY = ("Levenberg-Marquardt", "Levenberg-Marquardt, root", "dogleg")
QUICK = ("BFGS", "Levenberg-Marquardt", "Newton", "Picard")
CASES = [
    pytest.param(name, np.float64, marks=() if name in QUICK else pytest.mark.slow)
    for name in SOLVERS
]
CASES += [
    pytest.param(name, np.float32, marks=pytest.mark.slow)
    for name in SOLVERS
    if name not in DOUBLE_ONLY
]


def expected(condition, y):
    """`dy/da` in closed form: the solution is `a` times the centre, or contracted."""
    if isinstance(condition, eqi.FixedPoint):
        return CENTRE / (1 - 0.5 * np.cos(y))
    return CENTRE


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_converged_solve_keeps_its_derivative(name, dtype):
    condition, solver = SOLVERS[name]
    tolerances = TIGHT if dtype == np.float64 else SINGLE
    solve = layer(condition, solver(**tolerances))
    y0, a = jnp.zeros(3, dtype) + 0.5, jnp.asarray(1.0, dtype)

    @jax.jit
    def both(a):
        solution = solve.solve(y0, a)
        return solution.value, solution.result, jax.jacfwd(lambda a: solve(y0, a))(a)

    value, result, slope = both(a)
    if not bool(result == eqi.RESULTS.successful):
        assert np.isnan(slope).all()  # it does not claim to have converged
        return
    # The Hessian of the bowl varies by cosh(d), so that of a value d off is off by d.
    value = np.asarray(value)
    off = np.max(np.abs(value - CENTRE)) if name != "Picard" else 0.0
    if off > 1:  # where the Hessian is a multiple of that at the minimum
        assert np.isnan(slope).all()
        return
    np.testing.assert_allclose(
        slope, expected(condition, value), rtol=1e-3, atol=1e-3 + off
    )


def quartic(y, a):
    return jnp.sum(y**4 / 4 - a * y)


def descent(rate):
    return optx.GradientDescent(learning_rate=rate, rtol=1e-6, atol=1e-6)


def gradients(solve, y0, a):
    total = lambda a: jnp.sum(solve(y0, a))
    return jax.jit(jax.grad(total))(a), jax.jit(jax.jacfwd(total))(a)


@pytest.mark.parametrize(
    "size", [(), (4, 5), pytest.param((70,), marks=pytest.mark.slow)], ids=str
)
def test_steps_too_small_to_tell_from_convergence_give_nan(size):
    y0 = jnp.ones(size)
    for slope in gradients(layer(eqi.Minimum(quartic), descent(1e-9)), y0, 8.0):
        assert np.isnan(slope)
    entries = int(np.prod(size))
    for slope in gradients(layer(eqi.Minimum(quartic), descent(0.05)), y0, 8.0):
        np.testing.assert_allclose(slope, entries / 12, rtol=1e-4)


def test_map_that_hardly_moves_gives_nan():
    solve = layer(
        eqi.FixedPoint(lambda y, a: y - 1e-9 * (y**3 - a)),
        optx.FixedPointIteration(rtol=1e-6, atol=1e-6),
    )
    for slope in gradients(solve, jnp.array(1.0), 8.0):
        assert np.isnan(slope)


def in_small_units(unit):
    return eqi.Minimum(lambda y, a: unit * quartic(y, a))


def hardly_moved(y, a):
    return y - 1e-12 * (y**3 - a)


@pytest.mark.parametrize(
    ("small", "plain", "solver"),
    [
        (in_small_units(1e-9), in_small_units(1.0), eqi.FIRE(**TIGHT)),
        (in_small_units(1e-6), in_small_units(1.0), eqi.ScipyMinimize()),
        (
            eqi.FixedPoint(hardly_moved),
            eqi.FixedPoint(lambda y, a: y - 0.05 * (y**3 - a)),
            eqi.ScipyFixedPoint(),
        ),
    ],
    ids=["FIRE", "ScipyMinimize", "ScipyFixedPoint"],
)
def test_function_too_small_to_tell_from_convergence_gives_nan(small, plain, solver):
    y0 = jnp.ones(3)
    for slope in gradients(layer(small, solver), y0, 8.0):
        assert np.isnan(slope)
    for slope in gradients(layer(plain, solver), y0, 8.0):
        np.testing.assert_allclose(slope, 3 / 12, rtol=1e-4)


def slow_map(y, a):
    return 0.99 * y + 0.01 * a + 0.001 * jnp.sin(y)


def test_loose_tolerance_leaves_a_digit_to_be_right():
    y0, a = jnp.array([1.0, 0.3]), 3.0
    stops_early = optx.FixedPointIteration(0.1, 0.1)
    for slope in gradients(layer(eqi.FixedPoint(slow_map), stops_early), y0, a):
        assert np.isnan(slope)
    patient = optx.FixedPointIteration(1e-6, 1e-6)
    for slope in gradients(layer(eqi.FixedPoint(slow_map), patient), y0, a):
        np.testing.assert_allclose(slope, 2 / (1 - 0.1 * np.cos(a)), rtol=1e-3)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_callable_whose_value_is_outside_the_domain_has_failed(jacobian):
    """Its residual is NaN, though the slope of the residual need not be."""
    mirrored = lambda y0, a: -y0
    for fn in (lambda y, a: a * jnp.sqrt(y) - 1, lambda y, a: jnp.log(y) - a):
        solve = layer(eqi.Root(fn), mirrored)
        solution = solve.solve(jnp.array(1.0), 2.0)
        assert bool(solution.result == eqi.RESULTS.nonfinite)
        np.testing.assert_array_equal(solution.value_or(jnp.array(0.5)), 0.5)
        for call in (solve, lambda *args, solve=solve: solve.solve(*args).value):
            assert np.isnan(jacobian(lambda a, call=call: call(jnp.array(1.0), a))(2.0))


def test_only_the_lane_that_is_wrong_is_nan():
    solve = layer(eqi.Minimum(quartic), descent(1e-9))
    guesses = jnp.array([1.0, 2.0])  # the second is the minimum
    slope = jax.jit(jax.vmap(jax.grad(lambda a, y: solve(y, a)), (None, 0)))(
        8.0, guesses
    )
    assert np.isnan(slope[0])
    np.testing.assert_allclose(slope[1], 1 / 12, rtol=1e-6)


def ridge(y, a):
    return jnp.sum(y**4 / 4 - a * y**2 / 2)


@pytest.mark.parametrize("solver", [optx.BFGS(**TIGHT), eqi.FIRE(**TIGHT)], ids=type)
@pytest.mark.parametrize("entries", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_saddle_taken_for_a_minimum_gives_nan(solver, entries):
    solve = layer(eqi.Minimum(ridge), solver)
    for slope in gradients(solve, jnp.zeros(entries).at[0].set(1.0), 2.0):
        assert np.isnan(slope)
    for slope in gradients(solve, jnp.ones(entries), 2.0):
        np.testing.assert_allclose(slope, entries / np.sqrt(8), rtol=1e-4)


STIFF = [(np.float64, 1e9, 1e-8), (np.float64, 1e12, 1e-8), (np.float32, 1e4, 1e-5)]


def stiff_ridge(stiffness):
    return lambda y, a: (
        y[0] ** 4 / 4 - a * y[0] ** 2 / 2 + stiffness * jnp.sum(y[1:] ** 2) / 2
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "dtype", "stiffness", "tol"),
    [
        *((2, *case) for case in STIFF),
        (100, *STIFF[1]),
        *(pytest.param(100, *case, marks=pytest.mark.slow) for case in STIFF[::2]),
    ],
)
def test_saddle_beside_a_stiff_direction_gives_nan(entries, dtype, stiffness, tol):
    y0, a = jnp.zeros(entries, dtype).at[1].set(0.5), jnp.asarray(2.0, dtype)
    condition = eqi.Minimum(stiff_ridge(stiffness))
    for slope in gradients(layer(condition, optx.BFGS(tol, tol)), y0, a):
        assert np.isnan(slope)
    found = layer(condition, eqi.AutoMinimiser()).solve(y0, a)
    assert bool(found.result == eqi.RESULTS.saddle_point)


def ring(y, a):
    return (y @ y - a) ** 2


def sheet(y, a):
    """Flat in half of all directions, and stiff by various degrees in the others."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(y.size // 2, y.size)) / np.sqrt(y.size)
    rows *= np.geomspace(1.0, 1e-2, y.size // 2)[:, None]
    return jnp.sum(jnp.cosh(jnp.asarray(rows, y.dtype) @ (y - a)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "dtype"),
    [
        (2, np.float64),
        (100, np.float64),
        (100, np.float32),
        pytest.param(2, np.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("valley", [ring, sheet], ids=["ring", "sheet"])
def test_flat_minimum_is_no_saddle(valley, entries, dtype):
    tol = 1e-8 if dtype == np.float64 else 1e-4
    y0 = jnp.asarray(np.linspace(0.5, 1.5, entries) / np.sqrt(entries), dtype)
    a = jnp.asarray(1.0, dtype)
    found = layer(eqi.Minimum(valley), eqi.AutoMinimiser(tol, tol)).solve(y0, a)
    assert bool(found.result != eqi.RESULTS.saddle_point)
    # Beside the minimum, too, where a curved valley bends down.
    for offset in (0.0, -tol / 10):
        y = found.value * (1 + offset)
        gradient, hessian = jax.linearize(lambda y: jax.grad(valley)(y, a), y)
        assert not bool(is_saddle(y, gradient, hessian))


def test_flat_direction_is_no_saddle():
    valley = lambda y, a: (y[0] - y[1] - a) ** 2
    solve = layer(eqi.Minimum(valley), optx.BFGS(**TIGHT))
    slope = jax.jit(jax.grad(lambda a: solve(jnp.zeros(2), a) @ jnp.array([1.0, -1.0])))
    np.testing.assert_allclose(slope(1.0), 1.0, rtol=1e-6)


def test_callable_that_stops_early_on_purpose_keeps_its_derivative():
    one_step = lambda y, a: y - 0.01 * (y**3 - a)
    for slope in gradients(layer(eqi.Minimum(quartic), one_step), jnp.array(1.0), 8.0):
        np.testing.assert_allclose(slope, 1 / (3 * 1.07**2), rtol=1e-9)


def test_objective_without_a_minimum_is_called_flat():
    solve = layer(eqi.Minimum(lambda y, a: jnp.exp(-a * y)), eqi.AutoMinimiser(), 512)
    solution = solve.solve(jnp.array(1.0), jnp.array(1.0))
    assert bool(solution.result == eqi.RESULTS.flat_objective)


def test_forward_solve_computes_nothing_of_it():
    solve = layer(eqi.Minimum(quartic), descent(0.05))
    text = jax.jit(lambda a: solve(jnp.ones(3), a)).lower(8.0).as_text()
    slope = jax.jit(jax.grad(lambda a: solve(jnp.ones(3), a).sum())).lower(8.0)
    assert "syevd" not in text
    assert "syevd" in slope.as_text()


@pytest.mark.parametrize("unit", [1e-9, 1e-10])
def test_residual_in_small_units_is_no_root(unit):
    """What is below the absolute tolerance far from a root has no derivative."""
    solve = layer(eqi.Root(lambda y, a: unit * (y**3 - a)), None)
    for slope in gradients(solve, jnp.array(5.0), 1.0):
        assert np.isnan(slope)


def test_no_root_but_a_residual_that_dies_out_has_no_derivative():
    solve = layer(eqi.Root(lambda y, a: a * jnp.exp(y)), None)
    for slope in gradients(solve, jnp.array(0.0), 1.0):
        assert np.isnan(slope)


def test_saddle_that_scipy_stops_at_has_no_derivative():
    saddle = lambda y, a: (y[0] - a) ** 2 + (y[1] ** 2 - 1) ** 2
    solve = layer(eqi.Minimum(saddle), eqi.ScipyMinimize())
    slope = jax.jacrev(lambda a: solve(jnp.array([3.0, 0.0]), a))(1.0)
    assert np.isnan(slope).all()


@pytest.mark.parametrize("solver", [lx.QR(), lx.LU(), lx.CG(1e-8, 1e-8)], ids=str)
def test_singular_lane_of_any_lineax_solver_is_nan(solver):
    singular = np.arange(1.0, 10.0).reshape(3, 3)
    if isinstance(solver, lx.CG):
        singular = singular.T @ singular
    regular = np.diag([1.0, 2.0, 4.0]) + 0.1
    tags = lx.positive_semidefinite_tag if isinstance(solver, lx.CG) else frozenset()
    fn = lambda y, args: args[0] @ y - args[1]

    def solution(matrix, b):
        condition = eqi.Root(fn, tags)
        return eqi.implicit_solution(
            condition, jnp.ones(3), (matrix, b), linear_solver=solver
        )

    matrices = jnp.asarray(np.stack([singular, regular]))
    slope = jax.vmap(jax.grad(lambda b, m: solution(m, b)[0]), (None, 0))
    found = slope(jnp.ones(3), matrices)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], np.linalg.inv(regular)[0], rtol=1e-6)


@pytest.mark.parametrize("solver", [lx.QR(), lx.LU(), lx.AutoLinearSolver(True)])
def test_consistent_singular_system_of_a_direct_solver_has_no_derivative(solver):
    """Elimination ends finite there, and the residual of its answer is small."""
    matrix = jnp.arange(1.0, 10.0).reshape(3, 3)
    condition = eqi.Root(lambda y, a: matrix @ (y - a))
    solution = lambda a: eqi.implicit_solution(
        condition, jnp.ones(3), a, linear_solver=solver
    )
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert np.isnan(jacobian(solution)(jnp.ones(3))).all()
