"""Adjoints: implicit and unrolled, here and inside optimistix's own functions."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from problems import (
    assert_close,
    FIXED_POINT,
    LEAST_SQUARES,
    MINIMUM,
    PROBLEMS,
    ROOT,
)

import eqximplicit as eqi

TOLERANCES = {"rtol": 1e-11, "atol": 1e-11}
# The first-order solvers of optimistix stop at `TOLERANCES` in step, not in error.
OPTIMISTIX = 1e-7

FINDERS = {
    "root": (optx.root_find, optx.Newton(**TOLERANCES)),
    "fixed point": (optx.fixed_point, optx.FixedPointIteration(**TOLERANCES)),
    "minimum": (optx.minimise, optx.BFGS(**TOLERANCES)),
    "least squares": (optx.least_squares, optx.LevenbergMarquardt(**TOLERANCES)),
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_implicit_adjoint_works_inside_optimistix(problem):
    find, solver = FINDERS[problem.name]
    adjoint = eqi.ImplicitAdjoint(linear_solver=lx.LU())

    @jax.jit
    def run(args):
        def solution(args):
            y0 = jnp.array(problem.y0)
            return find(problem.fn, solver, y0, args, adjoint=adjoint).value

        return solution(args), jax.jacfwd(solution)(args), jax.jacrev(solution)(args)

    value, forward, reverse = run(problem.args)
    assert_close(value, problem.solution(problem.args), tol=OPTIMISTIX)
    assert_close(forward, problem.jacobian(problem.args), tol=OPTIMISTIX)
    assert_close(reverse, problem.jacobian(problem.args), tol=OPTIMISTIX)


def test_implicit_adjoint_inside_optimistix_returns_aux_and_statistics():
    def fn(y, args):
        return ROOT.fn(y, args), {"count": 3, "y": y}

    solution = optx.root_find(
        fn,
        optx.Newton(**TOLERANCES),
        jnp.array(ROOT.y0),
        ROOT.args,
        has_aux=True,
        adjoint=eqi.ImplicitAdjoint(),
    )
    assert solution.aux["count"] == 3
    assert solution.stats["num_steps"] > 1
    assert solution.result == optx.RESULTS.successful


def test_meta_batch_that_raises_with_the_adjoint_of_optimistix():
    matrices = jnp.array([[[2.0, 1.0], [0.0, 1.0]], [[3.0, -1.0], [1.0, 2.0]]])

    def fn(y, args):
        b, matrix = args
        return matrix @ y - b

    def mean(adjoint, b):
        def solution(b, matrix):
            solver = optx.Newton(rtol=1e-8, atol=1e-8)
            args = (b, matrix)
            return optx.root_find(
                fn, solver, jnp.zeros(2), args, adjoint=adjoint, throw=False
            ).value

        return jnp.mean(jax.vmap(solution, in_axes=(None, 0))(b, matrices))

    b = jnp.array([1.0, -2.0])
    gradient = jax.jit(jax.grad(functools.partial(mean, eqi.ImplicitAdjoint())))(b)
    expected = np.mean([np.linalg.inv(m).T @ np.full(2, 0.5) for m in matrices], 0)
    assert_close(gradient, expected)


def test_a_failed_lane_of_optimistix_has_no_derivative():
    def solution(y0, a):
        fn, solver = lambda y, a: y**3 + y - a, optx.Newton(rtol=1e-10, atol=1e-10)
        adjoint, kwargs = eqi.ImplicitAdjoint(), {"max_steps": 8, "throw": False}
        return optx.root_find(fn, solver, y0, a, adjoint=adjoint, **kwargs).value

    slopes = jax.jit(jax.vmap(jax.grad(solution, argnums=1), in_axes=(0, None)))
    good, bad = slopes(jnp.array([1.0, 50.0]), 2.0)
    np.testing.assert_allclose(good, 1 / 4, rtol=1e-9)
    assert np.isnan(bad)


# --- unrolled -----------------------------------------------------------------------

STEPS = 3


def descend(y0, b, steps):
    """`steps` of `y ← (cos y + b) / 2`: not converged, on purpose."""
    y = y0
    for _ in range(steps):
        y = (jnp.cos(y) + b) / 2
    return y


class FewSteps(optx.AbstractFixedPointSolver):
    """Plain iteration that stops after a fixed number of steps."""

    steps: int
    inner: optx.FixedPointIteration
    rtol: float = 0.0
    atol: float = 0.0
    norm: object = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        inner = self.inner.init(fn, y, args, options, f_struct, aux_struct, tags)
        return inner, jnp.array(0)

    def step(self, fn, y, args, options, state, tags):
        y, inner, aux = self.inner.step(fn, y, args, options, state[0], tags)
        return y, (inner, state[1] + 1), aux

    def terminate(self, fn, y, args, options, state, tags):
        return state[1] >= self.steps, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def few_steps_layer(adjoint, **kwargs):
    solver = FewSteps(STEPS, optx.FixedPointIteration(rtol=0.0, atol=0.0))
    condition = eqi.FixedPoint(lambda y, b: (jnp.cos(y) + b) / 2)
    return eqi.ImplicitFunction(condition, solver, adjoint, max_steps=8, **kwargs)


def test_unrolled_adjoint_is_the_derivative_of_the_steps_taken():
    layer = few_steps_layer(eqi.UnrolledAdjoint())

    @jax.jit
    def run(y0, b):
        return jax.value_and_grad(lambda y0, b: layer(y0, b), argnums=(0, 1))(y0, b)

    y0, b = jnp.array(0.3), jnp.array(0.4)
    value, gradient = run(y0, b)
    assert_close(value, descend(y0, b, STEPS))
    expected = jax.grad(lambda y0, b: descend(y0, b, STEPS), argnums=(0, 1))(y0, b)
    assert_close(gradient, expected)
    assert expected[0] != 0  # the guess does have a derivative here


def test_unrolled_adjoint_in_forward_mode():
    layer = few_steps_layer(eqi.UnrolledAdjoint(mode="forward"))
    y0, b = jnp.array(0.3), jnp.array(0.4)
    forward = jax.jit(jax.jacfwd(layer, argnums=(0, 1)))(y0, b)
    expected = jax.grad(lambda y0, b: descend(y0, b, STEPS), argnums=(0, 1))(y0, b)
    assert_close(forward, expected)


def test_implicit_adjoint_differs_from_the_unrolled_one_before_convergence():
    layer = few_steps_layer(eqi.ImplicitAdjoint())
    y0, b = jnp.array(0.3), jnp.array(0.4)
    by_y0, by_b = jax.jit(jax.grad(lambda y0, b: layer(y0, b), argnums=(0, 1)))(y0, b)
    y = descend(y0, b, STEPS)
    assert by_y0 == 0
    assert_close(by_b, 0.5 / (1 + jnp.sin(y) / 2))


def test_unrolled_and_implicit_agree_at_convergence():
    problem, solver = FIXED_POINT, optx.FixedPointIteration(**TOLERANCES)

    @jax.jit
    def gradients(args):
        def loss(args, adjoint):
            condition = eqi.FixedPoint(problem.fn)
            layer = eqi.ImplicitFunction(condition, solver, adjoint, max_steps=99)
            return jnp.sum(layer(jnp.array(problem.y0), args) ** 2)

        unrolled = jax.grad(loss)(args, eqi.UnrolledAdjoint(checkpoints=4))
        return unrolled, jax.grad(loss)(args, eqi.ImplicitAdjoint())

    unrolled, implicit = gradients(problem.args)
    assert_close(unrolled, implicit, tol=OPTIMISTIX)


def _shifted(condition):
    """A condition with the solution `sin(b)`, which is asymmetric and nonlinear in y.

    The last is the residual of the others; a minimum has its own.
    """
    if condition is eqi.Minimum:
        return eqi.Minimum(lambda y, b: jnp.sum(jnp.cosh(y - jnp.sin(b))))

    def residual(y, b):
        d = y - jnp.sin(b)
        return jnp.stack([jnp.sinh(d[0]) + d[1] / 2, jnp.sinh(d[1]) - d[0] / 4])

    if condition is eqi.FixedPoint:
        return eqi.FixedPoint(lambda y, b: y - residual(y, b) / 2)
    return condition(residual)


# FIRE's velocity carries the derivative on for some steps after the state has arrived.
BOTH_WAYS = {
    "AutoRootFinder": (eqi.Root, eqi.AutoRootFinder(atol=1e-12), 64),
    "AutoFixedPoint": (eqi.FixedPoint, eqi.AutoFixedPoint(**TOLERANCES), 64),
    "Anderson": (eqi.FixedPoint, eqi.Anderson(**TOLERANCES), 64),
    "Broyden, good": (eqi.FixedPoint, eqi.Broyden(**TOLERANCES), 64),
    "Broyden, bad": (eqi.FixedPoint, eqi.Broyden(**TOLERANCES, update="bad"), 64),
    "FIRE": (eqi.Minimum, eqi.FIRE(rtol=0.0, atol=1e-10), 256),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("Auto") else pytest.mark.slow)
        for name in BOTH_WAYS
    ],
)
def test_both_adjoints_agree_with_the_closed_form_for_every_solver(name):
    condition, solver, max_steps = BOTH_WAYS[name]
    weights = jnp.array([1.0, -2.0])

    def loss(b, adjoint):
        layer = eqi.ImplicitFunction(
            _shifted(condition), solver, adjoint, max_steps=max_steps
        )
        return weights @ layer(jnp.zeros(2), b)

    @jax.jit
    def gradients(b):
        adjoints = eqi.ImplicitAdjoint(), eqi.UnrolledAdjoint()
        return [jax.grad(loss)(b, adjoint) for adjoint in adjoints]

    b = jnp.array([0.7, -0.2])
    implicit, unrolled = gradients(b)
    exact = weights * jnp.cos(b)
    assert_close(implicit, exact, tol=1e-9)
    # The derivative of the iterates lags behind the iterates.
    assert_close(unrolled, exact, tol=1e-6)


def test_unrolled_adjoint_of_a_traceable_callable_solver():
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda y, b: (jnp.cos(y) + b) / 2),
        lambda y0, b: descend(y0, b, STEPS),
        eqi.UnrolledAdjoint(),
    )
    y0, b = jnp.array(0.3), jnp.array(0.4)
    gradient = jax.jit(jax.grad(lambda b: layer(y0, b)))(b)
    assert_close(gradient, jax.grad(lambda b: descend(y0, b, STEPS))(b))


def test_unrolled_adjoint_works_inside_optimistix():
    def solution(b):
        return optx.fixed_point(
            lambda y, b: (jnp.cos(y) + b) / 2,
            optx.FixedPointIteration(rtol=1e-10, atol=1e-10),
            jnp.array(0.3),
            b,
            adjoint=eqi.UnrolledAdjoint(),
            max_steps=64,
        ).value

    b = jnp.array(0.4)
    gradient = jax.jit(jax.grad(solution))(b)
    # The derivative of the steps converges as the steps do.
    assert_close(gradient, 0.5 / (1 + jnp.sin(solution(b)) / 2), tol=OPTIMISTIX)


def test_temporary_memory_of_the_gradient_does_not_grow_with_the_steps():
    def memory(max_steps):
        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(lambda y, b: (jnp.cos(y) + b) / 2),
            optx.FixedPointIteration(rtol=1e-14, atol=1e-14),
            max_steps=max_steps,
            throw=False,
        )
        gradient = jax.jit(jax.grad(lambda b: jnp.sum(layer(jnp.zeros(50), b))))
        compiled = gradient.lower(jnp.ones(50)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(10) == memory(200)


def test_minimum_and_least_squares_tags_reach_the_linear_solver():
    # CG refuses an operator that nobody said is definite.
    conditions = {
        MINIMUM: eqi.Minimum(MINIMUM.fn, tags=lx.positive_semidefinite_tag),
        LEAST_SQUARES: eqi.LeastSquares(
            LEAST_SQUARES.fn, tags=lx.positive_semidefinite_tag
        ),
    }

    @jax.jit
    def run():
        return [
            jax.grad(
                lambda args, p=problem, c=condition: jnp.sum(
                    eqi.implicit_solution(
                        c,
                        p.solution(args),
                        args,
                        linear_solver=lx.CG(rtol=1e-12, atol=1e-12),
                    )
                )
            )(problem.args)
            for problem, condition in conditions.items()
        ]

    expected = [[leaf.sum(0) for leaf in p.jacobian(p.args)] for p in conditions]
    assert_close(run(), expected)


BY_NEWTON = eqi.Root(lambda y, a: y**3 - a), optx.Newton(1e-10, 1e-10)
BY_STEPS = (
    eqi.FixedPoint(lambda y, a: y - (y**3 - a) / 20),
    optx.FixedPointIteration(1e-10, 1e-10),
)
# A loop of each kind: closed form, one kernel, many kernels, a solver with an opening.
LOOPS = {
    "closed form": (*BY_NEWTON, eqi.AutoLinearSolver(), ()),
    "Newton": (*BY_NEWTON, eqi.AutoLinearSolver(), (5,)),
    "fixed point": (*BY_STEPS, eqi.AutoLinearSolver(), (5,)),
    "many entries": (*BY_STEPS, eqi.Neumann(), (5_000,)),
    "default": (BY_NEWTON[0], None, eqi.AutoLinearSolver(), (5,)),
}


@pytest.mark.parametrize(
    "name",
    [
        *("closed form", "default", "many entries"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("Newton", "fixed point")
        ),
    ],
)
def test_second_and_third_derivatives_through_every_kind_of_loop(name):
    condition, solver, linear_solver, shape = LOOPS[name]
    adjoint = eqi.ImplicitAdjoint(linear_solver)
    layer = eqi.ImplicitFunction(condition, solver, adjoint, throw=False)
    fn = lambda a: jnp.mean(layer(jnp.full(shape, 1.5), a))
    a, modes = jnp.array(8.0), (jax.jacfwd, jax.jacrev)
    second = [jax.jit(one(two(fn)))(a) for one in modes for two in modes]
    np.testing.assert_allclose(second, -2 / 9 * 8 ** (-5 / 3), rtol=1e-8)
    third = jax.jit(jax.jacfwd(jax.jacrev(jax.jacrev(fn))))(a)
    np.testing.assert_allclose(third, 10 / 27 * 8 ** (-8 / 3), rtol=1e-8)


@pytest.mark.parametrize("size", [4, 9])
def test_second_derivatives_whose_systems_have_only_rounding_to_solve_for(size):
    # A map that does not move with y at its fixed point, as a step of Newton's method.
    heron = eqi.FixedPoint(lambda y, a: (2 * y + a / y**2) / 3)
    layer = eqi.ImplicitFunction(heron, BY_STEPS[1], throw=False)
    fn = lambda a: jnp.mean(layer(jnp.full(size, 1.5), a))
    second = jax.jit(jax.jacfwd(jax.jacrev(fn)))(jnp.array(8.0))
    np.testing.assert_allclose(second, -2 / 9 * 8 ** (-5 / 3), rtol=1e-8)
