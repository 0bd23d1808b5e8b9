r"""Gaussian elimination of a matrix of more than three rows, and whether it was sound.

A pivot is a sum of terms that may cancel. The part of them that is left tells whether
the matrix is singular: so small a relative change of it makes it so. Unlike a ratio of
pivots, that part does not change when rows or columns are scaled.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._state import known
from ._dense import FEW, matvec, singular_below
from ._permutation import permuted
from ._residual import epsilon


class Carried(eqx.Module):
    """`steps A = U`: few rows, on which elimination carries the identity along.

    To multiply by its steps compiles faster than to exchange rows one after the other,
    and costs little for these.
    """

    upper: Float[Array, "n n"]
    steps: Float[Array, "n n"]

    def solve(self, b: Float[Array, " n"]) -> Float[Array, " n"]:
        return _triangle(self.upper, matvec(self.steps, b))

    def solve_transposed(self, b: Float[Array, " n"]) -> Float[Array, " n"]:
        return matvec(self.steps.T, _triangle(self.upper, b, transposed=True))


class Exchanged(eqx.Module):
    """`P A = L U`, and the exchanges of rows that make up `P`."""

    lu: Float[Array, "n n"]
    pivots: Int[Array, " n"]

    def solve(self, b: Float[Array, " n"]) -> Float[Array, " n"]:
        half = _triangle(self.lu, permuted(b, self.pivots), lower=True)
        return _triangle(self.lu, half)

    def solve_transposed(self, b: Float[Array, " n"]) -> Float[Array, " n"]:
        half = _triangle(self.lu, b, transposed=True)
        x = _triangle(self.lu, half, transposed=True, lower=True)
        return permuted(x, self.pivots, inverse=True)


def eliminated(
    matrix: Float[Array, "n n"],
) -> tuple[Carried | Exchanged, Bool[Array, " n"]]:
    """The factors of a matrix, and which of its pivots are not lost to cancellation."""
    if known(matrix.shape[0]) <= FEW:
        return _with_steps(matrix)
    lu, pivots, _ = lax.linalg.lu(matrix)
    return Exchanged(lu, pivots), _has_pivots(lu)


def _with_steps(matrix: Float[Array, "n n"]) -> tuple[Carried, Bool[Array, " n"]]:
    n = matrix.shape[0]
    lu, _, _ = lax.linalg.lu(
        lax.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)], 1)
    )
    upper, steps = lu[:, :n], lu[:, n:]
    # u_ii = sum_k steps_ik a_ki
    terms, limit = steps * matrix.T, singular_below(epsilon(lu))
    pivots, sizes = jnp.sum(terms, axis=1), jnp.sum(jnp.abs(terms), axis=1)
    return Carried(upper, steps), jnp.abs(pivots) > limit * sizes


def _has_pivots(lu: Float[Array, "n n"]) -> Bool[Array, " n"]:
    # u_ii = a_ii - sum_k l_ik u_ki
    i, k = (lax.broadcasted_iota(jnp.int32, lu.shape, axis) for axis in (0, 1))
    sizes, limit = lax.abs(lu), singular_below(epsilon(lu))
    terms = lax.mul(sizes, lax.transpose(sizes, (1, 0)))
    lost = lax.mul(terms, lax.full_like(terms, -limit))
    left = lax.mul(sizes, lax.full_like(sizes, 1 - limit))
    left = lax.select(lax.eq(i, k), left, lax.full_like(sizes, 0))
    margin = lax.reduce_sum(lax.select(lax.lt(k, i), lost, left), (1,))
    return lax.gt(margin, lax.full_like(margin, 0))


def _triangle(
    lu: Float[Array, "n n"],
    b: Float[Array, " n"],
    *,
    transposed: bool = False,
    lower: bool = False,
) -> Float[Array, " n"]:
    return lax.linalg.triangular_solve(
        lu,
        b[:, None],
        left_side=True,
        lower=lower,
        transpose_a=transposed,
        unit_diagonal=lower,
    )[:, 0]
