r"""How far the minimum is from a point where some gradient is left, and how much lower.

The Newton step $p = -H^{-1} \nabla f$ tells both: its length is the distance, and half
of $-\nabla f \cdot p$ is what the objective can still fall. A gradient that is small
beside the stiffest curvature may be large beside the softest one: the Newton step takes
every direction by its own curvature.
"""

from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float

from ..linear_solvers._dense import zero_below
from . import _vector_space as vs
from ._curvature import DENSE_SIZE, hessian_matrix, Hvp, lanczos, random_like


class Outlook(eqx.Module):
    """What the second-order model at a point promises.

    **Attributes:**

    - `lowest`, `largest`: the smallest eigenvalue of the Hessian, and its norm.
    - `distance`: the length of the Newton step.
    - `gain`: the reduction of the objective that this step promises.
    - `sensitivity`: a relative change `h` of the entries of a minimum raises the
        objective by `h²` times this.
    """

    lowest: Float[Array, ""]
    largest: Float[Array, ""]
    distance: Float[Array, ""]
    gain: Float[Array, ""]
    sensitivity: Float[Array, ""]


def outlook(hvp: Hvp, y: Any, gradient: Any, num_steps: int) -> Outlook:
    """Returns the outlook from `y`: direction by direction if small, else matrix-free.

    Curvatures below the rounding of the largest one count as that rounding.

    **Arguments:**

    - `hvp`, `num_steps`: as for `extreme_curvatures`.
    - `y`, `gradient`: where, and the slope there.
    """
    if vs.size(y) <= DENSE_SIZE:
        return _by_direction(hvp, y, gradient)
    return _matrix_free(hvp, y, gradient, num_steps)


def _by_direction(hvp: Hvp, y: Any, gradient: Any) -> Outlook:
    matrix = hessian_matrix(hvp, y)
    with jax.numpy_dtype_promotion("standard"):
        point, slope = jfu.ravel_pytree(y)[0], jfu.ravel_pytree(gradient)[0]
    # The gain does not depend on units, but what rounding leaves of a curvature does.
    diagonal = jnp.abs(jnp.diagonal(matrix))
    unit = jnp.where(diagonal > 0, lax.rsqrt(diagonal), 1)
    scaled = unit[:, None] * matrix * unit[None]
    sensitivity = jnp.sum(diagonal * point**2) / 2
    model = _Model(matrix, scaled, unit * slope, unit, vs.resolution(y))
    return _of_model(model, sensitivity)


def _matrix_free(hvp: Hvp, y: Any, gradient: Any, num_steps: int) -> Outlook:
    noise, dtype = random_like(y), vs.real_dtype(y)
    starts = jtu.tree_map(lambda a, b: jnp.stack([a, b]), noise, gradient)
    # The tridiagonal matrix that starts from the gradient has it along its first axis.
    any_start, from_gradient = jax.vmap(lambda v: lanczos(hvp, v, num_steps))(starts)
    first = jnp.zeros(num_steps, dtype).at[0].set(vs.length(gradient, dtype))
    change = jtu.tree_map(lax.mul, y, noise)
    sensitivity = jnp.abs(vs.dot(change, hvp(change), dtype)) / 2
    unit = jnp.ones_like(first)
    model = _Model(any_start, from_gradient, first, unit, vs.resolution(y))
    return _of_model(model, sensitivity)


class _Model(eqx.Module):
    """A matrix for its extreme eigenvalues, and a quadratic model in some units."""

    whole: Float[Array, "k k"]
    matrix: Float[Array, "k k"]
    slope: Float[Array, " k"]
    unit: Float[Array, " k"]
    eps: float


def _of_model(model: _Model, sensitivity: Float[Array, ""]) -> Outlook:
    both = jnp.stack([model.whole, model.matrix])
    vectors, values = lax.linalg.eigh(both, symmetrize_input=False)
    spectrum, curvatures, directions = values[0], jnp.abs(values[1]), vectors[1]
    floor = zero_below(model.slope.size, model.eps) * jnp.max(curvatures)
    slopes = jnp.sum(directions * model.slope[:, None], axis=0)
    steps = jnp.where(slopes == 0, 0, slopes / (curvatures + floor))
    step = model.unit * jnp.sum(directions * steps[None], axis=1)
    return Outlook(
        lowest=jnp.min(spectrum),
        largest=jnp.max(jnp.abs(spectrum)),
        distance=jnp.sqrt(jnp.sum(step**2)),
        gain=jnp.sum(slopes * steps) / 2,
        sensitivity=sensitivity,
    )
