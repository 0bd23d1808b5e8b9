"""When the default root finder changes its mind: phases, as arithmetic.

There are three ways to propose a trial point, and one record of progress:

- **Newton, watched.** Full Newton steps, accepted whatever the residual does, as long
  as it halves at least once in every so many steps. Undamped steps cross ridges of the
  norm that stop every descent method, and are the cheapest where they converge.
- **Damped.** From the best point: Levenberg-Marquardt with `damping = |J'F| / radius`,
  accepted on the ratio of actual to predicted decrease. It leaves for Newton when the
  decrease is slow, and for a restart at a stationary point of the norm.
- **Restart.** Two Newton steps of bounded length out of the stationary point, to either
  side of it, then damped again, with the other scaling of the unknowns. There are four
  kinds, which repeat themselves: where twelve have not helped, the next ones first
  move aside, each time in another direction.

The records are in `_root_numbers.py`. The rules are elementwise (`_packed.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._packed import changed, packed, settled, unpacked, where, widened
from ._multiple import is_seen, is_slow
from ._root_numbers import (
    Base,
    Control,
    Decision,
    length_or_one,
    Limits,
    read,
    Trial,
)

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
# So many restarts leave along the Newton direction, the others aside of it.
_RESTARTS_ALONG = 12
# A best point this many times farther out than the start: the solve diverged.
FAR = 1e6
# `|J| |d| / |F|` above this fraction of 1/eps: the Jacobian is singular.
_REGULAR = 0.01
# A change of |F| by so many roundings of the terms that make it means nothing.
_ROUNDINGS = 4.0


def _fields(control: Control) -> Float[Array, " n"]:
    return packed(control, control.mark.dtype)


def _ratio(control: Control, trial: Trial) -> Array:
    """Actual over predicted decrease of |F|^2; -1 where that has no meaning."""
    # (b² - t²) / (b² - l²), in factors that do not overflow.
    norm = control.base_norm
    known = jnp.isfinite(norm) & (trial.linear < norm)
    less, more = norm - trial.norm, norm + trial.norm
    below = where(known, norm - trial.linear, 1)
    ratio = less / below * (more / where(known, norm + trial.linear, 1))
    return where(known & jnp.isfinite(ratio), ratio, -1)


def decided(vector: Float[Array, " n"], trial: Trial, limits: Limits) -> Decision:
    """Whether a trial is the new base, and the best point; never if not finite."""
    few = jax.lax.slice_in_dim(vector, 0, len(dataclasses.fields(Decision)))
    control, trial = widened((read(vector), trial), few)
    finite = jnp.isfinite(trial.largest)
    ratio = where(finite, _ratio(control, trial), -1)
    unconditional = (control.forced > 0) | (control.damped == 0)
    accepted = finite & (unconditional | (ratio > _MIN_RATIO))
    first = ~jnp.isfinite(control.best_max)
    # Far along the kernel of J the terms of F absorb what is left of it.
    drop = where(first, jnp.inf, control.best_norm - trial.norm)
    rounding = _ROUNDINGS * float(jnp.finfo(drop.dtype).eps) * trial.terms
    seen = (drop > rounding) | (rounding <= limits.atol)
    success = finite & (trial.largest <= limits.atol) & seen
    better = success | (finite & (drop > rounding))
    decision = Decision(ratio, accepted, better, accepted & ~success)
    return unpacked(Decision, settled(packed(decision, few.dtype), few))


def _after_newton(control: Control, trial: Trial, length: Array) -> Control:
    finite = jnp.isfinite(trial.largest)
    halved = finite & (trial.norm < _HALVED * control.mark)
    idle = where(halved, 0, control.idle + 1)
    slow_or_first = where(control.num_slow > 0, _PATIENCE_SLOW, _PATIENCE)
    restarting = control.restarting > 0
    patience = where(restarting, _PATIENCE_RESTART, slow_or_first)
    leave = (idle >= patience.astype(idle.dtype)) | ~finite
    to_best = leave & ~restarting & (control.best_norm < control.base_norm)
    nothing = jnp.zeros_like(control.mark)
    return changed(
        control,
        damped=leave,
        forced=to_best,
        flipped=nothing,
        rejected=nothing,
        idle=idle,
        in_window=nothing,
        mark=where(halved, trial.norm, control.mark),
        radius=_FIRST_RADIUS * length,
        to_best=to_best,
        aside=nothing,
    )


def _after_damped(
    control: Control, trial: Trial, base: Base, decision: Decision
) -> Control:
    norm, ratio, length = control.base_norm, decision.ratio, length_or_one(base.length)
    resolution = float(jnp.finfo(norm.dtype).eps) ** 0.75
    tiny = trial.step <= resolution * trial.base
    grow = (ratio > _GOOD_RATIO) & (control.rejected == 0)
    factor = where(ratio < _POOR_RATIO, _SHRINK, where(grow, _GROW, 1.0))
    radius = control.radius * factor.astype(control.radius.dtype)
    reach = jnp.maximum(length, radius)
    flat = (base.slope <= _STATIONARY * base.jacobian * norm) | (
        base.slope * reach <= _STATIONARY * norm * norm
    )
    stationary = flat | (tiny & (ratio < _POOR_RATIO))
    in_window = control.in_window + 1  # 1, ..., and from the second window on
    asked = (in_window == _WINDOW) | (in_window == 2 * _WINDOW)
    slow = asked & (norm > _HALVED * control.mark)
    leave = stationary | slow
    again = slow & ~stationary & (norm <= control.best_norm)
    restart = leave & ~again
    cycle, quarter = again | restart, control.quarter
    newton_mark = where(again, control.best_norm, jnp.inf)
    damped_mark = where(asked | (in_window == 1), norm, control.mark)
    dtype = control.mark.dtype
    aside = control.num_restarts - (_RESTARTS_ALONG - 1)
    aside = where(restart & (aside > 0), aside, 0)
    return changed(
        control,
        damped=~leave,
        restarting=restart,
        forced=jnp.zeros_like(norm),
        flipped=restart & ((quarter == 1) | (quarter == 3)),
        rejected=1 - decision.accepted,
        idle=jnp.zeros_like(norm),
        in_window=where(in_window == 2 * _WINDOW, _WINDOW, in_window),
        quarter=where(restart, where(quarter == 3, 0, quarter + 1), quarter),
        odd=(control.odd > 0) != cycle,
        num_slow=control.num_slow + again.astype(dtype),
        num_restarts=control.num_restarts + restart.astype(dtype),
        mark=where(leave, newton_mark, damped_mark),
        radius=radius,
        to_best=jnp.zeros_like(norm),
        aside=aside,
    )


def after(
    vector: Float[Array, " n"], trial: Trial, base: Base, decision: Decision, size: int
) -> Float[Array, " n"]:
    """The control after a trial: what the points are, and the phase of the next trial.

    `size` is the number of evaluations that a Jacobian takes.
    """
    known = (read(vector), trial, base, decision)
    control, trial, base, decision = widened(known, vector)
    accepted, better = decision.accepted > 0, decision.better > 0
    evaluations = 1 + size * decision.wanted
    # A Jacobian is wanted at every new base but a root.
    root = better & (decision.wanted == 0) & (trial.largest > base.noise)
    multiple = is_slow(trial.norm, control.base_norm) & is_seen(trial.step, trial.base)
    control = changed(
        control,
        base_norm=where(accepted, trial.norm, control.base_norm),
        best_norm=where(better, trial.norm, control.best_norm),
        best_max=where(better, trial.largest, control.best_max),
        num_evaluations=control.num_evaluations + evaluations,
        multiple=where(better, root & multiple, control.multiple > 0),
    )
    length = length_or_one(base.length)
    newton = _after_newton(control, trial, length)
    damped = _after_damped(control, trial, base, decision)
    # A forced damped trial was the way back to the best point.
    nothing = jnp.zeros_like(control.mark)
    radius = _FIRST_RADIUS * length
    arrived = changed(control, forced=nothing, radius=radius, to_best=nothing)
    damped = _select(control.forced > 0, arrived, damped)
    new = _select(control.damped > 0, damped, newton)
    best = ~better & (control.base_norm == control.best_norm)
    near = base.length <= FAR * control.start
    new = changed(new, stuck=best & (base.excess <= 0), near=near)
    return settled(_fields(new), vector)


def is_regular(control: Control, jacobian_norm: Array, step_length: Array) -> Array:
    """Whether a step shows that the Jacobian is not singular.

    For the best residual, the least of which lies in the range of any Jacobian: to go
    back from far outside is no evidence.
    """
    eps = float(jnp.finfo(control.mark.dtype).eps)
    too_large = _REGULAR * control.best_norm / eps
    return (jacobian_norm * step_length < too_large) & (control.damped == 0)


def _select(pred: Array, x: Control, y: Control) -> Control:
    pairs: dict[str, Any] = {
        f.name: where(pred, getattr(x, f.name), getattr(y, f.name))
        for f in dataclasses.fields(Control)
    }
    return Control(**pairs)


def is_over(
    control: Control, limits: Limits, regular: Bool[Array, ""]
) -> tuple[Array, Array]:
    """Whether the solve has ended, and whether with a root.

    Far along a kernel, and far from the start, everything is rounding, and no root:
    `regular` is whether some Jacobian was.
    """
    success, stuck = control.best_max <= limits.atol, control.stuck > 0
    if limits.to_rounding:
        resolved = stuck & (control.near > 0) & regular
        success = success | (resolved & jnp.isfinite(control.best_max))
    no_start = (control.num_evaluations > 0) & ~jnp.isfinite(control.best_max)
    exhausted = control.num_cycles > limits.max_restarts
    return success | no_start | exhausted | stuck, success
