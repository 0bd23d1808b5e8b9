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
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from . import _vector_space as vs
from ._verdict import Tolerance

Fn = Callable[[Any, Any], tuple[Any, Any]]
# After `k` plain steps the residual must be at most `SLACK * RATE**k` of what it was: a
# robust solver needs half as many steps as plain iteration at that rate.
SLACK, RATE = 2.0, 0.5
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
    """

    y: PyTree[Array]
    aux: Any
    solved: Bool[Array, ""]
    num_steps: Int[Array, ""]
    budget: Int[Array, ""]
    stats: dict[str, Any]


class AbstractOpening(eqx.Module):
    """A solver that has an opening."""

    @abc.abstractmethod
    def opening(
        self, fn: Fn, y: PyTree[Array], args: Any, aux: Any, max_steps: int | None
    ) -> Opened | None:
        """Returns the outcome of the opening, or `None` if this state has none.

        `aux` is structured as the auxiliary output of `fn`.
        """


class _Contraction(eqx.Module):
    """Two iterates in a row, of which the residual of the first is known."""

    y: PyTree[Array]
    ahead: PyTree[Array]
    aux: Any
    error: Float[Array, ""]  # the residual of `y`, in units of the tolerance,
    before: Float[Array, ""]  # and that of the iterate before
    bound: Float[Array, ""]  # what it must not exceed
    steps: Int[Array, ""]
    target: float = eqx.field(static=True)

    @property
    def contracts(self) -> Bool[Array, ""]:
        return (self.error > 0) & (self.error <= self.bound)

    @property
    def solved(self) -> Bool[Array, ""]:
        # |r| / (1 - rate) < target, with the rate |r| / |r before|; no division.
        slack = self.target * (self.before - self.error)
        return (self.error == 0) | (self.error * self.before < slack)


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

    def unfinished(c: _Contraction) -> Bool[Array, ""]:
        wanted = c.contracts & ~c.solved
        return wanted if max_steps is None else wanted & (c.steps < max_steps)

    def step(c: _Contraction) -> _Contraction:
        image, aux = fn(c.ahead, args)
        error = tolerance.measure(vs.minus(image, c.ahead), c.ahead)
        bound = RATE * jnp.minimum(c.bound, SLACK / RATE * error)
        steps = c.steps + 1
        return _Contraction(c.ahead, image, aux, error, c.error, bound, steps, target)

    infinite, zero = jnp.asarray(jnp.inf, vs.real_dtype(y)), jnp.zeros((), int)
    target = _target(tolerance, vs.resolution(y))
    begun = _Contraction(y, y, aux, infinite, infinite, infinite, zero, target)
    c = jax.lax.while_loop(unfinished, step, begun)
    usable = (c.error < c.before) | (c.error < 1)
    residual = vs.minus(c.ahead, c.y)
    stats = {
        "residual_norm": vs.norm_of(tolerance.norm, residual, infinite.dtype),
        "scaled_error": c.error,
        "num_rescues": jnp.zeros((), jnp.int32),
    }
    start = vs.select(c.solved, c.y, vs.select(usable, c.ahead, y))
    return Opened(start, c.aux, c.solved, c.steps, c.steps, stats)


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
