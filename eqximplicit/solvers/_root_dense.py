"""The default root finder where the Jacobian fits in memory: one trial per step."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._solution import Aux, RESULTS, Y
from . import _root_phases as ph
from ._root_solve import newton_or_damped_step
from ._root_vector import real_vector, RealVector, safe_norm

# A residual below this many roundings of its own terms cannot be made smaller.
_ROUNDINGS = 8.0
# `|J| |d| / |F|` above this fraction of 1/eps: the Jacobian is singular.
_REGULAR = 0.01
# A best point this many times farther out than the start: the solve diverged.
_FAR = 1e6


class Point(eqx.Module):
    """A point, its residual and the Jacobian there, as real vectors."""

    x: Float[Array, " n"]
    residual: Float[Array, " n"]
    jacobian: Float[Array, "n n"]
    norm: Float[Array, ""]


class DenseState(eqx.Module, Generic[Aux]):
    """Between two trials. The best point so far is the solver's `y`."""

    base: Point
    trial: Float[Array, " n"]
    phases: ph.Phases
    aux: Aux  # of the best point
    best_norm: Float[Array, ""]
    best_max: Float[Array, ""]  # largest absolute residual of the best point
    best_length: Float[Array, ""]
    start_length: Float[Array, ""]
    ever_regular: Bool[Array, ""]  # some Jacobian was not singular
    num_evaluations: Int[Array, ""]
    done: Bool[Array, ""]
    reason: RESULTS


class Limits(eqx.Module):
    """When to stop: the largest residual entry of a root, and how many restarts."""

    atol: float
    max_restarts: int


def init_dense(y: PyTree[Array], aux: Aux) -> DenseState[Aux]:
    """The state whose first trial is the initial guess itself."""
    space = real_vector(y)
    x = stop_gradient(space.ravel(y))
    inf = jnp.array(jnp.inf, space.dtype)
    base = Point(x, jnp.zeros_like(x), jnp.zeros((x.size, x.size), x.dtype), inf)
    length = _length_or_one(x)
    return DenseState(
        base=base,
        trial=space.ravel(y),
        phases=ph.first_phase(space.dtype),
        aux=aux,
        best_norm=inf,
        best_max=inf,
        best_length=length,
        start_length=length,
        ever_regular=jnp.array(False),
        num_evaluations=jnp.array(0),
        done=jnp.array(False),
        reason=RESULTS.successful,
    )


def _length_or_one(x: Float[Array, " n"]) -> Float[Array, ""]:
    length = safe_norm(stop_gradient(x))
    return jnp.where(length > 0, length, 1)


def _ratio(base: Point, step: Array, norm: Array) -> Float[Array, ""]:
    """Actual over predicted decrease of |F|^2; -1 where that has no meaning."""
    unit = jnp.where((base.norm > 0) & jnp.isfinite(base.norm), base.norm, 1)
    linear = (base.residual + base.jacobian @ step) / unit
    predicted = 1 - jnp.sum(linear**2)
    ratio = (1 - (norm / unit) ** 2) / jnp.where(predicted > 0, predicted, 1)
    return jnp.where((predicted > 0) & jnp.isfinite(ratio), ratio, -1)


def _unresolvable(base: Point, atol: float) -> Bool[Array, ""]:
    """Every residual entry is below `atol` or lost in the rounding of its terms."""
    terms = jnp.abs(base.jacobian) @ jnp.abs(base.x)
    noise = _ROUNDINGS * float(jnp.finfo(base.x.dtype).eps) * terms
    return jnp.all(jnp.abs(base.residual) <= jnp.maximum(noise, atol))


def _direction_without_slope(n: int, dtype: Any) -> Float[Array, " n"]:
    """A fixed unit vector that is orthogonal to no likely symmetry of a problem."""
    vector = jnp.cos(jnp.arange(1, n + 1, dtype=dtype))
    return vector / jnp.linalg.norm(vector)


class _Proposal(eqx.Module):
    trial: Float[Array, " n"]
    regular: Bool[Array, ""]


def _propose(base: Point, phases: ph.Phases) -> _Proposal:
    """The next trial: a Newton step, bounded in length, or a damped one."""
    jacobian, residual = base.jacobian, base.residual
    gradient = jacobian.T @ residual
    columns = jnp.linalg.norm(stop_gradient(jacobian), axis=0)
    columns = jnp.where(columns > 0, columns, 1)
    columns = columns / jnp.sqrt(jnp.mean(columns**2))
    scale = jnp.where(phases.rescaled, columns, 1)
    slope = stop_gradient(safe_norm(gradient / scale))
    step = newton_or_damped_step(
        jacobian, residual, gradient, scale, slope / phases.radius, phases.damped
    )
    length = safe_norm(stop_gradient(step))
    condition = safe_norm(stop_gradient(jacobian).reshape(-1)) * length
    too_large = _REGULAR * base.norm / float(jnp.finfo(step.dtype).eps)
    regular = (condition < too_large) & ~phases.damped

    longest = phases.longest * _length_or_one(base.x)
    bounded = step * jnp.where(length > longest, longest / length, 1)
    step = jnp.where(phases.damped, step, bounded)
    step = jnp.where(phases.flipped, -step, step)
    usable = jnp.all(jnp.isfinite(step)) & (length > 0)
    lost = longest * _direction_without_slope(step.size, step.dtype)
    return _Proposal(base.x + jnp.where(usable, step, lost), regular)


def _evaluate(
    fn: Callable[[Y, Any], tuple[PyTree[Array], Aux]], space: RealVector, trial: Array
) -> tuple[Y, Array, Callable[[], Array], Aux]:
    """The trial as a pytree, its residual, a thunk for the Jacobian, and `aux`."""
    y = space.unravel(trial)
    out, linear, aux = jax.linearize(fn, y, has_aux=True)
    out_space = real_vector(out, space.dtype)

    def column(unit: Float[Array, " n"]) -> Float[Array, " n"]:
        return out_space.ravel(linear(space.unravel(unit)))

    def jacobian() -> Float[Array, "n n"]:
        return jax.vmap(column, out_axes=1)(jnp.eye(trial.size, dtype=trial.dtype))

    return y, out_space.ravel(out), jacobian, aux


def _where(pred: Bool[Array, ""], x: Any, y: Any) -> Any:
    def pick(xi: Any, yi: Any) -> Any:
        return jnp.where(pred, xi, yi) if eqx.is_array(xi) else xi

    return jtu.tree_map(pick, x, y)


def _reason(
    state: DenseState[Any], limits: Limits, stuck: Bool[Array, ""]
) -> tuple[Bool[Array, ""], RESULTS]:
    """Whether the solve has failed, and why."""
    no_start = ~jnp.isfinite(state.best_max)
    exhausted = state.phases.num_cycles > limits.max_restarts
    far = state.best_length > _FAR * state.start_length
    reason = RESULTS.where(far, RESULTS.nonlinear_divergence, RESULTS.local_minimum)
    reason = RESULTS.where(state.ever_regular, reason, RESULTS.singular_jacobian)
    reason = RESULTS.where(stuck, RESULTS.unattainable_tolerance, reason)
    reason = RESULTS.where(no_start, RESULTS.nonfinite_start, reason)
    return no_start | stuck | exhausted, reason


def step_dense(
    fn: Callable[[Y, Any], tuple[PyTree[Array], Aux]],
    y: Y,
    state: DenseState[Aux],
    limits: Limits,
) -> tuple[Y, DenseState[Aux]]:
    """The best point and the state after one trial.

    It evaluates the trial, takes it as the new base if the phase accepts it (only then
    is a Jacobian formed), lets the phases react, and proposes the next trial.
    """
    space, base = real_vector(y), state.base
    trial_y, residual, jacobian, aux = _evaluate(fn, space, state.trial)
    x = space.ravel(trial_y)

    # What the trial shows. Decisions carry no derivative; steps do.
    frozen = stop_gradient(residual)
    norm, largest = safe_norm(frozen), jnp.max(jnp.abs(frozen))
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(x))
    step = stop_gradient(x - base.x)
    resolution = float(jnp.finfo(x.dtype).eps) ** 0.75
    tiny = safe_norm(step) <= resolution * safe_norm(stop_gradient(base.x))
    ratio = jnp.where(finite, _ratio(stop_gradient(base), step, norm), -1)
    trial = ph.Trial(finite, norm, base.norm, ratio, tiny)
    success = finite & (largest <= limits.atol)
    better = success | (finite & (norm < state.best_norm))
    accepted = ph.is_accepted(state.phases, trial)

    # The new base, and the best point.
    wanted = accepted & ~success
    matrix = jax.lax.cond(wanted, jacobian, lambda: base.jacobian)
    base = _where(accepted, Point(x, residual, matrix, norm), base)
    y, best_aux = _where(better, (trial_y, aux), (y, state.aux))
    best_norm = jnp.where(better, norm, state.best_norm)
    best_length = jnp.where(better, _length_or_one(x), state.best_length)

    # The reaction of the phases, and the next trial.
    frozen_base = stop_gradient(base)
    slope = safe_norm(frozen_base.jacobian.T @ frozen_base.residual) / base.norm
    seen = ph.Base(
        norm=base.norm,
        best_norm=best_norm,
        slope=slope,
        jacobian_norm=safe_norm(frozen_base.jacobian.reshape(-1)),
        length=_length_or_one(base.x),
        best_length=best_length,
    )
    phases, to_best = ph.next_phase(state.phases, trial, seen, accepted)
    proposal = _propose(base, phases)
    state = DenseState(
        base=base,
        trial=jnp.where(to_best, space.ravel(y), proposal.trial),
        phases=phases,
        aux=best_aux,
        best_norm=best_norm,
        best_max=jnp.where(better, largest, state.best_max),
        best_length=best_length,
        start_length=state.start_length,
        ever_regular=state.ever_regular | proposal.regular,
        num_evaluations=state.num_evaluations + 1 + wanted.astype(int) * x.size,
        done=success,
        reason=RESULTS.successful,
    )
    stuck = ~better & (base.norm <= best_norm) & _unresolvable(frozen_base, limits.atol)
    failed, reason = _reason(state, limits, stuck)
    done = success | failed
    reason = RESULTS.where(success | ~failed, RESULTS.successful, reason)
    return y, eqx.tree_at(lambda s: (s.done, s.reason), state, (done, reason))
