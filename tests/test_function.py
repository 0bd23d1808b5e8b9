"""`ImplicitFunction`: condition, solver and adjoint joined in one module."""

import functools
import inspect
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from problems import (
    assert_close,
    Cell,
    CELL_GUESS,
    CELL_JACOBIAN,
    cell_layer,
    EXACT,
    Para,
    PROBLEMS,
    ROOT,
    Var,
)

import eqximplicit as eqi

# optimistix's Newton stops when its last step was this small.
NEWTON = {"rtol": 1e-10, "atol": 1e-10}
# Adam has brought the loss below 1e-14, so the parameters to its square root.
TRAINED = 1e-5


def cubic_residual(y, args):
    return y**3 + y - args


def cubic_root(b):
    """The real root of `y³ + y = b`, by Cardano's formula."""
    s = np.sqrt(np.asarray(b) ** 2 / 4 + 1 / 27)
    return np.cbrt(b / 2 + s) + np.cbrt(b / 2 - s)


def cubic_layer(**kwargs):
    return eqi.ImplicitFunction(
        eqi.Root(cubic_residual), optx.Newton(**NEWTON), **kwargs
    )


# --- the two equations, as Equinox modules ------------------------------------------


@functools.cache
def cell_run():
    @jax.jit
    def run(y0, para):
        layer = cell_layer()

        def solution(para):
            return layer.with_params(para)(y0)

        forward, reverse = jax.jacfwd(solution)(para), jax.jacrev(solution)(para)
        return solution(para), forward, reverse

    return run


def test_two_equations_give_the_published_solution_and_jacobian():
    value, forward, reverse = cell_run()(CELL_GUESS, cell_layer().params)
    assert_close(value, (Var(2.0), Var(3.0)))
    assert jtu.tree_structure(value) == jtu.tree_structure(CELL_GUESS)
    assert_close(forward, CELL_JACOBIAN)
    assert_close(reverse, CELL_JACOBIAN)


def test_derivative_is_taken_at_the_parameters_given_and_not_at_those_stored():
    para = Para(jnp.array(8.0), jnp.array(2.0))
    value, forward, reverse = cell_run()(CELL_GUESS, para)
    # Computed by another implementation, 16 digits.
    assert_close(value, (1.3937451067861883, 4.34618535901258))
    expected = (
        (0.19814871480847235, 0.28817676383524327),
        (-0.29670320961474117, -1.4749896022942082),
    )
    assert_close((forward, reverse), (expected, expected))


class Canoak(eqx.Module):
    """A model with a solution inside and outputs of its own."""

    layer: eqi.ImplicitFunction

    def output1(self):
        return self.layer()[0].value


def test_derivative_of_one_output_through_a_bound_method():
    model = Canoak(cell_layer(y0=CELL_GUESS))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda method: method()))(model.output1)
    assert_close(gradient.__self__.layer.params, CELL_JACOBIAN[0])


def test_derivative_of_a_loss_of_one_output():
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(layer):
        return layer(CELL_GUESS)[0].value ** 2

    got = gradient(cell_layer()).params
    assert_close(got, Para(2 * 2 * 37 / 205, 2 * 2 * 36 / 205))


def test_guess_may_come_from_the_module():
    layer = cell_layer(y0=CELL_GUESS)
    assert_close(layer(), (Var(2.0), Var(3.0)))
    # A guess in the call wins: this one is at the other root.
    other = tuple(Var(-v.value) for v in CELL_GUESS)
    negative = eqi.ImplicitFunction(
        eqi.Root(lambda y, _: y**2 - 4), optx.Newton(**NEWTON), y0=jnp.array(1.0)
    )
    assert_close(negative(), 2.0)
    assert_close(negative(other[0].value), -2.0)


def test_params_and_with_params_are_where_and_tree_at():
    layer = cell_layer()
    assert eqx.tree_equal(layer.params, Para(jnp.array(10.0), jnp.array(3.0)))
    para = Para(jnp.array(8.0), jnp.array(2.0))
    swapped = layer.with_params(para)
    assert eqx.tree_equal(swapped.params, para)
    assert eqx.tree_equal(swapped.condition.fn, Cell(para))
    assert eqx.tree_equal(swapped.with_params(layer.params), layer)


def test_partition_and_combine_keep_the_derivative():
    params, static = eqx.partition(cell_layer(), eqx.is_inexact_array)

    @jax.jit
    @jax.grad
    def gradient(params):
        return eqx.combine(params, static)(CELL_GUESS)[1].value

    assert_close(gradient(params).params, CELL_JACOBIAN[1])


def test_training_reaches_the_parameters_of_a_target_solution():
    target = (Var(jnp.array(2.0)), Var(jnp.array(3.0)))
    optimiser = optax.adam(0.05)

    def loss(layer):
        misses = jtu.tree_map(lambda a, b: (a - b) ** 2, layer(CELL_GUESS), target)
        return sum(jtu.tree_leaves(misses))

    @eqx.filter_jit
    def step(layer, state):
        value, grads = eqx.filter_value_and_grad(loss)(layer)
        updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(layer, updates), state, value

    layer = cell_layer(9.8, 2.9)
    state = optimiser.init(eqx.filter(layer, eqx.is_inexact_array))
    for _ in range(2000):
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            layer, state, value = step(layer, state)
        if value < 1e-14:
            break
    assert_close(layer.params, Para(10.0, 3.0), tol=TRAINED)


def test_layer_is_serialised_with_its_parameters():
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cell_layer(8.0, 2.0))
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, cell_layer())
    assert eqx.tree_equal(loaded, cell_layer(8.0, 2.0))


# --- solvers that JAX can neither trace nor differentiate ---------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_python_loop_solver_has_the_closed_form_jacobian(problem):
    calls = []

    def solver(y0, args):
        calls.append(1)
        return problem.solve(y0, args)

    layer = eqi.ImplicitFunction(problem.condition(problem.fn), solver)
    value, pullback = jax.vjp(lambda args: layer(problem.y0, args), problem.args)
    assert len(calls) == 1
    np.testing.assert_array_equal(value, problem.solve(problem.y0, problem.args))
    by_weight, by_theta = problem.jacobian(problem.args)
    ct_y = jnp.array([1.0, -2.0, 0.5])
    expected = (np.tensordot(ct_y, by_weight, 1), np.asarray(ct_y) @ by_theta)
    assert_close(pullback(ct_y)[0], expected)


def test_python_loop_solver_works_in_forward_mode_and_twice():
    layer = eqi.ImplicitFunction(eqi.Root(ROOT.fn), ROOT.solve)
    weight, theta = ROOT.args

    def forward(solution):
        return jax.jvp(solution, (theta,), (jnp.ones(2),))[1]

    def first(solution):
        return lambda theta: jnp.sum(solution(theta) ** 2)

    def solution(theta):
        return layer(ROOT.y0, (weight, theta))

    def truth(theta):
        return ROOT.solution((weight, theta))

    assert_close(forward(solution), forward(truth))
    nested = jax.grad(lambda t: jnp.sum(jax.grad(first(solution))(t) ** 2))(theta)
    expected = jax.grad(lambda t: jnp.sum(jax.grad(first(truth))(t) ** 2))(theta)
    assert_close(nested, expected)


def test_auxiliary_output_of_a_solver_is_passed_through():
    def solver(y0, args):
        return ROOT.solve(y0, args), {"steps": 7, "log": "done", "list": [np.arange(3)]}

    layer = eqi.ImplicitFunction(eqi.Root(ROOT.fn), solver, has_aux=True)
    solution = layer.solve(ROOT.y0, ROOT.args)
    assert solution.aux["steps"] == 7
    assert solution.aux["log"] == "done"
    np.testing.assert_array_equal(solution.aux["list"][0], np.arange(3))


class Neighbours(eqx.Module):
    """A list of pairs that the solver builds; only it knows which pairs interact."""

    pairs: jax.Array
    cutoff: float = eqx.field(static=True)


def test_condition_may_need_the_final_neighbour_list_of_the_solver():
    def force(y, stiffness, neighbours):
        i, j = neighbours.pairs.T
        return y - stiffness + neighbours.cutoff * jnp.zeros(4).at[i].add(y[j])

    def solver(y0, stiffness):
        pairs = []
        for i in range(3):  # a list that grows
            pairs.append((i, i + 1))
        neighbours = Neighbours(jnp.array(pairs), 0.5)
        matrix = np.eye(4) + 0.5 * np.eye(4, k=1)
        return np.linalg.solve(matrix, np.asarray(stiffness)), neighbours

    layer = eqi.ImplicitFunction(eqi.Root(force, takes_aux=True), solver, has_aux=True)
    stiffness = jnp.array([1.0, 2.0, -1.0, 0.5])

    def loss(stiffness):
        solution = layer.solve(jnp.zeros(4), stiffness)
        return jnp.sum(solution.value**2), solution

    gradient, solution = jax.grad(loss, has_aux=True)(stiffness)
    matrix = np.eye(4) + 0.5 * np.eye(4, k=1)
    y = np.linalg.solve(matrix, stiffness)
    assert_close(gradient, np.linalg.solve(matrix.T, 2 * y))
    assert solution.aux.pairs.dtype == jnp.int64
    assert solution.aux.cutoff == 0.5
    assert solution.stats["residual_norm"] < EXACT


def test_auxiliary_output_of_the_function_is_that_of_the_last_step():
    def fn(y, b):
        return cubic_residual(y, b), {"image": 2 * y, "name": "cubic"}

    layer = eqi.ImplicitFunction(
        eqi.Root(fn, has_aux=True), optx.Newton(**NEWTON), has_aux=True
    )
    solution = layer.solve(jnp.array(1.0), jnp.array(2.0))
    assert solution.aux["name"] == "cubic"
    # optimistix evaluates `fn` before its last step, which was below 1e-10.
    assert_close(solution.aux["image"], 2.0)


# --- transformations ----------------------------------------------------------------


def test_vmap_and_grad_commute_over_a_layer():
    bs = jnp.array([-1.0, 0.3, 2.0])
    layer = cubic_layer()

    @jax.jit
    def run(bs):
        def one(b):
            return layer(jnp.array(0.5), b)

        def total(bs):
            return jnp.sum(jax.vmap(one)(bs))

        return jax.vmap(one)(bs), jax.vmap(jax.grad(one))(bs), jax.grad(total)(bs)

    y, vmap_of_grad, grad_of_vmap = run(bs)
    assert_close(y, cubic_root(bs))
    expected = 1 / (3 * cubic_root(bs) ** 2 + 1)
    assert_close(vmap_of_grad, expected)
    assert_close(grad_of_vmap, expected)


def test_batch_may_be_over_the_guess_the_argument_or_both():
    y0s, bs = jnp.array([0.5, 1.5]), jnp.array([2.0, 10.0])
    layer = cubic_layer()
    cases = {
        (0, 0): (y0s, bs, [1 / 4, 1 / 13]),
        (None, 0): (y0s[0], bs, [1 / 4, 1 / 13]),
        (0, None): (y0s, bs[0], [1 / 4, 1 / 4]),
    }

    @jax.jit
    def run():
        gradients = {}
        for in_axes, (y0, b, _) in cases.items():
            mean = lambda b, y0=y0, axes=in_axes: jnp.mean(jax.vmap(layer, axes)(y0, b))
            gradients[str(in_axes)] = jax.grad(mean)(b)
        return gradients

    gradients = run()
    for in_axes, (_, _, slopes) in cases.items():
        lanes = np.array(slopes) / 2
        expected = lanes.sum() if in_axes[1] is None else lanes
        assert_close(gradients[str(in_axes)], expected)


def test_vmap_over_an_ensemble_of_layers():
    alphas, betas = jnp.array([10.0, 8.0]), jnp.array([3.0, 2.0])

    @eqx.filter_jit
    @eqx.filter_vmap
    def run(alpha, beta):
        layer = cell_layer(alpha, beta)
        return eqx.filter_grad(lambda layer: layer(CELL_GUESS)[0].value)(layer).params

    expected = ([37 / 205, 0.19814871480847235], [36 / 205, 0.28817676383524327])
    assert_close(run(alphas, betas), Para(*map(np.array, expected)))


def test_scan_over_a_layer_differentiates_through_every_step():
    layer = cubic_layer()
    xs = jnp.array([1.0, -0.5, 2.0])

    @jax.jit
    @jax.value_and_grad
    def run(xs):
        def step(y, x):
            y = layer(y, x + 0.5 * y)
            return y, y

        return jax.lax.scan(step, jnp.array(0.3), xs)[0]

    value, gradient = run(xs)
    y, chain = 0.3, []
    for x in xs:
        y = cubic_root(x + 0.5 * y)
        slope = 1 / (3 * y**2 + 1)
        chain = [0.5 * slope * d for d in chain] + [slope]
    assert_close(value, y)
    assert_close(gradient, np.array(chain))


def test_guess_has_no_derivative_in_either_mode():
    layer = cubic_layer()

    @jax.jit
    def run(y0):
        def solution(y0):
            return layer(y0, jnp.array(2.0))

        return jax.jacfwd(solution)(y0), jax.jacrev(solution)(y0)

    assert_close(run(jnp.array(0.7)), (0.0, 0.0), tol=0)


def test_guess_derivative_is_a_symbolic_zero():
    # A solve that is not differentiated has no linear solve in its tangent.
    def program_of_tangent(fn):
        tangent = lambda x: jax.jvp(fn, (x,), (x,))[1]
        return str(jax.make_jaxpr(tangent)(jnp.array(0.7)))

    linear_solve = "implicit_linear_solve"
    assert linear_solve not in program_of_tangent(lambda y0: cubic_layer()(y0, 2.0))
    assert linear_solve in program_of_tangent(lambda b: cubic_layer()(0.7, b))


def test_argument_that_only_the_solver_sees_has_zero_derivative():
    def solver(y0, args):
        b, rate = args
        step = lambda _, y: y - rate * cubic_residual(y, b)
        return jax.lax.fori_loop(0, 400, step, y0)

    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, args: cubic_residual(y, args[0])), solver
    )

    @jax.jit
    def run(b, rate):
        def solution(b, rate):
            return layer(jnp.array(0.0), (b, rate))

        forward = jax.jacfwd(solution, argnums=(0, 1))(b, rate)
        return forward, jax.jacrev(solution, argnums=(0, 1))(b, rate)

    forward, reverse = run(jnp.array(2.0), jnp.array(0.1))
    assert_close((forward, reverse), ((0.25, 0.0), (0.25, 0.0)))
    assert forward[1] == 0
    assert reverse[1] == 0


# --- compilation --------------------------------------------------------------------


def test_second_call_with_the_same_shapes_compiles_nothing():
    traces = []

    def fn(y, args):
        traces.append(1)
        return cubic_residual(y, args)

    @eqx.filter_jit
    def value_and_grad(layer, y0, b):
        return eqx.filter_value_and_grad(lambda b: layer(y0, b))(b)

    def layer():  # made anew for each call, as in a training loop
        return eqi.ImplicitFunction(eqi.Root(fn), optx.Newton(**NEWTON))

    value_and_grad(layer(), jnp.array(0.5), jnp.array(2.0))
    traced = len(traces)
    assert traced > 0
    value, gradient = value_and_grad(layer(), jnp.array(0.7), jnp.array(10.0))
    assert len(traces) == traced
    assert_close((value, gradient), (2.0, 1 / 13))


def test_second_eager_call_compiles_nothing():
    traces = []

    def fn(y, args):
        traces.append(1)
        return cubic_residual(y, args)

    layer = eqi.ImplicitFunction(eqi.Root(fn), optx.Newton(**NEWTON))
    layer(jnp.array(0.5), jnp.array(2.0))
    traced = len(traces)
    assert_close(layer(jnp.array(0.7), jnp.array(10.0)), 2.0)
    assert len(traces) == traced


def test_eager_call_with_another_python_number_compiles_nothing():
    traces = []

    def fn(y, args):
        traces.append(1)
        a, order = args["a"], args["order"]
        assert isinstance(order, int)  # may be a shape, so it stays one
        return y**order + y - a

    layer = eqi.ImplicitFunction(eqi.Root(fn), optx.Newton(rtol=1e-5, atol=1e-5))
    layer(jnp.float32(0.5), {"a": 2.0, "order": 3})
    traced = len(traces)
    y = layer(jnp.float32(0.7), {"a": 10.0, "order": 3})
    assert y.dtype == jnp.float32  # a number takes the dtype of the state, as ever
    np.testing.assert_allclose(y, 2.0, rtol=1e-5)
    assert len(traces) == traced
    layer(0.5, {"a": 2.0, "order": 3})
    traced = len(traces)
    np.testing.assert_allclose(layer(0.7, {"a": 10.0, "order": 3}), 2.0, rtol=1e-5)
    assert len(traces) == traced


def test_solver_is_traced_once_per_compilation_and_run_once_per_call():
    traces, runs = [], []

    def solver(y0, b):
        traces.append(1)
        jax.debug.callback(lambda: runs.append(1))
        step = lambda _, y: y - cubic_residual(y, b) / (3 * y**2 + 1)
        return jax.lax.fori_loop(0, 30, step, y0)

    layer = eqi.ImplicitFunction(eqi.Root(cubic_residual), solver)

    @jax.jit
    def second(b):
        return jax.grad(jax.grad(lambda b: layer(jnp.array(1.0), b)))(b)

    for calls in (1, 2, 3):
        # y'' = -6 y y' ** 3
        assert_close(second(jnp.array(2.0)), -6 / 64)
        jax.effects_barrier()
        assert len(traces) == 1
        assert len(runs) == calls


class CountingPicard(optx.AbstractFixedPointSolver):
    """Plain iteration that counts how often its methods are traced."""

    counts: dict[str, int] = eqx.field(static=True)
    inner: optx.FixedPointIteration
    rtol: float = 1e-10
    atol: float = 1e-10
    norm: object = optx.max_norm

    def init(self, *args):
        self.counts["init"] += 1
        return self.inner.init(*args)

    def step(self, *args):
        self.counts["step"] += 1
        return self.inner.step(*args)

    def terminate(self, *args):
        return self.inner.terminate(*args)

    def postprocess(self, *args):
        return self.inner.postprocess(*args)


class HashableCounts(dict):
    __hash__ = object.__hash__


def test_optimistix_solver_is_traced_once_per_compilation():
    counts = HashableCounts(init=0, step=0)
    solver = CountingPicard(counts, optx.FixedPointIteration(**NEWTON))
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda y, b: 0.5 * jnp.cos(y) + b), solver
    )

    @jax.jit
    def run(b):
        return jax.value_and_grad(lambda b: layer(jnp.array(0.5), b))(b)

    value, gradient = run(jnp.array(0.1))
    assert counts == {"init": 1, "step": 1}
    assert_close(gradient, 1 / (1 + 0.5 * np.sin(value)))


# --- failure ------------------------------------------------------------------------


def test_failed_solve_raises_with_cause_and_remedy():
    layer = eqi.ImplicitFunction(
        eqi.Root(cubic_residual), optx.Newton(**NEWTON), max_steps=2
    )
    with pytest.raises(eqx.EquinoxRuntimeError, match="(?i)maximum number of steps"):
        jax.block_until_ready(layer(jnp.array(50.0), jnp.array(2.0)))


def test_failed_lane_does_not_raise_without_throw_and_has_nan_derivative():
    layer = cubic_layer(max_steps=8, throw=False)

    @jax.jit
    def run(y0s, bs):
        def total(bs):
            solution = jax.vmap(layer.solve)(y0s, bs)
            return jnp.sum(solution.value), solution

        return jax.grad(total, has_aux=True)(bs)

    # The second guess is too far for eight steps.
    gradient, solution = run(jnp.array([1.0, 1e6, 2.1]), jnp.array([2.0, 2.0, 10.0]))
    failed = solution.result != eqi.RESULTS.successful
    np.testing.assert_array_equal(failed, [False, True, False])
    assert_close(solution.value[0], 1.0)
    assert np.isfinite(solution.value[1])
    assert np.isnan(gradient[1])
    assert_close(gradient[::2], np.array([1 / 4, 1 / 13]))


def test_failure_by_nan_says_so():
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, b: jnp.sqrt(y - b)), optx.Newton(**NEWTON), throw=False
    )
    solution = eqx.filter_jit(layer.solve)(jnp.array(0.0), jnp.array(1.0))
    assert "finite" in eqi.RESULTS[solution.result]


def test_nothing_calls_the_host_without_throw():
    layer = cubic_layer(throw=False)
    gradient = jax.jit(jax.grad(lambda b: layer(jnp.array(1.0), b)))
    assert "callback" not in gradient.lower(jnp.array(2.0)).as_text()


def test_residual_tolerance_makes_the_derivative_of_an_early_stop_nan():
    def solver(y0, args):
        steps, b = args
        step = lambda _, y: y - 0.1 * cubic_residual(y, b)
        return jax.lax.fori_loop(0, steps, step, y0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(residual_tol, steps, b):
        layer = eqi.ImplicitFunction(
            eqi.Root(lambda y, args: cubic_residual(y, args[1])),
            solver,
            throw=False,
            residual_tol=residual_tol,
        )

        def solution(b):
            solution = layer.solve(jnp.array(0.0), (steps, b))
            return solution.value, solution

        return jax.grad(solution, has_aux=True)(b)

    steps, b = jnp.array([3, 400]), jnp.array(2.0)
    strict, solution = jax.vmap(functools.partial(run, 1e-6), (0, None))(steps, b)
    assert np.isnan(strict[0])
    assert_close(strict[1], 0.25)
    np.testing.assert_array_equal(
        solution.result == eqi.RESULTS.residual_too_large, [True, False]
    )
    assert (solution.result == eqi.RESULTS.successful)[1]
    expected = np.abs(cubic_residual(solution.value, 2.0))
    assert_close(solution.stats["residual_norm"], expected)
    # Without a tolerance a bare callable is believed: meta-learning stops early.
    loose, solution = run(None, steps[0], b)
    assert_close(loose, 1 / (3 * solution.value**2 + 1))


def test_residual_tolerance_raises_with_throw():
    layer = eqi.ImplicitFunction(
        eqi.Root(cubic_residual), lambda y0, b: y0, residual_tol=1e-6
    )
    with pytest.raises(eqx.EquinoxRuntimeError, match="exceeds `residual_tol`"):
        layer(jnp.array(0.0), jnp.array(2.0))


def test_statistics_are_steps_and_residual_norm():
    solution = cubic_layer().solve(jnp.array(1.2), jnp.array(2.0))
    assert solution.result == eqi.RESULTS.successful
    assert 2 <= solution.stats["num_steps"] <= 10
    residual = cubic_residual(solution.value, 2.0)
    assert_close(solution.stats["residual_norm"], np.abs(residual), tol=0)
    assert solution.aux is None


def test_bare_callable_reports_no_step_count():
    layer = eqi.ImplicitFunction(eqi.Root(ROOT.fn), ROOT.solve)
    solution = layer.solve(ROOT.y0, ROOT.args)
    assert solution.stats["num_steps"] == -1
    assert solution.stats["residual_norm"] < EXACT


# --- one-liners ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "problem"),
    list(
        zip(
            (eqi.root_find, eqi.fixed_point, eqi.minimise, eqi.least_squares),
            PROBLEMS,
            strict=True,
        )
    ),
    ids=[problem.name for problem in PROBLEMS],
)
def test_one_liner_solves_and_differentiates(find, problem):
    def loss(args):
        solution = find(problem.fn, jnp.array(problem.y0), args)
        return jnp.sum(solution.value), solution

    gradient, solution = jax.jit(jax.grad(loss, has_aux=True))(problem.args)
    # The default solvers stop at 1e-8 or better, in residual or in step.
    assert_close(solution.value, problem.solution(problem.args), tol=1e-6)
    expected = [leaf.sum(0) for leaf in problem.jacobian(problem.args)]
    assert_close(gradient, expected, tol=1e-6)
    assert solution.result == eqi.RESULTS.successful


def test_one_liners_take_every_setting_of_a_layer_with_its_default():
    layer = inspect.signature(eqi.ImplicitFunction.__init__).parameters
    not_theirs = {"self", "condition", "where", "y0"}
    settings = {n: p.default for n, p in layer.items() if n not in not_theirs}
    for find in (eqi.root_find, eqi.fixed_point, eqi.minimise, eqi.least_squares):
        own = inspect.signature(find).parameters
        assert list(own)[:3] == ["fn", "y0", "args"]
        mine = {n: p.default for n, p in own.items() if n not in ("fn", "y0", "args")}
        assert mine.pop("tags") == frozenset()
        assert mine == settings


@pytest.mark.parametrize(
    ("find", "fn", "solver"),
    [
        (eqi.root_find, lambda y, a: y**3 - a, optx.Newton),
        (eqi.fixed_point, lambda y, a: y - (y**3 - a) / 20, optx.FixedPointIteration),
        (eqi.minimise, lambda y, a: jnp.sum((y - a) ** 2), optx.NonlinearCG),
        (eqi.least_squares, lambda y, a: y**3 - a, optx.GaussNewton),
    ],
    ids=["root", "fixed point", "minimum", "least squares"],
)
def test_one_liner_hands_its_monitor_on(find, fn, solver):
    monitor, solver = eqi.Monitor(history=300), solver(rtol=1e-8, atol=1e-8)
    solution = find(fn, jnp.array([1.5]), 8.0, solver=solver, monitor=monitor)
    history = np.asarray(solution.stats["residual_history"])
    count = int(solution.stats["num_steps"])
    assert count > 1
    assert history[count - 1] == solution.stats["residual_norm"] < history[0]
    assert np.isnan(history[count:]).all()


def test_linear_solver_is_the_one_knob_of_the_adjoint():
    adjoint = eqi.ImplicitAdjoint(linear_solver=lx.GMRES(rtol=1e-12, atol=1e-12))
    layer = cell_layer(adjoint=adjoint)
    gradient = eqx.filter_jit(
        eqx.filter_grad(lambda layer: layer(CELL_GUESS)[1].value)
    )(layer)
    assert_close(gradient.params, CELL_JACOBIAN[1])


def test_arrays_of_the_adjoint_and_the_options_take_part_in_jit_but_not_in_grad():
    matrix = jnp.array([[4.0]])
    adjoint = eqi.ImplicitAdjoint(
        linear_solver=lx.GMRES(rtol=1e-12, atol=1e-12),
        options={"preconditioner": lx.MatrixLinearOperator(matrix)},
    )
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, b: y**3 + y - b), optx.Newton(**NEWTON), adjoint
    )

    @eqx.filter_jit
    def run(layer, b):
        def loss(layer_and_b):
            layer, b = layer_and_b
            return layer(jnp.ones(1), b)[0]

        return eqx.filter_grad(loss)((layer, b))

    by_layer, by_b = run(layer, jnp.array([2.0]))
    assert_close(by_b, np.array([0.25]))
    assert all(np.all(leaf == 0) for leaf in jtu.tree_leaves(by_layer))


def test_layer_inside_a_model_trains_with_the_other_layers():
    class Model(eqx.Module):
        first: eqx.nn.Linear
        cell: eqi.ImplicitFunction

        def __call__(self, x):
            return jnp.sum(self.cell(jnp.zeros(2), self.first(x)))

    class Equilibrium(eqx.Module):
        weight: jax.Array

        def __call__(self, y, x):
            return jnp.tanh(self.weight @ y + x)

    weight = jnp.array([[0.3, -0.2], [0.5, 0.1]])
    model = Model(
        eqx.nn.Linear(3, 2, key=jax.random.key(0)),
        eqi.ImplicitFunction(
            eqi.FixedPoint(Equilibrium(weight)), optx.Newton(**NEWTON)
        ),
    )
    x = jnp.array([1.0, -1.0, 0.5])
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model: model(x)))(model)

    def unrolled(leaves):
        weight, first = leaves
        y = jnp.zeros(2)
        for _ in range(60):
            y = jnp.tanh(weight @ y + first(x))
        return jnp.sum(y)

    expected = eqx.filter_jit(eqx.filter_grad(unrolled))((weight, model.first))
    assert_close((gradient.cell.condition.fn.weight, gradient.first), expected)


def test_cell_is_not_changed_by_the_layer():
    # The function of a layer is the user's object, found where it was put.
    cell = Cell(Para(jnp.array(1.0), jnp.array(2.0)))
    assert eqi.ImplicitFunction(eqi.FixedPoint(cell)).condition.fn is cell


KINDS = {
    "default root finder": (eqi.Root, None),
    "Newton in closed form": (eqi.Root, optx.Newton(1e-8, 1e-8)),
    "Newton": (eqi.Root, optx.Newton(1e-8, 1e-8, linear_solver=lx.QR())),
    "default fixed point": (eqi.FixedPoint, None),
    "Anderson": (eqi.FixedPoint, eqi.Anderson(1e-8, 1e-8, window=1)),
    "Broyden": (eqi.FixedPoint, eqi.Broyden(1e-8, 1e-8)),
    "default minimiser": (eqi.Minimum, None),
    "BFGS": (eqi.Minimum, optx.BFGS(1e-8, 1e-8)),
    "FIRE": (eqi.Minimum, eqi.FIRE(1e-8, 1e-8)),
    "default least squares": (eqi.LeastSquares, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_auxiliary_output_may_hold_anything(name):
    kind, solver = KINDS[name]
    outputs = {
        eqi.Root: lambda y, a: y - a,
        eqi.FixedPoint: lambda y, a: 0.5 * (y + a),
        eqi.Minimum: lambda y, a: (y - a) ** 2,
        eqi.LeastSquares: lambda y, a: y - a,
    }

    def fn(y, a):
        aux = {"twice": 2 * y, "name": "pair", "number": 1.5, "none": None}
        return outputs[kind](y, a), aux

    layer = eqi.ImplicitFunction(kind(fn), solver, has_aux=True)
    solve = eqx.filter_jit(lambda a: layer.solve(jnp.array(1.0), a).aux)
    aux = solve(jnp.array(3.0))
    np.testing.assert_allclose(aux["twice"], 6.0, rtol=1e-6)
    assert (aux["name"], aux["number"], aux["none"]) == ("pair", 1.5, None)


@pytest.mark.parametrize(
    "solver", [None, optx.Newton(1e-12, 1e-12), eqi.ScipyRoot()], ids=str
)
@pytest.mark.parametrize("jit", [lambda fn: fn, eqx.filter_jit], ids=["eager", "jit"])
def test_auxiliary_output_may_be_a_constant(solver, jit):
    def fn(y, a):
        return y**3 - a, {"count": jnp.array(3), "scale": jnp.float32(0.5), "n": 4}

    find = jit(lambda a: eqi.root_find(fn, 1.0, a, solver=solver, has_aux=True).aux)
    aux = find(8.0)
    assert isinstance(aux["count"], jax.Array)
    assert (aux["count"], aux["count"].dtype) == (3, jnp.int64)
    assert (aux["scale"], aux["scale"].dtype) == (0.5, jnp.float32)
    assert aux["n"] == 4
    assert type(aux["n"]) is int


def test_solver_under_jit_sees_the_values_of_what_is_not_traced():
    def solver(y0, a):
        assert isinstance(a, jax.Array)
        return jnp.array(np.asarray(a) ** (1 / 3))

    layer = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**3 - a), solver)
    run = jax.jit(lambda c: c * layer(np.ones(1), np.array([8.0]))[0])
    np.testing.assert_allclose(run(3.0), 6.0)
    np.testing.assert_allclose(jax.grad(run)(3.0), 2.0)


def test_condition_that_takes_aux_needs_a_solver_that_has_it():
    condition = eqi.Root(lambda y, a, aux: y - a, takes_aux=True)
    with pytest.raises(ValueError, match=r"`has_aux=False` .* pass `has_aux=True`"):
        eqi.ImplicitFunction(condition, lambda y0, a: a)
