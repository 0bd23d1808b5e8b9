"""Reductions over the lanes of all enclosing `jax.vmap`s.

A `lax.cond` or `lax.while_loop` on such a number stays one branch or one loop under
`vmap`, where a predicate of each lane would run both sides, or choose between old and
new for everything that the loop carries. Both must then be right for every lane.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array

T = TypeVar("T")
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


@custom_vmap
def _spread(leaves: Sequence[Any], beside: Sequence[Any]) -> Sequence[Any]:
    """The leaves, in all lanes over which any of them or of `beside` is mapped."""
    del beside
    return leaves


@_spread.def_vmap
def _(
    axis_size: Any, in_batched: Any, leaves: Sequence[Any], beside: Sequence[Any]
) -> tuple[Sequence[Any], list[bool]]:
    def in_lanes(x: Any, batched: bool) -> Any:
        if batched:
            return x
        x = jnp.asarray(x, getattr(x, "dtype", None))  # a constant may be a number
        return jnp.broadcast_to(x, (axis_size, *x.shape))

    mapped = list(map(in_lanes, leaves, in_batched[0]))
    return _spread(mapped, beside), [True] * len(mapped)


def in_every_lane(carry: T, beside: Any = None) -> T:
    """What a loop begins with, all of it in every lane of anything in it or `beside`.

    JAX finds what comes to differ from lane to lane by tracing the body of the loop,
    once more for what depends on that, and each time so for the loops inside.
    """
    arrays, rest = eqx.partition(carry, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    leaves = _spread(leaves, jtu.tree_leaves(eqx.filter(beside, eqx.is_array)))
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)


any_lane = over_lanes(jnp.any)
# Of no lanes, less than anything.
max_lane = over_lanes(functools.partial(jnp.max, initial=-jnp.inf))
