"""Systems of at most three unknowns in closed form, on scalars.

LAPACK is called once per lane under `vmap`, and a matrix of shape (2, 2) per lane is
strided memory. These are scalars, and so one long vector each for a batch, and nothing
but arithmetic: XLA makes a few loops of it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree, ShapeDtypeStruct

LARGEST = 3
_MARGIN = 27  # of the exponents of a dtype at both ends, or a quarter of them

Scalars = list[Array]
Rows = list[list[Array]]


def entries(tree: PyTree[Array]) -> Scalars:
    """The entries of all leaves, each of shape `()`."""
    return [x for leaf in jtu.tree_leaves(tree) for x in _apart(leaf)]


def _apart(leaf: Array) -> Scalars:
    if leaf.shape == ():
        return [leaf]
    flat = lax.reshape(leaf, (leaf.size,))
    return [lax.index_in_dim(flat, i, keepdims=False) for i in range(leaf.size)]


def from_entries(scalars: Scalars, like: PyTree[Any]) -> PyTree[Array]:
    """The pytree of the shapes of `like` whose `entries` are `scalars`."""
    leaves, treedef = jtu.tree_flatten(like)
    start, out = 0, list[Array]()
    for leaf in leaves:
        stop = start + math.prod(leaf.shape)
        out.append(_together(scalars[start:stop], leaf))
        start = stop
    return jtu.tree_unflatten(treedef, out)


def _together(scalars: Scalars, like: Any) -> Array:
    # A choice by index is part of the loop around it; a concatenation is not.
    if not scalars:
        return jnp.zeros(like.shape, like.dtype)
    if like.shape == ():
        return scalars[0]
    first, *others = scalars
    out = jnp.broadcast_to(first, (len(scalars),))
    for i, scalar in enumerate(others, 1):
        here = np.arange(len(scalars)) == i
        out = lax.select(here, jnp.broadcast_to(scalar, out.shape), out)
    return lax.reshape(out, like.shape)


def rows_of(
    mv: Callable[[PyTree[Array]], PyTree[Array]], struct: PyTree[ShapeDtypeStruct]
) -> Rows:
    """The entries of the matrix of a linear map: `n` products with unit vectors."""
    leaves = jtu.tree_leaves(struct)
    units = np.eye(sum(leaf.size for leaf in leaves), dtype=leaves[0].dtype)
    columns = [entries(mv(_unit_vector(unit, struct))) for unit in units]
    return [list(row) for row in zip(*columns, strict=True)]


def _unit_vector(unit: Any, struct: PyTree[ShapeDtypeStruct]) -> PyTree[Array]:
    leaves, treedef = jtu.tree_flatten(struct)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    parts = np.split(unit, np.cumsum(sizes)[:-1])
    shaped = [
        jnp.asarray(part.reshape(leaf.shape))
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jtu.tree_unflatten(treedef, shaped)


def _sum(scalars: Scalars) -> Array:
    return functools.reduce(lax.add, scalars)


def times(rows: Rows, x: Scalars) -> Scalars:
    """The product of a matrix and a vector."""
    return [_sum(list(map(lax.mul, row, x))) for row in rows]


def transposed(rows: Rows) -> Rows:
    """The transposed matrix."""
    return [list(column) for column in zip(*rows, strict=True)]


def largest(x: Scalars) -> Float[Array, ""]:
    """The largest absolute entry."""
    return functools.reduce(lax.max, map(lax.abs, x))


def square(x: Scalars) -> Float[Array, ""]:
    """The square of the Euclidean norm."""
    return _sum(list(map(lax.mul, x, x)))


def _cofactors(a: Rows) -> tuple[Rows, Array, Array]:
    # The adjugate, the determinant, and the sum of the absolute values of its terms.
    if len(a) == 1:
        return [[lax.full_like(a[0][0], 1)]], a[0][0], lax.abs(a[0][0])
    if len(a) == 2:
        (p, q), (r, s) = a
        ps, qr = lax.mul(p, s), lax.mul(q, r)
        return (
            [[s, lax.neg(q)], [lax.neg(r), p]],
            lax.sub(ps, qr),
            lax.add(*map(lax.abs, (ps, qr))),
        )
    index = range(3)
    adjugate = [[_minor(a, j, i) for j in index] for i in index]
    determinant = _sum([lax.mul(a[0][j], adjugate[j][0]) for j in index])
    return adjugate, determinant, _sum([_size(a, j) for j in index])


def _minor(a: Rows, row: int, col: int) -> Array:
    # Cyclic indices carry the sign (-1)^(row + col).
    r0, r1, c0, c1 = (row + 1) % 3, (row + 2) % 3, (col + 1) % 3, (col + 2) % 3
    return lax.sub(lax.mul(a[r0][c0], a[r1][c1]), lax.mul(a[r0][c1], a[r1][c0]))


def _size(a: Rows, col: int) -> Array:
    c0, c1 = (col + 1) % 3, (col + 2) % 3
    one, two = lax.mul(a[1][c0], a[2][c1]), lax.mul(a[1][c1], a[2][c0])
    terms = lax.add(lax.abs(one), lax.abs(two))
    return lax.mul(lax.abs(a[0][col]), terms)


def inverse_power(size: Float[Array, ""]) -> Float[Array, ""]:
    """A power of two that takes a positive number to between 1 and 2.

    By the bits of its exponent: exact, and no division, of which XLA makes a kernel.
    Numbers near the ends of the range are taken part of the way, so that the inverse of
    the power is a number too. For zero it is one: XLA takes a constant factor out of an
    inner product, as its square, which must not overflow.
    """
    info = jnp.finfo(size.dtype)
    integer = jnp.dtype(f"int{info.bits}")

    def bits(exponent: int) -> Array:
        return jnp.asarray(exponent << info.nmant, integer)

    top = (1 << info.nexp) - 2
    exponent = lax.bitcast_convert_type(size, integer) & bits(top + 1)
    margin = min(_MARGIN, top // 4)
    exponent = lax.clamp(bits(margin), exponent, bits(top - margin))
    exponent = lax.select(size == 0, bits(top // 2), exponent)
    return lax.bitcast_convert_type(bits(top) - exponent, size.dtype)


class Inverse(NamedTuple):
    r"""The inverse of a matrix, and how much cancellation has left of its determinant.

    $|\det A|$ is between 0 (singular) and `terms`, the sum of the absolute values of
    the terms of which it is the sum; their ratio does not change when rows or columns
    are scaled. Rounding leaves about machine epsilon of it for a singular matrix.
    """

    rows: Rows
    determinant: Float[Array, ""]
    terms: Float[Array, ""]


def inverse(rows: Rows) -> Inverse:
    """The inverse of a matrix with `n <= 3`."""
    units = [_unit(row) for row in rows]
    scaled = [_scaled(u, row) for u, row in zip(units, rows, strict=True)]
    adjugate, determinant, terms = _cofactors(scaled)
    factor = lax.reciprocal(determinant)
    columns = zip(transposed(adjugate), units, strict=True)
    inverse = transposed([_scaled(u, _scaled(factor, c)) for c, u in columns])
    return Inverse(inverse, lax.abs(determinant), terms)


def _scaled(factor: Array | None, x: Scalars) -> Scalars:
    return x if factor is None else [lax.mul(factor, a) for a in x]


def _unit(row: Scalars) -> Array | None:
    # So that products of three entries neither over- nor underflow. Those of float64
    # have the range for it.
    wide = jnp.finfo(row[0].dtype).bits >= 64
    return None if wide else inverse_power(largest(row))


def solve(rows: Rows, b: Scalars) -> Scalars:
    """The solution by Cramer's rule; not finite for a singular matrix."""
    units = [_unit(row) for row in rows]
    rows = [_scaled(u, row) for u, row in zip(units, rows, strict=True)]
    b = [x for u, a in zip(units, b, strict=True) for x in _scaled(u, [a])]
    columns = transposed(rows)
    units = [_unit(column) for column in columns]
    columns = [_scaled(u, c) for u, c in zip(units, columns, strict=True)]
    adjugate, determinant, _ = _cofactors(transposed(columns))
    x = _scaled(lax.reciprocal(determinant), times(adjugate, b))
    return [x for u, a in zip(units, x, strict=True) for x in _scaled(u, [a])]


class SmallState(eqx.Module):
    """A matrix and its inverse, by entries."""

    rows: Rows
    inverse: Rows
    regular: Bool[Array, ""]

    def transpose(self) -> "SmallState":
        return SmallState(transposed(self.rows), transposed(self.inverse), self.regular)


class SmallSolution(NamedTuple):
    """The solution of a small system, with the squared norms that judge it."""

    x: PyTree[Array]
    rr: Float[Array, ""]
    bb: Float[Array, ""]


def is_placed(struct: PyTree[ShapeDtypeStruct]) -> bool:
    """Whether a leaf has a sharding, which new arrays (unit vectors) do not have."""
    leaves = jtu.tree_leaves(struct)
    return any(getattr(leaf, "sharding", None) is not None for leaf in leaves)


def as_matrix(operator: lx.AbstractLinearOperator) -> Float[Array, "m n"]:
    """The matrix of an operator, columns and rows in the order of its leaves.

    lineax forgets the sharding of a structure on its way to the matrix, and then finds
    that the two sides of a symmetric operator differ (0.1.1).
    """
    struct = operator.in_structure()
    if not is_placed(struct):
        return operator.as_matrix()
    flat, unravel = ravel_pytree(jtu.tree_map(_zeros, struct))
    column = lambda unit: ravel_pytree(operator.mv(unravel(unit)))[0]
    return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))


def _zeros(struct: ShapeDtypeStruct) -> Array:
    return jnp.zeros(struct.shape, struct.dtype)


def small_state(operator: lx.AbstractLinearOperator, limit: float) -> SmallState:
    """The inverse, regular where more than `limit` of the determinant is left."""
    if is_placed(operator.in_structure()):
        rows = [list(row) for row in as_matrix(operator)]
    else:
        rows = rows_of(operator.mv, operator.in_structure())
    found = inverse(rows)
    regular = lax.gt(
        found.determinant, lax.mul(found.terms, lax.full_like(found.terms, limit))
    )
    return SmallState(rows, found.rows, regular)


def small_solution(state: SmallState, vector: PyTree[Array]) -> SmallSolution:
    """The product with the inverse, and what it leaves of the right-hand side."""
    b = entries(vector)
    x = times(state.inverse, b)
    left = list(map(lax.sub, b, times(state.rows, x)))
    return SmallSolution(from_entries(x, vector), square(left), square(b))


def dense(rows: Rows) -> Float[Array, "n n"]:
    """The matrix as an array."""
    return jnp.stack([jnp.stack(row) for row in rows])
