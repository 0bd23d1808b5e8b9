"""Equations of a jaxpr that are evaluated by other means than JAX's."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex
from jaxtyping import Array

Equation: TypeAlias = Any  # `jax.extend.core.JaxprEqn`, which has no static type

CALLS = ("jit", "pjit")


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
