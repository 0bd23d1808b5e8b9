"""Cotangents and tangents of any size: the derivative is linear in them."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

SIZES = (1e-33, 1e-22, 1.0, 1e22, 1e36)
SOLVERS = {
    "default": eqi.AutoLinearSolver(),
    "LU": eqi.DirectLU(),
    "Krylov": eqi.HybridKrylov(),
    "Neumann": eqi.Neumann(rtol=1e-6),
    "normal CG": eqi.NormalCG(rtol=1e-6),
    "least norm": eqi.LeastNorm(),
    "lineax GMRES": lx.GMRES(rtol=1e-6, atol=1e-6),
    "lineax LU": lx.LU(),
}


def weights(n):
    return 0.8 * np.cos(np.outer(np.arange(n), np.arange(n))) / n


def cell(y, x):
    return jnp.tanh(jnp.asarray(weights(y.size), y.dtype) @ y + x)


@pytest.mark.parametrize(
    "n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 80))]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_derivative_is_linear_in_what_it_is_asked(name, n):
    solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
    adjoint = eqi.ImplicitAdjoint(SOLVERS[name])
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), solver, adjoint, throw=False)
    zero, x = jnp.zeros(n, jnp.float32), jnp.linspace(-1, 1, n, dtype=jnp.float32)
    y, jvp = jax.linearize(lambda x: layer(zero, x), x)
    pull = jax.jit(lambda ct: jax.vjp(lambda x: layer(zero, x), x)[1](ct)[0])
    push = jax.jit(jvp)
    v = np.cos(np.arange(n) + 0.3)

    slope = np.asarray(1 - y**2, np.float64)
    inverse = np.linalg.inv(np.diag(1 / slope) - weights(n))
    for size in SIZES:
        given = jnp.asarray(size * v, jnp.float32)
        np.testing.assert_allclose(
            np.asarray(push(given), np.float64) / size, inverse @ v, rtol=0, atol=2e-4
        )
        np.testing.assert_allclose(
            np.asarray(pull(given), np.float64) / size, inverse.T @ v, rtol=0, atol=2e-4
        )
    assert np.all(pull(zero) == 0)
    assert np.all(np.isnan(pull(zero * jnp.nan)))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_a_warm_start_is_taken_to_the_same_units(size):
    # Two products suffice if the guess is the solution, and for nothing else.
    solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
    zero, x = jnp.zeros(40, jnp.float32), jnp.ones(40, jnp.float32)
    condition = eqi.FixedPoint(cell)
    y = eqi.ImplicitFunction(condition, solver, throw=False)(zero, x)
    both = jax.jacobian(condition.residual, (0, 1))(y, x)
    of_y, of_x = (np.asarray(jacobian, np.float64) for jacobian in both)
    guess = np.linalg.solve(of_y.T, np.ones(40))

    def gradient(factor):
        start = jnp.asarray(factor * size * guess, jnp.float32)
        options = {"y0_transpose": start}
        linear = eqi.HybridKrylov(rtol=1e-4, max_steps=2, restart=0)
        adjoint = eqi.ImplicitAdjoint(linear, options)
        layer = eqi.ImplicitFunction(condition, solver, adjoint, throw=False)
        return jax.grad(lambda x: jnp.float32(size) * jnp.sum(layer(zero, x)))(x)

    found = np.asarray(gradient(1.0), np.float64) / size
    np.testing.assert_allclose(found, -of_x.T @ guess, rtol=1e-3)
    assert np.all(np.isnan(gradient(0.5)))


@pytest.mark.parametrize("n", [2, 5, 50])
def test_entries_of_very_different_size_are_kept(n):
    weights = jnp.zeros(n, jnp.float32).at[0].set(1e10).at[1].set(1e-29)

    def total(w):
        y = eqi.implicit_solution(eqi.Root(lambda y, w: y - w), jnp.ones_like(w), w)
        return jnp.sum(y * weights)

    gradient = jax.jit(jax.grad(total))(jnp.ones(n, jnp.float32))
    np.testing.assert_allclose(gradient, weights, rtol=1e-5)


@pytest.mark.parametrize("n", [4, 33])
def test_derivative_does_not_depend_on_the_units_of_the_residual(n):
    """In single precision, where the square of an adjoint of 1e20 is no number."""
    with jax.enable_x64(False):
        y = jnp.linspace(1.0, 2.0, n, dtype=jnp.float32)
        unit = jnp.float32(1e-24)
        fn = lambda y, a: unit * (y**2 + 0.1 * jnp.roll(y, 1) - a)
        a = y**2 + 0.1 * jnp.roll(y, 1)
        solution = lambda a: eqi.implicit_solution(eqi.Root(fn), y, a)
        slope = jax.jit(jax.grad(lambda a: jnp.sum(solution(a))))(a)
    jacobian = np.diag(2 * np.asarray(y, float)) + 0.1 * np.eye(n)[np.arange(n) - 1]
    np.testing.assert_allclose(
        slope, np.linalg.solve(jacobian.T, np.ones(n)), rtol=1e-4
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, pytest.param(40, marks=pytest.mark.slow)])
def test_squares_that_underflow_are_no_zeros_for_elimination(n):
    x, v = np.linspace(-1, 1, n), np.cos(np.arange(n) + 0.3)
    y = np.linalg.solve(np.eye(n) - weights(n), x)

    def solution(x):
        linear = eqi.Root(lambda y, x: y - jnp.asarray(weights(n)) @ y - x)
        return eqi.implicit_solution(linear, y, x, linear_solver=eqi.DirectLU())

    for small in (1e-200, 1e-160):
        push = jax.jvp(solution, (x,), (small * v,))[1]
        pull = jax.vjp(solution, x)[1](jnp.asarray(small * v))[0]
        inverse = np.linalg.inv(np.eye(n) - weights(n))
        np.testing.assert_allclose(push / small, inverse @ v, rtol=1e-10)
        np.testing.assert_allclose(pull / small, inverse.T @ v, rtol=1e-10)
