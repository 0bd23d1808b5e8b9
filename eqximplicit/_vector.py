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
    leaves = jtu.tree_leaves(vectors, is_leaf=is_none)
    structure = jtu.tree_structure(vectors, is_leaf=is_none)
    if jtu.tree_structure(given, is_leaf=is_none) != structure:
        raise ValueError(
            f"The {name} has the structure {jtu.tree_structure(given)}, {root} has "
            f"{jtu.tree_structure(tree)}. Pass one entry for each array, of its shape."
        )

    def entry(path: tuple[Any, ...], given: Any, x: Array | None) -> Any:
        if x is None or given is None:
            return given if x is None else jnp.zeros_like(x)
        return fitting(name, given, x, x.shape, path=path)

    pairs = jtu.tree_leaves_with_path(given, is_leaf=is_none)
    entries = [entry(*pair, x) for pair, x in zip(pairs, leaves, strict=True)]
    return jtu.tree_unflatten(structure, entries)


def fitting(
    name: str,
    given: Any,
    x: Array,
    *shapes: tuple[int, ...],
    path: tuple[Any, ...] = (),
) -> Array:
    """`given`, the leaf at `path` of what is called `name`, in the dtype of `x`.

    **Raises:** `ValueError` if it is no number, complex beside a real `x`, or of none
    of the `shapes`.
    """
    number = eqx.is_array_like(given)
    if number and jnp.iscomplexobj(given) <= jnp.iscomplexobj(x):
        if jnp.shape(given) in shapes:
            return jnp.asarray(given, x.dtype)
    wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    kind = "numbers" if jnp.iscomplexobj(x) else "real numbers"
    leaf = f"The leaf `{jtu.keystr(path)}`" if path else "A leaf"
    raise ValueError(
        f"{leaf} of the {name} is {describe(given)}, opposite {describe(x)}. Pass "
        f"{kind} of shape {wanted}."
    )
