"""The solver of a condition when the user names none."""

from typing import Any

import optimistix as optx

from .._condition import AbstractCondition, FixedPoint, LeastSquares, Minimum


def default_solver(
    condition: AbstractCondition[Any, Any],
) -> optx.AbstractIterativeSolver[Any, Any, Any, Any]:
    """The solver that needs no tuning and reports failure honestly."""
    if isinstance(condition, FixedPoint):
        return optx.Newton(rtol=1e-8, atol=1e-8)
    if isinstance(condition, Minimum):
        return optx.BFGS(rtol=1e-8, atol=1e-8)
    if isinstance(condition, LeastSquares):
        return optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    return optx.Newton(rtol=1e-8, atol=1e-8)
