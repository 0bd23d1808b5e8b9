"""One line for a module: its name, and what was chosen in it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import lineax as lx
import optimistix as optx

# Parts that are choices of the same kind as what holds them.
_SHOWN = (lx.AbstractLinearSolver, optx.AbstractIterativeSolver)


def brief(x: Any) -> str:
    """The name of a function; the name of a module, with its own numbers and solvers.

    Fields at their default are left out, and so are arrays, functions and the like:
    `Newton(rtol=1e-08, atol=1e-08)`, `ImplicitAdjoint(Neumann(num_terms=1))`.
    """
    if isinstance(x, eqx.Module):
        return f"{type(x).__name__}({', '.join(_choices(x))})"
    return getattr(x, "__name__", type(x).__name__)


def brief_condition(condition: Any) -> str:
    """The name of a condition and of its function, `FixedPoint(Cell)`."""
    fn = condition.fn
    return f"{type(condition).__name__}({getattr(fn, '__name__', type(fn).__name__)})"


def _choices(module: eqx.Module) -> Iterator[str]:
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if value is field.default:
            continue
        if isinstance(value, _SHOWN):
            yield brief(value)
        elif type(value) in (int, float) and value != field.default:
            yield f"{field.name}={value}"
