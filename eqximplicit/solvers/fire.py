"""FIRE: minimisation by damped molecular dynamics, one gradient per step."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._ranges import refuse_negative
from .._solution import as_results, Aux, RESULTS, Y
from . import _vector_space as vs, _verdict as verdict

# A force this many times the first one is no way to a minimum.
RUNAWAY = 1e12


def _translate(y: Any, step: Any) -> Any:
    return jtu.tree_map(jnp.add, y, step)


class _FIREState(eqx.Module, Generic[Y]):
    """The dynamics at the current `y`; `force_norm` belongs to exactly that point."""

    velocity: Y
    force: Y
    force_norm: Float[Array, ""]
    first_norm: Float[Array, ""]
    dt: Float[Array, ""]
    alpha: Float[Array, ""]
    num_downhill: Int[Array, ""]


class FIRE(optx.AbstractMinimiser[Y, Aux, _FIREState[Y]]):
    r"""A minimiser that follows Newton's equation of motion and stops when uphill.

    With force $F = -\nabla f(y)$, unit masses and velocity $v$, a step is one velocity
    Verlet step of length $\Delta t$, then the steering

    $$v \leftarrow (1 - \alpha)\, v + \alpha\, |v|\, F / |F|.$$

    While the power $F \cdot v$ is positive for more than `n_min` steps, $\Delta t$
    grows up to `dt_max` and $\alpha$ decays. When it is negative, the velocity is set
    to zero, $\Delta t$ is cut and $\alpha$ is reset. It costs one gradient per step and
    three vectors of memory, never asks for the value of `fn`, and stops when
    `norm(gradient) <= atol` at the very point that it returns. A trial point where the
    gradient is not finite is rejected: the system stays, comes to rest, and the time
    step is cut. A force of 1e12 times the first one, or of 1 if that was less, is
    reported as divergence: shorten `dt_max`.

    A complex state moves along `-conj(gradient)`. The steps are differentiable in both
    modes (`optimistix.RecursiveCheckpointAdjoint`).

    **Arguments:**

    - `rtol`: part of every solver's interface, and without effect: at a minimum the
        force is zero, and `rtol * 0` is zero.
    - `atol`: the largest `norm` of the gradient at which the solve ends. Dimensionless.
    - `norm`: the norm of the gradient; the default is the largest absolute entry.
    - `dt_start`: the first time step.
    - `dt_max`: the largest time step. The motion is stable while it is below `2 / w`,
        where `w**2` is the largest eigenvalue of the Hessian.
    - `n_min`: number of downhill steps before the time step grows.
    - `f_inc`, `f_dec`: factors that lengthen and shorten the time step.
    - `alpha_start`, `f_alpha`: first steering strength and the factor of its decay.
    - `softening`: `|F|` in the steering is `sqrt(F.F + softening)`, as in JAX MD. The
        paper's algorithm, which steers just as hard close to the minimum, has 0.
    - `shift`: `shift(y, step)` moves a point; the default adds. Give the one of your
        space, for example to wrap positions back into a periodic box.

    **Raises:**

    - `ValueError`: a constant is outside of its range.

    A positive `atol` below the resolution of the dtype is met by a `UserWarning`.

    !!! example

        ```python
        solver = eqi.FIRE(rtol=0.0, atol=1e-12, dt_start=0.001, dt_max=0.005)
        optx.minimise(energy, solver, positions, max_steps=1_000_000)
        ```

    ??? cite "References"

        E. Bitzek, P. Koskinen, F. Gähler, M. Moseler and P. Gumbsch, *Structural
        relaxation made simple*, Physical Review Letters 97, 170201 (2006).
        S. S. Schoenholz and E. D. Cubuk, *JAX, M.D.: a framework for differentiable
        physics*, NeurIPS 2020: the velocity Verlet form and the softening.
    """

    rtol: float
    atol: float
    norm: Callable[[Any], Scalar] = optx.max_norm
    dt_start: float = 0.1
    dt_max: float = 0.4
    n_min: int = 5
    f_inc: float = 1.1
    f_dec: float = 0.5
    alpha_start: float = 0.1
    f_alpha: float = 0.99
    softening: float = 1e-6
    shift: Callable[[Y, Y], Y] = _translate

    def __check_init__(self) -> None:
        refuse_negative("FIRE", rtol=self.rtol, atol=self.atol)
        rules = {
            "dt_start": (0 < self.dt_start <= self.dt_max, "in (0, dt_max]"),
            "n_min": (self.n_min >= 0, "at least 0"),
            "f_inc": (self.f_inc >= 1, "at least 1"),
            "f_dec": (0 < self.f_dec < 1, "in (0, 1)"),
            "alpha_start": (0 <= self.alpha_start <= 1, "in [0, 1]"),
            "f_alpha": (0 < self.f_alpha <= 1, "in (0, 1]"),
            "softening": (self.softening >= 0, "at least 0"),
        }
        for name, (holds, range_) in rules.items():
            if not holds:
                raise ValueError(
                    f"`FIRE({name}=...)` must be {range_}; got {getattr(self, name)}."
                )
        # Zero is a way to ask for every step.
        if not isinstance(self.atol, Tracer) and self.atol > 0:
            eps = float(jnp.finfo(jnp.result_type(float)).eps)
            verdict.warn_if_unreachable("FIRE", 0.0, self.atol, eps)

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: jax.ShapeDtypeStruct,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> _FIREState[Y]:
        """Returns the system at rest in `y`, with the force there."""
        del options, f_struct, aux_struct, tags
        dtype = vs.real_dtype(y)
        force, _ = _force(fn, y, args)
        norm = vs.norm_of(self.norm, force, dtype)
        return _FIREState(
            velocity=vs.zeros_like(y),
            force=force,
            force_norm=norm,
            first_norm=norm,
            dt=jnp.asarray(self.dt_start, dtype),
            alpha=jnp.asarray(self.alpha_start, dtype),
            num_downhill=jnp.zeros((), jnp.int32),
        )

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _FIREState[Y],
        tags: frozenset[object],
    ) -> tuple[Y, _FIREState[Y], Aux]:
        """Returns the system one time step later."""
        del options, tags
        dtype = state.dt.dtype
        half = vs.add_scaled(state.velocity, state.dt / 2, state.force)  # v + F dt/2
        trial = self.shift(y, vs.scaled(state.dt, half))  # y + v dt + F dt^2 / 2
        new_force, aux = _force(fn, trial, args)
        new_norm = vs.norm_of(self.norm, new_force, dtype)
        accept = jnp.isfinite(new_norm)
        force = vs.select(accept, new_force, state.force)
        velocity = vs.add_scaled(half, state.dt / 2, force)
        power = vs.dot(force, velocity, dtype)
        steered = self._steer(velocity, force, state.alpha)
        uphill = (power < 0) | ~accept
        dt, alpha, num_downhill = self._adapt(state, power, uphill)
        new_state = _FIREState(
            velocity=vs.select(uphill, vs.zeros_like(y), steered),
            force=force,
            force_norm=jnp.where(accept, new_norm, state.force_norm),
            first_norm=state.first_norm,
            dt=dt,
            alpha=alpha,
            num_downhill=num_downhill,
        )
        return vs.select(accept, trial, y), new_state, aux

    def _steer(self, velocity: Y, force: Y, alpha: Float[Array, ""]) -> Y:
        dtype = alpha.dtype
        softening = jnp.asarray(self.softening, dtype)
        force_sq = vs.dot(force, force, dtype) + softening
        # A force of exactly zero (only without softening) steers nowhere.
        force_length = jnp.sqrt(jnp.where(force_sq > 0, force_sq, 1))
        gain = alpha * _safe_length(velocity, dtype) / force_length
        return vs.add_scaled(vs.scaled(1 - alpha, velocity), gain, force)

    def _adapt(
        self, state: _FIREState[Y], power: Float[Array, ""], uphill: Bool[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
        num_downhill = jnp.where(uphill, 0, state.num_downhill + 1)
        lengthen = (power > 0) & (num_downhill > self.n_min)
        longer = jnp.minimum(state.dt * self.f_inc, self.dt_max)
        dt = jnp.where(lengthen, longer, state.dt)
        alpha = jnp.where(lengthen, state.alpha * self.f_alpha, state.alpha)
        dt = jnp.where(uphill, state.dt * self.f_dec, dt)
        alpha = jnp.where(uphill, jnp.asarray(self.alpha_start, dt.dtype), alpha)
        return dt, alpha, num_downhill

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _FIREState[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the force is small enough, or beyond all bounds."""
        del fn, y, args, options, tags
        # Later forces are finite, since `step` rejects any other: only a bad start
        # gets here.
        result = optx.RESULTS.where(
            jnp.isfinite(state.force_norm),
            optx.RESULTS.successful,
            optx.RESULTS.nonfinite,
        )
        runaway = _runs_away(state)
        diverged = optx.RESULTS.nonlinear_divergence
        result = optx.RESULTS.where(runaway, diverged, result)
        return ~(state.force_norm > self.atol) | runaway, result

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: _FIREState[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns `y`, and in `stats` the norm of the force and the last time step."""
        del fn, args, options, tags
        fine = RESULTS.where(
            jnp.isfinite(state.force_norm),
            as_results(result),
            RESULTS.nonfinite_start,
        )
        diverged = verdict.divergence()
        fine = RESULTS.where(_runs_away(state), diverged, fine)
        stats = {"result": fine, "force_norm": state.force_norm, "dt": state.dt}
        return y, aux, stats


def _runs_away(state: _FIREState[Any]) -> Bool[Array, ""]:
    """Whether the force has grown beyond all bounds, as where `dt` is too long."""
    finite = jnp.isfinite(state.force_norm)
    return finite & (state.force_norm > RUNAWAY * jnp.maximum(state.first_norm, 1))


def _force(
    fn: Callable[[Y, Any], tuple[Scalar, Aux]], y: Y, args: Any
) -> tuple[Y, Aux]:
    gradient, aux = jax.grad(fn, has_aux=True)(y, args)
    return vs.negative_conjugate(gradient), aux


def _safe_length(x: Any, dtype: jnp.dtype) -> Float[Array, ""]:
    """Returns the length of `x`, with derivative 0 instead of NaN at `x = 0`."""
    square = vs.dot(x, x, dtype)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
