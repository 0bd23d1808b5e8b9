"""The smallest curvature at a stationary point: is it a minimum or a saddle?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from ..linear_solvers._columns import columns_of
from ..linear_solvers._dense import zero_below
from . import _vector_space as vs

DENSE_SIZE = 64  # below it, n Hessian products and a dense eigenvalue problem are cheap
LANCZOS_STEPS = 50
# Where a tag says that there is no negative curvature: enough for one that is plain.
STEPS_IF_TAGGED = 12
# Where the minima are a curve of radius R, the curvature along it is -|gradient| / R
# beside them. A radius of one, the unit of the state, with a margin.
BENDING = 10.0

Hvp = Callable[[Any], Any]


def extreme_curvatures(
    hvp: Hvp, y: Any, num_steps: int = LANCZOS_STEPS
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the smallest eigenvalue of the Hessian and its spectral norm.

    Dense up to `DENSE_SIZE` unknowns, else the extreme Ritz values of `num_steps`
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


def lanczos(hvp: Hvp, start: Any, num_steps: int) -> Float[Array, "k k"]:
    """Returns the tridiagonal matrix of the three-term recurrence.

    Its eigenvalues are Ritz values, and its first axis is `start`. There is no
    reorthogonalisation: lost orthogonality only repeats Ritz values that have
    already converged (C. C. Paige, 1980), which does no harm to their extremes.
    """
    dtype = vs.real_dtype(start)
    zero = jnp.zeros((), dtype)

    def body(
        carry: tuple[Any, Any, Float[Array, ""]], _: None
    ) -> tuple[tuple[Any, Any, Float[Array, ""]], tuple[Array, Array]]:
        previous, q, beta = carry
        w = vs.add_scaled(hvp(q), -beta, previous)
        alpha = vs.dot(w, q, dtype)
        w = vs.add_scaled(w, -alpha, q)
        new_beta = vs.length(w, dtype)
        # An invariant subspace ends the recurrence: a zero vector adds Ritz values 0.
        exhausted = new_beta <= jnp.finfo(dtype).eps * jnp.abs(alpha)
        new_beta = jnp.where(exhausted, 0, new_beta)
        inverse = jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, new_beta))
        return (q, vs.scaled(inverse, w), new_beta), (alpha, new_beta)

    size = vs.length(start, dtype)
    unit = vs.scaled(jnp.where(size > 0, 1 / size, 0), start)
    carry = (vs.zeros_like(start), unit, zero)
    _, (alphas, betas) = jax.lax.scan(body, carry, None, length=num_steps)
    off = jnp.diag(betas[:-1], 1)
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
