"""The arguments of a decorated solver, for the solver and for its condition alike.

A solver may be called by position or by name, and leave arguments to their defaults.
Its condition wants the same values, and may have other names and defaults for them. It
need not take all: a tolerance is for the solver alone.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


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

    def seen_by(
        self, condition: Callable[..., Any], solver: Callable[..., Any], skipped: int
    ) -> "Arguments":
        """The same call of `solver`, as far as `condition` takes part in it.

        What has the name of a parameter of the condition goes there; the rest fills, in
        order, the places whose names the solver does not know. The solver's defaults
        are filled in where the condition has that parameter, or needs one in that
        place. `condition` takes `skipped` arguments before.

        **Raises:** `TypeError` if the condition needs an argument that is not there.
        """
        seen = _Seen(condition, skipped, {p.name for p in parameters(solver)})
        for argument in self._in_order(parameters(solver)):
            seen.take(argument)
        if missing := seen.missing():
            name = getattr(solver, "__name__", type(solver).__name__)
            raise TypeError(
                f"The condition needs `{', '.join(missing)}`, which this call of "
                f"`{name}` does not have. Pass it to the solver, or give it a default "
                "in the condition."
            )
        return seen.arguments()

    def _in_order(self, own: list[inspect.Parameter]) -> list["_Argument"]:
        """The arguments in the order of the solver's own parameters, defaults too."""
        places = [p.name for p in own if p.kind in _POSITIONAL][1:]
        names = places + [p.name for p in own if p.kind is p.KEYWORD_ONLY]
        unnamed = [None] * (len(self.args) - len(places))
        found = [
            _Argument(name, value, place=True, given=True)
            for name, value in zip([*places, *unnamed], self.args, strict=False)
        ]
        defaults = {p.name: p.default for p in own if p.default is not p.empty}
        for name in names[len(self.args) :]:
            if name in self.kwargs or name in defaults:
                value = self.kwargs.get(name, defaults.get(name))
                given = name in self.kwargs
                found.append(_Argument(name, value, name in places, given))
        further = {k: v for k, v in self.kwargs.items() if k not in names}
        return found + [_Argument(k, v, False, True) for k, v in further.items()]


class _Argument(NamedTuple):
    """An argument of a solver: whether it has a place, and was given by the caller."""

    name: str | None
    value: Any
    place: bool
    given: bool


class _Seen:
    """What a condition takes of a solver's arguments, one after the other."""

    def __init__(
        self, condition: Callable[..., Any], skipped: int, known: set[str]
    ) -> None:
        own = parameters(condition) or parameters(_anything)
        places = [p for p in own if p.kind in _POSITIONAL]
        self.before = {p.name for p in places[:skipped]}
        self.places = places[skipped:]
        self.named = self.places + [p for p in own if p.kind is p.KEYWORD_ONLY]
        self.free = iter([p for p in self.places if p.name not in known])
        kinds = {p.kind for p in own}
        self.any_place = inspect.Parameter.VAR_POSITIONAL in kinds
        self.any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self.bound = dict[str, Any]()
        self.rest = list[Any]()

    def take(self, argument: _Argument) -> None:
        """Puts the argument where it belongs; of no use to the condition, nowhere."""
        name, value, given = argument.name, argument.value, argument.given
        if name in {p.name for p in self.named}:
            self.bound[str(name)] = value
            return
        place = next(self.free, None) if argument.place else None
        if place is not None and (given or place.default is place.empty):
            self.bound[place.name] = value
        elif argument.place and given and self.any_place:
            self.rest.append(value)
        elif name is not None and name not in self.before and self.any_name:
            self.bound[name] = value

    def missing(self) -> list[str]:
        """The parameters that need an argument and have none."""
        needed = [p.name for p in self.named if p.default is p.empty]
        return [name for name in needed if name not in self.bound]

    def arguments(self) -> Arguments:
        """The call; what comes after a place that is left out is passed by name."""
        gaps = [i for i, p in enumerate(self.places) if p.name not in self.bound]
        end = len(self.places) if self.rest or not gaps else gaps[0]
        kwargs = dict(self.bound)
        args = [kwargs.pop(p.name, p.default) for p in self.places[:end]]
        return Arguments((*args, *self.rest), kwargs)


def _anything(*args: Any, **kwargs: Any) -> None:
    """Stands for a function that does not tell its parameters."""
    del args, kwargs
