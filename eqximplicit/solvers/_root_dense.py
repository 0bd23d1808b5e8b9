"""The default root finder where the Jacobian fits in memory: one trial per step."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._entries import all_finite, peak
from .._solution import as_results, Aux, RESULTS, Y
from ..linear_solvers._columns import columns_of
from ..linear_solvers._dense import matvec
from . import _root_numbers as rn, _root_phases as ph, _vector_space as vs
from ._root_solve import newton_or_damped_step
from ._root_vector import norm_of, real_vector, RealVector

# A residual below this many roundings of its own terms cannot be made smaller.
_ROUNDINGS = 8.0


class Base(eqx.Module):
    """A point, its residual and the Jacobian there, as real vectors.

    The Jacobian is kept transposed: so LAPACK, which counts by columns, wants it.
    """

    x: Float[Array, " n"]
    residual: Float[Array, " n"]
    transposed: Float[Array, "n n"]


class DenseState(eqx.Module, Generic[Aux]):
    """Between two trials. The best point so far is the solver's `y`."""

    base: Base
    trial: Float[Array, " n"]
    aux: Aux  # of the best point
    control: Float[Array, " c"]
    ever_regular: Bool[Array, ""]  # some Jacobian was not singular


def init_dense(y: PyTree[Array], aux: Aux) -> DenseState[Aux]:
    """The state whose first trial is the initial guess itself."""
    space = real_vector(y)
    x = stop_gradient(space.ravel(y))
    return DenseState(
        base=Base(x, jnp.zeros_like(x), jnp.zeros((x.size, x.size), x.dtype)),
        trial=space.ravel(y),
        aux=aux,
        control=rn.at_start(norm_of(x)),
        ever_regular=jnp.array(False),
    )


def _measured_trial(base: Base, best: Array, x: Array, residual: Array) -> rn.Trial:
    step = x - base.x
    linear = base.residual + matvec(base.transposed.T, step)
    terms = jnp.sum(jnp.abs((x - best)[:, None] * base.transposed), axis=0)
    lengths = vs.lengths([residual, step, base.x, linear, terms], x.dtype)
    norm, step_length, base_length, linear_norm, terms_length = lengths
    largest = peak(residual)
    return rn.Trial(norm, largest, step_length, base_length, linear_norm, terms_length)


class _Measured(eqx.Module):
    """What the base shows, without derivatives."""

    control: rn.Base
    columns: Float[Array, " n"]  # lengths of the columns of J, relative to their mean
    scaled_slope: Float[Array, ""]  # |J'F|, entry by entry over those


def _measured_base(base: Base, gradient: Array, atol: float) -> _Measured:
    columns = jnp.sqrt(jnp.sum(base.transposed**2, axis=1))
    jacobian_norm = jnp.sqrt(jnp.sum(columns**2))
    mean = rn.length_or_one(jacobian_norm) / base.x.size**0.5
    columns = jnp.where(columns > 0, columns, mean) / mean
    slope, length, scaled_slope = vs.lengths(
        [gradient, base.x, gradient / columns], base.x.dtype
    )
    # An entry below this many roundings of its own terms cannot be made smaller.
    terms = jnp.sum(jnp.abs(base.transposed * base.x[:, None]), axis=0)
    noise = _ROUNDINGS * float(jnp.finfo(base.x.dtype).eps) * terms
    excess = jnp.abs(base.residual) - jnp.maximum(noise, atol)
    excess = jnp.max(jnp.where(jnp.isnan(excess), jnp.inf, excess))
    shown = rn.Base(slope, jacobian_norm, length, excess, jnp.max(noise))
    return _Measured(shown, columns, scaled_slope)


def _direction(n: int, number: Array) -> Float[Array, " n"]:
    """A vector of about unit length for every number; all of them fill a cube evenly.

    Weyl's sequence: hardly any symmetry of a problem favours one of them.
    """
    irrational = np.sqrt(2) * np.arange(1, n + 1) ** 2 % 1
    turns = (1 + number) * jnp.asarray(irrational, number.dtype)
    return (12 / n) ** 0.5 * (turns - jnp.floor(turns) - 0.5)


def _propose(
    base: Base,
    gradient: Array,
    seen: _Measured,
    control: rn.Control,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """The next trial: a Newton step, bounded in length, or a damped one.

    And whether it shows that the Jacobian is regular.
    """
    transposed, damped = base.transposed, control.damped > 0
    scale = jnp.where(control.rescaled, seen.columns, 1)
    slope = jnp.where(control.rescaled, seen.scaled_slope, seen.control.slope)
    step = newton_or_damped_step(
        transposed, base.residual, gradient, scale, slope / control.radius, damped
    )
    size = norm_of(stop_gradient(step))
    longest = control.longest * rn.length_or_one(seen.control.length)
    factor = jnp.where(damped | (size <= longest), 1, longest / size)
    factor = jnp.where(control.flipped > 0, -factor, factor)
    usable = jnp.isfinite(size) & (size > 0) & (control.aside == 0)
    # Without a direction the way must not grow with the distance: where `y + 1` is
    # `y`, anything is a root.
    widest = jnp.minimum(longest, ph.FAR * control.start)
    lost = widest * _direction(step.size, control.aside)
    trial = base.x + jnp.where(usable, factor * step, lost)
    return trial, ph.is_regular(control, seen.control.jacobian, size)


def _evaluate(
    fn: Callable[[Y], tuple[PyTree[Array], Aux]], space: RealVector, trial: Array
) -> tuple[Any, Array, Callable[[], Array], Aux]:
    """The trial as a pytree, its residual, a thunk for the Jacobian, and `aux`."""
    y = space.unravel(trial)
    out, linear, aux = jax.linearize(fn, y, has_aux=True)
    out_space = real_vector(out, space.dtype)

    def column(unit: Float[Array, " n"]) -> Float[Array, " n"]:
        return out_space.ravel(linear(space.unravel(unit)))

    def transposed() -> Float[Array, "n n"]:
        return columns_of(column, trial)

    return y, out_space.ravel(out), transposed, aux


def _where(pred: Bool[Array, ""], x: Any, y: Any) -> Any:
    def pick(xi: Any, yi: Any) -> Any:
        return jnp.where(pred, xi, yi) if eqx.is_array(xi) else xi

    return jtu.tree_map(pick, x, y)


def why(state: DenseState[Any], y: PyTree[Array], limits: rn.Limits) -> RESULTS:
    """How a solve that is over ended; to be asked once, after the loop."""
    control = rn.read(state.control)
    _, success = ph.is_over(control, limits, state.ever_regular)
    diverged = as_results(RESULTS.nonlinear_divergence)
    far = norm_of(real_vector(y).ravel(y)) > ph.FAR * control.start
    reason = RESULTS.where(far, diverged, RESULTS.local_minimum)
    stuck = control.stuck > 0
    reason = RESULTS.where(stuck, RESULTS.unattainable_tolerance, reason)
    # Far along a kernel everything is rounding: that is no reason of its own.
    reason = RESULTS.where(state.ever_regular, reason, RESULTS.singular_jacobian)
    smooth = all_finite(state.base.transposed)
    reason = RESULTS.where(smooth, reason, RESULTS.nonfinite_jacobian)
    no_start = ~jnp.isfinite(control.best_max)
    reason = RESULTS.where(no_start, RESULTS.nonfinite_start, reason)
    return RESULTS.where(success, RESULTS.successful, reason)


def step_dense(
    fn: Callable[[Y], tuple[PyTree[Array], Aux]],
    y: Y,
    state: DenseState[Aux],
    limits: rn.Limits,
) -> tuple[Y, DenseState[Aux]]:
    """The best point and the state after one trial.

    It evaluates the trial, takes it as the new base if the phase accepts it (only then
    is a Jacobian formed), lets the phases react, and proposes the next trial. Decisions
    carry no derivative; steps do.
    """
    space, base, atol = real_vector(y), state.base, limits.atol
    trial_y, residual, transposed, aux = _evaluate(fn, space, state.trial)
    x = space.ravel(trial_y)

    # What the trial shows; the new base, and the best point.
    trial = _measured_trial(*stop_gradient((base, space.ravel(y), x, residual)))
    decision = ph.decided(state.control, trial, limits)
    accepted, better = decision.accepted > 0, decision.better > 0
    matrix = jax.lax.cond(decision.wanted > 0, transposed, lambda: base.transposed)
    new = _where(accepted, (x, residual), (base.x, base.residual))
    base = Base(new[0], new[1], matrix)
    y, best_aux = _where(better, (trial_y, aux), (y, state.aux))

    # What the base shows, the reaction of the phases, and the next trial.
    gradient = matvec(base.transposed, base.residual)
    seen = _measured_base(*stop_gradient((base, gradient)), atol)
    vector = ph.after(state.control, trial, seen.control, decision, x.size)
    control = rn.read(vector)
    proposed, regular = _propose(base, gradient, seen, control)
    return y, DenseState(
        base=base,
        trial=jnp.where(control.to_best > 0, space.ravel(y), proposed),
        aux=best_aux,
        control=vector,
        ever_regular=state.ever_regular | regular,
    )
