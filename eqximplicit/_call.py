"""Running a solver that keeps its own loop: a host solver, or a bare callable."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer

from ._captured import captured_tracers
from ._condition import AbstractCondition, FixedPoint, LeastSquares, Minimum
from ._iterate import Outcome
from ._solution import is_successful, RESULTS
from ._state import (
    all_finite,
    as_state,
    check_same_shapes,
    describe,
    leaf_name,
)
from .solvers import AbstractHostSolver

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.UnexpectedTracerError,
)


def _host_fn(
    solver: AbstractHostSolver, condition: AbstractCondition[Any, Any]
) -> Callable[[Any, Any], Any]:
    fits = {
        "root": not isinstance(condition, (Minimum, LeastSquares)),
        "fixed_point": isinstance(condition, FixedPoint),
        "minimise": isinstance(condition, Minimum),
        "any": True,
    }
    if not fits[solver.kind]:
        raise TypeError(
            f"The solver `{type(solver).__name__}` cannot solve a "
            f"`{type(condition).__name__}`: it is for kind `{solver.kind}`. Use a host "
            "solver of the condition's kind."
        )
    if solver.kind == "root":
        return condition.residual
    return lambda y, args: condition.call(y, args)[0]


def call_host_solver(
    solver: AbstractHostSolver,
    condition: AbstractCondition[Any, Any],
    y0: Any,
    args: Any,
) -> Outcome:
    """The outcome of a host solver on a hoisted condition.

    **Raises:** `TypeError` if the solver is of the wrong kind for the condition.
    """
    y, result, stats = solver.solve(_host_fn(solver, condition), y0, args)
    aux = condition.call(y, args)[1]
    return Outcome(y, aux, result, jnp.asarray(is_successful(result)), stats)


class Arguments(eqx.Module):
    """What a decorated solver is called with, after its initial guess."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def by_name(self, solver: Callable[..., Any]) -> dict[str, Any]:
        """The arguments by the names that `solver` gives them, or by their position."""
        _, *names = _positional(solver) or ["y0"]
        names += [f"argument {i + 1}" for i in range(len(names), len(self.args))]
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def _positional(solver: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(solver).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return []
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in parameters if p.kind in kinds]


def by_name(solver: Any, args: Any) -> dict[str, Any]:
    """The parts of `args` by the names under which the caller has passed them."""
    return args.by_name(solver) if isinstance(args, Arguments) else {"args": args}


def _traced_inputs(solver: Callable[..., Any], y0: Any, args: Any) -> list[str]:
    inputs = [
        (leaf_name(root, path), leaf)
        for root, tree in [("y0", y0), *by_name(solver, args).items()]
        for path, leaf in jtu.tree_leaves_with_path(tree)
        if isinstance(leaf, Tracer)
    ]
    captured = [
        (f"{name} (captured by the solver)", leaf)
        for name, leaf in captured_tracers(solver)
    ]
    return [f"`{name}`, {describe(leaf)}" for name, leaf in inputs + captured]


def _not_traceable(
    solver: Callable[..., Any], y0: Any, args: Any, error: Exception
) -> ValueError:
    name = getattr(solver, "__name__", type(solver).__name__)
    traced = "; ".join(_traced_inputs(solver, y0, args)) or "none found"
    return ValueError(
        f"The solver `{name}` asked for the value of a traced array, which has none "
        f"yet. Traced here: {traced}. Call it outside `jit` and `vmap`, with such "
        "arrays as arguments, or wrap the solver in `eqi.HostSolver`. JAX said: "
        f"{str(error).splitlines()[0]}"
    )


def _split(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(
            "`has_aux=True` needs a solver that returns a pair `(y, aux)`; got "
            f"{jtu.tree_structure(out)}. Return a pair or drop `has_aux`."
        )
    return out


def call_solver(
    solver: Callable[[Any, Any], Any], y0: Any, args: Any, has_aux: bool
) -> Outcome:
    """The outcome of `solver(y0, args)`, taken for a solution if it is finite.

    **Raises:** `ValueError` if the solver needs values of traced arrays, or returns
    something that is no state or not shaped as `y0`.
    """
    try:
        out = solver(y0, args)
    except _NOT_TRACEABLE as error:
        raise _not_traceable(solver, y0, args, error) from error
    y, aux = _split(out, has_aux)
    y = as_state(y)
    if jtu.tree_leaves(y0):
        check_same_shapes("The solver's solution", y, as_state(y0))
    unknown = {"num_steps": jnp.full((), -1)}
    return Outcome(y, aux, RESULTS.successful, all_finite(y), unknown)
