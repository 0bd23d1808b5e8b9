"""The state machine of the default fixed-point solver, all in scalars.

What a trial point is for, whether it is accepted, when a rescue is due and when the
solve is over. The scalars are carried as one vector (`_packed.py`), so the rules here
are elementwise, and hold for scalars as for vectors.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _packed as pk
from .._packed import changed, settled, where, widened
from . import _history as hist, _verdict as verdict
from ._fixed_point_numbers import Control, Ending, Kind, Numbers, pack, Proposal

GROWTH = 10.0  # a residual this much larger than the best is a rejected step
MIN_MIXING = 0.02  # the smallest mixing that a stiff secant may ask for
PROGRESS = 0.9  # a step that leaves more of the residual than this has stalled
PATIENCE = 8  # stalled steps before a rescue
PLAIN_STEPS = 20  # of the first rescue
DIVERGED = 1e6  # growth at which that rescue gives up
PATIENT_STEPS = 100  # of the last resort, plain iteration again, as long as these
SLOW = 0.9  # leave less than so much of the residual: a rate of 0.999
MAX_BARREN = 4  # rescues in a row that do not halve the residual
DECREASE = 1e-4  # Armijo's constant for the Newton-Krylov step


def _judged(control: Control, seen: Numbers) -> Control:
    """Whether the trial is accepted, and how mixing and trust in the pairs follow."""
    kind, merit = control.kind, seen.merit
    start, probe = kind == int(Kind.START), kind == int(Kind.PROBE)
    newton, dtype = control.newton > 0, control.size.dtype

    descent = (1 - DECREASE * control.step_size) * control.anchor_merit
    limit = where(newton, descent, GROWTH * control.reference)
    plain = kind == int(Kind.RESCUE)
    limit = where(plain, DIVERGED * control.best_merit, limit)
    accepted = seen.finite & (start | (~probe & (merit <= limit)))

    change = seen.change
    mixing = seen.distance / where(change > 0, change, 1)
    mixing = seen.sense * jnp.clip(mixing, MIN_MIXING, 1)
    informative = seen.finite & ~probe & ~start & (change > 0)
    mixing = where(informative, mixing, control.mixing)

    # A mixed step predicts what it takes of the residual. What it misses is curvature,
    # but for what may come of the rest, of which the pairs say nothing yet.
    reach = control.step_size * control.reach
    missed = jnp.maximum(seen.missed - control.step_size * control.rest, 0)
    curvature = missed / where(reach > 0, reach, 1)
    curvature = jnp.maximum(control.curvature / 2, curvature)
    predicted = accepted & (kind == int(Kind.MIXED)) & (reach > 0)
    curvature = where(predicted, curvature, control.curvature)

    scaled_change = seen.scaled_change
    amplification = seen.scaled_distance / where(scaled_change > 0, scaled_change, 1)
    amplification = where(scaled_change > 0, jnp.maximum(amplification, 1), jnp.inf)
    faded = verdict.FADE * control.amplification
    amplification = jnp.maximum(amplification, faded)
    amplification = where(start, jnp.inf, amplification)
    error = where(seen.scaled > 0, seen.scaled * amplification, 0)
    improved = accepted & (merit < control.best_merit)
    ending = where(start & ~seen.finite, int(Ending.NONFINITE_START), 0)
    return changed(
        control,
        accepted=accepted,
        improved=improved,
        keep=seen.finite & ~start & (probe | accepted | ~newton),
        moved=where(accepted & ~start, seen.distance, 0),
        mixing=mixing,
        curvature=curvature,
        amplification=where(accepted & ~start, amplification, control.amplification),
        anchor_merit=where(accepted, merit, control.anchor_merit),
        start_merit=where(start, merit, control.start_merit),
        best_merit=where(improved, merit, control.best_merit),
        best_residual=where(improved, seen.scaled, control.best_residual),
        best_error=where(improved, error, control.best_error),
        best_floor=where(improved, seen.floor, control.best_floor),
        ending=ending.astype(dtype),
    )


def _counted(control: Control, seen: Numbers) -> Control:
    """The counters and the step size, after a trial that is accepted or rejected."""
    kind, merit, accepted = control.kind, seen.merit, control.accepted > 0
    plain, probe = kind == int(Kind.RESCUE), kind == int(Kind.PROBE)
    newton, rejected = control.newton > 0, ~accepted & ~probe

    progress = merit < PROGRESS * control.reference
    stalled = where(accepted & (progress | plain), 0, control.num_stalled + 1)
    stalled = where(plain & rejected, PATIENCE, stalled)
    # The first rejection is made up for by a mixed step, the next by shorter ones.
    shorter = rejected & ((kind != int(Kind.MIXED)) | newton)
    shrunk = control.size * where(seen.finite, 0.5, 0.25).astype(merit.dtype)
    size = where(shorter, jnp.maximum(shrunk, 1e-3), control.size)
    size = where(accepted, jnp.minimum(2 * control.size, 1), size)
    reference = where(plain, merit, jnp.minimum(merit, control.reference))
    num_plain = where(accepted, jnp.maximum(control.num_plain - 1, 0), 0)
    slow_but_sure = merit < SLOW * control.merit_at_rescue
    again = accepted & plain & (num_plain == 0) & (control.patient > 0) & slow_but_sure
    num_plain = where(again, float(PATIENT_STEPS), num_plain)
    return changed(
        control,
        mixing=where(plain & (num_plain == 0), 1, control.mixing),
        size=size,
        reference=where(accepted, reference, control.reference),
        num_stalled=where(probe, control.num_stalled, stalled),
        num_rejected=where(rejected, control.num_rejected + 1, 0),
        num_plain=where(plain, num_plain, control.num_plain),
        newton=newton & ~accepted,
        merit_at_rescue=where(again, merit, control.merit_at_rescue),
    )


def is_good(control: Control, error: Array) -> Array:
    """Whether the best point, with this estimated error, is good enough."""
    exact = control.best_floor <= verdict.AT_ROUNDING
    return (control.best_residual < 1) & ((error < 1) | exact)


def _rescued(control: Control) -> Control:
    """A new beginning where the solve has stalled, or the end where none is left."""
    converged = is_good(control, control.best_error)
    now = (control.num_stalled >= PATIENCE) & (control.ending == 0) & ~converged
    first = now & (control.num_rescues == 0)
    halved = control.best_merit < control.merit_at_rescue / 2
    barren = where(halved, 0, control.num_barren + 1)
    rounding = control.best_floor <= verdict.NEAR_ROUNDING
    as_good = rounding & (control.best_residual < 1)
    in_vain = now & (barren >= MAX_BARREN)
    last = in_vain & ~first & (control.patient == 0) & ~rounding
    krylov = now & ~first & ~last
    stuck = (in_vain & ((control.patient > 0) | rounding)) | (now & as_good)

    merit = where(first, control.start_merit, control.best_merit)
    steps = where(first, float(PLAIN_STEPS), where(last, float(PATIENT_STEPS), 0.0))

    def anew(old: Array, new: Array | float) -> Array:
        return where(now, new, old)

    return changed(
        control,
        mixing=where(first | last, 1, control.mixing),
        size=anew(control.size, 1),
        curvature=anew(control.curvature, 0),
        reference=anew(control.reference, merit),
        anchor_merit=anew(control.anchor_merit, merit),
        num_stalled=anew(control.num_stalled, 0),
        num_rejected=anew(control.num_rejected, 0),
        num_plain=anew(control.num_plain, steps.astype(merit.dtype)),
        patient=(control.patient > 0) | last,
        probing=anew(control.probing, krylov.astype(merit.dtype)),
        newton=anew(control.newton, 0),
        num_rescues=control.num_rescues + now.astype(merit.dtype),
        num_barren=anew(control.num_barren, barren),
        merit_at_rescue=anew(control.merit_at_rescue, control.best_merit),
        from_start=first,
        from_best=krylov | last,
        ending=where(stuck, int(Ending.STUCK), control.ending),
    )


def _next_trial(control: Control, window: int) -> Control:
    """What the next evaluation is for."""
    count = control.used
    complete = (control.probing > 0) & (count >= window)
    probing = (control.probing > 0) & ~complete
    newton = (control.newton > 0) | complete
    make_up = (control.num_rejected == 1) & ~newton
    plain = control.num_plain > 0
    kind = where(make_up | (count == 0), int(Kind.PLAIN), int(Kind.MIXED))
    kind = where(plain, int(Kind.RESCUE), kind)
    kind = where(probing, int(Kind.PROBE), kind)
    full = (make_up & (count > 0)) | plain
    return changed(
        control,
        kind=kind,
        step_size=where(full, 1, control.size),
        probing=probing,
        newton=newton,
    )


def after(
    control: Control, seen: Numbers, window: int, vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Returns the control after an evaluation, packed.

    **Arguments:** the control before, the evaluation, the window of the history, and
    the packed control before.
    """
    seen, control = widened(seen, vector), widened(control, vector)
    control = _judged(control, seen)
    control = _counted(control, seen)
    control = _rescued(control)
    forget = control.from_start + control.from_best > 0
    turn = hist.turn(control.used, control.newest, window, control.keep > 0, forget)
    control = changed(control, slot=turn.slot, used=turn.used, newest=turn.newest)
    return settled(pack(_next_trial(control, window)), vector)


def with_proposal(
    control: Control, proposal: Proposal, vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Returns the packed control, with the end if the best point is good enough."""
    control, proposal = widened((control, proposal), vector)
    new, error = proposal.new, proposal.error
    probed, mixed = (control.kind == int(k) for k in (Kind.PROBE, Kind.MIXED))
    # A full quasi-Newton step from the best point is an estimate of its error.
    here = mixed & (control.anchor_merit <= control.best_merit)
    error = where(here, jnp.maximum(control.best_error, error), control.best_error)
    converged = is_good(control, error) & (control.ending == 0)
    return pk.updated(
        Control,
        vector,
        reach=proposal.reach,
        rest=proposal.rest,
        best_error=error,
        probing=(control.probing > 0) & new,
        newton=(control.newton > 0) | (probed & ~new),
        ending=where(converged, int(Ending.CONVERGED), control.ending),
    )
