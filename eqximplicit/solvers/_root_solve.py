"""The one small linear solve that all phases of the default root finder share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..linear_solvers import _closed_form as closed, _small as small
from ..linear_solvers._dense import matvec


def solve_square(
    matrix: Float[Array, "n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The solution of `matrix @ x = vector`; not finite where `matrix` is singular.

    Up to `n = 3` it is Cramer's rule, which is arithmetic on whole batches under
    `jax.vmap`, many times faster there than a batch of small LU factorisations.
    """
    if vector.size <= small.LARGEST:
        rows = [list(row) for row in matrix]
        return small.from_entries(closed.solve(rows, list(vector)), vector)
    return _by_reflections(matrix, vector)


@jax.custom_jvp
def _by_reflections(
    matrix: Float[Array, "n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    # By QR: the pivots of an LU are applied in a loop. LAPACK's own form of the factors
    # has R above the reflections, where `triangular_solve` does not look.
    raw, taus = jnp.linalg.qr(matrix, mode="raw")
    q = lax.linalg.householder_product(raw.T, taus)
    return _substituted(raw.T, q, vector)


@_by_reflections.defjvp
def _by_reflections_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(_by_qr, primals, tangents)  # of which JAX knows the derivative


def _by_qr(
    matrix: Float[Array, "n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    q, r = jnp.linalg.qr(matrix)
    return _substituted(r, q, vector)


def _substituted(
    r: Float[Array, "n n"], q: Float[Array, "n n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    rotated = matvec(q.T, vector)[:, None]
    return lax.linalg.triangular_solve(r, rotated, left_side=True)[:, 0]


def newton_or_damped_step(
    transposed: Float[Array, "n n"],
    residual: Float[Array, " n"],
    gradient: Float[Array, " n"],
    scale: Float[Array, " n"],
    damping: Float[Array, ""],
    damped: Bool[Array, ""],
) -> Float[Array, " n"]:
    r"""The Newton step, or the damped (Levenberg-Marquardt) step, by one solve.

    With $J$, $F$, $g = J^T F$, $D = \mathrm{diag}(\mathtt{scale})$ and the damping
    $\lambda$ it solves

    $$J d = -F \qquad\text{or}\qquad (J^T J + \lambda D^2)\, d = -g.$$

    The matrix and the right-hand side are selected first and factorised once.
    `transposed` is $J^T$.
    """
    rows = (((1,), (1,)), ((), ()))  # JᵀJ without a transpose of its own
    normal = lax.dot_general(transposed, transposed, rows, lax.Precision.HIGHEST)
    normal = normal + jnp.diag(damping * scale**2)
    matrix = jnp.where(damped, normal, transposed).T
    return solve_square(matrix, -jnp.where(damped, gradient, residual))
