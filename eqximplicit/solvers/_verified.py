"""Any descent method, made honest: its last word is the gradient where it stops.

A quasi-Newton method stops when its steps are small, which happens far from a minimum
too. Here that claim only starts the next phase of the same compiled loop:

    SEARCH  the method itself, until it claims to be done, fails, stalls, or has used
            its share of steps
    POLISH  trust-region Newton-CG from there, until the gradient is small or no
            further progress is possible
    CHECK   one look at the curvature; then DONE, or once more POLISH if the objective
            could still fall and has fallen since the last look, or if a long step from
            a gradient within tolerance leads down: then to a finer tolerance, once

Each phase is guarded by a `while_loop` of at most one turn instead of a `cond`: under
`vmap` a phase that no lane is in is then not computed at all.
"""

import enum
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._solution import as_results, RESULTS
from . import _vector_space as vs
from ._curvature import is_negative, LANCZOS_STEPS, STEPS_IF_TAGGED
from ._newton_polish import hessian_product, NOISE, polish, PolishState, start
from ._stationary import Outlook, outlook

_DIVERGED = as_results(RESULTS.nonlinear_divergence)

MAX_STALLED = 20  # steps of SEARCH in a row that leave `y` where it is
FAR = 1e-2  # a distance from the minimum, relative, at which it is none
# So much of a gradient within tolerance is asked for next, where a long Newton step
# promises a lower value: of all that is left if there is a minimum, or in vain.
FINER = 1e-8


class Phase(enum.IntEnum):
    """Where a verified solve is."""

    SEARCH = 0
    POLISH = 1
    CHECK = 2
    DONE = 3


class Problem(eqx.Module):
    """What a solve works on; the arguments that optimistix hands to every method."""

    fn: Callable[..., Any]
    args: Any
    options: dict[str, Any]
    tags: frozenset[object]


class VerifiedState(eqx.Module):
    """The states of all phases, and the verdict."""

    search: Any
    polish: PolishState[Any]
    phase: Int[Array, ""]
    num_search: Int[Array, ""]
    num_stalled: Int[Array, ""]
    num_polish: Int[Array, ""]
    checked: Float[Array, ""]  # value at the last check
    atol: Float[Array, ""]  # of the gradient: as asked for, or finer
    min_curvature: Float[Array, ""]
    result: RESULTS
    aux: Any


class _Carry(eqx.Module):
    y: Any
    state: VerifiedState


class VerifiedDescent(eqx.Module):
    """The phases around a descent method; a part of the solvers, not one itself.

    **Arguments:**

    - `search`: the optimistix solver of the first phase, or `None` to begin with the
        second.
    - `objective`: turns `fn`'s output into the real scalar that is minimised.
    - `search_steps`: the largest number of steps of the first phase.
    - `rtol`, `atol`, `norm`: see [`eqximplicit.AutoMinimiser`][].
    """

    search: optx.AbstractIterativeSolver[Any, Any, Any, Any] | None
    objective: Callable[[Any], Scalar]
    search_steps: int
    rtol: float
    atol: float
    norm: Callable[[Any], Scalar]

    def init(
        self, problem: Problem, y: Any, f_struct: Any, aux_struct: Any
    ) -> VerifiedState:
        """Returns the state before the first step; evaluates nothing of its own."""
        args, options, tags = problem.args, problem.options, problem.tags
        search = None
        if self.search is not None:
            search = self.search.init(
                problem.fn, y, args, options, f_struct, aux_struct, tags
            )
        value_struct = jax.eval_shape(self.objective, f_struct)
        dtype = vs.real_dtype((y, value_struct))
        first = Phase.POLISH if self.search is None else Phase.SEARCH
        zero = jnp.zeros((), jnp.int32)
        return VerifiedState(
            search=search,
            polish=start(y, dtype),
            phase=jnp.asarray(int(first), jnp.int32),
            num_search=zero,
            num_stalled=zero,
            num_polish=zero,
            checked=jnp.asarray(jnp.inf, dtype),
            atol=jnp.asarray(self.atol, dtype),
            min_curvature=jnp.asarray(jnp.nan, dtype),
            result=RESULTS.successful,
            aux=vs.zeros_like(aux_struct),
        )

    def step(
        self, problem: Problem, y: Any, state: VerifiedState
    ) -> tuple[Any, VerifiedState, Any]:
        """Returns the point after one step of the phase that the solve is in."""
        carry = _Carry(y, state)
        if self.search is not None:
            carry = _in_phase(Phase.SEARCH, lambda c: self._search(problem, c), carry)
        carry = _in_phase(Phase.POLISH, lambda c: self._polish(problem, c), carry)
        carry = _in_phase(Phase.CHECK, lambda c: self._check(problem, c), carry)
        return carry.y, carry.state, carry.state.aux

    def terminate(self, state: VerifiedState) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the verdict is there, in optimistix's coarser codes."""
        nonfinite = (state.result == RESULTS.nonfinite_start) | (
            state.result == RESULTS.nonfinite_jacobian
        )
        # optimistix has no code for a saddle or an unreachable tolerance: its
        # "diverged" stands for every failure, and `stats["result"]` says which.
        failed = optx.RESULTS.where(
            nonfinite, optx.RESULTS.nonfinite, optx.RESULTS.nonlinear_divergence
        )
        result = optx.RESULTS.where(
            state.result == RESULTS.successful, optx.RESULTS.successful, failed
        )
        return state.phase == int(Phase.DONE), result

    def stats(self, state: VerifiedState, result: optx.RESULTS) -> dict[str, Any]:
        """Returns the verdict in full, and what it rests on."""
        fine = RESULTS.where(
            state.result == RESULTS.successful, as_results(result), state.result
        )
        return {
            "result": fine,
            "min_curvature": state.min_curvature,
            "num_polish_steps": state.num_polish,
        }

    def _scalar(self, problem: Problem) -> Callable[[Any], tuple[Scalar, Any]]:
        def objective(y: Any) -> tuple[Scalar, Any]:
            out, aux = problem.fn(y, problem.args)
            return self.objective(out), aux

        return objective

    def _search(self, problem: Problem, carry: _Carry) -> _Carry:
        assert self.search is not None
        state, fn, args = carry.state, problem.fn, problem.args
        options, tags = problem.options, problem.tags
        y, search, aux = self.search.step(
            fn, carry.y, args, options, state.search, tags
        )
        done, result = self.search.terminate(fn, y, args, options, search, tags)
        finite = vs.all_finite(y)
        y = vs.select(finite, y, carry.y)
        num_stalled = jnp.where(vs.equal(y, carry.y), state.num_stalled + 1, 0)
        num_search = state.num_search + 1
        leave = done | ~finite | (result != optx.RESULTS.successful)
        leave = leave | (num_stalled > MAX_STALLED) | (num_search >= self.search_steps)
        new_state = eqx.tree_at(
            lambda s: (
                s.search,
                s.polish.trial,
                s.phase,
                s.num_search,
                s.num_stalled,
                s.aux,
            ),
            state,
            (
                search,
                y,
                jnp.where(leave, int(Phase.POLISH), state.phase),
                num_search,
                num_stalled,
                aux,
            ),
            is_leaf=lambda x: x is None,
        )
        return _Carry(y, new_state)

    def _polish(self, problem: Problem, carry: _Carry) -> _Carry:
        state = carry.state
        (y, aux), new = polish(
            self._scalar(problem),
            self.norm,
            state.atol,
            (carry.y, state.aux),
            state.polish,
        )
        leave = new.stuck | ~(new.gradient_norm > state.atol) | new.diverged
        new_state = eqx.tree_at(
            lambda s: (s.polish, s.phase, s.num_polish, s.aux),
            state,
            (
                new,
                jnp.where(leave, int(Phase.CHECK), state.phase),
                state.num_polish + 1,
                aux,
            ),
            is_leaf=lambda x: x is None,
        )
        return _Carry(y, new_state)

    def _check(self, problem: Problem, carry: _Carry) -> _Carry:
        """One look at the Hessian decides whether and what the point is."""
        state, y, polished = carry.state, carry.y, carry.state.polish
        dtype = polished.value.dtype
        hvp = hessian_product(self._scalar(problem), y)
        steep = polished.gradient_norm > self.atol
        num_looks = _num_looks(problem.tags)
        ahead = outlook(hvp, y, polished.gradient, num_looks)
        result = self._verdict(ahead, steep, y, polished)
        bad = RESULTS.where(
            jnp.isfinite(polished.value),
            RESULTS.nonfinite_jacobian,
            RESULTS.nonfinite_start,
        )
        result = RESULTS.where(polished.nonfinite_start, bad, result)
        result = RESULTS.where(polished.diverged, _DIVERGED, result)
        # A first failure may be that of a trust region shrunk by rounding, not by `fn`.
        again = result == RESULTS.unattainable_tolerance
        again = again & (polished.value < state.checked)
        # The minimum may be there, at the end of a step that is long for its gradient.
        convex = (ahead.lowest > 0) & jnp.isfinite(ahead.distance)
        finer = (result == RESULTS.flat_objective) & convex & (state.atol >= self.atol)
        atol = jnp.where(finer, FINER * polished.gradient_norm, state.atol)
        again = again | finer
        result = RESULTS.where(again, RESULTS.successful, result)  # so far
        next_phase = jnp.where(again, int(Phase.POLISH), int(Phase.DONE))
        new_state = eqx.tree_at(
            lambda s: (
                s.polish.trial,
                s.polish.fresh,
                s.phase,
                s.checked,
                s.atol,
                s.min_curvature,
                s.result,
            ),
            state,
            (
                y,
                again,
                next_phase.astype(state.phase.dtype),
                polished.value,
                atol,
                ahead.lowest.astype(dtype),
                result,
            ),
        )
        return _Carry(y, new_state)

    def _verdict(
        self,
        ahead: Outlook,
        steep: Bool[Array, ""],
        y: Any,
        polished: PolishState[Any],
    ) -> RESULTS:
        """Returns what a point is from which the model looks `ahead`."""
        length = vs.length(y, polished.value.dtype)
        eps = vs.resolution(y)
        rounding = eps * jnp.abs(polished.value) + eps**2 * ahead.sensitivity
        rounding = jnp.maximum(NOISE * rounding, polished.noise)
        falls = ~(ahead.gain <= rounding)
        # Where rounding forbids a gradient below `atol`, one that a relative change
        # `rtol` of `y` would cause is as good as zero.
        near = ahead.distance <= self.rtol * length
        near = near & (ahead.gain <= self.rtol**2 * ahead.sensitivity)
        saddle = is_negative(ahead.lowest, ahead.largest, y, polished.gradient)
        # In half precision the tolerance is the wider one.
        far = jnp.maximum(FAR, self.rtol) * jnp.maximum(length, 1)
        far = falls & (ahead.distance > far)
        result = RESULTS.where(far, RESULTS.flat_objective, RESULTS.successful)
        result = RESULTS.where(saddle, RESULTS.saddle_point, result)
        unattainable = steep & falls & ~near
        return RESULTS.where(unattainable, RESULTS.unattainable_tolerance, result)


def _num_looks(tags: frozenset[object]) -> int:
    convex = lx.positive_semidefinite_tag in tags
    return STEPS_IF_TAGGED if convex else LANCZOS_STEPS


def _in_phase(
    phase: Phase, advance: Callable[[_Carry], _Carry], carry: _Carry
) -> _Carry:
    """Returns `advance(carry)` if it is in `phase`, else `carry`."""
    arrays, static = eqx.partition(carry, eqx.is_array)

    def body(turn: tuple[Bool[Array, ""], Any]) -> tuple[Bool[Array, ""], Any]:
        advanced = advance(eqx.combine(turn[1], static))
        return jnp.array(False), eqx.filter(advanced, eqx.is_array)

    pending = carry.state.phase == int(phase)
    _, arrays = jax.lax.while_loop(lambda turn: turn[0], body, (pending, arrays))
    return eqx.combine(arrays, static)
