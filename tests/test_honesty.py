"""No silent wrong derivative: right, an error that names the cause, NaN, or a status."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqximplicit as eqi

# --- Solution.value_or -----------------------------------------------------------------

# y² = a has no root for a < 0.
SQRT = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**2 - a), throw=False)
LANES = jnp.array([4.0, -1.0, 9.0])
DEFAULTS = jnp.array([10.0, 20.0, 30.0])


def sqrt_or(a, default):
    return SQRT.solve(jnp.array(1.0), a).value_or(3 * default)


def test_failed_lane_takes_the_default_and_its_derivative():
    values = jax.jit(jax.vmap(sqrt_or))(LANES, DEFAULTS)
    np.testing.assert_allclose(values, [2.0, 60.0, 3.0], rtol=1e-8)
    forward = jax.jit(jax.vmap(jax.jacfwd(sqrt_or, argnums=(0, 1))))(LANES, DEFAULTS)
    reverse = jax.jit(jax.vmap(jax.grad(sqrt_or, argnums=(0, 1))))(LANES, DEFAULTS)
    for by_a, by_default in (forward, reverse):
        np.testing.assert_allclose(by_a, [1 / 4, 0.0, 1 / 6], rtol=1e-8)
        np.testing.assert_allclose(by_default, [0.0, 3.0, 0.0], rtol=1e-12)


def test_default_may_be_chosen_after_the_batch_of_solves():
    def total(lanes):
        solutions = jax.vmap(lambda a: SQRT.solve(jnp.ones(2), a * jnp.ones(2)))(lanes)
        return jnp.sum(solutions.value_or(7.0))

    value, gradient = jax.jit(jax.value_and_grad(total))(LANES)
    np.testing.assert_allclose(value, 2 * (2.0 + 7.0 + 3.0), rtol=1e-8)
    np.testing.assert_allclose(gradient, [1 / 2, 0.0, 1 / 3], rtol=1e-8)


@pytest.mark.parametrize("default", [(1.0,), jnp.ones(2)], ids=["structure", "shape"])
def test_default_that_does_not_fit_the_value_is_refused(default):
    with pytest.raises(ValueError, match=r"`value_or` has (structure|shape)"):
        sqrt = SQRT.solve(jnp.array(1.0), jnp.array(4.0))
        sqrt.value_or(default)
