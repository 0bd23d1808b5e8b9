"""The scalars of a loop as one vector.

Each scalar that a compiled loop carries by itself costs a kernel to compile, with all
that leads to the scalar in it once more. So solvers carry theirs in one vector, and the
rules that change them are elementwise: they hold for scalars as for vectors.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

T = TypeVar("T")
Record = TypeVar("Record", bound=eqx.Module)


def packed(record: eqx.Module, dtype: Any) -> Float[Array, " n"]:
    """The fields of a record as one vector, an entry per field.

    **Arguments:**

    - `record`: a module whose fields are scalars, or vectors as long as it has fields.
    - `dtype`: of the vector. Flags become 0 or 1.
    """
    names = [f.name for f in dataclasses.fields(record)]
    n = len(names)
    fields = [jnp.broadcast_to(getattr(record, f), (n,)).astype(dtype) for f in names]
    return merged(fields)


def constant(
    kind: type[eqx.Module], infinite: Sequence[str], unit: Sequence[str], dtype: Any
) -> Float[Array, " n"]:
    """A record whose fields are infinite, one, or zero as all others; `packed`."""
    names = [f.name for f in dataclasses.fields(kind)]
    values = [np.inf if name in infinite else float(name in unit) for name in names]
    return jnp.asarray(np.array(values), dtype)


def updated(
    kind: type[eqx.Module], vector: Float[Array, " n"], **changes: Array
) -> Float[Array, " n"]:
    """Some fields of a packed record changed, to scalars or vectors as long as it."""
    numbers = {f.name: i for i, f in enumerate(dataclasses.fields(kind))}
    rows = {
        numbers[name]: jnp.broadcast_to(value, vector.shape).astype(vector.dtype)
        for name, value in changes.items()
    }
    return _with_rows(vector, rows)


def merged(arrays: Sequence[Array]) -> Array:
    """Returns the array whose row `i` is that of array `i`."""
    first, *others = arrays
    return _with_rows(first, dict(enumerate(others, 1)))


def _with_rows(x: Array, rows: Mapping[int, Array]) -> Array:
    number = _rows(x)
    out = x
    for i, row in rows.items():
        out = jax.lax.select(jax.lax.eq(number, jax.lax.full_like(number, i)), row, out)
    return out


def _rows(x: Array) -> Array:
    """The numbers of the rows, as if they depended on the entries of `x`.

    A mask that is a constant costs a little in every call of the program, and one that
    is the same in each turn of a loop is a kernel of its own before that loop.
    """
    rows = jax.lax.broadcasted_iota(np.int32, x.shape, 0)
    always = jax.lax.bitwise_or(jax.lax.eq(x, x), jax.lax.ne(x, x))
    return rows * always.astype(rows.dtype)


def unpacked(kind: type[Record], vector: Float[Array, " n"]) -> Record:
    """The record of which `vector` is `packed`."""
    entries = jax.lax.split(vector, [1] * vector.size)
    return kind(*[jax.lax.squeeze(x, (0,)) for x in entries])


def changed(record: Record, **changes: Array) -> Record:
    """As `dataclasses.replace`, in the dtype that the fields have."""
    cast: dict[str, Any] = {
        name: value.astype(getattr(record, name).dtype)
        for name, value in changes.items()
    }
    return dataclasses.replace(record, **cast)


def where(pred: Array, x: Array | float, y: Array | float) -> Array:
    """`jnp.where` for arguments of one shape, and without its `jit` to be traced.

    Of two numbers the result is weakly typed, as there.
    """
    arrays = [z for z in (x, y) if isinstance(z, jax.Array)]
    if not arrays:
        return jnp.where(pred, x, y)
    strong = [z for z in arrays if not z.weak_type]
    dtype = (strong or arrays)[0].dtype
    both = [
        z.astype(dtype)
        if isinstance(z, jax.Array)
        else jax.lax.full_like(pred, z, dtype)
        for z in (x, y)
    ]
    return jax.lax.select(pred, *both)


def _always(vector: Array) -> Array:
    """True everywhere, unknown to the compiler (the vector holds no NaN).

    What depends on it is not taken apart into scalars, nor computed again in all that
    uses it; the control flow then compiles to one small kernel.
    """
    return vector == vector


def widened(tree: T, vector: Float[Array, " n"]) -> T:
    """Scalars as vectors like `vector`."""
    always = _always(vector)
    zeros: dict[Any, Array] = {}

    def leaf(x: Array) -> Array:
        if x.dtype not in zeros:
            zeros[x.dtype] = jax.lax.full_like(vector, 0, x.dtype)
        wide = jax.lax.broadcast_in_dim(x, vector.shape, range(x.ndim))
        return jax.lax.select(always, wide, zeros[x.dtype])

    return jtu.tree_map(leaf, tree)


def settled(new: Array, vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """Returns `new`, which a division by one keeps from being computed twice."""
    one, two = (jax.lax.full_like(new, value) for value in (1, 2))
    return new / jax.lax.select(_always(vector), one, two)
