"""Both partial derivatives of a function, from one evaluation of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax

from eqximplicit._linearise import linearised


@jax.custom_jvp
def cubed(y, x):
    return y**3 + 0 * x


@cubed.defjvp
def _(primals, tangents):
    (y, x), (t_y, t_x) = primals, tangents
    return cubed(y, x), 3 * y**2 * t_y + 7 * t_x  # a rule of its own


def scanned(x, y):
    return lax.scan(lambda c, w: (jnp.sin(c) * w + c, c * w), y, x)


def until(x, y):
    return lax.fori_loop(0, 3, lambda i, c: jnp.cos(c) + x * i, y)


MIXING = {
    "sums": lambda x, y: x + y - 2 * (x - y),
    "a number added to each": lambda x, y: jax.lax.add(jnp.sin(y), x[0]) * x,
    "products": lambda x, y: x * y + jnp.outer(x, y) @ jnp.sin(y),
    "only one": lambda x, y: (jnp.sin(x), jnp.cos(y), jnp.ones(3)),
    "select": lambda x, y: jnp.where(jnp.array([True, False, True]), x**2, y**3),
    "extremum": lambda x, y: jnp.maximum(x, y),
    "put together": lambda x, y: jnp.concatenate([x * y, y, jnp.sin(x)])[::-1],
    "put inside": lambda x, y: jnp.zeros(5).at[1:4].set(x).at[2].add(y[0]),
    "slice": lambda x, y: lax.dynamic_update_slice(x, y[:2] ** 2, (1,)),
    "jit": jax.jit(lambda x, y: (jnp.where(x > y, x, y), jnp.tanh(x @ y))),
    "checkpoint": jax.checkpoint(lambda x, y: jnp.sin(x * y) + x),
    "its own rule": lambda x, y: cubed(y, x) + x,
    "scan": scanned,
    "loop": until,
    "branch": lambda x, y: lax.cond(x[0] > 0, lambda: x * y, lambda: x - y),
    "solve": lambda x, y: jnp.linalg.solve(jnp.diag(2 + x**2) + jnp.ones((3, 3)), y),
    "sort": lambda x, y: jnp.sort(jnp.concatenate([x, y])),
}


def draw(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=3))


def partials(fn, x, y, t_x, t_y):
    found = linearised(fn, x, y)
    return found.value, found.along_x(t_x), found.along_y(t_y)


@pytest.mark.parametrize("name", MIXING)
def test_partial_derivatives(name):
    fn, (x, y, t_x, t_y) = MIXING[name], map(draw, range(4))
    wanted = (
        fn(x, y),
        jax.jvp(lambda x: fn(x, y), (x,), (t_x,))[1],
        jax.jvp(lambda y: fn(x, y), (y,), (t_y,))[1],
    )
    for found in (partials, eqx.filter_jit(partials)):
        pairs = zip(
            *map(jtu.tree_leaves, (found(fn, x, y, t_x, t_y), wanted)), strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_transposed_and_in_lanes():
    x, y, t_x, t_y = map(draw, range(4))
    found = linearised(lambda x, y: jnp.where(x > 0, x * y, y + jnp.sin(x)), x, y)
    for push, t in ((found.along_x, t_x), (found.along_y, t_y)):
        matrix = jax.vmap(push)(jnp.eye(3)).T
        np.testing.assert_allclose(push(t), matrix @ t, rtol=1e-12)
        [pulled] = jax.linear_transpose(push, t)(t)
        np.testing.assert_allclose(pulled, matrix.T @ t, rtol=1e-12)


def test_it_is_evaluated_once():
    calls = []

    def fn(x, y):
        calls.append(None)
        return x * y

    found = linearised(fn, draw(0), draw(1))
    found.along_x(draw(2)), found.along_y(draw(3))
    assert len(calls) == 1


def test_what_does_not_move_is_not_computed():
    x, y = draw(0), draw(1)
    found = linearised(lambda x, y: jnp.sin(x) * 2 + jnp.where(y > 0, x, y), x, y)
    program = jax.make_jaxpr(found.along_y)(y)
    assert "cos" not in str(program)
    assert "add" not in str(program)
