r"""Three matrix-free iterations for `A x = b`, each with one product in its loop body.

A product is what such a solve costs, in run time and (once per place where it is
written) in compile time. So the check of the true residual at the end, and any restart
from it, are iterations of the same loop in which the product is taken of `x`.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._lanes import in_every_lane
from .._packed import packed
from ._residual import (
    add,
    dot,
    epsilon,
    minus,
    scale,
    square,
    where,
    within,
    zeros_like,
)

Vector = PyTree[Array]

# A Picard step must shrink the residual to this part of itself. Krylov products cost
# more each (orthogonalisation) and fewer are needed: the break-even is near here.
PICARD_RATE = 0.7
# A Krylov cycle must shrink the true residual to this part of itself, or it stagnates.
CYCLE_RATE = 0.9
# Steps that are counted in a vector of other numbers: float32 counts as far as this.
_COUNTED = 2**24 - 1


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


class Iterate(eqx.Module):
    """An approximate solution, its residual and squared norm, the products so far."""

    x: Vector
    r: Vector
    rr: Float[Array, ""]
    steps: Int[Array, ""]


def start(system: System, x: Vector | None) -> Iterate:
    """The iterate at a warm start, or at zero, which needs no product."""
    if x is None:
        return Iterate(zeros_like(system.b), system.b, system.bb, jnp.asarray(0))
    r = minus(system.b, system.mv(x))
    return Iterate(x, r, dot(r, r), jnp.asarray(1))


class Found(NamedTuple):
    """An approximate solution, its squared residual norm, the products so far."""

    x: Vector
    rr: Float[Array, ""]
    steps: Int[Array, ""]


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
    exact = first.rr.dtype
    dtype = exact if jnp.finfo(exact).bits >= 32 else jnp.float32
    max_steps = min(system.max_steps, _COUNTED)

    def unfinished(c: _Picard) -> Bool[Array, ""]:
        rr = c.rr
        wanted = ~system.solved(rr) & (c.steps < max_steps)
        return wanted & goes_on(rr, c.before)

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


class _CG(eqx.Module):
    it: Iterate
    p: Vector
    rz: Float[Array, ""]
    checked: Float[Array, ""]  # squared norm of the last true residual
    check: Bool[Array, ""]  # this product is of x
    stop: Bool[Array, ""]


def conjugate_gradient(system: System, first: Iterate) -> Iterate:
    """Conjugate gradients, stopped at once where the operator shows not to be positive.

    From a start of zero, a consistent singular system yields the minimum-norm solution
    (Hestenes & Stiefel 1952; Kammerer & Nashed, SIAM J. Numer. Anal. 9 (1972) 165).
    """

    def step(c: _CG) -> _CG:
        it = c.it
        image = system.mv(where(c.check, it.x, c.p))
        curvature = dot(c.p, image)
        positive = c.check | (curvature > 0)
        alpha = jnp.where(
            c.check | ~positive, 0, c.rz / jnp.where(positive, curvature, 1)
        )
        x = add(it.x, scale(alpha, c.p))
        r = where(c.check, minus(system.b, image), minus(it.r, scale(alpha, image)))
        z = system.precondition(r)
        rr, rz = dot(r, r), dot(r, z)
        beta = jnp.where(c.check, 0, rz / jnp.where(c.rz == 0, 1, c.rz))
        solved = system.solved(rr)
        stalled = c.check & (rr > CYCLE_RATE**2 * c.checked)
        steps = it.steps + 1
        spent = (steps >= system.max_steps) & (c.check | ~solved)
        stop = ~positive | (c.check & solved) | stalled | spent
        return _CG(
            it=Iterate(x, r, rr, steps),
            p=add(z, scale(beta, c.p)),
            rz=rz,
            checked=jnp.where(c.check, rr, c.checked),
            check=solved & ~c.check,
            stop=stop | ~jnp.isfinite(rr),
        )

    z = system.precondition(first.r)
    usable = jnp.isfinite(first.rr) & ~system.solved(first.rr)
    no = jnp.asarray(False)
    init = _CG(first, z, dot(first.r, z), first.rr, no, ~usable)
    return jax.lax.while_loop(lambda c: ~c.stop, step, in_every_lane(init)).it


class _GCR(eqx.Module):
    it: Iterate
    images: Vector  # q_j: orthonormal, q_j = A p_j
    directions: Vector  # p_j
    count: Int[Array, ""]  # how many of them are in use
    q: Vector  # the last image
    by_residual: Bool[Array, ""]  # the next direction is the residual, else q
    checked: Float[Array, ""]
    check: Bool[Array, ""]
    stop: Bool[Array, ""]


def _orthonormalise(
    c: _GCR, image: Vector, direction: Vector
) -> tuple[Vector, Vector, Bool[Array, ""]]:
    # Classical Gram-Schmidt, twice: orthogonal to working precision (Giraud, Langou &
    # Rozloznik 2005). The same combination of directions keeps q = A p.
    used = jnp.arange(jtu.tree_leaves(c.images)[0].shape[0]) < c.count
    before = dot(image, image)
    q, p = image, direction
    for _ in range(2):
        terms = [
            jnp.tensordot(basis, leaf, axes=leaf.ndim, precision="highest")
            for basis, leaf in zip(
                jtu.tree_leaves(c.images), jtu.tree_leaves(q), strict=True
            )
        ]
        h = jnp.where(used, sum(terms[1:], terms[0]), 0)
        q = jtu.tree_map(lambda v, b, h=h: v - _combine(h, b), q, c.images)
        p = jtu.tree_map(lambda v, b, h=h: v - _combine(h, b), p, c.directions)
    after = dot(q, q)
    independent = after > (10 * epsilon(q)) ** 2 * before
    inverse = jnp.where(independent, 1 / jnp.sqrt(jnp.where(independent, after, 1)), 0)
    return scale(inverse, q), scale(inverse, p), independent


def _put(basis: Vector, vector: Vector, slot: Int[Array, ""]) -> Vector:
    return jtu.tree_map(
        lambda b, v: jax.lax.dynamic_update_index_in_dim(b, v, slot, 0), basis, vector
    )


def _combine(h: Float[Array, " m"], basis: Array) -> Array:
    return jnp.tensordot(h, basis, axes=1, precision="highest")


def conjugate_residual(system: System, first: Iterate, restart: int) -> Iterate:
    r"""Minimises the residual over a Krylov space that is restarted when it is full.

    The generalised conjugate residual method, equivalent to GMRES(`restart`) but with
    the residual at hand in each step. The next direction is the residual if it has just
    shrunk, and the last image otherwise, which no operator can break down (Jiránek &
    Rozložník, "Adaptive version of simpler GMRES", Numer. Algorithms 53 (2010) 93). A
    preconditioner acts from the right and may vary.
    """

    def step(c: _GCR) -> _GCR:
        it = c.it
        z = system.precondition(where(c.by_residual, it.r, c.q))
        image = system.mv(where(c.check, it.x, z))
        q, p, independent = _orthonormalise(c, image, z)
        alpha = jnp.where(c.check, 0, dot(q, it.r))
        x = add(it.x, scale(alpha, p))
        r = where(c.check, minus(system.b, image), minus(it.r, scale(alpha, q)))
        rr = dot(r, r)
        solved, steps = system.solved(rr), it.steps + 1
        count = jnp.where(c.check, 0, c.count + jnp.where(independent, 1, 0))
        # A dependent image of the residual: try the last image; of that too: give up.
        stuck = ~independent & (~c.by_residual | (c.count == 0))
        full = (count == restart) | stuck | (steps >= system.max_steps)
        stalled = rr > CYCLE_RATE**2 * c.checked
        stop = c.check & (solved | stalled | (steps >= system.max_steps))
        slot = jnp.minimum(c.count, restart - 1)  # unused while checking
        return _GCR(
            it=Iterate(x, r, rr, steps),
            images=_put(c.images, q, slot),
            directions=_put(c.directions, p, slot),
            count=count,
            q=where(independent & ~c.check, q, c.q),
            by_residual=c.check | (independent & (rr <= 0.8 * it.rr)),
            checked=jnp.where(c.check, rr, c.checked),
            check=~c.check & (solved | full),
            stop=stop | ~jnp.isfinite(rr),
        )

    basis = jtu.tree_map(lambda v: jnp.zeros((restart, *v.shape), v.dtype), system.b)
    usable = jnp.isfinite(first.rr) & ~system.solved(first.rr)
    yes, no, zero = jnp.asarray(True), jnp.asarray(False), jnp.asarray(0)
    init = _GCR(first, basis, basis, zero, first.r, yes, first.rr, no, stop=~usable)
    return jax.lax.while_loop(lambda c: ~c.stop, step, in_every_lane(init)).it
