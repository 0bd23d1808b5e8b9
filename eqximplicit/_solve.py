"""SOLVE: one call of a layer, from its input to its solution."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.core import Tracer

from ._adjoint import AbstractAdjoint, Solve
from ._call import call_host_solver, call_solver
from ._claim import is_rounding
from ._condition import AbstractCondition
from ._entries import all_finite, max_abs
from ._hoist import hoist
from ._iterate import iterate, Outcome, WhileLoop
from ._monitor import Monitor
from ._read import Read, without_arrays
from ._solution import RESULTS, Solution, where_result
from ._state import (
    as_arrays,
    as_state,
    coarse_epsilon,
    is_traceable,
    numbers_as_arrays,
    stop_gradient,
)
from .solvers import AbstractHostSolver


@runtime_checkable
class Layer(Protocol):
    """What a call reads of an `ImplicitFunction`."""

    @property
    def condition(self) -> AbstractCondition[Any, Any]: ...
    @property
    def solver(self) -> Any: ...
    @property
    def adjoint(self) -> AbstractAdjoint: ...
    @property
    def options(self) -> dict[str, Any]: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def has_aux(self) -> bool: ...
    @property
    def residual_tol(self) -> float | None: ...
    @property
    def monitor(self) -> Monitor | None: ...


def is_iterative(solver: object) -> bool:
    return isinstance(solver, optx.AbstractIterativeSolver)


def is_bare(solver: object) -> bool:
    """Whether the solver is run as `solver(y0, args)`, and knows no condition."""
    return not is_iterative(solver) and not isinstance(solver, AbstractHostSolver)


def _is_staged() -> bool:
    """Whether an enclosing `jit` or loop records operations instead of running them."""
    return isinstance(jax.lax.full((), 0), Tracer)


def _run(layer: Layer, solve: Solve, while_loop: WhileLoop) -> Outcome:
    condition, solver, y0, args = solve.condition, solve.solver, solve.y0, solve.args
    if isinstance(solver, AbstractHostSolver):
        return call_host_solver(solver, condition, y0, args)
    if not is_iterative(solver):
        return call_solver(solver, y0, args, layer.has_aux)
    return iterate(
        condition,
        solver,
        y0,
        args,
        options=layer.options,
        max_steps=layer.max_steps,
        while_loop=while_loop,
        monitor=layer.monitor,
        with_inverse=solve.with_inverse,
    )


def _diagnosed(solve: Solve, outcome: Outcome) -> Outcome:
    """The outcome with what a look at its value tells, beyond the solver's report.

    A NaN ends no loop by itself: it looks like success or an exhausted budget.
    """
    result = outcome.result
    unexplained = (result == RESULTS.successful) | (
        result == RESULTS.nonlinear_max_steps_reached
    )
    condition = hoist(solve.condition, outcome.y, solve.args, outcome.aux)
    residual = lambda y: condition.residual(y, solve.args, outcome.aux)
    left = residual(outcome.y)
    norm = max_abs(stop_gradient(left))
    finite = all_finite(outcome.y) & jnp.isfinite(norm)
    result = where_result(unexplained & ~finite, RESULTS.nonfinite, result)
    eps = coarse_epsilon(outcome.y)
    if eps is not None:  # of which the solver has seen nothing
        y, left = stop_gradient((outcome.y, left))
        stuck = result == RESULTS.local_minimum
        stuck = stuck & is_rounding(residual, y, left, eps)
        result = where_result(stuck, RESULTS.unattainable_tolerance, result)
    stats = {**outcome.stats, "residual_norm": norm}
    trusted = outcome.trusted & finite
    return dataclasses.replace(outcome, result=result, trusted=trusted, stats=stats)


def _solve(layer: Layer, y0: Any, args: Any, diagnose: bool) -> Solution[Any, Any]:
    condition, solver = layer.condition, layer.solver
    if not is_bare(solver):
        condition = _with_aux(condition, layer.has_aux)
        y0 = as_state(y0)
        condition = hoist(condition, y0, args)
        # After the hoist: in `fn`, a Python number takes the dtype of its operand.
        condition, args = as_arrays((condition, args))

    def run(solve: Solve, while_loop: WhileLoop) -> Outcome:
        outcome = _run(layer, solve, while_loop)
        return _diagnosed(solve, outcome) if diagnose else outcome

    solve = Solve(condition, solver, y0, args, run)
    outcome = layer.adjoint.differentiable(solve, layer.residual_tol)
    return Solution(outcome.y, outcome.result, outcome.aux, outcome.stats)


def solution_of(layer: Layer, y0: Any, args: Any, diagnose: bool) -> Solution[Any, Any]:
    """Returns the solution, by a program that is kept for the next call if it can be.

    `diagnose` is whether the result is to say what a look at the value tells.
    """
    if not is_iterative(layer.solver) or _is_staged():
        return _solve(layer, y0, args, diagnose)
    if not all(map(is_traceable, jtu.tree_leaves(y0))):
        as_state(y0)  # which says what it is
    # One program for all values. An integer in `args` may be a shape or an exponent.
    y0 = numbers_as_arrays(y0, (int, float, complex))
    args = numbers_as_arrays(args, (float, complex))
    return _solve_kept(layer, y0, args, diagnose, _read_by(layer, args))


def _read_by(layer: Layer, args: Any) -> Read:
    """What the functions of a layer read, apart from the arrays that they are given."""
    rest = jtu.tree_leaves((layer.solver, layer.adjoint, layer.options, args))
    functions = [leaf for leaf in rest if not eqx.is_array(leaf)]
    return Read(without_arrays(layer.condition.fn), functions)


@eqx.filter_jit
def _solve_kept(
    layer: Layer,
    y0: Any,
    args: Any,
    diagnose: bool,
    read: Read,
) -> Solution[Any, Any]:
    solution = _solve(layer, y0, args, diagnose)
    read.keep()  # what the trace itself changed (a counter, a cache) is no news
    return solution


def _with_aux(
    condition: AbstractCondition[Any, Any], has_aux: bool
) -> AbstractCondition[Any, Any]:
    if not has_aux or condition.has_aux:
        return condition
    return dataclasses.replace(condition, has_aux=True)
