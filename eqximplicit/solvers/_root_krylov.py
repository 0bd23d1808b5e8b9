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
from .._solution import Aux, RESULTS, Y
from ..linear_solvers.krylov import HybridKrylov
from . import _vector_space as vs

# Eisenstat and Walker (1996), choice 2: the forcing term and its safeguard.
_GAMMA, _LOOSEST, _TIGHTEST, _SAFEGUARD = 0.9, 0.5, 1e-4, 0.1
# A trial must lower |F| by this fraction of what its linear model promises.
_DECREASE, _BACKTRACK = 1e-4, 0.25
_BASIS = 20  # vectors of the Krylov space between two restarts of GMRES


class KrylovState(eqx.Module, Generic[Y, Aux]):
    """Between two trials. The base is the best point so far, the solver's `y`."""

    step: Y  # the trial is `y + step`
    norm: Float[Array, ""]  # |F(y)|
    largest: Float[Array, ""]  # largest absolute entry of F(y)
    forcing: Float[Array, ""]
    fraction: Float[Array, ""]  # of the Newton step that the trial takes
    first: Bool[Array, ""]
    num_evaluations: Int[Array, ""]
    aux: Aux


def init_krylov(y: Y, aux: Aux) -> KrylovState[Y, Aux]:
    """The state whose first trial is the initial guess itself."""
    dtype = vs.real_dtype(y)
    inf, one = jnp.array(jnp.inf, dtype), jnp.array(1, dtype)
    forcing = jnp.array(_LOOSEST, dtype)
    zero = vs.zeros_like(y)
    return KrylovState(zero, inf, inf, forcing, one, jnp.array(True), jnp.array(0), aux)


def _forcing(norm: Float[Array, ""], state: KrylovState[Any, Any]) -> Float[Array, ""]:
    """How accurate the next linear solve must be, relative to |F|."""
    ratio = jnp.where(state.first, 1, norm / state.norm)
    wanted = _GAMMA * ratio**2
    memory = _GAMMA * state.forcing**2
    wanted = jnp.where(memory > _SAFEGUARD, jnp.maximum(wanted, memory), wanted)
    return jnp.clip(wanted, _TIGHTEST, _LOOSEST)


def _inner(forcing: Float[Array, ""], y: PyTree[Array]) -> Any:
    if vs.size(y) < sys.maxsize:
        return lx.GMRES(rtol=forcing, atol=0.0, restart=_BASIS, max_steps=10)  # pyright: ignore[reportArgumentType]
    # lineax's compares its basis with the number of unknowns, here a symbol.
    return HybridKrylov(rtol=_TIGHTEST, max_steps=10 * _BASIS, restart=_BASIS)


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

    def newton() -> tuple[Y, Int[Array, ""]]:
        operator = lx.FunctionLinearOperator(
            linear, jax.eval_shape(lambda: trial), tags=tags
        )
        sol = lx.linear_solve(operator, out, _inner(forcing, y), throw=False)
        products = sol.stats["num_steps"] * (min(_BASIS, vs.size(y)) + 1)
        return vs.scaled(-jnp.ones((), dtype), sol.value), jnp.asarray(products)

    def shorter() -> tuple[Y, Int[Array, ""]]:
        step = vs.scaled(jnp.full((), _BACKTRACK, dtype), state.step)
        return step, jnp.zeros_like(state.num_evaluations)

    step, products = jax.lax.cond(accepted, newton, shorter)
    fraction = jnp.where(accepted, 1, _BACKTRACK * state.fraction)
    y, best_aux = vs.select(accepted, (trial, aux), (y, state.aux))
    return y, KrylovState(
        step=step,
        norm=jnp.where(accepted, norm, state.norm),
        largest=jnp.where(accepted, largest, state.largest),
        forcing=forcing,
        fraction=fraction.astype(dtype),
        first=jnp.array(False),
        num_evaluations=state.num_evaluations + 1 + products,
        aux=best_aux,
    )


def is_over_krylov(
    state: KrylovState[Any, Any], atol: float
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the solve has ended, and whether with a root."""
    success = state.largest <= atol
    no_start = ~state.first & ~jnp.isfinite(state.largest)
    too_short = state.fraction < float(jnp.finfo(state.fraction.dtype).eps) ** 0.5
    return success | no_start | too_short, success


def why_krylov(state: KrylovState[Any, Any], atol: float) -> RESULTS:
    """How a solve that is over ended; to be asked once, after the loop."""
    _, success = is_over_krylov(state, atol)
    no_start = ~jnp.isfinite(state.largest)
    reason = RESULTS.where(no_start, RESULTS.nonfinite_start, RESULTS.local_minimum)
    return RESULTS.where(success, RESULTS.successful, reason)
