"""LU of a materialised system that knows when the system is singular."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._state import every
from ._dense import (
    check_fits,
    materialised,
    matvec,
    MAX_BYTES,
    residual_limit,
    singular_below,
)
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._residual import epsilon, norm, structure
from ._small import LARGEST, small_solution, small_state, SmallState


def _pivot_health(lu: Float[Array, "n n"]) -> Float[Array, ""]:
    # u_ii = a_ii - sum_k l_ik u_ki: the smallest part that cancellation has left of it.
    # Unlike a ratio of pivots, it does not change when rows or columns are scaled.
    lower = jnp.tril(jnp.abs(lu), -1)
    pivots = jnp.abs(jnp.diag(lu))
    sizes = jnp.sum(lower * jnp.triu(jnp.abs(lu)).T, axis=1) + pivots
    return jnp.min(jnp.where(sizes > 0, pivots / jnp.where(sizes > 0, sizes, 1), 0))


def _substitute(
    lu: Float[Array, "n n"],
    rows: Int[Array, " n"],
    b: Float[Array, " n"],
    transposed: bool,
) -> Float[Array, " n"]:
    # A⁻¹ b = U⁻¹ L⁻¹ (b[rows]), and A⁻ᵀ b puts L⁻ᵀ U⁻ᵀ b into those rows.
    # (`lu_solve` derives `rows` from pivots in a loop, which takes long to compile.)
    def triangle(lower: bool, b: Array) -> Array:
        return jax.lax.linalg.triangular_solve(
            lu,
            b,
            left_side=True,
            lower=lower,
            transpose_a=transposed,
            unit_diagonal=lower,
        )

    if transposed:
        x = triangle(True, triangle(False, b[:, None]))[:, 0]
        return jnp.zeros_like(x).at[rows].set(x)
    return triangle(False, triangle(True, b[rows][:, None]))[:, 0]


def _is_exact(
    matrix: Float[Array, "n n"], lu: Float[Array, "n n"], rows: Int[Array, " n"]
) -> Bool[Array, ""]:
    # An error of the factors is in every solution, and so in that of one right-hand
    # side without a pattern. For each of many, a product costs what elimination does.
    b = jnp.cos(jnp.arange(1, matrix.shape[0] + 1, dtype=matrix.dtype))
    x = _substitute(lu, rows, b, False)
    # Row by row, so that the scale of a row has no say.
    terms = matvec(jnp.abs(matrix), jnp.abs(x)) + jnp.abs(b)
    r = jnp.abs(b - matvec(matrix, x))
    return every(r <= residual_limit(epsilon(matrix)) * terms)


class LUState(eqx.Module):
    """A factorised matrix: `matrix[rows] = L U`."""

    matrix: Float[Array, "n n"]
    factor: Float[Array, "n n"]
    rows: Int[Array, " n"]
    regular: Bool[Array, ""]
    transposed: bool = eqx.field(static=True)


class DirectLU(AbstractMeasuredSolver[LUState | SmallState]):
    r"""LU with partial pivoting that refuses a singular matrix; closed form, `n <= 3`.

    The result is `lx.RESULTS.singular` where elimination has cancelled a pivot to less
    than $2\epsilon^{2/3}$ of its terms (the matrix is singular to working precision,
    even if the solve is finite), or where the measured residual exceeds
    $\epsilon^{1/3}\lVert b\rVert_2$: for `n > 3` that of one right-hand side without a
    pattern, which tells the accuracy of the factors and so of all others. For a
    singular system use [`eqximplicit.LeastNorm`][].

    **Arguments:**

    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.
    """

    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> LUState | SmallState:
        """Returns the factors of the matrix of `operator`, computed once."""
        del options
        limit = singular_below(epsilon(structure(operator)))
        if operator.in_size() <= LARGEST:
            check_fits(operator, self.max_bytes, "DirectLU")
            return small_state(operator, limit)
        matrix = materialised(operator, self.max_bytes, "DirectLU")
        lu, _, rows = jax.lax.linalg.lu(matrix)
        regular = (_pivot_health(lu) > limit) & _is_exact(matrix, lu, rows)
        return LUState(matrix, lu, rows, regular, False)

    def answer(
        self,
        state: LUState | SmallState,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        del options
        if isinstance(state, SmallState):
            x, rr, bb = small_solution(state, vector)
            limit = residual_limit(epsilon(vector))
            return measured(x, rr, bb, rtol=limit, regular=state.regular)
        b, unravel = ravel_pytree(vector)
        matrix = state.matrix.T if state.transposed else state.matrix
        x = _substitute(state.factor, state.rows, b, state.transposed)
        left = norm(b - matvec(matrix, x))
        return approximate(unravel(x), vector, left, regular=state.regular)

    def transpose(
        self, state: LUState | SmallState, options: dict[str, Any]
    ) -> tuple[LUState | SmallState, dict[str, Any]]:
        """Returns the state of the transposed matrix: the same factors."""
        if isinstance(state, SmallState):
            return state.transpose(), options
        return dataclasses.replace(state, transposed=not state.transposed), options

    def conj(
        self, state: LUState | SmallState, options: dict[str, Any]
    ) -> tuple[LUState | SmallState, dict[str, Any]]:
        """Returns the same state: matrices are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: yes."""
        return True
