"""Which inputs of a function its output depends on, read off its jaxpr."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._custom_types import PyTree
from ._state import leaf_name

# Their inner jaxpr takes and gives what they take and give, once.
_CALLS = frozenset(
    ["jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"]
    + ["custom_jvp_call", "custom_vjp_call", "custom_lin", "one_kernel"]
)


class Reach(NamedTuple):
    """Names of the inexact leaves of an input that do not move the output.

    `unused` do not enter it at all; `detached` enter it, but only where no derivative
    passes (`stop_gradient`, an integer, a comparison).
    """

    unused: list[str]
    detached: list[str]


def inner_jaxpr(eqn: Any) -> Jaxpr | None:
    """The jaxpr of a call, whose inputs and outputs are those of the equation."""
    if eqn.primitive.name not in _CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == len(eqn.invars):
            return jaxpr
    return None


def inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """All jaxprs that an equation holds, those of loops and branches too."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _blocks(eqn: Any) -> bool:
    return eqn.primitive.name == "stop_gradient"


def _carries(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", bool), jnp.inexact)


def _needed(jaxpr: Jaxpr, wanted: set[Any], smooth: bool) -> list[bool]:
    """Which inputs reach the `wanted` variables; if `smooth`, with a derivative."""
    live = set(wanted)
    for eqn in reversed(jaxpr.eqns):
        outs = [out in live for out in eqn.outvars]
        if not any(outs) or (smooth and _blocks(eqn)):
            continue
        inner = inner_jaxpr(eqn)
        if inner is None:
            flags = [True] * len(eqn.invars)
        else:
            ends = zip(inner.outvars, outs, strict=True)
            inner_wanted = {v for v, o in ends if o and not isinstance(v, Literal)}
            flags = _needed(inner, inner_wanted, smooth)
        for var, flag in zip(eqn.invars, flags, strict=True):
            if flag and not isinstance(var, Literal) and (not smooth or _carries(var)):
                live.add(var)
    return [var in live for var in jaxpr.invars]


def reach(fn: Callable[[Any], PyTree[Any]], theta: Any) -> Reach:
    """The leaves of `theta` on which `fn(theta)` does not depend, by name.

    Structural: a dependence that is numerically zero counts. Loops and branches count
    as a whole, so a leaf that enters one enters all that comes out of it.
    """
    moving, resting = eqx.partition(theta, eqx.is_inexact_array)
    jaxpr = jax.make_jaxpr(lambda moving: fn(eqx.combine(moving, resting)))(moving)
    outs = {v for v in jaxpr.jaxpr.outvars if not isinstance(v, Literal)}
    entering = _needed(jaxpr.jaxpr, outs, smooth=False)
    differentiable = _needed(jaxpr.jaxpr, outs, smooth=True)
    names = [leaf_name("", path) for path, _ in jtu.tree_leaves_with_path(moving)]
    triples = list(zip(names, entering, differentiable, strict=True))
    return Reach(
        [name.lstrip(".") for name, enters, _ in triples if not enters],
        [name.lstrip(".") for name, enters, moves in triples if enters and not moves],
    )
