"""The loop that drives an optimistix solver, lean enough for small problems.

Nothing but the solver's own step and termination runs inside it. Whether the values are
finite, and how the solve ended, is asked once after the loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Int

from ._condition import AbstractCondition
from ._custom_types import PyTree
from ._entries import all_finite, max_abs, max_norm
from ._inverse import inverse_of
from ._lanes import any_lane, in_every_lane
from ._monitor import Monitor, Watch
from ._one_kernel import in_one_kernel
from ._problem import iterated_fn, IteratedFn, Solver
from ._solution import as_results, is_successful, RESULTS
from ._state import coarse_epsilon, filled, from_real, real_dtype, select, to_real
from .solvers._default import fitted, with_tolerances
from .solvers._multiple import is_simple
from .solvers._opening import AbstractOpening, chosen, LEAST_BUDGET, Opened
from .solvers._small_newton import is_closed_form, small_newton

# A solve that has become NaN is noticed after at most this many further steps.
_FINITE_CHECK_EVERY = 4096

WhileLoop = Callable[..., Any]


def lax_while_loop(
    cond_fun: Callable[[Any], Bool[Array, ""]],
    body_fun: Callable[[Any], Any],
    init_val: Any,
    *,
    max_steps: int | None = None,
    start: Int[Array, ""] | int = 0,
) -> Any:
    """`jax.lax.while_loop` with the signature that optimistix gives its adjoints.

    `start` is the number of steps that have been taken already.
    """
    if max_steps is None:
        return jax.lax.while_loop(cond_fun, body_fun, init_val)

    def cond(carry: tuple[Any, Any]) -> Bool[Array, ""]:
        step, val = carry
        return (step < max_steps) & cond_fun(val)

    def body(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        step, val = carry
        return step + 1, body_fun(val)

    return jax.lax.while_loop(cond, body, (jnp.asarray(start), init_val))[1]


class Run(eqx.Module):
    """One solve: a solver, the function it iterates, and the limits it obeys."""

    solver: Solver
    fn: IteratedFn
    args: Any
    options: dict[str, Any]
    max_steps: int | None = eqx.field(static=True)
    watch: Watch | None = None
    with_inverse: bool = eqx.field(static=True, default=False)

    def step(self, y: PyTree[Array], state: Any) -> tuple[Any, Any, Any]:
        return self.solver.step(
            self.fn, y, self.args, self.options, state, self.fn.tags
        )

    def terminate(self, y: PyTree[Array], state: Any, residual: Any) -> Any:
        done, result = self.solver.terminate(
            self.fn, y, self.args, self.options, state, self.fn.tags
        )
        if self.fn.must_vanish:
            done = done & (max_abs(residual) < self.solver.atol)
        return done, result


class _Carry(eqx.Module):
    y: PyTree[Array]
    state: Any
    residual: Any
    aux: Any
    num_steps: Int[Array, ""]
    record: Any = None  # of the watch, if there is one


class Outcome(eqx.Module):
    """What any solve, by whatever means, hands to the adjoint.

    Fields as `Solution`. `trusted` is whether the solver itself reported success, and
    nothing against a derivative there. `at` is where one is linearised, if that has
    been chosen: `y`, or the guess where `y` is not trusted. `inverse` is that of
    `∂F/∂y` as the solver knows it, if it has been asked.
    """

    y: Any
    aux: Any
    result: RESULTS
    trusted: Bool[Array, ""]
    stats: dict[str, Any]
    at: Any = None
    inverse: lx.AbstractLinearOperator | None = None

    def linearised_from(self, guess: Any) -> "Outcome":
        """The outcome with `at` chosen."""
        at = select(self.trusted, self.y, guess)
        return dataclasses.replace(self, at=at)


def _loop(
    run: Run, carry: _Carry, combine: Callable[[Any], Any], while_loop: WhileLoop
) -> _Carry:
    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        done, result = run.terminate(carry.y, combine(carry.state), carry.residual)
        return ~done & is_successful(result)

    def body(carry: _Carry) -> _Carry:
        y, state, (residual, aux) = run.step(carry.y, combine(carry.state))
        arrays = eqx.filter(state, eqx.is_array)
        num_steps, record = carry.num_steps + 1, None
        if run.watch is not None:
            record = run.watch.after_step(carry.record, num_steps, y)
        return _Carry(y, arrays, residual, aux, num_steps, record)

    chunk, limit = _FINITE_CHECK_EVERY, run.max_steps
    if while_loop is not lax_while_loop:
        return while_loop(unfinished, body, carry, max_steps=limit)
    if limit is not None and limit <= chunk:
        start = carry.num_steps
        return lax_while_loop(unfinished, body, carry, max_steps=limit, start=start)

    def in_budget(carry: _Carry) -> Bool[Array, ""]:
        return jnp.array(True) if limit is None else carry.num_steps < limit

    def inner(carry: _Carry) -> _Carry:
        first = carry.num_steps
        return jax.lax.while_loop(
            lambda c: in_budget(c) & (c.num_steps - first < chunk) & unfinished(c),
            body,
            carry,
        )

    return jax.lax.while_loop(
        lambda c: in_budget(c) & unfinished(c) & all_finite(c.y), inner, carry
    )


def iterate(
    condition: AbstractCondition[Any, Any],
    solver: Solver,
    y0: PyTree[Array],
    args: Any,
    *,
    options: dict[str, Any],
    max_steps: int | None,
    while_loop: WhileLoop,
    monitor: Monitor | None = None,
    with_inverse: bool = False,
) -> Outcome:
    """The outcome of running an optimistix solver on a hoisted condition.

    **Raises:** `TypeError` if the solver is of the wrong kind for the condition,
    `ValueError` if it has no inverse and is asked for one.
    """
    solver = fitted(solver, y0)
    fn = iterated_fn(solver, condition, y0)
    if fn.must_vanish:  # `Run.terminate` compares with its tolerance
        solver = with_tolerances(solver, y0)
    y = to_real(y0, real_dtype(y0))
    watch = _watch(monitor, fn, args, max_steps)
    run = Run(solver, fn, args, options, max_steps, watch, with_inverse)
    if watch is not None or with_inverse or while_loop is not lax_while_loop:
        return _iterated(run, y, while_loop)
    if is_closed_form(solver, y, options):
        return in_one_kernel(lambda: _in_closed_form(run, y).linearised_from(y0))
    opened = in_one_kernel(lambda: _opened(run, y))
    if opened is None:
        run = _with_own_norm(run)
        loop = lambda: _iterated(run, y, lax_while_loop).linearised_from(y0)
        return in_one_kernel(loop)
    return _continued(run, opened)


def _with_own_norm(run: Run) -> Run:
    """The maximum norm of an optimistix solver, but in one kernel, and seeing a NaN."""
    solver: Any = run.solver
    theirs = type(solver).__module__.partition(".")[0] == optx.__name__
    if not theirs or getattr(solver, "norm", None) is not optx.max_norm:
        return run
    return eqx.tree_at(lambda run: run.solver.norm, run, max_norm)


def _blank_aux(run: Run, y: PyTree[Array]) -> Any:
    """Zeros like the auxiliary output of the function."""
    return filled(run.fn.out_struct(y, run.args)[1], 0)


def _in_closed_form(run: Run, y: PyTree[Array]) -> Outcome:
    aux = _blank_aux(run, y)
    found = small_newton(run.solver, run.fn, y, run.args, aux, run.max_steps)
    value = from_real(found.y, run.fn.like)
    simple = _judged_simple({"simple": found.simple}, run.fn.like)
    trusted = found.solved & simple["simple"]
    stats = {"num_steps": found.num_steps, **simple}
    aux = run.fn.whole_aux(found.aux[1])
    return Outcome(value, aux, found.result, trusted, stats)


def _opened(run: Run, y: PyTree[Array]) -> Opened | None:
    solver, fn = run.solver, run.fn
    if not isinstance(solver, AbstractOpening):
        return None
    if run.max_steps is not None and run.max_steps < LEAST_BUDGET:
        return None
    return solver.opening(fn, y, run.args, _blank_aux(run, y), run.max_steps)


def _continued(run: Run, opened: Opened) -> Outcome:
    """The outcome of the opening, or of the solver in lanes that it has not solved."""
    value = from_real(opened.y, run.fn.like)
    stats = {"num_steps": opened.num_steps, **opened.stats}
    aux = run.fn.whole_aux(opened.aux[1])
    finished = Outcome(value, aux, RESULTS.successful, opened.solved, stats)
    arrays, static = eqx.partition(finished, _is_arraylike)

    def go_on() -> Any:
        loop = lambda: _iterated(run, opened.y, lax_while_loop, opened)
        outcome = in_one_kernel(loop)
        return chosen(opened.solved, arrays, eqx.filter(outcome, _is_arraylike))

    # Under `vmap` the solver is started if any lane needs it.
    arrays = jax.lax.cond(any_lane(~opened.solved), go_on, lambda: arrays)
    return eqx.combine(arrays, static)


def _is_arraylike(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _iterated(
    run: Run, y: PyTree[Array], while_loop: WhileLoop, opened: Opened | None = None
) -> Outcome:
    solver, fn, args, options = run.solver, run.fn, run.args, run.options
    record = None if run.watch is None else run.watch.begin(real_dtype(y))
    f_struct, aux_struct = fn.out_struct(y, args)
    residual_struct, fn_aux_struct = aux_struct
    state = solver.init(fn, y, args, options, f_struct, aux_struct, fn.tags)
    num_steps = jnp.zeros((), int)
    if opened is not None:
        assert isinstance(solver, AbstractOpening)
        state, repeated = solver.continued(state, opened)
        num_steps = opened.budget - repeated
    state_arrays, state_static = eqx.partition(state, eqx.is_array)
    aux, residual = filled(fn_aux_struct, 0), filled(residual_struct, jnp.inf)
    carry = _Carry(y, state_arrays, residual, aux, num_steps, record)
    if while_loop is lax_while_loop:  # the others are differentiated
        carry = in_every_lane(carry, (fn, args))

    def combine(arrays: Any) -> Any:
        return eqx.combine(arrays, state_static)

    carry = _loop(run, carry, combine, while_loop)
    return _outcome(run, carry, combine(carry.state))


def _watch(
    monitor: Monitor | None, fn: IteratedFn, args: Any, max_steps: int | None
) -> Watch | None:
    if monitor is None:
        return None

    def norm(real_y: PyTree[Array]) -> Array:
        return max_abs(fn.condition.residual(from_real(real_y, fn.like), args))

    return Watch(monitor, norm, max_steps)


def _outcome(run: Run, carry: _Carry, state: Any) -> Outcome:
    done, result = run.terminate(carry.y, state, carry.residual)
    out_of_steps = optx.RESULTS.where(
        done, optx.RESULTS.successful, optx.RESULTS.nonlinear_max_steps_reached
    )
    successful = is_successful(result)
    trusted = done if successful is True else done & successful
    result = (
        out_of_steps
        if successful is True
        else optx.RESULTS.where(successful, out_of_steps, result)
    )
    y, (_, aux), stats = run.solver.postprocess(
        run.fn,
        carry.y,
        (carry.residual, carry.aux),
        run.args,
        run.options,
        state,
        run.fn.tags,
        result,
    )
    verdict = stats.pop("result", None)  # the solver may have one of its own
    reported = as_results(result if verdict is None else verdict)
    if verdict is not None:
        trusted = is_successful(reported)
    if isinstance(run.solver, optx.Newton):
        stats = {**stats, "simple": is_simple(state, carry.y)}
    stats = {"num_steps": carry.num_steps, **_judged_simple(stats, run.fn.like)}
    trusted = jnp.asarray(trusted)
    if "simple" in stats:
        trusted = trusted & stats["simple"]
    if run.watch is not None:
        stats |= run.watch.stats(carry.record, carry.num_steps)
    value, aux, inverse = from_real(y, run.fn.like), run.fn.whole_aux(aux), None
    if run.with_inverse:
        inverse = inverse_of(run.solver, run.fn.condition, state, y)
    return Outcome(value, aux, reported, trusted, stats, inverse=inverse)


def _judged_simple(stats: dict[str, Any], like: PyTree[Any]) -> dict[str, Any]:
    """What the solver has seen, but that rounding it knows nothing of is slow, too."""
    if "simple" in stats and coarse_epsilon(like) is not None:
        return stats | {"simple": jnp.ones_like(stats["simple"])}
    return stats
