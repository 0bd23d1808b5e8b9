"""The default fixed-point solver: Anderson, plain iteration and Newton-Krylov in one.

Every step evaluates the function once, at the trial point that the step before chose,
and then decides what that evaluation says. There is one compiled loop body, no inner
loop, and no derivative of the function: the Newton-Krylov rescue differentiates by
finite differences (Knoll and Keyes 2004), so a function without a JVP, such as a
callback to the host, is solved too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._reduce import total
from .._solution import Aux, RESULTS, Y
from . import _history as hist, _vector_space as vs, _verdict as verdict
from ._fixed_point_control import (
    after,
    at_start,
    Control,
    Ending,
    Kind,
    Numbers,
    Proposal,
    unpacked,
    with_proposal,
)
from ._fixed_point_opening import opening
from ._fixed_point_replay import advanced, evaluated, Evaluation, Replay, replay
from ._opening import AbstractOpening, Opened


class _Points(eqx.Module, Generic[Y]):
    """The anchor, the best point and the start: states and their residuals.

    Leaves have a leading axis of length 6, in this order.
    """

    stack: Y

    def __getitem__(self, row: int) -> Y:
        return jtu.tree_map(lambda x: x[row], self.stack)


class _State(eqx.Module, Generic[Y]):
    points: _Points[Y]
    best_aux: Any
    history: hist.History[Y]
    explained: Float[Array, " slots"]
    factor: Float[Array, "slots slots"]
    control: Float[Array, " n"]
    tape: Replay | None = None


class _Seen(eqx.Module, Generic[Y]):
    """An evaluation: the residual, and the pair with the anchor."""

    residual: Y
    pair: hist.Pair[Y]
    numbers: Numbers


class AutoFixedPoint(AbstractOpening, optx.AbstractFixedPointSolver[Y, Aux, _State[Y]]):
    r"""The default fixed-point solver: a safeguarded combination of three methods.

    A step is one evaluation of `fn`. A layer opens with a loop that costs much less, as
    long as the residual shrinks well: plain iteration from `y0`, and Anderson's steps
    with two pairs for a state of up to 64 numbers, unless `fn` costs more than what is
    saved. `optimistix.fixed_point` opens with nothing.

    1. *Anderson acceleration* over the last `window` secant pairs. Each pair is
       believed as far as the last prediction of the residual was right at the distance
       of that pair, so old pairs of a curved map fade instead of misleading. The mixing
       is the inverse slope of the last pair, $|\Delta y| / |\Delta r|$, at most 1.
    2. A trial point that is not finite, or whose residual is ten times the best, is
       *rejected*: first the mixed step alone is tried, then shorter Anderson steps.
    3. Eight steps without progress bring a *rescue*: first some plain iteration from
       `y0`; from then on *Newton-Krylov* steps from the best point, with `window`
       probes of the residual (a finite-difference GMRES) and a line search that insists
       on descent; and at last plain iteration from there, which converges for every
       contraction in whatever norm, while a hundred steps take off a tenth of the
       residual.

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
        `None` stands for 1e-8 in float64 and for 84 epsilon in any lower precision,
        which is 1e-5 in float32.
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

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
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
        history, zero = hist.empty(y, self.window), vs.zeros_like(y)
        return _State(
            points=_points(y, zero, y, zero, y, zero),
            best_aux=vs.zeros_like(aux_struct),
            history=history,
            explained=jnp.zeros_like(history.distance),
            factor=jnp.eye(history.window + 1, dtype=history.gram.dtype),
            control=at_start(vs.real_dtype(y)),
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
        tape = state.tape
        at = evaluated(fn, y, args, tape)
        tolerance = self._tolerance(y)
        seen = _evaluate(tolerance, state.points, at)
        state, control = _learn(state, at, seen)
        y, state = _propose(tolerance, state, control)
        y, tape = advanced(y, tape)
        return y, dataclasses.replace(state, tape=tape), at.aux

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
        ending = unpacked(state.control).ending
        stuck = verdict.coarse(verdict.why_stuck(_best(state)))
        started = ending != int(Ending.NONFINITE_START)
        result = optx.RESULTS.where(started, stuck, optx.RESULTS.nonfinite)
        fine = ending < int(Ending.NONFINITE_START)
        result = optx.RESULTS.where(fine, optx.RESULTS.successful, result)
        return ending > 0, result

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
        best, control = _best(state), unpacked(state.control)
        stuck = verdict.why_stuck(best)
        started = control.ending != int(Ending.NONFINITE_START)
        reason = RESULTS.where(started, stuck, RESULTS.nonfinite_start)
        fine = control.ending < int(Ending.NONFINITE_START)
        reason = RESULTS.where(fine, RESULTS.successful, reason)
        stats = verdict.statistics(best, reason, result)
        stats["num_rescues"] = control.num_rescues.astype(jnp.int32)
        return best.point.y, best.aux, stats

    def opening(
        self, fn: Any, y: Any, args: Any, aux: Any, max_steps: int | None
    ) -> Opened | None:
        """Returns the outcome of an iteration, as far as that contracts well."""
        return opening(fn, y, args, aux, self._tolerance(y), max_steps)

    def continued(self, state: Any, opened: Opened) -> tuple[Any, Int[Array, ""]]:
        """Returns the state that first goes through the opening's last steps again."""
        tape = replay(opened.seen)
        return dataclasses.replace(state, tape=tape), tape.left

    def _tolerance(self, y: Y) -> verdict.Tolerance:
        return verdict.tolerance(self.rtol, self.atol, self.norm, y)


def _points(*rows: Y) -> _Points[Y]:
    return _Points(jtu.tree_map(lambda *leaves: vs.in_one(leaves), *rows))


def _best(state: _State[Y]) -> verdict.Best[Y]:
    control = unpacked(state.control)
    point = verdict.Point(state.points[2], state.points[3], control.best_merit)
    return verdict.Best(
        point,
        state.best_aux,
        control.best_residual,
        control.best_error,
        control.best_floor,
    )


def _evaluate(
    tolerance: verdict.Tolerance, points: _Points[Y], at: Evaluation[Y]
) -> _Seen[Y]:
    """What the trial point is worth; nothing, if not finite."""
    y, residual, dtype = at.y, at.residual, vs.real_dtype(at.y)
    dy, dr = vs.minus(y, points[0]), vs.minus(residual, points[1])
    merit, far, distance = vs.lengths([residual, dr, dy], dtype)
    finite = jnp.isfinite(merit + far + distance)
    zero = vs.zeros_like(y)
    residual, dr, dy = (vs.select(finite, x, zero) for x in (residual, dr, dy))
    scaled, change, moved = tolerance.measures([residual, dr, dy], y)
    pair = hist.Pair(dy, dr, jnp.where(finite, far, 0), jnp.where(finite, distance, 0))
    floor = verdict.in_roundings(residual, y)
    numbers = Numbers(
        finite, merit, pair.change, pair.distance, scaled, change, moved, floor, merit
    )
    return _Seen(residual, pair, numbers)


def _learn(
    state: _State[Y], at: Evaluation[Y], seen: _Seen[Y]
) -> tuple[_State[Y], Control]:
    """The history, the points and the control, after an evaluation."""
    history, before = state.history, unpacked(state.control)
    cross = hist.cross(history, seen.pair)
    # What the model missed in the directions of the pairs that it used.
    missed = jnp.where(history.filled, cross / history.lengths, 0)
    missed = missed + before.step_size * state.explained
    missed = hist.half_solve(state.factor, missed)
    missed = jnp.sqrt(total(missed**2))

    numbers = dataclasses.replace(seen.numbers, missed=missed)
    vector = after(before, numbers, history.window, state.control)

    control = unpacked(vector)
    accepted, improved = control.accepted > 0, control.improved > 0
    from_start, from_best = control.from_start > 0, control.from_best > 0
    first = before.kind == int(Kind.START)
    turn = hist.Turn(control.slot, control.used, control.newest)
    history = hist.push(history, seen.pair, cross, turn, control.moved)

    def rows(new: Y, offset: int) -> tuple[Y, Y, Y]:
        points = state.points
        best = vs.select(improved, new, points[2 + offset])
        start = vs.select(first, new, points[4 + offset])
        anchor = vs.select(accepted, new, points[offset])
        anchor = vs.select(from_best, best, vs.select(from_start, start, anchor))
        return anchor, best, start

    where, what = rows(at.y, 0), rows(seen.residual, 1)
    state = _State(
        points=_points(where[0], what[0], where[1], what[1], where[2], what[2]),
        best_aux=vs.select(improved, at.aux, state.best_aux),
        history=history,
        explained=state.explained,
        factor=state.factor,
        control=vector,
    )
    return state, control


def _propose(
    tolerance: verdict.Tolerance, state: _State[Y], control: Control
) -> tuple[Y, _State[Y]]:
    r"""The next trial point, and the end if the best point is good enough.

    A probe fits the newest change of the residual instead of the residual, in the
    other changes. What is left is the next direction of the Krylov space: the
    residual and these directions are the basis of H. Walker and L. Zhou, *A simpler
    GMRES*, Numer. Linear Algebra Appl. 1 (1994).
    """
    history = state.history
    anchor, residual = state.points[0], state.points[1]
    dtype, eps = control.size.dtype, vs.resolution(anchor)
    probing, mixed = (control.kind == int(k) for k in (Kind.PROBE, Kind.MIXED))

    later = probing & (history.used > 0)
    target = vs.select(
        later, hist.take(history.dr, history.newest.astype(jnp.int32)), residual
    )
    filled = history.filled & ~(probing & (history.slots == history.newest))
    penalty = jnp.minimum((control.curvature * history.distance) ** 2, 1)
    fit = hist.fit(history, target, jnp.where(probing, 0, penalty), filled)
    reach = jnp.sqrt(total((fit.weights * history.distance) ** 2))
    explained = jnp.where(filled, fit.explained, 0)

    back = hist.combine(fit.coefficients, history.dy)
    full = vs.minus(vs.scaled(control.mixing, fit.rest), back)
    whole, left, far, taken = vs.lengths([target, fit.rest, anchor, full], dtype)
    new = left > eps**0.25 * whole
    length = eps**0.5 * (1 + far) / jnp.where(left > 0, left, 1)
    simple = jnp.where(control.num_plain > 0, 1, control.mixing) * control.step_size
    finite = jnp.isfinite(taken)

    y = vs.add_scaled(anchor, jnp.where(mixed | probing, 0, simple), residual)
    size = jnp.where(mixed & finite, control.step_size, 0)
    length = jnp.where(probing & jnp.isfinite(length), length, 0)
    step = vs.select(mixed, full, jax.lax.stop_gradient(fit.rest))
    step = vs.select(finite, step, vs.zeros_like(step))
    y = vs.add_scaled(y, size + length, step)

    (error,) = tolerance.measures([full], anchor)
    proposal = Proposal(new, error, jax.lax.stop_gradient(reach))
    state = _State(
        state.points,
        state.best_aux,
        history,
        jax.lax.stop_gradient(explained),
        fit.factor,
        with_proposal(control, proposal, state.control),
    )
    return y, state
