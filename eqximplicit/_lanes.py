"""Reductions over the lanes of all enclosing `jax.vmap`s.

A `lax.cond` or `lax.while_loop` on such a number stays one branch or one loop under
`vmap`, where a predicate of each lane would run both sides, or choose between old and
new for everything that the loop carries. Both must then be right for every lane.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

Scalar = Callable[[Array], Array]


def over_lanes(reduce: Callable[..., Array]) -> Scalar:
    """A function of a scalar: `reduce` over the lanes, and the scalar without any."""

    @custom_vmap
    def reduced(value: Array) -> Array:
        return value

    @reduced.def_vmap
    def _(axis_size: Any, in_batched: list[bool], value: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return reduced(reduce(value, axis=0)), False

    return reduced


any_lane = over_lanes(jnp.any)
# Of no lanes, less than anything.
max_lane = over_lanes(functools.partial(jnp.max, initial=-jnp.inf))
