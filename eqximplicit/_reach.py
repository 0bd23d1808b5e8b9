"""Which inputs of a function its output depends on, read off its jaxpr."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._custom_types import PyTree
from ._state import leaf_name
from ._walk import walk

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


def _needed(jaxpr: Jaxpr, wanted: set[Any], smooth: bool) -> set[Any]:
    """All variables that reach the `wanted` ones; if `smooth`, with a derivative."""
    live = set(wanted)
    for eqn in reversed(jaxpr.eqns):
        outs = [out in live for out in eqn.outvars]
        if not any(outs) or (smooth and _blocks(eqn)):
            continue
        for var, flag in zip(eqn.invars, _inputs(eqn, outs, smooth), strict=True):
            if flag and not isinstance(var, Literal) and (not smooth or _carries(var)):
                live.add(var)
    return live


def _inputs(eqn: Any, outs: list[bool], smooth: bool) -> list[bool]:
    """Which inputs of an equation reach those of its outputs that are marked."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _through_scan(params, outs, smooth)
    if name == "while":
        return _through_while(params, outs, smooth)
    if name == "cond":
        branches = [_through(b.jaxpr, outs, smooth) for b in params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    inner = inner_jaxpr(eqn)
    return [True] * len(eqn.invars) if inner is None else _through(inner, outs, smooth)


def _through(jaxpr: Jaxpr, outs: list[bool], smooth: bool) -> list[bool]:
    ends = zip(jaxpr.outvars, outs, strict=True)
    wanted = {v for v, out in ends if out and not isinstance(v, Literal)}
    live = _needed(jaxpr, wanted, smooth)
    return [var in live for var in jaxpr.invars]


def _through_scan(params: Any, outs: list[bool], smooth: bool) -> list[bool]:
    start, num_carry = params["num_consts"], params["num_carry"]
    body, carry, ys = params["jaxpr"].jaxpr, outs[:num_carry], outs[num_carry:]
    while True:
        ins = _through(body, carry + ys, smooth)
        before, carry = carry, _either(carry, ins[start : start + num_carry])
        if carry == before:
            return ins[:start] + carry + ins[start + num_carry :]


def _through_while(params: Any, outs: list[bool], smooth: bool) -> list[bool]:
    num_test, start = params["cond_nconsts"], params["body_nconsts"]
    # What is asked of the carry decides over all of it, with no derivative.
    asked = _through(params["cond_jaxpr"].jaxpr, [not smooth], smooth)
    body, carry = params["body_jaxpr"].jaxpr, _either(outs, asked[num_test:])
    while True:
        ins = _through(body, carry, smooth)
        before, carry = carry, _either(carry, ins[start:])
        if carry == before:
            return asked[:num_test] + ins[:start] + carry


def _either(a: list[bool], b: list[bool]) -> list[bool]:
    return [x or y for x, y in zip(a, b, strict=True)]


def reach(fn: Callable[[Any], PyTree[Any]], theta: Any) -> Reach:
    """The leaves of `theta` on which `fn(theta)` does not depend, by name.

    So for arrays that its functions captured. Structural: a dependence that is
    numerically zero counts, and so does one in a branch that is not taken.
    """
    moving, resting = eqx.partition(theta, eqx.is_inexact_array)
    closed = jax.make_jaxpr(lambda moving: fn(eqx.combine(moving, resting)))(moving)
    outs = {v for v in closed.jaxpr.outvars if not isinstance(v, Literal)}
    entering, moved = (_needed(closed.jaxpr, outs, smooth) for smooth in (False, True))
    paths = [leaf_name("", path) for path, _ in jtu.tree_leaves_with_path(moving)]
    names = [path.lstrip(".") for path in paths]
    named = list(zip(closed.jaxpr.invars, names, strict=True))
    captured = {id(array): name for name, array in _captured(jtu.tree_leaves(resting))}
    for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        if id(const) in captured:
            named.append((var, f"{captured[id(const)]} (captured by fn)"))
    return Reach(
        [name for var, name in named if var not in entering],
        [name for var, name in named if var in entering and var not in moved],
    )


def _captured(values: list[Any]) -> Iterator[tuple[str, Any]]:
    """The inexact arrays that functions, and those they call, read from outside."""
    for name, value in walk((("", value) for value in values), _read_by):
        if eqx.is_inexact_array(value):
            yield name, value


def _read_by(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    del name
    if callable(value):
        for name, part in _read_from_outside(value).items():
            for path, leaf in _leaves(part):
                yield leaf_name(name, path), leaf


def _leaves(part: Any) -> list[tuple[Any, Any]]:
    with contextlib.suppress(TypeError, ValueError):  # keys without an order
        return jtu.tree_leaves_with_path(part)
    return []


def _read_from_outside(fn: Any) -> dict[str, Any]:
    with contextlib.suppress(TypeError, ValueError):  # no function, or an empty cell
        found = inspect.getclosurevars(inspect.unwrap(fn))
        return {**found.globals, **found.nonlocals}
    return {}
