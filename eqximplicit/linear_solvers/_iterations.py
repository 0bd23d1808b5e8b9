r"""Picard iteration for `A x = b`, and what every matrix-free iteration starts from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._lanes import in_every_lane
from .._packed import packed
from ._residual import add, dot, minus, square, within, zeros_like

Vector = PyTree[Array]

# A Picard step must shrink the residual to this part of itself. Krylov products cost
# more each (orthogonalisation) and fewer are needed: the break-even is near here.
PICARD_RATE = 0.7
# Steps that are counted in a vector of other numbers: float32 counts as far as this.
COUNTED = 2**24 - 1


class System(eqx.Module):
    """`A x = b`, to be solved to `‖b - A x‖ ≤ rtol ‖b‖ + atol`.

    At most `max_steps` products are taken; `bb` is `‖b‖²`.
    """

    mv: Callable[[Vector], Vector]
    precondition: Callable[[Vector], Vector]
    b: Vector
    bb: Float[Array, ""]
    rtol: float | Float[Array, ""]
    atol: float | Float[Array, ""]
    max_steps: int = eqx.field(static=True)

    def solved(self, rr: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether a squared residual norm is small enough; a NaN is not.

        From `‖b‖²` each time: a tolerance that is carried into a loop is a kernel.
        """
        return within(rr, self.bb, self.rtol, self.atol)


class Found(NamedTuple):
    """An approximate solution, its squared residual norm, the products so far."""

    x: Vector
    rr: Float[Array, ""]
    steps: Int[Array, ""]


class Start(NamedTuple):
    x: Vector
    r: Vector
    rr: Float[Array, ""]
    steps: Int[Array, ""]


def start(system: System, warm: Vector | None) -> Start:
    """At a warm start, or at zero, which needs no product."""
    if warm is None:
        return Start(zeros_like(system.b), system.b, system.bb, jnp.asarray(0))
    r = minus(system.b, system.mv(warm))
    return Start(warm, r, dot(r, r), jnp.asarray(1))


def unbegun(system: System, warm: Vector | None) -> Found:
    """What is known before any product."""
    x = zeros_like(system.b) if warm is None else warm
    return Found(x, system.bb, jnp.asarray(0))


def counting(rr: Float[Array, ""]) -> Any:
    """The dtype of numbers among which steps are counted."""
    return rr.dtype if jnp.finfo(rr.dtype).bits >= 32 else jnp.float32


class _Progress(eqx.Module):
    rr: Float[Array, ""]
    before: Float[Array, ""]  # of the iterate before
    steps: Array


class _Picard(eqx.Module):
    """Two iterates in a row, of which the residual of the first is known."""

    x: Vector
    ahead: Vector
    numbers: Float[Array, " numbers"]

    @property
    def rr(self) -> Float[Array, ""]:
        return jax.lax.index_in_dim(self.numbers, 0, keepdims=False)

    @property
    def before(self) -> Float[Array, ""]:
        return jax.lax.index_in_dim(self.numbers, 1, keepdims=False)

    @property
    def steps(self) -> Float[Array, ""]:
        return jax.lax.index_in_dim(self.numbers, 2, keepdims=False)


def picard(
    system: System,
    warm: Vector | None,
    goes_on: Callable[[Float[Array, ""], Float[Array, ""]], Bool[Array, ""]],
) -> Found:
    r"""Iterates `x ← x + M (b - A x)` as long as `goes_on(rr, rr_before)`.

    The residual is that of `x` itself, never a recurrence, and costs no product of its
    own: that of `x` yields the next iterate.
    """
    first = start(system, warm)
    exact, dtype = first.rr.dtype, counting(first.rr)
    max_steps = min(system.max_steps, COUNTED)

    def unfinished(c: _Picard) -> Bool[Array, ""]:
        rr, before = c.rr.astype(exact), c.before.astype(exact)
        return ~system.solved(rr) & (c.steps < max_steps) & goes_on(rr, before)

    def step(c: _Picard) -> _Picard:
        r = minus(system.b, system.mv(c.ahead))
        ahead = add(c.ahead, system.precondition(r))
        now = _Progress(square(r), c.rr, c.steps + 1)
        return _Picard(c.ahead, ahead, packed(now, dtype))

    ahead = add(first.x, system.precondition(first.r))
    others = np.array([0, np.inf, 0 if warm is None else 1], dtype)
    rr = jnp.broadcast_to(first.rr.astype(dtype), (3,))
    begun = jax.lax.select(np.array([True, False, False]), rr, others)
    init = in_every_lane(_Picard(first.x, ahead, begun))
    last = jax.lax.while_loop(unfinished, step, init)
    return Found(last.x, last.rr.astype(exact), last.steps.astype(int))


def contracts(rr: Float[Array, ""], before: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a step has shrunk the residual as well as a Krylov step would."""
    return rr <= PICARD_RATE**2 * before
