"""Reference systems: the fixed points of tanh(W z + x), and a two-layer DEQ.

The references hold inputs, a float64 truth from dense algebra, and what the published
notebooks printed in float32.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit.nn import DEQ, FixedBudget, spectral_radius
from eqximplicit.solvers import AutoFixedPoint


def load(name):
    path = Path(__file__).parent / "references" / f"{name}.json"
    return json.loads(path.read_text())


TANH = load("seed001")
W, X = (jnp.asarray(TANH["inputs"][name]) for name in ("W", "x"))
Z0 = jnp.zeros(10)
Z_STAR = np.asarray(TANH["computed"]["z_star"])
DZ_DX = np.asarray(TANH["computed"]["dz_dx"])

EXACT = 1e-9  # the reference agrees with finite differences to 1.3e-10


def func(z, params):
    w, x = params
    return jnp.tanh(w @ z + x)


def sum_of_squares(layer):
    return lambda w, x: jnp.sum(layer(Z0, (w, x)) ** 2)


SOLVERS = {
    "picard": optx.FixedPointIteration(rtol=1e-12, atol=1e-12),
    "newton": optx.Newton(rtol=1e-12, atol=1e-12),
    "anderson and more": AutoFixedPoint(rtol=1e-12, atol=1e-12),
}
LINEAR_SOLVERS = {
    "LU": lx.LU(),
    "GMRES": lx.GMRES(rtol=1e-13, atol=1e-13),
    "normal CG": lx.Normal(lx.CG(rtol=1e-13, atol=1e-13)),
    "default": None,
}


def adjoint(linear_solver):
    if linear_solver is None:
        return eqi.ImplicitAdjoint()
    return eqi.ImplicitAdjoint(linear_solver)


# --- z = tanh(W z + x)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_finds_the_fixed_point_and_its_derivative(solver):
    layer = eqi.ImplicitFunction(eqi.FixedPoint(func), solver)
    z = layer(Z0, (W, X))
    np.testing.assert_allclose(z, Z_STAR, rtol=0, atol=1e-11)
    dz_dx = jax.jit(jax.jacrev(lambda x: layer(Z0, (W, x))))(X)
    np.testing.assert_allclose(dz_dx, DZ_DX, rtol=0, atol=EXACT)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("linear_solver", LINEAR_SOLVERS.values(), ids=LINEAR_SOLVERS)
def test_every_linear_solver_gives_the_derivative(linear_solver, jacobian):
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(func), SOLVERS["newton"], adjoint(linear_solver)
    )
    dz_dx = jax.jit(jacobian(lambda x: layer(Z0, (W, x))))(X)
    np.testing.assert_allclose(dz_dx, DZ_DX, rtol=0, atol=EXACT)


def test_root_form_has_the_same_derivative():
    layer = eqi.ImplicitFunction(
        eqi.Root(lambda z, params: z - func(z, params)), SOLVERS["newton"]
    )
    dz_dx = jax.jit(jax.jacrev(lambda x: layer(Z0, (W, x))))(X)
    np.testing.assert_allclose(dz_dx, DZ_DX, rtol=0, atol=EXACT)


def test_gradients_and_hessian_of_the_sum_of_squares():
    layer = eqi.ImplicitFunction(eqi.FixedPoint(func), SOLVERS["newton"])
    objective = sum_of_squares(layer)
    grad_w, grad_x = jax.jit(jax.grad(objective, argnums=(0, 1)))(W, X)
    hessian = jax.jit(jax.hessian(objective, argnums=1))(W, X)
    computed = TANH["computed"]
    np.testing.assert_allclose(grad_x, computed["sum_sq_grad_x"], atol=EXACT)
    np.testing.assert_allclose(grad_w, computed["sum_sq_grad_W"], atol=EXACT)
    np.testing.assert_allclose(hessian, computed["sum_sq_hess_x"], atol=1e-8)


def naive_solver(z_prev, params, tol=1e-5):
    """The notebook's loop, with its Python `while` and its own count."""
    z, steps = func(z_prev, params), 1
    while jnp.linalg.norm(z_prev - z) > tol:
        z_prev, z = z, func(z, params)
        steps += 1
    return z, steps


def newton_solver(z, params, tol=1e-5):
    def residual(z):
        return func(z, params) - z

    for steps in range(1, 100):
        step = jnp.linalg.solve(jax.jacobian(residual)(z), residual(z))
        z = z - step
        if jnp.linalg.norm(step) <= tol:
            return z, steps
    raise RuntimeError("no convergence")


def anderson_solver(z0, params, m=5, lam=1e-4, max_iter=50, tol=1e-5):
    """The notebook's Anderson acceleration, with its `break`; in NumPy."""
    w, x = np.asarray(params[0]), np.asarray(params[1])
    states, images = [np.asarray(z0)], [np.tanh(w @ np.asarray(z0) + x)]
    states.append(images[0])
    images.append(np.tanh(w @ states[1] + x))
    for _ in range(2, max_iter):
        gaps = np.stack(images[-m:]) - np.stack(states[-m:])
        n = len(gaps)
        h = np.zeros((n + 1, n + 1))
        h[0, 1:], h[1:, 0], h[1:, 1:] = 1, 1, gaps @ gaps.T
        alpha = np.linalg.solve(h + lam * np.eye(n + 1), np.eye(n + 1)[0])[1:]
        z = alpha @ np.stack(images[-m:])
        states.append(z)
        images.append(np.tanh(w @ z + x))
        gap = np.linalg.norm(images[-1] - z) / (1e-5 + np.linalg.norm(images[-1]))
        if gap < tol:
            break
    return jnp.asarray(z), len(states) - 1


# solver: its steps, its distance from the solution, the error of its derivative
NOTEBOOK = {
    naive_solver: (35, 5e-6, 2e-5),
    newton_solver: (5, 1e-9, EXACT),
    anderson_solver: (37, 2.5e-5, 1e-4),
}


@pytest.mark.parametrize(("solver", "numbers"), NOTEBOOK.items())
def test_notebook_solvers_get_a_derivative_by_decoration(solver, numbers):
    num_steps, distance, error = numbers
    solve = eqi.custom_fixed_point(func, has_aux=True)(solver)
    z, steps = solve(Z0, (W, X))
    assert steps == num_steps
    assert np.linalg.norm(z - Z_STAR) < distance
    grad_x = jax.grad(lambda x: jnp.sum(solve(Z0, (W, x))[0] ** 2))(X)
    want = TANH["computed"]["sum_sq_grad_x"]
    np.testing.assert_allclose(grad_x, want, rtol=0, atol=5 * error)


@pytest.mark.parametrize(
    ("solver", "printed", "distance"),
    [
        (naive_solver, "z_naive_f32", 5e-6),
        (anderson_solver, "z_anderson_f32", 2.4e-5),
    ],
)
def test_notebook_prints_are_that_far_from_the_solution(solver, printed, distance):
    z, _ = solver(Z0, (W, X))
    shown = np.asarray(TANH["printed"][printed])
    np.testing.assert_allclose(z, shown, rtol=0, atol=5e-6)
    assert np.linalg.norm(shown - Z_STAR) < distance * 1.05


def test_derivative_in_float32():
    w, x, z0 = (jnp.asarray(a, jnp.float32) for a in (W, X, Z0))
    solver = optx.Newton(rtol=1e-6, atol=1e-6)
    layer = eqi.ImplicitFunction(eqi.FixedPoint(func), solver)
    dz_dx = jax.jit(jax.jacrev(lambda x: layer(z0, (w, x))))(x)
    assert dz_dx.dtype == jnp.float32
    np.testing.assert_allclose(dz_dx, DZ_DX, rtol=0, atol=1e-5)


def test_spectral_radius_at_the_solution():
    got = spectral_radius(
        func, jnp.asarray(Z_STAR), (W, X), key=jax.random.key(0), num_steps=300
    )
    want = TANH["computed"]["spectral_radius_of_map_at_root"]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# --- The same map with a W along which plain iteration never ends

CYCLE = tuple(jnp.asarray(TANH["cycling_inputs"][name]) for name in ("W", "x"))


def test_plain_iteration_cycles_and_says_so():
    solver = optx.FixedPointIteration(rtol=1e-10, atol=1e-10)
    sol = eqi.fixed_point(func, Z0, CYCLE, solver=solver, max_steps=2000, throw=False)
    assert sol.result == eqi.RESULTS.nonlinear_max_steps_reached
    assert sol.stats["residual_norm"] > 1
    twice = func(func(sol.value, CYCLE), CYCLE)
    np.testing.assert_allclose(twice, sol.value, atol=1e-12)  # period two


@pytest.mark.parametrize(
    ("name", "linear_solver"),
    [("newton", "default"), ("newton", "GMRES"), ("anderson and more", "default")],
)
def test_derivative_where_the_map_repels(name, linear_solver):
    w, x = CYCLE
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(func), SOLVERS[name], adjoint(LINEAR_SOLVERS[linear_solver])
    )
    dz_dx, z = jax.jit(jax.jacrev(lambda x: (layer(Z0, (w, x)),) * 2, has_aux=True))(x)
    slope = 1 - np.tanh(w @ z + x) ** 2
    jacobian = slope[:, None] * np.asarray(w)
    assert np.max(np.abs(np.linalg.eigvals(jacobian))) > 1.16
    want = np.linalg.solve(np.eye(10) - jacobian, np.diag(slope))
    np.testing.assert_allclose(dz_dx, want, rtol=0, atol=1e-9)


# --- Memory


def gradient_memory(adjoint, num_steps):
    solver = FixedBudget(optx.FixedPointIteration(rtol=0.0, atol=0.0), num_steps)
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(func), solver, adjoint, max_steps=num_steps
    )
    compiled = jax.jit(jax.grad(sum_of_squares(layer))).lower(W, X).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_implicit_memory_is_constant_and_unrolled_memory_grows():
    implicit = [gradient_memory(eqi.ImplicitAdjoint(), n) for n in (10, 300)]
    unrolled = [gradient_memory(eqi.UnrolledAdjoint(n), n) for n in (10, 300)]
    assert implicit[0] == implicit[1]
    assert unrolled[1] > 2 * unrolled[0]


# --- x = W2 relu(W1 x + b1) + b2

NET = load("seed004_deq")
NET_X0 = jnp.asarray(NET["inputs"]["x0"])  # (1, 4)
NAMES = ("W1", "b1", "W2", "b2")


class Net(eqx.Module):
    W1: jax.Array
    b1: jax.Array
    W2: jax.Array
    b2: jax.Array

    def __call__(self, z, x=None):
        hidden = jax.nn.relu(z @ self.W1.T + self.b1[None, :])
        return hidden @ self.W2.T + self.b2[None, :]


NET_CELL = Net(*(jnp.asarray(NET["inputs"][name]) for name in NAMES))


def assert_net_gradients(grads, tol):
    for name in NAMES:
        want = NET["computed"][f"dmean_d{name}"]
        np.testing.assert_allclose(getattr(grads, name), want, rtol=0, atol=tol)


@pytest.mark.parametrize("name", SOLVERS)
def test_two_layer_deq(name):
    layer = DEQ(NET_CELL, SOLVERS[name])
    z, grads = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda layer: jnp.mean(layer(None, z0=NET_X0)))
    )(layer)
    np.testing.assert_allclose(z, np.mean(NET["computed"]["x_star"]), atol=1e-12)
    assert_net_gradients(grads.cell, 2e-12)


class InnerNet(eqi.AbstractImplicitModule):
    """The notebook's module: a Python loop of its own, and what it solves."""

    meta_net: Net

    def optimality(self, x):
        return x - self.meta_net(x)

    def solve(self, x):
        for _ in range(60):
            x = self.meta_net(x)
        return x


def test_two_layer_deq_object_oriented():
    grads = eqx.filter_grad(lambda net: jnp.mean(InnerNet(net)(NET_X0)))(NET_CELL)
    assert_net_gradients(grads, 1e-12)


class InnerNetOfRows(InnerNet):
    def optimality(self, x):
        return tuple(x - self.meta_net(x))  # rows: the slip that ended the notebook


def test_residual_of_rows_is_refused_with_both_shapes():
    message = r"residual does not match the state.*float64\[4\].*float64\[1, ?4\]"
    with pytest.raises(ValueError, match=message):
        InnerNetOfRows(NET_CELL)(NET_X0)
