"""Temporary memory of a gradient against the number of solver steps."""

import jax
import jax.numpy as jnp
import optimistix as optx
import timing
from common import unrolled
from workloads import tanh_cell, tanh_data

import eqximplicit as eqi

STEPS = (100, 1_000, 10_000, 100_000)


def temporary_bytes(steps: int) -> tuple[int, int]:
    """Of the gradient after `steps` steps: implicit, unrolled."""
    theta = tanh_data(100, (), jnp.float64)
    z0 = jnp.zeros_like(theta[1])
    never = optx.FixedPointIteration(rtol=0.0, atol=0.0)
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(tanh_cell), never, max_steps=steps, throw=False
    )
    by_steps = unrolled(tanh_cell, z0, steps)
    implicit = timing.temp_bytes(jax.grad(lambda t: jnp.sum(layer(z0, t))), theta)
    return implicit, timing.temp_bytes(jax.grad(lambda t: jnp.sum(by_steps(t))), theta)


def table() -> str:
    """For 100 unknowns of the `tanh` fixed point, in KiB."""
    lines = [
        "Temporary memory of the gradient of the `tanh` fixed point, n = 100.\n",
        "| steps | implicit [KiB] | unrolled [KiB] |\n|---|---|---|",
    ]
    for steps in STEPS:
        implicit, by_steps = temporary_bytes(steps)
        lines.append(f"| {steps} | {implicit / 1024:.4g} | {by_steps / 1024:.4g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
