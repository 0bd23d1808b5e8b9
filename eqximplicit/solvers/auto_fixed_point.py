"""The default fixed-point solver: Anderson, plain iteration and Newton-Krylov in one.

Every step evaluates the function once, at the trial point that the step before chose,
and then decides what that evaluation says. There is one compiled loop body, no inner
loop, and no derivative of the function: the Newton-Krylov rescue differentiates by
finite differences (Knoll and Keyes 2004), so a function without a JVP, such as a
callback to the host, is solved too.
"""

import enum
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._solution import Aux, RESULTS, Y
from . import _history as hist, _vector_space as vs, _verdict as verdict

GROWTH = 10.0  # a residual this much larger than the best is a rejected step
MIN_MIXING = 0.02  # the smallest mixing that a stiff secant may ask for
PROGRESS = 0.9  # a step that leaves more of the residual than this has stalled
PATIENCE = 8  # stalled steps before a rescue
PLAIN_STEPS = 20  # of the first rescue
DIVERGED = 1e6  # growth at which that rescue gives up
MAX_BARREN = 4  # rescues in a row that do not halve the residual
DECREASE = 1e-4  # Armijo's constant for the Newton-Krylov step


class Kind(enum.IntEnum):
    """What a trial point is."""

    START = 0
    PLAIN = 1  # mixing alone: no history, or a rejected step to make up for
    MIXED = 2  # Anderson's
    RESCUE = 3  # plain iteration from `y0`
    PROBE = 4  # a finite difference of the residual


class _Trial(eqx.Module):
    """What the next evaluation is for, and what the model says about it."""

    kind: Int[Array, ""]
    size: Float[Array, ""]
    coefficients: Float[Array, " window"]
    reach: Float[Array, ""]


class _Control(eqx.Module):
    """The numbers that steer the solve.

    `mixing`, `size` and `curvature` (relative model error per distance) shape the
    steps; `amplification` is the error per residual; `reference` is the merit that a
    trial is compared with; the rest counts.
    """

    mixing: Float[Array, ""]
    size: Float[Array, ""]
    curvature: Float[Array, ""]
    amplification: Float[Array, ""]
    reference: Float[Array, ""]
    num_stalled: Int[Array, ""]
    num_rejected: Int[Array, ""]
    num_plain: Int[Array, ""]
    probing: Bool[Array, ""]
    newton: Bool[Array, ""]
    num_rescues: Int[Array, ""]
    num_barren: Int[Array, ""]
    merit_at_rescue: Float[Array, ""]


class _State(eqx.Module, Generic[Y]):
    anchor: verdict.Point[Y]
    start: verdict.Point[Y]
    best: verdict.Best[Y]
    history: hist.History[Y]
    trial: _Trial
    control: _Control
    done: Bool[Array, ""]
    result: RESULTS


class _Evaluation(eqx.Module, Generic[Y]):
    """A trial point, evaluated, and the pair that it makes with the anchor."""

    point: verdict.Point[Y]
    finite: Bool[Array, ""]
    accepted: Bool[Array, ""]
    dy: Y
    dr: Y
    distance: Float[Array, ""]
    aux: Any


def _is(trial: _Trial, kind: Kind) -> Bool[Array, ""]:
    return trial.kind == int(kind)


def _flag(value: bool) -> Bool[Array, ""]:
    return jnp.array(value)


class AutoFixedPoint(optx.AbstractFixedPointSolver[Y, Aux, _State[Y]]):
    r"""The default fixed-point solver: a safeguarded combination of three methods.

    A step is one evaluation of `fn`.

    1. *Anderson acceleration* over the last `window` secant pairs. Each pair is
       believed as far as the last prediction of the residual was right at the distance
       of that pair, so old pairs of a curved map fade instead of misleading. The mixing
       is the inverse slope of the last pair, $|\Delta y| / |\Delta r|$, at most 1.
    2. A trial point that is not finite, or whose residual is ten times the best, is
       *rejected*: first the mixed step alone is tried, then shorter Anderson steps.
    3. Eight steps without progress bring a *rescue*: first plain iteration from `y0`,
       which converges for every contraction in whatever norm; from then on
       *Newton-Krylov* steps from the best point, with `window` probes of the residual
       (a finite-difference GMRES) and a line search that insists on descent.

    The point of the smallest residual is returned. It is a success if its residual, and
    its estimated distance from the solution, are within `atol + rtol |y|`: for a plain
    iteration of rate $\rho$ the latter is the residual over $1 - \rho$, so that a slow
    contraction does not stop early. A residual within tolerance that is down to
    rounding is a success as well. Otherwise `stats["result"]` says why not: the
    tolerance is out of reach, the residual has a local minimum, `fn` is not finite at
    `y0`, or `max_steps`, the number of evaluations allowed.

    Leaves may differ in dtype; complex leaves count as vectors over the reals. `fn` is
    never differentiated. The steps are differentiable
    (`optimistix.RecursiveCheckpointAdjoint`).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of the error of the solution.
    - `window`: the largest number of secant pairs kept: `2 * window` states of memory.
    - `norm`: the norm of the error per tolerance.

    **Raises:**

    - `ValueError`: a negative tolerance, or a window below 1, or above `max_steps`
        where `options={"max_steps": ...}` says how many steps there will be.

    !!! example

        ```python
        solver = eqi.AutoFixedPoint(rtol=1e-8, atol=1e-8)
        optx.fixed_point(lambda y, args: jnp.cos(y), solver, jnp.array(1.0)).value
        ```

    ??? cite "References"

        D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM
        12 (1965). H. Walker and P. Ni, *Anderson acceleration for fixed-point
        iterations*, SIAM J. Numer. Anal. 49 (2011). J. Zhang, B. O'Donoghue and S.
        Boyd, *Globally convergent type-I Anderson acceleration for nonsmooth
        fixed-point iterations*, SIAM J. Optim. 30 (2020): safeguarding by
        plain steps. D. Knoll and D. Keyes, *Jacobian-free Newton-Krylov methods*, J.
        Comput. Phys. 193 (2004).
    """

    rtol: float
    atol: float
    window: int = 10
    norm: Callable[[Any], Scalar] = optx.max_norm

    def __check_init__(self) -> None:
        verdict.check_tolerances("AutoFixedPoint", self.rtol, self.atol)
        verdict.check_window("AutoFixedPoint", self.window)

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> _State[Y]:
        """Returns the state before the first evaluation, which is at `y`."""
        del fn, args, f_struct, tags
        verdict.check_budget("AutoFixedPoint", self.window, options)
        verdict.warn_if_unreachable(
            "AutoFixedPoint", self.rtol, self.atol, vs.resolution(y)
        )
        history = hist.empty(y, self.window)
        best, dtype = verdict.nothing(y, aux_struct), vs.real_dtype(y)
        return _State(
            anchor=best.point,
            start=best.point,
            best=best,
            history=history,
            trial=_Trial(
                jnp.asarray(int(Kind.START), jnp.int32),
                jnp.ones((), dtype),
                jnp.zeros(history.window, dtype),
                jnp.zeros((), dtype),
            ),
            control=_fresh_control(dtype),
            done=_flag(False),
            result=RESULTS.successful,
        )

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
    ) -> tuple[Y, _State[Y], Aux]:
        """Returns the next trial point, having evaluated `fn` at this one."""
        del options, tags
        image, aux = fn(y, args)
        seen = _evaluate(state, y, image, aux)
        state = _learn(state, seen)
        state = _move(self._tolerance, state, seen)
        state = _rescue(state)
        y, step, state = _propose(state)
        return y, _finish(self._tolerance, state, step), aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the best point is good enough, or cannot be improved."""
        del fn, y, args, options, tags
        return state.done, verdict.coarse(state.result)

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns the best point with its auxiliary output, and the verdict."""
        del fn, y, aux, args, options, tags
        best = state.best
        stats = verdict.statistics(best, state.result, result)
        stats["num_rescues"] = state.control.num_rescues
        return best.point.y, best.aux, stats

    @property
    def _tolerance(self) -> verdict.Tolerance:
        return verdict.Tolerance(self.rtol, self.atol, self.norm)


def _fresh_control(dtype: jnp.dtype) -> _Control:
    one, infinite = jnp.ones((), dtype), jnp.asarray(jnp.inf, dtype)
    none = jnp.zeros((), jnp.int32)
    return _Control(
        mixing=one,
        size=one,
        curvature=jnp.zeros((), dtype),
        amplification=one,
        reference=infinite,
        num_stalled=none,
        num_rejected=none,
        num_plain=none,
        probing=_flag(False),
        newton=_flag(False),
        num_rescues=none,
        num_barren=none,
        merit_at_rescue=infinite,
    )


def _evaluate(state: _State[Y], y: Y, image: Y, aux: Any) -> _Evaluation[Y]:
    """What the trial point is worth: law and limit differ by the kind of trial."""
    control, trial, anchor = state.control, state.trial, state.anchor
    point, finite = verdict.point_at(y, image)
    descent = (1 - DECREASE * trial.size) * anchor.merit
    limit = jnp.where(control.newton, descent, GROWTH * control.reference)
    limit = jnp.where(_is(trial, Kind.RESCUE), DIVERGED * state.best.point.merit, limit)
    accepted = finite & (point.merit <= limit) & ~_is(trial, Kind.PROBE)
    accepted = accepted | (_is(trial, Kind.START) & finite)
    zero = vs.zeros_like(y)
    dy = vs.select(finite, vs.minus(y, anchor.y), zero)
    dr = vs.select(finite, vs.minus(point.residual, anchor.residual), zero)
    distance = jax.lax.stop_gradient(vs.length(dy, anchor.merit.dtype))
    return _Evaluation(point, finite, accepted, dy, dr, distance, aux)


def _learn(state: _State[Y], seen: _Evaluation[Y]) -> _State[Y]:
    """The history, the mixing and the trust in the history, after an evaluation."""
    control, trial, history = state.control, state.trial, state.history
    dtype = control.mixing.dtype
    probe, start = _is(trial, Kind.PROBE), _is(trial, Kind.START)

    stop = jax.lax.stop_gradient
    change = stop(vs.length(seen.dr, dtype))
    mixing = seen.distance / jnp.where(change > 0, change, 1)
    mixing = jnp.clip(mixing, MIN_MIXING, 1)
    informative = seen.finite & ~probe & ~start & (change > 0)
    mixing = jnp.where(informative, mixing, control.mixing)

    # What the model missed, per distance of the pairs that it used. A mixed step
    # predicts the change -size * (DR gamma) within the span of the history.
    eps = vs.resolution(seen.dy)
    normal = hist.normal_equations(history, eps)
    gamma = trial.coefficients * normal.lengths
    missed = stop(hist.dots(history.dr, seen.dr, dtype)) / normal.lengths
    missed = jnp.where(normal.filled, missed, 0)
    missed = missed + trial.size * (stop(normal.gram) @ gamma)
    factor = stop(normal.factor(jnp.zeros_like(gamma)))
    solved = jax.scipy.linalg.solve_triangular(factor, missed, lower=True)
    error = jnp.sqrt(solved @ solved)
    reach = trial.size * trial.reach
    curvature = error / jnp.where(reach > 0, reach, 1)
    curvature = jnp.maximum(control.curvature / 2, curvature)
    predicted = seen.accepted & _is(trial, Kind.MIXED) & (reach > 0)
    curvature = jnp.where(predicted, curvature, control.curvature)

    keep = seen.finite & ~start & (probe | seen.accepted | ~control.newton)
    step = jnp.where(seen.accepted & ~start, seen.distance, 0)
    history = hist.push(hist.moved(history, step), seen.dy, seen.dr, keep)
    control = eqx.tree_at(
        lambda c: (c.mixing, c.curvature), control, (mixing, curvature)
    )
    return eqx.tree_at(lambda s: (s.history, s.control), state, (history, control))


def _move(
    tolerance: verdict.Tolerance, state: _State[Y], seen: _Evaluation[Y]
) -> _State[Y]:
    """The anchor, the best point and the counters, after an evaluation."""
    control, trial, accepted = state.control, state.trial, seen.accepted
    start, plain = _is(trial, Kind.START), _is(trial, Kind.RESCUE)
    probe = _is(trial, Kind.PROBE)
    merit = seen.point.merit
    rejected = ~accepted & ~probe

    amplification = tolerance.amplification(seen.dy, seen.dr, seen.point.y)
    amplification = jnp.maximum(amplification, verdict.FADE * control.amplification)
    amplification = jnp.where(start, jnp.inf, amplification)
    new = tolerance.judge(seen.point, seen.aux, amplification)
    best = verdict.better(new, state.best, accepted)

    progress = merit < PROGRESS * control.reference
    stalled = jnp.where(progress | plain, 0, control.num_stalled + 1)
    stalled = jnp.where(accepted, stalled, control.num_stalled + 1)
    stalled = jnp.where(plain & rejected, PATIENCE, stalled)
    # The first rejection is made up for by a mixed step, the next by shorter ones.
    shorter = rejected & (~_is(trial, Kind.MIXED) | control.newton)
    shrink = jnp.where(seen.finite, 0.5, 0.25).astype(control.size.dtype)
    size = jnp.where(shorter, jnp.maximum(control.size * shrink, 1e-3), control.size)
    size = jnp.where(accepted, jnp.minimum(2 * control.size, 1), size)
    reference = jnp.where(plain, merit, jnp.minimum(merit, control.reference))
    num_plain = jnp.where(accepted, jnp.maximum(control.num_plain - 1, 0), 0)
    mixing = jnp.where(plain & (num_plain == 0), 1.0, control.mixing)

    control = eqx.tree_at(
        lambda c: (
            c.mixing,
            c.size,
            c.amplification,
            c.reference,
            c.num_stalled,
            c.num_rejected,
            c.num_plain,
            c.newton,
        ),
        control,
        (
            mixing.astype(size.dtype),
            size,
            jnp.where(accepted & ~start, amplification, control.amplification),
            jnp.where(accepted, reference, control.reference),
            jnp.where(probe, control.num_stalled, stalled),
            jnp.where(rejected, control.num_rejected + 1, 0),
            jnp.where(plain, num_plain, control.num_plain),
            control.newton & ~accepted,
        ),
    )
    anchor = vs.select(accepted, seen.point, state.anchor)
    first = vs.select(start, seen.point, state.start)
    result = RESULTS.where(start & ~seen.finite, RESULTS.nonfinite_start, state.result)
    return eqx.tree_at(
        lambda s: (s.anchor, s.start, s.best, s.control, s.done, s.result),
        state,
        (anchor, first, best, control, start & ~seen.finite, result),
    )


def _rescue(state: _State[Y]) -> _State[Y]:
    """A new beginning where the solve has stalled, or the end where none is left."""
    control, best = state.control, state.best
    now = (control.num_stalled >= PATIENCE) & ~state.done & ~best.converged
    plain = now & (control.num_rescues == 0)
    krylov = now & ~plain
    halved = best.point.merit < control.merit_at_rescue / 2
    barren = jnp.where(halved, 0, control.num_barren + 1)
    stuck = now & ((barren >= MAX_BARREN) | best.as_good_as_possible)

    merit = jnp.where(plain, state.start.merit, best.point.merit)
    one, none = jnp.ones_like(control.size), jnp.zeros_like(control.num_plain)
    fresh = _Control(
        mixing=jnp.where(plain, one, control.mixing),
        size=one,
        curvature=0 * one,
        amplification=control.amplification,
        reference=merit,
        num_stalled=none,
        num_rejected=none,
        num_plain=jnp.where(plain, PLAIN_STEPS, 0).astype(none.dtype),
        probing=krylov,
        newton=_flag(False),
        num_rescues=control.num_rescues + 1,
        num_barren=barren,
        merit_at_rescue=best.point.merit,
    )
    anchor = vs.select(plain, state.start, vs.select(krylov, best.point, state.anchor))
    result = RESULTS.where(stuck, verdict.why_stuck(best), state.result)
    return eqx.tree_at(
        lambda s: (s.anchor, s.history, s.control, s.done, s.result),
        state,
        (
            anchor,
            hist.restart(state.history, now),
            vs.select(now, fresh, control),
            state.done | stuck,
            result,
        ),
    )


def _finish(tolerance: verdict.Tolerance, state: _State[Y], step: Y) -> _State[Y]:
    """The end, if the best point is good enough."""
    mixed = _is(state.trial, Kind.MIXED)
    best = verdict.sharpened(tolerance, state.best, state.anchor, step, mixed)
    return eqx.tree_at(
        lambda s: (s.best, s.done), state, (best, state.done | best.converged)
    )


def _propose(state: _State[Y]) -> tuple[Y, Y, _State[Y]]:
    """The next trial point, and Anderson's full step at the anchor."""
    state, probe, length = _next_probe(state)
    control, anchor, history = state.control, state.anchor, state.history
    dtype = control.size.dtype
    normal = hist.normal_equations(history, vs.resolution(anchor.y))
    penalty = jnp.minimum((control.curvature * history.distance) ** 2, 1)
    gamma, rest = hist.fit(history, normal, anchor.residual, penalty)
    mixed = vs.add_scaled(
        vs.scaled(control.mixing, rest),
        -jnp.ones((), dtype),
        hist.combine(gamma, history.dy),
    )
    weights = jax.lax.stop_gradient(gamma) * normal.lengths
    reach = jnp.sqrt(jnp.sum((weights * history.distance) ** 2))

    make_up = (control.num_rejected == 1) & ~control.newton
    kind = jnp.where(make_up | (history.count == 0), int(Kind.PLAIN), int(Kind.MIXED))
    kind = jnp.where(control.num_plain > 0, int(Kind.RESCUE), kind)
    kind = jnp.where(control.probing, int(Kind.PROBE), kind).astype(jnp.int32)
    full = (make_up & (history.count > 0)) | (control.num_plain > 0)
    size = jnp.where(full, 1.0, control.size).astype(dtype)
    trial = _Trial(kind, size, jax.lax.stop_gradient(gamma), reach)

    simple = vs.scaled(
        jnp.where(control.num_plain > 0, 1.0, control.mixing).astype(dtype),
        anchor.residual,
    )
    step = vs.select(_is(trial, Kind.MIXED), mixed, simple)
    step = vs.scaled(size, step)
    step = vs.select(control.probing, vs.scaled(length, probe), step)
    y = vs.add_scaled(anchor.y, jnp.ones((), dtype), step)
    y = vs.select(vs.all_finite(y), y, anchor.y)
    return y, mixed, eqx.tree_at(lambda s: s.trial, state, trial)


def _next_probe(state: _State[Y]) -> tuple[_State[Y], Y, Float[Array, ""]]:
    """The next direction of the Krylov space, and how far to go along it.

    Arnoldi's process by finite differences: the newest change of the residual,
    orthogonal to the directions already probed, which are the pairs of the history.
    The space is complete when nothing but the error of the differences is left.
    """
    control, anchor, history = state.control, state.anchor, state.history
    dtype, eps = control.size.dtype, vs.resolution(anchor.y)
    first = history.count == 0
    used = history.used
    inverse = jnp.where(used, history.distance, 1) ** -2

    def direction(state: _State[Y]) -> tuple[Y, Bool[Array, ""]]:
        newest = hist.take(history.dr, history.newest)
        w = vs.select(first, anchor.residual, newest)
        before = vs.length(w, dtype)
        for _ in range(2):  # once more is enough (Kahan)
            overlap = jnp.where(used, hist.dots(history.dy, w, dtype) * inverse, 0)
            w = vs.minus(w, hist.combine(overlap, history.dy))
        after = vs.length(w, dtype)
        new = (after > eps**0.25 * before) & (history.count < history.window)
        return vs.scaled(1 / jnp.where(after > 0, after, 1), w), new

    def no_direction(state: _State[Y]) -> tuple[Y, Bool[Array, ""]]:
        return vs.zeros_like(anchor.y), _flag(False)

    probe, new = jax.lax.cond(control.probing, direction, no_direction, state)
    length = eps**0.5 * (1 + vs.length(anchor.y, dtype))
    complete = control.probing & ~new
    control = eqx.tree_at(
        lambda c: (c.probing, c.newton),
        control,
        (control.probing & new, control.newton | complete),
    )
    state = eqx.tree_at(lambda s: s.control, state, control)
    return state, jax.lax.stop_gradient(probe), jax.lax.stop_gradient(length)
