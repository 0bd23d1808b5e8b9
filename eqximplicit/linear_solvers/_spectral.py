"""A singular value decomposition whose values are inverted by a filter."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float

from .._custom_types import PyTree, ShapeDtypeStruct
from ._dense import materialised
from ._residual import norm, require_real

Structure = tuple[tuple[jax.ShapeDtypeStruct, ...], Any]


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
    """The singular value decomposition; of a symmetric operator, by eigenvectors."""
    require_real(operator)
    matrix = materialised(operator, max_bytes, who)
    domain = structure_key(operator.in_structure())
    if lx.is_symmetric(operator):
        values, vectors = jnp.linalg.eigh(matrix)
        signs = jnp.where(values < 0, -1, 1)
        return SpectralState(
            vectors * signs[None, :], jnp.abs(values), vectors.T, domain
        )
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return SpectralState(u, s, vt, domain)


def lost(state: SpectralState, residual: Float[Array, " m"]) -> Float[Array, ""]:
    """`‖Aᵀ r‖ / ‖A‖`: what of a residual a least-squares answer should have removed."""
    top = jnp.max(state.s)
    kept = norm(state.s * _matmul(state.u.T, residual))
    return kept / jnp.where(top > 0, top, 1)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
