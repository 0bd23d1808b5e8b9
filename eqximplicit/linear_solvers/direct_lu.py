"""LU of a materialised system that knows when the system is singular."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._state import max_abs
from ._dense import (
    check_fits,
    materialised,
    matvec,
    MAX_BYTES,
    residual_limit,
    singular_below,
)
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._permutation import permuted
from ._residual import epsilon, even, norm, structure
from ._small import LARGEST, small_solution, small_state, SmallState


def _substitute(
    lu: Float[Array, "n n"],
    pivots: Int[Array, " n"],
    b: Float[Array, " n"],
    transposed: bool,
) -> Float[Array, " n"]:
    # A⁻¹ b = U⁻¹ L⁻¹ P b and A⁻ᵀ b = P⁻¹ L⁻ᵀ U⁻ᵀ b
    def triangle(lower: bool, b: Array) -> Array:
        return lax.linalg.triangular_solve(
            lu,
            b,
            left_side=True,
            lower=lower,
            transpose_a=transposed,
            unit_diagonal=lower,
        )

    if transposed:
        x = triangle(True, triangle(False, b[:, None]))[:, 0]
        return permuted(x, pivots, inverse=True)
    return triangle(False, triangle(True, permuted(b, pivots)[:, None]))[:, 0]


def _has_pivots(lu: Float[Array, "n n"]) -> Bool[Array, " n"]:
    # u_ii = a_ii - sum_k l_ik u_ki: the smallest part that cancellation has left of it.
    # Unlike a ratio of pivots, it does not change when rows or columns are scaled.
    i, k = (lax.broadcasted_iota(jnp.int32, lu.shape, axis) for axis in (0, 1))
    sizes, limit = jnp.abs(lu), singular_below(epsilon(lu))
    diagonal = jnp.where(i == k, (1 - limit) * sizes, 0)
    return jnp.sum(jnp.where(k < i, -limit * sizes * sizes.T, diagonal), axis=1) > 0


def _is_exact(
    matrix: Float[Array, "n n"], x: Float[Array, " n"], b: Float[Array, " n"]
) -> Bool[Array, " n"]:
    terms = matrix * x[None, :]
    # Row by row, so that the scale of a row has no say.
    sizes = jnp.sum(jnp.abs(terms), axis=1) + jnp.abs(b)
    return jnp.abs(b - jnp.sum(terms, axis=1)) <= residual_limit(epsilon(b)) * sizes


@custom_vmap
def _spokesman(
    matrix: Float[Array, "n n"], x: Float[Array, " n"], b: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """A solution and its right-hand side that tell of all those of one matrix.

    Many are spoken for by one combination of them without a pattern, of those that are
    finite: an error of the factors is in each. A product for each of them would cost
    what elimination does. (Freivalds, Probabilistic machines can use less running time,
    IFIP 1977.)
    """
    del matrix  # it tells the rule for a batch whether it is one for all
    return x, b


@_spokesman.def_vmap
def _spokesman_of_batch(
    size: Any, batched: Sequence[bool], matrix: Any, x: Any, b: Any
) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    x, b = (
        v if lanes else jnp.broadcast_to(v, (size, *v.shape))
        for v, lanes in zip((x, b), batched[1:], strict=True)
    )
    if batched[0]:
        return (x, b), (True, True)
    heard = jnp.isfinite(jnp.sum(x + b, axis=1, keepdims=True))
    weights = even(jax.eval_shape(lambda: b[:, 0]))
    x, b = (_combined(weights, jnp.where(heard, v, 0)) for v in (x, b))
    return _spokesman(matrix, x, b), (False, False)


def _combined(weights: Array, vectors: Array) -> Array:
    return jnp.matmul(weights, vectors, precision=lax.Precision.HIGHEST)


class LUState(eqx.Module):
    """A factorised matrix: `P matrix = L U`, and which rows of `U` are sound."""

    matrix: Float[Array, "n n"]
    factor: Float[Array, "n n"]
    pivots: Int[Array, " n"]
    sound: Bool[Array, " n"]
    transposed: bool = eqx.field(static=True)


class DirectLU(AbstractMeasuredSolver[LUState | SmallState]):
    r"""LU with partial pivoting that refuses a singular matrix; closed form, `n <= 3`.

    The result is `lx.RESULTS.singular` where elimination has cancelled a pivot to less
    than $2\epsilon^{2/3}$ of its terms (the matrix is singular to working precision,
    even if the solve is finite), or where the measured residual exceeds
    $\epsilon^{1/3}\lVert b\rVert_2$; for `n > 3`, $\epsilon^{1/3}$ of the terms of its
    row, $\sum_j |a_{ij} x_j| + |b_i|$. For a singular system use
    [`eqximplicit.LeastNorm`][].

    **Arguments:**

    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.
    """

    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> LUState | SmallState:
        """Returns the factors of the matrix of `operator`, computed once."""
        del options
        if operator.in_size() <= LARGEST:
            check_fits(operator, self.max_bytes, "DirectLU")
            limit = singular_below(epsilon(structure(operator)))
            return small_state(operator, limit)
        matrix = materialised(operator, self.max_bytes, "DirectLU")
        lu, pivots, _ = lax.linalg.lu(matrix)
        return LUState(matrix, lu, pivots, _has_pivots(lu), False)

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
        x = _substitute(state.factor, state.pivots, b, state.transposed)
        left = norm(b - matvec(matrix, x))
        # What does not hold is not finite, and that is looked for anyway.
        holds = state.sound & _is_exact(matrix, *_spokesman(matrix, x, b))
        answer = unravel(jnp.where(holds, x, jnp.nan))
        regular = jnp.isfinite(max_abs(answer))
        return approximate(answer, vector, left, regular=regular)

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
