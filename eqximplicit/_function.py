"""JOIN: a condition, a solver and an adjoint in one differentiable Equinox module."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.core import Tracer

from ._adjoint import AbstractAdjoint, ImplicitAdjoint, Solve
from ._brief import brief, brief_condition
from ._call import by_name, call_host_solver, call_solver
from ._claim import is_rounding
from ._condition import AbstractCondition
from ._custom_types import check_instance, check_no_class
from ._entries import all_finite, max_abs
from ._failure import refuse_failure
from ._hoist import hoist
from ._iterate import iterate, Outcome, WhileLoop
from ._monitor import Monitor
from ._read import Read, without_arrays
from ._reverse_only import reverse_only_explained
from ._solution import Aux, RESULTS, Solution, where_result
from ._state import (
    as_arrays,
    as_state,
    coarse_epsilon,
    is_traceable,
    numbers_as_arrays,
    stop_gradient,
)
from ._static import refuse_static_arrays
from .solvers import AbstractHostSolver
from .solvers._default import default_solver
from .solvers._verdict import check_window_fits

Y = TypeVar("Y")
Args = TypeVar("Args")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as _TypeVar  # one with a default

    Params = _TypeVar("Params", default=Any)
else:
    Params = TypeVar("Params")


def _identity(fn: Any) -> Any:
    return fn


class ImplicitFunction(eqx.Module, Generic[Y, Args, Aux, Params]):
    r"""The solution of a condition, as a differentiable function of its parameters.

    $$y^\star(\theta) \;:\; F(y^\star, \theta) = 0$$

    **Arguments:**

    - `condition`: what defines the solution: `Root(fn)`, `FixedPoint(fn)`, ... An eager
        call notices a change of what `fn` reads (captured arrays, globals, attributes,
        but not by a computed name, by `__repr__` or `__hash__`, or in installed code
        alone) and compiles anew; what changes often belongs into `args`.
    - `solver`: how it is found: an optimistix solver, a host solver, or any callable
        `(y0, args) -> y`, traceable by JAX or not. By default, one for the condition.
    - `adjoint`: how it is differentiated; `ImplicitAdjoint()` by default.
    - `where`: which part of `fn` is "the parameters", as in `eqx.tree_at`. By default
        all of `fn`.
    - `y0`: the initial guess of a layer that is called without one.
    - `max_steps`: the largest number of steps of an optimistix solver; `None` for no
        limit. A callable keeps its own count.
    - `throw`: whether a failed solve raises. If not, `Solution.result` tells, and the
        derivative of a failed solve is NaN either way.
    - `has_aux`: whether there is auxiliary output: `fn` returns `(out, aux)` under an
        optimistix solver, a callable solver returns `(y, aux)`.
    - `residual_tol`: the largest residual (largest absolute entry, dimensionless) at
        which the solution counts as one. `None` leaves the judgement to the solver; a
        callable has none to give.
    - `options`: run-time options of an optimistix solver.
    - `monitor`: an [`eqximplicit.Monitor`][] of an optimistix solver, for a history of
        the residual or a progress bar.

    !!! example

        ```python
        layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), where=lambda fn: fn.weight)
        y = layer(y0, args)
        grads = eqx.filter_grad(lambda layer: loss(layer(y0, args)))(layer)
        ```
    """

    condition: AbstractCondition[Y, Args]
    solver: Any
    adjoint: AbstractAdjoint
    y0: Y | None
    options: dict[str, Any]
    where: Callable[[Any], Params] = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)
    residual_tol: float | None = eqx.field(static=True)
    monitor: Monitor | None = None

    def __init__(
        self,
        condition: AbstractCondition[Y, Args],
        solver: Any = None,
        adjoint: AbstractAdjoint | None = None,
        *,
        where: Callable[[Any], Params] = _identity,
        y0: Y | None = None,
        max_steps: int | None = 512,
        throw: bool = True,
        has_aux: bool = False,
        residual_tol: float | None = None,
        options: dict[str, Any] | None = None,
        monitor: Monitor | None = None,
    ):
        # Before a default solver is chosen for it.
        check_instance("condition", condition, AbstractCondition, _CONDITION)
        self.condition = condition
        self.solver = default_solver(condition) if solver is None else solver
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        self.where = where
        self.y0 = y0
        self.max_steps = max_steps
        self.throw = throw
        self.has_aux = has_aux
        self.residual_tol = residual_tol
        self.options = {} if options is None else options
        self.monitor = monitor

    def __check_init__(self) -> None:
        check_instance("adjoint", self.adjoint, AbstractAdjoint, _ADJOINT)
        check_no_class("solver", self.solver)
        if not callable(self.solver) and _is_bare(self.solver):
            raise TypeError(
                "`solver` must be an optimistix solver, a host solver or a callable "
                f"`(y0, args) -> y`; got {self.solver!r}."
            )
        if self.residual_tol is not None and not self.residual_tol >= 0:
            raise ValueError(f"`residual_tol` must be >= 0; got {self.residual_tol}.")
        if self.max_steps is not None and not _is_count(self.max_steps):
            raise ValueError(
                "`max_steps` must be >= 0 and an integer, or `None` for no limit; got "
                f"{self.max_steps!r}."
            )
        if self.condition.takes_aux and not _is_bare(self.solver):
            raise ValueError(
                "A condition with `takes_aux=True` needs a solver that is a callable "
                f"returning `(y, aux)`; got `{type(self.solver).__name__}`."
            )
        if self.condition.takes_aux and not self.has_aux:
            raise ValueError(
                "A condition with `takes_aux=True` takes the auxiliary output of the "
                "solver, of which `has_aux=False` says that there is none. Return "
                "`(y, aux)` from the solver, and pass `has_aux=True`."
            )
        if self.monitor is not None and not _is_iterative(self.solver):
            raise ValueError(
                "`monitor` watches the steps of an optimistix solver, and those of "
                f"`{type(self.solver).__name__}` cannot be seen. Leave it out."
            )
        if _is_iterative(self.solver):
            check_window_fits(self.solver, self.max_steps)
        refuse_static_arrays(self.condition, "condition")
        refuse_static_arrays(self.solver, "solver")

    def __repr__(self) -> str:
        """Returns condition, solver and adjoint, and settings that are no defaults.

        `eqx.tree_pformat(layer)` shows everything, the shapes of parameters too.
        """
        parts = [brief_condition(self.condition), brief(self.solver)]
        parts += [brief(self.adjoint), *_settings(self)]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def params(self) -> Params:
        """The parameters: the part of the condition's function that `where` selects."""
        return self.where(self.condition.fn)

    def with_params(self, params: Params) -> "ImplicitFunction[Y, Args, Aux, Params]":
        """Returns the same layer with other parameters (`eqx.tree_at` with `where`)."""
        return eqx.tree_at(lambda layer: layer.where(layer.condition.fn), self, params)

    def __call__(self, y0: Y | None = None, args: Args | None = None) -> Y:
        """Returns the solution, differentiable in the layer and in `args`.

        **Arguments:**

        - `y0`: the initial guess, any pytree of numbers and arrays; integers are
            promoted. Its derivative is zero. May be left out if the layer has one.
        - `args`: the second argument of `fn(y, args)`, any pytree.

        **Returns:** the solution, structured and shaped as `y0`.

        **Raises:** as `solve`.
        """
        # Where nothing can raise, nobody reads a diagnosis, and none is made.
        diagnose = self.throw or self.residual_tol is not None
        return self._solve(y0, args, diagnose).value

    def solve(self, y0: Y | None = None, args: Args | None = None) -> Solution[Y, Aux]:
        """Returns the solution together with how the solve went.

        **Arguments:** as for the call.

        **Returns:** a [`eqximplicit.Solution`][], whose `value` is differentiable.

        **Raises:** `ValueError` or `TypeError` at trace time for a function, state or
        solver that do not fit; [`eqximplicit.SolveError`][] if the solve fails and
            `throw` is set.
        """
        return self._solve(y0, args, diagnose=True)

    def _solve(
        self, y0: Y | None, args: Args | None, diagnose: bool
    ) -> Solution[Y, Aux]:
        guess = self.y0 if y0 is None else y0
        if guess is None and not _is_bare(self.solver):
            raise ValueError(
                "No initial guess: call `layer(y0, args)`, or give the layer one with "
                "`ImplicitFunction(..., y0=...)`."
            )
        refuse_static_arrays(guess, "y0")
        for name, part in by_name(self.solver, args).items():
            refuse_static_arrays(part, name)
        compiled = _is_iterative(self.solver) and not _is_staged()
        solve = _solve_compiled if compiled else _solve
        with reverse_only_explained():
            solution = solve(self, guess, args, diagnose)
        return refuse_failure(solution) if self.throw else solution


_CONDITION = "what is solved, `eqi.Root(fn)` or `eqi.FixedPoint(fn)` say"
_ADJOINT = (
    "`eqi.ImplicitAdjoint(linear_solver)` or `eqi.UnrolledAdjoint()`, for which no "
    "adjoint of optimistix and no linear solver can stand in"
)


def _settings(layer: ImplicitFunction[Any, Any, Any, Any]) -> list[str]:
    usual = {"max_steps": 512, "throw": True, "has_aux": False, "residual_tol": None}
    given = {name: getattr(layer, name) for name in usual}
    return [f"{name}={value}" for name, value in given.items() if value != usual[name]]


def _is_iterative(solver: object) -> bool:
    return isinstance(solver, optx.AbstractIterativeSolver)


def _is_bare(solver: object) -> bool:
    """Whether the solver is run as `solver(y0, args)`, and knows no condition."""
    return not _is_iterative(solver) and not isinstance(solver, AbstractHostSolver)


def _is_count(number: Any) -> bool:
    integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return integer and int(number) >= 0


def _is_staged() -> bool:
    """Whether an enclosing `jit` or loop records operations instead of running them."""
    return isinstance(jax.lax.full((), 0), Tracer)


def _run(
    layer: ImplicitFunction[Any, Any, Any, Any], solve: Solve, while_loop: WhileLoop
) -> Outcome:
    condition, solver, y0, args = solve.condition, solve.solver, solve.y0, solve.args
    if isinstance(solver, AbstractHostSolver):
        return call_host_solver(solver, condition, y0, args)
    if not _is_iterative(solver):
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


def _solve(
    layer: ImplicitFunction[Any, Any, Any, Any], y0: Any, args: Any, diagnose: bool
) -> Solution[Any, Any]:
    condition, solver = layer.condition, layer.solver
    if not _is_bare(solver):
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


def _solve_compiled(
    layer: ImplicitFunction[Any, Any, Any, Any], y0: Any, args: Any, diagnose: bool
) -> Solution[Any, Any]:
    """The solve, compiled and kept for the next call."""
    if not all(map(is_traceable, jtu.tree_leaves(y0))):
        as_state(y0)  # which says what it is
    # One program for all values. An integer in `args` may be a shape or an exponent.
    y0 = numbers_as_arrays(y0, (int, float, complex))
    args = numbers_as_arrays(args, (float, complex))
    return _solve_kept(layer, y0, args, diagnose, _read_by(layer, args))


def _read_by(layer: ImplicitFunction[Any, Any, Any, Any], args: Any) -> Read:
    """What the functions of a layer read, apart from the arrays that they are given."""
    rest = jtu.tree_leaves((layer.solver, layer.adjoint, layer.options, args))
    functions = [leaf for leaf in rest if not eqx.is_array(leaf)]
    return Read(without_arrays(layer.condition.fn), functions)


@eqx.filter_jit
def _solve_kept(
    layer: ImplicitFunction[Any, Any, Any, Any],
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
