"""The default root finder where no Jacobian fits: inexact Newton-Krylov steps."""

import sys
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._solution import as_results, Aux, RESULTS, Y
from ..linear_solvers import SparseDirect
from ..linear_solvers._placed import OnOneDevice
from ..linear_solvers.auto import narrow
from ..linear_solvers.krylov import HybridKrylov
from . import _root_numbers as rn, _root_phases as ph, _vector_space as vs
from ._multiple import is_hardly_shorter, is_seen

# Eisenstat and Walker (1996), choice 2: the forcing term and its safeguard.
_GAMMA, _LOOSEST, _TIGHTEST, _SAFEGUARD = 0.9, 0.5, 1e-4, 0.1
# A trial must lower |F| by this fraction of what its linear model promises.
_DECREASE, _BACKTRACK = 1e-4, 0.25
_BASIS = 20  # vectors of the Krylov space between two restarts of GMRES
_BANDS = 4  # products that yield the entries of a tridiagonal matrix, and test them
# A Newton step of so many roundings of the point cannot lead anywhere.
_ROUNDINGS = 100.0


class KrylovState(eqx.Module, Generic[Y, Aux]):
    """Between two trials. The base is the best point so far, the solver's `y`."""

    step: Y  # the trial is `y + step`
    norm: Float[Array, ""]  # |F(y)|
    largest: Float[Array, ""]  # largest absolute entry of F(y)
    forcing: Float[Array, ""]
    fraction: Float[Array, ""]  # of the Newton step that the trial takes
    first: Bool[Array, ""]
    num_evaluations: Int[Array, ""]
    ever_regular: Bool[Array, ""]  # some linear solve has not broken down
    start_length: Float[Array, ""]
    before: Float[Array, ""]  # length of the step that has led to the base
    aux: Aux


def init_krylov(y: Y, aux: Aux) -> KrylovState[Y, Aux]:
    """The state whose first trial is the initial guess itself."""
    dtype = vs.real_dtype(y)
    inf, one = jnp.array(jnp.inf, dtype), jnp.array(1, dtype)
    forcing = jnp.array(_LOOSEST, dtype)
    return KrylovState(
        step=vs.zeros_like(y),
        norm=inf,
        largest=inf,
        forcing=forcing,
        fraction=one,
        first=jnp.array(True),
        num_evaluations=jnp.array(0),
        ever_regular=jnp.array(False),
        start_length=rn.length_or_one(vs.length(stop_gradient(y), dtype)),
        before=jnp.zeros((), dtype),
        aux=aux,
    )


def _forcing(norm: Float[Array, ""], state: KrylovState[Any, Any]) -> Float[Array, ""]:
    """How accurate the next linear solve must be, relative to |F|."""
    ratio = jnp.where(state.first, 1, norm / state.norm)
    wanted = _GAMMA * ratio**2
    memory = _GAMMA * state.forcing**2
    wanted = jnp.where(memory > _SAFEGUARD, jnp.maximum(wanted, memory), wanted)
    return jnp.clip(wanted, _TIGHTEST, _LOOSEST)


def _inner(operator: lx.AbstractLinearOperator, forcing: Float[Array, ""]) -> Any:
    """Elimination for bands, which GMRES without a preconditioner is lost on."""
    struct = operator.in_structure()
    robust = HybridKrylov(rtol=_TIGHTEST, max_steps=10 * _BASIS, restart=_BASIS)
    if vs.size(struct) == sys.maxsize:
        return robust  # lineax's compares its basis with the unknowns, here a symbol
    if narrow(operator) is not None:
        return OnOneDevice(SparseDirect(), robust)
    return lx.GMRES(rtol=forcing, atol=0.0, restart=_BASIS, max_steps=10)  # pyright: ignore[reportArgumentType]


def _num_products(stats: dict[str, Any], y: PyTree[Array]) -> Int[Array, ""]:
    per_cycle = min(_BASIS, vs.size(y)) + 1
    return jnp.asarray(
        stats["num_steps"] * per_cycle if "num_steps" in stats else _BANDS
    )


def _not_broken(result: lx.RESULTS) -> Bool[Array, ""]:
    spent = result == lx.RESULTS.max_steps_reached
    return jnp.asarray((result == lx.RESULTS.successful) | spent)


def step_krylov(
    fn: Callable[[Y, Any], tuple[PyTree[Array], Aux]],
    args: Any,
    y: Y,
    state: KrylovState[Y, Aux],
    tags: frozenset[object],
) -> tuple[Y, KrylovState[Y, Aux]]:
    """The best point and the state after one trial.

    An accepted trial is followed by a new linear solve; a rejected one by a shorter
    step in the same direction, which costs one evaluation.
    """
    dtype = state.norm.dtype
    trial = vs.add_scaled(y, jnp.ones((), dtype), state.step)
    out, linear, aux = jax.linearize(lambda y: fn(y, args), trial, has_aux=True)
    frozen = stop_gradient(out)
    norm, largest = vs.length(frozen, dtype), vs.norm_of(optx.max_norm, frozen, dtype)
    enough = (1 - _DECREASE * state.fraction) * state.norm
    accepted = jnp.isfinite(norm) & (state.first | (norm < enough))
    forcing = jnp.where(accepted, _forcing(norm, state), state.forcing)

    def newton() -> tuple[Y, Int[Array, ""], Bool[Array, ""]]:
        struct = jax.eval_shape(lambda: trial)
        operator = lx.FunctionLinearOperator(linear, struct, tags=tags)
        sol = lx.linear_solve(operator, out, _inner(operator, forcing), throw=False)
        step = vs.scaled(-jnp.ones((), dtype), sol.value)
        return step, _num_products(sol.stats, y), _not_broken(sol.result)

    def shorter() -> tuple[Y, Int[Array, ""], Bool[Array, ""]]:
        step = vs.scaled(jnp.full((), _BACKTRACK, dtype), state.step)
        return step, jnp.zeros_like(state.num_evaluations), jnp.array(False)

    step, products, regular = jax.lax.cond(accepted, newton, shorter)
    fraction = jnp.where(accepted, 1, _BACKTRACK * state.fraction)
    y, best_aux = vs.select(accepted, (trial, aux), (y, state.aux))
    length = stop_gradient(vs.length(state.step, dtype))
    return y, KrylovState(
        step=step,
        norm=jnp.where(accepted, norm, state.norm),
        largest=jnp.where(accepted, largest, state.largest),
        forcing=forcing,
        fraction=fraction.astype(dtype),
        first=jnp.array(False),
        num_evaluations=state.num_evaluations + 1 + products,
        ever_regular=state.ever_regular | regular,
        start_length=state.start_length,
        before=jnp.where(accepted, length, state.before),
        aux=best_aux,
    )


def is_over_krylov(
    state: KrylovState[Any, Any], y: PyTree[Array], limits: rn.Limits
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the solve has ended, and whether with a root."""
    success = state.largest <= limits.atol
    no_start = ~state.first & ~jnp.isfinite(state.largest)
    too_short = state.fraction < float(jnp.finfo(state.fraction.dtype).eps) ** 0.5
    if limits.to_rounding:
        resolved = _is_exact(state, y) & ~_is_far(state, y) & state.ever_regular
        success = success | (too_short & resolved)
    return success | no_start | too_short, success


def _is_exact(state: KrylovState[Any, Any], y: PyTree[Array]) -> Bool[Array, ""]:
    """Whether a whole Newton step is no more than rounding."""
    dtype = state.norm.dtype
    length, step = (stop_gradient(vs.length(v, dtype)) for v in (y, state.step))
    rounding = _ROUNDINGS * float(jnp.finfo(dtype).eps) * length
    return (step > 0) & (step <= state.fraction * rounding)


def _is_far(state: KrylovState[Any, Any], y: PyTree[Array]) -> Bool[Array, ""]:
    length = stop_gradient(vs.length(y, state.norm.dtype))
    return length > ph.FAR * state.start_length


def is_slow_krylov(state: KrylovState[Any, Any], y: PyTree[Array]) -> Bool[Array, ""]:
    """Whether the next step is as long beside the last as near a multiple root.

    It may be elsewhere, too: a step is as accurate as its linear solve.
    """
    step, length = (vs.length(v, state.norm.dtype) for v in (state.step, y))
    return is_hardly_shorter(step, state.before) & is_seen(step, length)


def why_krylov(
    state: KrylovState[Any, Any], y: PyTree[Array], limits: rn.Limits
) -> RESULTS:
    """How a solve that is over ended; to be asked once, after the loop."""
    _, success = is_over_krylov(state, y, limits)
    far = _is_far(state, y)
    diverged = as_results(RESULTS.nonlinear_divergence)
    reason = RESULTS.where(far, diverged, RESULTS.local_minimum)
    reason = RESULTS.where(state.ever_regular, reason, RESULTS.singular_jacobian)
    exact = _is_exact(state, y)
    reason = RESULTS.where(exact, RESULTS.unattainable_tolerance, reason)
    no_start = ~jnp.isfinite(state.largest)
    reason = RESULTS.where(no_start, RESULTS.nonfinite_start, reason)
    return RESULTS.where(success, RESULTS.successful, reason)
