"""FIRE and the verified default solvers for minima and least squares.

The soft-sphere numbers are those of JAX MD's notebook on implicit differentiation: it
prints the energy, and a run of its own loop took 18 757 steps to a force of 1e-12.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
import eqximplicit.solvers.auto_least_squares as als
import eqximplicit.solvers.auto_minimiser as am
import eqximplicit.solvers.fire as fire_module
from eqximplicit._solution import RESULTS

AutoMinimiser, AutoLeastSquares = am.AutoMinimiser, als.AutoLeastSquares
FIRE = fire_module.FIRE

BOX = 4.83045891539648
ENERGY = 0.0615943027340254  # as printed
FIRE_STEPS = 18757
R_INIT = np.array(
    [
        [2.2571011034781034, 3.231029760226207],
        [2.822046938707883, 2.2189231957347544],
        [1.2043047773789812, 3.2083664437708572],
        [1.742390731408142, 2.707485380022984],
        [0.2168025886743577, 1.0617716492788818],
        [4.713709033309854, 3.514502203560158],
        [0.7502519393910119, 0.3507897988258096],
    ]
)


def soft_spheres(R, sigma):
    """Harmonic repulsion below `sigma` in a periodic square box."""
    dR = jnp.mod(R[:, None] - R[None] + BOX / 2, BOX) - BOX / 2
    off_diagonal = ~jnp.eye(len(R), dtype=bool)
    r = jnp.sqrt(jnp.where(off_diagonal, jnp.sum(dR**2, -1), 1.0))
    overlap = off_diagonal & (r < sigma)
    return jnp.sum(jnp.where(overlap, (1 - r / sigma) ** 2 / 4, 0.0))


def rosenbrock(y, a):
    return (a - y[0]) ** 2 + 100 * (y[1] - y[0] ** 2) ** 2


def chained_rosenbrock(y, args):
    del args
    return jnp.sum((1 - y[:-1]) ** 2 + 100 * (y[1:] - y[:-1] ** 2) ** 2)


def run(fn, solver, y0, args=None, max_steps=256):
    return optx.minimise(fn, solver, y0, args, max_steps=max_steps, throw=False)


def verdict(solution):
    return RESULTS[solution.stats["result"]]


def expect(solution, item):
    assert bool(solution.stats["result"] == item), verdict(solution)


# --- FIRE


def wrap(y, step):
    return jnp.mod(y + step, BOX)


def test_fire_reproduces_the_published_run():
    solver = FIRE(0.0, 1e-12, dt_start=0.001, dt_max=0.005, shift=wrap)
    sol = run(soft_spheres, solver, jnp.asarray(R_INIT), 2.0, max_steps=100_000)
    expect(sol, RESULTS.successful)
    assert abs(float(soft_spheres(sol.value, 2.0)) - ENERGY) < 1e-14
    force = jax.grad(soft_spheres)(sol.value, 2.0)
    assert float(jnp.max(jnp.abs(force))) <= 1e-12
    assert abs(int(sol.stats["num_steps"]) / FIRE_STEPS - 1) < 0.01


def test_fire_without_softening_needs_fewer_steps_to_the_same_energy():
    solver = FIRE(0.0, 1e-12, dt_start=0.001, dt_max=0.005, softening=0.0)
    sol = run(soft_spheres, solver, jnp.asarray(R_INIT), 2.0, max_steps=100_000)
    assert abs(float(soft_spheres(sol.value, 2.0)) - ENERGY) < 1e-14
    assert int(sol.stats["num_steps"]) < 0.8 * FIRE_STEPS


def test_fire_first_steps_agree_with_numpy():
    hessian = np.array([[2.0, 0.3], [0.3, 1.0]])
    y, v, dt, alpha, n = np.array([1.0, -2.0]), np.zeros(2), 0.1, 0.1, 0
    f = -hessian @ y
    steps = 40
    for _ in range(steps):
        half = v + dt / 2 * f
        y = y + dt * half
        f = -hessian @ y
        v = half + dt / 2 * f
        power = f @ v
        v = v + alpha * (f * np.linalg.norm(v) / np.sqrt(f @ f + 1e-6) - v)
        n = n + 1 if power >= 0 else 0
        if power > 0 and n > 5:
            dt, alpha = min(1.1 * dt, 0.4), 0.99 * alpha
        if power < 0:
            v, dt, alpha = np.zeros(2), 0.5 * dt, 0.1
    fn = lambda y, h: y @ h @ y / 2
    sol = run(fn, FIRE(0.0, 0.0), jnp.array([1.0, -2.0]), jnp.asarray(hessian), steps)
    np.testing.assert_allclose(sol.value, y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sol.stats["dt"], dt, rtol=1e-12)


def test_fire_keeps_mixed_and_complex_leaves():
    target = (jnp.full(2, 3.0, jnp.float32), jnp.array([1.0 + 2.0j, -1.0j]))

    def fn(y, args):
        real = jnp.sum((y[0] - args[0]) ** 2).astype(jnp.float64)
        return real + jnp.sum(jnp.abs(y[1] - args[1]) ** 2)

    y0 = jax.tree.map(jnp.zeros_like, target)
    with pytest.warns(UserWarning, match="Complex support in Optimistix"):
        sol = run(fn, FIRE(0.0, 1e-5), y0, target, max_steps=2000)
    expect(sol, RESULTS.successful)
    for got, want in zip(sol.value, target, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_fire_rejects_a_step_out_of_the_domain():
    # The gradient is NaN for y < 0, where the momentum of the long way down leads.
    fn = lambda y, _: jnp.sum(y - 2 * jnp.sqrt(y))
    sol = run(
        fn, FIRE(0.0, 1e-9, dt_max=3.0, dt_start=3.0), jnp.array([6.0]), None, 999
    )
    expect(sol, RESULTS.successful)
    np.testing.assert_allclose(sol.value, 1.0, atol=1e-9)


def test_fire_reports_a_nonfinite_start():
    sol = run(lambda y, _: jnp.sum(jnp.sqrt(y)), FIRE(0.0, 1e-9), jnp.array([-1.0]))
    expect(sol, RESULTS.nonfinite_start)
    assert bool(sol.result == optx.RESULTS.nonfinite)


def test_fire_that_runs_away_reports_divergence():
    stiffness = jnp.array([1.0, 100.0, 1e4])
    fn = lambda y, k: jnp.sum(k * y**2) / 2
    sol = run(fn, FIRE(0.0, 1e-8), jnp.ones(3), stiffness, 512)
    expect(sol, RESULTS.nonlinear_divergence)
    assert int(sol.stats["num_steps"]) < 512


def test_fire_lanes_are_independent_and_compiled_once():
    count = []

    def fn(y, a):
        count.append(None)
        return jnp.sum((y - a) ** 2)

    solve = jax.jit(jax.vmap(lambda y, a: run(fn, FIRE(0.0, 1e-9), y, a, 2000).value))
    a = jnp.array([1.0, jnp.nan, 3.0])
    first = solve(jnp.zeros((3, 2)), a)
    traces = len(count)
    np.testing.assert_allclose(first[0], 1.0, atol=1e-9)
    np.testing.assert_allclose(first[2], 3.0, atol=1e-9)
    np.testing.assert_allclose(first[1], 0.0)  # the start of the bad lane
    solve(jnp.ones((3, 2)), a)
    assert len(count) == traces


def test_fire_gradients_of_both_adjoints_agree_with_the_closed_form():
    # The minimiser of cosh(y - sin a) is sin a.
    fn = lambda y, a: jnp.sum(jnp.cosh(y - jnp.sin(a)))

    @jax.jit
    def gradients(a):
        def solution(a, adjoint):
            solver = FIRE(0.0, 1e-10)
            return optx.minimise(
                fn, solver, jnp.zeros(1), a, max_steps=256, adjoint=adjoint
            ).value[0]

        adjoints = (optx.ImplicitAdjoint(), optx.RecursiveCheckpointAdjoint())
        return [jax.grad(solution)(a, adjoint) for adjoint in adjoints]

    for gradient in gradients(jnp.array(0.7)):
        np.testing.assert_allclose(gradient, np.cos(0.7), rtol=1e-8)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"atol": -1.0}, "atol"),
        ({"rtol": float("nan")}, "rtol"),
        ({"dt_start": 0.5}, "dt_start"),
        ({"f_dec": 1.5}, "f_dec"),
        ({"f_inc": 0.9}, "f_inc"),
        ({"softening": -1e-6}, "softening"),
        ({"n_min": -1}, "n_min"),
    ],
)
def test_fire_refuses_constants_out_of_range(kwargs, name):
    with pytest.raises(ValueError, match=rf"FIRE\({name}="):
        FIRE(**{"rtol": 0.0, "atol": 1e-8, **kwargs})


# --- AutoMinimiser


@pytest.mark.parametrize(
    ("fn", "y0", "minimum", "dtype"),
    [
        (rosenbrock, np.array([-1.2, 1.0]), np.ones(2), jnp.float64),
        (rosenbrock, np.array([-1.2, 1.0]), np.ones(2), jnp.float32),
        (chained_rosenbrock, np.full(400, 0.5), np.ones(400), jnp.float64),
    ],
    ids=["n2", "n2-f32", "n400"],
)
def test_default_finds_the_minimum_within_default_steps(fn, y0, minimum, dtype):
    tol = 1e-8 if dtype == jnp.float64 else 1e-5
    sol = run(fn, AutoMinimiser(tol, tol), jnp.asarray(y0, dtype), jnp.ones((), dtype))
    expect(sol, RESULTS.successful)
    assert sol.value.dtype == dtype
    np.testing.assert_allclose(
        sol.value, minimum, atol=1e4 * tol if tol > 1e-6 else 1e-7
    )
    if dtype == jnp.float64:
        gradient = jax.grad(fn)(sol.value, jnp.ones(()))
        assert float(jnp.max(jnp.abs(gradient))) <= tol


def test_default_tolerances_are_what_single_precision_reaches():
    y0, a = jnp.array([-1.2, 1.0], jnp.float32), jnp.float32(1)
    sol = run(rosenbrock, AutoMinimiser(), y0, a)
    expect(sol, RESULTS.successful)
    np.testing.assert_allclose(sol.value, 1.0, atol=1e-3)
    assert float(jnp.max(jnp.abs(jax.grad(rosenbrock)(sol.value, a)))) < 1e-3


def test_a_quasi_newton_stop_by_small_step_is_not_taken_for_a_minimum():
    # optimistix's BFGS ends here by its step; the gradient is what decides.
    fn = lambda y, _: 1e6 * rosenbrock(y, 1.0)
    y0 = jnp.array([-1.2, 1.0])
    loose = optx.minimise(fn, optx.BFGS(1e-3, 1e-3), y0, max_steps=1000, throw=False)
    assert float(jnp.max(jnp.abs(jax.grad(fn)(loose.value, None)))) > 1e-8
    sol = run(fn, AutoMinimiser(1e-12, 1e-6), y0)
    expect(sol, RESULTS.successful)
    assert float(jnp.max(jnp.abs(jax.grad(fn)(sol.value, None)))) <= 1e-6
    assert int(sol.stats["num_polish_steps"]) > 1


@pytest.mark.parametrize("y0", [[1.0, 0.0], [0.0, 0.0]], ids=["ridge", "on it"])
def test_saddle_is_reported(y0):
    sol = run(lambda y, _: y[0] ** 2 - y[1] ** 2, AutoMinimiser(), jnp.array(y0))
    expect(sol, RESULTS.saddle_point)
    assert bool(sol.result != optx.RESULTS.successful)
    np.testing.assert_allclose(sol.stats["min_curvature"], -2.0, atol=1e-12)


@pytest.mark.slow
def test_saddle_in_many_dimensions_is_found_by_lanczos():
    weights = jnp.linspace(1.0, 5.0, 500).at[137].set(-0.5)
    tree = lambda y: jnp.concatenate([y["a"], y["b"].reshape(-1)])
    fn = lambda y, w: jnp.sum(w * tree(y) ** 2) / 2
    y0 = {"a": jnp.zeros(200), "b": jnp.zeros((30, 10))}
    sol = run(fn, AutoMinimiser(), y0, weights)
    expect(sol, RESULTS.saddle_point)
    np.testing.assert_allclose(sol.stats["min_curvature"], -0.5, atol=1e-6)


def test_zero_modes_are_not_taken_for_a_saddle():
    sol = run(soft_spheres, AutoMinimiser(), jnp.asarray(R_INIT), 2.0, 500)
    expect(sol, RESULTS.successful)
    assert abs(float(sol.stats["min_curvature"])) < 1e-10  # translations
    force = jax.grad(soft_spheres)(sol.value, 2.0)
    assert float(jnp.max(jnp.abs(force))) <= 1e-8


def test_unbounded_objective_diverges():
    sol = run(lambda y, _: y[0] ** 3 - y[0], AutoMinimiser(), jnp.array([-3.0]))
    expect(sol, RESULTS.nonlinear_divergence)


def test_kink_is_reported_not_called_a_minimum():
    fn = lambda y, _: jnp.abs(y[0] - 0.3) + y[1] ** 2
    sol = run(fn, AutoMinimiser(), jnp.array([1.0, 0.1]))
    expect(sol, RESULTS.unattainable_tolerance)


def test_nonfinite_start_is_reported():
    sol = run(lambda y, _: jnp.log(y[0]), AutoMinimiser(), jnp.array([-1.0]))
    expect(sol, RESULTS.nonfinite_start)
    assert bool(sol.result == optx.RESULTS.nonfinite)


def test_gradient_that_is_not_finite_at_a_finite_start_is_reported():
    sol = run(lambda y, _: jnp.sqrt(y[0]), AutoMinimiser(), jnp.array([0.0]))
    expect(sol, RESULTS.nonfinite_jacobian)


def test_large_values_with_rounding_still_succeed():
    fn = lambda y, _: 1e12 * jnp.sum((y - 1 / 3) ** 2 + (y - 1 / 3) ** 4) + 7e13
    sol = run(fn, AutoMinimiser(), jnp.array([10.0, 0.1]))
    expect(sol, RESULTS.successful)
    np.testing.assert_allclose(sol.value, 1 / 3, rtol=1e-12)


def test_mixed_dtypes_stay():
    def fn(y, args):
        del args
        return jnp.sum((1 - y[0]) ** 2).astype(jnp.float64) + jnp.sum(
            jnp.cosh(y[1] - 2)
        )

    sol = run(fn, AutoMinimiser(), (jnp.zeros(2, jnp.float32), jnp.zeros(3)))
    expect(sol, RESULTS.successful)
    assert [leaf.dtype.name for leaf in sol.value] == ["float32", "float64"]
    np.testing.assert_allclose(sol.value[1], 2.0, atol=1e-8)


def test_aux_belongs_to_the_returned_point():
    fn = lambda y, _: (jnp.sum((y - 2.0) ** 2), {"y": y, "n": 3})
    sol = optx.minimise(fn, AutoMinimiser(), jnp.zeros(2), has_aux=True)
    np.testing.assert_array_equal(sol.aux["y"], sol.value)


def test_default_lanes_are_independent_and_compiled_once():
    count = []

    def fn(y, a):
        count.append(None)
        return rosenbrock(y, a)

    def lane(y, a):
        sol = run(fn, AutoMinimiser(), y, a)
        return sol.value, sol.stats["result"] == RESULTS.successful

    y0 = jnp.asarray(np.random.default_rng(0).normal(size=(500, 2)))
    a = jnp.ones(500).at[7].set(jnp.nan)
    solve = jax.jit(jax.vmap(lane))
    y, ok = solve(y0, a)
    traces = len(count)
    assert bool(jnp.all(ok == (jnp.arange(500) != 7)))
    np.testing.assert_allclose(y[ok], 1.0, atol=1e-7)
    np.testing.assert_array_equal(y[7], y0[7])
    solve(y0 + 0.1, a)
    assert len(count) == traces


def test_default_is_differentiable_by_the_implicit_function_theorem():
    # The minimiser of (a - x)^2 + 100 (y - x^2)^2 is (a, a^2).
    @jax.jit
    def tangent(a):
        solve = lambda a: (
            optx.minimise(rosenbrock, AutoMinimiser(), jnp.array([-1.2, 1.0]), a).value
        )
        return jax.jvp(solve, (a,), (jnp.ones(()),))[1]

    np.testing.assert_allclose(tangent(jnp.array(1.3)), [1.0, 2 * 1.3], rtol=1e-9)


def test_default_refuses_what_it_cannot_do():
    for kind in (AutoMinimiser, AutoLeastSquares):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(atol="):
            kind(atol=-1.0)
        with pytest.warns(UserWarning, match=rf"{kind.__name__}.*resolution"):
            kind(rtol=1e-20, atol=1e-20)
    with pytest.warns(UserWarning, match=r"FIRE.*resolution"):
        FIRE(0.0, 1e-20)
    fn = lambda y, _: jnp.sum(jnp.abs(y) ** 2)
    with (
        pytest.warns(UserWarning, match="Complex support in Optimistix"),
        pytest.raises(ValueError, match="complex leaf"),
    ):
        run(fn, AutoMinimiser(), jnp.array([1.0j]))


# --- AutoLeastSquares


def freudenstein_roth(y, args):
    del args
    return jnp.stack(
        [
            -13 + y[0] + ((5 - y[1]) * y[1] - 2) * y[1],
            -29 + y[0] + ((y[1] + 1) * y[1] - 14) * y[1],
        ]
    )


def test_least_squares_finds_the_known_local_minimum():
    # Moré, Garbow and Hillstrom (1981), problem 2: f = 48.9842... at (11.41, -0.8968).
    sol = optx.least_squares(
        freudenstein_roth, AutoLeastSquares(), jnp.array([0.5, -2.0])
    )
    squares = float(jnp.sum(freudenstein_roth(sol.value, None) ** 2))
    np.testing.assert_allclose(squares, 48.98425367, rtol=1e-8)
    gradient = jax.grad(lambda y: jnp.sum(freudenstein_roth(y, None) ** 2) / 2)
    assert float(jnp.max(jnp.abs(gradient(sol.value)))) <= 1e-8


@pytest.mark.parametrize("dense_size", [300, 2], ids=["qr", "cg"])
def test_linear_least_squares_agrees_with_numpy(dense_size):
    rng = np.random.default_rng(3)
    matrix, rhs = rng.normal(size=(12, 5)), rng.normal(size=12)
    want = np.linalg.lstsq(matrix, rhs, rcond=None)[0]
    sol = optx.least_squares(
        lambda y, a: a[0] @ y - a[1],
        AutoLeastSquares(dense_size=dense_size),
        jnp.zeros(5),
        (jnp.asarray(matrix), jnp.asarray(rhs)),
    )
    np.testing.assert_allclose(sol.value, want, atol=1e-8)


@pytest.mark.parametrize("x64", [True, False])
def test_least_squares_in_single_precision_agrees_with_numpy(x64):
    rng = np.random.default_rng(3)
    matrix, rhs = rng.normal(size=(12, 5)), rng.normal(size=12)
    want = np.linalg.lstsq(matrix, rhs, rcond=None)[0]
    with jax.enable_x64(x64):
        args = (jnp.asarray(matrix, jnp.float32), jnp.asarray(rhs, jnp.float32))
        fn = lambda y, a: a[0] @ y - a[1]
        y0 = jnp.zeros(5, jnp.float32)
        sol = optx.least_squares(fn, AutoLeastSquares(), y0, args, throw=False)
        expect(sol, RESULTS.successful)
    assert sol.value.dtype == jnp.float32
    np.testing.assert_allclose(sol.value, want, atol=1e-5)


def test_least_squares_reports_a_maximum():
    # At y = 0 the gradient of (y^2 - 1)^2 vanishes, but it is a local maximum.
    solver = AutoLeastSquares()
    sol = optx.least_squares(lambda y, _: y**2 - 1, solver, jnp.zeros(1), throw=False)
    expect(sol, RESULTS.saddle_point)


def test_solvers_are_modules_whose_numbers_can_be_swapped():
    solver = eqx.tree_at(lambda s: s.atol, AutoMinimiser(1e-8, 1e-8), 1e-3)
    assert solver.atol == 1e-3


def pair_distances(y):
    i, j = np.triu_indices(len(y), 1)
    return jnp.sqrt(jnp.sum((y[i] - y[j]) ** 2, axis=-1))


def lennard_jones(y, sigma):
    ratio = (sigma / pair_distances(y)) ** 6
    return 4 * jnp.sum(ratio**2 - ratio)


@pytest.mark.parametrize("shape", [(7, 2), (10, 3)])
def test_cluster_that_is_not_quite_at_rest_has_its_derivative(shape):
    # Its rotations are soft, not flat, for a force is left. It scales with sigma.
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * shape[1]), -1).reshape(-1, shape[1])
    draw = np.random.default_rng(0).normal(size=shape)
    y0 = jnp.asarray(1.1 * grid[: shape[0]] + 0.3 * draw)
    solver = eqi.AutoMinimiser(rtol=1e-9, atol=1e-8)
    layer = eqi.ImplicitFunction(eqi.Minimum(lennard_jones), solver, max_steps=2000)
    size = lambda sigma: jnp.sum(pair_distances(layer(y0, sigma)))
    value, slope = jax.jit(jax.value_and_grad(size))(1.1)
    np.testing.assert_allclose(slope, value / 1.1, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 400])
def test_a_convex_minimum_is_found_by_newton_steps_alone(n):
    fn = lambda y, a: jnp.sum(jnp.cosh(y - a)) + jnp.sum((y - a) ** 4)
    target = jnp.linspace(-1.0, 1.0, n)
    convex = eqi.Minimum(fn, tags=lx.positive_semidefinite_tag)
    for condition, alone in ((convex, True), (eqi.Minimum(fn), False)):
        found = eqi.ImplicitFunction(condition).solve(jnp.zeros(n), target)
        np.testing.assert_allclose(found.value, target, atol=1e-8)
        stats = found.stats
        assert (int(stats["num_steps"]) == int(stats["num_polish_steps"])) == alone
