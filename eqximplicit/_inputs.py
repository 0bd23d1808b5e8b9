"""Which inputs the condition ignores, what the guess does, and hidden arrays."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from ._condition import AbstractCondition
from ._derivatives import differences, direction, observed
from ._finding import Finding, number
from ._point import flat, Point, Subject
from ._reach import reach
from ._state import describe
from ._static import REMEDY, static_arrays_in

Vector = np.ndarray[Any, np.dtype[Any]]

# A converged solve forgets its guess up to its tolerance over the step, 1e-5 or so.
_REMEMBERED = 1e-2


class _Inputs(eqx.Module):
    """What the residual may depend on, under the names that the user knows."""

    y: Any
    condition: AbstractCondition[Any, Any]
    args: Any


def independent(point: Point) -> list[Finding]:
    """Findings on leaves that the condition ignores, or from which it is detached."""
    inputs = _Inputs(point.y, point.condition, point.args)
    ignored = reach(point.residual_of, inputs)
    return [
        *(_ignored(name, "does not depend on", "") for name in ignored.unused),
        *(
            _ignored(
                name, "is detached from", " but for `stop_gradient`, integers or tests"
            )
            for name in ignored.detached
        ),
    ]


def _ignored(name: str, how: str, but: str) -> Finding:
    if name == "y" or name.startswith(("y[", "y.")):
        return Finding(
            "error",
            f"The condition {how} an unknown, which it can therefore not determine.",
            f"`{name}`",
            f"its column of `∂F/∂y` is exactly zero{but}",
            "Add the equation that determines it, or take it out of the state.",
        )
    return Finding(
        "warning",
        f"The condition {how} a parameter, so the derivative with respect to it is "
        "exactly zero.",
        f"`{name}`",
        f"`∂F/∂θ` is exactly zero for it{but}",
        "If the solution depends on it, let the condition use it (and detach it "
        "nowhere inside); otherwise ignore this.",
    )


def guess(
    point: Point, project: Callable[[Vector], Vector], random: np.random.Generator
) -> list[Finding]:
    """A finding if the solution moves with the guess, or the guess is a parameter."""
    found = point.subject
    shared = _shared_leaves(found)
    moving, resting = eqx.partition(found.y0, eqx.is_inexact_array)
    if not jtu.tree_leaves(moving):
        return []
    t_y0 = direction(moving, random)

    def solve(y0: Any) -> tuple[Vector, bool]:
        y, ok = observed(found.solve(found.theta, eqx.combine(y0, resting)))
        return project(y), ok

    moved = differences(solve, project(flat(point.y)), moving, t_y0, point.eps)
    size = float(np.linalg.norm(moved.value) / np.linalg.norm(flat(t_y0)))
    if size <= _REMEMBERED and not shared:
        return []
    where = f"`y0`, which shares {shared} with the parameters" if shared else "`y0`"
    return [
        Finding(
            "note" if size <= _REMEMBERED else "warning",
            "The derivative with respect to the guess is defined as zero"
            + ("." if size <= _REMEMBERED else ", but the value moves with the guess."),
            where,
            f"|change of the value| / |change of `y0`| = {number(size)}",
            "Solve to convergence, or make the solution unique; if the guess is a "
            "parameter (few-step meta-learning), use `eqi.UnrolledAdjoint()`, or pull "
            "the solution towards it inside the condition (iMAML).",
        )
    ]


def _shared_leaves(found: Subject) -> str:
    mine = {id(leaf) for leaf in jtu.tree_leaves(found.theta) if eqx.is_array(leaf)}
    names = [
        f"`y0{jtu.keystr(path)}`"
        for path, leaf in jtu.tree_leaves_with_path(found.y0)
        if id(leaf) in mine
    ]
    return ", ".join(names)


def static_arrays(subject: Subject, args: Any) -> list[Finding]:
    """A finding for each input with an array in a static field."""
    found = list[Finding]()
    adjoint = subject.layer.adjoint
    for name, tree in (("args", args), ("y0", subject.y0), ("adjoint", adjoint)):
        for path, leaf in itertools.islice(static_arrays_in(tree, name), 1):
            what = (
                f"The static field `{path}` holds an array, which no derivative, batch "
                "or move would ever reach."
            )
            found.append(Finding("error", what, f"`{path}`", describe(leaf), REMEDY))
    return found
