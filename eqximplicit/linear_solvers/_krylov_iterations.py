r"""Conjugate gradients and residuals for `A x = b`, with one product in the loop body.

A product is what such a solve costs, in run time and (once per place where it is
written) in compile time. So the check of the true residual at the end, and any restart
from it, are iterations of the same loop in which the product is taken of `x`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from .._lanes import in_every_lane
from .._packed import packed, unpacked
from ._iterations import COUNTED, counting, Found, start, System, Vector
from ._residual import add, dot, epsilon, minus, scale, where

T = TypeVar("T", "_CG", "_GCR")

# A cycle must shrink the true residual to this part of itself, or it stagnates.
CYCLE_RATE = 0.9


class _Course(eqx.Module):
    """The numbers that steer a Krylov iteration; flags are 0 or 1."""

    rr: Array
    checked: Array  # squared norm of the last true residual
    steps: Array
    check: Array  # this product is of x
    stop: Array


class _CGCourse(_Course):
    rz: Array


class _CG(eqx.Module):
    x: Vector
    r: Vector
    p: Vector
    numbers: Float[Array, " numbers"]


def _loop(step: Callable[[T], T], first: T, kind: type[_Course], exact: Any) -> Found:
    going = lambda c: unpacked(kind, c.numbers).stop == 0
    last = jax.lax.while_loop(going, step, in_every_lane(first))
    course = unpacked(kind, last.numbers)
    return Found(last.x, course.rr.astype(exact), course.steps.astype(int))


def conjugate_gradient(system: System, warm: Vector | None) -> Found:
    """Conjugate gradients, stopped at once where the operator shows not to be positive.

    From a start of zero, a consistent singular system yields the minimum-norm solution
    (Hestenes & Stiefel 1952; Kammerer & Nashed, SIAM J. Numer. Anal. 9 (1972) 165).
    """
    first = start(system, warm)
    dtype, exact = counting(first.rr), first.rr.dtype
    max_steps = min(system.max_steps, COUNTED)

    def step(c: _CG) -> _CG:
        course = unpacked(_CGCourse, c.numbers)
        check, before = course.check > 0, course.rz.astype(exact)
        image = system.mv(where(check, c.x, c.p))
        curvature = dot(c.p, image)
        positive = check | (curvature > 0)
        alpha = jnp.where(
            check | ~positive, 0, before / jnp.where(positive, curvature, 1)
        )
        x = add(c.x, scale(alpha, c.p))
        r = where(check, minus(system.b, image), minus(c.r, scale(alpha, image)))
        z = system.precondition(r)
        rr, rz = dot(r, r), dot(r, z)
        beta = jnp.where(check, 0, rz / jnp.where(before == 0, 1, before))
        solved, steps = system.solved(rr), course.steps + 1
        checked = course.checked.astype(exact)
        stalled = check & (rr > CYCLE_RATE**2 * checked)
        spent = (steps >= max_steps) & (check | ~solved)
        stop = ~positive | (check & solved) | stalled | spent | ~jnp.isfinite(rr)
        new = _CGCourse(
            rr=rr,
            checked=jnp.where(check, rr, checked),
            steps=steps,
            check=solved & ~check,
            stop=stop,
            rz=rz,
        )
        return _CG(x, r, add(z, scale(beta, c.p)), packed(new, dtype))

    z = system.precondition(first.r)
    stop = ~jnp.isfinite(first.rr) | system.solved(first.rr)
    begun = _CGCourse(
        rr=first.rr,
        checked=first.rr,
        steps=first.steps,
        check=jnp.asarray(0),
        stop=stop,
        rz=dot(first.r, z),
    )
    init = _CG(first.x, first.r, z, packed(begun, dtype))
    return _loop(step, init, _CGCourse, exact)


class _GCRCourse(_Course):
    count: Array  # how many directions are in use
    by_residual: Array  # the next one is the residual, else the last image


class _GCR(eqx.Module):
    x: Vector
    r: Vector
    q: Vector  # the last image
    images: Vector  # q_j: orthonormal, q_j = A p_j
    directions: Vector  # p_j
    numbers: Float[Array, " numbers"]


def _orthonormalise(
    c: _GCR, count: Array, image: Vector, direction: Vector
) -> tuple[Vector, Vector, Bool[Array, ""]]:
    # Classical Gram-Schmidt, twice: orthogonal to working precision (Giraud, Langou &
    # Rozloznik 2005). The same combination of directions keeps q = A p.
    slots = jtu.tree_leaves(c.images)[0].shape[0]
    used = jnp.arange(slots, dtype=count.dtype) < count
    before = dot(image, image)
    q, along = image, []
    for _ in range(2):
        terms = [
            jnp.tensordot(basis, leaf, axes=leaf.ndim, precision="highest")
            for basis, leaf in zip(
                jtu.tree_leaves(c.images), jtu.tree_leaves(q), strict=True
            )
        ]
        along.append(jnp.where(used, sum(terms[1:], terms[0]), 0))
        q = _without(q, along[-1], c.images)
    p = _without(direction, along[0] + along[1], c.directions)
    after = dot(q, q)
    independent = after > (10 * epsilon(q)) ** 2 * before
    inverse = jnp.where(independent, 1 / jnp.sqrt(jnp.where(independent, after, 1)), 0)
    return scale(inverse, q), scale(inverse, p), independent


def _put(basis: Vector, vector: Vector, slot: Int[Array, ""]) -> Vector:
    return jtu.tree_map(
        lambda b, v: jax.lax.dynamic_update_index_in_dim(b, v, slot, 0), basis, vector
    )


def _without(vector: Vector, parts: Float[Array, " m"], basis: Vector) -> Vector:
    return jtu.tree_map(
        lambda v, b: v - jnp.tensordot(parts, b, axes=1, precision="highest"),
        vector,
        basis,
    )


def conjugate_residual(
    system: System, x: Vector, steps: Int[Array, ""], restart: int
) -> Found:
    r"""Minimises the residual over a Krylov space that is restarted when it is full.

    The generalised conjugate residual method, equivalent to GMRES(`restart`) but with
    the residual at hand in each step. The next direction is the residual if it has just
    shrunk, and the last image otherwise, which no operator can break down (Jiránek &
    Rozložník, "Adaptive version of simpler GMRES", Numer. Algorithms 53 (2010) 93). A
    preconditioner acts from the right and may vary.

    The first product is that of `x`, where another iteration has come to in `steps`.
    """
    dtype, exact = counting(system.bb), system.bb.dtype
    max_steps = min(system.max_steps, COUNTED)

    def step(c: _GCR) -> _GCR:
        course = unpacked(_GCRCourse, c.numbers)
        check, by_residual = course.check > 0, course.by_residual > 0
        z = system.precondition(where(by_residual, c.r, c.q))
        image = system.mv(where(check, c.x, z))
        q, p, independent = _orthonormalise(c, course.count, image, z)
        alpha = jnp.where(check, 0, dot(q, c.r))
        x = add(c.x, scale(alpha, p))
        r = where(check, minus(system.b, image), minus(c.r, scale(alpha, q)))
        rr, before = dot(r, r), course.rr.astype(exact)
        solved, steps = system.solved(rr), course.steps + 1
        count = jnp.where(check, 0, course.count + independent.astype(dtype))
        # A dependent image of the residual: try the last image; of that too: give up.
        stuck = ~independent & (~by_residual | (course.count == 0))
        full = (count == restart) | stuck | (steps >= max_steps)
        checked = course.checked.astype(exact)
        stalled = rr > CYCLE_RATE**2 * checked
        stop = check & (solved | stalled | (steps >= max_steps))
        slot = jnp.minimum(course.count, restart - 1).astype(int)  # unused in a check
        new = _GCRCourse(
            rr=rr,
            checked=jnp.where(check, rr, checked),
            steps=steps,
            check=~check & (solved | full),
            stop=stop | ~jnp.isfinite(rr),
            count=count,
            by_residual=check | (independent & (rr <= 0.8 * before)),
        )
        return _GCR(
            x,
            r,
            q=where(independent & ~check, q, c.q),
            images=_put(c.images, q, slot),
            directions=_put(c.directions, p, slot),
            numbers=packed(new, dtype),
        )

    basis = jtu.tree_map(lambda v: jnp.zeros((restart, *v.shape), v.dtype), system.b)
    never, yes, no = (jnp.asarray(value) for value in (jnp.inf, 1, 0))
    begun = _GCRCourse(
        rr=never,
        checked=never,
        steps=steps,
        check=yes,
        stop=~jnp.isfinite(system.bb),
        count=no,
        by_residual=yes,
    )
    init = _GCR(x, system.b, system.b, basis, basis, packed(begun, dtype))
    return _loop(step, init, _GCRCourse, exact)
