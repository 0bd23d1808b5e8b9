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
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._reduce import anywhere, largest
from .._state import known
from ._dense import (
    check_fits,
    materialised,
    matvec,
    MAX_BYTES,
    NOISE,
    residual_limit,
    row_sums,
    singular_below,
)
from ._elimination import Carried, eliminated, Exchanged
from ._measured import AbstractDirectSolver, judged, Measured, measured
from ._residual import epsilon, even, norm, structure
from ._small import LARGEST, small_solution, small_state, SmallState


def _is_exact(
    matrix: Float[Array, "n n"], x: Float[Array, " n"], b: Float[Array, " n"]
) -> Bool[Array, " n"]:
    # Row by row, so that the scale of a row has no say. An entry of the solution may be
    # zero, and its row then nothing but rounding, which is relative to the largest one.
    # Each row multiplies all of `x`: where that is not finite, nor is any difference.
    eps, sizes = epsilon(b), lax.abs(x)
    limit = residual_limit(eps)
    part = lax.full_like(b, NOISE * x.size * eps / limit, shape=())
    rounding = lax.broadcast(lax.mul(part, largest(sizes)), x.shape)
    terms = row_sums(lax.abs(matrix), lax.add(sizes, rounding))
    terms = lax.mul(lax.add(terms, lax.abs(b)), lax.full_like(b, limit))
    left = lax.abs(lax.sub(b, row_sums(matrix, x)))
    return lax.le(lax.sub(left, terms), lax.full_like(left, 0))


@custom_vmap
def _spokesman(
    matrix: Float[Array, "n n"], x: Float[Array, " n"], b: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Bool[Array, ""]]:
    """A solution and its right-hand side that tell of this one, and whether they do.

    All of one matrix are spoken for by one combination of them without a pattern, of
    those that are finite: an error of the factors is in each. A product for each would
    cost what elimination does. (Freivalds, Probabilistic machines can use less running
    time, IFIP 1977.)
    """
    del matrix  # it tells the rule for a batch whether it is one for all
    return x, b, jnp.asarray(True)


@_spokesman.def_vmap
def _spokesman_of_batch(
    size: Any, batched: Sequence[bool], matrix: Any, x: Any, b: Any
) -> tuple[tuple[Array, Array, Array], tuple[bool, bool, bool]]:
    x, b = (
        v if lanes else jnp.broadcast_to(v, (size, *v.shape))
        for v, lanes in zip((x, b), batched[1:], strict=True)
    )
    if batched[0]:
        return (x, b, jnp.ones(size, bool)), (True, True, True)
    heard = jnp.isfinite(jnp.sum(x + b, axis=1))
    weights = even(jax.eval_shape(lambda: b[:, 0]))
    x, b = (_combined(weights, jnp.where(heard[:, None], v, 0)) for v in (x, b))
    x, b, every = _spokesman(matrix, x, b)
    return (x, b, heard & every), (False, False, True)


def _combined(weights: Array, vectors: Array) -> Array:
    return jnp.matmul(weights, vectors, precision=lax.Precision.HIGHEST)


class LUState(eqx.Module):
    """A matrix, its factors, and which of their pivots are sound."""

    matrix: Float[Array, "n n"]
    factors: Carried | Exchanged
    sound: Bool[Array, " n"]
    transposed: bool = eqx.field(static=True)


class DirectLU(AbstractDirectSolver[LUState | SmallState]):
    r"""LU with partial pivoting that refuses a singular matrix; closed form, `n <= 3`.

    The result is `lx.RESULTS.singular` where elimination has cancelled a pivot to less
    than $2\epsilon^{2/3}$ of its terms (the matrix is singular to working precision,
    even if the solve is finite), or where the measured residual exceeds
    $\epsilon^{1/3}\lVert b\rVert_2$; for `n > 3`, that of a row $\epsilon^{1/3}$ of its
    terms, $\sum_j |a_{ij} x_j| + |b_i|$, by more than rounding explains. For a
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
        if known(operator.in_size()) <= LARGEST:
            check_fits(operator, self.max_bytes, "DirectLU")
            limit = singular_below(epsilon(structure(operator)))
            return small_state(operator, limit)
        matrix = materialised(operator, self.max_bytes, "DirectLU")
        return LUState(matrix, *eliminated(matrix), False)

    def answer(
        self,
        state: LUState | SmallState,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        del options
        if isinstance(state, SmallState):
            x, rr, bb, asked = small_solution(state, vector)
            limit = residual_limit(epsilon(vector))
            return measured(x, rr, bb, asked, rtol=limit, regular=state.regular)
        b, unravel = ravel_pytree(vector)
        matrix, solve = state.matrix, state.factors.solve
        if state.transposed:
            matrix, solve = matrix.T, state.factors.solve_transposed
        x = solve(b)
        left = norm(b - matvec(matrix, x))
        *spokesman, heard = _spokesman(matrix, x, b)
        sound = lax.bitwise_and(state.sound, _is_exact(matrix, *spokesman))
        asked, finite = lax.ne(b, lax.full_like(b, 0)), lax.is_finite(b)
        wrong, asked, endless = anywhere(
            lax.bitwise_not(sound), asked, lax.bitwise_not(finite)
        )
        regular, finite = lax.bitwise_and(~wrong, heard), ~endless
        good = lax.bitwise_and(regular, finite)
        return judged(unravel(x), asked, finite, good, regular, residual_norm=left)

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
