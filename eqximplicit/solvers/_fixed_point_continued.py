"""What the default fixed-point solver makes of an opening that did not get there."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._packed import changed, settled, where, widened
from . import _history as hist, _vector_space as vs, _verdict as verdict
from ._fixed_point_control import GROWTH, Kind, MIN_MIXING, pack, unpacked
from ._fixed_point_opening import Iterates, Progress

LONGEST = 4.0  # of Aitken's step, in residuals


class LastStep(eqx.Module):
    """The last plain step of an opening; of an opening of two evaluations, all of it.

    **Attributes:** the iteration; the length of the last residual; and, where there was
    but one before it, those of its change and of that one, which is the distance.
    """

    progress: Progress
    merit: Array
    change: Array
    distance: Array

    @property
    def known(self) -> Array:
        """Whether this is a place to go on from: finite, and no growth to reject."""
        finite = jnp.isfinite(self.merit + self.change + self.distance)
        return finite & (self.progress.error <= GROWTH * self.progress.before)

    @property
    def both(self) -> Array:
        return self.progress.steps == 2

    @property
    def better(self) -> Array:
        """Whether the last residual is the smallest of which the point is known."""
        return ~self.both | (self.merit <= self.distance)

    @property
    def slope(self) -> Array:
        """The distance per change of the residual, 1 where that is not known."""
        ratio = self.distance / where(self.change > 0, self.change, 1)
        return where(self.both & (self.change > 0), ratio, 1)

    @property
    def mixing(self) -> Array:
        return jnp.clip(self.slope, MIN_MIXING, 1)

    @property
    def amplification(self) -> Array:
        """The error per residual at the rate of the last step."""
        before, error = self.progress.before, self.progress.error
        shrinks = error < before
        ratio = before / where(shrinks, before - error, 1)
        return where(shrinks, ratio, jnp.inf)

    @property
    def share(self) -> Array:
        """How much of the change the residual is, by the law of cosines."""
        product = (self.merit - self.distance) * (self.merit + self.distance)
        square = where(self.change > 0, self.change**2, jnp.inf)
        return where(self.both, (1 + product / square) / 2, 0)

    @property
    def explained(self) -> Array:
        """The inner product of the residual with its change, scaled to unit length."""
        return self.share * self.change

    @property
    def stride(self) -> Array:
        """How much of the residual the next step takes."""
        before, error = self.progress.before, self.progress.error
        aitken = before / jnp.maximum(before - error, before / LONGEST)
        return where(self.both, self.mixing, aitken)


class Continued(eqx.Module):
    """Where to go on from, and where to.

    **Attributes:** the next trial point; the last point, the best one and the one to
    start again from, with residual and (the best one) auxiliary output; the pair of
    points and of residuals, if there are but two; and what is known of them.
    """

    trial: PyTree[Array]
    anchor: tuple[PyTree[Array], PyTree[Array]]
    best: tuple[PyTree[Array], PyTree[Array], Any]
    start: tuple[PyTree[Array], PyTree[Array]]
    pair: hist.Pair[Any]
    last: LastStep

    @property
    def known(self) -> Bool[Array, ""]:
        return self.last.known

    def history(self, empty: hist.History[Any]) -> hist.History[Any]:
        """Returns the history that has led to the trial."""
        return hist.begun(empty, self.pair, self.last.both)

    def explained(self, nothing: Float[Array, " slots"]) -> Float[Array, " slots"]:
        """Returns what the history explains of the residual, from nothing."""
        first = jnp.arange(nothing.size) == 0
        return jnp.where(first, self.last.explained, nothing)

    def control(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """Returns the packed control before the trial, from that before the start."""
        floor = verdict.in_roundings(self.best[1], self.best[0])
        return _control(vector, self.last, floor)


def continued(seen: Iterates) -> Continued:
    """Returns the Anderson step after two evaluations, as if there were no opening.

    After more it is the step that the opening would take, or Aitken's: of plain steps
    only the last one is still there, and the error is taken to lie along the residual.
    """
    start, y, residual = seen.start, seen.y, seen.residual
    dy = vs.minus(y, start)
    dr = vs.minus(residual, dy)
    lengths = vs.lengths([residual, dr, dy], vs.real_dtype(y))
    step = LastStep(seen.progress, *lengths)

    first, latest = (start, dy, seen.last_aux), (y, residual, seen.aux)
    best = vs.select(step.better, latest, first)
    begin = vs.select(step.both, first[:2], latest[:2])
    rest = vs.add_scaled(residual, -step.share, dr)
    trial = vs.add_scaled(y, -step.share, dy)
    trial = vs.add_scaled(trial, step.stride, rest)
    if seen.turn is not None:
        trial = vs.select(step.both, trial, seen.ahead)
    pair = hist.Pair(dy, dr, step.change, step.distance)
    return Continued(trial, (y, residual), best, begin, pair, step)


def _control(
    vector: Float[Array, " n"], step: LastStep, floor: Array
) -> Float[Array, " n"]:
    arguments = (unpacked(vector), step, floor)
    control, step, floor = widened(arguments, vector)
    better, progress = step.better, step.progress
    merit = where(better, step.merit, step.distance)
    kind = where(step.both, int(Kind.MIXED), int(Kind.PLAIN))
    error = where(better, progress.error, progress.before)
    amplification = step.amplification
    changes = {
        "kind": kind,
        "reach": jnp.abs(step.explained) * step.distance,
        "mixing": step.mixing,
        "used": step.both,
        "amplification": where(amplification < jnp.inf, amplification, 1),
        "reference": merit,
        "anchor_merit": step.merit,
        "start_merit": where(step.both, step.distance, step.merit),
        "best_merit": merit,
        "best_residual": error,
        "best_error": where(error > 0, error * amplification, 0),
        "best_floor": floor,
    }
    return settled(pack(changed(control, **changes)), vector)
