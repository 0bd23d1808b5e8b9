"""JOIN: a condition, a solver and an adjoint in one differentiable Equinox module."""

from collections.abc import Callable
from typing import Any, Generic, TYPE_CHECKING, TypeVar

import equinox as eqx
import numpy as np

from ._adjoint import AbstractAdjoint, ImplicitAdjoint
from ._brief import brief, brief_condition
from ._call import by_name
from ._condition import AbstractCondition
from ._custom_types import check_instance, check_no_class
from ._failure import refuse_failure
from ._monitor import Monitor
from ._reverse_only import reverse_only_explained
from ._solution import Aux, Solution
from ._solve import is_bare, is_iterative, solution_of
from ._static import refuse_static_arrays
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
        if not callable(self.solver) and is_bare(self.solver):
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
        if self.condition.takes_aux and not is_bare(self.solver):
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
        if self.monitor is not None and not is_iterative(self.solver):
            raise ValueError(
                "`monitor` watches the steps of an optimistix solver, and those of "
                f"`{type(self.solver).__name__}` cannot be seen. Leave it out."
            )
        if is_iterative(self.solver):
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
        if guess is None and not is_bare(self.solver):
            raise ValueError(
                "No initial guess: call `layer(y0, args)`, or give the layer one with "
                "`ImplicitFunction(..., y0=...)`."
            )
        refuse_static_arrays(guess, "y0")
        for name, part in by_name(self.solver, args).items():
            refuse_static_arrays(part, name)
        with reverse_only_explained():
            solution = solution_of(self, guess, args, diagnose)
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


def _is_count(number: Any) -> bool:
    integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return integer and int(number) >= 0
