r"""The measured residual of a linear solve, and the algebra on pytrees that it needs.

Nothing here ravels: a dot product contracts each leaf over all its axes, so that shapes
and shardings of a state survive. All leaves have one real dtype.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree, ShapeDtypeStruct
from .._state import num_entries

T = TypeVar("T")
Stats = dict[str, Any]
Answer = tuple[PyTree[Array], lx.RESULTS, Stats]


def dot(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    """The Euclidean inner product of two vectors of one structure."""
    terms = [
        jnp.tensordot(a, b, axes=a.ndim, precision=jax.lax.Precision.HIGHEST)
        for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True)
    ]
    return jtu.tree_reduce(jnp.add, terms)


def norm(x: PyTree[Array]) -> Float[Array, ""]:
    """The Euclidean norm of a vector."""
    return jnp.sqrt(dot(x, x))


def add(x: T, y: T) -> T:
    """The vector `x + y`."""
    return jtu.tree_map(jnp.add, x, y)


def minus(x: T, y: T) -> T:
    """The vector `x - y`."""
    return jtu.tree_map(jnp.subtract, x, y)


def scale(a: Array | float, x: T) -> T:
    """The vector `a x`."""
    return jtu.tree_map(lambda leaf: a * leaf, x)


def where(pred: Bool[Array, ""], x: T, y: T) -> T:
    """`x` where `pred`, else `y`."""
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


def zeros_like(x: T) -> T:
    """The zero vector."""
    return jtu.tree_map(jnp.zeros_like, x)


@custom_vmap
def any_lane(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `pred` holds in any lane of all enclosing `jax.vmap`s.

    A `lax.cond` on it stays a branch under `vmap`, where one on `pred` would run both
    sides for every lane. Both branches must then be right for every lane.
    """
    return pred


@any_lane.def_vmap
def _any_lane_vmap(
    axis_size: Any, in_batched: list[bool], pred: Bool[Array, " lanes"]
) -> tuple[Bool[Array, ""], bool]:
    del axis_size, in_batched
    return any_lane(jnp.any(pred, axis=0)), False


def epsilon(x: PyTree[Any]) -> float:
    """Machine epsilon of the dtype of the leaves (arrays or structs)."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(x))


def size(x: PyTree[Any]) -> int:
    """The number of entries of all leaves (arrays or structs)."""
    return sum(num_entries(leaf) for leaf in jtu.tree_leaves(x))


def structure(operator: lx.AbstractLinearOperator) -> PyTree[ShapeDtypeStruct]:
    """The structure of the vectors on which a square operator acts.

    **Raises:** `ValueError` if the operator is not square, is complex, or mixes dtypes.
    """
    into, out = operator.in_structure(), operator.out_structure()
    same = jtu.tree_structure(into) == jtu.tree_structure(out)
    if not same or [x.shape for x in jtu.tree_leaves(into)] != [
        x.shape for x in jtu.tree_leaves(out)
    ]:
        raise ValueError(
            f"This linear solver needs a square system; got {operator.out_size()} "
            f"equations in {operator.in_size()} unknowns, or different structures. "
            "Use `LeastNorm()`, or state the problem as least squares."
        )
    require_real(operator)
    return into


def require_real(operator: lx.AbstractLinearOperator) -> None:
    """Refuses complex and mixed dtypes.

    **Raises:** `ValueError` naming the dtypes.
    """
    leaves = jtu.tree_leaves((operator.in_structure(), operator.out_structure()))
    dtypes = {jnp.dtype(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 or any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        raise ValueError(
            "This linear solver needs one real floating dtype for all leaves; got "
            f"{sorted(d.name for d in dtypes)}. Cast the leaves, and split complex "
            "ones into real and imaginary part."
        )


def check_bytes(rows: int, cols: int, itemsize: int, max_bytes: int, who: str) -> None:
    """Refuses to materialise a matrix of more than `max_bytes` bytes.

    **Raises:** `ValueError` that names the bytes, and what to do instead.
    """
    needed = rows * cols * itemsize
    if needed > max_bytes:
        raise ValueError(
            f"`{who}` would materialise a {rows} x {cols} matrix of {needed} bytes "
            f"({needed / 2**30:.3g} GiB), more than `max_bytes={max_bytes}`. Use a "
            "matrix-free solver (`HybridKrylov()`, `Neumann(...)`), a sparse one, or "
            f"raise `max_bytes`: `{who}(max_bytes={needed})`."
        )


def measured(
    x: PyTree[Array],
    vector: PyTree[Array],
    residual_norm: Float[Array, ""],
    *,
    rtol: Float[Array, ""] | float,
    atol: Float[Array, ""] | float = 0.0,
    failure: lx.RESULTS = lx.RESULTS.singular,
    **stats: Any,
) -> Answer:
    """The answer of a linear solve, judged by its measured residual `‖b - A x‖`.

    It is successful if `‖b - A x‖ <= rtol ‖b‖ + atol` in the Euclidean norm; a NaN on
    either side fails the comparison. A zero `b` has the answer zero.
    """
    b_norm = norm(vector)
    residual_norm = jnp.where(b_norm == 0, 0, residual_norm)
    small = residual_norm <= rtol * b_norm + atol
    return _answer(x, b_norm, residual_norm, small, failure, stats)


def approximate(
    x: PyTree[Array],
    vector: PyTree[Array],
    residual_norm: Float[Array, ""],
    **stats: Any,
) -> Answer:
    """The answer of a solver that is inexact by design: successful if it is finite."""
    b_norm = norm(vector)
    residual_norm = jnp.where(b_norm == 0, 0, residual_norm)
    finite = jnp.isfinite(norm(x)) | (b_norm == 0)
    return _answer(x, b_norm, residual_norm, finite, lx.RESULTS.singular, stats)


def _answer(
    x: PyTree[Array],
    b_norm: Float[Array, ""],
    residual_norm: Float[Array, ""],
    good: Bool[Array, ""],
    failure: lx.RESULTS,
    stats: Stats,
) -> Answer:
    result = lx.RESULTS.where(good, lx.RESULTS.successful, failure)
    finite = jnp.isfinite(b_norm)
    result = lx.RESULTS.where(finite, result, lx.RESULTS.nonfinite_input)
    x = where(b_norm == 0, zeros_like(x), x)
    return x, result, {"residual_norm": residual_norm, **stats}


def require_like(given: Any, vector: PyTree[Array], name: str) -> None:
    """Refuses a warm start or a preconditioner that does not fit the unknown.

    **Raises:** `ValueError` that names the option and both structures.
    """
    if given is None:
        return
    is_operator = isinstance(given, lx.AbstractLinearOperator)
    structs = given.in_structure() if is_operator else given
    expected = [(x.shape, x.dtype) for x in jtu.tree_leaves(vector)]
    got = [(x.shape, x.dtype) for x in jtu.tree_leaves(structs)]
    same_tree = jtu.tree_structure(structs) == jtu.tree_structure(vector)
    if not same_tree or got != expected:
        raise ValueError(
            f"The option `{name}` does not fit the right-hand side: it has leaves "
            f"{got}, the right-hand side {expected}. Pass one of the same structure."
        )


def transposed_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the transposed system.

    A preconditioner is transposed; the warm starts `y0` of `A x = b` and `y0_transpose`
    of `Aᵀ x = b` change places; every other option is kept.
    """
    swap = {"y0": "y0_transpose", "y0_transpose": "y0"}
    moved = {swap.get(key, key): value for key, value in options.items()}
    if "preconditioner" in moved:
        moved["preconditioner"] = moved["preconditioner"].transpose()
    return moved
