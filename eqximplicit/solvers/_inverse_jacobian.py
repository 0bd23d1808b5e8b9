"""The inverse of a Jacobian as Broyden's methods learn it, with limited memory."""

from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._solution import Y
from . import _history as hist, _vector_space as vs

# An update that would multiply the determinant by less than `SOUND`, as its vectors are
# orthogonal up to this cosine, is damped to do no worse.
SOUND, RIGHT_ANGLE = 0.1, 1e-3


class Inverse(eqx.Module, Generic[Y]):
    r"""The inverse Jacobian $H = h I + \sum_i u_i v_i^T$.

    `u`, `v` are stacks with a leading axis of length `window` on every leaf, of which
    the first `count` are used.
    """

    scale: Float[Array, ""]
    u: Y
    v: Y
    count: Int[Array, ""]

    def mv(self, x: Y) -> Y:
        """Returns `H x`."""
        return self._apply(self.u, self.v, x)

    def transposed(self, x: Y) -> Y:
        """Returns `H^T x`."""
        return self._apply(self.v, self.u, x)

    def _apply(self, left: Y, right: Y, x: Y) -> Y:
        weights = hist.dots(right, x, self.scale.dtype)
        used = jnp.arange(weights.size, dtype=self.count.dtype) < self.count
        update = hist.combine(jnp.where(used, weights, 0), left)
        return vs.add_scaled(update, self.scale, x)


class Pair(eqx.Module, Generic[Y]):
    """A step, the change of the residual along it, and what `H` made the step of.

    `probed` is whether that was a probe of the scale, `finite` whether the residual is;
    `learnt` whether the pair enters the inverse.
    """

    step: Y
    change: Y
    image: Y
    probed: Bool[Array, ""]
    finite: Bool[Array, ""]
    learnt: Bool[Array, ""]


def updated(inverse: Inverse[Y], pair: Pair[Y], good: bool, window: int) -> Inverse[Y]:
    """The inverse with one pair more, by the good or the bad update."""
    inverse = _rescaled(inverse, pair, window)
    dtype, s, z = inverse.scale.dtype, pair.step, pair.change
    v = inverse.transposed(s) if good else z
    pivot = vs.dot(v, z, dtype)
    whole = vs.dot(s, s, dtype) if good else pivot
    left, right = (z, v) if good else (pair.image, z)
    part = _part(left, right, whole)
    pivot = part * pivot + (1 - part) * whole
    smallest = vs.resolution(s) * vs.length(v, dtype) * vs.length(z, dtype)
    regular = jax.lax.stop_gradient(jnp.abs(pivot) > smallest)
    u = vs.scaled(part / jnp.where(regular, pivot, 1), vs.minus(s, inverse.mv(z)))
    update = pair.learnt & regular
    slot = jnp.minimum(inverse.count, window - 1)
    return Inverse(
        inverse.scale,
        hist.put(inverse.u, slot, vs.select(update, u, hist.take(inverse.u, slot))),
        hist.put(inverse.v, slot, vs.select(update, v, hist.take(inverse.v, slot))),
        inverse.count + update.astype(inverse.count.dtype),
    )


def _rescaled(inverse: Inverse[Y], pair: Pair[Y], window: int) -> Inverse[Y]:
    """A new memory after a probe, which tells the scale, or where it is full."""
    dtype = inverse.scale.dtype
    squares = vs.dot(pair.change, pair.change, dtype)
    probe = pair.probed & pair.finite & (squares > 0)
    squares = jnp.where(squares > 0, squares, 1)
    scale = vs.dot(pair.step, pair.change, dtype) / squares
    # Not zero where they are orthogonal.
    least = SOUND * vs.length(pair.step, dtype) / jnp.sqrt(squares)
    least = jnp.where(scale < 0, -least, least)
    scale = jnp.where(jnp.abs(scale) < jnp.abs(least), least, scale)
    usable = jax.lax.stop_gradient(jnp.isfinite(scale) & (scale != 0))
    full = pair.learnt & (inverse.count >= window)
    return Inverse(
        jnp.where(probe & usable, jax.lax.stop_gradient(scale), inverse.scale),
        inverse.u,
        inverse.v,
        jnp.where(pair.probed | full, 0, inverse.count),
    )


def _part(left: Any, right: Any, whole: Float[Array, ""]) -> Float[Array, ""]:
    """The part of an update that is made: all, unless that turns `H` singular.

    All of it multiplies a determinant by the inner product over `whole`.
    """
    dtype = whole.dtype
    product = vs.dot(left, right, dtype)
    lengths = vs.length(left, dtype) * vs.length(right, dtype)
    ratio = product / jnp.where(whole > 0, whole, 1)
    least = jnp.where(ratio < 0, -SOUND, SOUND).astype(dtype)
    singular = (jnp.abs(product) < RIGHT_ANGLE * lengths) & (jnp.abs(ratio) < SOUND)
    return jax.lax.stop_gradient(jnp.where(singular, (1 - least) / (1 - ratio), 1))
