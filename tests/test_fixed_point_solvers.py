"""Fixed-point solvers against closed forms, dense algebra and SciPy's `anderson`."""

import functools as ft
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize
from fixed_point_maps import (
    cast,
    FixedPointMap,
    kepler,
    MAPS,
    policy_iteration,
    SCIPY,
)
from jax.flatten_util import ravel_pytree

from eqximplicit._solution import RESULTS
from eqximplicit.solvers.anderson import Anderson
from eqximplicit.solvers.auto_fixed_point import AutoFixedPoint
from eqximplicit.solvers.broyden import Broyden

TOL = 1e-8  # the tolerance of the table, in absolute terms for both sides
BY_NAME = {p.name: p for p in MAPS}
slow = pytest.mark.slow
# Far below SciPy's evaluations, or like another: left to the slow session.
EASY = {
    "contractive (Kepler)",
    "DEQ cell (norm 1.5)",
    "PageRank",
    "Markov chain",
    "Sinkhorn",
    "EM (mixture)",
}
EVERY_MAP = [
    pytest.param(p.name, marks=slow if p.name in EASY else (), id=p.name) for p in MAPS
]
SOLVERS = {
    "auto": AutoFixedPoint(rtol=1e-11, atol=1e-11),
    "anderson": Anderson(rtol=1e-11, atol=1e-11),
    "good": Broyden(rtol=1e-11, atol=1e-11),
    "bad": Broyden(rtol=1e-11, atol=1e-11, update="bad"),
}
# What shares nearly all code with another is left to the slow session.
each_method = pytest.mark.parametrize(
    "solver", ["auto", pytest.param("anderson", marks=slow), "good"]
)
each_solver = pytest.mark.parametrize(
    "solver",
    ["auto", *(pytest.param(name, marks=slow) for name in ("anderson", "good", "bad"))],
)


def solve(p: FixedPointMap, solver, dtype=jnp.float64, max_steps: int = 256):
    y0, args = cast(p.y0, dtype), cast(p.args, dtype)
    return optx.fixed_point(p.fn, solver, y0, args, max_steps=max_steps, throw=False)


@ft.cache
def auto_solution(name: str):
    return solve(BY_NAME[name], AutoFixedPoint(rtol=0.0, atol=TOL))


def residual_norm(p: FixedPointMap, y, dtype=jnp.float64) -> float:
    image = p.fn(y, cast(p.args, dtype))
    return max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jtu.tree_leaves(image), jtu.tree_leaves(y), strict=True)
    )


def scipy_evaluations(p: FixedPointMap) -> int:
    """How many evaluations SciPy's `anderson` needs; raises where it fails."""
    args, count = cast(p.args, jnp.float64), 0
    x0, unravel = ravel_pytree(cast(p.y0, jnp.float64))
    fn = jax.jit(lambda x: ravel_pytree(p.fn(unravel(x), args))[0] - x)

    def counted(x):
        nonlocal count
        count += 1
        return np.asarray(fn(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in its line search
        scipy.optimize.anderson(counted, np.asarray(x0), f_tol=TOL, maxiter=2000)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_MAP)
def test_every_map_is_solved_in_no_more_evaluations_than_scipy(name):
    sol = auto_solution(name)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["result"] == RESULTS.successful
    assert residual_norm(BY_NAME[name], sol.value) < TOL
    assert int(sol.stats["num_steps"]) <= SCIPY[name]


@pytest.mark.parametrize(
    "name", ["SCF", *(pytest.param(name, marks=slow) for name in SCIPY)]
)
def test_the_table_of_scipy_is_what_scipy_does(name):
    # Rounding differs between machines.
    np.testing.assert_allclose(scipy_evaluations(BY_NAME[name]), SCIPY[name], rtol=0.1)


@pytest.mark.parametrize(
    "name", [p for p in EVERY_MAP if BY_NAME[str(p.id)].solution is not None]
)
def test_error_is_the_tolerance_asked_for(name):
    # The estimate is one: a factor of 2 is left to it. At rate 0.99 a residual at
    # the tolerance would be an error of 100 times the tolerance.
    value, exact = auto_solution(name).value, BY_NAME[name].solution
    np.testing.assert_allclose(value, exact, rtol=0, atol=2 * TOL)


def test_value_iteration_reaches_the_value_of_policy_iteration():
    exact = policy_iteration(BY_NAME["value iteration (0.99)"].args)
    value = auto_solution("value iteration (0.99)").value
    np.testing.assert_allclose(value, exact, rtol=0, atol=2 * TOL)


def test_chandrasekhar_has_the_published_moment():
    h = np.asarray(auto_solution("Chandrasekhar H").value)
    weights = np.polynomial.legendre.leggauss(50)[1] / 2
    # The quadrature of a moment that is exact for the discrete equation as well.
    moment = 2 / 0.99 * (1 - np.sqrt(1 - 0.99))
    np.testing.assert_allclose(weights @ h, moment, rtol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "slow (rate 0.99)" else slow)
        for name in BY_NAME
    ],
)
def test_float32_reaches_1e_5_and_says_so(name):
    reaches_1e_5_in_float32(BY_NAME[name], AutoFixedPoint())


def reaches_1e_5_in_float32(p, solver):
    sol = solve(p, solver, jnp.float32)
    assert sol.result == optx.RESULTS.successful
    leaves = jtu.tree_leaves(sol.value)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    size = 1 + max(float(jnp.max(jnp.abs(leaf))) for leaf in leaves)
    assert residual_norm(p, sol.value, jnp.float32) < 1e-5 * size


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Anderson, Broyden])
@pytest.mark.parametrize(
    "name", ["contractive (Kepler)", "SCF", "PageRank", "Sinkhorn"]
)
def test_the_other_methods_reach_1e_5_in_float32(kind, name):
    reaches_1e_5_in_float32(BY_NAME[name], kind())


def test_default_tolerance_is_what_the_dtype_can_reach():
    y0 = jnp.array([1.0])
    for kind in (Anderson, AutoFixedPoint, Broyden):
        sol = optx.fixed_point(lambda y, args: jnp.cos(y), kind(), y0)
        np.testing.assert_allclose(sol.value, 0.7390851332151607, rtol=0, atol=2e-8)


def test_host_function_is_solved_and_counted():
    calls = 0

    def on_host(y):
        nonlocal calls
        calls += 1
        return np.cos(2.5 * np.asarray(y)).astype(np.float64)

    def fn(y, args):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((3,), y.dtype), y)

    solver = AutoFixedPoint(rtol=1e-10, atol=1e-10)
    y0 = jnp.array([0.1, 0.5, 0.9])
    run = jax.jit(lambda y0: optx.fixed_point(fn, solver, y0, throw=False).stats)
    stats = jax.block_until_ready(run(y0))
    assert stats["residual_norm"] < 1e-10
    # `optx.fixed_point` evaluates once more, for its implicit derivative.
    assert calls - 1 <= int(stats["num_steps"]) <= calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn",
    [lambda y, _: y**2 - 1, lambda y, _: jnp.exp(y) - 2.5, lambda y, _: 5 * jnp.cos(y)],
    ids=["square", "exp", "cosine"],
)
def test_one_number_is_found_as_by_secants_whatever_the_slope(fn):
    solver = AutoFixedPoint(rtol=0.0, atol=1e-8)
    solve = lambda y0: optx.fixed_point(fn, solver, y0, throw=False)
    sol = jax.jit(jax.vmap(solve))(jnp.linspace(0.3, 2.2, 14))
    assert jnp.all(jnp.abs(fn(sol.value, None) - sol.value) < 1e-8)
    assert jnp.all(sol.stats["num_steps"] <= 15)


@pytest.mark.parametrize(("rate", "extra"), [(0.5, 2), (0.99, 2), (1.5, 10)])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_a_turning_linear_map_is_solved_once_the_pairs_span_its_space(n, rate, extra):
    rng = np.random.default_rng(n)
    turn, _ = np.linalg.qr(rng.normal(size=(n, n)))
    b = rng.normal(size=n)
    fn = lambda y, matrix: matrix @ y + b
    solver = AutoFixedPoint(rtol=0.0, atol=1e-8)
    sol = optx.fixed_point(fn, solver, jnp.zeros(n), jnp.asarray(rate * turn))
    assert int(sol.stats["num_steps"]) <= n + extra
    exact = np.linalg.solve(np.eye(n) - rate * turn, b)
    np.testing.assert_allclose(sol.value, exact, atol=1e-8)


@pytest.mark.slow
def test_rescue_solves_what_anderson_does_not():
    angle = np.linspace(0.3, 2.8, 7)
    blocks = [[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angle]
    matrix = jnp.asarray(1.5 * jax.scipy.linalg.block_diag(*map(np.array, blocks)))

    def fn(y, b):
        return jnp.tanh(matrix @ y) * 2 + b

    b = jnp.linspace(-0.1, 0.1, 14)
    y0 = jnp.ones(14)
    plain = optx.fixed_point(fn, SOLVERS["anderson"], y0, b, throw=False)
    auto = optx.fixed_point(fn, SOLVERS["auto"], y0, b, throw=False)
    assert plain.result != optx.RESULTS.successful
    assert auto.result == optx.RESULTS.successful
    assert int(auto.stats["num_rescues"]) > 0
    np.testing.assert_allclose(fn(auto.value, b), auto.value, atol=1e-10)


@pytest.mark.slow
@each_solver
def test_gradients_agree_with_the_closed_form_however_they_are_taken(solver):
    solver = SOLVERS[solver]
    p = kepler()
    y0, args = cast(p.y0, jnp.float64), cast(p.args, jnp.float64)

    @ft.partial(jax.jit, static_argnums=1)
    def gradient(e, adjoint):
        def loss(e):
            sol = optx.fixed_point(
                p.fn, solver, y0, args | {"e": e}, adjoint=adjoint, max_steps=32
            )
            return jnp.sum(sol.value)

        return jax.grad(loss)(e)

    exact = np.sin(p.solution) / (1 - p.args["e"] * np.cos(p.solution))
    implicit = gradient(args["e"], optx.ImplicitAdjoint())
    unrolled = gradient(args["e"], optx.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(implicit, exact, rtol=1e-9)
    # The derivative of the iterates lags behind the iterates.
    np.testing.assert_allclose(unrolled, exact, rtol=1e-6)


@each_method
def test_a_bad_lane_harms_no_other(solver):
    solver = SOLVERS[solver]
    rates = jnp.array([2.5, jnp.nan, 2.8, 3.3])

    def one(r):
        sol = optx.fixed_point(
            lambda y, r: r * y * (1 - y), solver, jnp.full(2, 0.55), r, throw=False
        )
        return sol.value, sol.stats["result"], sol.stats["num_steps"]

    values, result, num_steps = jax.jit(jax.vmap(one))(rates)
    good = np.array([0, 2, 3])
    exact = 1 - 1 / np.asarray(rates)[good]
    np.testing.assert_allclose(values[good], np.stack([exact] * 2, 1), rtol=1e-9)
    failed = jax.vmap(lambda r: r == RESULTS.nonfinite_start)(result)
    np.testing.assert_array_equal(failed, [False, True, False, False])
    alone = jax.jit(one)(rates[2])
    assert int(num_steps[2]) == int(alone[2])


@pytest.mark.slow
def test_ten_thousand_lanes_stop_one_by_one_and_are_compiled_once():
    traces, lanes, bad = [], 10_000, np.array([17, 4321])

    def fn(y, r):
        traces.append(None)
        return r * y * (1 - y)

    def one(r):
        sol = optx.fixed_point(fn, SOLVERS["auto"], jnp.full(1, 0.55), r, throw=False)
        ok = sol.stats["result"] == RESULTS.successful
        return sol.value[0], ok, sol.stats["num_steps"]

    batch = jax.jit(jax.vmap(one))
    rates = jnp.linspace(1.5, 3.3, lanes).at[bad].set(jnp.array([jnp.nan, jnp.inf]))
    values, ok, num_steps = batch(rates)
    good = np.delete(np.arange(lanes), bad)
    np.testing.assert_array_equal(ok, np.isfinite(rates))
    np.testing.assert_allclose(values[good], 1 - 1 / rates[good], rtol=1e-9)
    assert len(set(np.asarray(num_steps[good]).tolist())) > 3
    assert int(jnp.max(num_steps[good])) < 40
    np.testing.assert_array_equal(num_steps[bad], 1)
    count = len(traces)
    np.testing.assert_array_equal(batch(rates[::-1])[2], num_steps[::-1])
    assert len(traces) == count


@each_method
def test_leaves_keep_their_shapes_and_dtypes(solver):
    solver = SOLVERS[solver]

    def fn(y, args):
        a, (b,) = y
        feedback = jnp.mean(a).astype(jnp.float64)
        return (0.5 * jnp.cos(a) + jnp.float32(0.1) * b[0, 0].astype(jnp.float32),
                (0.3 * jnp.sin(b) + 0.2 * feedback,))  # fmt: skip

    y0 = (jnp.zeros(3, jnp.float32), (jnp.ones((2, 2)),))
    loose = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (1e-5, 1e-5))
    sol = optx.fixed_point(fn, loose, y0)
    struct = jax.eval_shape(lambda: y0)
    assert eqx.tree_equal(jax.eval_shape(lambda: sol.value), struct)
    y = y0
    for _ in range(100):
        y = fn(y, None)
    np.testing.assert_allclose(sol.value[0], y[0], atol=1e-4)
    np.testing.assert_allclose(sol.value[1][0], y[1][0], atol=1e-4)


@each_method
def test_complex_states_are_solved(solver):
    solver = SOLVERS[solver]
    c = jnp.array([0.2 + 0.6j, -1.1 + 0.3j])
    with pytest.warns(UserWarning, match="Complex support"):
        sol = optx.fixed_point(lambda z, c: z**2 + c, solver, 0 * c, c, throw=False)
    z = np.asarray(sol.value)
    assert sol.result == optx.RESULTS.successful
    np.testing.assert_allclose(z**2 - z + np.asarray(c), 0, atol=1e-9)


@each_method
def test_failure_returns_the_best_point_its_residual_and_a_reason(solver):
    solver = SOLVERS[solver]
    # y**2 + 1 is nowhere y; the residual is smallest, 3/4, at y = 1/2.
    sol = optx.fixed_point(
        lambda y, args: y**2 + 1, solver, jnp.array([0.2]), throw=False
    )
    assert sol.result != optx.RESULTS.successful
    assert sol.stats["result"] != RESULTS.successful
    y = np.asarray(sol.value)
    np.testing.assert_allclose(sol.stats["residual_norm"], abs(y**2 + 1 - y)[0])
    assert abs(y**2 + 1 - y)[0] <= 0.84  # the start's


def test_no_fixed_point_ends_before_the_budget():
    solver = SOLVERS["auto"]
    sol = optx.fixed_point(
        lambda y, args: y + 1.0, solver, jnp.zeros(2), max_steps=1000, throw=False
    )
    assert sol.stats["result"] == RESULTS.local_minimum
    assert int(sol.stats["num_steps"]) < 200


def test_nonfinite_trial_points_are_rejected():
    # log is not finite where the first steps lead.
    def fn(y, args):
        return 3 * jnp.log(y) + 0.5

    y0 = jnp.array([0.9])
    exact = scipy.optimize.brentq(lambda y: 3 * np.log(y) + 0.5 - y, 0.5, 1.5)
    assert not np.isfinite(fn(fn(y0, None), None)).all() or fn(y0, None)[0] < 0.5
    sol = optx.fixed_point(fn, SOLVERS["auto"], y0)
    np.testing.assert_allclose(sol.value, exact, rtol=1e-9)


@pytest.mark.parametrize("kind", [Anderson, AutoFixedPoint])
def test_tolerance_below_the_resolution_warns_and_is_named(kind):
    with pytest.warns(UserWarning, match="floating-point resolution"):
        kind(rtol=1e-30, atol=1e-30)
    solver = kind(rtol=1e-11, atol=1e-11)
    matrix = jnp.asarray(0.2 * np.random.default_rng(0).normal(size=(9, 9)))
    args = (matrix.astype(jnp.float32), jnp.ones(9, jnp.float32))
    with pytest.warns(UserWarning, match="floating-point resolution"):
        sol = optx.fixed_point(
            lambda y, args: jnp.sin(args[0] @ y) + args[1] / 3,
            solver,
            jnp.zeros(9, jnp.float32),
            args,
            throw=False,
        )
    good = sol.stats["residual_norm"] == 0
    assert good or sol.stats["result"] == RESULTS.unattainable_tolerance
    assert sol.stats["residual_norm"] < 1e-5


def test_anderson_of_window_one_is_the_secant_method():
    def residual(y):
        return np.cos(y) - y

    y, last = np.cos(1.0), 1.0
    for _ in range(3):
        slope = (residual(y) - residual(last)) / (y - last)
        y, last = y - residual(y) / slope, y
    solver = Anderson(rtol=0.0, atol=1e-15, window=1)
    sol = optx.fixed_point(
        lambda y, args: jnp.cos(y), solver, jnp.array(1.0), max_steps=5, throw=False
    )
    np.testing.assert_allclose(sol.value, y, rtol=1e-12)


@pytest.mark.parametrize("mixing", [1.0, -0.5])
def test_anderson_solves_a_linear_map_in_as_many_steps_as_unknowns(mixing):
    matrix = np.random.default_rng(1).normal(size=(4, 4))
    b = np.arange(4.0)
    solver = Anderson(rtol=1e-9, atol=1e-9, window=4, mixing=mixing, safeguard=1e6)
    sol = optx.fixed_point(
        lambda y, args: args[0] @ y + args[1],
        solver,
        jnp.zeros(4),
        (jnp.asarray(matrix), jnp.asarray(b)),
        max_steps=8,
    )
    np.testing.assert_allclose(sol.value, np.linalg.solve(np.eye(4) - matrix, b))


def anderson_by_numpy(fn, y, steps, *, window, mixing, ridge, restart):
    """The iterates of Anderson's method by a dense least-squares fit."""
    last, columns = None, []
    for _ in range(steps):
        r = fn(y) - y
        if last is not None:
            columns = [] if len(columns) == restart else columns
            columns = [*columns, (y - last[0], r - last[1])][-window:]
        step = mixing * r
        if columns:
            dy, dr = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
            penalty = np.sqrt(ridge) * np.diag(np.linalg.norm(dr, axis=0))
            rhs = np.concatenate([r, np.zeros(len(columns))])
            gamma = np.linalg.lstsq(np.concatenate([dr, penalty]), rhs, rcond=None)[0]
            step = mixing * (r - dr @ gamma) - dy @ gamma
        last, y = (y, r), y + step
    return last[0]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "mixing": 0.7, "ridge": 1e-12, "restart": None},
        {"window": 3, "mixing": 1.0, "ridge": 1e-1, "restart": None},
        {"window": 9, "mixing": 1.0, "ridge": 1e-12, "restart": 2},
    ],
    ids=["window", "ridge", "restart"],
)
def test_anderson_takes_the_steps_of_its_formula(options):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 9)), rng.normal(size=9)
    matrix = 0.9 * a / np.linalg.norm(a, 2)
    steps = 7
    exact = anderson_by_numpy(
        lambda y: np.tanh(matrix @ y + b), np.zeros(9), steps, **options
    )
    sol = optx.fixed_point(
        lambda y, args: jnp.tanh(args[0] @ y + args[1]),
        Anderson(rtol=0.0, atol=1e-15, safeguard=1e9, **options),
        jnp.zeros(9),
        (jnp.asarray(matrix), jnp.asarray(b)),
        max_steps=steps,
        throw=False,
    )
    np.testing.assert_allclose(sol.value, exact, rtol=1e-8)


@pytest.mark.parametrize(("sign", "update"), [(1, "good"), (-1, "bad")])
def test_broyden_finds_roots_of_either_sign(sign, update):
    def fn(y, args):  # Kelley's example: the root is (1, 1).
        a, b = y["a"], y["b"]
        return {"a": sign * (a**2 + b**2 - 2), "b": sign * (jnp.exp(a - 1) + b**2 - 2)}

    solver = Broyden(rtol=1e-10, atol=1e-10, update=update)
    sol = optx.root_find(fn, solver, {"a": jnp.array(1.5), "b": jnp.array(0.7)})
    np.testing.assert_allclose([sol.value["a"], sol.value["b"]], 1, rtol=1e-9)


def test_broyden_searches_along_its_step_where_the_full_step_diverges():
    # In one dimension the full steps are those of the secant method.
    last, y = 10.0, 10.0 - np.arctan(10.0) * (1 + 10.0**2)
    for _ in range(5):
        slope = (np.arctan(y) - np.arctan(last)) / (y - last)
        last, y = y, y - np.arctan(y) / slope
    assert abs(y) > 100
    solver = Broyden(rtol=1e-10, atol=1e-10)
    sol = optx.root_find(lambda y, args: jnp.arctan(y), solver, jnp.array([10.0]))
    np.testing.assert_allclose(sol.value, 0, atol=1e-9)


TURN = np.array([[1.0, -2.0], [2.0, 1.0]])  # less the identity, by a right angle
SLOW = np.diag(np.linspace(-0.9999, 0.9999, 20)) + np.diag(np.full(19, 0.3), 1)


@pytest.mark.parametrize(
    ("matrix", "update", "max_steps"),
    [(TURN, "good", 64), (TURN, "bad", 64), (SLOW, "good", 256), (SLOW, "bad", 256)],
)
def test_broyden_solves_a_linear_map_that_turns_or_hardly_moves(
    matrix, update, max_steps
):
    b = np.linspace(1.0, 0.0, len(matrix))
    solver = Broyden(update=update)
    sol = optx.fixed_point(
        lambda y, args: args[0] @ y + args[1],
        solver,
        jnp.zeros(len(matrix)),
        (jnp.asarray(matrix), jnp.asarray(b)),
        max_steps=max_steps,
        throw=False,
    )
    assert sol.result == optx.RESULTS.successful
    exact = np.linalg.solve(np.eye(len(matrix)) - matrix, b)
    np.testing.assert_allclose(sol.value, exact, atol=1e-4)


def test_broyden_calls_no_minimum_what_it_has_not_shown_to_be_one():
    sol = optx.fixed_point(
        lambda y, args: y**2 + 1, Broyden(), jnp.array([0.2]), throw=False
    )
    assert sol.stats["result"] == RESULTS.nonlinear_divergence


def test_broyden_forgets_a_full_memory_and_goes_on():
    p = BY_NAME["PageRank"]
    sol = solve(p, Broyden(rtol=0.0, atol=1e-10, window=3))
    assert sol.result == optx.RESULTS.successful
    np.testing.assert_allclose(sol.value, p.solution, atol=1e-9)


@pytest.mark.parametrize("kind", [Anderson, AutoFixedPoint, Broyden])
def test_bad_parameters_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"rtol=\.\.\.\)` must be at least 0"):
        kind(rtol=-1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"window=\.\.\.\)` must be at least 1"):
        kind(rtol=1e-6, atol=1e-6, window=0)
    with pytest.raises(ValueError, match="larger than `max_steps=4`"):
        optx.fixed_point(
            lambda y, args: jnp.cos(y),
            kind(rtol=1e-6, atol=1e-6, window=5),
            jnp.array(1.0),
            options={"max_steps": 4},
            max_steps=4,
        )


def test_broyden_refuses_a_residual_unlike_the_state():
    solver = Broyden(rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="structure, shapes and dtypes of `y`"):
        optx.root_find(lambda y, args: y[:2], solver, jnp.ones(3))
