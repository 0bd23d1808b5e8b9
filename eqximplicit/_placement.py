"""What a program does on one device, and what it does on several.

A direct method looks at a state as a whole, and would gather one that is sharded. Where
a state lies is not known while a function is traced; the compiler is told.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

Args = TypeVar("Args")
T = TypeVar("T")
_Jaxpr = jex.ClosedJaxpr
_Flat = Callable[..., list[Any]]

_by_placement_p = jex.Primitive("by_placement")
_by_placement_p.multiple_results = True


def by_placement(
    on_one_device: Callable[[Args], T], on_several: Callable[[Args], T], args: Args
) -> T:
    """The result of one of two functions, whichever the program is compiled for.

    All data is on one device in a `shard_map` over every axis of the mesh, too, where
    each device works on data of its own. Both return the same pytree of arrays, of
    `args` alone: what is for several devices is traced when such a program is compiled.
    """
    dynamic, static = eqx.partition(args, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(dynamic)
    kept: list[Any] = []

    def flat(fn: Callable[[Args], T], *leaves: Any) -> list[Any]:
        args = eqx.combine(jtu.tree_unflatten(treedef, leaves), static)
        arrays, rest = eqx.partition(fn(args), eqx.is_array)
        found, structure = jtu.tree_flatten(arrays)
        kept[:] = [structure, rest]
        return found

    found = _bound(
        functools.partial(flat, on_one_device),
        functools.partial(flat, on_several),
        leaves,
    )
    structure, rest = kept
    return eqx.combine(jtu.tree_unflatten(structure, found), rest)


def is_for_one_device(ctx: Any) -> bool:
    """Whether the program is, as seen by the lowering of a primitive."""
    return _is_local(getattr(ctx.module_context, "axis_context", None))


def _is_local(axis_context: Any) -> bool:
    # JAX promises neither attribute; where they are missing, nothing is known.
    if hasattr(axis_context, "num_devices"):
        return axis_context.num_devices == 1
    mesh = getattr(axis_context, "mesh", None)
    manual = getattr(axis_context, "manual_axes", frozenset())
    return mesh is not None and set(manual) == set(mesh.axis_names)


def _bound(one: _Flat, several: _Flat, args: Sequence[Any]) -> list[Any]:
    traced = jax.make_jaxpr(one)(*args)
    jaxpr, count = traced.jaxpr, len(traced.consts)
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return _by_placement_p.bind(
        *traced.consts,
        *args,
        one=_Jaxpr(jaxpr.replace(constvars=[], invars=invars), []),
        several=lambda *given: several(*given[count:]),
    )


def _impl(*args: Any, one: _Jaxpr, several: _Flat) -> list[Any]:
    return (several if jax.device_count() > 1 else jex.jaxpr_as_fun(one))(*args)


def _abstract(*args: Any, one: _Jaxpr, several: _Flat) -> list[ShapedArray]:
    del args, several
    return list(one.out_avals)


def _batch(
    axis: Any, args: Sequence[Any], dims: Sequence[Any], *, one: _Jaxpr, several: _Flat
) -> tuple[Sequence[Any], Sequence[int | None]]:
    if all(dim is None for dim in dims):
        out = _by_placement_p.bind(*args, one=one, several=several)
        return out, [None] * len(out)
    names = (axis.name, axis.size, axis.spmd_name)
    lanes = lambda fn: jax.vmap(fn, tuple(dims), 0, *names)
    out = _bound(lanes(jex.jaxpr_as_fun(one)), lanes(several), args)
    return out, [0] * len(out)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, one: _Jaxpr, several: _Flat
) -> tuple[Sequence[Any], Sequence[Any]]:
    zero: Any = ad.Zero
    if all(type(t) is zero for t in tangents):
        out = _by_placement_p.bind(*primals, one=one, several=several)
        return out, [zero.from_primal_value(x) for x in out]
    # A choice that JAX can differentiate in reverse mode, too; solvers need none.
    no, yes = jnp.asarray(False), jnp.asarray(True)
    local = by_placement(lambda _: yes, lambda _: no, None)
    fn = jex.jaxpr_as_fun(one)
    choice = lambda *args: jax.lax.cond(local, fn, several, *args)
    return jax.jvp(choice, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _lowered(ctx: Any, *args: Any, one: _Jaxpr, several: _Flat) -> Any:
    if is_for_one_device(ctx):
        return _called(ctx, *args, call_jaxpr=one)
    return mlir.lower_fun(several, multiple_results=True)(ctx, *args)


_called = functools.partial(mlir.core_call_lowering, name="by_placement")
_by_placement_p.def_impl(_impl)
_by_placement_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_by_placement_p] = _jvp
batching.fancy_primitive_batchers[_by_placement_p] = _batch
mlir.register_lowering(_by_placement_p, _lowered)
