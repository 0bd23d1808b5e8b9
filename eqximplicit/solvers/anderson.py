"""Anderson acceleration of a fixed-point iteration, with restarts and a safeguard."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._solution import Aux, RESULTS, Y
from . import _history as hist, _vector_space as vs, _verdict as verdict

STALE = 20  # steps without a better point before rounding is suspected
SMALLEST = 1e-6  # part of the mixing below which a rejected step is given up


class _State(eqx.Module, Generic[Y]):
    """The last accepted point, the best one, and the secant pairs between points.

    `size` scales the mixing after a rejection, `num_stale` counts steps since the last
    better point and `num_pairs` pairs since the last restart, `amplification` is the
    error per residual.
    """

    anchor: verdict.Point[Y]
    best: verdict.Best[Y]
    history: hist.History[Y]
    size: Float[Array, ""]
    amplification: Float[Array, ""]
    num_stale: Int[Array, ""]
    num_pairs: Int[Array, ""]
    started: Bool[Array, ""]
    done: Bool[Array, ""]
    result: RESULTS


class Anderson(optx.AbstractFixedPointSolver[Y, Aux, _State[Y]]):
    r"""A fixed-point solver that mixes the last iterates so that residuals cancel.

    With the residual $r_k = f(y_k) - y_k$ and the differences $\Delta y_i$,
    $\Delta r_i$ of the last `window` iterates as columns of $\Delta Y$, $\Delta R$
    (Walker and Ni's type II),

    $$\gamma = \arg\min \|r_k - \Delta R\, \gamma\|, \qquad
    y_{k+1} = y_k - \Delta Y \gamma + \beta\, (r_k - \Delta R\, \gamma).$$

    A step costs one evaluation of `fn`. A trial point that is not finite, or whose
    residual exceeds `safeguard` times the best, is rejected: the history is forgotten
    and a plain step of half the mixing is tried from the best point. The point of the
    smallest residual is returned, and is a success if its residual and its estimated
    error are within `atol + rtol |y|`; see [`eqximplicit.AutoFixedPoint`][], which also
    solves maps that this method does not. `stats["amplification"]` is the estimated
    error per residual.

    Leaves may differ in dtype; complex leaves count as vectors over the reals. The
    steps are differentiable (`optimistix.RecursiveCheckpointAdjoint`).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of the error of the solution;
        `None` stands for 1e-8 in float64 and for 1e-5 in float32.
    - `window`: the largest number of secant pairs kept: `2 * window` states of memory.
    - `mixing`: the factor $\beta$ (damping) of the residual that is left; in (0, 1] for
        a contraction, negative for a map that expands in every direction.
    - `ridge`: Tikhonov's parameter of the fit, relative to the length of each column.
        Pairs that depend on each other need none; noise in `fn` does.
    - `restart`: forget the history whenever it has this many pairs; `None` for never.
    - `safeguard`: largest residual, in units of the best, of an accepted point.
    - `norm`: the norm of the error per tolerance.

    **Raises:**

    - `ValueError`: a negative tolerance or ridge; a window or restart below 1; no
        mixing; a safeguard below 1; a window above `options["max_steps"]`.

    !!! example

        ```python
        solver = eqi.Anderson(rtol=1e-8, atol=1e-8, window=5, mixing=0.5)
        optx.fixed_point(lambda y, args: jnp.cos(y), solver, jnp.array(1.0)).value
        ```

    ??? cite "References"

        D. G. Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM
        12 (1965). H. Walker and P. Ni, *Anderson acceleration for fixed-point
        iterations*, SIAM J. Numer. Anal. 49 (2011).
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    window: int = 5
    mixing: float = 1.0
    ridge: float = 1e-12
    restart: int | None = None
    safeguard: float = 10.0
    norm: Callable[[Any], Scalar] = optx.max_norm

    def __check_init__(self) -> None:
        verdict.check_tolerances("Anderson", self.rtol, self.atol)
        verdict.check_window("Anderson", self.window)
        rules = {
            "mixing": (0 < abs(self.mixing) < float("inf"), "finite and non-zero"),
            "ridge": (self.ridge >= 0, "at least 0"),
            "restart": (self.restart is None or self.restart >= 1, "at least 1"),
            "safeguard": (self.safeguard >= 1, "at least 1"),
        }
        for name, (holds, range_) in rules.items():
            if not holds:
                raise ValueError(
                    f"`Anderson({name}=...)` must be {range_}; "
                    f"got {getattr(self, name)}."
                )

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> _State[Y]:
        """Returns the state before the first evaluation, which is at `y`."""
        del fn, args, f_struct, tags
        verdict.check_budget("Anderson", self.window, options)
        eps = vs.resolution(y)
        verdict.warn_if_unreachable("Anderson", self.rtol, self.atol, eps)
        best = verdict.nothing(y, aux_struct)
        one = jnp.ones((), vs.real_dtype(y))
        return _State(
            anchor=best.point,
            best=best,
            history=hist.empty(y, self.window),
            size=one,
            amplification=one,
            num_stale=jnp.zeros((), jnp.int32),
            num_pairs=jnp.zeros((), jnp.int32),
            started=jnp.array(False),
            done=jnp.array(False),
            result=RESULTS.successful,
        )

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
    ) -> tuple[Y, _State[Y], Aux]:
        """Returns the next trial point, having evaluated `fn` at this one."""
        del options, tags
        image, aux = fn(y, args)
        point, finite = verdict.point_at(y, image)
        state = self._learn(state, point, aux, finite)
        y, step = self._propose(state)
        return y, self._finish(state, step), aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the best point is good enough, or cannot be improved."""
        del fn, y, args, options, tags
        return state.done, verdict.coarse(state.result)

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Y, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: _State[Y],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns the best point with its auxiliary output, and the verdict."""
        del fn, y, aux, args, options, tags
        stats = verdict.statistics(state.best, state.result, result)
        stats["amplification"] = verdict.amplification_of(state.best)
        return state.best.point.y, state.best.aux, stats

    def _tolerance(self, y: Y) -> verdict.Tolerance:
        return verdict.tolerance(self.rtol, self.atol, self.norm, y)

    def _learn(
        self, state: _State[Y], point: verdict.Point[Y], aux: Any, finite: Array
    ) -> _State[Y]:
        """The history and the best point, after an evaluation at `point`."""
        anchor, best, started = state.anchor, state.best, state.started
        accepted = finite & (point.merit <= self.safeguard * best.point.merit)
        dy = vs.minus(point.y, anchor.y)
        dr = vs.minus(point.residual, anchor.residual)
        history, num_pairs = self._remembered(state, dy, dr, accepted)

        tolerance = self._tolerance(point.y)
        amplification = tolerance.amplification(dy, dr, point.y)
        amplification = jnp.maximum(amplification, verdict.FADE * state.amplification)
        amplification = jnp.where(started & accepted, amplification, 1)
        known = jnp.where(started, amplification, jnp.inf)
        new = tolerance.judge(point, aux, known)
        improved = accepted & (point.merit < best.point.merit)
        best = verdict.better(new, best, accepted)
        size = jnp.where(accepted, jnp.minimum(2 * state.size, 1), state.size / 2)
        return _State(
            anchor=vs.select(accepted, point, best.point),
            best=best,
            history=history,
            size=size,
            amplification=amplification,
            num_stale=jnp.where(improved, 0, state.num_stale + 1),
            num_pairs=num_pairs,
            started=jnp.array(True),
            done=~started & ~finite,
            result=RESULTS.where(
                ~started & ~finite, RESULTS.nonfinite_start, state.result
            ),
        )

    def _remembered(
        self, state: _State[Y], dy: Y, dr: Y, accepted: Array
    ) -> tuple[hist.History[Y], Int[Array, ""]]:
        """The history with a new pair; a rejection, or being full, empties it first."""
        history, dtype = state.history, state.size.dtype
        change, distance = vs.lengths([dr, dy], dtype)
        zero = vs.zeros_like(dy)
        keep = accepted & state.started & jnp.isfinite(change + distance)
        pair = hist.Pair(
            vs.select(keep, dy, zero), vs.select(keep, dr, zero), change, distance
        )
        full = state.num_pairs >= (self.restart or jnp.iinfo(jnp.int32).max)
        empty = full | ~accepted
        used = jnp.where(empty, 0, history.used)
        num_pairs = jnp.where(empty, 0, state.num_pairs) + keep.astype(jnp.int32)
        turn = hist.turn(
            used, history.newest, history.window, keep, jnp.zeros_like(keep)
        )
        cross = hist.cross(history, pair)
        return hist.push(history, pair, cross, turn, 0 * distance), num_pairs

    def _propose(self, state: _State[Y]) -> tuple[Y, Y]:
        """The next trial point, and the step to it."""
        anchor, history = state.anchor, state.history
        dtype = state.size.dtype
        penalty = jnp.full(history.window + 1, self.ridge, dtype)
        fit = hist.fit(history, anchor.residual, penalty, history.filled)
        step = vs.minus(
            vs.scaled(self.mixing * state.size, fit.rest),
            hist.combine(fit.coefficients, history.dy),
        )
        y = vs.add_scaled(anchor.y, jnp.ones((), dtype), step)
        return vs.select(vs.all_finite(y), y, anchor.y), step

    def _finish(self, state: _State[Y], step: Y) -> _State[Y]:
        """The end, if the best point is good enough or cannot be improved."""
        usable = state.history.used > 0
        tolerance = self._tolerance(state.anchor.y)
        best = verdict.sharpened(tolerance, state.best, state.anchor, step, usable)
        rounding = (state.num_stale >= STALE) & (best.floor <= verdict.NEAR_ROUNDING)
        gave_up = state.size < SMALLEST
        ongoing = ~(state.done | best.converged)
        result = RESULTS.where(ongoing & gave_up, verdict.divergence(), state.result)
        result = RESULTS.where(ongoing & rounding, verdict.why_stuck(best), result)
        return eqx.tree_at(
            lambda s: (s.best, s.done, s.result),
            state,
            (best, state.done | best.converged | rounding | gave_up, result),
        )
