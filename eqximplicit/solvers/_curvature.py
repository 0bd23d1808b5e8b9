"""The smallest curvature at a stationary point: is it a minimum or a saddle?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._lanes import any_lane, in_every_lane
from ..linear_solvers._columns import columns_of
from ..linear_solvers._dense import zero_below
from . import _vector_space as vs

DENSE_SIZE = 64  # below it, n Hessian products and a dense eigenvalue problem are cheap
LANCZOS_STEPS = 50
# Where a tag says that there is no negative curvature: enough for one that is plain.
STEPS_IF_TAGGED = 12
# What conjugate gradients leave of a random start, times the root of its size. So small
# a part of such a start along one direction has a chance of about as much.
LEFT = 1e-6
# Where the minima are a curve of radius R, the curvature along it is -|gradient| / R
# beside them. A radius of one, the unit of the state, with a margin.
BENDING = 10.0

Hvp = Callable[[Any], Any]


def extreme_curvatures(
    hvp: Hvp, y: Any, num_steps: int = LANCZOS_STEPS
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the smallest eigenvalue of the Hessian and its spectral norm.

    Dense up to `DENSE_SIZE` unknowns, else the extreme Ritz values of up to `num_steps`
    matrix-free Lanczos steps from a fixed random start. A Ritz value is never below
    the smallest eigenvalue, so a negative one proves a saddle; one that is not negative
    is strong evidence, no proof.

    **Arguments:**

    - `hvp`: the (real symmetric) Hessian as a linear map on states like `y`.
    - `y`: a state; only shapes and dtypes are used.
    - `num_steps`: of Lanczos, each of them one product.

    **Returns:**

    Two floats of shape `()`, in the widest real dtype of `y`.
    """
    if vs.size(y) <= DENSE_SIZE:
        ritz = jnp.linalg.eigvalsh(hessian_matrix(hvp, y))
    else:
        ritz = jnp.linalg.eigvalsh(lanczos(hvp, random_like(y), num_steps))
    return jnp.min(ritz), jnp.max(jnp.abs(ritz))


def is_negative(
    lowest: Float[Array, ""], largest: Float[Array, ""], y: Any, gradient: Any
) -> Bool[Array, ""]:
    r"""Returns whether a smallest curvature is negative, and not just by rounding.

    In a flat direction it is zero up to rounding, and up to the bend of that direction
    times the distance from the minimum, which the gradient tells. Beside a stiff
    direction a gradient tells little: no part above $\epsilon^{1/3}$ of the largest
    curvature counts as zero.

    **Arguments:**

    - `lowest`, `largest`: what `extreme_curvatures` returns.
    - `y`, `gradient`: where, and the slope there.
    """
    dtype, eps = lowest.dtype, vs.resolution(y)
    order = min(vs.size(y), DENSE_SIZE)
    bend = BENDING * vs.length(gradient, dtype) / jnp.sqrt(1 + vs.dot(y, y, dtype))
    zero = jnp.maximum(zero_below(order, eps) * largest, bend)
    return lowest < -jnp.minimum(zero, eps ** (1 / 3) * largest)


def hessian_matrix(hvp: Hvp, y: Any) -> Float[Array, "n n"]:
    """Returns the matrix of `hvp` on the raveled state, made exactly symmetric."""
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = jfu.ravel_pytree(y)
        column = lambda basis: jfu.ravel_pytree(hvp(unravel(basis)))[0]
        hessian = columns_of(column, flat)
    return (hessian + hessian.T) / 2


class _Lanczos(eqx.Module):
    r"""The recurrence so far.

    `left` is the norm that conjugate gradients would have left of the start by now, in
    that of the start: the product of $\beta_j / d_j$ with the pivots $d_j$ of the
    matrix. It is infinite once a pivot is not positive.
    """

    previous: Any
    q: Any
    beta: Float[Array, ""]
    pivot: Float[Array, ""]
    left: Float[Array, ""]
    alphas: Float[Array, " k"]
    betas: Float[Array, " k"]
    num_steps: Int[Array, ""]


def lanczos(hvp: Hvp, start: Any, num_steps: int) -> Float[Array, "k k"]:
    r"""Returns the tridiagonal matrix of the three-term recurrence.

    Its eigenvalues are Ritz values, and its first axis is `start`. There is no
    reorthogonalisation: lost orthogonality only repeats Ritz values that have
    already converged (C. C. Paige, 1980), which does no harm to their extremes.

    It ends where conjugate gradients would have converged. As long as all Ritz values
    $\theta_i$ are positive, what they leave of a start with a part along an eigenvalue
    $\lambda < 0$ is more than that part, $\prod_i (1 - \lambda / \theta_i)$ times.
    So where next to nothing is left, a random start shows that there is none. What has
    not been computed repeats the first number, which is no eigenvalue beyond the
    others.
    """
    dtype = vs.real_dtype(start)
    zero, infinite = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    little = LEFT / vs.size(start) ** 0.5

    def unfinished(c: _Lanczos) -> Bool[Array, ""]:
        return (c.num_steps < num_steps) & any_lane(~(c.left <= little))

    def body(c: _Lanczos) -> _Lanczos:
        w = vs.add_scaled(hvp(c.q), -c.beta, c.previous)
        alpha = vs.dot(w, c.q, dtype)
        w = vs.add_scaled(w, -alpha, c.q)
        beta = vs.length(w, dtype)
        # An invariant subspace ends the recurrence: a zero vector adds Ritz values 0.
        exhausted = beta <= jnp.finfo(dtype).eps * jnp.abs(alpha)
        beta = jnp.where(exhausted, 0, beta)
        inverse = jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, beta))
        pivot = alpha - jnp.where(c.beta > 0, c.beta**2 / c.pivot, 0)
        left = jnp.where(pivot > 0, c.left * beta / pivot, infinite)
        over = c.left <= little  # but for other lanes
        return _Lanczos(
            previous=c.q,
            q=vs.scaled(inverse, w),
            beta=beta,
            pivot=pivot,
            left=jnp.where(over, c.left, left),
            alphas=c.alphas.at[c.num_steps].set(jnp.where(over, c.alphas[0], alpha)),
            betas=c.betas.at[c.num_steps].set(jnp.where(over, 0, c.beta)),
            num_steps=c.num_steps + 1,
        )

    size = vs.length(start, dtype)
    unit = vs.scaled(jnp.where(size > 0, 1 / size, 0), start)
    none, one = jnp.zeros(num_steps, dtype), jnp.ones((), dtype)
    blank, count = vs.zeros_like(start), jnp.zeros((), jnp.int32)
    first = _Lanczos(blank, unit, zero, one, one, none, none, count)
    last = jax.lax.while_loop(unfinished, body, in_every_lane(first))
    known = jnp.asarray(np.arange(num_steps, dtype=np.int32)) < last.num_steps
    alphas = jnp.where(known, last.alphas, last.alphas[0])
    off = jnp.diag(last.betas[1:], 1)
    return jnp.diag(alphas) + off + off.T


def random_like(y: Any) -> Any:
    """Returns normal numbers in the place of the entries of `y`, always the same."""
    leaves, structure = jtu.tree_flatten(y)
    keys = jr.split(jr.key(0), len(leaves))
    noise = [
        jr.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jtu.tree_unflatten(structure, noise)
