"""The solver of a condition when the user names none, and its tolerance if neither."""

import dataclasses
from typing import Any, cast, TypeVar

import optimistix as optx

from .._condition import AbstractCondition, FixedPoint, LeastSquares, Minimum
from .._state import coarse_epsilon, real_dtype
from ._verdict import or_default
from .auto_fixed_point import AutoFixedPoint
from .auto_least_squares import AutoLeastSquares
from .auto_minimiser import AutoMinimiser
from .auto_root_finder import AutoRootFinder, default_atol

_Solver = TypeVar("_Solver")
_OF_OURS = AutoFixedPoint, AutoLeastSquares, AutoMinimiser, AutoRootFinder
# What is left of a residual or a gradient in half precision, in epsilons.
ROUNDINGS = 8.0


def default_solver(
    condition: AbstractCondition[Any, Any],
) -> optx.AbstractIterativeSolver[Any, Any, Any, Any]:
    """The solver that needs no tuning and reports failure honestly."""
    if isinstance(condition, FixedPoint):
        return AutoFixedPoint()
    if isinstance(condition, Minimum):
        return AutoMinimiser()
    if isinstance(condition, LeastSquares):
        return AutoLeastSquares()
    return AutoRootFinder()


def with_tolerances(solver: _Solver, y: Any) -> _Solver:
    """The solver with its default tolerances, for a state like `y`, as numbers."""
    default = or_default(None, y)
    if isinstance(solver, AutoRootFinder):
        default = default_atol(real_dtype(y))
    names = [f.name for f in dataclasses.fields(cast(Any, solver))]
    tolerances = [name for name in ("rtol", "atol") if name in names]
    unset = [name for name in tolerances if getattr(solver, name) is None]
    if not unset:
        return solver
    return dataclasses.replace(cast(Any, solver), **dict.fromkeys(unset, default))


def fitted(solver: _Solver, y: Any) -> _Solver:
    """The solver, its tolerances by default those of the coarsest leaf of a state.

    It is solved in its real form, in which the rounding of that leaf is not seen.
    """
    eps = coarse_epsilon(y)
    if eps is None or not isinstance(solver, _OF_OURS):
        return solver
    names = [name for name in ("rtol", "atol") if getattr(solver, name) is None]
    return dataclasses.replace(solver, **dict.fromkeys(names, ROUNDINGS * eps))
