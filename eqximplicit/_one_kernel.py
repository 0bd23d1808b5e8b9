"""A small part of a program as one kernel of a CPU.

XLA makes many kernels of a loop, each of which takes some 10 ms to compile and, in
every step, longer to be started than a few numbers take to be computed. Of a call with
the attribute below it makes one kernel, which it does by itself for loops that touch
less than a kilobyte. Whatever the call contains must be what such a kernel can hold.
That is known of the versions of jaxlib below; elsewhere, over several devices, and
where the call contains anything else, it is a call like any other, which XLA inlines.
The environment variable `EQXIMPLICIT_ONE_KERNEL=0` makes it one everywhere.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import ShapedArray
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir, partial_eval as pe
from jaxtyping import Array, Float

from ._placement import is_for_one_device
from ._reach import inner_jaxprs

T = TypeVar("T")
_Call = jex.ClosedJaxpr

_KNOWN = ("0.10.",)
# Of XLA's options: when the libraries are called that no kernel can call.
_LIBRARIES = ("ynn", "onednn", "xnn")
_ATTRIBUTES = {"inlineable": "false", "xla_cpu_small_call": "true"}
# Of one array that is computed, and of one that is only read, as the matrix of a
# product is: beyond, several threads are worth their start. And of entries that are
# added up: beyond, XLA calls a library, which no kernel can.
_MOST_BYTES, _MOST_READ, _MOST_REDUCED = 2**16, 2**20, 2**12
_READ = "case dot_general if reshape return transpose while"
_COMPUTED = (
    "abs add and atan2 bitcast_convert broadcast_in_dim cbrt ceil clamp compare "
    "complex concatenate constant convert cosine count_leading_zeros divide "
    "dynamic_slice dynamic_update_slice exponential exponential_minus_one floor "
    "gather imag iota is_finite log log_plus_one logistic maximum minimum multiply "
    "negate not optimization_barrier or pad popcnt power real reduce remainder "
    "reverse round_nearest_afz round_nearest_even rsqrt select shift_left "
    "shift_right_arithmetic shift_right_logical sign sine slice sqrt subtract tan "
    "tanh xor"
)
_EXPANDED = (
    "acos acosh asin asinh atan atanh cosh digamma erf erf_inv erfc lgamma next_after "
    "polygamma sinh square tan zeta"
)


def _named(dialect: str, names: str) -> frozenset[str]:
    return frozenset(f"{dialect}.{name}" for name in names.split())


_READING = _named("stablehlo", _READ) | {"func.return"}
_PLAIN = _READING | _named("stablehlo", _COMPUTED) | _named("chlo", _EXPANDED)
_BYTES = {
    **{"i1": 1, "i8": 1, "ui8": 1, "i16": 2, "ui16": 2, "i32": 4, "ui32": 4, "i64": 8},
    **{"ui64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8},
    **{"complex<f32>": 8, "complex<f64>": 16},
}

# What a call is under `vmap`.
_kept: WeakKeyDictionary[_Call, dict[Any, _Call]] = WeakKeyDictionary()

_one_kernel_p = jex.Primitive("one_kernel")
_one_kernel_p.multiple_results = True
_body_p = jex.Primitive("one_kernel_body")
_body_p.multiple_results = True


def in_one_kernel(fn: Callable[[], T]) -> T:
    """Returns `fn()`, the operations of which are a kernel where they are few."""
    static: list[Any] = []

    def arrays() -> list[Any]:
        dynamic, rest = eqx.partition(fn(), eqx.is_array)
        leaves, treedef = jtu.tree_flatten(dynamic)
        static[:] = [treedef, rest]
        return leaves

    traced = jax.make_jaxpr(arrays)()
    treedef, rest = static
    if traced.effects or not _has_loop(traced.jaxpr):
        leaves = jex.jaxpr_as_fun(traced)()
    else:
        jaxpr = traced.jaxpr.replace(invars=traced.jaxpr.constvars, constvars=[])
        leaves = _one_kernel_p.bind(*traced.consts, call_jaxpr=_Call(jaxpr, []))
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)


def _has_loop(jaxpr: jex.Jaxpr) -> bool:
    is_loop = lambda eqn: eqn.primitive.name in ("while", "scan")
    inner = (jaxpr for eqn in jaxpr.eqns for jaxpr in inner_jaxprs(eqn))
    return any(map(is_loop, jaxpr.eqns)) or any(map(_has_loop, inner))


# --- The primitive --------------------------------------------------------------------


def _impl(*args: Any, call_jaxpr: _Call) -> list[Any]:
    return jex.jaxpr_as_fun(call_jaxpr)(*args)


def _abstract(*args: Any, call_jaxpr: _Call) -> list[ShapedArray]:
    del args
    return list(call_jaxpr.out_avals)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, call_jaxpr: _Call
) -> tuple[Sequence[Any], Sequence[Any]]:
    zero: Any = ad.Zero
    if all(type(t) is zero for t in tangents):
        out = _one_kernel_p.bind(*primals, call_jaxpr=call_jaxpr)
        return out, [zero.from_primal_value(x) for x in out]
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(jex.jaxpr_as_fun(call_jaxpr), tuple(primals), tuple(tangents))


def _batch(
    axis: Any, args: Sequence[Any], dims: Sequence[Any], *, call_jaxpr: _Call
) -> tuple[Sequence[Any], Sequence[Any]]:
    batched = [d is not None for d in dims]
    out_axes = [0 if b else None for b in _depends(call_jaxpr.jaxpr, batched)]
    if any(batched):
        # The rule of a branch, or of a loop, asks more than once.
        kept = _kept.setdefault(call_jaxpr, {})
        key = (axis, *dims, *map(jax.typeof, args))
        if key not in kept:
            kept[key] = _batched(axis, args, dims, out_axes, call_jaxpr)
        call_jaxpr = kept[key]
    return _one_kernel_p.bind(*args, call_jaxpr=call_jaxpr), out_axes


def _batched(
    axis: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    out_axes: Sequence[Any],
    call_jaxpr: _Call,
) -> _Call:
    fn, names = jex.jaxpr_as_fun(call_jaxpr), (axis.name, axis.size, axis.spmd_name)
    return jax.make_jaxpr(jax.vmap(fn, tuple(dims), out_axes, *names))(*args)


def _depends(jaxpr: jex.Jaxpr, given: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the given inputs; a loop is taken as a whole."""
    known = {v for v, g in zip(jaxpr.invars, given, strict=True) if g}
    is_known = lambda v: not isinstance(v, jex.Literal) and v in known
    for eqn in jaxpr.eqns:
        if any(map(is_known, eqn.invars)):
            known.update(eqn.outvars)
    return list(map(is_known, jaxpr.outvars))


def _lowered(ctx: Any, *args: Any, call_jaxpr: _Call) -> Any:
    # Without effects there are no tokens: each attempt has a context of its own.
    out = _called(ctx.replace(), *args, call_jaxpr=call_jaxpr)
    call = _call_of(out)
    if not _is_kernel(ctx, call):
        return out
    call.erase()
    kernel = jax.make_jaxpr(functools.partial(_with_witness, call_jaxpr))(*ctx.avals_in)
    ctx = ctx.replace(avals_out=kernel.out_avals)
    *out, witness = _called(ctx, *args, call_jaxpr=kernel)
    _mark(_call_of(witness))
    return out


_called = functools.partial(mlir.core_call_lowering, name="one_kernel")


def _with_witness(call_jaxpr: _Call, *args: Array) -> list[Array]:
    """The call, and an entry of every argument.

    An argument that nothing uses, after whatever XLA finds superfluous, is one that no
    kernel has: XLA ends the process. All are used by a result that nothing uses.
    """
    numbers = lax.concatenate([_first_of(x) for x in args], 0)
    return [*_body_p.bind(*args, call_jaxpr=call_jaxpr), numbers]


def _first_of(x: Array) -> Float[Array, " 1"]:
    first = lax.slice(x, [0] * x.ndim, [1] * x.ndim) if x.ndim else x
    first = lax.real(first) if jnp.iscomplexobj(first) else first
    return lax.reshape(lax.convert_element_type(first, jnp.float32), (1,))


def _has_number(aval: ShapedArray) -> bool:
    return 0 not in aval.shape and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _call_of(values: Any) -> Any:
    """The call that some values of the program are results of, if there is one."""
    owners = (
        getattr(value.owner, "operation", None) for value in jtu.tree_leaves(values)
    )
    calls = (owner for owner in owners if getattr(owner, "name", None) == "func.call")
    return next(calls, None)


def _is_kernel(ctx: Any, call: Any) -> bool:
    """Whether a call can be a kernel, and is worth being one, as a loop is."""
    on_cpu = tuple(ctx.module_context.platforms) == ("cpu",)
    if call is None or not (on_cpu and _is_known() and is_for_one_device(ctx)):
        return False
    if not ctx.avals_in or not all(map(_has_number, ctx.avals_in)):
        return False
    loops = False
    for operation in _operations(ctx, call):
        if not _is_small(operation):
            return False
        loops |= operation.name == "stablehlo.while"
    return loops


@functools.cache
def _is_known() -> bool:
    """Whether this XLA is known to make such kernels, and nobody objects."""
    libraries = any(name in os.environ.get("XLA_FLAGS", "") for name in _LIBRARIES)
    wanted = os.environ.get("EQXIMPLICIT_ONE_KERNEL", "1") != "0"
    return wanted and not libraries and version("jaxlib").startswith(_KNOWN)


def _mark(call: Any) -> None:
    ir: Any = mlir.ir
    attributes = {key: ir.StringAttr.get(value) for key, value in _ATTRIBUTES.items()}
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
    # XLA would put a constant in the place of the argument, which is unused then.
    with mlir.ir.InsertionPoint(call), call.location:
        hidden = stablehlo.OptimizationBarrierOp(list(call.operands))
    for i, value in enumerate(hidden.results):
        call.operands[i] = value


def _operations(ctx: Any, call: Any) -> Iterator[Any]:
    """All operations of the function that is called, and of those that it calls."""
    seen, waiting = set[str](), [call]
    while waiting:
        operation = waiting.pop()
        if operation.name == "func.call":
            name = mlir.ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
            if name not in seen:
                seen.add(name)
                waiting.append(ctx.module_context.symbol_table[name].operation)
            continue
        if operation.name != "func.func":
            yield operation
        for region in operation.regions:
            for block in region.blocks:
                waiting.extend(inner.operation for inner in block.operations)


def _is_small(operation: Any) -> bool:
    values = [*operation.operands, *operation.results]
    most = _MOST_READ if operation.name in _READING else _MOST_BYTES
    if any(_num_bytes(value.type) > most for value in values):
        return False
    if operation.name == "stablehlo.reduce":
        return all(_num_entries(x.type) < _MOST_REDUCED for x in operation.operands)
    if operation.name == "stablehlo.dot_general":
        return _is_small_product(operation)
    return operation.name in _PLAIN


def _is_small_product(operation: Any) -> bool:
    """Whether it is one with vectors: XLA calls a library for those of matrices."""
    axes = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
    left = (*axes.lhs_contracting_dimensions, *axes.lhs_batching_dimensions)
    right = (*axes.rhs_contracting_dimensions, *axes.rhs_batching_dimensions)
    shapes = [mlir.ir.RankedTensorType(x.type).shape for x in operation.operands]
    vector = any(len(s) == len(a) for s, a in zip(shapes, (left, right), strict=True))
    return vector and math.prod(shapes[0][i] for i in left) < _MOST_REDUCED


def _num_entries(kind: Any) -> int:
    return math.prod(mlir.ir.RankedTensorType(kind).shape)


def _num_bytes(kind: Any) -> float:
    """The bytes of an array; infinite where that is unknown, or it is none."""
    try:
        tensor = mlir.ir.RankedTensorType(kind)
    except ValueError:
        return math.inf
    if not tensor.has_static_shape:
        return math.inf
    return _BYTES.get(str(tensor.element_type), math.inf) * math.prod(tensor.shape)


_body_p.def_abstract_eval(_abstract)
mlir.register_lowering(_body_p, _called)
_one_kernel_p.def_impl(_impl)
_one_kernel_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_one_kernel_p] = _jvp
batching.fancy_primitive_batchers[_one_kernel_p] = _batch
pe.dce_rules[_one_kernel_p] = pe.dce_jaxpr_closed_call_rule
mlir.register_lowering(_one_kernel_p, _lowered)
