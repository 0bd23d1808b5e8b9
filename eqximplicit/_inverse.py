"""The inverse of `∂F/∂y` that a solver has at its end, as it has learnt or kept it."""

from typing import Any

import jax
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array

from ._condition import AbstractCondition, Minimum
from ._custom_types import PyTree
from .solvers import Broyden


def inverse_of(
    solver: Any, condition: AbstractCondition[Any, Any], state: Any, y: PyTree[Array]
) -> lx.AbstractLinearOperator:
    """It maps residuals, in the real form of the state `y`, to steps.

    **Raises:** `ValueError` if the solver has none.
    """
    if isinstance(solver, Broyden):
        return _as_operator(state.inverse.mv, y)
    if isinstance(solver, optx.Chord):
        return _as_operator(lambda r: _factorised(solver, state, r), y)
    hessian_inverse = getattr(getattr(state, "f_info", None), "hessian_inv", None)
    if isinstance(condition, Minimum) and hessian_inverse is not None:
        return _as_operator(hessian_inverse.mv, y)
    raise ValueError(
        f"`ImplicitAdjoint(reuse=True)` needs a solver that ends with an inverse of "
        f"`∂F/∂y`, and `{type(solver).__name__}` has none for a "
        f"`{type(condition).__name__}`. Use `eqi.Broyden` or `optx.Chord` for a root "
        "or a fixed point, `optx.BFGS` for a minimum, or leave out `reuse`."
    )


def _as_operator(mv: Any, y: PyTree[Array]) -> lx.AbstractLinearOperator:
    return lx.FunctionLinearOperator(mv, jax.eval_shape(lambda: y))


def _factorised(solver: Any, state: Any, r: PyTree[Array]) -> PyTree[Array]:
    """The solution by the factors with which `Chord` has made all its steps."""
    jac, factors = state.linear_state
    structure = jtu.tree_structure(jac.out_structure())
    vector = jtu.tree_unflatten(structure, jtu.tree_leaves(r))
    return solver.linear_solver.compute(factors, vector, {})[0]
