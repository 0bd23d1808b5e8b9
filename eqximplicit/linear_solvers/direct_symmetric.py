"""A symmetric system: Cholesky, and the pseudo-inverse where that does not exist."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._entries import greatest, peak
from .._lanes import any_lane
from .._state import known
from ._dense import (
    consistency_limit,
    materialised,
    matvec,
    MAX_BYTES,
    NOISE,
    NULL,
    null_below,
    residual_limit,
    singular_below,
    SKEWED,
    skewness,
    uncertainty,
    zero_below,
)
from ._measured import AbstractDirectSolver, Measured, measured
from ._residual import dot, epsilon, norm, structure
from ._rounding import is_coarse
from ._small import LARGEST
from ._symmetric_factors import completed, Cut, definite_factor, rows, skew_inverse


class SymmetricState(eqx.Module):
    """A factorised symmetric matrix.

    `factor` is the Cholesky factor where `definite` (for `n <= 3`, and where `skewed`
    by coarse rounding, the inverse). It holds the eigenvectors elsewhere, and `weights`
    the inverse eigenvalues, zero for those left out; `soft` is whether one of these is
    not zero to rounding, and `whole` that there is none; `strict` that the matrix is
    that of no minimum. `error` is how far off the matrix itself may be, in norm; `sign`
    is -1 for one tagged negative.
    """

    matrix: Float[Array, "n n"]
    factor: Float[Array, "n n"]
    weights: Float[Array, " n"]
    definite: Bool[Array, ""]
    skewed: Bool[Array, ""]
    whole: Bool[Array, ""]
    soft: Bool[Array, ""]
    strict: Bool[Array, ""]
    error: Float[Array, ""]
    sign: int = eqx.field(static=True)
    coarse: bool = eqx.field(static=True)
    transposed: bool = eqx.field(default=False, static=True)

    def oriented(self, square: Float[Array, "n n"]) -> Float[Array, "n n"]:
        """The matrix or its inverse, as this state or its transpose has it."""
        return square.T if self.transposed else square


class DirectSymmetric(AbstractDirectSolver[SymmetricState]):
    r"""Cholesky, and the pseudo-inverse where a symmetric matrix is not definite.

    A Hessian that is singular because of a symmetry (a translation of all particles,
    say) has a solution for a consistent right-hand side; this returns the one of
    minimum norm. Where the right-hand side is not consistent, that is, where the
    measured residual exceeds $\sqrt\epsilon\,\lVert b\rVert_2$, the result is
    `lx.RESULTS.singular`. The eigenvectors, about ten times the cost of Cholesky, are
    computed only if some lane needs them. Eigenvalues below `rcond` of the largest
    count as zero: beside a minimum that is not quite reached, flat directions are only
    nearly flat. What is left out there counts as zero, up to $\sqrt\epsilon$ of the
    right-hand side. A matrix with an eigenvalue below $-\epsilon^{1/4}$ of the largest
    is that of no minimum: there only rounding counts as zero, of the eigenvalue and of
    the right-hand side.

    The symmetric tag is checked. Where products may be rounded in a precision below
    that of the system, a matrix that differs from its transpose by at most 1/32 of its
    largest entry may be symmetric but for that; it is inverted without the tag, and has
    failed where that part would change the inverse by a quarter. One that differs by
    more has failed, as has any other that differs by more than rounding.

    **Arguments:**

    - `rcond`: dimensionless; $2\epsilon^{2/3}$ if `None` (7e-11 in float64, 5e-5 in
        float32).
    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.

    **Options:**

    - `project`: if true, a right-hand side that is not consistent is projected onto the
        range of the operator, and the result is that of the least-squares problem.
    - `operator_error`: how far off the operator may be, in norm (0 by default). Where
        it is singular, a residual up to that times the solution is no failure. The
        derivative of a minimum passes `4 ‖∇f‖ / ‖y‖` of the point where it is taken.
    """

    rcond: float | Float[Array, ""] | None = None
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> SymmetricState:
        """Returns the factors of the matrix of `operator`, computed once."""
        eps = epsilon(structure(operator))
        limit = singular_below(eps)
        rcond = limit if self.rcond is None else self.rcond
        if not lx.is_symmetric(operator):
            raise ValueError(
                "`DirectSymmetric` needs a symmetric operator; got one without a "
                "symmetric tag. Pass `tags=lx.symmetric_tag`, or use `DirectLU()`."
            )
        sign = -1 if lx.is_negative_semidefinite(operator) else 1
        matrix = sign * materialised(operator, self.max_bytes, "DirectSymmetric")
        # A false tag would make reverse mode use the matrix for its transpose. So small
        # a part may be rounding, and the matrix is inverted without its tag.
        skew, coarse = skewness(matrix), is_coarse(operator)
        tight = consistency_limit(eps)
        matrix = jnp.where(skew <= (SKEWED if coarse else tight), matrix, jnp.nan)
        factor, health = definite_factor(matrix)
        # Ten times the limit: the health of a pivot is only an upper bound.
        definite = health > 10 * greatest(limit, rcond)
        skewed = skew > tight
        if coarse:
            factor, regular = skew_inverse(matrix, factor, skewed)
            definite = jnp.where(skewed, regular, definite)
        found = completed(definite, skewed, matrix, factor, self._cuts(matrix))
        strict = found.indefinite & (self.rcond is None)
        error = jnp.asarray(options.get("operator_error", 0), matrix.dtype)
        return SymmetricState(
            matrix,
            found.vectors,
            found.weights,
            definite,
            skewed,
            found.whole,
            found.soft,
            strict,
            error,
            sign,
            coarse,
        )

    def _cuts(self, matrix: Float[Array, "n n"]) -> tuple[Cut, Cut, Cut]:
        """Below which parts of the largest eigenvalue others are left out, and zero."""
        if self.rcond is not None:
            return self.rcond, self.rcond, self.rcond
        n, eps = rows(matrix), epsilon(matrix)
        return singular_below(eps), zero_below(n, eps), null_below(n, eps)

    def answer(
        self, state: SymmetricState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        b, unravel = ravel_pytree(vector)
        x = _apply(state, b)
        residual = b - matvec(state.oriented(state.matrix), x)
        if options.get("project", False):
            # What is left must lie in the null space: then x is a least-squares answer.
            part = matvec(state.matrix, residual) / jnp.linalg.norm(state.matrix)
            judged = jnp.where(state.whole, residual, part)
        else:
            judged = residual
        rtol, atol = _limits(state, x, b, epsilon(vector))
        return measured(
            unravel(state.sign * x),
            dot(judged, judged),
            dot(b, b),
            rtol=rtol,
            atol=atol,
            regular=jax.lax.is_finite(state.weights[0]),
            residual_norm=norm(residual),
            singular=~state.whole,
        )

    def transpose(
        self, state: SymmetricState, options: dict[str, Any]
    ) -> tuple[SymmetricState, dict[str, Any]]:
        """Returns the same factors: the matrix is symmetric, or nearly so."""
        return dataclasses.replace(state, transposed=not state.transposed), options

    def conj(
        self, state: SymmetricState, options: dict[str, Any]
    ) -> tuple[SymmetricState, dict[str, Any]]:
        """Returns the same state: the matrix is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: no, if the system is consistent."""
        return False


def _limits(
    state: SymmetricState, x: Float[Array, " n"], b: Float[Array, " n"], eps: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest residual: relative to the right-hand side, and beside that."""
    whole, soft = state.whole, state.soft
    # A small eigenvalue of an indefinite matrix need not be zero: what is left out
    # there must be rounding of the right-hand side, too, or of a product with `x`.
    limit = jnp.where(state.strict, null_below(rows(b), eps), consistency_limit(eps))
    rtol = jnp.where(whole, residual_limit(eps), limit)
    # Rounding of a product with `x`. In a null space also that of one with a vector of
    # norm one, for a right-hand side that is itself no more than rounding: the gradient
    # at a minimum, say, the cotangent of the objective there. In a soft direction that
    # may be all that there is of a small one.
    top = peak(x)
    size = jnp.where(soft, top, jnp.where(state.strict, jnp.maximum(top, 1), 1))
    noise = jnp.where(state.strict, NULL, NOISE)
    rounding = noise * eps * size * jnp.linalg.norm(state.matrix)
    atol = jnp.where(whole, 0, rounding + uncertainty(state.error, x, b, eps))
    return rtol.astype(x.dtype), atol


def _apply(state: SymmetricState, b: Float[Array, " n"]) -> Float[Array, " n"]:
    factor, skewed = state.factor, state.skewed

    def definite() -> Array:
        inverted = lambda: matvec(state.oriented(factor), b)
        if known(b.size) <= LARGEST:
            return inverted()
        solved = lambda: jax.scipy.linalg.cho_solve((factor, True), b)
        if not state.coarse:
            return solved()
        either = lambda: jnp.where(skewed, inverted(), solved())
        return jax.lax.cond(any_lane(skewed), either, solved)

    def by_lane() -> Array:
        # One factor after the other: an eigenvalue that is almost zero would fill the
        # pseudo-inverse with numbers whose rounding is larger than the others.
        spectral = matvec(factor, state.weights * matvec(factor.T, b))
        return jnp.where(state.definite, definite(), spectral)

    return jax.lax.cond(any_lane(~state.definite), by_lane, definite)
