"""Whether a function couples the lanes of a `vmap` or a `shard_map` through the state.

A solution is found, and differentiated, lane by lane. A collective such as
`jax.lax.pmean(y, "batch")` in the function makes one problem of all lanes, of which
each is only a part. What a collective makes of anything but the state is data like any
other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

from ._reach import inner_jaxpr, inner_jaxprs

# The names of their primitives.
_COLLECTIVES = frozenset(
    ["psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"]
    + ["ppermute", "all_to_all", "reduce_scatter", "pgather"]
)


def _named_axes(eqn: Any) -> list[Any]:
    if eqn.primitive.name not in _COLLECTIVES:
        return []
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    return [axis for axis in axes if not isinstance(axis, int)]


def _nested(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs of a loop or a branch; a `shard_map` binds its axes itself."""
    return iter(()) if eqn.primitive.name == "shard_map" else inner_jaxprs(eqn)


def _all_axes(jaxpr: Jaxpr) -> list[Any]:
    """The axes over which anything in a jaxpr communicates."""
    found: list[Any] = []
    for eqn in jaxpr.eqns:
        found += _named_axes(eqn)
        for inner in _nested(eqn):
            found += _all_axes(inner)
    return found


def _follow(jaxpr: Jaxpr, inputs: Sequence[bool], coupled: list[Any]) -> list[bool]:
    """Which outputs depend on the state; adds to `coupled` the axes that couple it."""
    pairs = zip(jaxpr.invars, inputs, strict=True)
    moved = {var for var, is_state in pairs if is_state}

    def moves(var: Any) -> bool:
        return not isinstance(var, Literal) and var in moved

    for eqn in jaxpr.eqns:
        flags = [moves(var) for var in eqn.invars]
        if not any(flags):
            continue
        inner = inner_jaxpr(eqn)
        if inner is not None:
            outs = _follow(inner, flags, coupled)
        else:
            outs = [True] * len(eqn.outvars)
            coupled += _named_axes(eqn)
            coupled += [axis for nested in _nested(eqn) for axis in _all_axes(nested)]
        moved |= {var for var, out in zip(eqn.outvars, outs, strict=True) if out}
    return [moves(var) for var in jaxpr.outvars]


def coupled_axes(jaxpr: Jaxpr, num_state: int) -> list[Any]:
    """The names of the axes whose lanes a function couples through its state.

    **Arguments:** the function, and how many of its inputs, the first, are the state.
    """
    coupled: list[Any] = []
    if _all_axes(jaxpr):
        num_data = len(jaxpr.invars) - num_state
        _follow(jaxpr, [True] * num_state + [False] * num_data, coupled)
    return coupled
