r"""Roots at which the Jacobian is singular, told by how slowly Newton's method comes.

At a root of multiplicity $m$ a step takes the residual to $((m - 1) / m)^m$ of what it
was, a quarter to a third, instead of to its square, and is $(m - 1) / m$ of the step
before, a half or more (Reddien, *On Newton's method for singular problems*, SIAM J.
Numer. Anal. 15, 1978). There the implicit function theorem says nothing: the solution
may turn back, or part in two. The Jacobian at a point nearby is regular, so that the
linear solve of a derivative sees nothing of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool

from .._custom_types import PyTree
from .._entries import max_abs
from ..linear_solvers._dense import UNSURE
from ..linear_solvers._residual import inner, minus

# Of the residual, a step leaves at least a quarter at a multiple root.
_SLOW = 0.2
# Of the step before, a step is at least a half there.
_SHORTER = 0.4
# By how much of itself a Jacobian may change along Newton's step, at most.
_BENT = 0.25
# A step so short beside the unknowns is one near a solution.
_NEAR = 0.01
# A step of so many roundings of the unknowns is about rounding, which may be slow, too.
_ROUNDINGS = 2.0**12


def is_slow(now: Array, before: Array) -> Bool[Array, "..."]:
    """Whether a Newton step took so little off a residual as at a multiple root."""
    return lax.gt(now, lax.mul(before, lax.full_like(before, _SLOW)))


def is_hardly_shorter(step: Array, before: Array) -> Bool[Array, "..."]:
    """Whether a step is as long, beside the one before, as at a multiple root."""
    return lax.gt(step, lax.mul(before, lax.full_like(before, _SHORTER)))


def is_seen(step: Array, y: Array) -> Bool[Array, "..."]:
    """Whether a step is more than rounding, by its length and that of the unknowns."""
    eps = float(jnp.finfo(y.dtype).eps)
    return lax.gt(step, lax.mul(y, lax.full_like(y, _ROUNDINGS * eps)))


def is_simple(state: Any, y: PyTree[Array]) -> Bool[Array, ""]:
    """What the last two steps tell of a root `y`; `state` is that of `optx.Newton`."""
    hardly = is_hardly_shorter(state.diffsize, state.diffsize_prev)
    return ~(hardly & is_seen(max_abs(state.diff), max_abs(y)))


def bends(
    residual: Callable[[PyTree[Array]], PyTree[Array]],
    solved: Callable[[PyTree[Array]], PyTree[Array]],
    y: PyTree[Array],
    value: PyTree[Array],
    *,
    symmetric: bool,
    in_loop: bool,
) -> Bool[Array, ""]:
    r"""Whether the Jacobian `A` is another one where Newton's step from `y` leads.

    Along the step $s$ from near a root of multiplicity $m$ it loses the part
    $1 - ((m - 1) / m)^{m - 1}$ of itself, a half or more, at any distance; next to
    nothing from near a simple one. It is measured in units of the state, by
    $A^{-1} A(y + s) s$ beside $s$, which no scaling of the equations changes (P.
    Deuflhard, *Newton Methods for Nonlinear Problems*, 2004, theorem 2.3). But what is
    that along a flat direction, of which $A^{-1}$ makes much, is nothing: there the
    curvature $\langle s, A s\rangle$ tells.

    **Arguments:**

    - `residual`: a function of the state, with the residual `value` at `y`.
    - `solved`: `b` to `A⁻¹ b`.
    - `symmetric`: whether `A` is, and may have flat directions.
    - `in_loop`: whether it is compiled once for both solves, where it is long.
    """

    def newton(b: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        step = solved(b)
        there = jtu.tree_map(lax.sub, y, step)
        return jax.jvp(residual, (there,), (step,))[1], step

    if in_loop:
        _, steps = lax.scan(lambda b, _: newton(b), value, length=2)
        step, again = (jtu.tree_map(lambda s, i=i: s[i], steps) for i in (0, 1))
        return _is_turned(minus(again, step), step)
    image, step = newton(value)
    turned = minus(solved(image), step)
    bent = _is_turned(turned, step)
    if not symmetric:
        return bent
    flat = _is_flat(turned, minus(image, value), step, y, value)
    return lax.select(flat, _is_lost(step, value, image), bent)


def _is_turned(turned: PyTree[Array], step: PyTree[Array]) -> Bool[Array, ""]:
    # As a quotient, which XLA computes once; of a step of zero it is NaN, and no bend.
    return inner(turned, turned) / inner(step, step) > _BENT**2


def _is_flat(
    x: PyTree[Array],
    image: PyTree[Array],
    step: PyTree[Array],
    y: PyTree[Array],
    value: PyTree[Array],
) -> Bool[Array, ""]:
    """Whether `x` is no steeper than a flat direction is, near a solution."""
    size = inner(y, y)
    curvature = jnp.abs(inner(x, image)) / inner(x, x)
    flat = curvature * jnp.sqrt(size) <= UNSURE * jnp.sqrt(inner(value, value))
    return flat & (inner(step, step) <= _NEAR**2 * size)


def _is_lost(
    x: PyTree[Array], before: PyTree[Array], after: PyTree[Array]
) -> Bool[Array, ""]:
    """Whether curvature is lost along `x`, of which these are the images."""
    return inner(x, after) / inner(x, before) < 1 - _BENT


def bends_along(
    residual: Callable[[PyTree[Array]], PyTree[Array]],
    y: PyTree[Array],
    value: PyTree[Array],
    vector: PyTree[Array],
    x: PyTree[Array],
) -> Bool[Array, ""]:
    r"""Whether a symmetric Jacobian `A`, of `A x = vector`, loses itself along `x`.

    Near a multiple root, `x` is along the weak direction if the system asks for it at
    all. Newton's step has the part $\alpha x$ there, $\alpha = \langle x, F\rangle /
    \langle x, A x\rangle$, and $\langle x, A x\rangle$ is compared with what it is
    where that leads: no system more is solved. To come to be more than it was it may,
    as along the tangent of a flat direction, which is no straight line: atoms that
    start to turn move apart.
    """
    alpha = inner(x, value) / inner(x, vector)
    there = jtu.tree_map(lambda y, x: y - alpha * x, y, x)
    return _is_lost(x, vector, jax.jvp(residual, (there,), (x,))[1])
