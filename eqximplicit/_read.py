"""What a Python callable reads that nobody passes to it, as it is now.

A compiled solve is kept under its callables. A callable stays the same when an array
that it captured is bound anew, an attribute of its object is set, or a NumPy array is
changed in place; the program compiled from it does not. So a solve is kept under what
its callables read, too: closure cells, defaults, the globals and attributes that their
code names, and whatever these hold. Operators, `x[k]`, `for`, descriptors and
`__getattr__` call methods that no code names, so the special methods of an object count
as called. Looking runs no code of the user: it reads dictionaries, slots and bytecode.
"""

import contextlib
import dis
import functools
import os
import sysconfig
import types
from collections import ChainMap, UserDict, UserList, UserString
from collections.abc import Hashable, Iterator, Mapping, Set
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from ._held import held, PLAIN

# Installed code is taken not to bind its own globals anew; nor do we.
_INSTALLED = (
    "<frozen ",  # modules of the standard library
    os.path.dirname(__file__),
    *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")),
)
# What calls that no code names read of an object, beside its special methods.
_CALLED = frozenset({"__call__", "__wrapped__"})
_MAKING = frozenset({"__new__", "__init__", "__post_init__"})
# No number comes of these, and they read whatever there is. The last two count for
# code that compares (`_read_by`): those that a dataclass is given read every field.
_APART = _MAKING.union(
    "__init_subclass__ __subclasshook__ __class_getitem__ __set_name__".split(),
    "__setattr__ __delattr__ __del__ __dir__ __sizeof__ __hash__".split(),
    "__repr__ __str__ __format__ __getstate__ __setstate__".split(),
    "__reduce__ __reduce_ex__ __eq__ __ne__".split(),
)
# Attributes that a class statement makes of itself, and methods written in C.
_IDLE = frozenset(
    {
        *(*PLAIN, tuple, dict, frozenset),
        types.WrapperDescriptorType,
        types.MethodDescriptorType,
        types.ClassMethodDescriptorType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        types.BuiltinFunctionType,
    }
)
# The attributes of a type that C code made once and for all are not bound anew.
_IMMUTABLE = 1 << 8  # `Py_TPFLAGS_IMMUTABLETYPE`
# What is no more than its attributes, whatever they are called.
_WHOLE = (eqx.Module, np.ma.MaskedArray, ChainMap, UserDict, UserList, UserString)
_ARRAYS = (jax.Array, Tracer)
_COMPOSED = (eqx.Module, list, tuple, dict, types.MethodType, functools.partial)

# By the class, not `__class__`, which an object may make up; and from memory, as to ask
# an abstract class is slow.
_extends = functools.lru_cache(maxsize=4096)(issubclass)


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
    # all objects, so the walk is repeated where a later name would have found more.
    names = set(_CALLED)
    while True:
        walk = _Walk(names)
        values = walk.values(roots)
        if all(len(names & scope.keys()) == found for scope, found in walk.found):
            return values


class _Walk:
    """One way through all that some value holds, as far as `names` names it."""

    def __init__(self, names: set[str]):
        self.names = names
        self.seen = dict[int, int]()
        self.slots = dict[int, list[types.MemberDescriptorType]]()
        self.found = list[tuple[Mapping[str, object], int]]()

    def values(self, root: object) -> list[Hashable]:
        """What tells `root` from another. No recursion: what is held may be deep."""
        values, left = list[Hashable](), [root]
        alive = list[object]()  # or an `id` could come again
        while left:
            value = left.pop()
            if (single := _single(value)) is not None:
                values.append(single)
            elif id(value) in self.seen:
                values.append(self.seen[id(value)])
            else:
                self.seen[id(value)] = len(self.seen)
                alive.append(value)
                parts = list(self.parts(value))
                values += (_kind(value), len(parts))
                left += parts
        return values

    def parts(self, value: Any) -> Iterator[object]:
        if isinstance(value, types.FunctionType):
            yield from self.parts_of_function(value)
        elif isinstance(value, types.ModuleType):
            if not _is_installed(getattr(value, "__file__", None)):
                yield from self.named(vars(value))
                yield from _named(vars(value), {"__getattr__"})
        else:
            yield from held(value)
            yield from self.parts_by_class(value)  # whose code names attributes
            if isinstance(value, type):
                yield from self.parts_of_class(value)
            else:
                yield from self.attributes(value)

    def attributes(self, value: object) -> Iterator[object]:
        try:  # past a `__getattribute__` of the user
            own: dict[str, object] = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        whole = _extends(type(value), _WHOLE)
        yield from own.values() if whole else self.named(own)

    def parts_of_function(self, fn: types.FunctionType) -> Iterator[object]:
        for cell in fn.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        yield from fn.__defaults__ or ()
        yield from (fn.__kwdefaults__ or {}).values()
        yield from self.named(fn.__dict__)
        yield from _named(fn.__globals__, self.own_names(fn))

    def own_names(self, fn: types.FunctionType) -> Set[str]:
        if _is_installed(fn.__code__.co_filename):
            return frozenset()
        own = _names(fn.__code__)
        self.names |= own
        return own

    def parts_of_class(self, value: type) -> Iterator[object]:
        """What is read of a class that code may call."""
        for cls in value.__mro__[:-1]:
            yield from self.read_of(cls)
            makers = _named(vars(cls), _MAKING)
            yield from (maker for maker in makers if _is_followed(maker))

    def parts_by_class(self, value: object) -> Iterator[object]:
        """What the class of `value` has for all of its objects, once; and slots."""
        for cls in type(value).__mro__[:-1]:
            if id(cls) not in self.slots:
                read = self.read_of(cls)
                slots = [a for a in read if isinstance(a, types.MemberDescriptorType)]
                self.slots[id(cls)] = slots
                yield from read
            for slot in self.slots[id(cls)]:
                with contextlib.suppress(AttributeError):  # an empty slot
                    yield slot.__get__(value)

    def read_of(self, cls: type) -> list[object]:
        if cls.__flags__ & _IMMUTABLE:
            return []
        scope = vars(cls)
        special = (scope[name] for name in _special(tuple(scope)))
        called = [attribute for attribute in special if _is_followed(attribute)]
        for attribute in called:
            if isinstance(attribute, types.FunctionType):
                self.own_names(attribute)
        return self.named(scope) + called

    def named(self, scope: Mapping[str, object]) -> list[object]:
        found = _named(scope, self.names)
        self.found.append((scope, len(found)))
        return found


@functools.lru_cache(maxsize=4096)
def _special(names: tuple[str, ...]) -> list[str]:
    special = (name for name in names if name.startswith("__") and name.endswith("__"))
    return [name for name in special if name not in _APART]


def _is_followed(attribute: Any) -> bool:
    """Whether calling it may run code that is not installed."""
    if type(attribute) in _IDLE:
        return False
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    if isinstance(attribute, types.FunctionType):
        wraps = bool(attribute.__dict__)  # `__wrapped__` is there
        return wraps or not _is_installed(attribute.__code__.co_filename)
    return callable(attribute) or hasattr(type(attribute), "__get__")


def _single(value: Any) -> Hashable | None:
    """What tells a value that holds no others."""
    kind = type(value)
    if kind in PLAIN:
        return repr(value)  # which tells 1 from 1.0, and 0.0 from -0.0
    if kind is np.ndarray or issubclass(kind, np.generic):
        return None if value.dtype.hasobject else _Content(value)
    return _Same(value) if _extends(kind, _ARRAYS) else None


def _kind(value: Any) -> Hashable:
    kind = type(value)
    if kind is types.FunctionType:
        return _Same(value.__code__)
    # For these the parts are all there is, whichever instance it is.
    composed = kind.__hash__ is None or _extends(kind, _COMPOSED)
    return kind if composed or not jtu.all_leaves([value]) else value


def _named(scope: Mapping[str, object], names: Set[str]) -> list[object]:
    return [scope[name] for name in names & scope.keys()]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The globals and attributes that a function reads, and functions inside it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(_read_by(code)).union(*map(_names, inner))


def _read_by(code: types.CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasname and not step.opname.startswith("STORE"):
            yield str(step.argval)
        elif step.opname == "CONTAINS_OP" or step.argval in ("==", "!="):
            yield from ("__eq__", "__ne__")


def _is_installed(filename: str | None) -> bool:
    return filename is None or filename.startswith(_INSTALLED)
