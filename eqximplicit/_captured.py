"""The arrays that a Python callable carries without showing them as arguments.

A solver may hold traced arrays in its closure. Tracing it to hoist them would forbid
solvers that JAX cannot trace (a Python loop with `float(...)`, SciPy, a growing list),
so they are found where Python keeps them: closure cells, defaults, bound objects,
partial arguments, and pytrees of all these.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer

from ._state import leaf_name, stop_gradient

F = TypeVar("F")


def _is_plain_function(x: object) -> bool:
    return isinstance(x, (types.FunctionType, types.MethodType, functools.partial))


def _holds_tracer(value: object, seen: frozenset[int] = frozenset()) -> bool:
    return any(True for _ in _tracers(value, "", seen))


def _cells(fn: types.FunctionType) -> Iterator[tuple[str, types.CellType]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018  (an empty cell raises)
        except ValueError:
            continue
        yield name, cell


def _parts(value: object, name: str) -> Iterator[tuple[str, object]]:
    """What a callable or a plain object holds, with the expression that reaches it."""
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
    elif hasattr(value, "__wrapped__"):
        yield name, value.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
        for key, attribute in vars(value).items():
            yield f"{name}.{key}", attribute


def _tracers(
    value: object, name: str, seen: frozenset[int]
) -> Iterator[tuple[str, Tracer[Any]]]:
    if id(value) in seen or len(seen) > 32:
        return
    seen = seen | {id(value)}
    for path, leaf in jtu.tree_leaves_with_path(value, is_leaf=_is_plain_function):
        leaf_label = leaf_name(name, path)
        if isinstance(leaf, Tracer):
            yield leaf_label, leaf
        elif not isinstance(leaf, (jax.Array, bool, int, float, complex, str)):
            for part_name, part in _parts(leaf, leaf_label):
                yield from _tracers(part, part_name, seen)


def captured_tracers(fn: Callable[..., Any]) -> list[tuple[str, Tracer[Any]]]:
    """The traced arrays that `fn` carries, each with the name that reaches it."""
    return list(_tracers(fn, getattr(fn, "__name__", "solver"), frozenset()))


def _detach_function(fn: types.FunctionType) -> types.FunctionType:
    # Only cells that hold a tracer are replaced, so that `nonlocal` counters and
    # recursive references go on pointing to the caller's own cells.
    def detach_cell(cell: types.CellType) -> types.CellType:
        return types.CellType(detach(cell.cell_contents))

    replaced = {
        name: detach_cell(cell)
        for name, cell in _cells(fn)
        if _holds_tracer(cell.cell_contents, frozenset({id(fn)}))
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
