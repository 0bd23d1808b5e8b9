"""Systems of at most three unknowns in closed form, on scalars.

LAPACK is called once per lane under `vmap`, and a matrix of shape (2, 2) per lane is
strided memory. These are scalars, and so one long vector each for a batch, and nothing
but arithmetic: XLA makes a few loops of it.
"""

import functools
import math
import sys
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
from .._state import known
from ._closed_form import inverse, Rows, Scalars, square, times, transposed
from ._columns import columns_of

LARGEST = 3


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


class SmallState(eqx.Module):
    """A matrix and its inverse, by entries."""

    rows: Rows
    inverse: Rows
    regular: Bool[Array, ""]

    def transpose(self) -> "SmallState":
        return SmallState(transposed(self.rows), transposed(self.inverse), self.regular)


class SmallSolution(NamedTuple):
    """The solution of a small system, and what judges it.

    The squared norms of what is left and of the right-hand side, and whether that is
    zero: its square may be, where it is not.
    """

    x: PyTree[Array]
    rr: Float[Array, ""]
    bb: Float[Array, ""]
    asked: Bool[Array, ""]


def is_placed(struct: PyTree[ShapeDtypeStruct]) -> bool:
    """Whether a leaf has a sharding, which new arrays (unit vectors) do not have."""
    leaves = jtu.tree_leaves(struct)
    return any(getattr(leaf, "sharding", None) is not None for leaf in leaves)


def as_matrix(operator: lx.AbstractLinearOperator) -> Float[Array, "m n"]:
    """The matrix of an operator, columns and rows in the order of its leaves.

    Not by lineax (0.1.1), which multiplies a dense layer by the identity, forgets the
    sharding of a structure on its way to the matrix, and then finds that the two sides
    of a symmetric operator differ.
    """
    struct = operator.in_structure()
    placed = is_placed(struct)
    if not placed and not isinstance(operator, lx.FunctionLinearOperator):
        return operator.as_matrix()
    flat, unravel = ravel_pytree(jtu.tree_map(_zeros, struct))
    column = lambda unit: ravel_pytree(operator.mv(unravel(unit)))[0]
    if placed or known(flat.size) == sys.maxsize:  # a column is read off a known size
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
    return columns_of(column, flat).T


def _zeros(struct: ShapeDtypeStruct) -> Array:
    return jnp.zeros(struct.shape, struct.dtype)


def small_state(operator: lx.AbstractLinearOperator, limit: float) -> SmallState:
    """The inverse, regular where more than `limit` of its pivots is left."""
    if is_placed(operator.in_structure()):
        rows = [list(row) for row in as_matrix(operator)]
    else:
        rows = rows_of(operator.mv, operator.in_structure())
    found = inverse(rows)
    regular = lax.gt(
        found.left, lax.mul(found.terms, lax.full_like(found.terms, limit))
    )
    return SmallState(rows, found.rows, regular)


def small_solution(state: SmallState, vector: PyTree[Array]) -> SmallSolution:
    """The product with the inverse, and what it leaves of the right-hand side."""
    b = entries(vector)
    x = times(state.inverse, b)
    left = list(map(lax.sub, b, times(state.rows, x)))
    asked = [lax.ne(a, lax.full_like(a, 0)) for a in b]
    asked = functools.reduce(lax.bitwise_or, asked)
    return SmallSolution(from_entries(x, vector), square(left), square(b), asked)


def dense(rows: Rows) -> Float[Array, "n n"]:
    """The matrix as an array."""
    return jnp.stack([jnp.stack(row) for row in rows])
