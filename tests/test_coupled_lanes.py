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


def in_a_branch(y, x):
    far = lambda y: 0.1 * jax.lax.pmean(y, "batch")
    return jnp.tanh(x + jax.lax.cond(y[0] > 0, far, lambda y: y, y))


def while_it_lasts(y, x):
    step = lambda c: (c[0] + 1, 0.1 * jax.lax.pmean(c[1], "batch"))
    return jnp.tanh(x + jax.lax.while_loop(lambda c: c[0] < 3, step, (0, y))[1])


COUPLED = normalised, in_a_loop, in_a_call, in_a_branch, while_it_lasts, exchanged


@pytest.mark.parametrize("cell", COUPLED)
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


def mean_in_a_loop(y, x):
    step = lambda _, c: 0.3 * c + jax.lax.pmean(x, "batch")
    return jax.lax.fori_loop(0, 2, step, y)


def mean_while_it_lasts(y, x):
    step = lambda c: (c[0] + 1, 0.3 * c[1] + jax.lax.pmean(x, "batch"))
    return jax.lax.while_loop(lambda c: c[0] < 2, step, (0, y))[1]


def mean_in_a_branch(y, x):
    mean = lambda y: 0.3 * (0.3 * y + jax.lax.pmean(x, "batch"))
    return jax.lax.cond(x[0] > -9, mean, lambda y: y, y) + jax.lax.pmean(x, "batch")


@pytest.mark.parametrize(
    "cell", [mean_in_a_loop, mean_while_it_lasts, mean_in_a_branch]
)
def test_data_may_be_averaged_beside_the_state(cell):
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), throw=False)
    solved = jax.vmap(lambda x: layer(jnp.zeros(3), x), axis_name="batch")(X)
    # y = 0.09 y + 1.3 mean
    exact = np.broadcast_to(1.3 / 0.91 * X.mean(0, keepdims=True), X.shape)
    np.testing.assert_allclose(solved, exact, atol=1e-7)


def test_auxiliary_output_may_be_averaged():
    def cell(y, x):
        return 0.3 * y + x, jax.lax.pmean(y, "batch")

    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), has_aux=True, throw=False)
    solve = lambda x: layer.solve(jnp.zeros(3), x)
    solution = jax.vmap(solve, axis_name="batch")(X)
    np.testing.assert_allclose(solution.value, X / 0.7, atol=1e-7)


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
