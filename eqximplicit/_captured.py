"""The arrays that a Python callable carries without showing them as arguments.

A solver may hold traced arrays in its closure. Tracing it to hoist them would forbid
solvers that JAX cannot trace (a Python loop with `float(...)`, SciPy, a growing list),
so they are found where Python keeps them: closure cells, defaults, bound objects,
partial arguments, and pytrees of all these. An error names those in globals, too.
"""

import contextlib
import dis
import functools
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer

from ._state import stop_gradient
from ._walk import walk

F = TypeVar("F")

CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
_PLAIN = (jax.Array, bool, int, float, complex, str)
# Whose globals are not looked at: they hold nothing of the user.
_INSTALLED = (
    "<frozen ",
    *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")),
)
_Parts = Iterator[tuple[str, object]]


def _is_plain_function(x: object) -> bool:
    return isinstance(x, CALLABLES)


def _holds_tracer(value: object, apart: object = None) -> bool:
    return any(True for _ in _tracers(value, "", _parts, apart))


def _cells(fn: types.FunctionType) -> Iterator[tuple[str, types.CellType]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018  (an empty cell raises)
        except ValueError:
            continue
        yield name, cell


def parts_of_callable(value: object, name: str) -> _Parts:
    """What a function, method or partial holds, each with how to reach it."""
    if isinstance(value, types.FunctionType):
        for cell_name, cell in _cells(value):
            yield cell_name, cell.cell_contents
        for i, default in enumerate(value.__defaults__ or ()):
            yield f"default {i} of {value.__name__}", default
        for key, default in (value.__kwdefaults__ or {}).items():
            yield f"default `{key}` of {value.__name__}", default
    elif isinstance(value, types.MethodType):
        yield f"{name}.__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield f"{name}.func", value.func
        yield f"{name}.args", value.args
        yield f"{name}.keywords", value.keywords


def items(value: Any, name: str) -> _Parts:
    """What a container holds. As a pytree it might be cyclic, deep or of no order."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        if isinstance(item, Tracer) or not isinstance(item, _PLAIN):
            yield f"{name}[{key!r}]", item


def _parts(value: Any, name: str) -> _Parts:
    """What a callable or an object holds, with the expression that reaches it."""
    if _is_plain_function(value):
        yield from parts_of_callable(value, name)
    elif isinstance(value, (list, tuple, dict)):
        yield from items(value, name)
    elif not isinstance(value, (type, types.ModuleType, *_PLAIN)):
        if hasattr(value, "__wrapped__"):
            yield name, value.__wrapped__
        for key, attribute in (*_own(value), *_slots(value)):
            yield f"{name}.{key}", attribute


def _own(value: object) -> _Parts:
    yield from getattr(value, "__dict__", {}).items()


def _slots(value: object) -> _Parts:
    for cls in type(value).__mro__:
        for key, slot in vars(cls).items() if "__slots__" in vars(cls) else ():
            if isinstance(slot, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # an empty slot
                    yield key, slot.__get__(value)


def _parts_and_globals(value: Any, name: str) -> _Parts:
    if isinstance(value, types.MethodType):
        yield f"{name}.__func__", value.__func__
    yield from _parts(value, name)
    if isinstance(value, types.FunctionType):
        for key in _globals_of(value.__code__):
            if key in value.__globals__:
                yield key, value.__globals__[key]


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """The globals that code of the user reads, and functions inside it."""
    if code.co_filename.startswith(_INSTALLED):
        return frozenset()
    steps = dis.get_instructions(code)
    own = (str(step.argval) for step in steps if step.opname == "LOAD_GLOBAL")
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(own).union(*map(_globals_of, inner))


def _tracers(
    root: object, name: str, parts: Callable[[Any, str], _Parts], apart: object = None
) -> Iterator[tuple[str, Tracer[Any]]]:
    """The traced arrays that `root` holds; not those that only `apart` does."""
    for path, value in walk([(name, root)], parts, apart):
        if isinstance(value, Tracer):
            yield path, value


def captured_tracers(fn: Callable[..., Any]) -> list[tuple[str, Tracer[Any]]]:
    """The traced arrays that `fn` carries or reads, each with how to reach it."""
    name = getattr(fn, "__name__", "solver")
    return list(_tracers(fn, name, _parts_and_globals))


def _detach_function(fn: types.FunctionType) -> types.FunctionType:
    # Only cells that hold a tracer are replaced, so that `nonlocal` counters and
    # recursive references go on pointing to the caller's own cells.
    def detach_cell(cell: types.CellType) -> types.CellType:
        return types.CellType(detach(cell.cell_contents))

    replaced = {
        name: detach_cell(cell)
        for name, cell in _cells(fn)
        if _holds_tracer(cell.cell_contents, apart=fn)
    }
    closure = tuple(
        replaced.get(name, cell)
        for name, cell in zip(
            fn.__code__.co_freevars, fn.__closure__ or (), strict=True
        )
    )
    detached = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, detach(fn.__defaults__), closure
    )
    detached.__kwdefaults__ = detach(fn.__kwdefaults__)
    detached.__dict__.update(fn.__dict__)
    return detached


def _detach_leaf(leaf: Any) -> Any:
    if isinstance(leaf, types.MethodType):
        return types.MethodType(detach(leaf.__func__), detach(leaf.__self__))
    if isinstance(leaf, functools.partial):
        args, keywords = detach((leaf.args, leaf.keywords))
        return functools.partial(detach(leaf.func), *args, **keywords)
    if isinstance(leaf, types.FunctionType) and _holds_tracer(leaf):
        return _detach_function(leaf)
    if eqx.is_inexact_array(leaf):
        return stop_gradient(leaf)
    return leaf


def detach(fn: F) -> F:
    """`fn`, with no derivative through any array that it carries.

    Under an eager `jax.grad` the arrays become concrete again, so that a Python solver
    may ask for their values.
    """
    return jtu.tree_map(_detach_leaf, fn, is_leaf=_is_plain_function)
