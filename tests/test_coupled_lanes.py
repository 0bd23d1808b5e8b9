"""Lanes of a mapped axis that a collective couples: refused, or one problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqximplicit as eqi

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(4, 3))


def normalised(y, x):
    """A cell with batch normalisation."""
    centred = y - jax.lax.pmean(y, "batch")
    return jnp.tanh(0.3 * centred + x)


def in_a_loop(y, x):
    step = lambda _, y: 0.1 * jax.lax.pmean(y, "batch")
    return jnp.tanh(x + jax.lax.fori_loop(0, 3, step, y))


def in_a_call(y, x):
    return jnp.tanh(x + jax.jit(lambda y: 0.1 * jax.lax.psum(y, "batch"))(y))


def exchanged(y, x):
    return jnp.tanh(x + 0.2 * jax.lax.ppermute(y, "batch", [(0, 1), (1, 0)]))


@pytest.mark.parametrize("cell", [normalised, in_a_loop, in_a_call, exchanged])
def test_coupled_lanes_are_refused(cell):
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    solve = jax.vmap(lambda x: layer(jnp.zeros(3), x), axis_name="batch")
    with pytest.raises(ValueError, match=r"couples the lanes .* 'batch'"):
        jax.eval_shape(solve, X)


def test_as_one_state_they_are_right():
    inside = jax.vmap(normalised, axis_name="batch")
    layer = eqi.ImplicitFunction(eqi.FixedPoint(inside))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(jnp.zeros((4, 3)), x) ** 2)))

    def unrolled(x):
        y = jnp.zeros((4, 3))
        for _ in range(60):
            y = jnp.tanh(0.3 * (y - y.mean(0, keepdims=True)) + x)
        return jnp.sum(y**2)

    np.testing.assert_allclose(gradient(X), jax.grad(unrolled)(X), rtol=1e-6)


def test_a_collective_of_anything_but_the_state_is_data():
    def cell(y, x):
        return jnp.tanh(0.3 * y + x - jax.lax.pmean(x, "batch"))

    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    solve = jax.vmap(lambda x: layer(jnp.zeros(3), x), axis_name="batch")
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(solve(x) ** 2)))(X)

    def unrolled(x):
        y = jnp.zeros((4, 3))
        for _ in range(60):
            y = jnp.tanh(0.3 * y + x - x.mean(0, keepdims=True))
        return jnp.sum(y**2)

    np.testing.assert_allclose(gradient, jax.grad(unrolled)(jnp.asarray(X)), rtol=1e-6)


def test_a_loss_averaged_over_lanes_is_refused_too():
    # Inside of a `vmap`, the gradient of a mean over lanes is that of the own lane.
    def objective(y, x):
        return jax.lax.pmean(jnp.sum((y - x) ** 2), "batch")

    solve = lambda x: eqi.minimise(objective, jnp.zeros(3), x).value
    with pytest.raises(ValueError, match="couples the lanes"):
        jax.eval_shape(jax.vmap(solve, axis_name="batch"), X)


def test_an_axis_inside_of_the_function_does_not_matter():
    def cell(y, x):
        mean = jax.vmap(lambda a: jax.lax.pmean(a, "inner"), axis_name="inner")
        return 0.3 * (mean(y) - x)

    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    solved = jax.vmap(lambda x: layer(jnp.zeros(3), x), axis_name="batch")(X)
    mean = -0.3 / 0.7 * X.mean(1, keepdims=True)
    np.testing.assert_allclose(solved, 0.3 * (mean - X), atol=1e-8)
