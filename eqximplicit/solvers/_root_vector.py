"""The real vector behind a pytree: what a dense factorisation works on."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import PyTree, ShapeDtypeStruct
from .._state import num_entries
from ._vector_space import real_dtype


def _is_complex(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def real_size(tree: PyTree[Any]) -> int:
    """The number of real unknowns in a pytree; a complex entry is two of them."""
    leaves: list[Any] = jtu.tree_leaves(tree)
    return sum(num_entries(x) * (2 if _is_complex(x) else 1) for x in leaves)


class RealVector(eqx.Module):
    """Real vectors for the pytrees of one structure.

    Complex leaves become their real and imaginary parts, and leaves of several dtypes
    are held in the widest one, so that a non-holomorphic function and a state of mixed
    precision have one well-defined real Jacobian.
    """

    struct: PyTree[ShapeDtypeStruct] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def ravel(self, tree: PyTree[Array]) -> Float[Array, " n"]:
        """The entries of `tree`, one leaf after the other."""
        parts: list[Array] = []
        for leaf in jtu.tree_leaves(tree):
            both = (leaf.real, leaf.imag) if _is_complex(leaf) else (leaf,)
            parts.extend(x.astype(self.dtype).reshape(-1) for x in both)
        return jnp.concatenate(parts)

    def unravel(self, vector: Float[Array, " n"]) -> PyTree[Array]:
        """The pytree whose `ravel` is `vector`, rounded to each leaf's dtype."""
        leaves, treedef = jtu.tree_flatten(self.struct)
        out: list[Array] = []
        start = 0
        for leaf in leaves:
            size = math.prod(leaf.shape)
            real = vector[start : start + size].reshape(leaf.shape)
            start += size
            if _is_complex(leaf):
                imag = vector[start : start + size].reshape(leaf.shape)
                start += size
                real = jax.lax.complex(real, imag)
            out.append(real.astype(leaf.dtype))
        return jtu.tree_unflatten(treedef, out)


def real_vector(tree: PyTree[Any], dtype: Any = None) -> RealVector:
    """The vectors for pytrees like `tree`, in their widest real dtype by default."""
    struct = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return RealVector(struct, real_dtype(tree) if dtype is None else dtype)


def norm_of(array: Float[Array, "..."]) -> Float[Array, ""]:
    """The square root of the sum of the squares of all entries."""
    return jnp.sqrt(jnp.sum(array**2))
