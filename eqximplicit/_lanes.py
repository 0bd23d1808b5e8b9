"""Reductions over the lanes of all enclosing `jax.vmap`s.

A `lax.cond` or `lax.while_loop` on such a number stays one branch or one loop under
`vmap`, where a predicate of each lane would run both sides, or choose between old and
new for everything that the loop carries. Both must then be right for every lane.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jax.interpreters import ad, batching, mlir
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


# Of some arrays, as many as `count` says, and of others beside them: the former, in all
# lanes over which any of them is mapped.
_spread_p = jex.Primitive("in_every_lane")
_spread_p.multiple_results = True


def _spread(*arrays: Any, count: int) -> list[Any]:
    return list(arrays[:count])


def _spread_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, count: int
) -> tuple[list[Any], list[Any]]:
    return _spread_p.bind(*primals, count=count), list(tangents[:count])


def _spread_batch(
    axis: Any, arrays: Sequence[Any], dims: Sequence[Any], *, count: int
) -> tuple[list[Any], list[int | None]]:
    if all(dim is None for dim in dims):
        return _spread_p.bind(*arrays, count=count), [None] * count
    pairs = zip(arrays[:count], dims[:count], strict=True)
    lanes = [batching.bdim_at_front(x, dim, axis.size) for x, dim in pairs]
    return _spread_p.bind(*lanes, *arrays[count:], count=count), [0] * count


_spread_p.def_impl(_spread)
_spread_p.def_abstract_eval(_spread)
ad.primitive_jvps[_spread_p] = _spread_jvp
batching.fancy_primitive_batchers[_spread_p] = _spread_batch
mlir.register_lowering(_spread_p, mlir.lower_fun(_spread, multiple_results=True))


def in_every_lane(carry: T, beside: Any = None) -> T:
    """What a loop begins with, all of it in every lane of anything in it or `beside`.

    JAX finds what comes to differ from lane to lane by tracing the body of the loop,
    once more for what depends on that, and each time so for the loops inside.
    """
    arrays, rest = eqx.partition(carry, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    others = jtu.tree_leaves(eqx.filter(beside, eqx.is_array))
    leaves = _spread_p.bind(*leaves, *others, count=len(leaves))
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)


any_lane = over_lanes(jnp.any)
# Of no lanes, less than anything.
max_lane = over_lanes(functools.partial(jnp.max, initial=-jnp.inf))
