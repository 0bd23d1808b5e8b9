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
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._reduce import total
from . import _vector_space as vs

Y = TypeVar("Y")
_EXACT = jax.lax.Precision.HIGHEST


def stack_of(y: Y, window: int) -> Y:
    """Returns zeros with a leading axis of length `window` on every leaf of `y`."""
    return jtu.tree_map(lambda yi: jnp.zeros((window, *yi.shape), yi.dtype), y)


def put(stack: Y, slot: Int[Array, ""], y: Y) -> Y:
    """Returns the stack with `y` in place of entry `slot`."""
    return jtu.tree_map(
        lambda s, yi: jax.lax.dynamic_update_index_in_dim(s, yi, slot, 0), stack, y
    )


def take(stack: Y, slot: Int[Array, ""]) -> Y:
    """Returns entry `slot` of the stack."""
    return jtu.tree_map(
        lambda s: jax.lax.dynamic_index_in_dim(s, slot, keepdims=False), stack
    )


def dots(stack: Y, y: Y, dtype: jnp.dtype) -> Float[Array, " slots"]:
    """Returns the real inner products of all entries of the stack with `y`."""

    def leaf(s: Array, yi: Array) -> Array:
        axes = (list(range(1, s.ndim)), list(range(yi.ndim)))
        product = jnp.tensordot(jnp.conj(s), yi, axes, precision=_EXACT)
        return jnp.real(product).astype(dtype)

    return ft.reduce(jnp.add, jtu.tree_leaves(jtu.tree_map(leaf, stack, y)))


def combine(coefficients: Float[Array, " slots"], stack: Y) -> Y:
    """Returns the sum of the stack's entries, weighted by the coefficients."""

    def leaf(s: Array) -> Array:
        weights = coefficients.astype(s.dtype)
        if s.ndim == 1:  # of which XLA would make a reduction
            return total(weights * s)
        return jnp.tensordot(weights, s, 1, precision=_EXACT)

    return jtu.tree_map(leaf, stack)


class History(eqx.Module, Generic[Y]):
    """A ring buffer of secant pairs.

    There is one slot more than pairs: it takes the pairs that are not kept, so that a
    push is one write in place. Slots are told apart by comparison with their number,
    not by indexing, which would compile to a scatter.

    **Attributes:**

    - `dy`, `dr`: the pairs; leaves of shape `(slots, *leaf.shape)`.
    - `gram`: real inner products of the entries of `dr`, shape `(slots, slots)`.
    - `squares`: its diagonal, shape `(slots,)`.
    - `distance`: length of the path from each pair to the present point, shape
        `(slots,)`. A secant is a derivative at some distance.
    - `used`: number of slots in use, a real number, shape `()`.
    - `newest`: the slot of the last pair, a real number, shape `()`.
    """

    dy: Y
    dr: Y
    gram: Float[Array, "slots slots"]
    squares: Float[Array, " slots"]
    distance: Float[Array, " slots"]
    used: Float[Array, ""]
    newest: Float[Array, ""]

    @property
    def window(self) -> int:
        return self.distance.size - 1

    @property
    def slots(self) -> Float[Array, " slots"]:
        """The numbers of the slots."""
        return jnp.asarray(np.arange(self.window + 1), self.used.dtype)

    @property
    def filled(self) -> Bool[Array, " slots"]:
        """Which slots hold a pair that changes the residual at all."""
        return (self.slots < self.used) & (self.squares > 0)

    @property
    def lengths(self) -> Float[Array, " slots"]:
        """The lengths of the entries of `dr`; 1 where there is none."""
        return jnp.sqrt(jnp.where(self.filled, self.squares, 1))


def dimension(y: Any) -> int:
    """Degrees of freedom; one where there is none."""
    return max(1, (2 if vs.has_complex(y) else 1) * vs.size(y))


class Pair(eqx.Module, Generic[Y]):
    """A secant pair, and its lengths in `dr` and `dy`."""

    dy: Y
    dr: Y
    change: Float[Array, ""]
    distance: Float[Array, ""]


def empty(y: Y, window: int) -> History[Y]:
    """Returns a history without pairs. A pair per degree of freedom is enough."""
    slots = min(window, dimension(y)) + 1
    none = jnp.zeros(slots, vs.real_dtype(y))
    return History(
        dy=stack_of(y, slots),
        dr=stack_of(y, slots),
        gram=jnp.zeros((slots, slots), none.dtype),
        squares=none,
        distance=none,
        used=jnp.zeros((), none.dtype),
        newest=jnp.zeros((), none.dtype),
    )


def cross(history: History[Y], pair: Pair[Y]) -> Float[Array, " slots"]:
    """Returns the inner products of the entries of `dr` with that of a new pair."""
    return jax.lax.stop_gradient(dots(history.dr, pair.dr, history.gram.dtype))


class Turn(eqx.Module):
    """Where a new pair goes: all real numbers, so that they fit in a solver's own.

    `slot` is its slot; `used` and `newest` are those of the history that contains it.
    """

    slot: Array
    used: Array
    newest: Array


def turn(used: Array, newest: Array, window: int, keep: Array, forget: Array) -> Turn:
    """Returns where the next pair goes.

    **Arguments:** `used`, `newest` and `window` of the history; whether the pair is
    kept; and whether the whole history is forgotten after that.
    """
    following = jnp.where(newest + 1 < window, newest + 1, 0)
    following = jnp.where(used > 0, following, 0)
    slot = jnp.where(keep, following, window)
    used = jnp.where(keep, jnp.minimum(used + 1, window), used)
    newest = jnp.where(keep, following, newest)
    return Turn(slot, jnp.where(forget, 0, used), newest)


def push(
    history: History[Y],
    pair: Pair[Y],
    cross: Float[Array, " slots"],
    turn: Turn,
    moved: Float[Array, ""],
) -> History[Y]:
    """Returns the history with one pair more; the oldest gives way.

    **Arguments:** the history; the pair and its `cross` products with the history;
    where it goes; and how far the present point has `moved`, which adds to the
    distance of the other pairs.
    """
    here, slot = history.slots == turn.slot, turn.slot.astype(jnp.int32)
    square = pair.change**2
    row = jnp.where(here, square, cross)
    old = jnp.where(here[None, :], row[:, None], history.gram)
    return History(
        dy=put(history.dy, slot, pair.dy),
        dr=put(history.dr, slot, pair.dr),
        gram=jnp.where(here[:, None], row[None, :], old),
        squares=jnp.where(here, square, history.squares),
        distance=jnp.where(here, pair.distance, history.distance + moved),
        used=turn.used,
        newest=turn.newest,
    )


class Fit(eqx.Module, Generic[Y]):
    """A residual in terms of the history.

    **Attributes:**

    - `coefficients`: of the pairs, shape `(slots,)`.
    - `weights`: the same times the lengths of the entries of `dr`.
    - `explained`: the inner products of the explained part with the entries of `dr`,
        scaled to unit length.
    - `rest`: what the pairs leave, as one entry of `history.dr`.
    - `half`: the inverse of the Cholesky factor of the normal equations without the
        penalty.
    """

    coefficients: Float[Array, " slots"]
    weights: Float[Array, " slots"]
    explained: Float[Array, " slots"]
    rest: Y
    half: Float[Array, "slots slots"]


def half_inverse(
    grams: Float[Array, "grams slots slots"],
) -> Float[Array, "grams slots slots"]:
    r"""Returns the inverses of the Cholesky factors of positive definite matrices.

    By elimination beside the identity, in a loop of a few operations: no call of LAPACK
    can be in a kernel (`_one_kernel.py`).
    """
    size = grams.shape[-1]
    numbers = jax.lax.iota(jnp.int32, size)
    eye = jnp.broadcast_to(np.eye(size, dtype=grams.dtype), grams.shape)

    def eliminated(k: Any, both: Array) -> Array:
        row, column = (
            jax.lax.dynamic_index_in_dim(both, k, axis, keepdims=False)
            for axis in (-2, -1)
        )
        pivot = jnp.sqrt(jax.lax.dynamic_index_in_dim(row, k, -1))
        row, column = (row / pivot)[:, None, :], (column / pivot)[:, :, None]
        here, below = (f(numbers, k)[:, None] for f in (jnp.equal, jnp.greater))
        return jnp.where(here, row, both - jnp.where(below, column, 0) * row)

    both = jnp.concatenate([grams, eye], -1)
    return jax.lax.fori_loop(0, size, eliminated, both)[..., size:]


def fit(
    history: History[Y],
    r: Y,
    penalty: Float[Array, " slots"],
    filled: Bool[Array, " slots"],
) -> Fit[Y]:
    r"""Returns the coefficients of a residual in the history, and what they leave.

    Minimises $\|r - \Delta R\, \gamma\|^2 + \sum_i p_i (\|\Delta r_i\| \gamma_i)^2$ by
    the corrected seminormal equations (Björck, Linear Algebra Appl. 88/89, 1987): the
    Cholesky factor carries a ridge at the level of rounding, and a second solve with
    the remainder computed from the pairs themselves takes that ridge out again. A
    history whose pairs depend on each other is therefore harmless. The second solve is
    also a Newton step for the minimum, so it has the right derivative although the
    factor has none.

    **Arguments:**

    - `history`: the pairs.
    - `r`: the residual, as one entry of `history.dr`.
    - `penalty`: how little each pair is believed, shape `(slots,)`; 0 is fully.
    - `filled`: which of the filled slots take part.
    """
    dtype, lengths = history.gram.dtype, history.lengths
    floor = 10.0 * history.window * vs.resolution(r)
    both = filled[:, None] & filled[None, :]
    gram = jnp.where(both, history.gram / (lengths[:, None] * lengths[None, :]), 0)
    ridge = vs.in_one([penalty, jnp.zeros_like(penalty)]) + floor
    ridge = jnp.where(filled[None, :], ridge, 1)
    eye = np.eye(filled.size, dtype=bool)[None]
    grams = jax.lax.stop_gradient(gram[None] + jnp.where(eye, ridge[:, :, None], 0))
    half, free = vs.apart(jax.lax.stop_gradient(half_inverse(grams)))

    def solve(b: Float[Array, " slots"]) -> Float[Array, " slots"]:
        return combine(dots(half, b, dtype), half)

    def slope(rest: Y) -> Float[Array, " slots"]:
        return jnp.where(filled, dots(history.dr, rest, dtype) / lengths, 0)

    b = slope(r)
    x = solve(b)
    rest = vs.minus(r, combine(x / lengths, history.dr))
    x = x + solve(slope(rest) - penalty * x)
    gamma = x / lengths
    rest = vs.minus(r, combine(gamma, history.dr))
    return Fit(gamma, x, b - penalty * x, rest, free)
