r"""Trust-region Newton-CG: brings the gradient down at the very point returned.

One call of `polish` evaluates the trial point, accepts or rejects it, and proposes the
next trial by Steihaug's truncated conjugate gradients on

$$\min_p\; g \cdot p + \tfrac12\, p \cdot H p \quad\text{subject to}\quad |p| \le
\Delta,$$

which needs Hessian-vector products only and leaves a saddle along a direction of
negative curvature.

??? cite "References"

    T. Steihaug, *The conjugate gradient method and trust regions in large scale
    optimization*, SIAM J. Numer. Anal. 20 (1983), 626-637.
    A. R. Conn, N. I. M. Gould and P. L. Toint, *Trust-Region Methods*, SIAM (2000),
    section 17.4.2: the ratio of reductions in the presence of rounding.
"""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._lanes import in_every_lane
from .._solution import Aux, Y
from . import _vector_space as vs

MAX_CG_STEPS = 200
NOISE = 10.0  # rounding of a computed value of `fn`, in units of eps * |fn|
# Terms of `fn` that cancel may round it more coarsely. Where it changes by less than
# this part, in powers of eps, a gradient that is halved is progress too.
COARSE = 0.5
# A step this many roundings of `y` long changes `fn` by what the model says, so closely
# that all else is the rounding of `fn`.
SHORT = 100.0


class PolishState(eqx.Module, Generic[Y]):
    """The best point's value and gradient, and the trial to evaluate next."""

    trial: Y
    value: Float[Array, ""]
    gradient: Y
    gradient_norm: Float[Array, ""]
    radius: Float[Array, ""]
    step_length: Float[Array, ""]
    predicted: Float[Array, ""]  # reduction that the model promises at `trial`
    noise: Float[Array, ""]  # rounding of `fn`, as far as short steps have shown it
    fresh: Bool[Array, ""]  # nothing evaluated yet: the trial is the point itself
    stuck: Bool[Array, ""]  # no further progress is possible
    diverged: Bool[Array, ""]  # the objective or the point went to infinity

    @property
    def nonfinite_start(self) -> Bool[Array, ""]:
        """Whether the first point already has no finite value and gradient."""
        finite = jnp.isfinite(self.gradient_norm) & jnp.isfinite(self.value)
        return ~finite & ~self.diverged


class _Proposal(eqx.Module, Generic[Y]):
    """A step, its length, and the reduction that the model promises."""

    step: Y
    length: Float[Array, ""]
    predicted: Float[Array, ""]


def start(y: Y, dtype: jnp.dtype) -> PolishState[Y]:
    """Returns the state that evaluates `y` first and accepts it as it is."""
    zero = jnp.zeros((), dtype)
    no, yes = jnp.array(False), jnp.array(True)
    g = vs.zeros_like(y)
    return PolishState(y, zero, g, zero, zero, zero, zero, zero, yes, no, no)


def polish(
    objective: Callable[[Y], tuple[Scalar, Aux]],
    norm: Callable[[Any], Scalar],
    atol: Float[Array, ""],
    point: tuple[Y, Aux],
    state: PolishState[Y],
) -> tuple[tuple[Y, Aux], PolishState[Y]]:
    """Returns the better of point and trial, and the state with the next trial."""
    dtype = state.value.dtype
    y, aux = point
    (value, trial_aux), gradient = jax.value_and_grad(objective, has_aux=True)(
        state.trial
    )
    value = value.astype(dtype)
    gradient_norm = vs.norm_of(norm, gradient, dtype)
    accept, radius, stuck = _judge(state, value, gradient_norm, vs.resolution(y))
    y, aux = vs.select(accept, (state.trial, trial_aux), (y, aux))
    gradient = vs.select(accept, gradient, state.gradient)
    gradient_norm = jnp.where(accept, gradient_norm, state.gradient_norm)
    y_length = vs.length(y, dtype)
    short = state.step_length <= SHORT * vs.resolution(y) * y_length
    surprise = jnp.abs(state.value - value - state.predicted)
    shown = short & ~state.fresh & jnp.isfinite(surprise)
    far_away = vs.resolution(y) ** -3
    radius = jnp.where(state.fresh, jnp.maximum(y_length, 1), radius)
    stuck = stuck | (radius <= vs.resolution(y) * jnp.maximum(y_length, 1e-3))
    # Superlinear convergence: the residual shrinks faster than the gradient.
    forcing = jnp.minimum(0.1, jnp.sqrt(vs.length(gradient, dtype)))
    forcing = jnp.where(gradient_norm > atol, forcing, 1)
    proposal = _steihaug(hessian_product(objective, y), gradient, radius, forcing)
    new_state = PolishState(
        trial=vs.add_scaled(y, jnp.ones((), dtype), proposal.step),
        value=jnp.where(accept, value, state.value),
        gradient=gradient,
        gradient_norm=gradient_norm,
        radius=radius,
        step_length=proposal.length,
        predicted=proposal.predicted,
        noise=jnp.maximum(state.noise, jnp.where(shown, surprise, 0)),
        fresh=jnp.array(False),
        stuck=stuck,
        diverged=jnp.isneginf(value) | (y_length > far_away),
    )
    return (y, aux), new_state


def hessian_product(
    objective: Callable[[Y], tuple[Scalar, Aux]], y: Y
) -> Callable[[Y], Y]:
    """Returns `v -> H v` at `y`, linearised once."""
    gradient = lambda y_: jax.grad(objective, has_aux=True)(y_)[0]
    _, product = jax.linearize(gradient, y)
    return product


def _judge(
    state: PolishState[Any],
    value: Float[Array, ""],
    gradient_norm: Float[Array, ""],
    eps: float,
) -> tuple[Bool[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """Returns whether to accept the trial, the new radius, and whether to give up."""
    finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm)
    noise = NOISE * eps * jnp.abs(state.value)
    # Reductions below the rounding of `fn` cannot be measured: there the gradient,
    # which is computed to full relative precision, decides.
    rounding = state.predicted <= noise
    reduction = state.value - value
    ratio = (reduction + noise) / (state.predicted + noise)
    better = gradient_norm < state.gradient_norm
    halved = gradient_norm < 0.5 * state.gradient_norm
    change = jnp.maximum(state.predicted, jnp.abs(reduction))
    close = halved & (change <= eps**COARSE * jnp.abs(state.value))
    accept = jnp.where(rounding, better, (ratio > 1e-4) | close)
    accept = state.fresh | (finite & accept)
    stuck = jnp.where(state.fresh, ~finite, rounding & ~halved)
    shrink = ~finite | (~rounding & ~close & ~(ratio >= 0.25))
    grow = finite & (ratio > 0.75) & (state.step_length >= 0.99 * state.radius)
    radius = jnp.where(grow, 2 * state.radius, state.radius)
    radius = jnp.where(shrink, 0.25 * state.step_length, radius)
    return accept, radius, stuck


class _CG(eqx.Module, Generic[Y]):
    step: Y
    residual: Y
    direction: Y
    residual_sq: Float[Array, ""]
    predicted: Float[Array, ""]
    num_steps: Int[Array, ""]
    done: Bool[Array, ""]


def _steihaug(
    product: Callable[[Y], Y],
    gradient: Y,
    radius: Float[Array, ""],
    forcing: Float[Array, ""],
) -> _Proposal[Y]:
    """Returns an approximate minimiser of the quadratic model in the trust region.

    **Arguments:**

    - `product`: the Hessian as a linear map.
    - `gradient`, `radius`: the slope of the model, and the largest length of a step.
    - `forcing`: the model's gradient at the step, per `gradient`, that will do; at 1 no
        step is made.
    """
    dtype = radius.dtype
    # In the unit of the gradient, the square of which may overflow.
    unit = vs.norm_of(optx.max_norm, gradient, dtype)
    inverse = 1 / jnp.where(unit > 0, unit, 1)
    down = vs.scaled(inverse, vs.negative_conjugate(gradient))
    down_sq = vs.dot(down, down, dtype)
    target_sq = forcing**2 * down_sq
    max_steps = min(2 * vs.size(gradient) + 10, MAX_CG_STEPS)
    zero = jnp.zeros((), dtype)
    first = _CG(
        step=vs.zeros_like(gradient),
        residual=down,
        direction=down,
        residual_sq=down_sq,
        predicted=zero,
        num_steps=jnp.zeros((), jnp.int32),
        done=~jnp.isfinite(down_sq) | ~(down_sq > target_sq),
    )

    def body(cg: _CG[Y]) -> _CG[Y]:
        h_direction = vs.scaled(inverse, product(cg.direction))
        curvature = vs.dot(cg.direction, h_direction, dtype)
        full = cg.residual_sq / jnp.where(curvature > 0, curvature, 1)
        to_edge = _to_boundary(cg.step, cg.direction, radius, dtype)
        leave = ~(curvature > 0) | (full >= to_edge)
        scale = jnp.where(leave, to_edge, full)
        residual = vs.add_scaled(cg.residual, -scale, h_direction)
        residual_sq = vs.dot(residual, residual, dtype)
        # r.d = r.r for conjugate gradients: reduction of the model along d.
        gain = scale * cg.residual_sq - scale**2 * curvature / 2
        ratio = residual_sq / cg.residual_sq
        return _CG(
            step=vs.add_scaled(cg.step, scale, cg.direction),
            residual=residual,
            direction=vs.add_scaled(residual, ratio, cg.direction),
            residual_sq=residual_sq,
            predicted=cg.predicted + gain,
            num_steps=cg.num_steps + 1,
            done=leave | ~(residual_sq > target_sq),
        )

    running = lambda cg: ~cg.done & (cg.num_steps < max_steps)
    last = jax.lax.while_loop(running, body, in_every_lane(first))
    return _Proposal(last.step, vs.length(last.step, dtype), unit * last.predicted)


def _to_boundary(
    step: Any,
    direction: Any,
    radius: Float[Array, ""],
    dtype: jnp.dtype,
) -> Float[Array, ""]:
    """Returns the `t >= 0` with `|step + t direction| = radius`."""
    a = vs.dot(direction, direction, dtype)
    b = vs.dot(step, direction, dtype)
    c = jnp.maximum(radius**2 - vs.dot(step, step, dtype), 0)
    root = jnp.sqrt(b**2 + a * c)
    # Of the two forms of the same number, the one without cancellation.
    cancels = b > 0
    return jnp.where(cancels, c / jnp.where(cancels, b + root, 1), (root - b) / a)
