"""The rule by itself: the derivative attached to a solution found elsewhere."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import lineax as lx
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, strategies as st
from jax.flatten_util import ravel_pytree
from problems import (
    A,
    assert_close,
    DEFINITE_SOLVERS,
    dot,
    EXACT,
    GENERAL_SOLVERS,
    MINIMUM,
    PROBLEMS,
    ROOT,
    TRANSPOSE,
)

import eqximplicit as eqi

# Second and third derivatives chain two and three solves.
HIGHER = 1e-8
# Central differences at the step 1e-5 that `check_grads` is given.
DIFFERENCES = 1e-6

T_ARGS = (jnp.array([[1.0, -2.0], [0.5, 0.3], [-1.0, 0.2]]), jnp.array([0.8, -1.5]))
CT_Y = jnp.array([1.0, -2.0, 0.5])


def attached(problem, args, linear_solver=None, tags=frozenset()):
    # The closed form has a derivative of its own, which the rule must drop.
    return eqi.implicit_solution(
        problem.condition(problem.fn, tags),
        problem.solution(args),
        args,
        linear_solver=linear_solver,
    )


@functools.cache
def first_order(problem, solver_name):
    """Jitted `(args, t_args, ct_y) -> (value, t_y, ct_args)`."""
    solvers = {**GENERAL_SOLVERS, **DEFINITE_SOLVERS}
    definite = solver_name in DEFINITE_SOLVERS
    tags = lx.positive_semidefinite_tag if definite else frozenset()

    @jax.jit
    def run(args, t_args, ct_y):
        def solution(args):
            return attached(problem, args, solvers[solver_name], tags)

        value, t_y = jax.jvp(solution, (args,), (t_args,))
        return value, t_y, jax.vjp(solution, args)[1](ct_y)[0]

    return run


SOLVER_CASES = [
    *((ROOT, name) for name in GENERAL_SOLVERS),
    *((MINIMUM, name) for name in DEFINITE_SOLVERS),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_jacobian_is_the_closed_form_forwards_and_backwards(problem):
    @jax.jit
    def jacobians(args):
        solution = functools.partial(attached, problem)
        return jax.jacfwd(solution)(args), jax.jacrev(solution)(args)

    forward, reverse = jacobians(problem.args)
    assert_close(forward, problem.jacobian(problem.args))
    assert_close(reverse, problem.jacobian(problem.args))


@pytest.mark.parametrize(("problem", "solver_name"), SOLVER_CASES, ids=str)
def test_every_linear_solver_gives_the_closed_form(problem, solver_name):
    _, t_y, ct_args = first_order(problem, solver_name)(problem.args, T_ARGS, CT_Y)
    by_weight, by_theta = problem.jacobian(problem.args)
    expected = np.tensordot(by_weight, T_ARGS[0]) + by_theta @ T_ARGS[1]
    assert_close(t_y, expected)
    assert_close(
        ct_args, (np.tensordot(CT_Y, by_weight, 1), np.asarray(CT_Y) @ by_theta)
    )


@pytest.mark.parametrize(("problem", "solver_name"), SOLVER_CASES, ids=str)
def test_zero_right_hand_side_gives_zero_and_not_nan(problem, solver_name):
    zero_args, zero_y = jax.tree.map(jnp.zeros_like, (T_ARGS, CT_Y))
    run = first_order(problem, solver_name)
    _, t_y, ct_args = run(problem.args, zero_args, zero_y)
    assert_close((t_y, ct_args), (zero_y, zero_args), tol=0)


@given(
    t_args=st.lists(st.floats(-3, 3), min_size=8, max_size=8),
    ct_y=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_reverse_is_the_transpose_of_forward(t_args, ct_y):
    _, unravel = ravel_pytree(T_ARGS)
    t_args, ct_y = unravel(jnp.array(t_args)), jnp.array(ct_y)
    _, t_y, ct_args = first_order(ROOT, "default")(ROOT.args, t_args, ct_y)
    np.testing.assert_allclose(
        dot(ct_y, t_y), dot(ct_args, t_args), rtol=TRANSPOSE, atol=TRANSPOSE
    )


def orders(fn):
    """The four second derivatives along `T_ARGS` of the function `<CT_Y, fn>`."""

    def forward(f):
        return lambda args: jax.jvp(f, (args,), (T_ARGS,))[1]

    def reverse(f):
        return lambda args: dot(jax.grad(f)(args), T_ARGS)

    def scalar(args):
        return dot(CT_Y, fn(args))

    return {
        "forward over forward": forward(forward(scalar)),
        "forward over reverse": forward(reverse(scalar)),
        "reverse over forward": reverse(forward(scalar)),
        "reverse over reverse": reverse(reverse(scalar)),
    }


def check_second_derivatives(problem, linear_solver=None):
    @jax.jit
    def seconds(args):
        solution = functools.partial(attached, problem, linear_solver=linear_solver)
        return {name: f(args) for name, f in orders(solution).items()}

    truth = orders(problem.solution)["forward over forward"](problem.args)
    got = seconds(problem.args)
    assert_close(got, {name: truth for name in got}, tol=HIGHER)


@pytest.mark.parametrize("problem", [ROOT, MINIMUM], ids=lambda p: p.name)
def test_second_derivatives_agree_in_all_four_orders(problem):
    check_second_derivatives(problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver_name",
    [
        "GMRES",
        "BiCGStab",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in GENERAL_SOLVERS
            if name not in ("default", "GMRES", "BiCGStab")
        ),
    ],
)
def test_second_derivatives_agree_for_other_linear_solvers(solver_name):
    check_second_derivatives(ROOT, GENERAL_SOLVERS[solver_name])


def test_third_derivative_is_the_closed_form():
    def third(solution):
        second = orders(solution)["reverse over reverse"]
        return lambda args: jax.jvp(second, (args,), (T_ARGS,))[1]

    got = jax.jit(third(functools.partial(attached, ROOT)))(ROOT.args)
    expected = jax.jit(third(ROOT.solution))(ROOT.args)
    assert_close(got, expected, tol=HIGHER)


def test_derivatives_agree_with_finite_differences():
    # The closed form moves with the arguments, so differences see the whole map.
    solution = jax.jit(functools.partial(attached, ROOT))
    jax.test_util.check_grads(
        lambda theta: solution((ROOT.args[0], theta)),
        (ROOT.args[1],),
        order=1,
        modes=("fwd", "rev"),
        eps=1e-5,
        atol=DIFFERENCES,
        rtol=DIFFERENCES,
    )


@pytest.mark.parametrize(
    "y",
    [
        jnp.array([0.1, -0.0, 1e300]),
        jnp.array([jnp.nan, jnp.inf, 5e-324]),
        jnp.array([0.1, 0.2, 0.3], jnp.float32),
    ],
    ids=["huge", "nonfinite", "float32"],
)
def test_value_comes_back_bit_for_bit(y):
    # A value that solves nothing passes through all the same.
    condition = eqi.Root(lambda y, theta: y - theta.astype(y.dtype))

    def solution(theta):
        return eqi.implicit_solution(condition, y, theta)

    theta = jnp.ones(3)

    @jax.jit
    def run(theta):
        forward = jax.jvp(solution, (theta,), (theta,))[0]
        return solution(theta), forward, jax.vjp(solution, theta)[0]

    values = [solution(theta), *run(theta)]
    for value in values:
        assert value.dtype == y.dtype
        assert np.asarray(value).tobytes() == np.asarray(y).tobytes()


def test_solution_may_be_found_by_scipy_or_any_other_means():
    root = scipy.optimize.root(lambda y: np.asarray(ROOT.fn(y, ROOT.args)), ROOT.y0)

    def loss(args):
        return dot(CT_Y, eqi.implicit_solution(eqi.Root(ROOT.fn), root.x, args))

    gradient = jax.jit(jax.grad(loss))(ROOT.args)
    expected = jax.grad(lambda args: dot(CT_Y, ROOT.solution(args)))(ROOT.args)
    # SciPy stops at 1.5e-8, its default tolerance.
    assert_close(gradient, expected, tol=1e-7)


def test_root_jvp_and_root_vjp_are_the_two_sides_of_the_theorem():
    @jax.jit
    def run(args, t_args, ct_y):
        y = ROOT.solution(args)
        t_y = eqi.root_jvp(ROOT.fn, y, args, t_args, linear_solver=lx.LU())
        return t_y, eqi.root_vjp(ROOT.fn, y, args, ct_y, linear_solver=lx.LU())

    t_y, ct_args = run(ROOT.args, T_ARGS, CT_Y)
    # The dense solve that the theorem writes.
    y = ROOT.solution(ROOT.args)
    by_y = A * np.cosh(y)
    t_residual = jax.jvp(lambda args: ROOT.fn(y, args), (ROOT.args,), (T_ARGS,))[1]
    assert_close(t_y, -np.linalg.solve(by_y, t_residual))
    adjoint = -np.linalg.solve(by_y.T, CT_Y)
    _, pullback = jax.vjp(lambda args: ROOT.fn(y, args), ROOT.args)
    assert_close(ct_args, pullback(jnp.asarray(adjoint))[0])


def test_root_jvp_and_root_vjp_take_python_numbers():
    cube = lambda y, a: y**3 - a["a"] + 0 * a["power"]
    args = {"a": 8.0, "power": 2}
    assert_close(eqi.root_jvp(cube, 2.0, args, {"a": 3.0, "power": None}), 3 / 12)
    ct_args = eqi.root_vjp(cube, 2.0, args, 1.0)
    assert_close(ct_args["a"], 1 / 12)
    assert ct_args["power"] is None
    single = jnp.array(2.0, jnp.float32)
    assert eqi.root_vjp(lambda y, a: y**3 - a, single, 8.0, 1.0).shape == ()


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        ([CT_Y], r"structure PyTreeDef\(\[\*\]\), .* has PyTreeDef\(\*\)"),
        (CT_Y[:1], r"float64\[1\], opposite float64\[3\]. Pass real numbers of shape"),
        (CT_Y.astype(complex), r"complex128\[3\], opposite float64\[3\]"),
        ("a", "str 'a', opposite"),
    ],
    ids=["structure", "shape", "complex", "text"],
)
def test_tangent_or_cotangent_that_does_not_fit_is_refused(vector, match):
    shifted = lambda y, b: y - b
    with pytest.raises(ValueError, match=f"tangent `t_args` .*{match}"):
        eqi.root_jvp(shifted, CT_Y, CT_Y, vector)
    with pytest.raises(ValueError, match=f"cotangent `ct_y` .*{match}"):
        eqi.root_vjp(shifted, CT_Y, CT_Y, vector)


def test_parameters_in_the_condition_have_a_derivative():
    def loss(matrix):
        condition = eqi.Root(jax.tree_util.Partial(lambda m, y, b: m @ y - b, matrix))
        b = jnp.array([1.0, 2.0])
        y = jnp.linalg.solve(jax.lax.stop_gradient(matrix), b)
        return jnp.sum(eqi.implicit_solution(condition, y, b) ** 3)

    def truth(matrix):
        return jnp.sum(jnp.linalg.solve(matrix, jnp.array([1.0, 2.0])) ** 3)

    matrix = jnp.array([[3.0, 1.0], [-0.5, 2.0]])
    assert_close(jax.jit(jax.grad(loss))(matrix), jax.grad(truth)(matrix))


def cubic(a, b):
    """The root of `y³ + (1 + a²) y = b`, for vectors `a` and `b` of length 2."""

    def residual(y, args):
        a, b = args
        coupling = jnp.array([[0.0, 0.3], [-0.2, 0.0]])
        return y**3 + (1 + a**2) * y + coupling @ y - b

    def step(_, y):
        jacobian = jax.jacfwd(residual)(y, (a, b))
        return y - jnp.linalg.solve(jacobian, residual(y, (a, b)))

    y = jax.lax.fori_loop(0, 30, step, jnp.zeros(2))
    return eqi.implicit_solution(eqi.Root(residual), y, (a, b))


@functools.cache
def cubic_truth():
    """One lane's value and gradient of the sum, by a dense solve; jitted."""

    @jax.jit
    def run(a, b):
        y = cubic(a, b)
        coupling = jnp.array([[0.0, 0.3], [-0.2, 0.0]])
        by_y = jnp.diag(3 * y**2 + 1 + a**2) + coupling
        adjoint = jnp.linalg.solve(by_y.T, jnp.ones(2))
        return y, (-adjoint * 2 * a * y, adjoint)

    return run


def lane_of(args, in_axes, i):
    return [x[i] if axis == 0 else x for x, axis in zip(args, in_axes, strict=True)]


AS = jnp.array([[0.5, -1.0], [1.5, 0.2], [0.0, 0.7]])
BS = jnp.array([[1.0, 2.0], [-0.5, 0.3], [2.0, -1.0]])


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_grad_and_grad_of_vmap_agree_for_every_in_axes(in_axes):
    args = [x if axis == 0 else x[0] for x, axis in zip((AS, BS), in_axes, strict=True)]

    @jax.jit
    def run(a, b):
        def mean(a, b):
            return jnp.mean(jnp.sum(jax.vmap(cubic, in_axes)(a, b), axis=1))

        def one(a, b):
            return jnp.sum(cubic(a, b))

        grad_of_vmap = jax.grad(mean, argnums=(0, 1))(a, b)
        vmap_of_grad = jax.vmap(jax.grad(one, argnums=(0, 1)), in_axes)(a, b)
        return grad_of_vmap, vmap_of_grad

    grad_of_vmap, vmap_of_grad = run(*args)
    lanes = [cubic_truth()(*lane_of(args, in_axes, i))[1] for i in range(3)]
    per_lane = [np.stack(leaf) for leaf in zip(*lanes, strict=True)]
    assert_close(vmap_of_grad, per_lane)
    mean = [
        g / 3 if axis == 0 else g.mean(0)
        for g, axis in zip(per_lane, in_axes, strict=True)
    ]
    assert_close(grad_of_vmap, mean)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0)])
def test_forward_mode_of_vmap_holds_for_constant_arguments(in_axes):
    args = [x if axis == 0 else x[0] for x, axis in zip((AS, BS), in_axes, strict=True)]

    @jax.jit
    def run(a, b):
        t_args = (jnp.ones_like(a), jnp.ones_like(b))
        return jax.jvp(jax.vmap(cubic, in_axes), (a, b), t_args)[1]

    t_y = run(*args)
    for i in range(3):
        by_a, by_b = cubic_truth()(*lane_of(args, in_axes, i))[1]
        np.testing.assert_allclose(t_y[i].sum(), by_a.sum() + by_b.sum(), rtol=EXACT)


def linear(matrix, b):
    y = jnp.linalg.pinv(jax.lax.stop_gradient(matrix)) @ b
    condition = eqi.Root(lambda y, args: args[0] @ y - args[1])
    return eqi.implicit_solution(condition, y, (matrix, b))


MATRICES = jnp.array(
    [[[2.0, 1.0], [0.0, 1.0]], [[3.0, -1.0], [1.0, 2.0]], [[1.0, 0.5], [0.2, 1.0]]]
)


def test_meta_batch_with_a_constant_right_hand_side_under_batched_operators():
    # The batch of tasks shares one meta-parameter `b`; each task has its own matrix.
    b = jnp.array([1.0, -2.0])
    gradient = jax.jit(
        jax.grad(lambda b: jnp.mean(jax.vmap(linear, in_axes=(0, None))(MATRICES, b)))
    )(b)
    expected = np.mean([np.linalg.inv(m).T @ np.full(2, 0.5) for m in MATRICES], 0)
    assert_close(gradient, expected)


def test_singular_lane_is_nan_and_its_neighbours_stay_right():
    matrices = MATRICES.at[1].set(jnp.array([[1.0, 2.0], [2.0, 4.0]]))
    b = jnp.array([1.0, 2.0])

    @jax.jit
    def run(matrices):
        lanes = jax.vmap(lambda m: jnp.sum(linear(m, b)))
        t_y = jax.jvp(lanes, (matrices,), (jnp.ones_like(matrices),))[1]
        return lanes(matrices), t_y, jax.grad(lambda m: jnp.sum(lanes(m)))(matrices)

    value, t_y, gradient = run(matrices)
    assert np.all(np.isfinite(value))
    assert np.isnan(t_y[1])
    assert np.all(np.isnan(gradient[1]))
    for i in (0, 2):
        inverse = np.linalg.inv(matrices[i])
        expected = -np.outer(inverse.T @ np.ones(2), inverse @ b)
        assert_close(gradient[i], expected)
        assert_close(t_y[i], expected.sum())


@pytest.mark.parametrize("solver_name", ["default", "LU", "QR", "GMRES", "Normal(CG)"])
def test_backward_pass_over_a_singular_system_raises_nothing(solver_name):
    def loss(b):
        condition = eqi.Root(lambda y, b: jnp.zeros((2, 2)) @ y - b)
        solver = GENERAL_SOLVERS[solver_name]
        return jnp.sum(
            eqi.implicit_solution(condition, jnp.ones(2), b, linear_solver=solver)
        )

    compiled = jax.jit(jax.value_and_grad(loss))
    b = jnp.array([1.0, 2.0])
    value, gradient = compiled(b)
    assert value == 2
    assert np.all(np.isnan(gradient))
    assert "callback" not in compiled.lower(b).as_text()


def test_iterations_that_run_out_give_nan_and_not_a_rough_gradient():
    one_step = lx.GMRES(rtol=1e-12, atol=1e-12, max_steps=1, restart=1)
    gradient = jax.jit(
        jax.grad(lambda args: jnp.sum(attached(ROOT, args, linear_solver=one_step)))
    )(ROOT.args)
    assert all(np.all(np.isnan(leaf)) for leaf in gradient)


def test_derivative_of_an_untrusted_solution_is_nan_but_zero_where_nobody_asks():
    condition = eqi.Root(lambda y, theta: y - theta)

    @jax.jit
    def pullback(trusted, ct_y):
        def solution(theta):
            return eqi.implicit_solution(condition, theta, theta, trusted=trusted)

        return jax.vjp(solution, jnp.ones(2))[1](ct_y)[0]

    ones = jnp.ones(2)
    assert_close(pullback(jnp.array(True), ones), ones)
    assert np.all(np.isnan(pullback(jnp.array(False), ones)))
    assert_close(pullback(jnp.array(False), jnp.zeros(2)), jnp.zeros(2))


def test_hessian_of_least_squares_is_complete_where_the_residual_does_not_vanish():
    def residuals(y, args):
        return y**2 - args[0], y - args[1]

    a, b = jnp.array(2.0), jnp.array(3.0)
    # Stationarity: 2y(y² - a) + y - b = 0, a cubic with one real root.
    roots = np.roots([2, 0, 1 - 2 * a, -b])
    (y,) = roots[np.abs(roots.imag) < 1e-12].real
    gradient = jax.jit(
        jax.grad(
            lambda args: eqi.implicit_solution(eqi.LeastSquares(residuals), y, args)
        )
    )((a, b))
    curvature = 6 * y**2 - 2 * a + 1
    assert_close(gradient, (2 * y / curvature, 1 / curvature))


def test_preconditioner_reaches_the_linear_solver_in_both_modes():
    diagonal = jnp.array([1.0, 10.0, 100.0, 1000.0])
    condition = eqi.Root(
        lambda y, b: diagonal * y - b,
        tags=frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag}),
    )
    # Four distinct eigenvalues need four steps of CG; the exact inverse needs one.
    solver = lx.CG(rtol=1e-12, atol=1e-12, max_steps=2)
    inverse = lx.TaggedLinearOperator(
        lx.DiagonalLinearOperator(1 / diagonal), lx.positive_semidefinite_tag
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(preconditioned):
        options = {"preconditioner": inverse} if preconditioned else None

        def solution(b):
            return eqi.implicit_solution(
                condition, b / diagonal, b, linear_solver=solver, options=options
            )

        b = jnp.ones(4)
        return jax.jvp(solution, (b,), (b,))[1], jax.vjp(solution, b)[1](b)[0]

    assert_close(run(True), (1 / diagonal, 1 / diagonal))
    assert all(np.all(np.isnan(x)) for x in run(False))


@jax.custom_vjp
def reverse_square(y):
    return y**2


reverse_square.defvjp(lambda y: (y**2, y), lambda y, ct: (2 * y * ct,))
NO_FORWARD = "contains a `jax.custom_vjp` .* no forward derivative.*`jax.custom_jvp`"


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_condition_without_a_forward_derivative_is_told_so(transform, mode):
    root = eqi.Root(lambda y, a: reverse_square(y) - a)
    attach = lambda a: eqi.implicit_solution(root, jax.lax.stop_gradient(a), a)
    with pytest.raises(TypeError, match=NO_FORWARD):
        transform(mode(attach))(1.0)


def test_solver_that_needs_a_forward_derivative_is_told_that_there_is_none():
    with pytest.raises(TypeError, match=NO_FORWARD):
        eqi.root_find(lambda y, a: reverse_square(y) - a, jnp.ones(5), 4.0)


def test_minimum_needs_no_forward_derivative_of_its_objective():
    lowest = eqi.Minimum(lambda y, a: reverse_square(y - a))
    attach = lambda a: eqi.implicit_solution(lowest, jax.lax.stop_gradient(a), a)
    assert_close(jax.jit(jax.grad(attach))(4.0), 1.0)
