"""The opening of the default fixed-point solver: plain iteration, or secant steps.

A state of few numbers takes Anderson's step with one pair, which is the secant method
for one number. For a larger state plain steps are kept: where the function is cheap,
the products that a secant step takes cost more than they save.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._packed import packed, unpacked, where, widened
from .._reduce import total
from .._state import peak
from . import _vector_space as vs
from ._opening import Fn, Opened
from ._verdict import Tolerance

# So many numbers are few.
FEW = 64
# A secant step takes back at most so many times the last turn.
LONGEST = 4.0
# A robust solver needs half as many steps as plain iteration at this rate. A step at a
# greater one adds to the delay, at most this much each: one bad step is an accident, a
# second one in a row is too much.
RATE, SECANT_RATE, LATE, TOO_LATE = 0.5, 0.3, 1.3, 1.4
# One digit beyond the tolerance, unless that is below so many roundings.
DIGIT, ROUNDINGS = 0.1, 16.0


class Progress(eqx.Module):
    """The numbers of an iteration; its errors are in units of the tolerance."""

    before: Array  # the residual before `y`,
    error: Array  # and at `y`
    delay: Array  # of `error`, as a factor, behind a good contraction
    steps: Array
    square: Array  # of the length of the residual at `y`
    share: Array  # of the last turn that the next step takes back

    @property
    def contracts(self) -> Array:
        good = (self.error <= self.before) & (self.delay <= TOO_LATE)
        return (self.error > 0) & good

    def solved(self, target: float) -> Array:
        # |r| / (1 - rate) < target, with the rate |r| / |r before|; no division.
        slack = target * (self.before - self.error)
        return (self.error == 0) | (self.error * self.before < slack)

    def after(self, error: Array, rate: float) -> "Progress":
        late = jnp.minimum(error / (rate * self.error), LATE)
        delay = jnp.maximum(self.delay * late, 1)
        steps = self.steps + 1
        return Progress(self.error, error, delay, steps, self.square, self.share)

    def turned(self, square: Array, change: Array) -> "Progress":
        """With the next secant step, from squared lengths of a residual and its change.

        The first contraction is that of a plain step, and forgiven.
        """
        part = (square - self.square + change) / 2  # by the law of cosines
        known = (self.steps > 1) & (jnp.abs(part) < LONGEST * change)
        share = where(known, part, 0) / where(known, change, 1)
        delay = where(self.steps > 2, self.delay, 1)
        return Progress(self.before, self.error, delay, self.steps, square, share)


class Iterates(eqx.Module):
    """A point that has been evaluated, and what is known of the map there.

    **Attributes:**

    - `start`: where it all began.
    - `y`, `residual`: the point, and `fn(y) - y`.
    - `turn`: how much `fn(y)` differs from the image before; `None` for plain steps.
    - `last_aux`, `aux`: the auxiliary output of the function before `y` and at `y`.
    - `numbers`: how the iteration does, packed.
    """

    start: PyTree[Array]
    y: PyTree[Array]
    residual: PyTree[Array]
    turn: PyTree[Array] | None
    last_aux: Any
    aux: Any
    numbers: Float[Array, " numbers"]

    @property
    def progress(self) -> Progress:
        return unpacked(Progress, self.numbers)

    @property
    def ahead(self) -> PyTree[Array]:
        """The point that comes next."""
        image = vs.plus(self.y, self.residual)
        if self.turn is None:
            return image
        return vs.add_scaled(image, -self.progress.share, self.turn)


def opening(
    fn: Fn,
    y: PyTree[Array],
    args: Any,
    aux: Any,
    tolerance: Tolerance,
    max_steps: int | None,
) -> Opened:
    r"""Iterates until the estimated error is well within the tolerance.

    The error is the residual over $1 - \rho$ for a residual that shrinks by $\rho$. It
    is that of the point returned, which has been evaluated.
    """
    target = _target(tolerance, vs.resolution(y))
    few = vs.size(y) <= FEW and tolerance.norm is optx.max_norm

    def unfinished(c: Iterates) -> Bool[Array, ""]:
        wanted = c.progress.contracts & ~c.progress.solved(target)
        return wanted if max_steps is None else wanted & (c.progress.steps < max_steps)

    def step(c: Iterates) -> Iterates:
        ahead = c.ahead
        image, aux = fn(ahead, args)
        residual = vs.minus(image, ahead)
        turn, numbers = _judged(tolerance, c, ahead, residual)
        return Iterates(y, ahead, residual, turn, c.aux, aux, numbers)

    begun = jnp.asarray([np.inf, np.inf, 1.0, 0.0, 0.0, 0.0], vs.real_dtype(y))
    zero = vs.zeros_like(y)
    first = Iterates(y, y, zero, zero if few else None, aux, aux, begun)
    last = jax.lax.while_loop(unfinished, step, first)
    return _opened(y, last, tolerance, target)


def _judged(
    tolerance: Tolerance, c: Iterates, y: PyTree[Array], residual: PyTree[Array]
) -> tuple[PyTree[Array] | None, Float[Array, " numbers"]]:
    """The turn, and the packed progress, with the residual at the next point `y`."""
    progress, dtype = c.progress, c.numbers.dtype
    if c.turn is None:
        known = (progress, tolerance.measure(residual, y))
        progress, error = widened(known, c.numbers)
        return None, packed(progress.after(error, RATE), dtype)
    # `y` is the last image, less its share of the last turn.
    turn = vs.add_scaled(residual, -progress.share, c.turn)
    measures = _measures(tolerance, y, residual, vs.minus(residual, c.residual))
    progress, measures = widened((progress, measures), c.numbers)
    error, square, change = measures
    progress = progress.after(error, SECANT_RATE).turned(square, change)
    return turn, packed(progress, dtype)


def _measures(
    tolerance: Tolerance,
    y: PyTree[Array],
    residual: PyTree[Array],
    change: PyTree[Array],
) -> tuple[Array, Array, Array]:
    """The error, and the squared lengths of the residual and of its change.

    All from one stack, for it is a kernel: with one division, which is another.
    """
    dtype = vs.real_dtype(y)

    def leaf(yi: Array, r: Array, c: Array) -> tuple[Array, Array]:
        unit = tolerance.unit(yi)
        size = jnp.where((unit == 0) & (r != 0), jnp.inf, jnp.abs(r))
        rows = (jnp.real(r * jnp.conj(r)), jnp.real(c * jnp.conj(c)), size)
        units = (jnp.ones_like(unit),) * 2 + (jnp.where(unit == 0, 1, unit),)
        rows, units = (
            vs.in_one([row.astype(dtype) for row in x]) for x in (rows, units)
        )
        stack = rows / units
        return peak(stack[2]), total(stack[:2], range(1, stack.ndim))

    leaves = map(leaf, *map(jtu.tree_leaves, (y, residual, change)))
    errors, squares = zip(*leaves, strict=True)
    square, turn = vs.apart(functools.reduce(jnp.add, squares))
    return functools.reduce(jnp.maximum, errors), square, turn


def _opened(
    y: PyTree[Array], c: Iterates, tolerance: Tolerance, target: float
) -> Opened:
    progress = c.progress
    solved, steps = progress.solved(target), progress.steps.astype(int)
    dtype = vs.real_dtype(c.y)
    stats = {
        "residual_norm": vs.norm_of(tolerance.norm, c.residual, dtype),
        "scaled_error": progress.error,
        "num_rescues": jnp.zeros((), jnp.int32),
    }
    found = vs.select(solved, c.y, y)
    return Opened(found, c.aux, solved, steps, steps, stats, c)


def _target(tolerance: Tolerance, eps: float) -> float:
    """The part of the tolerance that is aimed at: a digit more, where there is one.

    A plain step is cheap, and a result that just meets its tolerance surprises.
    """
    known = isinstance(tolerance.rtol, float) and isinstance(tolerance.atol, float)
    if not known or max(tolerance.rtol, tolerance.atol) == 0.0:
        return 1.0
    floor = ROUNDINGS * eps / max(tolerance.rtol, tolerance.atol)
    return min(max(DIGIT, floor), 1.0)
