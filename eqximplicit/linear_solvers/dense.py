"""Direct solves of a materialised system that know when the system is singular."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import PyTree
from .._lanes import any_lane
from .._state import every
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._residual import check_bytes, dot, epsilon, norm, structure
from ._small import (
    as_matrix,
    dense,
    inverse,
    LARGEST,
    small_solution,
    small_state,
    SmallState,
)

# A solution keeps about a third of its digits when the condition number is eps^(-2/3).
# Beyond that a system counts as singular, in every test below. Measured on random
# matrices of 4..200 rows: what elimination leaves of the last pivot of a singular one
# is at most 1000 eps in float64 and 250 eps in float32 (2 eps^(2/3): 3e5 and 400 eps).
MAX_BYTES = 2**30
# A residual of this many epsilon times the norm of the matrix is rounding of a product
# of that matrix with a vector of norm one.
NOISE = 16.0


def singular_below(eps: float) -> float:
    """The relative size below which a pivot or an eigenvalue counts as zero."""
    return 2 * eps ** (2 / 3)


def residual_limit(eps: float) -> float:
    """The largest relative residual that a direct solve of a regular system leaves."""
    return eps ** (1 / 3)


def consistency_limit(eps: float) -> float:
    """The largest relative residual of a singular system that counts as solvable."""
    return eps**0.5


def zero_below(n: int, eps: float) -> float:
    """The size, relative to the largest, of what rounding leaves of an eigenvalue."""
    # On flat minima of 2 to 1000 unknowns in both precisions at most 0.6 n eps.
    return NOISE * n * eps


def materialised(
    operator: lx.AbstractLinearOperator, max_bytes: int, who: str
) -> Float[Array, "m n"]:
    """The matrix of an operator, columns and rows in the order of its leaves.

    **Raises:** `ValueError`, with the number of bytes, if it has more than `max_bytes`.
    """
    check_fits(operator, max_bytes, who)
    return as_matrix(operator)


def check_fits(operator: lx.AbstractLinearOperator, max_bytes: int, who: str) -> None:
    """Refuses to materialise a matrix of more than `max_bytes`."""
    rows, cols = operator.out_size(), operator.in_size()
    itemsize = jnp.dtype(jax.tree_util.tree_leaves(operator.in_structure())[0].dtype)
    check_bytes(rows, cols, itemsize.itemsize, max_bytes, who)


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
    terms = _matvec(jnp.abs(matrix), jnp.abs(x)) + jnp.abs(b)
    r = jnp.abs(b - _matvec(matrix, x))
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
        left = norm(b - _matvec(matrix, x))
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


class SymmetricState(eqx.Module):
    """A factorised symmetric matrix.

    `factor` is the Cholesky factor where `regular` (the inverse, for `n <= 3`), and the
    pseudo-inverse elsewhere. `soft` is whether that leaves out an eigenvalue which is
    not zero to rounding. `sign` is -1 for a matrix tagged negative.
    """

    matrix: Float[Array, "n n"]
    factor: Float[Array, "n n"]
    regular: Bool[Array, ""]
    soft: Bool[Array, ""]
    sign: int = eqx.field(static=True)


def pseudo_inverse(matrix: Float[Array, "n n"], rcond: float) -> Float[Array, "n n"]:
    """The pseudo-inverse of a symmetric matrix, by its eigenvectors."""
    return _pseudo_inverse(matrix, rcond, rcond)[0]


def _pseudo_inverse(
    matrix: Float[Array, "n n"], rcond: float, zero: float
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    # And whether an eigenvalue between `zero` and `rcond` of the largest was left out.
    values, vectors = jnp.linalg.eigh(matrix)
    sizes = jnp.abs(values)
    largest = jnp.max(sizes)
    keep = sizes > rcond * largest
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    soft = jnp.any(~keep & (sizes > zero * largest))
    return (vectors * inverse[None, :]) @ vectors.T, soft


class DirectSymmetric(AbstractMeasuredSolver[SymmetricState]):
    r"""Cholesky, and the pseudo-inverse where a symmetric matrix is not definite.

    A Hessian that is singular because of a symmetry (a translation of all particles,
    say) has a solution for a consistent right-hand side; this returns the one of
    minimum norm. Where the right-hand side is not consistent, that is, where the
    measured residual exceeds $\sqrt\epsilon\,\lVert b\rVert_2$, the result is
    `lx.RESULTS.singular`. The eigenvectors, about ten times the cost of Cholesky, are
    computed only if some lane needs them. Eigenvalues below `rcond` of the largest
    count as zero: beside a minimum that is not quite reached, flat directions are only
    nearly flat. What is left out there counts as zero, up to $\sqrt\epsilon$ of the
    right-hand side.

    **Arguments:**

    - `rcond`: dimensionless; $2\epsilon^{2/3}$ if `None` (7e-11 in float64, 5e-5 in
        float32).
    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.

    **Options:**

    - `project`: if true, a right-hand side that is not consistent is projected onto the
        range of the operator, and the result is that of the least-squares problem.
    """

    rcond: float | None = None
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> SymmetricState:
        """Returns the factors of the matrix of `operator`, computed once."""
        del options
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
        # A false tag would make reverse mode use the matrix for its transpose.
        skew, size = jnp.max(jnp.abs(matrix - matrix.T)), jnp.max(jnp.abs(matrix))
        tolerance = consistency_limit(eps)
        matrix = jnp.where(skew <= tolerance * size, matrix, jnp.nan)
        factor, health = _definite_factor(matrix)
        # Ten times the limit: the health of a pivot is only an upper bound.
        regular = health > 10 * max(limit, rcond)
        zero = rcond if self.rcond is not None else zero_below(len(matrix), eps)

        def by_lane() -> tuple[Array, Array]:
            pseudo, soft = _pseudo_inverse(matrix, rcond, zero)
            return jnp.where(regular, factor, pseudo), soft & ~regular

        factor, soft = jax.lax.cond(
            any_lane(~regular), by_lane, lambda: (factor, ~regular)
        )
        return SymmetricState(matrix, factor, regular, soft, sign)

    def answer(
        self, state: SymmetricState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        b, unravel = ravel_pytree(vector)
        x = _apply(state, b)
        residual, eps = b - _matvec(state.matrix, x), epsilon(vector)
        if options.get("project", False):
            # What is left must lie in the null space: then x is a least-squares answer.
            part = _matvec(state.matrix, residual) / jnp.linalg.norm(state.matrix)
            judged = jnp.where(state.regular, residual, part)
        else:
            judged = residual
        rtol, atol = _limits(state, x, eps)
        return measured(
            unravel(state.sign * x),
            dot(judged, judged),
            dot(b, b),
            rtol=rtol,
            atol=atol,
            residual_norm=norm(residual),
            singular=~state.regular,
        )

    def transpose(
        self, state: SymmetricState, options: dict[str, Any]
    ) -> tuple[SymmetricState, dict[str, Any]]:
        """Returns the same state: the matrix is symmetric."""
        return state, options

    def conj(
        self, state: SymmetricState, options: dict[str, Any]
    ) -> tuple[SymmetricState, dict[str, Any]]:
        """Returns the same state: the matrix is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: no, if the system is consistent."""
        return False


def _limits(
    state: SymmetricState, x: Float[Array, " n"], eps: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest residual: relative to the right-hand side, and beside that."""
    regular, soft = state.regular, state.soft
    rtol = jnp.where(regular, residual_limit(eps), consistency_limit(eps))
    # Rounding of a product with `x`. In a null space also that of one with a vector of
    # norm one, for a right-hand side that is itself no more than rounding: the gradient
    # at a minimum, say, the cotangent of the objective there. In a soft direction that
    # may be all that there is of a small one.
    size = jnp.where(soft, jnp.max(jnp.abs(x)), 1)
    atol = jnp.where(regular, 0, NOISE * eps * size * jnp.linalg.norm(state.matrix))
    return rtol.astype(x.dtype), atol


def _definite_factor(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    # The health is NaN, and so fails every comparison, if there is no such factor.
    if matrix.shape[0] <= LARGEST:
        found = inverse([list(row) for row in matrix])
        return dense(found.rows), found.determinant / found.terms
    factor = jnp.linalg.cholesky(matrix)
    return factor, jnp.min(jnp.diag(factor) ** 2 / jnp.diag(matrix))


def _apply(state: SymmetricState, b: Float[Array, " n"]) -> Float[Array, " n"]:
    if state.factor.shape[0] <= LARGEST:
        return _matvec(state.factor, b)

    def by_cholesky() -> Array:
        return jax.scipy.linalg.cho_solve((state.factor, True), b)

    def by_lane() -> Array:
        return jnp.where(state.regular, by_cholesky(), _matvec(state.factor, b))

    return jax.lax.cond(any_lane(~state.regular), by_lane, by_cholesky)


def _matvec(matrix: Float[Array, "n n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    if matrix.shape[0] <= LARGEST:  # elementwise, so that a batch of them is one loop
        return jnp.sum(matrix * x[None, :], axis=1)
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)
