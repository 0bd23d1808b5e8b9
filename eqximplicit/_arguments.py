"""The arguments of a decorated solver, for the solver and for its condition alike.

A solver may be called by position or by name, and leave arguments to their defaults.
Its condition wants the same values, and may have other names and defaults for them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def signature(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function; an empty one if it does not tell (a builtin)."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return inspect.Signature()


def parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function; none if it does not tell."""
    return list(signature(fn).parameters.values())


class Arguments(eqx.Module):
    """What a decorated solver is called with, after its initial guess."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def by_name(self, solver: Callable[..., Any]) -> dict[str, Any]:
        """The arguments by the names that `solver` gives them, or by their position."""
        names = [p.name for p in parameters(solver) if p.kind in _POSITIONAL][1:]
        names += [f"argument {i + 1}" for i in range(len(names), len(self.args))]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    def completed(
        self, solver: Callable[..., Any], condition: Callable[..., Any], skipped: int
    ) -> "Arguments":
        """The same call of `solver`, in a form that `condition` takes as well.

        The solver's defaults are filled in where the condition has that parameter, or
        needs one in that place; what was passed under a name that the condition does
        not know is passed by position. `condition` takes `skipped` arguments before.
        """
        own = parameters(solver)
        takes = _Takes(parameters(condition)[skipped:], {p.name for p in own})
        args, kwargs = list(self.args), dict(self.kwargs)
        waiting = list[str]()  # passed by name so far, and could be by position
        later = [p for p in own if p.kind in _POSITIONAL][1 + len(args) :]
        later += [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for parameter in later:
            name, given = parameter.name, parameter.name in self.kwargs
            if not given and parameter.default is inspect.Parameter.empty:
                continue  # the solver will miss it
            value = kwargs.get(name, parameter.default)
            positional = parameter.kind in _POSITIONAL
            if parameter.kind in _NAMED and takes.name(name):
                kwargs[name] = value
                waiting += [name] if positional else []
            elif positional and takes.place(len(args) + len(waiting), name, given):
                args += [*(kwargs.pop(earlier) for earlier in waiting), value]
                kwargs.pop(name, None)
                waiting = []
        return Arguments(tuple(args), kwargs)


class _Takes:
    """What a function takes, by name and by position, of a solver's arguments."""

    def __init__(self, given: list[inspect.Parameter], solver: set[str]) -> None:
        kinds = {p.kind for p in given}
        self.names = {p.name for p in given if p.kind in _NAMED}
        self.any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self.places = [p for p in given if p.kind in _POSITIONAL]
        self.any_place = inspect.Parameter.VAR_POSITIONAL in kinds
        self.solver = solver

    def name(self, name: str) -> bool:
        return name in self.names or self.any_name

    def place(self, index: int, name: str, given: bool) -> bool:
        """Whether it takes one more; of what is not `given`, only what it needs.

        A place whose name the solver knows too is for the argument of that `name`.
        """
        if index >= len(self.places):
            return given and self.any_place
        place = self.places[index]
        if place.name in self.solver:
            return place.name == name
        return given or place.default is inspect.Parameter.empty
