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


def _scan(eqn: Any, flags: list[bool], coupled: list[Any]) -> list[bool]:
    body, first = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    while True:
        outs = _follow(body, flags, coupled)
        carry = [a or b for a, b in zip(flags[first:last], outs, strict=False)]
        if carry == flags[first:last]:
            return outs
        flags = [*flags[:first], *carry, *flags[last:]]


def _while(eqn: Any, flags: list[bool], coupled: list[Any]) -> list[bool]:
    of_cond = eqn.params["cond_nconsts"]
    start = of_cond + eqn.params["body_nconsts"]
    cond, body = (eqn.params[f"{name}_jaxpr"].jaxpr for name in ("cond", "body"))
    carry = flags[start:]
    while True:
        ends = any(_follow(cond, flags[:of_cond] + carry, coupled))
        outs = _follow(body, flags[of_cond:start] + carry, coupled)
        new = [ends or a or b for a, b in zip(carry, outs, strict=True)]
        if new == carry:
            return carry
        carry = new


def _cond(eqn: Any, flags: list[bool], coupled: list[Any]) -> list[bool]:
    branches = [branch.jaxpr for branch in eqn.params["branches"]]
    outs = [_follow(branch, flags[1:], coupled) for branch in branches]
    return [flags[0] or any(column) for column in zip(*outs, strict=True)]


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _through(eqn: Any, flags: list[bool], coupled: list[Any]) -> list[bool]:
    """Which outputs of an equation depend on the state."""
    inner = inner_jaxpr(eqn)
    if inner is not None:
        return _follow(inner, flags, coupled)
    if eqn.primitive.name in _LOOPS:
        return _LOOPS[eqn.primitive.name](eqn, flags, coupled)
    coupled += _named_axes(eqn)
    coupled += [axis for nested in _nested(eqn) for axis in _all_axes(nested)]
    return [True] * len(eqn.outvars)


def _follow(
    jaxpr: Jaxpr, inputs: Sequence[bool], coupled: list[Any], live: Any = None
) -> list[bool]:
    """Which outputs depend on the state; adds to `coupled` the axes that couple it.

    With `live` only by equations whose outputs are among these variables.
    """
    pairs = zip(jaxpr.invars, inputs, strict=True)
    moved = {var for var, is_state in pairs if is_state}

    def moves(var: Any) -> bool:
        return not isinstance(var, Literal) and var in moved

    for eqn in jaxpr.eqns:
        flags = [moves(var) for var in eqn.invars]
        wanted = live is None or any(var in live for var in eqn.outvars)
        if any(flags) and wanted:
            outs = _through(eqn, flags, coupled)
            pairs = zip(eqn.outvars, outs, strict=True)
            moved |= {var for var, out in pairs if out}
    return [moves(var) for var in jaxpr.outvars]


def _live(jaxpr: Jaxpr, num_out: int) -> set[Any]:
    """The variables that the first outputs need."""
    live = {v for v in jaxpr.outvars[:num_out] if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in live for var in eqn.outvars):
            live |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return live


def coupled_axes(jaxpr: Jaxpr, num_state: int, num_out: int) -> list[Any]:
    """The names of the axes whose lanes a function couples through its state.

    **Arguments:** the function; how many of its inputs, the first, are the state; and
    how many of its outputs, the first, are its value: the others are auxiliary.
    """
    coupled: list[Any] = []
    if _all_axes(jaxpr):
        num_data = len(jaxpr.invars) - num_state
        flags = [True] * num_state + [False] * num_data
        _follow(jaxpr, flags, coupled, _live(jaxpr, num_out))
    return coupled
