"""A layer and its gradient are exported once for all sizes of a batch."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jax import export

import eqximplicit as eqi

W = np.array([[0.3, -0.4, 0.0], [0.2, 0.1, 0.5], [0.0, 0.3, -0.2]])
# Exported, a solve is matrix-free; a small one of known size is not. Both are accurate
# to the tolerance of the default solvers, 1e-8, times the condition number, below 5.
TOLERANCE = 1e-7


def cell(z, x):
    return jnp.tanh(z @ W.T + x)


def cubic(y, a):
    return y**3 + 2.0 * y + y @ W.T - a


def energy(y, a):
    return jnp.sum(jnp.cosh(y) - a * y)


def misfit(y, a):
    return jnp.sinh(y) - a, 0.3 * y


def layer(condition, solver=None, adjoint=None):
    # What raises calls the host, which JAX cannot export.
    return eqi.ImplicitFunction(condition, solver, adjoint, throw=False)


LAYERS = {
    "fixed point": layer(eqi.FixedPoint(cell)),
    "root": layer(eqi.Root(cubic)),
    "minimum": layer(eqi.Minimum(energy)),
    "least squares": layer(eqi.LeastSquares(misfit)),
}
BATCHED = LAYERS | {
    "Picard": layer(
        eqi.FixedPoint(cell), optx.FixedPointIteration(rtol=1e-9, atol=1e-9)
    ),
    "Broyden": layer(eqi.Root(cubic), eqi.Broyden(rtol=1e-9, atol=1e-9)),
    "FIRE": layer(eqi.Minimum(energy), eqi.FIRE(rtol=1e-9, atol=1e-9)),
}
slow = pytest.mark.slow


def exported_and_not(fn, columns=3):
    def value_and_gradient(x):
        return fn(x), jax.grad(lambda x: jnp.sum(jnp.sin(fn(x))))(x)

    jitted = jax.jit(value_and_gradient)
    (batch,) = export.symbolic_shape("batch")
    return export.export(jitted)(jax.ShapeDtypeStruct((batch, columns), float)), jitted


def assert_same_at_two_sizes(fn, columns=3):
    program, jitted = exported_and_not(fn, columns)
    for batch in (2, 40):
        x = 0.5 * np.random.default_rng(batch).normal(size=(batch, columns))
        for got, expected in zip(program.call(x), jitted(x), strict=True):
            assert got.shape == (batch, columns)
            np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "fixed point",
        *(pytest.param(n, marks=slow) for n in ("root", "minimum", "least squares")),
    ],
)
def test_batch_of_solves_is_exported(name):
    one = lambda x: LAYERS[name](jnp.zeros(3), x)
    assert_same_at_two_sizes(jax.vmap(one))


@slow
@pytest.mark.parametrize("condition", [eqi.Root, eqi.Minimum])
def test_batch_of_larger_solves_is_exported(condition):
    fns = {eqi.Root: lambda y, a: jnp.sinh(y) - a, eqi.Minimum: energy}
    one = lambda x: layer(condition(fns[condition]))(jnp.zeros(40), x)
    assert_same_at_two_sizes(jax.vmap(one), 40)


@slow
@pytest.mark.parametrize("name", BATCHED)
def test_solve_of_a_batched_state_is_exported(name):
    assert_same_at_two_sizes(lambda x: BATCHED[name](jnp.zeros_like(x), x))


def test_exported_gradient_is_that_of_the_closed_form():
    # y = arcsinh(a), whose slope is 1 / sqrt(1 + a²).
    program, _ = exported_and_not(lambda x: LAYERS["minimum"](jnp.zeros_like(x), x))
    x = np.linspace(-2.0, 2.0, 15).reshape(5, 3)
    value, gradient = program.call(x)
    np.testing.assert_allclose(value, np.arcsinh(x), rtol=1e-6, atol=1e-7)
    slope = np.cos(np.arcsinh(x)) / np.sqrt(1 + x**2)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [eqi.DirectSymmetric(), lx.LU()], ids=repr)
def test_matrix_of_a_size_that_is_not_known_is_factorised(solver):
    adjoint = eqi.ImplicitAdjoint(solver)
    solve = layer(eqi.Minimum(energy), lambda y0, a: jnp.arcsinh(a), adjoint)
    assert_same_at_two_sizes(lambda x: solve(jnp.zeros_like(x), x), columns=1)
