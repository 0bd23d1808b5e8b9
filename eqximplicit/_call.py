"""Running a solver that keeps its own loop: a host solver, or a bare callable."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer

from ._arguments import Arguments
from ._captured import captured_tracers
from ._condition import AbstractCondition, FixedPoint, LeastSquares, Minimum
from ._entries import all_finite
from ._iterate import Outcome
from ._pair import check_no_pair, split_pair
from ._solution import is_successful, RESULTS
from ._state import as_state, check_same_shapes, describe, leaf_name
from .solvers import AbstractHostSolver

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.UnexpectedTracerError,
)

# Of what a solver has returned.
_RETURN = "Return numbers and arrays alone: of a SciPy `OptimizeResult`, its `x`."


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
        f"yet. Traced here: {traced}. Pass such arrays in `args`, or make the object "
        "that holds them an `eqx.Module`; under `jit` and `vmap`, also wrap the solver "
        f"in `eqi.HostSolver`. JAX said: {str(error).splitlines()[0]}"
    )


def _check_solution(out: Any, y0: Any, has_aux: bool) -> None:
    """Refuses what is no state, or not shaped as the guess, if that is a state."""
    guess = as_state(y0) if jtu.tree_leaves(y0) else None

    def check(out: Any) -> None:
        y = as_state(out, "out", _RETURN)
        if guess is not None:
            check_same_shapes("The solver's solution", y, guess)

    if has_aux:
        check(out)
    else:
        check_no_pair(check, out, "solver")


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
    y, aux = split_pair(out, "solver", "(y, aux)") if has_aux else (out, None)
    _check_solution(y, y0, has_aux)
    y = as_state(y, "out", _RETURN)
    unknown = {"num_steps": jnp.full((), -1)}
    return Outcome(y, aux, RESULTS.successful, all_finite(y), unknown)
