"""When the default root finder changes its mind: phases, as arithmetic on scalars.

There are three ways to propose a trial point, and one record of progress:

- **Newton, watched.** Full Newton steps, accepted whatever the residual does, as long
  as it halves at least once in every so many steps. Undamped steps cross ridges of the
  norm that stop every descent method, and are the cheapest where they converge.
- **Damped.** From the best point: Levenberg-Marquardt with `damping = |J'F| / radius`,
  accepted on the ratio of actual to predicted decrease. It leaves for Newton when the
  decrease is slow, and for a restart at a stationary point of the norm.
- **Restart.** Two Newton steps of bounded length out of the stationary point, to either
  side of it, then damped again, with the other scaling of the unknowns.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

# Steps without halving the residual: at first, when the damped phase is slow, restarts.
_PATIENCE, _PATIENCE_SLOW, _PATIENCE_RESTART = 10, 5, 2
_HALVED = 0.5
# The damped phase is asked every so many steps whether it has halved the residual.
_WINDOW = 20
_MIN_RATIO, _POOR_RATIO, _GOOD_RATIO = 1e-4, 0.25, 0.75
_SHRINK, _GROW = 0.25, 3.0
# The first damped step is at most this fraction of |y|.
_FIRST_RADIUS = 0.1
# A point is stationary when the norm can decrease by no more than this, to first order.
_STATIONARY = 1e-3
# Longest Newton step, in units of |y|: ordinarily, and the lengths of the restarts.
_LONGEST, _RESTART_SHORT, _RESTART_LONG = 100.0, 1.0, 10.0


class Phases(eqx.Module):
    """The record of progress, and what to do next. Every field is a scalar array."""

    damped: Bool[Array, ""]
    restarting: Bool[Array, ""]
    forced: Bool[Array, ""]  # the trial becomes the base whatever its residual
    flipped: Bool[Array, ""]  # the restart leaves against the Newton direction
    rejected: Bool[Array, ""]  # the last damped trial was
    idle: Int[Array, ""]  # Newton steps since the residual last halved
    in_window: Int[Array, ""]
    num_slow: Int[Array, ""]
    num_restarts: Int[Array, ""]
    mark: Float[Array, ""]  # the residual norm to be halved
    radius: Float[Array, ""]

    @property
    def num_cycles(self) -> Int[Array, ""]:
        return self.num_slow + self.num_restarts

    @property
    def longest(self) -> Float[Array, ""]:
        """The longest Newton step, in units of `|y|`."""
        pair = (self.num_restarts - 1) // 2
        restart = jnp.where(pair % 2 == 0, _RESTART_SHORT, _RESTART_LONG)
        return jnp.where(self.restarting, restart, _LONGEST).astype(self.mark.dtype)

    @property
    def rescaled(self) -> Bool[Array, ""]:
        """Whether the damping measures each unknown by its column of the Jacobian."""
        return self.num_cycles % 2 == 1


class Trial(eqx.Module):
    """What was seen at a trial point and at its base. Every field is a scalar array."""

    finite: Bool[Array, ""]
    norm: Float[Array, ""]  # |F(trial)|
    base_norm: Float[Array, ""]  # |F(base)|, before the trial
    ratio: Float[Array, ""]  # actual / predicted decrease of |F|^2
    tiny: Bool[Array, ""]  # the step is at the resolution of the base


class Base(eqx.Module):
    """What is known of the base after the trial. Every field is a scalar array."""

    norm: Float[Array, ""]  # |F(base)|
    best_norm: Float[Array, ""]  # the smallest |F| so far
    slope: Float[Array, ""]  # |J'F| / |F|
    jacobian_norm: Float[Array, ""]
    length: Float[Array, ""]  # |base|, or 1 at the origin


def first_phase(dtype: jnp.dtype) -> Phases:
    """Newton, with the initial guess as the first trial."""
    no, zero = jnp.array(False), jnp.array(0)
    mark, radius = jnp.array(jnp.inf, dtype), jnp.array(1, dtype)
    return Phases(no, no, ~no, no, no, zero, zero, zero, zero, mark, radius)


def is_accepted(phases: Phases, trial: Trial) -> Bool[Array, ""]:
    """Whether the trial becomes the base; a trial that is not finite never does."""
    unconditional = phases.forced | ~phases.damped
    return trial.finite & (unconditional | (trial.ratio > _MIN_RATIO))


def _after_newton(
    phases: Phases, trial: Trial, base: Base
) -> tuple[Phases, Bool[Array, ""]]:
    halved = trial.finite & (trial.norm < _HALVED * phases.mark)
    idle = jnp.where(halved, 0, phases.idle + 1)
    slow_or_first = jnp.where(phases.num_slow > 0, _PATIENCE_SLOW, _PATIENCE)
    patience = jnp.where(phases.restarting, _PATIENCE_RESTART, slow_or_first)
    leave = (idle >= patience) | ~trial.finite
    to_best = leave & ~phases.restarting & (base.best_norm < base.norm)
    after = Phases(
        damped=leave,
        restarting=phases.restarting,
        forced=to_best,
        flipped=jnp.array(False),
        rejected=jnp.array(False),
        idle=idle,
        in_window=jnp.zeros_like(phases.in_window),
        num_slow=phases.num_slow,
        num_restarts=phases.num_restarts,
        mark=jnp.where(halved, trial.norm, phases.mark),
        radius=_FIRST_RADIUS * base.length,
    )
    return after, to_best


def _after_damped(
    phases: Phases, trial: Trial, base: Base, accepted: Bool[Array, ""]
) -> Phases:
    grow = (trial.ratio > _GOOD_RATIO) & ~phases.rejected
    factor = jnp.where(trial.ratio < _POOR_RATIO, _SHRINK, jnp.where(grow, _GROW, 1.0))
    radius = phases.radius * factor.astype(phases.radius.dtype)
    reach = jnp.maximum(base.length, radius)
    flat = (base.slope <= _STATIONARY * base.jacobian_norm) | (
        base.slope * reach <= _STATIONARY * base.norm
    )
    stationary = flat | (trial.tiny & (trial.ratio < _POOR_RATIO))
    in_window = phases.in_window + 1
    asked = in_window % _WINDOW == 0
    slow = asked & (base.norm > _HALVED * phases.mark)
    leave = stationary | slow
    again = slow & ~stationary & (base.norm <= base.best_norm)
    restart = leave & ~again
    newton_mark = jnp.where(again, base.best_norm, jnp.inf)
    damped_mark = jnp.where(asked | (in_window == 1), base.norm, phases.mark)
    return Phases(
        damped=~leave,
        restarting=restart,
        forced=jnp.array(False),
        flipped=restart & (phases.num_restarts % 2 == 1),
        rejected=~accepted,
        idle=jnp.zeros_like(phases.idle),
        in_window=in_window,
        num_slow=phases.num_slow + again.astype(int),
        num_restarts=phases.num_restarts + restart.astype(int),
        mark=jnp.where(leave, newton_mark, damped_mark),
        radius=radius,
    )


def next_phase(
    phases: Phases, trial: Trial, base: Base, accepted: Bool[Array, ""]
) -> tuple[Phases, Bool[Array, ""]]:
    """The phase after a trial, and whether its next trial is the best point so far."""
    newton, to_best = _after_newton(phases, trial, base)
    damped = _after_damped(phases, trial, base, accepted)
    # A forced damped trial was the way back to the best point.
    start = (jnp.array(False), _FIRST_RADIUS * base.length)
    arrived = eqx.tree_at(lambda p: (p.forced, p.radius), phases, start)
    damped = select(phases.forced, arrived, damped)
    return select(phases.damped, damped, newton), to_best & ~phases.damped


def select(pred: Bool[Array, ""], x: Phases, y: Phases) -> Phases:
    """Returns `x` where `pred`, else `y`."""
    return jtu.tree_map(lambda xi, yi: jnp.where(pred, xi, yi), x, y)
