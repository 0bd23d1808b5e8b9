"""A guard against arrays in static fields, where no derivative can reach them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._state import describe


def _is_module(x: object) -> bool:
    return isinstance(x, eqx.Module)


def _static_arrays(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not any(map(_is_module, jtu.tree_leaves(node, is_leaf=_is_module))):
        return
    for path, module in jtu.tree_leaves_with_path(node, is_leaf=_is_module):
        if not isinstance(module, eqx.Module):
            continue
        prefix = name + jtu.keystr(path)
        for field in dataclasses.fields(module):
            value = getattr(module, field.name, None)
            if not field.metadata.get("static", False):
                yield from _static_arrays(value, f"{prefix}.{field.name}")
                continue
            for leaf_path, leaf in jtu.tree_leaves_with_path(value):
                if eqx.is_array(leaf) or hasattr(leaf, "__array__"):
                    yield f"{prefix}.{field.name}{jtu.keystr(leaf_path)}", leaf


def refuse_static_arrays(node: Any, name: str) -> None:
    """Refuses a pytree in which a static field of a module holds an array.

    **Raises:** `ValueError` naming the field, its shape and dtype.
    """
    for path, leaf in _static_arrays(node, name):
        raise ValueError(
            f"The static field `{path}` holds an array ({describe(leaf)}). It would "
            "never be differentiated, batched or moved. Remove `static=True` from the "
            "field, or store a hashable value."
        )
