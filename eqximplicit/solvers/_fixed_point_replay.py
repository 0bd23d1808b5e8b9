"""How the default fixed-point solver goes on where its opening ends: by replaying it.

The first steps of the solver take the opening's last evaluations in place of their own,
so it goes on as if it had taken these steps itself, and no state of it has to be made
up. The evaluations are free: they have been counted.
"""

from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._custom_types import PyTree
from .._solution import Y
from . import _vector_space as vs
from ._fixed_point_opening import Iterates
from ._opening import Fn

FAR = 10.0  # a residual this much larger than the one before is no place to go on from
LONGEST = 4.0  # of Aitken's step, in residuals


class Evaluation(eqx.Module, Generic[Y]):
    """A point, the residual there, and the auxiliary output of the function."""

    y: Y
    residual: Y
    aux: Any


class Replay(eqx.Module):
    """The last evaluations of an opening, and how many of them are yet to come.

    `alone` is whether there is but the last one; the next point is then the `trial`.
    """

    first: Evaluation[Any]
    last: Evaluation[Any]
    trial: Any
    alone: Bool[Array, ""]
    left: Int[Array, ""]

    @property
    def now(self) -> Evaluation[Any]:
        return vs.select(self.left == 2, self.first, self.last)


def replay(seen: Iterates) -> Replay:
    """The replay of an opening: all of one of two evaluations, else the last one.

    Nothing is replayed that is no place to go on from.
    """
    progress, start = seen.progress, seen.start
    first = Evaluation(start, vs.minus(seen.y, start), seen.last_aux)
    last = Evaluation(seen.y, seen.residual, seen.aux)
    alone = progress.steps != 2
    usable = ~alone | (progress.error <= FAR * progress.before)
    left = jnp.where(alone, 1, 2)
    left = jnp.where(usable & jnp.isfinite(progress.error), left, 0)
    return Replay(first, last, _trial(seen), alone, left)


def _trial(seen: Iterates) -> PyTree[Array]:
    """The step that the opening would take, or Aitken's, as if all errors lay along."""
    if seen.turn is not None:
        return seen.ahead
    before, error = seen.progress.before, seen.progress.error
    stride = before / jnp.maximum(before - error, before / LONGEST)
    return vs.add_scaled(seen.y, stride, seen.residual)


def evaluated(fn: Fn, y: Y, args: Any, tape: Replay | None) -> Evaluation[Y]:
    """The next evaluation: the tape's, and after that one at `y`."""

    def anew() -> Evaluation[Y]:
        image, aux = fn(y, args)
        return Evaluation(y, vs.minus(image, y), aux)

    if tape is None:
        return anew()
    return jax.lax.cond(tape.left > 0, lambda: tape.now, anew)


def advanced(y: Y, tape: Replay | None) -> tuple[Y, Replay | None]:
    """The next point, which is `y` or the tape's, and the tape after that."""
    if tape is None:
        return y, None
    trial: Y = tape.trial
    y = vs.select(tape.alone & (tape.left == 1), trial, y)
    left = jnp.maximum(tape.left - 1, 0)
    return y, Replay(tape.first, tape.last, tape.trial, tape.alone, left)
