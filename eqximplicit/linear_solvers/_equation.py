"""Equations of a jaxpr that are evaluated by other means than JAX's."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax.extend.core as jex
from jaxtyping import Array

Equation: TypeAlias = Any  # `jax.extend.core.JaxprEqn`, which has no static type

T = TypeVar("T")
CALLS = ("jit", "pjit")


def evaluated(
    jaxpr: jex.Jaxpr,
    consts: Sequence[T],
    args: Sequence[T],
    step: Callable[[Equation, list[T]], Sequence[T]],
    literal: Callable[[Any], T],
) -> list[T]:
    """What `step` makes of each equation in turn, up to the results of `jaxpr`.

    `literal` is given an atom that is no variable, and returns its value.
    """
    env: dict[Any, T] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> T:
        return literal(atom) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = step(eqn, list(map(read, eqn.invars)))
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(map(read, jaxpr.outvars))


def variables(eqn: Equation, values: Sequence[Any]) -> dict[Any, Any]:
    """The variables that an equation reads, each once, and their values."""
    pairs = zip(eqn.invars, values, strict=True)
    return {var: x for var, x in pairs if not isinstance(var, jex.Literal)}


def as_function(eqn: Equation, read: Sequence[Any]) -> Callable[..., list[Array]]:
    """The equation as a function of the variables that it reads."""
    names = ("",) * len(read), ("",) * len(eqn.outvars)
    info = jex.DebugInfo("equation", eqn.primitive.name, *names)
    alone = jex.Jaxpr((), list(read), eqn.outvars, [eqn], eqn.effects, info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))
