r"""What linear solvers need of pytrees: their algebra, and checks of what is given.

Nothing here ravels: a dot product contracts each leaf over all its axes, so that shapes
and shardings of a state survive. All leaves have one real dtype. `lax` is used where it
will do: each operator of `jnp` is a `jit`, and is traced as one.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree, ShapeDtypeStruct
from .._reduce import is_few, is_staged, total
from .._reduce_leaves import is_joined, reduced_together
from .._state import num_entries

T = TypeVar("T")


def is_zero(tolerance: Any) -> bool:
    """Whether a tolerance is the number zero; a traced one may be anything."""
    return isinstance(tolerance, (int, float)) and tolerance == 0


def warn_if_unreachable(name: str, rtol: Any, atol: Any, eps: float) -> None:
    """Warns of a tolerance below the relative resolution `eps`; zero is meant."""
    known = isinstance(rtol, (int, float)) and isinstance(atol, (int, float))
    if known and 0 < rtol < eps and atol == 0:
        warnings.warn(
            f"`{name}(rtol={rtol})` asks for more than the floating-point resolution "
            f"{eps:.1e} of the operator, so the solve stagnates. Loosen `rtol` or use "
            "float64.",
            stacklevel=4,
        )


def dot(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    """The Euclidean inner product of two vectors of one structure."""
    return _summed(x, y, _leaf_dot)


def _leaf_dot(a: Array, b: Array) -> Float[Array, ""]:
    if is_staged(a):
        return total(lax.mul(a, b))
    every = tuple(range(a.ndim))
    dimensions = ((every, every), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST)


def inner(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    """`dot`, for many small lanes or a loop: few entries are added one by one."""

    def leaf(a: Array, b: Array) -> Float[Array, ""]:
        return total(lax.mul(a, b)) if is_few(a) else _leaf_dot(a, b)

    return _summed(x, y, leaf)


def _summed(
    x: PyTree[Array], y: PyTree[Array], of_leaf: Callable[[Array, Array], Array]
) -> Float[Array, ""]:
    a, b = jtu.tree_leaves(x), jtu.tree_leaves(y)
    if is_joined(a):
        return reduced_together(list(map(lax.mul, a, b)), "sum")
    return functools.reduce(lax.add, map(of_leaf, a, b))


def square(x: PyTree[Array]) -> Float[Array, ""]:
    """The square of the norm, for many small lanes or a loop."""
    return inner(x, x)


def norm(x: PyTree[Array]) -> Float[Array, ""]:
    """The Euclidean norm of a vector."""
    return jnp.sqrt(dot(x, x))


def add(x: T, y: T) -> T:
    """The vector `x + y`."""
    return jtu.tree_map(lax.add, x, y)


def minus(x: T, y: T) -> T:
    """The vector `x - y`."""
    return jtu.tree_map(lax.sub, x, y)


def scale(a: Array | float, x: T) -> T:
    """The vector `a x`."""
    return jtu.tree_map(lambda leaf: a * leaf, x)


def where(pred: Bool[Array, ""], x: T, y: T) -> T:
    """`x` where `pred`, else `y`."""
    return jtu.tree_map(lambda a, b: lax.select(pred, a, b), x, y)


def zeros_like(x: T) -> T:
    """The zero vector."""
    return jtu.tree_map(lambda leaf: lax.full_like(leaf, 0), x)


def even(x: PyTree[Any]) -> PyTree[Array]:
    """Numbers between -1 and 1 without a pattern, in the shapes and dtypes of `x`."""
    leaves, treedef = jtu.tree_flatten(x)
    return jtu.tree_unflatten(treedef, [_even(i, x) for i, x in enumerate(leaves, 1)])


def _even(number: int, x: Any) -> Array:
    phase = jnp.full(x.shape, number**2, jnp.float32)
    for k in range(len(x.shape)):
        index = lax.broadcasted_iota(jnp.float32, x.shape, k)
        phase = phase + 2 ** (0.5 / (k + 1)) * index
    return jnp.cos(phase).astype(x.dtype)


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
            f"pass `max_bytes={needed}`."
        )


def within(
    rr: Float[Array, ""],
    bb: Float[Array, ""],
    rtol: Float[Array, ""] | float,
    atol: Float[Array, ""] | float,
) -> Bool[Array, ""]:
    """Whether `‖r‖ <= rtol ‖b‖ + atol`, from squares; a NaN is not.

    Without a root where none is needed, for which XLA would make a kernel.
    """
    if isinstance(atol, float) and atol == 0.0:
        return lax.le(rr, lax.mul(bb, jnp.asarray(rtol**2, bb.dtype)))
    return jnp.sqrt(rr) <= rtol * jnp.sqrt(bb) + atol


def require_like(
    given: Any, vector: PyTree[Any], name: str, what: str = "right-hand side"
) -> None:
    """Refuses a warm start or a preconditioner that does not fit `vector`.

    That is `what` the message calls it.

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
            f"The option `{name}` does not fit the {what}: it has leaves {got}, the "
            f"{what} {expected}. Pass one of the same structure."
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
