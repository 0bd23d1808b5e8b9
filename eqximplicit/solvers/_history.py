r"""The secant pairs of a quasi-Newton method, leaf by leaf, and fits to them.

A pair is how far the state went, $\Delta y_i$, and by how much its residual changed,
$\Delta r_i$. The pairs lie along a leading axis of every leaf, so a leaf keeps its
dtype and its sharding; the Gram matrix $\Delta R^T \Delta R$ is summed over the leaves.
Complex leaves are vectors over the reals: $\operatorname{Re} a^* b$.
"""

import functools as ft
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from . import _vector_space as vs

Y = TypeVar("Y")
_EXACT = jax.lax.Precision.HIGHEST


def stack_of(y: Y, window: int) -> Y:
    """Returns zeros with a leading axis of length `window` on every leaf of `y`."""
    return jtu.tree_map(lambda yi: jnp.zeros((window, *yi.shape), yi.dtype), y)


def put(stack: Y, slot: Int[Array, ""], y: Y, when: Bool[Array, ""]) -> Y:
    """Returns the stack with `y` in place of entry `slot`, where `when`."""

    def leaf(s: Array, yi: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(s, slot, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(s, jnp.where(when, yi, old), slot, 0)

    return jtu.tree_map(leaf, stack, y)


def take(stack: Y, slot: Int[Array, ""]) -> Y:
    """Returns entry `slot` of the stack."""
    return jtu.tree_map(
        lambda s: jax.lax.dynamic_index_in_dim(s, slot, keepdims=False), stack
    )


def dots(stack: Y, y: Y, dtype: jnp.dtype) -> Float[Array, " window"]:
    """Returns the real inner products of all entries of the stack with `y`."""

    def leaf(s: Array, yi: Array) -> Array:
        axes = (list(range(1, s.ndim)), list(range(yi.ndim)))
        product = jnp.tensordot(jnp.conj(s), yi, axes, precision=_EXACT)
        return jnp.real(product).astype(dtype)

    return ft.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(leaf, stack, y)))


def combine(coefficients: Float[Array, " window"], stack: Y) -> Y:
    """Returns the sum of the stack's entries, weighted by the coefficients."""

    def leaf(s: Array) -> Array:
        return jnp.tensordot(coefficients.astype(s.dtype), s, 1, precision=_EXACT)

    return jtu.tree_map(leaf, stack)


class History(eqx.Module, Generic[Y]):
    """A ring buffer of secant pairs.

    **Attributes:**

    - `dy`, `dr`: the pairs; leaves of shape `(window, *leaf.shape)`.
    - `gram`: real inner products of the entries of `dr`, shape `(window, window)`.
    - `distance`: length of the path from each pair to the present point, shape
        `(window,)`. A secant is a derivative at some distance.
    - `count`: number of pairs pushed since the last restart.
    """

    dy: Y
    dr: Y
    gram: Float[Array, "window window"]
    distance: Float[Array, " window"]
    count: Int[Array, ""]

    @property
    def window(self) -> int:
        return self.distance.size

    @property
    def used(self) -> Bool[Array, " window"]:
        """Which slots hold a pair."""
        return jnp.arange(self.window, dtype=self.count.dtype) < self.count

    @property
    def filled(self) -> Bool[Array, " window"]:
        """Which slots hold a pair that changes the residual at all."""
        return self.used & (jax.lax.stop_gradient(jnp.diagonal(self.gram)) > 0)

    @property
    def newest(self) -> Int[Array, ""]:
        """The slot of the last pair."""
        return jnp.mod(self.count - 1, self.window)

    @property
    def lengths(self) -> Float[Array, " window"]:
        """The lengths of the entries of `dr`; 1 where there is none."""
        square = jax.lax.stop_gradient(jnp.diagonal(self.gram))
        return jnp.sqrt(jnp.where(self.filled, square, 1))


def empty(y: Y, window: int) -> History[Y]:
    """Returns a history without pairs. A pair per degree of freedom is enough."""
    parts = 2 if vs.has_complex(y) else 1
    window, dtype = min(window, max(1, parts * vs.size(y))), vs.real_dtype(y)
    return History(
        dy=stack_of(y, window),
        dr=stack_of(y, window),
        gram=jnp.zeros((window, window), dtype),
        distance=jnp.zeros(window, dtype),
        count=jnp.zeros((), jnp.int32),
    )


def restart(history: History[Y], when: Bool[Array, ""]) -> History[Y]:
    """Returns the history, forgotten where `when`."""
    return eqx.tree_at(lambda h: h.count, history, jnp.where(when, 0, history.count))


def moved(history: History[Y], by: Float[Array, ""]) -> History[Y]:
    """Returns the history as seen from a point that is `by` further away."""
    return eqx.tree_at(lambda h: h.distance, history, history.distance + by)


def push(history: History[Y], dy: Y, dr: Y, when: Bool[Array, ""]) -> History[Y]:
    """Returns the history with one pair more; the oldest gives way."""
    slot, dtype = jnp.mod(history.count, history.window), history.gram.dtype
    stack = put(history.dr, slot, dr, when)
    row = jnp.where(when, dots(stack, dr, dtype), history.gram[slot])
    far = jnp.where(
        when, jax.lax.stop_gradient(vs.length(dy, dtype)), history.distance[slot]
    )
    return History(
        dy=put(history.dy, slot, dy, when),
        dr=stack,
        gram=history.gram.at[slot, :].set(row).at[:, slot].set(row),
        distance=history.distance.at[slot].set(far),
        count=history.count + when.astype(history.count.dtype),
    )


class Normal(eqx.Module):
    """The normal equations of a fit, with columns of unit length.

    `gram` has ones on its diagonal; a slot without a pair is an empty row and column.
    """

    gram: Float[Array, "window window"]
    lengths: Float[Array, " window"]
    filled: Bool[Array, " window"]
    floor: float = eqx.field(static=True)

    def factor(self, penalty: Float[Array, " window"]) -> Float[Array, "window window"]:
        """Returns the Cholesky factor of `gram + diag(penalty) + floor I`."""
        ridge = jnp.where(self.filled, penalty + self.floor, 1.0)
        return jnp.linalg.cholesky(self.gram + jnp.diag(ridge))


def normal_equations(history: History[Any], eps: float) -> Normal:
    """Returns the normal equations; `eps` is the resolution of the coarsest leaf."""
    keep, lengths = history.filled, history.lengths
    outer = lengths[:, None] * lengths[None, :]
    both = keep[:, None] & keep[None, :]
    gram = jnp.where(both, history.gram, 0) / outer
    return Normal(gram, lengths, keep, 10.0 * history.window * eps)


def fit(
    history: History[Y], normal: Normal, r: Y, penalty: Float[Array, " window"]
) -> tuple[Float[Array, " window"], Y]:
    r"""Returns the coefficients of a residual in the history, and what they leave.

    Minimises $\|r - \Delta R\, \gamma\|^2 + \sum_i p_i (\|\Delta r_i\| \gamma_i)^2$ by
    the corrected seminormal equations (Björck, Linear Algebra Appl. 88/89, 1987): the
    Cholesky factor carries a ridge at the level of rounding, and a second solve with
    the remainder computed from the pairs themselves takes that ridge out again. A
    history whose pairs depend on each other is therefore harmless, also to derivatives.

    **Arguments:**

    - `history`, `normal`: the pairs, and `normal_equations(history, eps)`.
    - `r`: the residual, as one entry of `history.dr`.
    - `penalty`: how little each pair is believed, shape `(window,)`; 0 is fully.

    **Returns:** the coefficients, shape `(window,)`, and `r - combine(..., dr)`.
    """
    dtype = history.gram.dtype

    def remainder(x: Float[Array, " window"]) -> Y:
        return vs.minus(r, combine(x / normal.lengths, history.dr))

    def slope(rest: Y) -> Float[Array, " window"]:
        b = dots(history.dr, rest, dtype) / normal.lengths
        return jnp.where(normal.filled, b, 0)

    factor = (normal.factor(penalty), True)
    x = jax.scipy.linalg.cho_solve(factor, slope(r))
    rest = slope(remainder(x)) - penalty * x
    x = x + jax.scipy.linalg.cho_solve(factor, rest)
    return x / normal.lengths, remainder(x)
