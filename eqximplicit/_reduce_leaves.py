"""One reduction of the leaves of a small pytree, which would have a kernel each.

Over several devices, and on an accelerator, each leaf is reduced where it is.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ._placement import is_for_one_device
from ._reduce import FEW, is_known, OPERATIONS, reduced

# Entries of all leaves, and of all lanes: beyond, to lay them side by side costs more.
_MOST = 1024

_together_p = Primitive("reduce_leaves")


def reduced_together(leaves: list[Array], kind: str) -> Array:
    """The reduction over all entries of all leaves, by "sum", "max" or "or"."""
    if is_joined(leaves):
        return _together_p.bind(*leaves, kind=kind, lanes=0)
    return _leaf_by_leaf(*leaves, kind=kind, lanes=0)


def is_joined(leaves: list[Array]) -> bool:
    """Whether a kernel is saved, and the entries are few."""
    if any(x.dtype != leaves[0].dtype for x in leaves):
        return False
    if not all(is_known(x, tuple(range(x.ndim)), _MOST) for x in leaves):
        return False
    several = sum(x.size > FEW for x in leaves) > 1
    return several and sum(x.size for x in leaves) <= _MOST


def _leaf_by_leaf(*leaves: Array, kind: str, lanes: int) -> Array:
    over = lambda x: tuple(range(lanes, x.ndim))
    found = [reduced(x, kind, over(x)) for x in leaves]
    return functools.reduce(OPERATIONS[kind], found)


def _side_by_side(*leaves: Array, kind: str, lanes: int) -> Array:
    rows = [lax.reshape(x, (*x.shape[:lanes], _entries(x, lanes))) for x in leaves]
    return reduced(lax.concatenate(rows, lanes), kind, (lanes,))


def _entries(x: Any, lanes: int) -> int:
    return math.prod(x.shape[lanes:])


def _lowered(ctx: Any, *leaves: Any, kind: str, lanes: int) -> Any:
    on_cpu = tuple(ctx.module_context.platforms) == ("cpu",)
    sizes: list[Any] = [math.prod(aval.shape) for aval in ctx.avals_in]
    few = all(isinstance(size, int) for size in sizes) and sum(sizes) <= _MOST
    joined = on_cpu and few and is_for_one_device(ctx)
    fn = functools.partial(
        _side_by_side if joined else _leaf_by_leaf, kind=kind, lanes=lanes
    )
    return mlir.lower_fun(fn, multiple_results=False)(ctx, *leaves)


def _abstract(*leaves: Any, kind: str, lanes: int) -> ShapedArray:
    del kind
    return ShapedArray(leaves[0].shape[:lanes], leaves[0].dtype)


def _jvp(primals: Any, tangents: Any, *, kind: str, lanes: int) -> Any:
    fn = functools.partial(_leaf_by_leaf, kind=kind, lanes=lanes)
    return jax.jvp(fn, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batch(args: Any, dims: Any, *, kind: str, lanes: int) -> Any:
    count = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    rows = [
        jnp.broadcast_to(x, (count, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    ]
    return _together_p.bind(*rows, kind=kind, lanes=lanes + 1), 0


_together_p.def_impl(_leaf_by_leaf)
_together_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_together_p] = _jvp
batching.primitive_batchers[_together_p] = _batch
mlir.register_lowering(_together_p, _lowered, inline=False)
