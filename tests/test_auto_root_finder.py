"""The default root finder against the standard sets, closed forms and bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from standard_systems import MINPACK_RUNS, STANDARD_SYSTEMS

import eqximplicit as eqi
from eqximplicit._solution import RESULTS
from eqximplicit.solvers import AutoRootFinder

SOLVED = 1e-8  # float64: the largest residual entry of a root in the standard sets
SOLVED_FLOAT32 = 1e-5
MAX_STEPS = 512


@eqx.filter_jit
def _solve(fn, y0, args=None, solver=None, max_steps=MAX_STEPS):
    solver = AutoRootFinder() if solver is None else solver
    sol = optx.root_find(fn, solver, y0, args, max_steps=max_steps, throw=False)
    return sol.value, sol.stats, jnp.asarray(sol.result == optx.RESULTS.successful)


def _largest(system, x):
    return float(np.max(np.abs(system.fn(x, None))))


def _run(system, dtype=jnp.float64):
    x, stats, claimed = _solve(system.fn, jnp.asarray(system.start, dtype))
    return _largest(system, x), stats, bool(claimed)


@pytest.mark.slow
def test_every_standard_system_is_solved_at_low_cost():
    runs = {system.name: _run(system) for system in STANDARD_SYSTEMS}
    missed = [name for name, run in runs.items() if not (run[0] < SOLVED and run[2])]
    assert not missed
    costs = [int(stats["num_evaluations"]) for _, stats, _ in runs.values()]
    assert np.median(costs) <= 60


@pytest.mark.slow
def test_every_minpack_run_with_a_root_is_solved_and_no_other_claimed():
    runs = [(system, _run(system)) for system in MINPACK_RUNS]
    solved = {system.name for system, run in runs if run[0] < SOLVED}
    claimed = {system.name for system, run in runs if run[2]}
    assert solved == {s.name for s in MINPACK_RUNS if s.has_root}
    assert claimed == solved


@pytest.mark.slow
def test_float32_reaches_its_tolerance_without_false_failure():
    runs = {s.name: _run(s, jnp.float32) for s in STANDARD_SYSTEMS}
    good = [name for name, run in runs.items() if run[0] <= SOLVED_FLOAT32 and run[2]]
    assert len(good) == len(STANDARD_SYSTEMS)


@pytest.mark.parametrize(
    ("fn", "start", "reason"),
    [
        (lambda y, args: y**2 + 1.0, [3.0], RESULTS.local_minimum),
        (
            lambda y, args: 1.0 + (1.0 + y**2) ** -0.5,
            [1.0],
            RESULTS.nonlinear_divergence,
        ),
        (lambda y, args: jnp.log(y), [-1.0], RESULTS.nonfinite_start),
        (
            lambda y, args: jnp.stack([y[0] + y[1] - 1.0, 2.0 * y[0] + 2.0 * y[1]]),
            [1.0, 2.0],
            RESULTS.singular_jacobian,
        ),
    ],
    ids=["local minimum", "divergence", "non-finite start", "singular"],
)
def test_failure_stops_by_itself_and_names_its_reason(fn, start, reason):
    y, stats, claimed = _solve(fn, jnp.array(start))
    assert not claimed
    assert bool(stats["result"] == reason)
    assert int(stats["num_steps"]) < MAX_STEPS
    expected = np.nan_to_num(jnp.max(jnp.abs(fn(y, None))), nan=np.inf)
    np.testing.assert_array_equal(stats["residual_norm"], expected)


FACTORS = [np.random.default_rng(i).normal(size=(5, 3)) for i in range(2)]


@pytest.mark.parametrize(
    ("fn", "start"),
    [
        (lambda y, _: jnp.stack([y[0] + y[1], y[0] + y[1] - 1]), [0.0, 0.0]),
        (lambda y, _: jnp.stack([y[0] - y[1], y[0] - (y[1] + 1)]), [1.0, 2.0]),
        (lambda y, _: jnp.asarray(FACTORS[0] @ FACTORS[1].T) @ y - 1, [0.0] * 5),
        (lambda y, _: (y + 1) - y, [1.0] * 3),
    ],
    ids=["sum", "absorbed", "rank 3 of 5", "shift"],
)
def test_rounding_far_along_a_kernel_is_no_progress(fn, start):
    y, stats, claimed = _solve(fn, jnp.array(start))
    assert not claimed
    assert bool(stats["result"] == RESULTS.singular_jacobian)
    assert int(stats["num_steps"]) < MAX_STEPS
    assert np.max(np.abs(y)) < 1e4


def test_tolerance_below_the_rounding_of_the_function_is_named():
    solver = AutoRootFinder(atol=1e-14)
    fn = lambda y, args: 1e6 * (y**2 - 2.0)
    _, stats, claimed = _solve(fn, jnp.array([1.0]), solver=solver)
    assert not claimed
    assert bool(stats["result"] == RESULTS.unattainable_tolerance)


def test_exhausted_budget_is_named_and_the_best_point_returned():
    system = STANDARD_SYSTEMS[3]
    y, stats, claimed = _solve(system.fn, jnp.asarray(system.start), max_steps=3)
    assert not claimed
    assert bool(stats["result"] == RESULTS.nonlinear_max_steps_reached)
    assert _largest(system, y) < _largest(system, system.start)


def test_non_finite_trial_is_a_rejected_step():
    # The Newton step from 3 leads to a negative argument of the logarithm.
    y, _, claimed = _solve(lambda y, args: jnp.log(y), jnp.array([5.0]))
    assert claimed
    np.testing.assert_allclose(y, 1.0, atol=1e-8)


def test_restarts_in_new_directions_find_the_root_of_an_implicit_step():
    # A backward Euler step of Van der Pol's oscillator: its root, the only one, solves
    # a cubic, and no Newton step out of the stationary point of the norm leads there.
    h, u, v, mu = 0.25363286, -0.91312399, 0.26301892, 9.31495973
    fn = lambda y, args: jnp.stack(
        [y[0] - u - h * y[1], y[1] - v - h * (mu * (1 - y[0] ** 2) * y[1] - y[0])]
    )
    y, _, claimed = _solve(fn, jnp.array([u, v]))
    assert claimed
    assert np.max(np.abs(fn(y, None))) < SOLVED


def test_lanes_of_a_batch_are_independent_and_compiled_once():
    traces = []

    def fn(y, a):
        traces.append(None)
        return jnp.stack([y[0] ** 2 - a, y[1] - y[0]])

    a = jnp.linspace(1.0, 100.0, 10_000).at[17].set(-1.0).at[4321].set(jnp.nan)
    start = jnp.broadcast_to(jnp.array([3.0, 1.0]), (10_000, 2))
    solve = lambda y0, a: _solve(fn, y0, a)
    batch = eqx.filter_jit(jax.vmap(solve))
    y, stats, claimed = batch(start, a)
    good = np.delete(np.arange(10_000), [17, 4321])
    np.testing.assert_allclose(y[good, 0], np.sqrt(a[good]), rtol=1e-8)
    assert bool(np.all(claimed[good]))
    assert not claimed[17]
    assert not claimed[4321]
    assert int(np.max(stats["num_steps"][good])) < 20
    count = len(traces)
    again = batch(start, a[::-1])[1]["num_steps"]
    np.testing.assert_array_equal(again, stats["num_steps"][::-1])
    assert len(traces) == count


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_linear_system_of_every_small_size_takes_two_evaluations(n):
    matrix = jnp.asarray(np.random.RandomState(n).randn(n, n) + 3.0 * np.eye(n))
    fn = lambda y, args: matrix @ y - 1.0
    y, stats, claimed = _solve(fn, jnp.zeros(n))
    assert claimed
    np.testing.assert_allclose(y, np.linalg.solve(matrix, np.ones(n)), atol=1e-9)
    assert int(stats["num_evaluations"]) == 2 + n


def test_pytree_of_mixed_dtypes_and_complex_leaves():
    fn = lambda y, args: {
        "z": y["z"] ** 2 + 2.0 * jnp.conj(y["z"]) - (1.0 + 4.0j),
        "x": y["x"] ** 3 - 8.0,
        "s": y["s"] - jnp.ones((2, 1), jnp.float32),
    }
    y0 = {"z": jnp.array(1.0 + 1.0j), "x": jnp.array([1.0]), "s": jnp.zeros((2, 1))}
    y0["s"] = y0["s"].astype(jnp.float32)
    with pytest.warns(UserWarning, match="Complex support in Optimistix"):
        y, _, claimed = _solve(fn, y0)
    assert claimed
    assert {k: v.dtype for k, v in y.items()} == {k: v.dtype for k, v in y0.items()}
    assert abs(complex(fn(y, None)["z"])) < SOLVED
    np.testing.assert_allclose(y["x"], 2.0, rtol=1e-9)


@pytest.mark.parametrize(
    "adjoint", [optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint()]
)
def test_gradients_agree_with_the_closed_form(adjoint):
    solver = AutoRootFinder(atol=1e-12)

    def root(a):
        fn = lambda y, a: jnp.stack([y[0] ** 2 - a, y[1] * y[0] - 1.0])
        y0 = jnp.array([1.0, 1.0])
        return optx.root_find(fn, solver, y0, a, adjoint=adjoint).value

    a = jnp.array(3.0)
    jacobian = jax.jit(jax.jacrev(root))(a)
    np.testing.assert_allclose(jacobian, [0.5 * 3**-0.5, -0.5 * 3**-1.5], rtol=1e-9)


def test_aux_belongs_to_the_point_returned():
    fn = lambda y, args: (jnp.arctan(y), {"twice": 2.0 * y, "label": 3})
    sol = optx.root_find(
        fn, AutoRootFinder(), jnp.array([20.0]), has_aux=True, max_steps=MAX_STEPS
    )
    np.testing.assert_array_equal(sol.aux["twice"], 2.0 * sol.value)
    np.testing.assert_allclose(sol.value, 0.0, atol=1e-8)


@pytest.mark.parametrize("krylov_above", [0, 100])
def test_large_state_is_solved_leaf_by_leaf_without_a_jacobian(krylov_above):
    # Bratu's problem -u'' = exp(u) in 1-D; its solution is known in closed form:
    # u(x) = 2 log(cosh(c / 4) / cosh((x - 1/2) c / 2)) and c = sqrt(2) cosh(c / 4).
    n = 60
    h = 1.0 / (n + 1)

    def fn(y, args):
        u = jnp.pad(jnp.concatenate([y["left"], y["right"]]), 1)
        out = 2.0 * u[1:-1] - u[:-2] - u[2:] - h**2 * jnp.exp(u[1:-1])
        return {"left": out[: n // 2], "right": out[n // 2 :]}

    y0 = {"left": jnp.zeros(n // 2), "right": jnp.zeros(n // 2)}
    y, stats, claimed = _solve(fn, y0, solver=AutoRootFinder(krylov_above=krylov_above))
    assert claimed
    c = 0.0
    for _ in range(200):
        c = np.sqrt(2.0) * np.cosh(c / 4.0)
    x = h * np.arange(1, n + 1)
    exact = 2.0 * np.log(np.cosh(c / 4.0) / np.cosh((x - 0.5) * c / 2.0))
    np.testing.assert_allclose(
        np.concatenate([y["left"], y["right"]]), exact, atol=h**2
    )
    residual = jnp.max(jnp.stack([jnp.max(jnp.abs(v)) for v in fn(y, None).values()]))
    np.testing.assert_allclose(stats["residual_norm"], residual, atol=1e-15)


def test_krylov_stops_by_itself_where_there_is_no_root():
    solver = AutoRootFinder(krylov_above=0)
    _, stats, claimed = _solve(
        lambda y, a: y**2 + 1.0, jnp.ones(3) * 2.0, solver=solver
    )
    assert not claimed
    assert bool(stats["result"] == RESULTS.local_minimum)


def boundary_value(y, args):
    """Moré, Garbow and Hillstrom's problem 28: `y'' = (y + t + 1)³ / 2`."""
    del args
    h = 1 / (y.size + 1)
    t, wide = h * jnp.arange(1.0, y.size + 1), jnp.pad(y, 1)
    return 2 * y + h**2 * (y + t + 1) ** 3 / 2 - wide[:-2] - wide[2:]


def test_a_large_banded_system_is_solved_by_elimination():
    # Of condition 4e6, on which GMRES without a preconditioner stagnates.
    t = jnp.arange(1.0, 2001) / 2001
    y, stats, claimed = _solve(boundary_value, t * (t - 1))
    assert claimed
    assert int(stats["num_evaluations"]) <= 40
    assert np.max(np.abs(boundary_value(y, None))) <= 1e-11
    curve = lambda t: 2 / (2 - t) - t - 1  # the exact solution of the equation
    np.testing.assert_allclose(y, curve(np.asarray(t)), atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda y, _: 1 + (1 + y**2) ** -0.5, RESULTS.nonlinear_divergence),
        (lambda y, _: 1 + 0 * y, RESULTS.singular_jacobian),
    ],
    ids=["divergence", "singular"],
)
def test_a_large_state_that_is_not_solved_says_why(fn, reason):
    _, stats, claimed = _solve(fn, jnp.ones(501))
    assert not claimed
    assert stats["result"] == reason


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 5, 501])
@pytest.mark.parametrize("unit", [1.0, 1e8, 1e12])
def test_equations_in_large_units_are_solved_to_rounding(unit, n):
    fn = lambda y, a: unit * (y**3 + y - 1.1 * a)
    a, y0 = 3.3, jnp.ones(n)
    root = np.roots([1, 0, 1, -1.1 * a])[-1].real  # no residual there is zero
    layer = eqi.ImplicitFunction(eqi.Root(fn), throw=False)
    y, slope = jax.value_and_grad(lambda a: layer(y0, a)[0])(a)
    np.testing.assert_allclose(y, root, rtol=1e-9)
    np.testing.assert_allclose(slope, 1.1 / (3 * root**2 + 1), rtol=1e-8)
    solver = eqi.AutoRootFinder(atol=1e-9)
    strict = eqi.ImplicitFunction(eqi.Root(fn), solver, throw=False).solve(y0, a)
    attainable = bool(strict.result == RESULTS.successful)
    assert attainable == (unit == 1)
    if not attainable:
        assert strict.result == RESULTS.unattainable_tolerance


@pytest.mark.parametrize("n", [2, 4])
def test_rounding_is_no_root_where_no_jacobian_is_regular(n):
    def parallel(y, _):
        gap = 1e12 * (y[0] - y[1])
        return jnp.concatenate([jnp.stack([gap, gap + 1e-3]), y[2:] - 1])

    _, stats, claimed = _solve(parallel, jnp.ones(n))
    assert not claimed
    assert stats["result"] == RESULTS.singular_jacobian
    assert np.isclose(stats["residual_norm"], 1e-3)


@pytest.mark.slow
def test_roots_in_single_precision_with_terms_that_cancel():
    # Bratu's problem by finite differences, whose terms grow with the square of `n`.
    def bratu(y, a):
        wide = jnp.pad(y, 1)
        return (wide[2:] - 2 * y + wide[:-2]) * (y.size + 1) ** 2 + a * jnp.exp(y)

    def total(dtype, n):
        layer = eqi.ImplicitFunction(eqi.Root(bratu), throw=False)
        return lambda a: jnp.sum(layer(jnp.zeros(n, dtype), a))

    for n in (20, 40):
        single = jax.value_and_grad(total(jnp.float32, n))(jnp.float32(1))
        double = jax.value_and_grad(total(jnp.float64, n))(1.0)
        np.testing.assert_allclose(single, double, rtol=1e-4)


def test_a_jacobian_that_is_not_finite_is_the_reason_given():
    fn = lambda y, _: jnp.sqrt(y @ jnp.ones((4, 4))) - 1
    _, stats, claimed = _solve(fn, jnp.zeros(4))
    assert not claimed
    assert stats["result"] == RESULTS.nonfinite_jacobian, RESULTS[stats["result"]]


def test_one_infinite_slope_for_each_unknown_is_no_nan():
    y, _, claimed = _solve(lambda y, _: jnp.sqrt(y) - 1, jnp.zeros(4))
    assert claimed
    np.testing.assert_allclose(y, 1.0, rtol=1e-8)


@pytest.mark.parametrize("name", ["rtol", "atol", "max_restarts", "krylov_above"])
def test_negative_number_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"AutoRootFinder\({name}=...\)"):
        AutoRootFinder(**{name: -1})


def test_tolerance_below_the_dtype_is_warned_about():
    with pytest.warns(UserWarning, match="below the resolution"):
        AutoRootFinder(atol=1e-20)


def test_system_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="3 entries for a state of 2"):
        _solve(lambda y, args: jnp.append(y, y[0]), jnp.ones(2))
