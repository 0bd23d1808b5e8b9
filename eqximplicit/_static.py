"""A guard against arrays in static fields, where no derivative can reach them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from ._captured import CALLABLES, items, parts_of_callable
from ._state import describe, leaf_name
from ._walk import walk

REMEDY = "Remove `static=True` from the field, or store a hashable value."


def _is_holder(x: object) -> bool:
    return isinstance(x, (eqx.Module, *CALLABLES))


def _holders(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if any(map(_is_holder, jtu.tree_leaves(node, is_leaf=_is_holder))):
        for path, leaf in jtu.tree_leaves_with_path(node, is_leaf=_is_holder):
            if _is_holder(leaf):
                yield leaf_name(name, path), leaf


def static_arrays_in(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each array in a static field of a module, with how to reach it."""
    for path, held in walk(_holders(node, name), _live_parts):
        if isinstance(held, eqx.Module):
            yield from _own_static_arrays(held, path)


def _live_parts(held: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(held, eqx.Module):
        for field in dataclasses.fields(held):
            if not field.metadata.get("static", False):
                value = getattr(held, field.name, None)
                yield from _holders(value, f"{name}.{field.name}")
    elif isinstance(held, CALLABLES):
        yield from parts_of_callable(held, name)
    elif isinstance(held, (list, tuple, dict)):
        yield from items(held, name)


def _own_static_arrays(module: eqx.Module, name: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(module):
        if field.metadata.get("static", False):
            value = getattr(module, field.name, None)
            for path, leaf in jtu.tree_leaves_with_path(value):
                if eqx.is_array(leaf) or hasattr(leaf, "__array__"):
                    yield leaf_name(f"{name}.{field.name}", path), leaf


def refuse_static_arrays(node: Any, name: str) -> None:
    """Refuses a pytree in which a static field of a module holds an array.

    Modules are looked for in what a function captured, too.

    **Raises:** `ValueError` naming the field, its shape and dtype.
    """
    for path, leaf in static_arrays_in(node, name):
        raise ValueError(
            f"The static field `{path}` holds an array ({describe(leaf)}). It would "
            f"never be differentiated, batched or moved. {REMEDY}"
        )
