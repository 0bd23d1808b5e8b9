"""Functions of few numbers, evaluated entry by entry: as they are themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers._entrywise import entrywise

MATRIX = np.array([[1.0, -2.0, 0.5], [0.3, 1.5, -1.0], [2.0, 0.1, -0.7]])
NODES = np.linspace(0.0, 1.0, 50)


@jax.custom_jvp
def with_a_rule(x):
    return x**2


@with_a_rule.defjvp
def _three_times(primals, tangents):
    return with_a_rule(*primals), 3.0 * tangents[0]


def looped(y):
    return jax.lax.while_loop(
        lambda c: jnp.max(jnp.abs(c)) < 10.0, lambda c: 2 * c + 1, y
    )


def long(y):
    for _ in range(100):
        y = jnp.sin(y)
    return y


NOT_BY_ENTRIES = {
    "loop": looped,
    "branch": lambda y: jax.lax.cond(y[0] > 0, jnp.sin, jnp.cos, y),
    "scan": lambda y: jax.lax.scan(lambda c, x: (c + x * y, c), y, y)[0],
    "long": long,
}


def indexed(y):
    return y[jnp.argmax(y)] * jnp.roll(y, 1) + y.at[0].set(0.0)


def shaped(y):
    outer = jax.lax.pad(y[:, None] * y[None, ::-1], y[0], ((0, 0, 0), (1, -1, 0)))
    return jnp.concatenate([outer.T.sum(0)[1:], jnp.squeeze(outer[:1, 1:2], 1)])


FUNCTIONS = {
    "arithmetic": lambda y: y**3 - 2.0 / (1.0 + y) + jnp.sin(y) * y,
    "product with a matrix": lambda y: jnp.asarray(MATRIX, y.dtype) @ y,
    "product from the left": lambda y: y @ jnp.asarray(MATRIX, y.dtype) + y @ y,
    "einsum": lambda y: jnp.einsum("i,ij,j->j", y, jnp.asarray(MATRIX, y.dtype), y),
    "norm": lambda y: y / jnp.linalg.norm(y),
    "choice": lambda y: jnp.where(y > 0, y**2, -y) + jnp.maximum(y, 0.3),
    "derivative of its own": with_a_rule,
    "relu": lambda y: jax.nn.relu(y - y[1]) + y,
    "index": indexed,
    "shapes": shaped,
    "reshape in another order": lambda y: jax.lax.reshape(
        y[:, None] * jnp.cos(y)[None], (9,), dimensions=(1, 0)
    )[1:4],
    "largest": lambda y: y + jax.lax.top_k(y, 1)[0],
    "order": lambda y: jnp.cumsum(jnp.sort(y)) + y,
    "many entries": lambda y: y * jnp.mean(jnp.exp(-NODES.astype(y.dtype) * y[2])),
    "complex on the way": lambda y: jnp.abs(jnp.exp(jax.lax.complex(y, y**2))),
    "integers": lambda y: y * (jnp.arange(3) % 2 + jnp.sum(y > 0)).astype(y.dtype),
    "jitted": jax.jit(lambda y: jax.jit(jnp.tanh)(y) + 1.0),
    "constant": lambda y: jnp.ones_like(y),
    "nothing": lambda y: y + jnp.sum(y[:0]),
    "stopped": lambda y: jax.lax.stop_gradient(y) * y,
}
POINTS = np.random.default_rng(0).normal(size=(4, 3))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_derivative_are_those_of_the_function(name, dtype):
    fn, struct = FUNCTIONS[name], jax.ShapeDtypeStruct((3,), dtype)

    def by_entries(y):
        evaluate = entrywise(lambda y: (fn(y), y[0] > 0), struct)
        assert evaluate is not None
        scalars, aux = evaluate(list(y))
        return jnp.stack(scalars), aux

    def both(y):
        tangent = jnp.cos(jnp.arange(3.0, dtype=y.dtype))
        return jax.jvp(fn, (y,), (tangent,)), jax.jvp(
            lambda y: by_entries(y)[0], (y,), (tangent,)
        )

    points = jnp.asarray(POINTS, dtype)
    rtol = 1e2 * np.finfo(dtype).eps
    for direct, found in (jax.jit(both)(points[0]), jax.jit(jax.vmap(both))(points)):
        for a, b in zip(direct, found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol)
    assert bool(jax.jit(by_entries)(points[0])[1]) == (POINTS[0, 0] > 0)


@pytest.mark.parametrize("name", NOT_BY_ENTRIES)
def test_long_functions_and_loops_stay_as_they_are(name):
    fn = NOT_BY_ENTRIES[name]
    struct = jax.ShapeDtypeStruct((3,), float)
    assert entrywise(lambda y: (jax.jit(fn)(y), None), struct) is None
    root = eqi.Root(lambda y, a: y + 0.1 * fn(y) - a)
    found = eqi.ImplicitFunction(root)(jnp.ones(3), jnp.arange(2.0, 5.0))
    assert np.max(np.abs(root.fn(found, jnp.arange(2.0, 5.0)))) < 1e-8


def test_pytrees_keep_the_order_of_their_entries():
    like = {"a": jnp.array(0.0), "b": jnp.zeros(2), "c": jnp.zeros((0, 2))}
    struct = jax.eval_shape(lambda: like)
    fn = lambda y: ((y["b"] * y["a"], 2 * y["c"], -y["a"]), {"n": y["b"] + 1})
    scalars, aux = entrywise(fn, struct)([jnp.array(v) for v in (2.0, 3.0, 5.0)])
    assert [float(x) for x in scalars] == [6.0, 10.0, -2.0]
    assert aux["n"].tolist() == [4.0, 6.0]


def rotated(y, args):
    angle, shift = args
    c, s = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])]) @ y
    return jax.nn.softplus(turned) + y - shift


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, eqi.AutoRootFinder(rtol=1e-10, atol=1e-10)])
def test_many_small_roots_and_their_derivatives(solver):
    draw = np.random.default_rng(1)
    args = jnp.asarray(draw.normal(size=20)), jnp.asarray(draw.normal(size=(20, 2)))
    layer = eqi.ImplicitFunction(eqi.Root(rotated), solver, throw=False)
    solve = lambda args: layer(jnp.zeros(2), args)
    y, slopes = jax.jit(jax.vmap(lambda a: (solve(a), jax.jacrev(solve)(a))))(args)
    left = jax.vmap(rotated)(y, args)
    assert np.max(np.abs(left)) < 1e-8

    def exact(y, args):
        by_y, by_args = jax.jacfwd(rotated, argnums=(0, 1))(y, args)
        return jax.tree.map(
            lambda b: -jnp.linalg.solve(by_y, b.reshape(2, -1)), by_args
        )

    for found, true in zip(slopes, jax.vmap(exact)(y, args), strict=True):
        np.testing.assert_allclose(found.reshape(true.shape), true, rtol=1e-6)
