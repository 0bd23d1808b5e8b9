"""The pseudo-inverse, for systems that are singular or not square."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._entries import greatest
from ._dense import consistency_limit, MAX_BYTES, residual_limit
from ._measured import AbstractDirectSolver, Measured, measured
from ._residual import dot, epsilon, norm
from ._spectral import decompose, lost, SpectralState, Structure, structure_key


class LeastNormState(eqx.Module):
    """A decomposition, the structure of right-hand sides, and whose transpose it is."""

    spectrum: SpectralState
    codomain: Structure = eqx.field(static=True)
    transposed: bool = eqx.field(default=False, static=True)

    def transpose(self) -> "LeastNormState":
        """The state of the transposed operator: the same decomposition."""
        spectrum, flipped = self.spectrum, not self.transposed
        across = spectrum.transpose(self.codomain)
        return LeastNormState(across, spectrum.domain, flipped)


class LeastNorm(AbstractDirectSolver[LeastNormState]):
    r"""The minimum-norm solution $x = A^{+} b$ of a consistent system, singular or not.

    Where the system has no solution, that is, where the measured residual
    $\lVert b - Ax\rVert_2$ exceeds $\sqrt\epsilon\,\lVert b\rVert_2$
    ($\epsilon^{1/3}\lVert b\rVert_2$ for a matrix of full row rank, which always has
    one), the result is `lx.RESULTS.singular`, unless least squares is asked for. By
    singular values; by eigenvectors for an operator with a symmetric tag, which has
    failed if that is false. Any shape of operator.

    As the `linear_solver` of a derivative in reverse mode it has failed, too, where the
    parameters can make the system inconsistent: it then has no solution for them to
    differentiate. What they are computed from may exclude that, which reverse mode does
    not see, and the right-hand side is the cotangent of the solution, which need not be
    in the range either. `least_squares=True` is for both: it projects, which is the
    transpose of the forward rule. The derivative that lineax has of `lx.linear_solve`
    needs it, too, for an operator of less than full rank: that solves for what is
    rounding of zero, which is never consistent.

    **Arguments:**

    - `rcond`: singular values up to this part of the largest count as zero; `None` is
        `2 eps` times the larger dimension.
    - `least_squares`: whether a system without a solution is answered by the least
        squares solution of minimum norm, instead of being a failure.
    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.

    **Options:**

    - `project`: as `least_squares`, for one solve.
    """

    rcond: float | Float[Array, ""] | None = None
    least_squares: bool = eqx.field(default=False, static=True)
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> LeastNormState:
        """Returns the decomposition of the matrix of `operator`, computed once."""
        del options
        spectrum = decompose(operator, self.max_bytes, "LeastNorm")
        return LeastNormState(spectrum, structure_key(operator.out_structure()))

    def answer(
        self, state: LeastNormState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, `residual_norm`, and `rank`."""
        b, _ = ravel_pytree(vector)
        spectrum, eps = state.spectrum, epsilon(vector)
        rows, cols = spectrum.u.shape[0], spectrum.vt.shape[1]
        rcond = 2 * eps * max(rows, cols) if self.rcond is None else self.rcond
        keep = spectrum.s > rcond * jnp.max(spectrum.s)
        x, r = spectrum.apply(jnp.where(keep, 1 / jnp.where(keep, spectrum.s, 1), 0), b)
        project = self.least_squares or options.get("project", False)
        judged = lost(spectrum, r) if project else norm(r)
        if state.transposed and rows > cols:
            # A wide system of full rank always has a solution, and the transpose of
            # that is the projection.
            judged = jnp.where(jnp.all(keep), lost(spectrum, r), judged)
        # With a large `rcond`, the values that were dropped remain in the residual.
        rtol = greatest(consistency_limit(eps), rcond if project else 0.0)
        # Every right-hand side is in the range of a matrix of full row rank.
        whole = jnp.all(keep) if rows <= cols else False
        rtol = jnp.where(whole, greatest(rtol, residual_limit(eps)), rtol)
        rank = jnp.sum(keep)
        return measured(
            spectrum.lay_out(x),
            judged**2,
            dot(b, b),
            rtol=rtol,
            rank=rank,
            residual_norm=norm(r),
        )

    def transpose(
        self, state: LeastNormState, options: dict[str, Any]
    ) -> tuple[LeastNormState, dict[str, Any]]:
        """Returns the state of the transposed operator: the same decomposition."""
        return state.transpose(), options

    def conj(
        self, state: LeastNormState, options: dict[str, Any]
    ) -> tuple[LeastNormState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: no."""
        return False
