"""The one small linear solve that all phases of the default root finder share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..linear_solvers import _closed_form as closed, _small as small


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
    # By QR: the pivots of an LU are applied in a loop that takes longer to compile than
    # everything else here. It is differentiable by itself.
    q, r = jnp.linalg.qr(matrix)
    rotated = (vector @ q)[:, None]
    return jax.lax.linalg.triangular_solve(r, rotated, left_side=True)[:, 0]


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
    normal = transposed @ transposed.T + jnp.diag(damping * scale**2)
    matrix = jnp.where(damped, normal, transposed).T
    return solve_square(matrix, -jnp.where(damped, gradient, residual))
