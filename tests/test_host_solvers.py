"""SciPy's solvers and any Python callable, directly and through a callback."""

import logging
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import eqximplicit as eqi
import eqximplicit.solvers as host
from eqximplicit._solution import RESULTS

A = np.array([[3.0, 1.0], [0.0, 2.0]])


def residual(y, a):
    """Mixed dtypes; the root of `v` is the cube root of two."""
    u = jnp.asarray(A) @ y["u"] + jnp.sin(y["u"]) - a
    return {"u": u, "v": y["v"] ** 3 - jnp.float32(2)}


def guess():
    return {"u": jnp.zeros(2), "v": jnp.ones((), jnp.float32)}


def reference(a):
    return scipy.optimize.root(
        lambda u: A @ u + np.sin(u) - a, np.zeros(2), tol=1e-12
    ).x


def rosenbrock(y, a):
    return (a - y[0]) ** 2 + 100 * (y[1] - y[0] ** 2) ** 2


def expect(result, item):
    assert bool(result == item), RESULTS[result]


@pytest.mark.parametrize("method", ["hybr", "lm", "anderson"])
def test_root_keeps_structure_and_dtypes(method):
    y, result, stats = host.ScipyRoot(method).solve(residual, guess(), jnp.ones(2))
    expect(result, RESULTS.successful)
    assert y["v"].dtype == jnp.float32
    np.testing.assert_allclose(y["u"], reference(1.0), atol=1e-6)
    np.testing.assert_allclose(y["v"], 2 ** (1 / 3), rtol=1e-6)
    assert int(stats["num_evaluations"]) > 0


def test_root_of_a_complex_function():
    # z^2 = -3 + 4i has the roots +-(1 + 2i).
    fn = lambda z, a: z**2 - a
    a = jnp.asarray(-3.0 + 4.0j)
    y, result, _ = host.ScipyRoot().solve(fn, jnp.asarray([1.0 + 1.0j]), a)
    expect(result, RESULTS.successful)
    np.testing.assert_allclose(y, [1 + 2j], rtol=1e-8)


def test_root_under_jit_with_a_captured_tracer_is_compiled_once():
    traces = []

    @jax.jit
    def solve(a):
        traces.append(None)
        fn = lambda y, args: residual(y, a)
        return host.ScipyRoot().solve(fn, guess(), None)[:2]

    for value in (1.0, 2.0):
        y, result = solve(jnp.full(2, value))
        expect(result, RESULTS.successful)
        np.testing.assert_allclose(y["u"], reference(value), atol=1e-6)
    assert len(traces) == 1


def test_a_bad_lane_harms_no_other():
    a = jnp.array([[1.0, 1.0], [jnp.nan, 0.0], [2.0, 2.0]])
    solve = jax.jit(
        jax.vmap(lambda a: host.ScipyRoot().solve(residual, guess(), a)[:2])
    )
    y, result = solve(a)
    np.testing.assert_array_equal(result == RESULTS.successful, [True, False, True])
    np.testing.assert_allclose(y["u"][0], reference(1.0), atol=1e-6)
    np.testing.assert_allclose(y["u"][2], reference(2.0), atol=1e-6)
    assert bool(jnp.all(jnp.isfinite(y["u"][1])))


def test_false_success_of_scipy_is_a_failure_here():
    fn = lambda y, _: y**2 + 1.0  # no root; "lm" calls the minimum of its norm success
    claimed = scipy.optimize.root(lambda x: x**2 + 1.0, [0.5], method="lm")
    assert claimed.success
    _, result, _ = host.ScipyRoot("lm").solve(fn, jnp.array([0.5]), None)
    expect(result, RESULTS.local_minimum)
    loose = host.ScipyRoot("anderson", options={"fatol": 0.5}, residual_tol=1e-3)
    _, result, _ = loose.solve(lambda y, _: jnp.expm1(y), jnp.array([1.0]), None)
    expect(result, RESULTS.residual_too_large)


def test_no_progress_is_not_taken_for_an_exhausted_budget():
    # MINPACK's message here ends in "from the last ten iterations".
    fn = lambda y, _: jnp.where(y > 0, 1.0 + 1e-3 * y, 1.0)
    _, result, stats = host.ScipyRoot("hybr").solve(fn, jnp.array([0.5, 2.0]), None)
    expect(result, RESULTS.host_failure)
    assert int(stats["num_evaluations"]) < 100


LANES = {
    "root": (host.ScipyRoot(options={"maxfev": 6}), lambda y, a: y**3 - a),
    "minimise": (
        host.ScipyMinimize(options={"maxiter": 2}),
        lambda y, a: jnp.sum(y**4 / 4 - a * y),
    ),
    "fixed point": (
        host.ScipyFixedPoint("iteration", options={"maxiter": 9}),
        lambda y, a: (y + a / y**2) / 2,
    ),
}


@pytest.mark.parametrize("kind", LANES)
def test_the_success_flag_is_mapped_lane_by_lane(kind):
    # The guess is the solution of the first lane, and far from that of the second.
    solver, fn = LANES[kind]
    solve = lambda a: solver.solve(fn, jnp.array([2.0]), a)[:2]
    a = jnp.array([8.0, 1e5])
    y, result = jax.jit(jax.vmap(solve))(a)
    spent = jax.vmap(lambda r: r == RESULTS.nonlinear_max_steps_reached)(result)
    np.testing.assert_array_equal(spent, [False, True])
    np.testing.assert_array_equal(result == RESULTS.successful, [True, False])
    np.testing.assert_allclose(y[0], 2.0, rtol=1e-9)
    directly = [solve(lane)[1] for lane in a]
    expect(directly[0], RESULTS.successful)
    expect(directly[1], RESULTS.nonlinear_max_steps_reached)


def test_an_exception_inside_scipy_is_one_sentence_and_a_result_per_lane(caplog):
    solver = host.ScipyRoot("krylov", options={"line_search": "bisection"})
    solve = lambda y: solver.solve(residual, y, jnp.ones(2))
    guesses = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), guess())
    with caplog.at_level(logging.ERROR, logger="eqximplicit"):
        y, result, _ = jax.block_until_ready(jax.jit(jax.vmap(solve))(guesses))
    failed = jax.vmap(lambda r: r == RESULTS.host_failure)(result)
    np.testing.assert_array_equal(failed, [True, True])
    jax.tree.map(np.testing.assert_array_equal, y, guesses)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for sentence in said:
        assert "`ScipyRoot` stopped on the host because of ValueError: " in sentence
        assert "Invalid line search" in sentence
        assert "\n" not in sentence


def test_a_host_failure_raises_where_asked_and_is_told_where_not(caplog):
    condition = eqi.Root(lambda y, _: y - 1)
    with pytest.raises(RuntimeError, match="host"):
        eqi.ImplicitFunction(condition, host.HostSolver(failing))(jnp.ones(2))
    quiet = eqi.ImplicitFunction(condition, host.HostSolver(failing), throw=False)
    result = jax.jit(lambda y0: quiet.solve(y0).result)(jnp.ones(2))
    expect(result, RESULTS.host_failure)
    assert all("the mesh is tangled" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (host.ScipyRoot, "tol"),
        (host.ScipyRoot, "residual_tol"),
        (host.ScipyFixedPoint, "tol"),
        (host.ScipyFixedPoint, "residual_tol"),
        (host.ScipyMinimize, "tol"),
    ],
)
def test_a_negative_tolerance_is_refused_by_name(kind, name):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({name}=\.\.\.\)"):
        kind(**{name: -1e-6})


def test_exhausted_budget_has_its_own_code():
    solver = host.ScipyMinimize("BFGS", options={"maxiter": 3})
    _, result, stats = solver.solve(rosenbrock, jnp.array([-1.2, 1.0]), 1.0)
    expect(result, RESULTS.nonlinear_max_steps_reached)
    assert int(stats["num_steps"]) == 3
    fixed = host.ScipyFixedPoint("iteration", options={"maxiter": 5})
    y, result, _ = fixed.solve(lambda y, _: jnp.cos(y), jnp.ones(2), None)
    expect(result, RESULTS.nonlinear_max_steps_reached)
    assert abs(float(y[0]) - 0.7390851332) < 0.1


@pytest.mark.parametrize(
    "method", ["BFGS", "Newton-CG", "trust-exact", "L-BFGS-B", "Nelder-Mead"]
)
def test_minimise_agrees_with_the_closed_form(method):
    y0, a = jnp.array([0.9, 1.2]), jnp.array(1.1)
    y, result, _ = host.ScipyMinimize(method, tol=1e-7).solve(rosenbrock, y0, a)
    expect(result, RESULTS.successful)
    np.testing.assert_allclose(y, [1.1, 1.21], atol=1e-4)


def test_minimise_takes_no_more_evaluations_than_scipy_with_a_hand_written_gradient():
    y0 = np.array([-1.2, 1.0])
    fn = lambda y: (1 - y[0]) ** 2 + 100 * (y[1] - y[0] ** 2) ** 2
    jac = lambda y: np.array(
        [
            -2 * (1 - y[0]) - 400 * y[0] * (y[1] - y[0] ** 2),
            200 * (y[1] - y[0] ** 2),
        ]
    )
    by_hand = scipy.optimize.minimize(fn, y0, jac=jac, method="BFGS")
    y, _, stats = host.ScipyMinimize("BFGS").solve(rosenbrock, jnp.asarray(y0), 1.0)
    np.testing.assert_allclose(y, by_hand.x, rtol=1e-6)
    assert abs(int(stats["num_evaluations"]) - by_hand.nfev) <= 1


@pytest.mark.parametrize("method", ["del2", "iteration", "hybr"])
def test_fixed_point_of_the_cosine(method):
    solver = host.ScipyFixedPoint(method)
    y, result, _ = solver.solve(lambda y, _: jnp.cos(y), {"x": jnp.ones(2)}["x"], None)
    expect(result, RESULTS.successful)
    np.testing.assert_allclose(y, 0.7390851332151607, atol=1e-7)


# Scales of the residual at which a default tolerance of SciPy's was too large.
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    "method", ["broyden1", "broyden2", "anderson", "diagbroyden", "krylov", "df-sane"]
)
def test_methods_without_a_jacobian_go_on_until_the_residual_is_small(method, size):
    solver = host.ScipyRoot(method)
    fn = lambda y, a: size * (y + 0.2 * jnp.sin(y[::-1]) - a)
    y, result, _ = solver.solve(fn, jnp.zeros(3), jnp.arange(3.0))
    expect(result, RESULTS.successful)
    assert np.max(np.abs(fn(y, jnp.arange(3.0)))) <= solver.residual_tol


@pytest.mark.parametrize("method", ["anderson", "linearmixing", "excitingmixing"])
def test_quasi_newton_methods_iterate_a_map(method):
    solver = host.ScipyFixedPoint(method)
    y, result, _ = solver.solve(lambda y, _: jnp.cos(y), jnp.ones(2), None)
    expect(result, RESULTS.successful)
    np.testing.assert_allclose(y, 0.7390851332151607, atol=solver.residual_tol)


@pytest.mark.parametrize(
    ("solver", "known"),
    [
        (host.ScipyRoot, "hybr, lm, broyden1.*krylov, df-sane"),
        (host.ScipyFixedPoint, "del2, iteration, hybr"),
        (host.ScipyMinimize, "Nelder-Mead.*L-BFGS-B.*trust-krylov"),
    ],
)
def test_a_method_that_scipy_does_not_have_is_refused(solver, known):
    with pytest.raises(ValueError, match=f"no method 'nope'. Pass one of {known}"):
        solver("nope")


def test_names_of_methods_may_be_written_as_scipy_takes_them():
    y, result, _ = host.ScipyRoot("LM").solve(lambda y, _: y**3 - 8, jnp.ones(1), None)
    expect(result, RESULTS.successful)
    np.testing.assert_allclose(y, 2.0, rtol=1e-7)
    host.ScipyMinimize("bfgs")


def test_float32_state_stays_float32():
    y0 = jnp.array([0.9, 1.2], jnp.float32)
    solver = host.ScipyMinimize("trust-exact")
    y, result, _ = solver.solve(rosenbrock, y0, jnp.float32(1))
    expect(result, RESULTS.successful)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 1.0, atol=1e-3)


# --- HostSolver


def square_root(y0, args):
    """Plain NumPy: checks what it is given, and loops."""
    assert isinstance(args, np.ndarray)
    x = y0["x"]
    while not np.all(np.abs(x**2 - args) < 1e-12):
        x = (x + args / x) / 2
    return {"x": x}


def test_any_callable_runs_directly_under_jit_and_vmap():
    solver = host.HostSolver(square_root)
    y0, args = {"x": jnp.ones(2)}, jnp.array([4.0, 9.0])
    np.testing.assert_allclose(solver(y0, args)["x"], [2, 3])
    np.testing.assert_allclose(jax.jit(solver)(y0, args)["x"], [2, 3])
    many = jax.vmap(solver, in_axes=(None, 0))(y0, jnp.stack([args, 4 * args]))
    np.testing.assert_allclose(many["x"], [[2, 3], [4, 6]])


def test_a_module_with_arrays_can_be_the_callable():
    class Shift(eqx.Module):
        by: jax.Array

        def __call__(self, y0, args):
            assert isinstance(self.by, np.ndarray)
            return y0 + self.by

    solver = host.HostSolver(Shift(jnp.array([1.0, 2.0])))
    out = eqx.filter_jit(lambda s, y: s(y, None))(solver, jnp.zeros(2))
    np.testing.assert_array_equal(out, [1.0, 2.0])


def test_derivative_needs_an_implicit_function():
    solver = host.HostSolver(square_root)
    loss = lambda a: solver({"x": jnp.ones(2)}, a)["x"].sum()
    with pytest.raises(TypeError, match="Differentiate .*ImplicitFunction"):
        jax.grad(loss)(jnp.array([4.0, 9.0]))
    stopped = lambda a: jnp.sum(
        a * solver({"x": jnp.ones(2)}, jax.lax.stop_gradient(a))["x"]
    )
    for grad in (jax.grad(stopped), jax.jit(jax.grad(stopped))):
        np.testing.assert_allclose(grad(jnp.array([4.0, 9.0])), [2, 3])


def shifted_by(shift):
    condition = eqi.Root(lambda y, a: y - a - shift)
    solver = eqi.HostSolver(lambda y0, a: np.asarray(a) + shift)
    return eqi.ImplicitFunction(condition, solver)(1.0, 8.0)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, lambda f: jax.jit(jax.grad(f))]
)
def test_a_captured_tracer_is_refused_by_name_while_tracing(transform):
    with pytest.raises(
        ValueError, match=r"`shift \(captured by the solver\)`, float64\["
    ):
        jax.eval_shape(
            transform(shifted_by), jnp.ones(1) if transform is jax.vmap else 1.0
        )


def test_a_captured_array_is_concrete_without_jit():
    assert shifted_by(jnp.array(2.0)) == 10.0
    assert jax.grad(shifted_by)(2.0) == 1.0


def failing(y0, args):
    raise FloatingPointError("the mesh is\n tangled")


SENTENCE = "HostSolver.*FloatingPointError: the mesh is tangled; correct"


def test_an_exception_becomes_one_sentence():
    solver = host.HostSolver(failing)
    with pytest.raises(RuntimeError, match=SENTENCE) as error:
        solver(jnp.ones(2), None)
    assert "\n" not in str(error.value)
    with pytest.raises(Exception, match=SENTENCE):
        jax.block_until_ready(jax.jit(solver)(jnp.ones(2), None))


def test_an_exception_without_throw_is_a_result_and_the_guess(caplog):
    solver = host.HostSolver(failing)
    with caplog.at_level(logging.ERROR, logger="eqximplicit"):
        y, result, _ = solver.solve(lambda y, a: y, jnp.ones(2), None)
    expect(result, RESULTS.host_failure)
    np.testing.assert_array_equal(y, 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "`HostSolver` stopped on the host because of FloatingPointError: the mesh is "
        "tangled; correct the function or its starting point, or choose another method."
    ]


def test_wrong_shapes_are_named():
    solver = host.HostSolver(lambda y0, args: np.zeros(3))
    with pytest.raises(
        RuntimeError, match=r"returned shape \(3,\) for a guess of \(2,\)"
    ):
        solver(jnp.ones(2), None)
    with pytest.raises(TypeError, match="(?i)callable"):
        host.HostSolver(3)


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"eqximplicit\[scipy\]"):
        host.ScipyMinimize()


def scipy_cubic(y0, a):
    """The root of `y³ + y = a` by SciPy; `a` is an argument and a captured array."""
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, b: y**3 + y - (a + b) / 2), eqi.ScipyRoot()
    )
    return jnp.sum(layer(y0, a))


@pytest.mark.slow
def test_derivative_of_a_host_solver_at_a_python_float():
    gradient = jax.grad(lambda a: scipy_cubic(jnp.ones(2, jnp.float32), a))(2.0)
    np.testing.assert_allclose(gradient, 2 / 4, rtol=1e-5)
    hessian = jax.hessian(lambda a: scipy_cubic(jnp.ones(()), a))(2.0)
    np.testing.assert_allclose(hessian, -6 / 64, rtol=1e-5)


def test_derivative_of_a_host_solver_without_jit():
    with jax.disable_jit():
        gradient = jax.grad(lambda a: scipy_cubic(jnp.ones(()), a))(2.0)
    np.testing.assert_allclose(gradient, 1 / 4, rtol=1e-5)


def test_raised_failure_says_what_the_host_said():
    def boom(y0, args):
        raise ZeroDivisionError("no such thing")

    condition = eqi.Root(lambda y, a: y - a)
    layer = eqi.ImplicitFunction(condition, eqi.HostSolver(boom))
    with pytest.raises(
        eqi.SolveError, match="ZeroDivisionError: no such thing; correct"
    ):
        layer(jnp.array(1.0), 2.0)


def test_failure_is_not_explained_by_an_earlier_one():
    def boom(y, args):
        raise ZeroDivisionError("no such thing")

    condition = eqi.Root(lambda y, a: y - a)
    earlier = eqi.ImplicitFunction(condition, eqi.HostSolver(boom), throw=False)
    earlier(jnp.array(1.0), 2.0)
    rootless = eqi.Root(lambda y, a: y**2 + a)
    layer = eqi.ImplicitFunction(rootless, eqi.ScipyRoot())
    with pytest.raises(eqi.SolveError) as caught:
        layer(jnp.array(1.0), 2.0)
    assert "no such thing" not in str(caught.value)
