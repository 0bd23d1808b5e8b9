"""Openings: the plain method, as long as it works, before a robust one is started.

Most problems are easy. A robust solver keeps a record of what it has seen, and has many
decisions to take in every step; plain iteration and Newton's method need neither. So a
default solver opens with the plain method in a loop of its own, with nothing to carry
but the state, and is itself only started, under `jax.vmap` in any lane, where that
has stopped to converge well.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._packed import packed, unpacked, widened
from . import _vector_space as vs
from ._verdict import Tolerance

Fn = Callable[[Any, Any], tuple[Any, Any]]
# A robust solver needs half as many steps as plain iteration at this rate. A step at a
# greater one adds to the delay, at most this much each: one bad step is an accident, a
# second one in a row is too much.
RATE, LATE, TOO_LATE = 0.5, 1.3, 1.4
# One digit beyond the tolerance, unless that is below so many roundings.
DIGIT, ROUNDINGS = 0.1, 16.0
# A budget below this is not shared with an opening.
LEAST_BUDGET = 32


class Opened(eqx.Module):
    """How far the opening has come.

    **Attributes:**

    - `y`: the solution where `solved`; where not, a start for the robust solver.
    - `aux`: the auxiliary output of the function at `y` where `solved`.
    - `num_steps`: the evaluations of the function so far,
    - `budget`: and those that count against `max_steps`, whatever other lanes did.
    - `stats`: where `solved`, the statistics that the robust solver would report.
    - `seen`: what the robust solver can start with besides `y`.
    """

    y: PyTree[Array]
    aux: Any
    solved: Bool[Array, ""]
    num_steps: Int[Array, ""]
    budget: Int[Array, ""]
    stats: dict[str, Any]
    seen: Any = None


class AbstractOpening(eqx.Module):
    """A solver that has an opening."""

    @abc.abstractmethod
    def opening(
        self, fn: Fn, y: PyTree[Array], args: Any, aux: Any, max_steps: int | None
    ) -> Opened | None:
        """Returns the outcome of the opening, or `None` if this state has none.

        `aux` is structured as the auxiliary output of `fn`.
        """

    def continued(
        self, y: PyTree[Array], state: Any, opened: Opened
    ) -> tuple[PyTree[Array], Any]:
        """Returns the next trial point, and the state that knows what has been seen.

        Without an opening these are `y`, where it starts, and the `state` of `init`.
        """
        del opened
        return y, state


class Iterates(eqx.Module):
    """Two iterates of plain iteration in a row; `ahead` is still to be evaluated.

    **Attributes:**

    - `start`: where it all began.
    - `y`, `ahead`: the last iterate that has been evaluated, and its image.
    - `last_aux`, `aux`: the auxiliary output of the function before `y` and at `y`.
    - `numbers`: how the iteration does, packed.
    """

    start: PyTree[Array]
    y: PyTree[Array]
    ahead: PyTree[Array]
    last_aux: Any
    aux: Any
    numbers: Float[Array, " numbers"]

    @property
    def progress(self) -> "Progress":
        return unpacked(Progress, self.numbers)


class Progress(eqx.Module):
    """The numbers of plain iteration; its errors are in units of the tolerance."""

    before: Array  # the residual before `y`,
    error: Array  # and at `y`
    delay: Array  # of `error`, as a factor, behind a good contraction
    steps: Array

    @property
    def contracts(self) -> Array:
        good = (self.error <= self.before) & (self.delay <= TOO_LATE)
        return (self.error > 0) & good

    def solved(self, target: float) -> Array:
        # |r| / (1 - rate) < target, with the rate |r| / |r before|; no division.
        slack = target * (self.before - self.error)
        return (self.error == 0) | (self.error * self.before < slack)

    def after(self, error: Array) -> "Progress":
        late = jnp.minimum(error / (RATE * self.error), LATE)
        delay = jnp.maximum(self.delay * late, 1)
        return Progress(self.error, error, delay, self.steps + 1)


def picard(
    fn: Fn,
    y: PyTree[Array],
    args: Any,
    aux: Any,
    tolerance: Tolerance,
    max_steps: int | None,
) -> Opened:
    r"""Iterates `y = fn(y)` until the estimated error is well within the tolerance.

    The error is the residual over $1 - \rho$ for a residual that shrinks by $\rho$. It
    is that of the point returned: its image is the next iterate.
    """
    dtype, target = vs.real_dtype(y), _target(tolerance, vs.resolution(y))

    def unfinished(c: Iterates) -> Bool[Array, ""]:
        wanted = c.progress.contracts & ~c.progress.solved(target)
        return wanted if max_steps is None else wanted & (c.progress.steps < max_steps)

    def step(c: Iterates) -> Iterates:
        image, aux = fn(c.ahead, args)
        error = tolerance.measure(vs.minus(image, c.ahead), c.ahead)
        progress, error = widened((c.progress, error), c.numbers)
        numbers = packed(progress.after(error), dtype)
        return Iterates(y, c.ahead, image, c.aux, aux, numbers)

    begun = jnp.asarray([np.inf, np.inf, 1.0, 0.0], dtype)
    c = jax.lax.while_loop(unfinished, step, Iterates(y, y, y, aux, aux, begun))
    progress = c.progress
    usable = (progress.error < progress.before) | (progress.error < 1)
    solved, steps = progress.solved(target), progress.steps.astype(int)
    residual = vs.minus(c.ahead, c.y)
    stats = {
        "residual_norm": vs.norm_of(tolerance.norm, residual, dtype),
        "scaled_error": progress.error,
        "num_rescues": jnp.zeros((), jnp.int32),
    }
    start = vs.select(solved, c.y, vs.select(usable, c.ahead, y))
    return Opened(start, c.aux, solved, steps, steps, stats, c)


def _target(tolerance: Tolerance, eps: float) -> float:
    """The part of the tolerance that is aimed at: a digit more, where there is one.

    A plain step is cheap, and a result that just meets its tolerance surprises.
    """
    known = isinstance(tolerance.rtol, float) and isinstance(tolerance.atol, float)
    if not known or max(tolerance.rtol, tolerance.atol) == 0.0:
        return 1.0
    floor = ROUNDINGS * eps / max(tolerance.rtol, tolerance.atol)
    return min(max(DIGIT, floor), 1.0)


def chosen(
    solved: Bool[Array, ""], opened: PyTree[Any], finished: PyTree[Any]
) -> PyTree[Any]:
    """The outcome of the opening where it solved the problem, else the other one."""
    return jtu.tree_map(lambda a, b: jnp.where(solved, a, b), opened, finished)
