"""Newton's method for at most three unknowns, in closed form.

Under `jax.vmap` a batch of such systems is a few long vectors and arithmetic on them.
All lanes are in one loop until the last has left it, and those which are done stay
where they are: that is cheaper than to choose lane by lane for everything in the loop.
In it is `lax` alone: each operator of `jnp` is a `jit`, which is traced and batched.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._lanes import in_every_lane, max_lane
from .._problem import IteratedFn
from .._solution import RESULTS, where_result
from ..linear_solvers import (
    _closed_form as closed,
    _small as small,
    AutoLinearSolver,
    DirectLU,
)
from ..linear_solvers._entrywise import entrywise
from . import _vector_space as vs
from ._multiple import is_hardly_shorter, is_seen, is_slow
from ._opening import LEAST_BUDGET, Opened
from ._root_vector import real_size

# An opening is given so many steps. Near a root it needs five; a step that goes up
# first, as many do, costs less than to watch for it in each of 10 000 lanes.
_STEPS = LEAST_BUDGET // 2
# So many times farther away than the start from the origin, a root is another matter.
_FAR = 100.0
# Linear solvers that are Gaussian elimination or Cramer's rule at this size.
_DIRECT = (lx.AutoLinearSolver, lx.LU, AutoLinearSolver, DirectLU)


def is_small(y: PyTree[Array]) -> bool:
    """Whether Newton's method for states like `y` is one of scalars."""
    if not 0 < real_size(y) <= small.LARGEST or vs.has_complex(y):
        return False
    return vs.one_dtype(y) and not small.is_placed(jax.eval_shape(lambda: y))


class _Seen(NamedTuple):
    """The function at a point, by entries, and what Newton's step takes off there."""

    f: list[Array]
    move: list[Array]
    aux: Any


class _Problem:
    """A function of few numbers, which is evaluated entry by entry if it is short."""

    def __init__(self, fn: IteratedFn, args: Any, struct: Any):
        self.struct = struct
        self._fn = lambda y: fn(y, args)
        self._by_entries = entrywise(self._fn, struct)

    def look(self, y: list[Array]) -> _Seen:
        evaluate = self._by_entries
        if evaluate is None:
            f, rows, aux = self._linearised(y)
        else:
            along = [_along(evaluate, y, i) for i in range(len(y))]
            f, _, aux = along[0]
            columns = [column for _, column, _ in along]
            rows = [list(row) for row in zip(*columns, strict=True)]
        return _Seen(f, closed.solve(rows, f), aux)

    def _linearised(self, y: list[Array]) -> tuple[list[Array], closed.Rows, Any]:
        at = small.from_entries(y, self.struct)
        out, linear, aux = jax.linearize(self._fn, at, has_aux=True)
        return small.entries(out), small.rows_of(linear, self.struct), aux


def _along(
    evaluate: Callable[[list[Array]], tuple[list[Array], Any]], y: list[Array], i: int
) -> tuple[list[Array], list[Array], Any]:
    """The entries of a function, their derivative in one of `y`, and what is beside."""
    fn = lambda entry: evaluate([*y[:i], entry, *y[i + 1 :]])
    return jax.jvp(fn, (y[i],), (jnp.ones_like(y[i]),), has_aux=True)


class _Carry(eqx.Module):
    y: list[Array]  # the entries: under `vmap` a vector each
    aux: Any
    left: Float[Array, ""]  # above a limit in a lane that is not done
    steps: Int[Array, ""]  # of this lane,
    shared: Int[Array, ""]  # and of the loop


def _begin(
    fn: IteratedFn, y: PyTree[Array], args: Any, aux: Any, left: float
) -> _Carry:
    zero = jnp.zeros((), int)
    number = jnp.asarray(left, vs.real_dtype(y))
    begun = small.entries(y), aux, number, zero
    return _Carry(*in_every_lane(begun, (fn, args)), zero)


def _loop(
    step: Callable[[list[Array], Array], tuple[list[Array], Any, Array]],
    limit: float,
    carry: _Carry,
    max_steps: int | None,
) -> _Carry:
    """Until what is left, which a step returns last, is within `limit` in all lanes."""

    def go_on(c: _Carry) -> Bool[Array, ""]:
        # A number, whose maximum XLA finds in half the time that it takes over flags.
        more = _exceeds(max_lane(c.left), limit)
        if max_steps is None:
            return more
        return lax.bitwise_and(
            more, lax.lt(c.shared, lax.full_like(c.shared, max_steps))
        )

    def body(c: _Carry) -> _Carry:
        y, aux, left = step(c.y, c.left)
        counts = _exceeds(c.left, limit)
        aux = vs.select(counts, aux, c.aux)
        steps, shared = _next(c.steps), _next(c.shared)
        return _Carry(y, aux, left, lax.select(counts, steps, c.steps), shared)

    return lax.while_loop(go_on, body, carry)


def _exceeds(x: Array, limit: float) -> Bool[Array, ""]:
    return lax.gt(x, lax.full_like(x, limit))


def _next(count: Int[Array, ""]) -> Int[Array, ""]:
    return lax.add(count, lax.full_like(count, 1))


def _is_below(x: Array, limit: Any) -> Bool[Array, ""]:
    return lax.lt(x, lax.full_like(x, limit))


def _moved(go_on: Array, y: list[Array], move: list[Array]) -> list[Array]:
    return [lax.select(go_on, lax.sub(a, b), a) for a, b in zip(y, move, strict=True)]


def newton_opening(
    fn: IteratedFn, y: PyTree[Array], args: Any, aux: Any, atol: float
) -> Opened:
    """Newton's method until every entry of the residual *at* `y` is within `atol`."""
    problem = _Problem(fn, args, jax.eval_shape(lambda: y))
    carry = _begin(fn, y, args, aux, jnp.inf)

    def step(y: list[Array], before: Array) -> tuple[list[Array], Any, Array]:
        seen = problem.look(y)
        largest = closed.largest(seen.f)
        there = lax.le(largest, lax.full_like(largest, atol))
        # A root that may not be simple the robust solver judges, which knows rounding.
        slow = lax.bitwise_and(there, is_slow(largest, before))
        good = lax.bitwise_and(lax.is_finite(largest), lax.bitwise_not(slow))
        left = lax.select(good, largest, lax.full_like(largest, -1))
        left = lax.select(_exceeds(before, atol), left, before)
        return _moved(lax.bitwise_not(there), y, seen.move), seen.aux, left

    c = _loop(step, atol, carry, _STEPS)
    # A residual may also vanish at infinity: what is far away the robust solver judges.
    way = [new - old for new, old in zip(c.y, carry.y, strict=True)]
    near = closed.largest(way) <= _FAR * jnp.maximum(closed.largest(carry.y), 1)
    solved = (c.left >= 0) & (c.left <= atol) & near
    stats = {
        "residual_norm": c.left,
        "num_evaluations": c.steps * (1 + vs.size(y)),
        "num_restarts": jnp.zeros((), int),
        "simple": jnp.asarray(True),
    }
    start = vs.select(solved, small.from_entries(c.y, problem.struct), y)
    return Opened(start, c.aux, solved, c.steps, jnp.asarray(_STEPS), stats)


def is_closed_form(solver: Any, y: PyTree[Array], options: dict[str, Any]) -> bool:
    """Whether a solver is optimistix's Newton method, for a state small enough."""
    if type(solver) is not optx.Newton or options or not is_small(y):
        return False
    if not solver.cauchy_termination or solver.norm is not optx.max_norm:
        return False
    # lineax's own choice means least squares there, if told that it may be singular.
    linear_solver = solver.linear_solver
    direct = type(linear_solver) in _DIRECT
    return direct and getattr(linear_solver, "well_posed", None) is not False


class Newtons(NamedTuple):
    """Where `optimistix.Newton` has come."""

    y: PyTree[Array]
    aux: Any
    result: RESULTS
    solved: Bool[Array, ""]  # whether `result` is successful
    num_steps: Int[Array, ""]
    simple: Bool[Array, ""]


def small_newton(
    solver: Any,
    fn: IteratedFn,
    y: PyTree[Array],
    args: Any,
    aux: Any,
    max_steps: int | None,
) -> Newtons:
    """The iterates of `optimistix.Newton`, and its end: a small step from a small `f`.

    **Arguments:** `aux` is structured as that of `fn`; `max_steps` counts evaluations.
    """
    problem = _Problem(fn, args, jax.eval_shape(lambda: y))
    codes = _codes(vs.real_dtype(y))

    def step(y: list[Array], before: Array) -> tuple[list[Array], Any, Array]:
        seen, going = problem.look(y), _exceeds(before, 0.0)
        new = _moved(going, y, seen.move)
        # The step as it was taken: no quotient in it has to be found a second time.
        step = list(map(lax.sub, y, new))
        length, largest = closed.largest(step), closed.largest(seen.f)
        # optimistix holds `f` against zero, so that only `atol` counts.
        small_f = _is_below(largest, solver.atol)
        over = lax.bitwise_and(_within(solver, step, new), small_f)
        simple, singular, nonfinite = (lax.full_like(before, code) for code in codes)
        hardly = is_hardly_shorter(length, before)
        done = lax.select(hardly, lax.neg(length), simple)
        cause = lax.select(_is_below(largest, jnp.inf), singular, nonfinite)
        more = lax.select(_is_below(length, jnp.inf), length, cause)
        now = lax.select(over, done, more)
        return new, seen.aux, lax.select(going, now, before)

    c = _loop(step, 0.0, _begin(fn, y, args, aux, jnp.inf), max_steps)
    result, solved, hardly = _ended(c.left, codes)
    simple = ~(hardly & is_seen(-c.left, closed.largest(c.y)))
    found = small.from_entries(c.y, problem.struct)
    return Newtons(found, c.aux, result, solved, c.steps, simple)


def _codes(dtype: Any) -> tuple[float, float, float]:
    """What is left of an iteration after a good end, a singular and a nonfinite one.

    Else it is the length of its last step: zero if it would stay there for ever, and
    negative after an end whose last step is hardly shorter than the one before.
    """
    least = float(jnp.finfo(dtype).min)
    return -math.inf, least, least / 2


def _ended(
    left: Array, codes: tuple[float, float, float]
) -> tuple[RESULTS, Bool[Array, ""], Bool[Array, ""]]:
    """How an iteration has ended, if well, and if by a step that is hardly shorter."""
    good, singular, nonfinite = (left == code for code in codes)
    hardly = (left < 0) & ~(good | singular | nonfinite)
    solved = good | hardly
    result = where_result(
        solved, RESULTS.successful, RESULTS.nonlinear_max_steps_reached
    )
    result = where_result(singular, RESULTS.singular, result)
    return where_result(nonfinite, RESULTS.nonfinite, result), solved, hardly


def _within(solver: Any, x: list[Array], y: list[Array]) -> Bool[Array, ""]:
    """Whether every entry of `x` is small by the tolerances of a solver, at `y`."""
    rtol, atol = (lax.full_like(x[0], tol) for tol in (solver.rtol, solver.atol))
    flags = [
        lax.lt(lax.abs(xi), lax.add(atol, lax.mul(rtol, lax.abs(yi))))
        for xi, yi in zip(x, y, strict=True)
    ]
    return functools.reduce(lax.bitwise_and, flags)
