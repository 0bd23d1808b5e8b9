r"""What the Jacobian of a layer's cell is like at the equilibrium.

A DEQ is easy to solve, and its derivative well-conditioned, as long as the Jacobian of
its cell is small. One number to penalise and one number to watch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from .._custom_types import PyTree
from .._state import as_state, check_same_structure, describe, struct_of

Y = TypeVar("Y")

# Below this share of the image a second direction is rounding, not information.
_NEGLIGIBLE = 1e-3


def _real_state(y: Any) -> Any:
    state = as_state(y)
    for leaf in jtu.tree_leaves(state):
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"The Jacobian's norms are defined for a real state; got "
                f"{describe(leaf)}. Split it into real and imaginary part."
            )
    return state


def _map_at(fn: Callable[[Y, Any], Y], y: Y, args: Any) -> Callable[[Y], Y]:
    def at(y: Y) -> Y:
        out = fn(y, args)
        check_same_structure("The map", struct_of(out), struct_of(y))
        return out

    return at


def _dot(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, ""]:
    """The inner product, in float32 at least."""

    def leaf_dot(x: Array, y: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.sum(x.astype(wide) * y.astype(wide))

    with jax.numpy_dtype_promotion("standard"):
        return jtu.tree_reduce(jnp.add, jtu.tree_map(leaf_dot, a, b))


def _scaled(factor: Float[Array, ""], v: Y) -> Y:
    return jtu.tree_map(lambda x: factor.astype(x.dtype) * x, v)


def _random_like(y: Y, key: PRNGKeyArray, sample: Callable[..., Array]) -> Y:
    leaves, treedef = jtu.tree_flatten(y)
    keys = jax.random.split(key, len(leaves))
    drawn = [sample(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jtu.tree_unflatten(treedef, drawn)


def jacobian_frobenius_squared(
    fn: Callable[[Y, Any], Y],
    y: Y,
    args: Any = None,
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
) -> Float[Array, ""]:
    r"""Returns an unbiased estimate of $\|\partial f/\partial y\|_F^2$, dimensionless.

    Hutchinson's estimator: for $\epsilon$ of independent random signs,

    $$\mathbb{E}\,\|\epsilon^T J\|^2
    = \operatorname{tr}(J^T\,\mathbb{E}[\epsilon\epsilon^T]\,J) = \|J\|_F^2$$

    One vector-Jacobian product per sample; the Jacobian is never formed. Differentiable
    in whatever `fn` depends on, so it is a penalty: Bai et al. add a small multiple of
    this number, divided by the size of `y`, to the loss of a DEQ. They hold the
    equilibrium fixed in it, as in the example.

    **Arguments:**

    - `fn`: `fn(y, args)`, shaped and typed as `y`: a DEQ's `cell`, say. Fix the random
        key of a cell that wants one, as in `eqx.Partial(layer.cell, key=key)`.
    - `y`: where, any pytree of real arrays.
    - `args`: the second argument of `fn`, any pytree.
    - `key`: the random key of the signs.
    - `num_samples`: how many independent estimates are averaged, at least 1.

    **Returns:** a float array of shape `()`, at least 0.

    **Raises:** `ValueError` for a complex state, for an output that does not fit `y`,
    or for `num_samples` below 1.

    !!! example

        ```python
        z = layer(x)
        fixed = jax.lax.stop_gradient(z)
        penalty = eqi.nn.jacobian_frobenius_squared(layer.cell, fixed, x, key=key)
        loss = task_loss(z) + 0.1 * penalty / z.size
        ```

    ??? cite "References"

        M. F. Hutchinson, *A stochastic estimator of the trace of the influence matrix
        for Laplacian smoothing splines*, Commun. Stat. Simul. Comput. 19 (1990).
        S. Bai, V. Koltun and J. Z. Kolter, *Stabilizing equilibrium models by Jacobian
        regularization*, ICML 2021, section 4.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
    y = _real_state(y)
    _, vjp = jax.vjp(_map_at(fn, y, args), y)

    def sample(key: PRNGKeyArray) -> Float[Array, ""]:
        signs = _random_like(y, key, jax.random.rademacher)
        (row,) = vjp(signs)  # εᵀ J
        return _dot(row, row)

    return jnp.mean(jax.vmap(sample)(jax.random.split(key, num_samples)))


def _normalised(v: Y) -> tuple[Y, Float[Array, ""]]:
    """The vector of length one and the length; zero stays zero."""
    length = jnp.sqrt(_dot(v, v))
    return _scaled(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), v), (
        length
    )


def _largest_of_two(h11: Array, h12: Array, h21: Array, h22: Array) -> Float[Array, ""]:
    """The largest modulus of the eigenvalues of a real 2 x 2 matrix."""
    half_trace, det = (h11 + h22) / 2, h11 * h22 - h12 * h21
    discriminant = half_trace**2 - det
    real_pair = jnp.abs(half_trace) + jnp.sqrt(jnp.maximum(discriminant, 0))
    complex_pair = jnp.sqrt(jnp.maximum(det, 0))  # |λ|² = λ λ̄ = det
    return jnp.where(discriminant >= 0, real_pair, complex_pair)


def spectral_radius(
    fn: Callable[[Y, Any], Y],
    y: Y,
    args: Any = None,
    *,
    key: PRNGKeyArray,
    num_steps: int = 64,
) -> Float[Array, ""]:
    r"""Returns $\max|\lambda(\partial f/\partial y)|$, the spectral radius at `y`.

    At a fixed point of `fn` this is the factor by which each plain iteration shrinks
    the error: below 1 the iteration converges, and the closer to 1 the slower. Above 1
    the fixed point repels it, which neither Newton's method nor the implicit function
    theorem minds.

    The power method from a random start. A real Jacobian may have its largest
    eigenvalues in a complex pair, along which single vectors turn for ever; so the last
    step is a Rayleigh-Ritz projection on the plane of the last two vectors.

    **Arguments:**

    - `fn`: `fn(y, args)`, shaped and typed as `y`: a DEQ's `cell`, say.
    - `y`: where, any pytree of real arrays.
    - `args`: the second argument of `fn`, any pytree.
    - `key`: the random key of the start.
    - `num_steps`: the Jacobian-vector products; the error falls as the ratio of the
        next largest eigenvalue to the largest, to this power.

    **Returns:** a float array of shape `()`, dimensionless, at least 0.

    **Raises:** `ValueError` for a complex state, for an output that does not fit `y`,
    or for `num_steps` below 2.

    ??? cite "References"

        J. H. Wilkinson, *The Algebraic Eigenvalue Problem*, Oxford 1965, chapter 9:
        the power method and complex conjugate pairs.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2; got {num_steps}.")
    y = _real_state(y)
    _, mv = jax.linearize(_map_at(fn, y, args), y)

    def step(_: Array, v: Y) -> Y:
        return _normalised(mv(v))[0]

    start, _ = _normalised(_random_like(y, key, jax.random.normal))
    v = jax.lax.fori_loop(0, num_steps - 2, step, start)
    return _ritz_radius(mv, v)


def _ritz_radius(mv: Callable[[Y], Y], v: Y) -> Float[Array, ""]:
    """The largest Ritz value of `mv` on the plane of a unit vector and its image."""
    jv = mv(v)
    h11 = _dot(v, jv)
    rest = jtu.tree_map(lambda a, b: a - b, jv, _scaled(h11, v))
    w, h21 = _normalised(rest)
    jw = mv(w)
    plane = _largest_of_two(h11, _dot(v, jw), h21, _dot(w, jw))
    return jnp.where(h21 > _NEGLIGIBLE * jnp.sqrt(_dot(jv, jv)), plane, jnp.abs(h11))
