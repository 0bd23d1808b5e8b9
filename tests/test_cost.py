"""How much work a function is, as read off its jaxpr."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit._cost import num_operations

A = np.ones((20, 30))


def cost(fn, *args):
    return num_operations(jax.make_jaxpr(fn)(*args).jaxpr)


def looped(x):
    return jax.lax.scan(lambda c, _: (c + 1.0, None), x, None, length=7)[0]


def test_products_count_their_terms():
    assert cost(lambda x: jnp.asarray(A) @ x, jnp.ones(30)) == 20 * 30
    assert cost(lambda x, y: x + y, jnp.ones(5), jnp.ones(5)) == 5


def test_what_is_inside_of_calls_and_loops_counts():
    assert cost(jax.jit(lambda x: x * x), jnp.ones(5)) == 5
    assert cost(looped, jnp.ones(5)) == 7 * 5
    assert cost(lambda x: jnp.exp(x), jnp.ones(5)) > 5


def test_a_factorisation_is_cubic():
    small, large = (cost(jnp.linalg.eigh, jnp.eye(n)) for n in (10, 100))
    assert 500 < large / small < 1500


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1, x),
        lambda x: jax.pure_callback(np.sin, x, x),
    ],
)
def test_a_loop_without_a_known_end_and_the_host_are_dear(fn):
    assert math.isinf(cost(fn, jnp.array(0.0)))
