"""Which entries of a linear map can be non-zero: one rule per JAX primitive.

Every intermediate value that depends on the input carries a boolean CSR matrix: row
`i` holds the input entries on which flat element `i` may depend. The rules look at
shapes and at concrete integers only, never at floating-point values, so that the
result holds for all values and can be found while tracing.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer

from ._equation import Equation, evaluated
from ._moves import moved, MOVES

Pattern: TypeAlias = Any  # sp.csr_array of booleans; SciPy has no static types


class UnknownPrimitive(Exception):
    """A primitive, or an index known only at run time, has no rule here."""


class TooDense(Exception):
    """A pattern has more entries than is worth following."""


class Traced:
    """What is known of one intermediate value: its dependence and, maybe, its value."""

    def __init__(
        self, pattern: Pattern | None = None, known: np.ndarray | None = None
    ) -> None:
        self.pattern = pattern
        self.known = known


Rule = Callable[[Equation, list[Traced], int], Pattern | None]


def _size(aval: Any) -> int:
    return int(np.prod(aval.shape, dtype=np.int64))


def _guard(nnz: int, limit: int) -> None:
    if nnz > limit:
        raise TooDense


def _union(patterns: Sequence[Pattern], limit: int) -> Pattern:
    out = patterns[0]
    for pattern in patterns[1:]:
        out = (out + pattern).tocsr()
    _guard(out.nnz, limit)
    return out


def _take_rows(pattern: Pattern, ids: np.ndarray, limit: int) -> Pattern:
    """Row `k` of the result is row `ids[k] - 1`, or empty where `ids[k] <= 0`."""
    ids = ids.reshape(-1)
    counts = np.append(0, np.diff(pattern.indptr))
    _guard(int(counts[np.maximum(ids, 0)].sum()), limit)
    (kept,) = np.nonzero(ids > 0)
    return _chosen(ids.size, kept, ids[kept] - 1, pattern)


def _chosen(size: int, rows: np.ndarray, cols: np.ndarray, right: Pattern) -> Pattern:
    ones = np.ones(rows.size, bool)
    left = sp.csr_array((ones, (rows, cols)), shape=(size, right.shape[0]))
    return (left @ right).tocsr()


def _elementwise(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    shape = eqn.outvars[0].aval.shape
    found = [
        _repeated(traced.pattern, var.aval.shape, shape, limit)
        for var, traced in zip(eqn.invars, ins, strict=True)
        if traced.pattern is not None
    ]
    return _union(found, limit)


def _repeated(
    pattern: Pattern, shape: Sequence[int], wide: Sequence[int], limit: int
) -> Pattern:
    """A scalar, and along an axis a single entry, is that of all along it."""
    if tuple(shape) == tuple(wide):
        return pattern
    labels = np.arange(1, pattern.shape[0] + 1).reshape(shape)
    return _take_rows(pattern, np.broadcast_to(labels, wide), limit)


def _select(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    if ins[0].pattern is not None:
        raise UnknownPrimitive(eqn.primitive.name)
    return _elementwise(eqn, ins, limit)


def _labels(eqn: Equation, ins: list[Traced]) -> tuple[list[np.ndarray], Any]:
    """Labels 1, 2, ... for the elements that depend on the input, 0 for the rest."""
    ids, found, start = [], [], 1
    for var, value in zip(eqn.invars, ins, strict=True):
        shape: tuple[int, ...] = var.aval.shape
        if value.pattern is None:
            ids.append(np.zeros(shape, np.int64))
        else:
            stop = start + _size(var.aval)
            ids.append(np.arange(start, stop).reshape(shape))
            found.append(value.pattern)
            start = stop
    return ids, sp.vstack(found, format="csr")


def _moving(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    ids, stacked = _labels(eqn, ins)
    return _take_rows(stacked, moved(eqn, ids), limit)


def _indexed(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    """`gather`, `dynamic_slice`, ...: moves entries to where known integers say."""
    ids, stacked = _labels(eqn, ins)
    operands: list[Any] = []
    for var, value, label in zip(eqn.invars, ins, ids, strict=True):
        if np.issubdtype(var.aval.dtype, np.integer):
            if value.known is None:
                raise UnknownPrimitive(f"{eqn.primitive.name} with traced indices")
            operands.append(value.known)
        else:
            operands.append(label.astype(np.int32))
    return _take_rows(stacked, _evaluate(eqn, operands), limit)


def _evaluate(eqn: Equation, operands: Sequence[Any]) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        arrays = [jax.numpy.asarray(x) for x in operands]
        return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))


def _scatter_add(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    operand, index, updates = ins
    if index.known is None:
        raise UnknownPrimitive("scatter-add with traced indices")
    found = [] if operand.pattern is None else [operand.pattern]
    if updates.pattern is not None:
        target = _destinations(eqn, index.known)
        (kept,) = np.nonzero(target > 0)
        size = _size(eqn.outvars[0].aval)
        found.append(_chosen(size, target[kept] - 1, kept, updates.pattern))
    return _union(found, limit)


def _destinations(eqn: Equation, index: np.ndarray) -> np.ndarray:
    """The label of the element to which each update is added; 0 where dropped."""
    out, moved = eqn.outvars[0].aval, eqn.invars[2].aval
    with jax.ensure_compile_time_eval():
        dtype = jax.dtypes.canonicalize_dtype(float)
        _guard(_size(out), 2 ** (24 if dtype == np.float32 else 53))

        def place(updates: jax.Array) -> jax.Array:
            zeros = jax.numpy.zeros(out.shape, dtype)
            where = jax.numpy.asarray(index)
            return eqn.primitive.bind(zeros, where, updates, **eqn.params)

        struct = jax.ShapeDtypeStruct(moved.shape, dtype)
        labels = jax.numpy.arange(1, _size(out) + 1, dtype=dtype).reshape(out.shape)
        (taken,) = jax.linear_transpose(place, struct)(labels)
    return np.asarray(taken).reshape(-1).astype(np.int64)


def _reduce_sum(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    return _contract(
        ins[0].pattern, eqn.invars[0].aval.shape, eqn.params["axes"], limit
    )


def _contract(
    pattern: Pattern | None, shape: Sequence[int], axes: Sequence[int], limit: int
) -> Pattern:
    assert pattern is not None
    _guard(pattern.nnz, limit)
    kept = [1 if a in axes else s for a, s in enumerate(shape)]
    size = int(np.prod(kept, dtype=np.int64))
    rows = np.broadcast_to(np.arange(size).reshape(kept), shape).reshape(-1)
    return _chosen(size, rows, np.arange(rows.size), pattern)


def _dot_general(eqn: Equation, ins: list[Traced], limit: int) -> Pattern | None:
    """Each side is summed over its contracted axes, then repeated along the other's."""
    contracted, batch = eqn.params["dimension_numbers"]
    found: list[Pattern] = []
    free = [
        [a for a in range(len(v.aval.shape)) if a not in (*contracted[s], *batch[s])]
        for s, v in enumerate(eqn.invars)
    ]
    shape = eqn.outvars[0].aval.shape
    for side, (var, value) in enumerate(zip(eqn.invars, ins, strict=True)):
        if value.pattern is None:
            continue
        reduced = _contract(value.pattern, var.aval.shape, contracted[side], limit)
        kept = [a for a in range(len(var.aval.shape)) if a not in contracted[side]]
        labels = np.arange(1, reduced.shape[0] + 1)
        labels = labels.reshape([var.aval.shape[a] for a in kept])
        order = [kept.index(a) for a in (*batch[side], *free[side])]
        wide = list(shape[: len(batch[side])])
        wide += [s if side == 0 else 1 for s in shape[len(wide) :][: len(free[0])]]
        wide += [s if side == 1 else 1 for s in shape[len(wide) :]]
        labels = np.broadcast_to(labels.transpose(order).reshape(wide), shape)
        found.append(_take_rows(reduced, labels, limit))
    return _union(found, limit)


_RULES: dict[str, Rule] = {
    "select_n": _select,
    "scatter-add": _scatter_add,
    "reduce_sum": _reduce_sum,
    "dot_general": _dot_general,
    **dict.fromkeys(
        "add add_any sub mul div neg convert_element_type real imag conj complex copy "
        "copy_p reduce_precision".split(),
        _elementwise,
    ),
    **dict.fromkeys(MOVES, _moving),
    **dict.fromkeys(
        "gather dynamic_slice dynamic_update_slice scatter".split(), _indexed
    ),
}


def _constant(eqn: Equation, ins: list[Traced]) -> list[Traced]:
    """Folds integers and booleans; everything else that is constant stays unknown."""
    avals = [v.aval for v in eqn.outvars]
    plain = len(avals) == 1 and avals[0].dtype.kind in "iub"
    if not plain or any(t.known is None for t in ins) or eqn.effects:
        return [Traced() for _ in avals]
    return [Traced(known=_evaluate(eqn, [t.known for t in ins]))]


def _inner(eqn: Equation) -> jex.ClosedJaxpr | None:
    """The body of a call (`jit`, `custom_jvp_call`, `remat`, ...), if it is one."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(key)
        if isinstance(body, jex.Jaxpr) and not body.constvars:
            body = jex.ClosedJaxpr(body, ())
        if isinstance(body, jex.ClosedJaxpr) and _is_called(eqn, body.jaxpr):
            return body
    return None


def _is_called(eqn: Equation, body: jex.Jaxpr) -> bool:
    """Whether `body` takes what the equation does: not so that of a reduction."""
    of = lambda atoms: [getattr(a.aval, "shape", None) for a in atoms]
    inputs, outputs = of(body.invars), of(body.outvars)
    return inputs == of(eqn.invars) and outputs == of(eqn.outvars)


def _step(eqn: Equation, ins: list[Traced], limit: int) -> list[Traced]:
    body = _inner(eqn)
    if body is not None:
        consts = [Traced(known=known_value(c)) for c in body.consts]
        return propagate(body.jaxpr, consts, ins, limit)
    if all(t.pattern is None for t in ins):
        return _constant(eqn, ins)
    rule = _RULES.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1:
        raise UnknownPrimitive(eqn.primitive.name)
    return [Traced(rule(eqn, ins, limit))]


def known_value(x: Any) -> np.ndarray | None:
    """The value of a concrete array of integers or booleans, else `None`."""
    if isinstance(x, Tracer) or not hasattr(x, "dtype"):
        return None
    return np.asarray(x) if np.dtype(x.dtype).kind in "iub" else None


def propagate(
    jaxpr: jex.Jaxpr, consts: Sequence[Traced], args: Sequence[Traced], limit: int
) -> list[Traced]:
    """The dependence of every output of `jaxpr` on the input entries.

    **Arguments:**

    - `jaxpr`: linear in those arguments that carry a pattern.
    - `consts`, `args`: what is known of its constants and arguments.
    - `limit`: the largest number of entries that any pattern may have.

    **Returns:** one `Traced` per output.

    **Raises:** `UnknownPrimitive`, `TooDense`.
    """

    def step(eqn: Equation, ins: list[Traced]) -> list[Traced]:
        return _step(eqn, ins, limit)

    def literal(atom: Any) -> Traced:
        return Traced(known=known_value(np.asarray(atom.val)))

    return evaluated(jaxpr, consts, args, step, literal)
