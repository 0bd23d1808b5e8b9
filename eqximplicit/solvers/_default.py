"""The solver of a condition when the user names none."""

from typing import Any

import optimistix as optx

from .._condition import AbstractCondition, FixedPoint, LeastSquares, Minimum
from .auto_fixed_point import AutoFixedPoint
from .auto_least_squares import AutoLeastSquares
from .auto_minimiser import AutoMinimiser
from .auto_root_finder import AutoRootFinder


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
