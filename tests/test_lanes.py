"""What a loop begins with under `jax.vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.custom_batching import custom_vmap

import eqximplicit as eqi
from eqximplicit._lanes import in_every_lane


def begun(beside):
    return in_every_lane({"y": jnp.zeros(2), "steps": jnp.array(0)}, beside)


def three_steps(x):
    unfinished = lambda c: c["steps"] < 3
    step = lambda c: {"y": c["y"] + x, "steps": c["steps"] + 1}
    return jax.lax.while_loop(unfinished, step, begun({"x": x, "name": "x"}))


def test_it_is_what_it_was_without_lanes():
    found = jax.jit(three_steps)(2.0)
    np.testing.assert_array_equal(found["y"], [6.0, 6.0])
    np.testing.assert_array_equal(found["steps"], 3)


def test_all_of_it_is_in_every_lane_of_what_it_depends_on():
    x = jnp.arange(20.0).reshape(4, 5)
    solve = jax.vmap(jax.vmap(three_steps))
    loop = next(e for e in jax.make_jaxpr(solve)(x).eqns if e.primitive.name == "while")
    assert {v.aval.shape for v in loop.outvars} == {(4, 5), (4, 5, 2)}
    found = jax.jit(solve)(x)
    np.testing.assert_array_equal(found["y"], np.stack([3 * x, 3 * x], axis=-1))
    np.testing.assert_array_equal(found["steps"], np.full((4, 5), 3))


def test_the_body_of_a_loop_is_mapped_no_more_often_than_jax_has_to():
    times = []

    @custom_vmap
    def cell(y, x):
        return jnp.tanh(y / 2 + x)

    @cell.def_vmap
    def _(axis_size, in_batched, y, x):
        times.append(axis_size)
        return jnp.tanh(y / 2 + x), True

    solver = optx.FixedPointIteration(1e-9, 1e-9)
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), solver, throw=False)
    x = jnp.linspace(0.0, 1.0, 7)
    y = jax.jit(jax.vmap(lambda x: layer(jnp.zeros(()), x)))(x)
    np.testing.assert_allclose(np.tanh(y / 2 + x), y, atol=1e-8)
    assert len(times) <= 2  # to see what is mapped, and to map it
