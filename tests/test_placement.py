"""A function for one device beside one for several, on one device.

`test_sharding.py` has programs for several.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eqximplicit._placement import by_placement

X = np.arange(1.0, 4.0)


def chosen(x, traced):
    """A pytree with something static."""

    def on_several(args):
        traced.append(args)
        return on_one(args)

    def on_one(args):
        name, y = args
        return {"name": name, "sum": y + y**2}

    return by_placement(on_one, on_several, ("square", x))


def test_other_function_is_not_traced():
    traced = []
    found = jax.jit(lambda x: chosen(x, traced)["sum"])(X)
    np.testing.assert_allclose(found, X + X**2)
    assert chosen(jnp.asarray(X), traced)["name"] == "square"
    assert not traced


def test_derivatives():
    fn = lambda x: chosen(x, [])["sum"]
    value, slope = jax.jit(lambda x: jax.jvp(fn, (x,), (jnp.ones(3),)))(X)
    np.testing.assert_allclose(value, X + X**2)
    np.testing.assert_allclose(slope, 1 + 2 * X)
    np.testing.assert_allclose(jax.jit(jax.jacrev(fn))(X), np.diag(1 + 2 * X))
    curved = jax.jit(jax.jacfwd(jax.jacrev(lambda x: fn(x).sum())))(X)
    np.testing.assert_allclose(curved, 2 * np.eye(3))


def test_lanes():
    rows = np.stack([X, 2 * X])
    scaled = lambda x, y: by_placement(
        lambda args: args[0] * args[1], lambda args: args[0], (x, y)
    )
    found = jax.jit(jax.vmap(scaled, (0, None)))(rows, X)
    np.testing.assert_allclose(found, rows * X)
    nested = jax.vmap(jax.vmap(scaled, (0, None)), (None, 1))
    found = jax.jit(nested)(X, rows.T)
    np.testing.assert_allclose(found, X[None, :, None] * rows[:, None])
