"""A DEQ's cell as a fixed-point map, and the shape of its state."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._custom_types import PyTree
from .._state import describe, struct_of

Cell = Callable[..., Any]


class Inputs(eqx.Module):
    """What stays the same along a solve: the layer's input and its random key."""

    x: Any
    key: PRNGKeyArray | None


def takes_key(cell: Cell) -> bool:
    """Whether `cell` can be called with the keyword argument `key`."""
    try:
        parameters = inspect.signature(cell).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == "key" and p.kind is not p.POSITIONAL_ONLY)
        for p in parameters
    )


def cast(tree: Any, dtype: np.dtype | None) -> Any:
    """`tree` with its real inexact arrays in `dtype`; as it is for `None`."""
    if dtype is None:
        return tree

    def cast_leaf(leaf: Any) -> Any:
        real = eqx.is_inexact_array(leaf) and not jnp.iscomplexobj(leaf)
        return leaf.astype(dtype) if real else leaf

    return jtu.tree_map(cast_leaf, tree)


def _uncast(out: Any, z: PyTree[Array]) -> Any:
    like = jtu.tree_leaves(z)
    leaves, treedef = jtu.tree_flatten(out)
    back = [a.astype(b.dtype) for a, b in zip(leaves, like, strict=True)]
    return jtu.tree_unflatten(treedef, back)


def _check(out: Any, z: PyTree[Any], name: str) -> None:
    """Refuses an output that is no state like `z`, in the words of a layer."""
    outs, zs = jtu.tree_leaves(out), jtu.tree_leaves(z)
    same_tree = jtu.tree_structure(out) == jtu.tree_structure(z)
    pairs = zip(outs, zs, strict=False)
    if same_tree and all(describe(a) == describe(b) for a, b in pairs):
        return
    got, expected = (_described(tree) for tree in (out, z))
    raise ValueError(
        f"The cell `{name}` of a DEQ must map its state to a state of the same shape "
        f"and dtype, but it returned {got} for the state {expected}: change the cell, "
        "or pass the initial state that it wants as `z0`."
    )


def _described(tree: PyTree[Any]) -> str:
    if jtu.treedef_is_leaf(jtu.tree_structure(tree)):
        return describe(tree)
    return str(jtu.tree_map(describe, tree))


class CellMap(eqx.Module):
    """The map `(z, inputs) -> z` of a cell `cell(z, x)` or `cell(z, x, key=key)`."""

    cell: Cell
    compute_dtype: np.dtype | None = eqx.field(static=True)

    @property
    def name(self) -> str:
        return getattr(self.cell, "__name__", type(self.cell).__name__)

    def raw(self, z: PyTree[Array], inputs: Inputs) -> Any:
        """What the cell returns, with the state's dtype where that is cast."""
        keyed = {"key": inputs.key} if takes_key(self.cell) else {}
        out = self.cell(cast(z, self.compute_dtype), inputs.x, **keyed)
        same_tree = jtu.tree_structure(out) == jtu.tree_structure(z)
        cast_back = self.compute_dtype is not None and same_tree
        return _uncast(out, z) if cast_back else out

    def __call__(self, z: PyTree[Array], inputs: Inputs) -> Any:
        out = self.raw(z, inputs)
        _check(out, z, self.name)
        return out


def infer_state(fn: CellMap, inputs: Inputs, dtypes: list[np.dtype]) -> PyTree[Array]:
    """A state of zeros whose shapes and dtypes the cell keeps.

    A cell with a method `initial_state(x)` says so itself. Else the shape of `x` is
    tried first, then that of the cell's output there, then those that differ from `x`
    in one axis, by one of the sizes that occur in the cell's arrays.

    **Raises:** `ValueError` if none of them fits.
    """
    given = getattr(fn.cell, "initial_state", None)
    if given is not None:
        return given(inputs.x)
    shapes = _candidate_shapes(fn, inputs)
    errors: list[Exception] = []
    for shape in shapes:
        for dtype in dtypes:
            struct = _kept(fn, jax.ShapeDtypeStruct(shape, dtype), inputs, errors)
            if struct is not None:
                return jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), struct)
    tried = ", ".join(str(list(shape)) for shape in shapes) or "none"
    raise ValueError(
        f"The shape of the state cannot be told from the cell `{fn.name}` and its "
        f"input (tried the shapes {tried}): pass `z0`, or give the cell a method "
        "`initial_state(x)`."
    ) from (errors[0] if errors else None)


def _kept(fn: CellMap, struct: Any, inputs: Inputs, errors: list[Exception]) -> Any:
    """The candidate if the cell keeps it, else the cell's output if it keeps that."""
    for _ in range(2):
        try:
            out = eqx.filter_eval_shape(fn.raw, struct, inputs)
        except (TypeError, ValueError) as error:  # JAX's for shapes that do not fit
            errors.append(error)
            return None
        if not all(_is_state_struct(leaf) for leaf in jtu.tree_leaves(out)):
            return None
        out = struct_of(out)
        if eqx.tree_equal(out, struct) is True:
            return struct
        struct = out
    return None


def _is_state_struct(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jnp.inexact
    )


def _candidate_shapes(fn: CellMap, inputs: Inputs) -> list[tuple[int, ...]]:
    leaves = list(filter(eqx.is_array_like, jtu.tree_leaves(inputs.x)))
    arrays = list(filter(eqx.is_array, leaves)) or leaves  # or else Python numbers
    if not arrays:
        return []
    inner = [x for x in jtu.tree_leaves(fn.cell) if eqx.is_inexact_array(x)]
    sizes = [size for x in inner for size in x.shape]
    shape = jnp.shape(arrays[0])
    axes = reversed(range(len(shape)))
    resized = [
        (*shape[:axis], size, *shape[axis + 1 :]) for axis in axes for size in sizes
    ]
    extended = [(*shape, size) for size in sizes]
    return list(dict.fromkeys([shape, *resized, *extended]))


def state_dtypes(cell: Cell, x: Any, compute_dtype: np.dtype | None) -> list[np.dtype]:
    """The dtypes that an inferred state may have, the likeliest first."""
    inexact = filter(eqx.is_inexact_array, jtu.tree_leaves((x, cell)))
    found = list(dict.fromkeys(leaf.dtype for leaf in inexact))
    dtypes = found or [jnp.result_type(float)]
    if compute_dtype is None:
        return dtypes
    return [jnp.promote_types(dtypes[0], jnp.float32)]
