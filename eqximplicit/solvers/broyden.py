"""Broyden's good and bad methods with limited memory and a line search."""

import enum
from collections.abc import Callable
from typing import Any, Generic, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._solution import Aux, RESULTS, Y
from . import _history as hist, _vector_space as vs, _verdict as verdict
from ._inverse_jacobian import Inverse, Pair, updated

DECREASE = 1e-4  # of the residual, per step length, that the line search asks for
MAX_SHORTER = 8  # rejected trial points before the memory is given up
MAX_BARREN = 3  # new memories in a row without a better point
STALE = 20  # steps without a better point before rounding is suspected
LOST = 40  # the same before the search goes back to the best point
LEARNT = 10.0  # residual, in units of the anchor's, up to which a rejection teaches


class Kind(enum.IntEnum):
    """What a trial point is."""

    START = 0
    PROBE = 1  # a finite difference along the residual: the scale of the Jacobian
    SEARCH = 2  # on the line along the quasi-Newton step


class _State(eqx.Module, Generic[Y]):
    """The last accepted point, the best one, and where the line search is."""

    anchor: verdict.Point[Y]
    best: verdict.Best[Y]
    inverse: Inverse[Y]
    kind: Int[Array, ""]
    size: Float[Array, ""]
    num_accepted: Int[Array, ""]
    num_shorter: Int[Array, ""]
    num_barren: Int[Array, ""]
    num_stale: Int[Array, ""]
    done: Bool[Array, ""]
    result: RESULTS


class Broyden(optx.AbstractRootFinder[Y, Y, Aux, _State[Y]]):
    r"""A quasi-Newton root finder that never sees a Jacobian, one evaluation a step.

    The inverse Jacobian is $H = h I + \sum_i u_i v_i^T$, where $h$, of either sign, is
    found by one finite difference along the first residual. After a step $s$ that
    changed the residual by $z$ it becomes

    $$H + \frac{(s - H z)\, v^T}{v^T z}, \qquad
    v = H^T s \text{ ("good")} \quad\text{or}\quad v = z \text{ ("bad")}.$$

    Where that turns $H$ singular, since the Jacobian turns $s$ by a right angle, the
    update is damped. The good method learns from a rejected step, too, unless that
    leaves ten times the residual.

    The line search accepts $\|f(y + t s)\| \le (1 + \eta_k - 10^{-4} t) \|f(y)\|$ with
    a summable $\eta_k$ (Li and Fukushima 2000), else it takes $t$ from a parabola.
    A full memory, a line search without success, and many steps without a better point
    begin anew, the last two from the best point. A trial point that is not finite is
    rejected.

    The point of the smallest residual is returned. It is a success if `norm(f) < atol`
    there and the full quasi-Newton step from it is within `atol + rtol |y|`.

    In `optimistix.fixed_point` it finds the root of `fn(y) - y`. `fn` must return the
    structure, shapes and dtypes of `y`. Complex leaves count as vectors over the reals.
    The steps are differentiable (`optimistix.RecursiveCheckpointAdjoint`).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of the error of the solution;
        `atol` also bounds the residual. `None` stands for 1e-8 in float64 and for
        1e-5 in float32.
    - `window`: the largest number of updates kept: `2 * window` states of memory.
    - `update`: `"good"` or `"bad"`.
    - `norm`: the norm of the error per tolerance.

    **Raises:**

    - `ValueError`: a negative tolerance; a window below 1, or above
        `options["max_steps"]`; an unknown update; a residual unlike `y`.

    !!! example

        ```python
        solver = eqi.Broyden(rtol=1e-8, atol=1e-8)
        optx.root_find(lambda y, args: y**3 - 2.0, solver, jnp.array(1.0)).value
        ```

    ??? cite "References"

        C. G. Broyden, *A class of methods for solving nonlinear simultaneous
        equations*, Math. Comp. 19 (1965). J. J. Moré and J. A. Trangenstein, *On the
        global convergence of Broyden's method*, Math. Comp. 30 (1976): the damped
        update. D.-H. Li and M. Fukushima, *A derivative-free
        line search and global convergence of Broyden-like method for nonlinear
        equations*, Optim. Methods Softw. 13 (2000). C. T. Kelley, *Iterative Methods
        for Linear and Nonlinear Equations*, SIAM (1995), chapters 7 and 8.
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    window: int = 20
    update: Literal["good", "bad"] = "good"
    norm: Callable[[Any], Scalar] = optx.max_norm

    def __check_init__(self) -> None:
        verdict.check_tolerances("Broyden", self.rtol, self.atol)
        verdict.check_window("Broyden", self.window)
        if self.update not in ("good", "bad"):
            raise ValueError(
                f'`Broyden(update=...)` must be "good" or "bad"; got {self.update!r}.'
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
        del fn, args, tags
        _check_square(f_struct, y)
        verdict.check_budget("Broyden", self.window, options)
        eps = vs.resolution(y)
        verdict.warn_if_unreachable("Broyden", self.rtol, self.atol, eps)
        best = verdict.nothing(y, aux_struct)
        none, one = jnp.zeros((), jnp.int32), jnp.ones((), vs.real_dtype(y))
        stack = hist.stack_of(y, self.window)
        return _State(
            anchor=best.point,
            best=best,
            inverse=Inverse(one, stack, stack, none),
            kind=none,
            size=one,
            num_accepted=none,
            num_shorter=none,
            num_barren=none,
            num_stale=none,
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
        residual, aux = fn(y, args)
        point, finite = verdict.point_with(y, residual)
        state = self._learn(state, point, aux, finite)
        y, state = self._propose(state)
        return y, state, aux

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
        return state.best.point.y, state.best.aux, stats

    def _learn(
        self, state: _State[Y], point: verdict.Point[Y], aux: Any, finite: Array
    ) -> _State[Y]:
        """The inverse, the anchor and the counters, after an evaluation at `point`."""
        anchor, best = state.anchor, state.best
        start, search = state.kind == int(Kind.START), state.kind == int(Kind.SEARCH)
        eta = 1.0 / (state.num_accepted + 1).astype(anchor.merit.dtype) ** 2
        limit = (1 + eta - DECREASE * state.size) * anchor.merit
        accepted = finite & (start | (search & (point.merit <= limit)))
        rejected = search & ~accepted

        near = finite & (point.merit <= LEARNT * anchor.merit)
        known = accepted | (near if self.update == "good" else jnp.array(False))
        inverse = self._updated(state, point, finite, known & search)
        residual = verdict.tolerance(0.0, self.atol, self.norm, point.y)
        new = residual.judge(point, aux, jnp.asarray(jnp.inf, anchor.merit.dtype))
        improved = accepted & (point.merit < best.point.merit)
        shorter = jnp.where(rejected, state.num_shorter + 1, 0)
        # The search may go uphill; where that leads nowhere, the best point is better.
        give_up = (shorter > MAX_SHORTER) | ((state.num_stale >= LOST) & ~improved)
        size = jnp.where(rejected, _shorter(state, point, finite), 1)
        kind = jnp.where(start | give_up, int(Kind.PROBE), int(Kind.SEARCH))
        barren = jnp.where(give_up, state.num_barren + 1, state.num_barren)
        best = verdict.better(new, best, accepted)
        anchor = vs.select(accepted, point, anchor)
        return _State(
            anchor=vs.select(give_up, best.point, anchor),
            best=best,
            inverse=inverse,
            kind=kind.astype(jnp.int32),
            size=size.astype(state.size.dtype),
            num_accepted=state.num_accepted + accepted.astype(jnp.int32),
            num_shorter=jnp.where(give_up, 0, shorter),
            num_barren=jnp.where(improved, 0, barren),
            num_stale=jnp.where(improved | give_up, 0, state.num_stale + 1),
            done=start & ~finite,
            result=RESULTS.where(
                start & ~finite, RESULTS.nonfinite_start, state.result
            ),
        )

    def _updated(
        self,
        state: _State[Y],
        point: verdict.Point[Y],
        finite: Bool[Array, ""],
        learnt: Bool[Array, ""],
    ) -> Inverse[Y]:
        """The inverse after the pair from the anchor to `point`."""
        pair = Pair(
            step=vs.minus(point.y, state.anchor.y),
            change=vs.minus(point.residual, state.anchor.residual),
            image=vs.scaled(-state.size, state.anchor.residual),
            probed=state.kind == int(Kind.PROBE),
            finite=finite,
            learnt=learnt,
        )
        return updated(state.inverse, pair, self.update == "good", self.window)

    def _propose(self, state: _State[Y]) -> tuple[Y, _State[Y]]:
        """The next trial point, or the end."""
        anchor, dtype = state.anchor, state.size.dtype
        one, root_eps = jnp.ones((), dtype), vs.resolution(anchor.y) ** 0.5
        probing = state.kind == int(Kind.PROBE)
        merit = jnp.where(anchor.merit > 0, anchor.merit, 1)
        far = root_eps * (one + vs.length(jax.lax.stop_gradient(anchor.y), dtype))
        probe = vs.scaled(far / merit, jax.lax.stop_gradient(anchor.residual))
        newton = vs.scaled(-one, state.inverse.mv(anchor.residual))
        y = vs.add_scaled(anchor.y, one, vs.scaled(state.size, newton))
        y = vs.select(probing, vs.add_scaled(anchor.y, one, probe), y)
        y = vs.select(vs.all_finite(y), y, anchor.y)
        return y, self._finish(state, newton, ~probing)

    def _finish(self, state: _State[Y], step: Y, usable: Array) -> _State[Y]:
        """The end, if the best point is good enough or cannot be improved."""
        best, anchor = state.best, state.anchor
        tolerance = verdict.tolerance(self.rtol, self.atol, self.norm, anchor.y)
        here = usable & (anchor.merit <= best.point.merit)
        error = jnp.where(here, tolerance.measure(step, anchor.y), best.error)
        error = jnp.where(best.residual > 0, error, 0)
        best = eqx.tree_at(lambda b: b.error, best, error)
        rounding = (state.num_stale >= STALE) & (best.floor <= verdict.NEAR_ROUNDING)
        stuck = rounding | (state.num_barren >= MAX_BARREN)
        ongoing = ~(state.done | best.converged)
        # That no step was found does not prove a local minimum.
        reason = verdict.why_stuck(best)
        unproven = reason == RESULTS.local_minimum
        reason = RESULTS.where(unproven, verdict.divergence(), reason)
        result = RESULTS.where(ongoing & stuck, reason, state.result)
        return eqx.tree_at(
            lambda s: (s.best, s.done, s.result),
            state,
            (best, state.done | best.converged | stuck, result),
        )


def _shorter(
    state: _State[Any], point: verdict.Point[Any], finite: Bool[Array, ""]
) -> Float[Array, ""]:
    """The next length of a rejected step: the minimum of a parabola, safeguarded.

    The parabola has the squared residuals at both ends, and at the anchor the slope
    that the exact Newton step would have.
    """
    size, ratio = state.size, point.merit / state.anchor.merit
    denominator = ratio**2 - 1 + 2 * size
    vertex = size**2 / jnp.where(denominator > 0, denominator, 1)
    usable = finite & jnp.isfinite(ratio) & (denominator > 0)
    vertex = jnp.where(usable, vertex, size / 4)
    return jnp.clip(vertex, size / 10, size / 2)


def _check_square(f_struct: Any, y: Any) -> None:
    """Refuses a residual that is not in the space of `y`."""
    shapes = [
        [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jtu.tree_leaves(tree)]
        for tree in (f_struct, y)
    ]
    same = jtu.tree_structure(f_struct) == jtu.tree_structure(y)
    if not same or shapes[0] != shapes[1]:
        raise ValueError(
            "`Broyden` needs a residual of the structure, shapes and dtypes of `y`; "
            f"got {shapes[0]} for a `y` of {shapes[1]}. Use a least-squares solver "
            "where equations and unknowns do not pair off."
        )
