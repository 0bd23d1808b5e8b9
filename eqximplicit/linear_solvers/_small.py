"""Closed-form inverses of 1 x 1, 2 x 2 and 3 x 3 matrices, by cofactors.

LAPACK is called once per lane under `vmap`; these are elementwise, so that a batch is
one fused loop: 10 000 systems of 2 x 2 in 40 us, where an LU takes 2200-3000 us
(`benchmarks/linear_solvers.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = 3


def _cofactors(a: list[list[Array]]) -> tuple[list[list[Array]], Array, Array]:
    # The adjugate, the determinant, and the sum of the absolute values of its terms.
    if len(a) == 1:
        return [[jnp.ones_like(a[0][0])]], a[0][0], jnp.abs(a[0][0])
    if len(a) == 2:
        (p, q), (r, s) = a
        return [[s, -q], [-r, p]], p * s - q * r, jnp.abs(p * s) + jnp.abs(q * r)
    index = range(3)
    adjugate = [[_minor(a, j, i) for j in index] for i in index]
    determinant = sum(
        (a[0][j] * adjugate[j][0] for j in index), jnp.zeros_like(a[0][0])
    )
    size = sum((_size(a, j) for j in index), jnp.zeros_like(a[0][0]))
    return adjugate, determinant, size


def _minor(a: list[list[Array]], row: int, col: int) -> Array:
    # Cyclic indices carry the sign (-1)^(row + col).
    r0, r1, c0, c1 = (row + 1) % 3, (row + 2) % 3, (col + 1) % 3, (col + 2) % 3
    return a[r0][c0] * a[r1][c1] - a[r0][c1] * a[r1][c0]


def _size(a: list[list[Array]], col: int) -> Array:
    c0, c1 = (col + 1) % 3, (col + 2) % 3
    terms = jnp.abs(a[1][c0] * a[2][c1]) + jnp.abs(a[1][c1] * a[2][c0])
    return jnp.abs(a[0][col]) * terms


def small_inverse(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    r"""The inverse of a matrix with `n <= 3`, and how much of its determinant is left.

    The second value is $|\det A|$ over the sum of the absolute values of the terms of
    $\det A$: between 0 (singular) and 1, and unchanged when rows or columns are scaled.
    Rounding leaves about machine epsilon of it for a singular matrix.
    """
    n = matrix.shape[0]
    # Unit largest entries, so that products of three neither over- nor underflow.
    rows = _unit_if_zero(jnp.max(jnp.abs(matrix), axis=1, keepdims=True))
    cols = _unit_if_zero(jnp.max(jnp.abs(matrix / rows), axis=0, keepdims=True))
    scaled = matrix / rows / cols
    entries = [[scaled[i, j] for j in range(n)] for i in range(n)]
    adjugate, determinant, size = _cofactors(entries)
    inverse = jnp.stack([jnp.stack(row) for row in adjugate]) / determinant
    return inverse / rows.T / cols.T, jnp.abs(determinant) / size


def _unit_if_zero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)
