"""A step of the default fixed-point solver: what an evaluation says, what next."""

import dataclasses
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._reduce import total
from .._solution import Y
from . import _history as hist, _vector_space as vs, _verdict as verdict
from ._fixed_point_control import after, with_proposal
from ._fixed_point_numbers import at_start, Control, Kind, Numbers, Proposal, unpacked
from ._fixed_point_replay import Evaluation, Replay


class _Points(eqx.Module, Generic[Y]):
    """The anchor, the best point and the start: states and their residuals.

    Leaves have a leading axis of length 6, in this order.
    """

    stack: Y

    def __getitem__(self, row: int) -> Y:
        return jtu.tree_map(lambda x: x[row], self.stack)


class State(eqx.Module, Generic[Y]):
    points: _Points[Y]
    best_aux: Any
    history: hist.History[Y]
    explained: Float[Array, " slots"]
    half: Float[Array, "slots slots"]
    control: Float[Array, " n"]
    tape: Replay | None = None


class _Seen(eqx.Module, Generic[Y]):
    """An evaluation: the residual, and the pair with the anchor."""

    residual: Y
    pair: hist.Pair[Y]
    numbers: Numbers


def begun(y: Y, aux: Any, window: int) -> State[Y]:
    """The state before the first evaluation, which is at `y`."""
    history, zero = hist.empty(y, window), vs.zeros_like(y)
    return State(
        points=_points(y, zero, y, zero, y, zero),
        best_aux=aux,
        history=history,
        explained=jnp.zeros_like(history.distance),
        half=jnp.asarray(np.eye(history.window + 1), history.gram.dtype),
        control=at_start(vs.real_dtype(y)),
    )


def _points(*rows: Y) -> _Points[Y]:
    return _Points(jtu.tree_map(lambda *leaves: vs.in_one(leaves), *rows))


def best_of(state: State[Y]) -> verdict.Best[Y]:
    control = unpacked(state.control)
    point = verdict.Point(state.points[2], state.points[3], control.best_merit)
    return verdict.Best(
        point,
        state.best_aux,
        control.best_residual,
        control.best_error,
        control.best_floor,
    )


def seen_at(
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
    sense = jnp.ones_like(merit)
    if hist.dimension(y) == 1:
        sense = jnp.where(vs.dot(dy, dr, dtype) > 0, -sense, sense)
    numbers = Numbers(
        finite=finite,
        merit=merit,
        change=pair.change,
        distance=pair.distance,
        scaled=scaled,
        scaled_change=change,
        scaled_distance=moved,
        floor=verdict.in_roundings(residual, y),
        missed=merit,
        sense=sense,
    )
    return _Seen(residual, pair, numbers)


def learnt(
    state: State[Y], at: Evaluation[Y], seen: _Seen[Y]
) -> tuple[State[Y], Control]:
    """The history, the points and the control, after an evaluation."""
    history, before = state.history, unpacked(state.control)
    cross = hist.cross(history, seen.pair)
    # What the model missed in the directions of the pairs that it used.
    missed = jnp.where(history.filled, cross / history.lengths, 0)
    missed = missed + before.step_size * state.explained
    missed = hist.dots(state.half, missed, missed.dtype)
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
    state = State(
        points=_points(where[0], what[0], where[1], what[1], where[2], what[2]),
        best_aux=vs.select(improved, at.aux, state.best_aux),
        history=history,
        explained=state.explained,
        half=state.half,
        control=vector,
    )
    return state, control


def proposed(
    tolerance: verdict.Tolerance, state: State[Y], control: Control
) -> tuple[Y, State[Y]]:
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
    spanning = history.window >= hist.dimension(anchor)
    rest = left if spanning else jnp.zeros_like(left)
    proposal = Proposal(new, error, jax.lax.stop_gradient(reach), rest)
    state = State(
        state.points,
        state.best_aux,
        history,
        jax.lax.stop_gradient(explained),
        fit.half,
        with_proposal(control, proposal, state.control),
    )
    return y, state
