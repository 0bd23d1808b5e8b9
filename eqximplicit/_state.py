"""What a state may be, and the real vector space in which its derivative is solved.

A state is any pytree whose leaves are arrays (or numbers) of floating or complex dtype.
A linear solver wants one real dtype throughout, so the derivative is solved in the
*real form* of the state: complex leaves become pairs of real and imaginary part, all
leaves are cast to the widest of their dtypes. No leaf is ever ravelled. For a state of
one real dtype the real form is the state itself.
"""

import math
import sys
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from ._custom_types import PyTree, ShapeDtypeStruct

T = TypeVar("T")
_Struct = jax.ShapeDtypeStruct | Array


def describe(leaf: Any) -> str:
    """Shape and dtype of an array leaf; the type and value of any other leaf."""
    if isinstance(leaf, (bool, int, float, complex, str)) or leaf is None:
        return f"{type(leaf).__name__} {leaf!r}"
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        dtype = getattr(leaf.dtype, "name", leaf.dtype)  # a random key's has no name
        return f"{dtype}{list(leaf.shape)}"
    return f"an object of type {type(leaf).__name__}"


def leaf_name(root: str, path: tuple[Any, ...]) -> str:
    """The expression that reaches a leaf, such as `y0['bond'].length`."""
    return root + jtu.keystr(path)


_MOVE = (
    "Move it to `args`, to the function, or to a static field; of a network, take the "
    "arrays with `eqx.partition(net, eqx.is_inexact_array)`."
)


def is_traceable(leaf: object) -> bool:
    """Whether it is no NumPy array of text, objects or dates, which JAX has not."""
    numpy = isinstance(leaf, (np.ndarray, np.generic))
    return not numpy or leaf.dtype.kind not in "OSUMm"


def _as_state_leaf(name: str, leaf: Any, remedy: str) -> Array:
    number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
    array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    if not number and not (array and is_traceable(leaf)):
        raise ValueError(
            f"The state holds {describe(leaf)} at `{name}`; every leaf of a state must "
            f"be a number or an array of numbers. {remedy}"
        )
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.asarray(array, array.dtype)  # a weak type would not survive a loop
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(jnp.result_type(float))
    raise ValueError(
        f"The state holds {describe(leaf)} at `{name}`; a solution is made of real or "
        f"complex numbers. {remedy}"
    )


def as_state(y0: PyTree[Any], root: str = "y0", remedy: str = _MOVE) -> PyTree[Array]:
    """`y0` with array leaves of inexact dtype: integers are promoted to floats.

    **Raises:** `ValueError` naming the leaf from its `root`, with a `remedy`, for a
    leaf that is no number; and for a state without a single entry.
    """
    if not jtu.tree_leaves(y0):
        raise ValueError(
            f"The state `y0` is empty: got {y0!r}, which has no leaves. Pass the "
            "initial guess, a pytree with at least one number or array."
        )
    entry = lambda path, x: _as_state_leaf(leaf_name(root, path), x, remedy)
    state = jtu.tree_map_with_path(entry, y0)
    if all(leaf.size == 0 for leaf in jtu.tree_leaves(state)):
        (path, leaf), *_ = jtu.tree_leaves_with_path(state)
        raise ValueError(
            f"The state `y0` is empty: `{leaf_name('y0', path)}` is {describe(leaf)} "
            "and there is no other entry, so nothing is to be solved. For an empty "
            "batch, `jax.vmap` the layer."
        )
    return state


def known(size: Any) -> int:
    """A size; one that is symbolic counts as larger than any limit.

    A program is exported once for all sizes of a symbolic dimension (`jax.export`), so
    whatever depends on the size chooses what works for a large one.
    """
    return size if isinstance(size, int) else sys.maxsize


def num_entries(x: _Struct) -> int:
    """The number of entries of an array; see `known` for symbolic ones."""
    return known(math.prod(x.shape))


def struct_of(tree: PyTree[_Struct]) -> PyTree[ShapeDtypeStruct]:
    """Shapes and dtypes of a pytree of arrays."""
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def check_same_shapes(name: str, out: PyTree[_Struct], y: PyTree[_Struct]) -> None:
    """Refuses an output whose leaves do not pair off with those of the state.

    **Raises:** `ValueError` naming the first leaf that differs.
    """
    outs, _ = jtu.tree_flatten_with_path(out)
    ys, _ = jtu.tree_flatten_with_path(y)
    for (out_path, out_leaf), (y_path, y_leaf) in zip(outs, ys, strict=False):
        if not hasattr(out_leaf, "shape") or out_leaf.shape != y_leaf.shape:
            raise ValueError(
                f"{name} does not match the state: output leaf "
                f"`{leaf_name('out', out_path)}` is {describe(out_leaf)}, state leaf "
                f"`{leaf_name('y0', y_path)}` is {describe(y_leaf)}. Return one "
                "equation for each unknown, in the shapes of `y0`."
            )
    if len(outs) != len(ys):
        more = outs[len(ys) :] or ys[len(outs) :]
        raise ValueError(
            f"{name} has {len(outs)} leaves and the state has {len(ys)}: nothing pairs "
            f"with `{leaf_name('out' if len(outs) > len(ys) else 'y0', more[0][0])}`, "
            f"which is {describe(more[0][1])}. Return one equation for each unknown."
        )


def check_same_field(name: str, out: PyTree[_Struct], y: PyTree[_Struct]) -> None:
    """Refuses a complex leaf opposite a real one: they are not as many equations.

    **Raises:** `ValueError` naming the leaf.
    """
    ys = jtu.tree_leaves_with_path(y)
    for out_leaf, (path, y_leaf) in zip(jtu.tree_leaves(out), ys, strict=True):
        if jnp.iscomplexobj(out_leaf) != jnp.iscomplexobj(y_leaf):
            raise ValueError(
                f"{name} is {describe(out_leaf)} opposite the state leaf "
                f"`{leaf_name('y0', path)}`, which is {describe(y_leaf)}: a complex "
                "number is two real equations. Make both real or both complex."
            )


def check_same_structure(name: str, out: PyTree[_Struct], y: PyTree[_Struct]) -> None:
    """Refuses an output that differs from the state in structure, shape or dtype.

    **Raises:** `ValueError` naming both structures, or the first leaf that differs.
    """
    check_same_shapes(name, out, y)
    if jtu.tree_structure(out) != jtu.tree_structure(y):
        raise ValueError(
            f"{name} must return the structure of the state: got "
            f"{jtu.tree_structure(out)}, but `y0` is {jtu.tree_structure(y)}."
        )
    for (path, out_leaf), y_leaf in zip(
        jtu.tree_leaves_with_path(out), jtu.tree_leaves(y), strict=True
    ):
        if out_leaf.dtype != y_leaf.dtype:
            raise ValueError(
                f"{name} changes the dtype of `{leaf_name('y0', path)}` from "
                f"{describe(y_leaf)} to {describe(out_leaf)}. Cast the output to "
                f"`{y_leaf.dtype}`, or pass a `y0` of dtype `{out_leaf.dtype}`."
            )


def retree(out: PyTree[Any], like: PyTree[T]) -> PyTree[T]:
    """The leaves of `out` in the structure of `like`."""
    return jtu.tree_unflatten(jtu.tree_structure(like), jtu.tree_leaves(out))


def real_dtype(tree: PyTree[_Struct]) -> np.dtype:
    """The dtype of the real form: the widest real dtype of the leaves, at least f32."""
    leaves = [jnp.finfo(x.dtype).dtype for x in jtu.tree_leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(jnp.result_type(jnp.float32, *leaves))


def coarse_epsilon(tree: PyTree[_Struct]) -> float | None:
    """The epsilon of the coarsest leaf, if the real form hides it: `None` if not."""
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(tree)]
    return max(eps) if max(eps) > float(jnp.finfo(real_dtype(tree)).eps) else None


def to_real(tree: PyTree[Array], dtype: np.dtype) -> PyTree[Float[Array, "..."]]:
    """The real form of a state, or of a vector shaped like it."""

    def leaf_to_real(x: Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return x.real.astype(dtype), x.imag.astype(dtype)
        return x.astype(dtype)

    return jtu.tree_map(leaf_to_real, tree)


def from_real(real: PyTree[Any], like: PyTree[_Struct]) -> PyTree[Array]:
    """The vector with the structure and dtypes of `like` whose real form is `real`."""
    leaves = iter(jtu.tree_leaves(real))

    def leaf_from_real(x: _Struct) -> Array:
        part = jnp.finfo(x.dtype).dtype
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return jax.lax.complex(
                next(leaves).astype(part), next(leaves).astype(part)
            ).astype(x.dtype)
        return next(leaves).astype(part)

    return jtu.tree_map(leaf_from_real, like)


def as_arrays(tree: T) -> T:
    """`tree`, its inexact arrays with the weak type of Python numbers taken off.

    The value of `jax.grad(f)(2.0)` is a Python float inside the tracer, and a custom
    rule would be handed that float.
    """
    return jtu.tree_map(
        lambda x: jnp.asarray(x, x.dtype) if eqx.is_inexact_array(x) else x, tree
    )


def numbers_as_arrays(tree: T, kinds: tuple[type, ...]) -> T:
    """`tree`, its Python numbers of these kinds as arrays of weak type."""

    def leaf_as_array(x: Any) -> Any:
        number = isinstance(x, kinds) and not isinstance(x, bool)
        return jnp.asarray(x) if number else x

    return jtu.tree_map(leaf_as_array, tree)


def stop_gradient(tree: T) -> T:
    """`tree` with no derivative through any of its arrays."""
    diff, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jtu.tree_map(_stopped, diff), rest)


def _stopped(x: Any) -> Any:
    if isinstance(x, Tracer):
        return jax.lax.stop_gradient(x)
    if isinstance(x, jax.Array):
        return x
    with jax.ensure_compile_time_eval():  # a value stays one under `jit`
        return jnp.asarray(x)


def select(
    pred: Bool[Array, ""], on_true: PyTree[Any], on_false: PyTree[Any]
) -> PyTree[Array]:
    """`on_true` where the scalar `pred` holds, else `on_false`, leaf by leaf."""
    return jtu.tree_map(lambda a, b: jax.lax.select(pred, a, b), on_true, on_false)


def filled(struct: PyTree[Any], value: float) -> PyTree[Any]:
    """Arrays of one value in the shapes of `struct`; non-array leaves as they are."""
    return jtu.tree_map(
        lambda s: jnp.full(s.shape, value, s.dtype) if _has_shape(s) else s, struct
    )


def _has_shape(x: object) -> bool:
    return isinstance(x, (jax.ShapeDtypeStruct, jax.Array))
