"""The default root finder where the Jacobian fits in memory: one trial per step."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._solution import as_results, Aux, RESULTS, Y
from . import _root_phases as ph
from ._root_solve import newton_or_damped_step
from ._root_vector import norm_of, real_vector, RealVector

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
    start_length: Float[Array, ""]
    ever_regular: Bool[Array, ""]  # some Jacobian was not singular
    stuck: Bool[Array, ""]  # no smaller residual can be resolved
    num_evaluations: Int[Array, ""]


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
    return DenseState(
        base=base,
        trial=space.ravel(y),
        phases=ph.first_phase(space.dtype),
        aux=aux,
        best_norm=inf,
        best_max=inf,
        start_length=_length_or_one(x),
        ever_regular=jnp.array(False),
        stuck=jnp.array(False),
        num_evaluations=jnp.array(0),
    )


def _length_or_one(x: Float[Array, " n"]) -> Float[Array, ""]:
    length = norm_of(stop_gradient(x))
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
    vector = np.cos(np.arange(1, n + 1))
    return jnp.asarray(vector / np.linalg.norm(vector), dtype)


class _Proposal(eqx.Module):
    trial: Float[Array, " n"]
    regular: Bool[Array, ""]


def _propose(
    base: Point,
    gradient: Float[Array, " n"],
    base_length: Float[Array, ""],
    phases: ph.Phases,
) -> _Proposal:
    """The next trial: a Newton step, bounded in length, or a damped one."""
    jacobian, residual = base.jacobian, base.residual
    columns = jnp.sqrt(jnp.sum(stop_gradient(jacobian) ** 2, axis=0))
    columns = jnp.where(columns > 0, columns, 1)
    columns = columns / jnp.sqrt(jnp.mean(columns**2))
    scale = jnp.where(phases.rescaled, columns, 1)
    slope = stop_gradient(norm_of(gradient / scale))
    step = newton_or_damped_step(
        jacobian, residual, gradient, scale, slope / phases.radius, phases.damped
    )
    length = norm_of(stop_gradient(step))
    condition = norm_of(stop_gradient(jacobian)) * length
    too_large = _REGULAR * base.norm / float(jnp.finfo(step.dtype).eps)
    regular = (condition < too_large) & ~phases.damped

    longest = phases.longest * base_length
    bounded = step * jnp.where(length > longest, longest / length, 1)
    step = jnp.where(phases.damped, step, bounded)
    step = jnp.where(phases.flipped, -step, step)
    usable = jnp.isfinite(length) & (length > 0)
    lost = longest * _direction_without_slope(step.size, step.dtype)
    return _Proposal(base.x + jnp.where(usable, step, lost), regular)


def _evaluate(
    fn: Callable[[Y], tuple[PyTree[Array], Aux]], space: RealVector, trial: Array
) -> tuple[Any, Array, Callable[[], Array], Aux]:
    """The trial as a pytree, its residual, a thunk for the Jacobian, and `aux`."""
    y = space.unravel(trial)
    out, linear, aux = jax.linearize(fn, y, has_aux=True)
    out_space = real_vector(out, space.dtype)

    def column(unit: Float[Array, " n"]) -> Float[Array, " n"]:
        return out_space.ravel(linear(space.unravel(unit)))

    def jacobian() -> Float[Array, "n n"]:
        return jax.vmap(column, out_axes=1)(
            jnp.asarray(np.eye(trial.size), trial.dtype)
        )

    return y, out_space.ravel(out), jacobian, aux


def _where(pred: Bool[Array, ""], x: Any, y: Any) -> Any:
    def pick(xi: Any, yi: Any) -> Any:
        return jnp.where(pred, xi, yi) if eqx.is_array(xi) else xi

    return jtu.tree_map(pick, x, y)


def is_over(
    state: DenseState[Any], limits: Limits
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the solve has ended, and whether with a root."""
    success = state.best_max <= limits.atol
    no_start = (state.num_evaluations > 0) & ~jnp.isfinite(state.best_max)
    exhausted = state.phases.num_cycles > limits.max_restarts
    return success | no_start | exhausted | state.stuck, success


def why(state: DenseState[Any], y: PyTree[Array], limits: Limits) -> RESULTS:
    """How a solve that is over ended; to be asked once, after the loop."""
    _, success = is_over(state, limits)
    diverged = as_results(RESULTS.nonlinear_divergence)
    far = norm_of(real_vector(y).ravel(y)) > _FAR * state.start_length
    reason = RESULTS.where(far, diverged, RESULTS.local_minimum)
    reason = RESULTS.where(state.ever_regular, reason, RESULTS.singular_jacobian)
    reason = RESULTS.where(state.stuck, RESULTS.unattainable_tolerance, reason)
    no_start = ~jnp.isfinite(state.best_max)
    reason = RESULTS.where(no_start, RESULTS.nonfinite_start, reason)
    return RESULTS.where(success, RESULTS.successful, reason)


def step_dense(
    fn: Callable[[Y], tuple[PyTree[Array], Aux]],
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
    norm, largest = norm_of(frozen), jnp.max(jnp.abs(frozen))
    finite = jnp.isfinite(largest)
    step = stop_gradient(x - base.x)
    resolution = float(jnp.finfo(x.dtype).eps) ** 0.75
    tiny = norm_of(step) <= resolution * norm_of(stop_gradient(base.x))
    ratio = jnp.where(finite, _ratio(stop_gradient(base), step, norm), -1)
    trial = ph.Trial(finite, norm, base.norm, ratio, tiny)
    success = finite & (largest <= limits.atol)
    first = ~jnp.isfinite(state.best_max)
    better = success | (finite & ((norm < state.best_norm) | first))
    accepted = ph.is_accepted(state.phases, trial)

    # The new base, and the best point.
    wanted = accepted & ~success
    matrix = jax.lax.cond(wanted, jacobian, lambda: base.jacobian)
    base = _where(accepted, Point(x, residual, matrix, norm), base)
    y, best_aux = _where(better, (trial_y, aux), (y, state.aux))
    best_norm = jnp.where(better, norm, state.best_norm)

    # The reaction of the phases, and the next trial.
    frozen_base = stop_gradient(base)
    gradient = base.jacobian.T @ base.residual
    slope = norm_of(stop_gradient(gradient)) / base.norm
    length = _length_or_one(base.x)
    seen = ph.Base(
        norm=base.norm,
        best_norm=best_norm,
        slope=slope,
        jacobian_norm=norm_of(frozen_base.jacobian),
        length=length,
    )
    phases, to_best = ph.next_phase(state.phases, trial, seen, accepted)
    proposal = _propose(base, gradient, length, phases)
    stuck = ~better & (base.norm <= best_norm) & _unresolvable(frozen_base, limits.atol)
    return y, DenseState(
        base=base,
        trial=jnp.where(to_best, space.ravel(y), proposal.trial),
        phases=phases,
        aux=best_aux,
        best_norm=best_norm,
        best_max=jnp.where(better, largest, state.best_max),
        start_length=state.start_length,
        ever_regular=state.ever_regular | proposal.regular,
        stuck=stuck,
        num_evaluations=state.num_evaluations + 1 + wanted.astype(int) * x.size,
    )
