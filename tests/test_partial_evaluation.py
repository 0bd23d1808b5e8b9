"""Reverse mode of reverse mode, where JAX evaluates the solve's program partially.

A custom rule that JAX inlines there loses its derivative without a word, so every order
is compared with the program written out.
"""

import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import eqximplicit as eqi

TOLERANCE = 1e-9  # Newton's solutions are exact to rounding, four derivatives deep
STEPS = 3

ORDERS = {
    "rev over rev": lambda f: jax.grad(jax.grad(f)),
    "fwd over rev": lambda f: jax.jacfwd(jax.grad(f)),
    "rev over fwd": lambda f: jax.grad(jax.jacfwd(f)),
    "rev over rev over rev": lambda f: jax.grad(jax.grad(jax.grad(f))),
}


def residual(new, args):
    old, rate = args
    return {
        "x": new["x"] - old["x"] + 0.1 * rate * new["x"] ** 3,
        "y": new["y"] - old["y"] + 0.1 * rate * new["x"] * new["y"],
    }


LAYER = eqi.ImplicitFunction(
    eqi.Root(residual), optx.Newton(rtol=1e-13, atol=1e-13), throw=False
)
START = {"x": jnp.array(1.0), "y": jnp.array(2.0)}


def implicit_step(state, rate):
    return LAYER(state, (state, rate))


def written_out_step(state, rate):
    x = state["x"]
    for _ in range(7):  # Newton's method for the cubic equation
        x = x - (x - state["x"] + 0.1 * rate * x**3) / (1 + 0.3 * rate * x**2)
    return {"x": x, "y": state["y"] / (1 + 0.1 * rate * x)}


def final(step, rate):
    state, _ = jax.lax.scan(lambda s, _: (step(s, rate), None), START, length=STEPS)
    return state["x"] + state["y"] ** 2


def written_out(rate):
    state = START
    for _ in range(STEPS):
        state = written_out_step(state, rate)
    return state["x"] + state["y"] ** 2


CONTEXTS = {
    "scan": lambda rate: final(implicit_step, rate),
    "checkpointed scan": jax.checkpoint(lambda rate: final(implicit_step, rate)),
    "scan of checkpoints": lambda rate: final(jax.checkpoint(implicit_step), rate),
}


# Left to the slow session.
LATER = ("fwd over rev", "rev over fwd")


@pytest.mark.parametrize(
    "order",
    [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in ORDERS],
)
def test_every_order_is_right_inside_a_scan(order):
    rate = jnp.array(2.0)
    expected = jax.jit(ORDERS[order](written_out))(rate)
    derivative = jax.jit(ORDERS[order](CONTEXTS["scan"]))(rate)
    assert abs(derivative - expected) < TOLERANCE


@pytest.mark.parametrize("context", ["checkpointed scan", "scan of checkpoints"])
def test_second_derivative_is_right_under_checkpoints(context):
    rate = jnp.array(2.0)
    expected = jax.jit(jax.grad(jax.grad(written_out)))(rate)
    derivative = jax.jit(jax.grad(jax.grad(CONTEXTS[context])))(rate)
    assert abs(derivative - expected) < TOLERANCE
