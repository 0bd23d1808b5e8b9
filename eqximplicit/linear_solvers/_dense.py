"""What the direct solvers share: limits of accuracy, and the matrix of an operator."""

import sys

import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._entries import peak
from .._state import known
from ._residual import check_bytes, norm
from ._small import as_matrix

# A solution keeps about a third of its digits when the condition number is eps^(-2/3).
# Beyond that a system counts as singular, in every test below. Measured on random
# matrices of 4..200 rows: what elimination leaves of the last pivot of a singular one
# is at most 1000 eps in float64 and 250 eps in float32 (2 eps^(2/3): 3e5 and 400 eps).
MAX_BYTES = 2**30
# Up to so many entries XLA adds up in one kernel, which compiles faster than a product.
FEW = 32
# A residual of this many epsilon times the norm of the matrix is rounding of a product
# of that matrix with a vector of norm one.
NOISE = 16.0
# So many epsilon times the root of the number of rows, relative to the largest, is what
# rounding leaves of a zero eigenvalue of an indefinite matrix. Measured on Hessians and
# products of 2 to 1000 rows in both precisions: at most 1.2.
NULL = 4.0
# How skew half precision somewhere inside makes a Hessian, relative to its largest
# entry: four epsilon of bfloat16. What is more skew than that is not symmetric.
SKEWED = 2.0**-5


def singular_below(eps: float) -> float:
    """The relative size below which a pivot or an eigenvalue counts as zero."""
    return 2 * eps ** (2 / 3)


def residual_limit(eps: float) -> float:
    """The largest relative residual that a direct solve of a regular system leaves."""
    return eps ** (1 / 3)


def consistency_limit(eps: float) -> float:
    """The largest relative residual of a singular system that counts as solvable."""
    return eps**0.5


# How many times the residual over the state a symmetric operator may be off where a
# solution is nearly reached: the curvature of a flat direction is of that order.
UNSURE = 4.0


def uncertainty(
    error: Array, x: PyTree[Array], b: PyTree[Array], eps: float
) -> Float[Array, ""]:
    """What a singular operator, known up to `error` in norm, leaves of `b` at `x`.

    So far `x` solves the system of an operator that may be the true one. Never more
    than `eps ** (1/4)` of `b`: a right-hand side that is not consistent must show.
    """
    return jnp.minimum(error * norm(x), eps**0.25 * norm(b))


def zero_below(n: int | Array, eps: float) -> float | Array:
    """The size, relative to the largest, of what rounding leaves of an eigenvalue."""
    # On flat minima of 2 to 1000 unknowns in both precisions at most 0.6 n eps.
    return NOISE * n * eps


def null_below(n: int | Array, eps: float) -> float | Array:
    """`zero_below`, where a small eigenvalue may belong to a regular matrix."""
    return NULL * n**0.5 * eps


def skewness(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """How far a matrix is from its transpose, relative to its largest entry.

    NaN for one that is not finite, so that no comparison holds.
    """
    skew, size = peak(matrix - matrix.T), peak(matrix)
    return skew / jnp.where(size == 0, 1, size)


def materialised(
    operator: lx.AbstractLinearOperator, max_bytes: int, who: str
) -> Float[Array, "m n"]:
    """The matrix of an operator, columns and rows in the order of its leaves.

    **Raises:** `ValueError`, with the number of bytes, if it has more than `max_bytes`.
    """
    check_fits(operator, max_bytes, who)
    return as_matrix(operator)


def check_fits(operator: lx.AbstractLinearOperator, max_bytes: int, who: str) -> None:
    """Refuses to materialise a matrix of more than `max_bytes`, if its size is known.

    A program that is exported for all sizes is not refused: see `known`.
    """
    rows, cols = operator.out_size(), operator.in_size()
    if max(map(known, (rows, cols))) == sys.maxsize:
        return
    itemsize = jnp.dtype(jax.tree_util.tree_leaves(operator.in_structure())[0].dtype)
    check_bytes(rows, cols, itemsize.itemsize, max_bytes, who)


def row_sums(matrix: Float[Array, "n n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    """A product that is fused with what it reads and with what reads it."""
    rows = lax.broadcast_in_dim(x, matrix.shape, (1,))
    return lax.reduce_sum(lax.mul(matrix, rows), (1,))


def matvec(matrix: Float[Array, "n n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    if known(matrix.shape[0]) <= FEW:  # elementwise: a batch of them is one loop
        return row_sums(matrix, x)
    return jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST)
