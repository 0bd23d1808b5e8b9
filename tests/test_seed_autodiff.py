"""Reference system: the advanced uses of automatic differentiation, over solutions.

Each test takes one section of the JAX tutorial "Advanced automatic differentiation",
puts a solution of an equation where the tutorial has a formula, and asks for the
tutorial's numbers or for a closed form.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

NEWTON = optx.Newton(rtol=1e-13, atol=1e-13)
EXACT = 1e-10  # what is left of Newton's tolerance after four derivatives


def cubic(x):
    return x**3 + 2 * x**2 - 3 * x + 1


def nested_grads(fn, order):
    grads = [fn]
    for _ in range(order):
        grads.append(jax.grad(grads[-1]))
    return grads


def all_grads(fn, order):
    """One compilation: the value and the derivatives up to `order`."""
    return jax.jit(lambda x: [g(x) for g in nested_grads(fn, order)])


# --- Higher-order derivatives


def test_solution_of_an_explicit_equation_has_the_derivatives_of_the_formula():
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, x: y - cubic(x)), NEWTON, y0=0.0)
    got = all_grads(lambda x: layer(None, x), 4)(1.0)
    np.testing.assert_allclose(got, [1, 4, 10, 6, 0], rtol=0, atol=EXACT)


def inverse_cubic():
    """The upper branch of the inverse function: `cubic(y) = x`."""
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, x: cubic(y) - x), NEWTON, y0=2.0)
    return lambda x: layer(None, x)


def inverse_derivatives(y):
    """Derivatives of an inverse function, from those of the function at `y`."""
    f1, f2, f3 = 3 * y**2 + 4 * y - 3, 6 * y + 4, 6.0
    third = (3 * f2**2 - f1 * f3) / f1**5
    fourth = (10 * f1 * f2 * f3 - 15 * f2**3) / f1**7
    return [1 / f1, -f2 / f1**3, third, fourth]


@pytest.mark.parametrize("y", [1.0, 1.7])
def test_derivatives_of_an_inverse_function_to_fourth_order(y):
    got = all_grads(inverse_cubic(), 4)(cubic(y))
    np.testing.assert_allclose(got, [y, *inverse_derivatives(y)], rtol=EXACT)


def test_function_after_its_inverse_is_the_identity_to_third_order():
    inverse = inverse_cubic()
    got = all_grads(lambda x: cubic(inverse(x)), 3)(1.5)
    np.testing.assert_allclose(got, [1.5, 1, 0, 0], rtol=0, atol=EXACT)


MODES = {
    "forward over reverse": lambda fn: jax.jacfwd(jax.grad(fn)),
    "reverse over forward": lambda fn: jax.jacrev(jax.jacfwd(fn)),
    "reverse over reverse": lambda fn: jax.jacrev(jax.grad(fn)),
    "forward over forward": lambda fn: jax.jacfwd(jax.jacfwd(fn)),
}


@pytest.mark.parametrize("mode", MODES)
def test_hessian_of_the_dot_product_of_a_minimum(mode):
    def quadratic(y, x):
        return jnp.dot(y, y) / 2 - jnp.dot(x, y)  # smallest at y = x

    layer = eqi.ImplicitFunction(eqi.Minimum(quadratic), optx.BFGS(1e-12, 1e-12))

    def f(x):
        y = layer(jnp.zeros(3), x)
        return jnp.dot(y, y)

    hessian = jax.jit(MODES[mode](f))(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(hessian, 2 * np.eye(3), rtol=0, atol=EXACT)


# --- Hessian-vector products


def ring(z, x):
    """A nonlinear ring: every entry answers to its two neighbours, unequally."""
    return jnp.tanh(0.5 * jnp.roll(z, 1) - 0.3 * jnp.roll(z, -1) + x)


def ring_energy(x):
    picard = optx.FixedPointIteration(rtol=1e-13, atol=1e-13)
    z = eqi.fixed_point(ring, jnp.zeros_like(x), x, solver=picard).value
    return jnp.sum(z**2) / 2


def unrolled_ring_energy(x):
    z = jax.lax.scan(lambda z, _: (ring(z, x), None), jnp.zeros_like(x), length=200)[0]
    return jnp.sum(z**2) / 2


def hvp(fn, x, v):
    return jax.jvp(jax.grad(fn), (x,), (v,))[1]


def test_hessian_vector_product_is_a_column_of_the_hessian():
    rng = np.random.default_rng(0)
    x, v = jnp.asarray(rng.normal(size=(2, 6)))
    want = jax.jit(jax.hessian(unrolled_ring_energy))(x) @ v
    got = jax.jit(functools.partial(hvp, ring_energy))(x, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_hessian_vector_product_builds_no_matrix():
    n = 2500
    rng = np.random.default_rng(0)
    x, u, v = jnp.asarray(rng.normal(size=(3, n)))
    product = functools.partial(hvp, ring_energy)
    assert f"{n},{n}" not in str(jax.make_jaxpr(product)(x, v))
    hu, hv = jax.jit(jax.vmap(product, in_axes=(None, 0)))(x, jnp.stack([u, v]))
    np.testing.assert_allclose(u @ hv, v @ hu, rtol=1e-8)  # symmetric, as a Hessian is


# --- Higher-order optimisation: a step of SGD, and a solve, inside the loss

LR, STRENGTH = 0.1, 2.0


def predict(params, x):
    return x @ params["w"] + params["b"]


def mse(params, data):
    x, y = data
    return jnp.mean((predict(params, x) - y) ** 2)


def proximal(params, args):
    meta, data = args
    pairs = zip(jtu.tree_leaves(params), jtu.tree_leaves(meta), strict=True)
    return mse(params, data) + STRENGTH / 2 * sum(
        jnp.sum((p - m) ** 2) for p, m in pairs
    )


def adapted(meta, data):
    layer = eqi.ImplicitFunction(
        eqi.Minimum(proximal, tags=lx.positive_semidefinite_tag),
        optx.BFGS(rtol=1e-12, atol=1e-12),
        throw=False,
    )
    return layer(meta, (meta, data))


def tasks():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(4, 12, 3)), rng.normal(size=(4, 12))
    meta = {"w": jnp.asarray(rng.normal(size=3)), "b": jnp.array(0.3)}
    return meta, (jnp.asarray(x), jnp.asarray(y))


def design(x):
    return np.hstack([np.asarray(x), np.ones((len(x), 1))])


def as_vector(params):
    return np.append(params["w"], params["b"])


def test_gradient_through_a_step_of_sgd_on_a_solution():
    meta, (x, y) = tasks()
    data = (x[0], y[0])

    def meta_loss(meta):
        params = adapted(meta, data)
        grads = jax.grad(mse)(params, data)
        params = jtu.tree_map(lambda p, g: p - LR * g, params, grads)
        return mse(params, data)

    a, target = design(x[0]), np.asarray(y[0])
    hessian, gradient = 2 * a.T @ a / 12, lambda p: 2 * a.T @ (a @ p - target) / 12
    solved = np.linalg.inv(hessian + STRENGTH * np.eye(4))
    phi = solved @ (2 * a.T @ target / 12 + STRENGTH * as_vector(meta))
    stepped = np.eye(4) - LR * hessian
    want = STRENGTH * solved @ stepped @ gradient(phi - LR * gradient(phi))
    got = as_vector(jax.jit(jax.grad(meta_loss))(meta))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_meta_gradient_of_a_batch_of_tasks():
    """The mean over a `vmap` in which the parameters are shared by all lanes."""
    meta, batch = tasks()

    def meta_loss(meta):
        losses = jax.vmap(lambda data: mse(adapted(meta, data), data))(batch)
        return jnp.mean(losses)

    want = []
    for x, y in zip(*batch, strict=True):
        a, target = design(x), np.asarray(y)
        hessian, pull = 2 * a.T @ a / 12, 2 * a.T @ target / 12
        solved = np.linalg.inv(hessian + STRENGTH * np.eye(4))
        phi = solved @ (pull + STRENGTH * as_vector(meta))
        want.append(STRENGTH * solved @ (hessian @ phi - pull))
    got = as_vector(jax.jit(jax.grad(meta_loss))(meta))
    np.testing.assert_allclose(got, np.mean(want, 0), rtol=0, atol=1e-9)


# --- Stopping gradients: TD(0)

THETA = jnp.array([0.1, -0.1, 0.0])
S_TM1, R_T, S_T = (
    jnp.array([1.0, 2.0, -1.0]),
    jnp.array(1.0),
    jnp.array([2.0, 1.0, 0.0]),
)
VALUE = eqi.ImplicitFunction(
    eqi.Root(lambda v, args: 2 * v - jnp.dot(*args) * 2), NEWTON, y0=0.0
)


def value_fn(theta, state):
    return VALUE(None, (theta, state))


def td_loss(theta, s_tm1, r_t, s_t, stop=jax.lax.stop_gradient):
    target = r_t + value_fn(theta, s_t)
    return (stop(target) - value_fn(theta, s_tm1)) ** 2


@pytest.mark.parametrize(
    ("stop", "printed"),
    [(lambda x: x, [2.4, -2.4, 2.4]), (jax.lax.stop_gradient, [-2.4, -4.8, 2.4])],
)
def test_stopped_target_that_is_a_solution(stop, printed):
    got = jax.jit(jax.grad(lambda t: td_loss(t, S_TM1, R_T, S_T, stop)))(THETA)
    np.testing.assert_allclose(got, printed, rtol=0, atol=1e-12)


class Feedback(eqx.Module):
    """A value with feedback on itself: `v = tanh(gain v + theta . s)`."""

    theta: jax.Array
    gain: jax.Array

    def __call__(self, v, s):
        return jnp.tanh(self.gain * v + jnp.dot(self.theta, s))


def test_stop_gradient_on_one_of_the_parameters_of_a_condition():
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(Feedback(THETA, jnp.array(0.5))), NEWTON, y0=0.0
    )

    def loss(params):
        frozen = eqx.tree_at(lambda p: p.gain, params, replace_fn=jax.lax.stop_gradient)
        target = R_T + layer.with_params(frozen)(None, S_T)
        return (target - layer.with_params(params)(None, S_TM1)) ** 2

    value, got = jax.jit(jax.value_and_grad(loss))(layer.params)

    def solved(s):
        v = 0.0
        for _ in range(200):
            v = np.tanh(0.5 * v + THETA @ s)
        slope = 1 - v**2
        return v, slope / (1 - 0.5 * slope)  # dv / d(theta . s); dv / dgain is v times

    (v_t, d_t), (v_tm1, d_tm1) = solved(S_T), solved(S_TM1)
    error = 1 + v_t - v_tm1
    np.testing.assert_allclose(value, error**2, rtol=1e-12)
    want = 2 * error * (d_t * S_T - d_tm1 * S_TM1)
    np.testing.assert_allclose(got.theta, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.gain, -2 * error * v_tm1 * d_tm1, rtol=1e-12)


STATES = jnp.asarray(np.random.default_rng(1).normal(size=(9, 2)))


def td_error_loss(theta, theta_target, discount):
    """Mean squared temporal difference along a path of states with reward 1."""
    target = 1 + discount * STATES[1:] @ theta_target
    return jnp.mean((target - STATES[:-1] @ theta) ** 2) / 2


def semi_gradient(theta, discount):
    # The target's parameters are an argument of their own: `stop_gradient` would also
    # hide them from the Jacobian of this residual.
    return jax.grad(td_error_loss)(theta, theta, discount)


def test_derivative_of_a_td_fixed_point():
    """The solution of the semi-gradient equation, by least-squares TD."""

    def solution(discount):
        return eqi.root_find(semi_gradient, jnp.zeros(2), discount, solver=NEWTON).value

    now, after = np.asarray(STATES[:-1]), np.asarray(STATES[1:])
    matrix, cross = now.T @ (now - 0.9 * after), now.T @ after
    theta = np.linalg.solve(matrix, now.sum(0))
    got, slope = jax.jit(lambda g: (solution(g), jax.jacfwd(solution)(g)))(0.9)
    np.testing.assert_allclose(got, theta, rtol=0, atol=1e-10)
    want = np.linalg.solve(matrix, cross @ theta)
    np.testing.assert_allclose(slope, want, rtol=0, atol=1e-10)


# --- Straight-through estimator


def straight_through(fn, x):
    zero = x - jax.lax.stop_gradient(x)  # exactly zero, with a derivative of one
    return zero + jax.lax.stop_gradient(fn(x))


def cube_root(a):
    return eqi.root_find(lambda y, a: y**3 - a, 3.0, a, solver=NEWTON).value


def test_straight_through_after_a_solve():
    a = 3.2**3
    plain = jax.jit(jax.value_and_grad(lambda a: jnp.round(cube_root(a))))(a)
    through = jax.jit(
        jax.value_and_grad(lambda a: straight_through(jnp.round, cube_root(a)))
    )(a)
    assert plain == (3.0, 0.0)
    assert through[0] == 3.0
    np.testing.assert_allclose(through[1], 1 / (3 * 3.2**2), rtol=1e-10)


def test_straight_through_around_a_solve():
    """The solve itself counts as the identity: the tutorial's 0 becomes its 1."""
    nearest = eqi.ImplicitFunction(
        eqi.Root(lambda y, x: y - jnp.round(x)), NEWTON, y0=0.0
    )
    solve = lambda x: nearest(None, x)
    assert jax.jit(jax.value_and_grad(solve))(3.2) == (3.0, 0.0)
    through = jax.jit(jax.value_and_grad(lambda x: straight_through(solve, x)))(3.2)
    assert through == (3.0, 1.0)


# --- Per-example gradients


def test_per_example_gradients():
    batch = [jnp.stack([leaf, leaf]) for leaf in (S_TM1, R_T, S_T)]
    eager = jax.vmap(jax.grad(td_loss), in_axes=(None, 0, 0, 0))
    printed = [[-2.4, -4.8, 2.4]] * 2
    for perex_grads in (eager, jax.jit(eager)):
        got = perex_grads(THETA, *batch)
        np.testing.assert_allclose(got, printed, rtol=0, atol=1e-12)


def test_gradient_of_the_mean_is_the_mean_of_the_per_example_gradients():
    rng = np.random.default_rng(5)
    batch = (*jnp.asarray(rng.normal(size=(2, 7, 3))), jnp.asarray(rng.normal(size=7)))
    losses = jax.vmap(lambda t, s, s_next, r: td_loss(t, s, r, s_next), (None, 0, 0, 0))
    grads = jax.vmap(jax.grad(lambda t, s, n, r: td_loss(t, s, r, n)), (None, 0, 0, 0))
    of_mean = jax.jit(jax.grad(lambda t: jnp.mean(losses(t, *batch))))(THETA)
    mean_of = jax.jit(lambda t: jnp.mean(grads(t, *batch), 0))(THETA)
    np.testing.assert_allclose(of_mean, mean_of, rtol=0, atol=1e-12)


# --- A solve in every step of a scan


def test_solve_in_every_step_of_a_scan():
    """Implicit Euler for `dy/dt = -k y`: `y_n = (1 + h k)^-n`."""
    steps, h = 10, 0.1

    def final(k):
        def step(y, _):
            residual = lambda new, k: new - y + h * k * new
            return eqi.root_find(residual, y, k, solver=NEWTON).value, None

        return jax.lax.scan(step, jnp.array(1.0), length=steps)[0]

    value, slope, curvature = all_grads(final, 2)(2.0)
    base = 1 + h * 2
    np.testing.assert_allclose(value, base**-steps, rtol=1e-12)
    np.testing.assert_allclose(slope, -steps * h * base ** (-steps - 1), rtol=1e-10)
    want = steps * (steps + 1) * h**2 * base ** (-steps - 2)
    np.testing.assert_allclose(curvature, want, rtol=1e-10)
