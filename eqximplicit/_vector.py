"""What a caller pairs with a value: a tangent, a cotangent, a default."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._custom_types import PyTree
from ._state import describe


def vector_at(name: str, given: PyTree[Any], root: str, tree: PyTree[Any]) -> Any:
    """`given`, a tangent or cotangent at `tree`, in the dtypes of its inexact arrays.

    `None` stands for zero, and for the other leaves of `tree`.

    **Raises:** `ValueError` if it differs from `tree` in structure or in a shape.
    """
    vectors = eqx.filter(tree, eqx.is_inexact_array)
    is_none = lambda x: x is None
    leaves, structure = jtu.tree_flatten(vectors, is_leaf=is_none)
    if jtu.tree_structure(given, is_leaf=is_none) != structure:
        raise ValueError(
            f"The {name} has the structure {jtu.tree_structure(given)}, {root} has "
            f"{jtu.tree_structure(tree)}. Pass one entry for each array, of its shape."
        )

    def entry(given: Any, x: Array | None) -> Any:
        if x is None:
            return given
        return jnp.zeros_like(x) if given is None else fitting(name, given, x, x.shape)

    entries = map(entry, jtu.tree_leaves(given, is_leaf=is_none), leaves)
    return jtu.tree_unflatten(structure, list(entries))


def fitting(name: str, given: Any, x: Array, *shapes: tuple[int, ...]) -> Array:
    """`given`, a leaf of what is called `name`, in the dtype of `x`.

    **Raises:** `ValueError` if it is no number, complex beside a real `x`, or of none
    of the `shapes`.
    """
    number = eqx.is_array_like(given)
    if number and jnp.iscomplexobj(given) <= jnp.iscomplexobj(x):
        if jnp.shape(given) in shapes:
            return jnp.asarray(given, x.dtype)
    wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    kind = "numbers" if jnp.iscomplexobj(x) else "real numbers"
    raise ValueError(
        f"A leaf of the {name} is {describe(given)}, opposite {describe(x)}. Pass "
        f"{kind} of shape {wanted}."
    )
