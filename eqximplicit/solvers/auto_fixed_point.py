"""The default fixed-point solver: Anderson, plain iteration and Newton-Krylov in one.

Every step evaluates the function once, at the trial point that the step before chose,
and then decides what that evaluation says. There is one compiled loop body, no inner
loop, and no derivative of the function: the Newton-Krylov rescue differentiates by
finite differences (Knoll and Keyes 2004), so a function without a JVP, such as a
callback to the host, is solved too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Int, Scalar

from .._solution import Aux, RESULTS, Y
from . import _vector_space as vs, _verdict as verdict
from ._fixed_point_numbers import Ending, unpacked
from ._fixed_point_opening import opening
from ._fixed_point_replay import advanced, evaluated, replay
from ._fixed_point_step import begun, best_of, learnt, proposed, seen_at, State
from ._opening import AbstractOpening, Opened


class AutoFixedPoint(AbstractOpening, optx.AbstractFixedPointSolver[Y, Aux, State[Y]]):
    r"""The default fixed-point solver: a safeguarded combination of three methods.

    A step is one evaluation of `fn`. A layer opens with a loop that costs much less, as
    long as the residual shrinks well: plain iteration from `y0`, and Anderson's steps
    with two pairs for a state of up to 64 numbers, unless `fn` costs more than what is
    saved. `optimistix.fixed_point` opens with nothing.

    1. *Anderson acceleration* over the last `window` secant pairs. Each pair is
       believed as far as the last prediction of the residual was right at the distance
       of that pair, so old pairs of a curved map fade instead of misleading. The mixing
       is the inverse slope of the last pair, $|\Delta y| / |\Delta r|$, at most 1, and
       of a single number with its sign: a secant step.
    2. A trial point that is not finite, or whose residual is ten times the best, is
       *rejected*: first the mixed step alone is tried, then shorter Anderson steps.
    3. Eight steps without progress bring a *rescue*: first some plain iteration from
       `y0`; from then on *Newton-Krylov* steps from the best point, with `window`
       probes of the residual (a finite-difference GMRES) and a line search that insists
       on descent; and at last plain iteration from there, which converges for every
       contraction in whatever norm, while a hundred steps take off a tenth of the
       residual.

    The point of the smallest residual is returned. It is a success if its residual, and
    its estimated distance from the solution, are within `atol + rtol |y|`: for a plain
    iteration of rate $\rho$ the latter is the residual over $1 - \rho$, so that a slow
    contraction does not stop early. A residual within tolerance that is down to
    rounding is a success as well. Otherwise `stats["result"]` says why not: the
    tolerance is out of reach, the residual has a local minimum, `fn` is not finite at
    `y0`, or `max_steps`, the number of evaluations allowed. `stats["amplification"]` is
    the estimated error per residual.

    Leaves may differ in dtype; complex leaves count as vectors over the reals. `fn` is
    never differentiated. The steps are differentiable
    (`optimistix.RecursiveCheckpointAdjoint`).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of the error of the solution.
        `None` stands for 1e-8 in float64 and for 84 epsilon in any lower precision,
        which is 1e-5 in float32.
    - `window`: the largest number of secant pairs kept: `2 * window` states of memory.
    - `norm`: the norm of the error per tolerance.

    **Raises:**

    - `ValueError`: a negative tolerance, or a window below 1, or above `max_steps`
        where `options={"max_steps": ...}` says how many steps there will be.

    !!! example

        ```python
        solver = eqi.AutoFixedPoint(rtol=1e-8, atol=1e-8)
        optx.fixed_point(lambda y, args: jnp.cos(y), solver, jnp.array(1.0)).value
        ```

    ??? cite "References"

        D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM
        12 (1965). H. Walker and P. Ni, *Anderson acceleration for fixed-point
        iterations*, SIAM J. Numer. Anal. 49 (2011). J. Zhang, B. O'Donoghue and S.
        Boyd, *Globally convergent type-I Anderson acceleration for nonsmooth
        fixed-point iterations*, SIAM J. Optim. 30 (2020): safeguarding by
        plain steps. D. Knoll and D. Keyes, *Jacobian-free Newton-Krylov methods*, J.
        Comput. Phys. 193 (2004).
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    window: int = 10
    norm: Callable[[Any], Scalar] = optx.max_norm

    def __check_init__(self) -> None:
        verdict.check_tolerances("AutoFixedPoint", self.rtol, self.atol)
        verdict.check_window("AutoFixedPoint", self.window)

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> State[Y]:
        """Returns the state before the first evaluation, which is at `y`."""
        del fn, args, f_struct, tags
        verdict.check_budget("AutoFixedPoint", self.window, options)
        verdict.warn_if_unreachable(
            "AutoFixedPoint", self.rtol, self.atol, vs.resolution(y)
        )
        return begun(y, vs.zeros_like(aux_struct), self.window)

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: State[Y],
        tags: frozenset[object],
    ) -> tuple[Y, State[Y], Aux]:
        """Returns the next trial point, having evaluated `fn` at this one."""
        del options, tags
        tape = state.tape
        at = evaluated(fn, y, args, tape)
        tolerance = self._tolerance(y)
        seen = seen_at(tolerance, state.points, at)
        state, control = learnt(state, at, seen)
        y, state = proposed(tolerance, state, control)
        y, tape = advanced(y, tape)
        return y, dataclasses.replace(state, tape=tape), at.aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: State[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the best point is good enough, or cannot be improved."""
        del fn, y, args, options, tags
        ending = unpacked(state.control).ending
        stuck = verdict.coarse(verdict.why_stuck(best_of(state)))
        started = ending != int(Ending.NONFINITE_START)
        result = optx.RESULTS.where(started, stuck, optx.RESULTS.nonfinite)
        fine = ending < int(Ending.NONFINITE_START)
        result = optx.RESULTS.where(fine, optx.RESULTS.successful, result)
        return ending > 0, result

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: State[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns the best point with its auxiliary output, and the verdict."""
        del fn, y, aux, args, options, tags
        found, control = best_of(state), unpacked(state.control)
        stuck = verdict.why_stuck(found)
        started = control.ending != int(Ending.NONFINITE_START)
        reason = RESULTS.where(started, stuck, RESULTS.nonfinite_start)
        fine = control.ending < int(Ending.NONFINITE_START)
        reason = RESULTS.where(fine, RESULTS.successful, reason)
        stats = verdict.statistics(found, reason, result)
        stats["num_rescues"] = control.num_rescues.astype(jnp.int32)
        stats["amplification"] = verdict.amplification_of(found)
        return found.point.y, found.aux, stats

    def opening(
        self, fn: Any, y: Any, args: Any, aux: Any, max_steps: int | None
    ) -> Opened | None:
        """Returns the outcome of an iteration, as far as that contracts well."""
        return opening(fn, y, args, aux, self._tolerance(y), max_steps)

    def continued(self, state: Any, opened: Opened) -> tuple[Any, Int[Array, ""]]:
        """Returns the state that first goes through the opening's last steps again."""
        tape = replay(opened.seen)
        return dataclasses.replace(state, tape=tape), tape.left

    def _tolerance(self, y: Y) -> verdict.Tolerance:
        return verdict.tolerance(self.rtol, self.atol, self.norm, y)
