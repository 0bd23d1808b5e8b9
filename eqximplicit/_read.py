"""What a Python callable reads that nobody passes to it, as it is now.

A compiled solve is kept under its callables. A callable stays the same when an array
that it captured is bound anew, an attribute of its object is set, or a NumPy array is
changed in place; the program compiled from it does not. So a solve is kept under what
its callables read, too: closure cells, defaults, the globals and attributes that their
code names, and whatever these hold.
"""

import contextlib
import functools
import os
import sysconfig
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Installed code is taken not to bind its own globals anew; nor do we.
_INSTALLED = (
    os.path.dirname(__file__),
    *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")),
)
# What calling an object reads of it.
_CALLED = frozenset({"__call__", "__wrapped__"})


class _Same:
    """An immutable value that is compared by identity, and kept alive for that."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = object.__hash__


class _Content:
    """A NumPy array, which is compared by its bytes."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)

    def copied(self) -> "_Content":
        return _Content(self.array.copy())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Content):
            return False
        mine, theirs = self.array, other.array
        same = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return same and np.array_equal(_bytes(mine), _bytes(theirs))

    __hash__ = object.__hash__


def _bytes(array: Any) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8 if flat.nbytes % 8 else np.uint64)


class Read:
    """What callables read. Two of these are equal if nothing of it has changed.

    To be a key of a compiled program, which is made once: the hash never changes.
    """

    def __init__(self, *roots: Any):
        self._roots = roots
        self._values = _read(roots)

    def keep(self) -> None:
        """Looks again, and keeps what may be changed in place."""
        values = _read(self._roots)
        self._values = [v.copied() if isinstance(v, _Content) else v for v in values]

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, Read) and bool(self._values == other._values)
        except Exception:  # an object that cannot tell is taken for another one
            return False

    def __hash__(self) -> int:
        return hash(Read)


def without_arrays(tree: Any) -> Any:
    """`tree` without the arrays that are arguments of the program anyway."""
    return eqx.filter(tree, eqx.is_array, inverse=True)


def _read(roots: Any) -> list[Hashable]:
    # Code may read an attribute of an object that it was passed: all names count for
    # all objects, so the walk is repeated until no name is new.
    names, known = set(_CALLED), -1
    values = list[Hashable]()
    while known < len(names):
        known = len(names)
        values = list(_values(roots, names, set()))
    return values


def _values(value: object, names: set[str], seen: set[int]) -> Iterator[Hashable]:
    """What tells `value` from another, and so on for what it holds."""
    if isinstance(value, _PLAIN):
        yield repr(value)  # which tells 1 from 1.0, and 0.0 from -0.0
    elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        yield _Content(value)
    elif isinstance(value, jax.Array):
        yield _Same(value)
    elif id(value) not in seen:
        seen.add(id(value))
        yield _kind(value)
        for part in _parts(value, names):
            yield from _values(part, names, seen)


def _kind(value: object) -> Hashable:
    if isinstance(value, types.FunctionType):
        return _Same(value.__code__)
    hashable = type(value).__hash__ is not None and not _is_composed(value)
    return value if hashable else type(value)


def _is_composed(value: object) -> bool:
    """Whether `_parts` is all there is to `value`, whichever instance it is."""
    composed = (eqx.Module, list, tuple, dict, types.MethodType, functools.partial)
    return isinstance(value, composed) or not jtu.all_leaves([value])


def _parts(value: Any, names: set[str]) -> Iterator[object]:
    if isinstance(value, types.FunctionType):
        yield from _parts_of_function(value, names)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, set):
        yield frozenset(value)
    else:
        yield from _parts_of_object(value, names)


def _parts_of_function(fn: types.FunctionType, names: set[str]) -> Iterator[object]:
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    if not _is_installed(fn.__code__.co_filename):
        own = _names(fn.__code__)
        names |= own
        yield from (fn.__globals__[name] for name in own & fn.__globals__.keys())


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The globals and attributes that a function names, and functions inside it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _is_installed(filename: str | None) -> bool:
    return filename is None or filename.startswith(_INSTALLED)


def _parts_of_object(value: Any, names: set[str]) -> Iterator[object]:
    if isinstance(value, eqx.Module):
        yield from vars(value).values()
    elif not jtu.all_leaves([value]):
        yield from jtu.tree_leaves(value)
    elif isinstance(value, types.ModuleType):
        if not _is_installed(getattr(value, "__file__", None)):
            yield from _named(vars(value), names)
        return
    else:
        yield from _named(getattr(value, "__dict__", {}), names)
    for cls in (value if isinstance(value, type) else type(value)).__mro__[:-1]:
        for attribute in _named(vars(cls), names):
            yield from _undescribed(attribute, value)


def _named(scope: Mapping[str, object], names: set[str]) -> list[object]:
    return [scope[name] for name in names & scope.keys()]


def _undescribed(attribute: Any, value: object) -> Iterator[object]:
    """What a class attribute stands for in `value`: code, or what a slot holds."""
    if isinstance(attribute, property):
        yield attribute.fget
    elif isinstance(attribute, (staticmethod, classmethod)):
        yield attribute.__func__
    elif isinstance(attribute, types.MemberDescriptorType):
        yield getattr(value, attribute.__name__, None)
    else:
        yield attribute
