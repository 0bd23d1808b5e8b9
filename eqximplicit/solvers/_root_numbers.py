"""The numbers that steer the default root finder, and those that it measures.

Flags are 0 or 1. They are carried as one vector (`_packed.py`).
"""

import equinox as eqx
from jaxtyping import Array, Float

from .._packed import constant, unpacked, updated, where

# Longest Newton step, in units of |y|: ordinarily, and the lengths of the restarts.
_LONGEST, _RESTART_SHORT, _RESTART_LONG = 100.0, 1.0, 10.0


class Control(eqx.Module):
    """The record of progress, and what to do next."""

    # The phases.
    damped: Array
    restarting: Array
    forced: Array  # the trial becomes the base whatever its residual
    flipped: Array  # the restart leaves against the Newton direction
    rejected: Array  # the last damped trial was
    idle: Array  # Newton steps since the residual last halved
    in_window: Array
    num_slow: Array
    num_restarts: Array
    quarter: Array  # `num_restarts` modulo 4: four kinds of restart take turns
    odd: Array  # whether `num_cycles` is
    mark: Array  # the residual norm to be halved
    radius: Array
    # The points.
    start: Array  # |y0|, or one
    base_norm: Array  # |F(base)|
    best_norm: Array
    best_max: Array  # largest absolute residual of the best point
    stuck: Array  # no smaller residual can be resolved,
    near: Array  # and that is not so because of the distance from the start
    multiple: Array  # the best point is a root, and was come to slowly
    num_evaluations: Array
    to_best: Array  # the next trial is the best point so far
    aside: Array  # the direction in which it leaves the base; 0 is Newton's

    @property
    def num_cycles(self) -> Array:
        return self.num_slow + self.num_restarts

    @property
    def longest(self) -> Array:
        """The longest Newton step, in units of `|y|`."""
        short = (self.quarter == 1) | (self.quarter == 2)
        restart = where(short, _RESTART_SHORT, _RESTART_LONG)
        longest = where(self.restarting > 0, restart, _LONGEST)
        return longest.astype(self.mark.dtype)

    @property
    def rescaled(self) -> Array:
        """Whether the damping measures each unknown by its column of the Jacobian."""
        return self.odd > 0


class Trial(eqx.Module):
    """What was measured at a trial point; its base is the one before it."""

    norm: Array  # |F(trial)|
    largest: Array  # largest absolute entry of F(trial)
    step: Array  # |trial - base|
    base: Array  # |base|
    linear: Array  # |F(base) + J (trial - base)|
    terms: Array  # of J (trial - best point): the length of their absolute sums


class Base(eqx.Module):
    """What was measured at the base after the trial."""

    slope: Array  # |J'F|
    jacobian: Array  # |J|
    length: Array  # |base|
    excess: Array  # |F| entry by entry, above `atol` and rounding; not above 0 if stuck
    noise: Array  # the largest rounding of an entry


class Decision(eqx.Module):
    """What a trial decides: a number and flags, which are 0 or 1."""

    ratio: Array  # actual / predicted decrease of |F|^2
    accepted: Array  # as the new base
    better: Array  # than the best point
    wanted: Array  # a Jacobian


class Limits(eqx.Module):
    """When to stop.

    **Attributes:**

    - `atol`: the largest residual entry of a root.
    - `max_restarts`: how many there may be.
    - `to_rounding`: whether a residual is also small enough that is rounding.
    """

    atol: float
    max_restarts: int
    to_rounding: bool


def at_start(length: Float[Array, ""]) -> Float[Array, " n"]:
    """Newton, with the initial guess, of this length, as the first trial."""
    infinite = ("mark", "base_norm", "best_norm", "best_max")
    vector = constant(Control, infinite, ("forced", "radius"), length.dtype)
    return updated(Control, vector, start=length_or_one(length))


def read(vector: Float[Array, " n"]) -> Control:
    """The control of which `vector` is packed."""
    return unpacked(Control, vector)


def length_or_one(length: Array) -> Array:
    return where(length > 0, length, 1)
