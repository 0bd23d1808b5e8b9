"""Default solvers open with the plain method: what that costs, and what it must not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from fixed_point_maps import MAPS, SCIPY

import eqximplicit as eqi
from eqximplicit.solvers._fixed_point_record import ACCIDENT, Progress

# What the opening costs at most on the fourteen maps, in evaluations: a step of it is
# much cheaper than one of the solver.
COST = 6


def quiet(condition, **kwargs):
    return eqi.ImplicitFunction(condition, throw=False, **kwargs)


def test_a_good_contraction_is_solved_by_plain_iteration():
    fn = lambda y, a: 0.2 * jnp.cos(y) + a
    solution = eqi.fixed_point(fn, jnp.zeros(100), 0.3)
    y, steps = np.zeros(100), 0
    while np.max(np.abs(0.2 * np.cos(y) + 0.3 - y)) > 1e-9:
        y, steps = 0.2 * np.cos(y) + 0.3, steps + 1
    np.testing.assert_allclose(solution.value, y, atol=1e-9)
    # It measures the last iterate as well, and stops on the error, not the residual.
    assert abs(int(solution.stats["num_steps"]) - (steps + 1)) <= 1


def test_a_single_number_is_solved_by_the_secant_method():
    solution = eqi.fixed_point(lambda y, a: jnp.cos(a * y), jnp.array(1.0), 0.9)
    residual = lambda y: np.cos(0.9 * y) - y
    points = [1.0, np.cos(0.9)]
    while abs(residual(points[-1])) > 1e-10:
        (x, y), (f, g) = points[-2:], map(residual, points[-2:])
        points.append(y - g * (y - x) / (g - f))
    np.testing.assert_allclose(solution.value, points[-1], atol=1e-9)
    assert abs(int(solution.stats["num_steps"]) - len(points)) <= 1


def test_two_numbers_are_solved_by_two_secants():
    # Anderson's method with two pairs is exact for a linear map of two numbers.
    matrix = np.array([[0.3, 0.1], [-0.2, 0.5]])
    fn = lambda y, a: jnp.asarray(matrix) @ y + a
    solution = eqi.fixed_point(fn, jnp.zeros(2), jnp.array([1.0, 2.0]))
    exact = np.linalg.solve(np.eye(2) - matrix, [1.0, 2.0])
    np.testing.assert_allclose(solution.value, exact, rtol=1e-12)
    assert int(solution.stats["num_steps"]) <= 5


@pytest.mark.parametrize(
    ("steps", "growth", "goes_on"),
    [(3, 1.5, True), (3, 2.5, False), (1, 1.5, False), (3, np.nan, False)],
)
def test_an_anderson_step_may_once_let_the_residual_grow(steps, growth, goes_on):
    one = jnp.array(1.0)
    progress = Progress(one, one, one, jnp.array(float(steps)), one, one)
    later = progress.after(jnp.array(growth), 0.3, ACCIDENT)
    assert bool(later.contracts) == goes_on
    assert not later.after(later.error * 1.5, 0.3, ACCIDENT).contracts
    assert not progress.after(jnp.array(growth), 0.5, 1.0).contracts  # a plain one


def occupied(rho, coupling):
    """The density of the four lowest orbitals of a chain in a well."""
    n = rho.size
    hopping = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    well = np.diag(0.02 * (np.arange(n) - 8.0) ** 2)
    hamiltonian = jnp.asarray(hopping + well) + coupling * jnp.diag(rho)
    return jnp.sum(jnp.linalg.eigh(hamiltonian)[1][:, :4] ** 2, axis=1)


@pytest.mark.parametrize(("coupling", "scipy"), [(0.3, 7), (0.8, 9), (1.2, 10)])
def test_where_evaluations_are_dear_none_is_spent_on_an_opening(coupling, scipy):
    start = jnp.full(20, 0.2)
    layer = eqi.fixed_point(occupied, start, coupling, throw=False)
    alone = optx.fixed_point(occupied, eqi.AutoFixedPoint(), start, coupling)
    steps = int(layer.stats["num_steps"])
    assert steps == int(alone.stats["num_steps"]) <= scipy
    np.testing.assert_allclose(layer.value, alone.value, atol=1e-12)


def chandrasekhar(h, c):
    x, w = np.polynomial.legendre.leggauss(20)
    mu = (x + 1) / 2
    kernel = mu[:, None] * w / 2 / (mu[:, None] + mu)
    return 1 / (1 - c / 2 * (jnp.asarray(kernel) @ h))


# Maps that contract quickly, or repel in some entries, and the evaluations of SciPy's
# `anderson(..., f_tol=1e-8)`.
SLOPES = np.linspace(1.5, 5, 6)
QUICK = {
    "half": (lambda y, a: 0.5 * y + a, np.zeros(1), 1.0, 4),
    "cosine": (lambda y, a: 0.5 * jnp.cos(y) + a, np.zeros(5), 0.3, 9),
    "cosines": (
        lambda y, a: a * jnp.cos(y),
        np.full(6, 0.5),
        np.linspace(1.5, 5, 6),
        26,
    ),
    "Chandrasekhar": (chandrasekhar, np.ones(20), 0.7, 9),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_map_takes_no_more_evaluations_than_scipy(name):
    fn, y0, args, count = QUICK[name]
    found = eqi.fixed_point(fn, jnp.asarray(y0), jnp.asarray(args), throw=False)
    assert found.result == eqi.RESULTS.successful
    assert int(found.stats["num_steps"]) <= count


def test_a_slow_rotation_is_solved_with_patience():
    # PageRank on a ring: its residual shrinks by 0.97 a step, in no Krylov space.
    ring = jnp.asarray(np.roll(np.eye(60), 1, axis=1))
    fn = lambda y, a: a * (ring.T @ y) + (1 - a) / 60
    solution = eqi.fixed_point(fn, jnp.asarray(np.eye(60)[0]), 0.97, max_steps=2000)
    np.testing.assert_allclose(solution.value, 1 / 60, atol=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.45])
def test_the_error_is_well_within_the_tolerance(rate):
    # Of plain steps: in fewer numbers two evaluations more would be exact.
    fn = lambda y, a: rate * y + a
    solution = eqi.fixed_point(fn, jnp.zeros(100), 1.0)
    wanted = 1 / (1 - rate)
    np.testing.assert_allclose(solution.value, wanted, atol=0.3e-8 * (1 + wanted))


@pytest.fixture(scope="module")
def evaluations():
    """Of a layer and of the solver alone, by the name of the map."""

    @eqx.filter_jit
    def both(fn, y0, args):
        layer = quiet(eqi.FixedPoint(fn), max_steps=2000).solve(y0, args)
        alone = optx.fixed_point(
            fn, eqi.AutoFixedPoint(), y0, args, max_steps=2000, throw=False
        )
        ok = layer.result == eqi.RESULTS.successful
        return ok, layer.stats["num_steps"], alone.stats["num_steps"]

    found = {}
    for p in MAPS:
        y0, args = jax.tree.map(jnp.asarray, (p.y0, p.args))
        found[p.name] = [int(x) for x in both(p.fn, y0, args)]
    return found


@pytest.mark.slow
def test_with_its_opening_no_map_takes_more_evaluations_than_scipy(evaluations):
    more = {name: layer - SCIPY[name] for name, (_, layer, _) in evaluations.items()}
    assert max(more.values()) <= 0, more


@pytest.mark.slow
def test_the_opening_costs_a_few_evaluations(evaluations):
    assert all(ok for ok, _, _ in evaluations.values())
    more = {name: layer - alone for name, (_, layer, alone) in evaluations.items()}
    assert max(more.values()) <= COST, more


def vanishes_at_infinity(y, a):
    del a
    return 1 / (1 + y**2) - 2 / (1 + y**4)


def test_a_residual_that_vanishes_at_infinity_is_no_root():
    # y⁴ - 2 y² - 1 = 0
    root = np.sqrt(1 + np.sqrt(2))
    found = quiet(eqi.Root(vanishes_at_infinity)).solve(jnp.array(1e-8))
    np.testing.assert_allclose(np.abs(found.value), root, atol=1e-8)


def hard_or_easy(y, t):
    """The root `exp(t)` for `t > 0`, else that of a cubic where Newton wanders."""
    return jnp.where(t > 0, jnp.log(y) - t, y**3 - 2 * (y - 9.0) + 2)


def test_a_lane_is_solved_as_if_it_were_alone():
    layer = quiet(eqi.Root(hard_or_easy), max_steps=40)
    solve = jax.jit(jax.vmap(lambda t: layer(jnp.array(9.0), t)))
    alone, beside = solve(jnp.array([1.0])), solve(jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(alone[0], np.e, atol=1e-8)
    assert beside[0] == alone[0]


def test_a_lane_that_is_not_finite_leaves_its_neighbours_alone():
    matrix = np.array([[0.0, 0.3], [-0.3, 0.0]])
    fn = lambda y, a: y + y**3 + jnp.asarray(matrix) @ y - a
    layer = quiet(eqi.Root(fn))
    a = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [0.5, -1.0]])
    both = jax.jit(jax.vmap(jax.value_and_grad(lambda a: layer(jnp.zeros(2), a).sum())))
    _, gradient = both(a)
    y = jax.jit(jax.vmap(lambda a: layer(jnp.zeros(2), a)))(a)
    assert np.isnan(gradient[1]).all()
    for lane in (0, 2):
        jacobian = np.diag(1 + 3 * np.asarray(y[lane]) ** 2) + matrix
        exact = np.linalg.solve(jacobian.T, np.ones(2))
        np.testing.assert_allclose(gradient[lane], exact, rtol=1e-9)


@pytest.mark.parametrize(
    ("find", "fn", "y0"),
    [
        (eqi.root_find, lambda y, a: (y**3 - a, 10 * y), 3.0),
        (eqi.fixed_point, lambda y, a: (0.1 * jnp.cos(y) + a, 10 * y), 0.3),
    ],
    ids=["root", "fixed point"],
)
def test_few_steps_keep_their_progress_and_its_aux(find, fn, y0):
    found = find(fn, y0, 0.1, max_steps=3, throw=False, has_aux=True)
    np.testing.assert_allclose(found.aux, 10 * found.value, rtol=1e-12)
    residual = lambda y: np.abs(fn(y, 0.1)[0] - (y if find is eqi.fixed_point else 0))
    assert residual(found.value) < 0.5 * residual(y0)


def test_unrolled_derivative_has_no_opening():
    # Seven steps of Newton's method by hand, and their derivative.
    def by_hand(a):
        y = 1.5
        for _ in range(7):
            y = y - (y**3 - a) / (3 * y**2)
        return y

    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, a: y**3 - a), adjoint=eqi.UnrolledAdjoint(), max_steps=64
    )
    slope = jax.jit(jax.grad(lambda a: layer(jnp.array(1.5), a)))(2.0)
    np.testing.assert_allclose(slope, jax.grad(by_hand)(2.0), rtol=1e-6)


def tripling(y, a):
    """Expansive: -3 is the slope at the fixed point; the residual grows at first."""
    return a - 3 * y + 0.1 * jnp.sin(y), jnp.stack([y, 2 * y])


@pytest.mark.parametrize("max_steps", [32, 256])
def test_what_the_opening_hands_on_is_solved_with_its_aux(max_steps):
    y0 = jnp.array([1.0, -2.0, 0.3])
    found = eqi.fixed_point(
        tripling, y0, 2.0, max_steps=max_steps, has_aux=True, throw=False
    )
    assert found.result == eqi.RESULTS.successful
    residual = 2.0 - 4 * found.value + 0.1 * np.sin(found.value)
    np.testing.assert_allclose(residual, 0, atol=1e-7)
    np.testing.assert_array_equal(found.aux, jnp.stack([found.value, 2 * found.value]))


def nowhere(y, a):
    """No fixed point: the residual is at least `a`, and 0.05 more at the start."""
    return y + a + 0.05 * y**2, y


def test_a_failed_solve_returns_nothing_worse_than_the_start_nor_a_foreign_aux():
    y0 = jnp.array(1.0)
    found = eqi.fixed_point(nowhere, y0, 1.0, has_aux=True, throw=False)
    assert found.result != eqi.RESULTS.successful
    residual = lambda y: np.abs(1 + 0.05 * np.asarray(y) ** 2)
    assert residual(found.value) <= residual(y0)
    assert found.aux == found.value
    np.testing.assert_allclose(found.stats["residual_norm"], residual(found.value))


@pytest.mark.slow
def test_lanes_that_leave_the_opening_at_different_steps_are_solved_alone():
    # Contractive, slow, expansive, and one that overflows at once.
    slopes = jnp.array([0.1, 0.97, -2.5, -0.8, 1e200])
    fn = lambda y, slope: slope * y + 1 + 0.01 * jnp.cos(y)
    y0 = jnp.array([0.5, 1e150])
    layer = quiet(eqi.FixedPoint(fn))
    solve = jax.jit(jax.vmap(lambda s: layer.solve(y0, s)))
    together, num_solved = solve(slopes), 0
    for lane, slope in enumerate(slopes[:4]):
        alone = solve(slope[None])
        np.testing.assert_array_equal(together.value[lane], alone.value[0])
        if alone.result == eqi.RESULTS.successful:
            y, num_solved = np.asarray(alone.value[0]), num_solved + 1
            np.testing.assert_allclose(fn(y, slope), y, rtol=1e-7)
    assert num_solved == 4
    steps = np.asarray(together.stats["num_steps"])
    assert len(set(steps[:4].tolist())) > 1


def test_a_complex_state_goes_on_from_its_opening():
    # A rotation by a right angle, stretched: the residual neither shrinks nor is real.
    fn = lambda y, a: 1.2j * y + a * jnp.cos(0.1 * y)
    found = eqi.fixed_point(fn, jnp.array([1.0 + 1.0j, 0.5j]), 1.0, throw=False)
    assert found.result == eqi.RESULTS.successful
    np.testing.assert_allclose(fn(found.value, 1.0), found.value, rtol=1e-7)


def test_a_small_residual_of_a_slow_contraction_is_no_solution():
    # At the start the residual is half the tolerance, and the error 50 000 times it.
    fn = lambda y, a: y + 1e-5 * (a - y)
    found = eqi.fixed_point(fn, jnp.full(3, 1 - 5e-4), 1.0, throw=False)
    assert found.result == eqi.RESULTS.successful
    np.testing.assert_allclose(found.value, 1, rtol=1e-6)
