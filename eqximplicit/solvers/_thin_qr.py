"""Least squares by QR, by factors that `jax.export` knows.

`lx.QR` applies its orthogonal factor as reflections (LAPACK's `ormqr`), a call that JAX
does not promise to keep, and so does not export (JAX 0.10).
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._custom_types import AbstractLinearSolver, PyTree
from ..linear_solvers._small import as_matrix
from ..linear_solvers._spectral import laid_out, Structure, structure_key


class QRState(eqx.Module):
    """`A = Q R` for at least as many rows as columns, and the two structures."""

    q: Float[Array, "m n"]
    r: Float[Array, "n n"]
    domain: Structure = eqx.field(static=True)
    codomain: Structure = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)


class ThinQR(AbstractLinearSolver[QRState]):
    """`lx.QR` for real systems with at least as many equations as unknowns."""

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> QRState:
        """Returns the factors of the matrix of `operator`."""
        del options
        q, r = jnp.linalg.qr(as_matrix(operator))
        domain, codomain = operator.in_structure(), operator.out_structure()
        return QRState(q, r, structure_key(domain), structure_key(codomain), False)

    def compute(
        self, state: QRState, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Returns the least-squares solution; transposed, that of minimum norm."""
        del options
        b, _ = ravel_pytree(vector)
        exact = lax.Precision.HIGHEST
        if state.transposed:
            x = jnp.matmul(state.q, _solved(state.r, b, True), precision=exact)
            return laid_out(state.codomain, x), lx.RESULTS.successful, {}
        x = _solved(state.r, jnp.matmul(state.q.T, b, precision=exact), False)
        return laid_out(state.domain, x), lx.RESULTS.successful, {}

    def transpose(
        self, state: QRState, options: dict[str, Any]
    ) -> tuple[QRState, dict[str, Any]]:
        """Returns the state of the transposed operator: the same factors."""
        return dataclasses.replace(state, transposed=not state.transposed), options

    def conj(
        self, state: QRState, options: dict[str, Any]
    ) -> tuple[QRState, dict[str, Any]]:
        """Returns the same state: matrices are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a matrix without full rank is a failure: yes."""
        return True


def _solved(
    r: Float[Array, "n n"], b: Float[Array, " n"], transposed: bool
) -> Float[Array, " n"]:
    column = lax.linalg.triangular_solve(
        r, b[:, None], left_side=True, transpose_a=transposed
    )
    return column[:, 0]
