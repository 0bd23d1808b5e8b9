"""JOIN, for a solver that you already have: give it a derivative by decoration."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeVar

import equinox as eqx

from ._adjoint import ImplicitAdjoint
from ._arguments import Arguments, parameters, signature
from ._condition import AbstractCondition, FixedPoint, Root
from ._custom_types import check_no_class, LinearSolver
from ._function import ImplicitFunction
from ._state import describe, stop_gradient

F = TypeVar("F", bound=Callable[..., Any])


class _OnArguments(eqx.Module):
    """`fn(y, *args, **kwargs)` as the `fn(y, arguments)` that a condition wants.

    `seen` are those of the solver's arguments that `fn` takes.
    """

    fn: Callable[..., Any]
    seen: Callable[[Arguments], Arguments]
    takes_aux: bool = eqx.field(static=True)

    def __call__(self, y: Any, arguments: Arguments, aux: Any = None) -> Any:
        extra = (aux,) if self.takes_aux else ()
        seen = self.seen(arguments)
        return self.fn(y, *extra, *seen.args, **seen.kwargs)


def _on_arguments(
    fn: Callable[..., Any], solver: Callable[..., Any], takes_aux: bool
) -> _OnArguments:
    def seen(arguments: Arguments) -> Arguments:
        return arguments.seen_by(fn, solver, 1 + takes_aux)

    return _OnArguments(fn, seen, takes_aux)


def _with_guess(
    solver: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the initial guess by position."""
    first = next((p.name for p in parameters(solver)), "y0")
    if args:
        return args, kwargs
    if first not in kwargs:
        raise TypeError(
            f"The decorated solver was called without its initial guess. Pass "
            f"`{first}` as the first argument."
        )
    rest = {name: value for name, value in kwargs.items() if name != first}
    return (kwargs[first],), rest


def _chosen(
    argnums: SupportsIndex | Sequence[int] | None, arguments: Arguments
) -> Arguments:
    if argnums is None:
        return arguments
    given = [argnums] if isinstance(argnums, SupportsIndex) else argnums
    chosen = set(map(operator.index, given))
    count = len(arguments.args)
    if not chosen <= set(range(1, count + 1)):
        raise ValueError(_bad_argnums(argnums, arguments))
    args = [
        arg if i in chosen else stop_gradient(arg)
        for i, arg in enumerate(arguments.args, start=1)
    ]
    return Arguments(tuple(args), stop_gradient(arguments.kwargs))


def _bad_argnums(argnums: SupportsIndex | Sequence[int], arguments: Arguments) -> str:
    count, keywords = len(arguments.args), ", ".join(arguments.kwargs)
    between = f"between 1 and {count}" if count else "after the initial guess"
    return (
        f"`argnums={argnums}` must name arguments passed by position {between}; "
        f"this call has {count}. Argument 0 is the initial guess, which has no "
        "derivative."
        + (f" Pass `{keywords}` by position, not by keyword." if keywords else "")
    )


def _decorate(
    condition: AbstractCondition[Any, Arguments],
    fn: _OnArguments,
    solver: F,
    has_aux: bool,
    argnums: SupportsIndex | Sequence[int] | None,
    adjoint: ImplicitAdjoint,
) -> F:
    def call(y0: Any, arguments: Arguments) -> Any:
        return solver(y0, *arguments.args, **arguments.kwargs)

    # Errors name the solver. There is no `__wrapped__`: a module would be taken for a
    # copy of itself in there.
    named: Any = functools.update_wrapper(call, solver, updated=())
    del named.__wrapped__
    named.__signature__ = signature(solver)
    layer = ImplicitFunction(condition, call, adjoint, throw=False, has_aux=has_aux)

    @functools.wraps(solver)
    def solve(*args: Any, **kwargs: Any) -> Any:
        (y0, *rest), kwargs = _with_guess(solver, args, kwargs)
        arguments = _chosen(argnums, Arguments(tuple(rest), kwargs))
        fn.seen(arguments)  # refused before anything is solved
        solution = layer.solve(y0, arguments)
        return (solution.value, solution.aux) if has_aux else solution.value

    return solve  # pyright: ignore[reportReturnType]


def custom_root(
    optimality: Callable[..., Any],
    *,
    has_aux: bool = False,
    takes_aux: bool = False,
    argnums: SupportsIndex | Sequence[int] | None = None,
    linear_solver: LinearSolver | None = None,
    tags: object = frozenset(),
) -> Callable[[F], F]:
    """Returns a decorator that gives a solver the derivative of a root.

    The decorated function is called as before, and returns what it returned before.
    It may be anything that computes: a Python loop, SciPy, another library.

    **Arguments:**

    - `optimality`: `optimality(y, *args, **kwargs)`, zero at the solution, with the
        leaf shapes of `y`; called with the very arguments of the solver, defaults
        included: by name where it knows the solver's name, by position otherwise. What
        it does not take (a tolerance, say) has a zero derivative.
    - `has_aux`: whether the solver returns `(y, aux)`.
    - `takes_aux`: whether the condition is `optimality(y, aux, *args, **kwargs)`.
    - `argnums`: which positional arguments have a derivative, counted as in the call
        (0 is the initial guess, which has none); `None` for all.
    - `linear_solver`: a lineax solver for `∂optimality/∂y`.
    - `tags`: lineax tags of `∂optimality/∂y`.

    **Returns:** a decorator for `solver(y0, *args, **kwargs) -> y` (or `(y, aux)`).

    **Raises:** `TypeError` for a condition that is no function, another kind of linear
    solver, and a method that is no method of an object yet (first argument `self`).

    !!! example

        ```python
        @eqi.custom_root(lambda w, data, l2: jax.grad(loss)(w, data, l2))
        def ridge(w0, data, l2):
            ...
        jax.grad(lambda l2: validation(ridge(w0, data, l2)))(1e-2)
        ```
    """
    _refuse_no_function("optimality", optimality)
    adjoint = _adjoint(linear_solver)

    def decorator(solver: F) -> F:
        _refuse_method("custom_root", solver)
        fn = _on_arguments(optimality, solver, takes_aux)
        condition = Root[Any, Arguments](fn, tags, takes_aux=takes_aux)
        return _decorate(condition, fn, solver, has_aux, argnums, adjoint)

    return decorator


def custom_fixed_point(
    fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    takes_aux: bool = False,
    argnums: SupportsIndex | Sequence[int] | None = None,
    linear_solver: LinearSolver | None = None,
    tags: object = frozenset(),
) -> Callable[[F], F]:
    """Returns a decorator that gives a solver the derivative of a fixed point.

    **Arguments:**

    - `fn`: the map `fn(y, *args, **kwargs)`, which returns `y` at the solution.
    - `has_aux`, `takes_aux`, `argnums`, `linear_solver`: as in
        [`eqximplicit.custom_root`][].
    - `tags`: lineax tags of `I - ∂fn/∂y`.

    **Returns:** a decorator for `solver(y0, *args, **kwargs) -> y` (or `(y, aux)`).

    **Raises:** as [`eqximplicit.custom_root`][].
    """
    _refuse_no_function("fn", fn)
    adjoint = _adjoint(linear_solver)

    def decorator(solver: F) -> F:
        _refuse_method("custom_fixed_point", solver)
        on_arguments = _on_arguments(fn, solver, takes_aux)
        condition = FixedPoint[Any, Arguments](on_arguments, tags, takes_aux=takes_aux)
        return _decorate(condition, on_arguments, solver, has_aux, argnums, adjoint)

    return decorator


def _refuse_no_function(name: str, given: object) -> None:
    check_no_class(name, given)
    if not callable(given):
        raise TypeError(
            f"`{name}` must be a function of the solution and the solver's arguments; "
            f"got {describe(given)}. Pass the function itself."
        )


def _refuse_method(decorator: str, solver: Callable[..., Any]) -> None:
    """Refuses a method that is no method of an object yet."""
    if [p.name for p in parameters(solver)][:1] == ["self"]:
        name = getattr(solver, "__qualname__", "the solver")
        raise TypeError(
            f"`{decorator}` decorates `{name}`, whose first argument is `self` and not "
            f"the initial guess. Decorate the method of an object, "
            f"`{decorator}(...)(module.{name.rpartition('.')[2]})`, or derive the "
            "class from `eqi.AbstractImplicitModule`."
        )


def _adjoint(linear_solver: LinearSolver | None) -> ImplicitAdjoint:
    if linear_solver is None:
        return ImplicitAdjoint()
    return ImplicitAdjoint(linear_solver=linear_solver)
