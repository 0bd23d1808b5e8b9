"""Whether a program is compiled for one device.

A direct method looks at a state as a whole, and would gather one that is sharded. Where
a state lies is not known while a function is traced; the compiler is told.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Bool

_on_one_device_p = Primitive("on_one_device")


def on_one_device() -> Bool[Array, ""]:
    """A constant of the compiled program: true if all data is on one device.

    So it is in a `shard_map` over every axis of the mesh, where each device works on
    data of its own. A `lax.cond` on it is decided by the compiler, which drops the
    other branch.
    """
    return _on_one_device_p.bind()


def _is_local(axis_context: Any) -> bool:
    # JAX promises neither attribute; where they are missing, nothing is known.
    if hasattr(axis_context, "num_devices"):
        return axis_context.num_devices == 1
    mesh = getattr(axis_context, "mesh", None)
    manual = getattr(axis_context, "manual_axes", frozenset())
    return mesh is not None and set(manual) == set(mesh.axis_names)


def is_for_one_device(ctx: Any) -> bool:
    """The same as seen by the lowering of a primitive, from its context."""
    return _is_local(getattr(ctx.module_context, "axis_context", None))


def _lowered(ctx: Any) -> Any:
    constant = lambda: jnp.full((), is_for_one_device(ctx))
    return mlir.lower_fun(constant, multiple_results=False)(ctx)


_on_one_device_p.def_impl(lambda: jnp.asarray(jax.device_count() == 1))
_on_one_device_p.def_abstract_eval(lambda: ShapedArray((), jnp.dtype(bool)))
mlir.register_lowering(_on_one_device_p, _lowered)
