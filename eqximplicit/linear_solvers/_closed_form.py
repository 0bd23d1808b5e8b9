"""Matrices of at most three rows, on scalars: Cramer's rule, and inverses to rely on.

The determinant of three rows cancels twice where a matrix is nearly of rank one: a
Newton step may be as rough, but the inverse is found by elimination with pivoting.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_MARGIN = 27  # of the exponents of a dtype at both ends, or a quarter of them

Scalars = list[Array]
Rows = list[list[Array]]


def _sum(scalars: Scalars) -> Array:
    return functools.reduce(lax.add, scalars)


def times(rows: Rows, x: Scalars) -> Scalars:
    """The product of a matrix and a vector."""
    return [_sum(list(map(lax.mul, row, x))) for row in rows]


def transposed(rows: Rows) -> Rows:
    """The transposed matrix."""
    return [list(column) for column in zip(*rows, strict=True)]


def largest(x: Scalars) -> Float[Array, ""]:
    """The largest absolute entry."""
    return functools.reduce(lax.max, map(lax.abs, x))


def square(x: Scalars) -> Float[Array, ""]:
    """The square of the Euclidean norm."""
    return _sum(list(map(lax.mul, x, x)))


def _cofactors(a: Rows) -> tuple[Rows, Scalars]:
    # The adjugate, and the products of which the determinant is the sum.
    if len(a) == 1:
        return [[lax.full_like(a[0][0], 1)]], a[0]
    if len(a) == 2:
        (p, q), (r, s) = a
        adjugate = [[s, lax.neg(q)], [lax.neg(r), p]]
    else:
        adjugate = [[_minor(a, j, i) for j in range(3)] for i in range(3)]
    first_column = [row[0] for row in adjugate]
    return adjugate, list(map(lax.mul, a[0], first_column))


def _minor(a: Rows, row: int, col: int) -> Array:
    # Cyclic indices carry the sign (-1)^(row + col).
    r0, r1, c0, c1 = (row + 1) % 3, (row + 2) % 3, (col + 1) % 3, (col + 2) % 3
    return lax.sub(lax.mul(a[r0][c0], a[r1][c1]), lax.mul(a[r0][c1], a[r1][c0]))


class Inverse(NamedTuple):
    r"""The inverse of a matrix, and what cancellation has left of its pivots.

    `left` is between 0 (singular) and `terms`, the sum of the absolute values of the
    terms of which it is the sum: the determinant for $n \le 2$, the worst pivot for
    $n = 3$. Their ratio does not change when rows or columns are scaled. Rounding
    leaves about machine epsilon of it for a singular matrix.
    """

    rows: Rows
    left: Float[Array, ""]
    terms: Float[Array, ""]


def _by_cramer(a: Rows) -> Inverse:
    adjugate, products = _cofactors(a)
    determinant = _sum(products)
    rows = [_scaled(lax.reciprocal(determinant), row) for row in adjugate]
    return Inverse(rows, lax.abs(determinant), _sum(list(map(lax.abs, products))))


def _by_elimination(a: Rows) -> Inverse:
    # Gauss and Jordan. `sizes` are the terms of each entry, by size: what is left of
    # the worst pivot is the part of them that cancellation has spared.
    n, spared = len(a), lax.full_like(a[0][0], 1)
    rows = [[*left, *right] for left, right in zip(a, _identity(a), strict=True)]
    sizes = [list(map(lax.abs, row)) for row in a]
    for k in range(n):
        for i in range(k + 1, n):
            larger = lax.gt(lax.abs(rows[i][k]), lax.abs(rows[k][k]))
            rows[k], rows[i] = _exchanged(larger, rows[k], rows[i])
            sizes[k], sizes[i] = _exchanged(larger, sizes[k], sizes[i])
        spared = lax.min(spared, lax.div(lax.abs(rows[k][k]), sizes[k][k]))
        rows[k] = _scaled(lax.reciprocal(rows[k][k]), rows[k])
        for i in [i for i in range(n) if i != k]:
            taken = _scaled(rows[i][k], rows[k])
            rows[i] = list(map(lax.sub, rows[i], taken))
            sizes[i] = list(map(lax.add, sizes[i], map(lax.abs, taken[:n])))
    return Inverse([row[n:] for row in rows], spared, lax.full_like(spared, 1))


def _exchanged(
    swap: Bool[Array, ""], x: Scalars, y: Scalars
) -> tuple[Scalars, Scalars]:
    first = [lax.select(swap, b, a) for a, b in zip(x, y, strict=True)]
    second = [lax.select(swap, a, b) for a, b in zip(x, y, strict=True)]
    return first, second


def inverse_power(size: Float[Array, ""]) -> Float[Array, ""]:
    """A power of two that takes a positive number to between 1 and 2.

    By the bits of its exponent: exact, and no division, of which XLA makes a kernel.
    Numbers near the ends of the range are taken part of the way, so that the inverse of
    the power is a number too. For zero it is one: XLA takes a constant factor out of an
    inner product, as its square, which must not overflow.
    """
    info = jnp.finfo(size.dtype)
    integer = jnp.dtype(f"int{info.bits}")

    def bits(exponent: int) -> Array:
        return jnp.asarray(exponent << info.nmant, integer)

    top = (1 << info.nexp) - 2
    exponent = lax.bitcast_convert_type(size, integer) & bits(top + 1)
    margin = min(_MARGIN, top // 4)
    exponent = lax.clamp(bits(margin), exponent, bits(top - margin))
    exponent = lax.select(size == 0, bits(top // 2), exponent)
    return lax.bitcast_convert_type(bits(top) - exponent, size.dtype)


def inverse(rows: Rows) -> Inverse:
    """The inverse of a matrix with `n <= 3`."""
    units = [_unit(row) for row in rows]
    scaled = [_scaled(u, row) for u, row in zip(units, rows, strict=True)]
    found = (_by_elimination if len(rows) > 2 else _by_cramer)(scaled)
    columns = zip(transposed(found.rows), units, strict=True)
    inverse = transposed([_scaled(u, column) for column, u in columns])
    return Inverse(inverse, found.left, found.terms)


def _identity(like: Rows) -> Rows:
    return [
        [lax.full_like(x, i == j) for j, x in enumerate(row)]
        for i, row in enumerate(like)
    ]


def _scaled(factor: Array | None, x: Scalars) -> Scalars:
    return x if factor is None else [lax.mul(factor, a) for a in x]


def _unit(row: Scalars) -> Array | None:
    # So that products of three entries neither over- nor underflow. Those of float64
    # have the range for it.
    wide = jnp.finfo(row[0].dtype).bits >= 64
    return None if wide else inverse_power(largest(row))


def solve(rows: Rows, b: Scalars) -> Scalars:
    """The solution of a system with `n <= 3`; not finite for a singular matrix."""
    units = [_unit(row) for row in rows]
    rows = [_scaled(u, row) for u, row in zip(units, rows, strict=True)]
    b = [x for u, a in zip(units, b, strict=True) for x in _scaled(u, [a])]
    columns = transposed(rows)
    units = [_unit(column) for column in columns]
    columns = [_scaled(u, c) for u, c in zip(units, columns, strict=True)]
    adjugate, products = _cofactors(transposed(columns))
    x = _scaled(lax.reciprocal(_sum(products)), times(adjugate, b))
    return [x for u, a in zip(units, x, strict=True) for x in _scaled(u, [a])]
