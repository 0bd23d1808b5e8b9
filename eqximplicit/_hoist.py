"""A condition whose function is traced: what that captured is a leaf like any other."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Jaxpr

from ._condition import AbstractCondition
from ._coupling import coupled_axes
from ._pair import check_no_pair
from ._state import struct_of

_Condition = TypeVar("_Condition", bound=AbstractCondition[Any, Any])


class _Hoisted(eqx.Module):
    """A function whose captured arrays are leaves; its output is `(out, aux)`."""

    fn: Callable[..., Any]
    takes_aux: bool = eqx.field(static=True)

    def __call__(self, y: Any, args: Any, aux: Any = None) -> Any:
        out = self.fn(y, args, aux if self.takes_aux else None)
        leaves, structure = jtu.tree_flatten(out)
        structs = jtu.tree_leaves(self.out_struct)
        pairs = zip(structs, leaves, strict=True)
        return jtu.tree_unflatten(structure, [_in_dtype_of(*pair) for pair in pairs])

    @property
    def out_struct(self) -> tuple[Any, Any]:
        """Shapes and dtypes of the output and of the auxiliary output."""
        return cast(Any, self.fn).out_struct

    @property
    def jaxpr(self) -> Jaxpr:
        return cast(Any, self.fn).jaxpr


def hoist(condition: _Condition, y: Any, args: Any, aux: Any = None) -> _Condition:
    """The same condition, with every array that `fn` captured as a leaf of its pytree.

    Runs `fn` once, on tracers. Its output is made of arrays and has been checked. A
    condition that is hoisted already is returned as it is.

    **Raises:** `ValueError` if the output does not fit the state.
    """
    if isinstance(condition.fn, _Hoisted):
        return condition

    def call(y: Any, args: Any, aux: Any) -> Any:
        out, fn_aux = condition.call(y, args, aux)
        check = lambda out: condition.check(out, struct_of(y))
        if condition.has_aux:
            check(struct_of(out))
        else:
            check_no_pair(check, struct_of(out), "function")
        return out, fn_aux

    given = aux if condition.takes_aux else None
    fn = eqx.filter_closure_convert(call, y, args, given)
    _refuse_coupled_lanes(cast(Any, fn), y)
    fn = _Hoisted(fn, condition.takes_aux)
    return dataclasses.replace(condition, fn=fn, has_aux=True, takes_aux=True)


def _refuse_coupled_lanes(converted: Any, y: Any) -> None:
    num_state, num_out = (len(jtu.tree_leaves(x)) for x in (y, converted.out_struct[0]))
    if axes := coupled_axes(converted.jaxpr, num_state, num_out):
        raise ValueError(
            f"The function couples the lanes of the mapped axis {axes[0]!r} through "
            "the state, by a collective, so that no lane has a solution of its own. "
            "Make one state of all lanes: solve outside of the `vmap` or `shard_map`, "
            "and map inside of the function."
        )


def out_struct(hoisted: AbstractCondition[Any, Any]) -> tuple[Any, Any]:
    """Shapes and dtypes of what the function of a hoisted condition returns."""
    return cast(_Hoisted, hoisted.fn).out_struct


def jaxpr(hoisted: AbstractCondition[Any, Any]) -> Jaxpr:
    """The jaxpr of the function of a hoisted condition."""
    return cast(_Hoisted, hoisted.fn).jaxpr


def _in_dtype_of(struct: object, leaf: Any) -> Any:
    """`leaf`, as an array if it is to be one: a constant comes as a literal."""
    given = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
    declared = isinstance(struct, jax.ShapeDtypeStruct)
    return jnp.asarray(leaf, struct.dtype) if declared and not given else leaf
