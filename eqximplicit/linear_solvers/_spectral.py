"""A singular value decomposition whose values are inverted by a filter."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree, ShapeDtypeStruct
from .._entries import all_finite
from .._lanes import any_lane
from ._dense import materialised, SKEWED, skewness, zero_below
from ._residual import epsilon, norm, require_real

Structure = tuple[tuple[jax.ShapeDtypeStruct, ...], Any]
_Factors = tuple[Array, Array, Array]


class SpectralState(eqx.Module):
    """`A = u diag(s) vt`, and how vectors on either side are laid out."""

    u: Float[Array, "m k"]
    s: Float[Array, " k"]
    vt: Float[Array, "k n"]
    domain: Structure = eqx.field(static=True)

    def transpose(self, codomain: Structure) -> "SpectralState":
        """The decomposition of the transposed matrix, which maps into `domain`."""
        return SpectralState(self.vt.T, self.s, self.u.T, codomain)

    def apply(
        self, inverse: Float[Array, " k"], b: Float[Array, " m"]
    ) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """`x = v diag(inverse) uᵀ b`, and the residual `b - A x`."""
        x = _matmul(self.vt.T, inverse * _matmul(self.u.T, b))
        return x, b - _matmul(self.u, self.s * _matmul(self.vt, x))

    def lay_out(self, x: Float[Array, " n"]) -> PyTree[Array]:
        """The vector `x` in the structure of the unknown."""
        return laid_out(self.domain, x)


def laid_out(structure: Structure, x: Float[Array, " n"]) -> PyTree[Array]:
    """A vector in a structure."""
    leaves, treedef = structure
    parts, start = list[Array](), 0
    for leaf in leaves:
        parts.append(x[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return jtu.tree_unflatten(treedef, parts)


def structure_key(struct: PyTree[ShapeDtypeStruct]) -> Structure:
    """A hashable description of a structure."""
    leaves, treedef = jtu.tree_flatten(struct)
    plain = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return plain, treedef


def decompose(
    operator: lx.AbstractLinearOperator, max_bytes: int, who: str
) -> SpectralState:
    """The singular value decomposition; of a symmetric operator, by eigenvectors.

    No answer of it is finite where the matrix is not, nor where its symmetric tag is
    false.
    """
    require_real(operator)
    matrix = materialised(operator, max_bytes, who)
    domain = structure_key(operator.in_structure())
    if not lx.is_symmetric(operator):
        sound = all_finite(matrix)
        return SpectralState(*_guarded(_by_singular_values, matrix, sound), domain)
    skew, eps = skewness(matrix), epsilon(operator.in_structure())
    # Eigenvectors are those of the mean of a matrix and its transpose.
    rounding = any_lane(~(skew <= zero_below(len(matrix), eps)))

    def factors(matrix: Array) -> _Factors:
        return jax.lax.cond(rounding, _by_singular_values, _by_eigenvectors, matrix)

    return SpectralState(*_guarded(factors, matrix, skew <= SKEWED), domain)


def _guarded(
    factors: Callable[[Array], _Factors], matrix: Array, sound: Bool[Array, ""]
) -> _Factors:
    # LAPACK's singular values of a matrix that is not finite take forever.
    found = factors(jnp.where(sound, matrix, 0))
    return jtu.tree_map(lambda x: jnp.where(sound, x, jnp.nan), found)


def _by_singular_values(matrix: Array) -> _Factors:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _by_eigenvectors(matrix: Array) -> _Factors:
    values, vectors = jnp.linalg.eigh(matrix)
    signs = jnp.where(values < 0, -1, 1).astype(matrix.dtype)
    return vectors * signs[None, :], jnp.abs(values), vectors.T


def lost(state: SpectralState, residual: Float[Array, " m"]) -> Float[Array, ""]:
    """`‖Aᵀ r‖ / ‖A‖`: what of a residual a least-squares answer should have removed."""
    top = jnp.max(state.s)
    kept = norm(state.s * _matmul(state.u.T, residual))
    return kept / jnp.where(top > 0, top, 1)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
