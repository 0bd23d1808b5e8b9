"""Minima that are hard to find: one is claimed only where it is, and found to rounding.

Problems and values: J. J. Moré, B. S. Garbow and K. E. Hillstrom, Testing unconstrained
optimization software, ACM Trans. Math. Softw. 7 (1981), by their numbers there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqximplicit as eqi
from eqximplicit import RESULTS
from eqximplicit.solvers._stationary import outlook

MEYER_TIMES = 45 + 5 * np.arange(1.0, 17)
MEYER_VALUES = np.array(
    [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744]
    + [8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872.0]
)
MEYER_START = np.array([0.02, 4000, 250])
MEYER_MINIMUM = np.array([5.60963647e-3, 6.18134635e3, 3.45223635e2])
MEYER_SQUARES = 87.94585517


def constant(y, values):
    return jnp.asarray(values, y.dtype)


def beale(y, _):  # 5, and as many plain unknowns as there are
    x, z, rest = y[0], y[1], y[2:]
    misfit = [1.5 - x + x * z, 2.25 - x + x * z**2, 2.625 - x + x * z**3]
    return sum(r**2 for r in misfit) + jnp.sum((rest - 1) ** 2)


def meyer(y, _):  # 10
    times, values = constant(y, MEYER_TIMES), constant(y, MEYER_VALUES)
    return y[0] * jnp.exp(y[1] / (times + y[2])) - values


def powell_badly_scaled(y, _):  # 3
    return jnp.stack([1e4 * y[0] * y[1] - 1, jnp.sum(jnp.exp(-y)) - 1.0001])


def watson(y, _):  # 20
    powers = np.arange(y.size)
    t = np.arange(1, 30)[:, None] / 29
    slopes = powers * t ** np.maximum(powers - 1, 0)
    misfit = constant(y, slopes) @ y - (constant(y, t**powers) @ y) ** 2 - 1
    return jnp.sum(misfit**2) + y[0] ** 2 + (y[1] - y[0] ** 2 - 1) ** 2


def trigonometric(y, _):  # 26
    i = constant(y, np.arange(1, y.size + 1))
    return y.size - jnp.sum(jnp.cos(y)) + i * (1 - jnp.cos(y)) - jnp.sin(y)


def squares(residual, y):
    """The sum of squares in float64, whatever the dtype of `y`."""
    return float(jnp.sum(residual(jnp.asarray(np.asarray(y), jnp.float64), None) ** 2))


@pytest.mark.parametrize("num_plain", [0, 98], ids=["dense", "matrix-free"])
def test_valley_without_end_is_not_called_a_minimum(num_plain):
    # From here the objective falls for ever, to 0.452 at x = -inf. Along the valley it
    # is so soft, and across so stiff, that its slope is rounding beside the curvature.
    y0 = jnp.concatenate([jnp.array([-4.0, 4.0]), jnp.zeros(num_plain)])
    sol = eqi.minimise(beale, y0, throw=False)
    assert bool(sol.result != RESULTS.successful)
    assert float(sol.value[0]) < -1000  # it did not give up early


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_badly_scaled_fit_is_found_with_defaults(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        sol = eqi.least_squares(meyer, jnp.asarray(MEYER_START, dtype), throw=False)
    assert bool(sol.result == RESULTS.successful)
    # In single precision the exponential alone is rounded to 1e-6 of 3e4.
    rtol = 1e-8 if dtype == jnp.float64 else 5e-3
    np.testing.assert_allclose(squares(meyer, sol.value), MEYER_SQUARES, rtol=rtol)
    np.testing.assert_allclose(sol.value, MEYER_MINIMUM, rtol=rtol)


def test_badly_scaled_root_is_found_as_least_squares():
    sol = eqi.least_squares(powell_badly_scaled, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(sol.value, [1.098159329e-5, 9.106146738], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("solve", [eqi.minimise, eqi.least_squares])
def test_no_minimum_is_claimed_where_single_precision_still_sees_a_fall(solve, factor):
    total = lambda y, _: jnp.sum(meyer(y, None) ** 2)
    fn = total if solve is eqi.minimise else meyer
    with jax.enable_x64(False):
        y0 = jnp.asarray(factor * MEYER_START, jnp.float32)
        sol = solve(fn, y0, throw=False)
    found = squares(meyer, sol.value) < 1.005 * MEYER_SQUARES
    assert found == bool(sol.result == RESULTS.successful)


@pytest.mark.slow
def test_small_gradient_in_a_soft_direction_is_told_from_a_minimum():
    # The gradient is first within tolerance at more than 1.1 times the minimum.
    sol = eqi.minimise(watson, jnp.zeros(12), throw=False)
    assert bool(sol.result == RESULTS.successful)
    np.testing.assert_allclose(watson(sol.value, None), 4.72238e-10, rtol=1e-5)


@pytest.mark.parametrize(
    ("fn", "start", "minimum"),
    [
        (
            lambda y, a: jnp.sum(powell_badly_scaled(y, a) ** 2),
            [0.0, 1.0],
            [1.098159329e-5, 9.106146738],
        ),
        (lambda y, a: 1e-12 * jnp.sum((y - 1) ** 2), [3.0, 2.0], [1.0, 1.0]),
    ],
    ids=["badly scaled", "small units"],
)
def test_minimum_at_the_end_of_a_long_newton_step_is_found(fn, start, minimum):
    sol = eqi.minimise(fn, jnp.array(start), throw=False)
    assert bool(sol.result == RESULTS.successful), RESULTS[sol.result]
    np.testing.assert_allclose(sol.value, minimum, rtol=1e-5)


def test_objective_that_falls_for_ever_still_counts_as_flat():
    sol = eqi.minimise(lambda y, _: jnp.exp(-y), jnp.array(0.0), throw=False)
    assert bool(sol.result == RESULTS.flat_objective)


def test_minimum_to_rounding_counts_where_terms_cancel():
    # Ten cosines of nearly one round the residuals more coarsely than they are large.
    start = [0.154, 0.047, 0.356, 0.142, -0.114, 0.245, 0.622, 0.479, -0.181, -0.406]
    with jax.enable_x64(False):
        y0 = jnp.asarray(start, jnp.float32)
        sol = eqi.least_squares(trigonometric, y0, throw=False)
    assert bool(sol.result == RESULTS.successful)
    np.testing.assert_allclose(squares(trigonometric, sol.value), 2.79506e-5, rtol=1e-3)


def test_gradient_whose_square_overflows_leads_down():
    fn = lambda y, _: jnp.sum((y - 1) ** 4 + (y - 1) ** 2)
    sol = eqi.minimise(fn, jnp.full(2, 1e7, jnp.float32), throw=False)
    assert bool(sol.result == RESULTS.successful)
    np.testing.assert_allclose(sol.value, 1.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 100], ids=["dense", "matrix-free"])
def test_outlook_is_that_of_the_newton_step(n):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    curvatures = np.linspace(1.0, 50.0, n)
    hessian = basis @ np.diag(curvatures) @ basis.T
    slope, y = rng.normal(size=n), rng.normal(size=n)
    product = lambda v: jnp.asarray(hessian) @ v
    ahead = outlook(product, jnp.asarray(y), jnp.asarray(slope), 50)
    step = np.linalg.solve(hessian, slope)
    np.testing.assert_allclose(ahead.distance, np.linalg.norm(step), rtol=1e-6)
    np.testing.assert_allclose(ahead.gain, slope @ step / 2, rtol=1e-6)
    np.testing.assert_allclose(ahead.lowest, 1.0, rtol=0.1)
    np.testing.assert_allclose(ahead.largest, 50.0, rtol=1e-2)
    # One random change of the state is an estimate within a factor of two or so.
    exact = np.diagonal(hessian) @ y**2 / 2
    np.testing.assert_allclose(ahead.sensitivity, exact, rtol=1e-9 if n == 8 else 0.7)


def test_outlook_does_not_depend_on_the_units():
    unit = 10.0 ** np.array([-8.0, 0, 8])
    hessian = np.array([[2.0, 1, 0], [1, 3, 1], [0, 1, 4]]) / np.outer(unit, unit)
    slope, y = np.array([1.0, -1, 1]) / unit, jnp.asarray(unit)
    product = lambda v: jnp.asarray(hessian) @ v
    ahead = outlook(product, y, jnp.asarray(slope), 50)
    np.testing.assert_allclose(
        ahead.gain, slope @ np.linalg.solve(hessian, slope) / 2, rtol=1e-9
    )


@pytest.mark.parametrize("solve", ["minimise", "least squares"])
def test_convex_problem_in_bfloat16_succeeds_wherever_it_lies(solve):
    quartic = lambda z, x: jnp.sum(z**4 / 4 + z**2 / 2 - x * z)
    condition = {
        "minimise": eqi.Minimum(quartic),
        "least squares": eqi.LeastSquares(lambda z, x: z**3 + z - x),
    }[solve]
    layer = eqi.ImplicitFunction(condition, throw=False)
    draws = np.random.default_rng(0).normal(size=(64, 2), scale=2.0)
    x = jnp.asarray(draws, jnp.bfloat16)
    solution = jax.jit(jax.vmap(lambda x: layer.solve(jnp.zeros_like(x), x)))(x)
    assert (solution.result == RESULTS.successful).all()
    exact = np.vectorize(lambda x: np.roots([1.0, 0.0, 1.0, -x]).real[-1])
    expected = exact(np.asarray(x, float))
    tol = 8 * float(jnp.finfo(jnp.bfloat16).eps)  # the default
    np.testing.assert_allclose(
        np.asarray(solution.value, float), expected, rtol=tol, atol=tol
    )
