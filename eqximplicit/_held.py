"""What a Python value holds under no name: entries, bound objects, contents.

Looking runs no code of the user: the methods of a builtin type are asked for, whatever
a subclass makes of them.
"""

import array
import contextlib
import contextvars
import functools
import gc
import types
import weakref
from collections import deque, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

PLAIN = (bool, int, float, complex, str, bytes, type(None))
# These show a mapping, and cannot be asked for it.
_VIEWS = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))


def held(value: Any) -> Iterator[object]:
    """What `value` holds under no name. No method that a user wrote is called."""
    holders = _holders(type(value))
    for parts in holders:
        yield from parts(value)
    if not holders and not issubclass(type(value), eqx.Module):
        yield from (leaf for leaf in jtu.tree_leaves(value) if leaf is not value)


@functools.lru_cache(maxsize=1024)
def _holders(cls: type) -> list[Callable[[Any], Iterable[object]]]:
    return [parts for kind, parts in _HELD if issubclass(cls, kind)]


def _value_of(variable: contextvars.ContextVar[Any]) -> Iterator[object]:
    with contextlib.suppress(LookupError):  # it has none here
        yield variable.get()


def _bytes_of(buffer: Any) -> Iterator[object]:
    with contextlib.suppress(ValueError):  # a view that was released
        with memoryview(buffer) as view:
            content = view.format, view.shape, view.tobytes()
        yield from (*content[:2], np.frombuffer(content[2], np.uint8))


def _entries_of(array: Any) -> Iterator[object]:
    plain = np.asarray(array)
    if plain.dtype.hasobject:
        yield from (plain.shape, *plain.ravel().tolist())
    else:
        yield plain


def _without_subclass(value: Any) -> Iterator[object]:
    for kind in PLAIN:
        if issubclass(type(value), kind):
            yield kind.__repr__(value)


# By the type of a value, and its bases: what it holds.
_HELD: tuple[tuple[Any, Callable[[Any], Iterable[object]]], ...] = (
    (dict, lambda held: (*dict.keys(held), *dict.values(held))),
    (OrderedDict, OrderedDict.__iter__),
    (list, list.__iter__),
    (tuple, tuple.__iter__),
    (deque, deque.__iter__),
    (set, set.__iter__),
    (frozenset, frozenset.__iter__),
    (slice, lambda held: (held.start, held.stop, held.step)),
    (types.MethodType, lambda held: (held.__func__, held.__self__)),
    (
        (functools.partial, functools.partialmethod),
        lambda held: (held.func, held.args, held.keywords),
    ),
    (property, lambda held: (held.fget,)),
    ((staticmethod, classmethod), lambda held: (held.__func__,)),
    (functools.cached_property, lambda held: (held.func,)),
    (weakref.ref, lambda held: (weakref.ref.__call__(held),)),
    (weakref.ProxyTypes, lambda held: (held.__repr__.__self__,)),
    (contextvars.ContextVar, _value_of),
    (_VIEWS, gc.get_referents),
    ((bytearray, memoryview, array.array), _bytes_of),
    ((np.ndarray, np.generic), _entries_of),
    (PLAIN, _without_subclass),
)
