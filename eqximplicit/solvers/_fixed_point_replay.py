"""How the default fixed-point solver goes on where its opening ends: by replaying it.

The first steps of the solver take the opening's last evaluations in place of their own,
so it goes on as if it had taken these steps itself, and no state of it has to be made
up. The evaluations are free: they have been counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .._solution import Y
from . import _history as hist, _vector_space as vs
from ._fixed_point_control import GROWTH
from ._fixed_point_opening import Iterates
from ._fixed_point_record import DEPTH, Latest, Several

T = TypeVar("T")
LONGEST = 4.0  # of Aitken's step, in residuals


class Evaluation(eqx.Module, Generic[Y]):
    """A point, the residual there, and the auxiliary output of the function."""

    y: Y
    residual: Y
    aux: Any


class Replay(eqx.Module):
    """The last evaluations of an opening, and how many of them are yet to come.

    `alone` is whether there is but the last one; the next point is then the `trial`,
    which only plain steps have.
    """

    tape: Evaluation[Any]  # of leaves with a leading axis, the newest first
    trial: Any
    alone: Bool[Array, ""]
    left: Int[Array, ""]

    @property
    def now(self) -> Evaluation[Any]:
        return hist.take(self.tape, self.left - 1)


def replay(seen: Iterates) -> Replay:
    """The replay of an opening: of all that is known of it, if it is of any use."""
    record, steps = seen.record, seen.progress.steps.astype(int)
    if isinstance(record, Several):
        return _of_several(record, seen.last_aux, seen.aux, steps)
    return _of_plain_steps(record, seen, steps)


def _of_several(
    record: Several, last_aux: Any, aux: Any, steps: Int[Array, ""]
) -> Replay:
    y = jtu.tree_map(lambda x: x[:, 0], record.stack)
    residual = jtu.tree_map(lambda x: x[:, 1], record.stack)
    most = 2 if jtu.tree_leaves(aux) else DEPTH
    tape = Evaluation(y, residual, _both(aux, last_aux))
    return Replay(tape, None, jnp.array(False), jnp.minimum(steps, most))


def _of_plain_steps(record: Latest, seen: Iterates, steps: Int[Array, ""]) -> Replay:
    """All of one of two evaluations, else the last one and Aitken's step.

    Nothing is replayed that is no place to go on from.
    """
    progress, (y, residual) = seen.progress, record.last
    before, error = progress.before, progress.error
    stride = before / jnp.maximum(before - error, before / LONGEST)
    trial = vs.add_scaled(y, stride, residual)
    first = Evaluation(seen.start, vs.minus(y, seen.start), seen.last_aux)
    tape = _both(Evaluation(y, residual, seen.aux), first)
    alone = steps != 2
    usable = jnp.isfinite(error) & (~alone | (error <= GROWTH * before))
    left = jnp.where(usable, jnp.where(alone, 1, 2), 0)
    return Replay(tape, trial, alone, left)


def _both(newest: T, before: T) -> T:
    return jtu.tree_map(lambda *x: vs.in_one(x), newest, before)


def evaluated(
    fn: Callable[[Y, Any], tuple[Y, Any]], y: Y, args: Any, tape: Replay | None
) -> Evaluation[Y]:
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
    if tape.trial is not None:
        trial: Y = tape.trial
        y = vs.select(tape.alone & (tape.left == 1), trial, y)
    return y, dataclasses.replace(tape, left=jnp.maximum(tape.left - 1, 0))
