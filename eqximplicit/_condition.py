r"""WHAT defines a solution: the equation that it satisfies.

A condition turns the user's function into the square system `residual(y, args) = 0`
that the implicit function theorem needs. How that system is solved, and how its
solution is differentiated, is not known here.
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any, cast, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from equinox import AbstractVar
from jaxtyping import Array

from ._custom_types import check_no_class, PyTree, ShapeDtypeStruct
from ._pair import split_pair
from ._state import (
    check_same_field,
    check_same_shapes,
    check_same_structure,
    describe,
    leaf_name,
    retree,
)

Y = TypeVar("Y")
Args = TypeVar("Args")


def _tag_set(tags: object) -> frozenset[object]:
    if isinstance(tags, Iterable) and not isinstance(tags, str):
        return frozenset(tags)
    return frozenset({tags})


def _symmetric_tag_set(tags: object) -> frozenset[object]:
    return _tag_set(tags) | {lx.symmetric_tag}


class AbstractCondition(eqx.Module, Generic[Y, Args]):
    """An equation `residual(y, args) = 0` with as many equations as unknowns.

    **Attributes:**

    - `fn`: the user's function `fn(y, args)`; any callable pytree (an `eqx.Module`, a
        closure, a bound method, an `eqx.Partial`). Its arrays are parameters.
    - `tags`: lineax tags that hold for the Jacobian of the residual in `y`.
    - `has_aux`: whether `fn` returns a pair `(out, aux)`.
    - `takes_aux`: whether `fn` is called as `fn(y, args, aux)` with the auxiliary
        output of the solver (a neighbour list, say).
    """

    fn: AbstractVar[Callable[[Y, Args], Any] | Callable[[Y, Args, Any], Any]]
    tags: AbstractVar[frozenset[object]]
    has_aux: AbstractVar[bool]
    takes_aux: AbstractVar[bool]

    def __check_init__(self) -> None:
        _refuse_no_function(self.fn)

    @abc.abstractmethod
    def residual(self, y: Y, args: Args, aux: Any = None) -> Y:
        """Returns what is zero at a solution, with the leaf shapes of `y`."""

    @abc.abstractmethod
    def check(self, out: PyTree[Any], y: PyTree[Any]) -> None:
        """Refuses a function whose output `out` (shapes) does not fit the state `y`.

        **Raises:** `ValueError` naming the leaf, its shape and dtype.
        """

    def call(self, y: Y, args: Args, aux: Any = None) -> tuple[Any, Any]:
        """Returns `fn`'s output and its auxiliary output (`None` without `has_aux`).

        A number in the output is an array.
        """
        fn = cast(Callable[..., Any], self.fn)
        out = fn(y, args, aux) if self.takes_aux else fn(y, args)
        pair = (
            split_pair(out, "function", "(out, aux)") if self.has_aux else (out, None)
        )
        return jtu.tree_map(_as_array, pair[0]), pair[1]


def _refuse_no_function(fn: object) -> None:
    check_no_class("fn", fn)
    if not callable(fn):
        raise TypeError(
            f"`fn` must be a function `fn(y, args)`; got {describe(fn)}. Pass the "
            "function itself, not what it returns."
        )


def _as_array(leaf: object) -> Array:
    if eqx.is_array_like(leaf):
        return jnp.asarray(leaf)
    raise ValueError(
        f"The function returned {describe(leaf)} where a number or an array belongs. "
        "Return auxiliary output with `has_aux=True`."
    )


def _check_inexact(out: PyTree[ShapeDtypeStruct], y: PyTree[ShapeDtypeStruct]) -> None:
    ys = jtu.tree_leaves_with_path(y)
    for (path, leaf), (y_path, y_leaf) in zip(
        jtu.tree_leaves_with_path(out), ys, strict=True
    ):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"The residual is {describe(leaf)} at `{leaf_name('out', path)}`, "
                f"opposite the state leaf `{leaf_name('y0', y_path)}`, which is "
                f"{describe(y_leaf)}: an integer or a truth value has no derivative in "
                "the state. Return real or complex numbers."
            )


class Root(AbstractCondition[Y, Args]):
    r"""The solution of `fn(y, args) = 0`.

    **Arguments:**

    - `fn`: returns the residual: as many leaves as `y`, of the same shapes.
    - `tags`: lineax tags of `∂fn/∂y`, for example `lx.symmetric_tag`.
    - `has_aux`: whether `fn` returns `(residual, aux)`.
    - `takes_aux`: whether `fn` is called as `fn(y, args, aux)`.
    """

    fn: Callable[[Y, Args], Any] | Callable[[Y, Args, Any], Any]
    tags: frozenset[object] = eqx.field(
        default=frozenset(), static=True, converter=_tag_set
    )
    has_aux: bool = eqx.field(default=False, static=True)
    takes_aux: bool = eqx.field(default=False, static=True)

    def residual(self, y: Y, args: Args, aux: Any = None) -> Y:
        """Returns `fn(y, args)` in the structure of `y`."""
        out, _ = self.call(y, args, aux)
        return retree(out, y)

    def check(self, out: PyTree[Any], y: PyTree[Any]) -> None:
        """Refuses a residual whose leaf shapes are not those of `y`."""
        check_same_shapes("The residual", out, y)
        _check_inexact(out, y)
        check_same_field("The residual", out, y)


class FixedPoint(AbstractCondition[Y, Args]):
    r"""The solution of `y = fn(y, args)`; its residual is `y - fn(y, args)`.

    The Jacobian of the residual is `I - ∂fn/∂y`, so that a Neumann series of its
    inverse is the series of the adjoint's own fixed-point iteration.

    **Arguments:**

    - `fn`: returns the image of `y`: the structure, shapes and dtypes of `y`.
    - `tags`: lineax tags of `I - ∂fn/∂y`.
    - `has_aux`: whether `fn` returns `(image, aux)`.
    - `takes_aux`: whether `fn` is called as `fn(y, args, aux)`.
    """

    fn: Callable[[Y, Args], Any] | Callable[[Y, Args, Any], Any]
    tags: frozenset[object] = eqx.field(
        default=frozenset(), static=True, converter=_tag_set
    )
    has_aux: bool = eqx.field(default=False, static=True)
    takes_aux: bool = eqx.field(default=False, static=True)

    def residual(self, y: Y, args: Args, aux: Any = None) -> Y:
        """Returns `y - fn(y, args)`."""
        out, _ = self.call(y, args, aux)
        return jtu.tree_map(jax.lax.sub, y, out)

    def check(self, out: PyTree[Any], y: PyTree[Any]) -> None:
        """Refuses a map whose output differs from `y` in structure, shape or dtype."""
        check_same_structure("The fixed-point map", out, y)


class Minimum(AbstractCondition[Y, Args]):
    r"""A minimum of the real scalar `fn(y, args)`; its residual is the gradient.

    The Jacobian of the residual is the Hessian, which is symmetric. For complex `y`
    the residual is the direction of steepest ascent (the conjugate of `jax.grad`).

    **Arguments:**

    - `fn`: the objective: a real scalar, shape `()`.
    - `tags`: lineax tags of the Hessian; `lx.symmetric_tag` is always added. Say
        `lx.positive_semidefinite_tag` where the objective is known to be convex.
    - `has_aux`: whether `fn` returns `(objective, aux)`.
    - `takes_aux`: whether `fn` is called as `fn(y, args, aux)`.
    """

    fn: Callable[[Y, Args], Any] | Callable[[Y, Args, Any], Any]
    tags: frozenset[object] = eqx.field(
        default=frozenset(), static=True, converter=_symmetric_tag_set
    )
    has_aux: bool = eqx.field(default=False, static=True)
    takes_aux: bool = eqx.field(default=False, static=True)

    def residual(self, y: Y, args: Args, aux: Any = None) -> Y:
        """Returns the gradient of the objective in `y`."""
        gradient = jax.grad(lambda y: self.call(y, args, aux)[0])(y)
        return jtu.tree_map(jnp.conj, gradient)

    def check(self, out: PyTree[Any], y: PyTree[Any]) -> None:
        """Refuses an objective that is not a real scalar."""
        del y
        scalar = jtu.treedef_is_leaf(jtu.tree_structure(out)) and out.shape == ()
        if not scalar or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                "The objective must be a real scalar of shape (); got "
                f"{jtu.tree_map(describe, out)}. Sum or average it."
            )


class LeastSquares(AbstractCondition[Y, Args]):
    r"""A minimum of `½ ‖fn(y, args)‖²`; its residual is the gradient `Jᵀ fn(y, args)`.

    The derivative uses the full Hessian `JᵀJ + Σᵢ fnᵢ ∇²fnᵢ`, so it is exact for
    problems whose residuals do not vanish too.

    **Arguments:**

    - `fn`: returns the residuals: any pytree of arrays, of any number.
    - `tags`: lineax tags of the Hessian; `lx.symmetric_tag` is always added.
    - `has_aux`: whether `fn` returns `(residuals, aux)`.
    - `takes_aux`: whether `fn` is called as `fn(y, args, aux)`.
    """

    fn: Callable[[Y, Args], Any] | Callable[[Y, Args, Any], Any]
    tags: frozenset[object] = eqx.field(
        default=frozenset(), static=True, converter=_symmetric_tag_set
    )
    has_aux: bool = eqx.field(default=False, static=True)
    takes_aux: bool = eqx.field(default=False, static=True)

    def residual(self, y: Y, args: Args, aux: Any = None) -> Y:
        """Returns the gradient of half the sum of squares in `y`."""

        def objective(y: Y) -> Array:
            return half_sum_of_squares(self.call(y, args, aux)[0])

        return jtu.tree_map(jnp.conj, jax.grad(objective)(y))

    def check(self, out: PyTree[Any], y: PyTree[Any]) -> None:
        """Refuses residuals that hold no number."""
        del y
        if not jtu.tree_leaves(out):
            raise ValueError("The least-squares function returned no residuals.")


def half_sum_of_squares(tree: PyTree[Array]) -> Array:
    """`½ Σ |x|²` over all entries of all leaves."""
    terms = [jnp.sum(jnp.real(x * jnp.conj(x))) / 2 for x in jtu.tree_leaves(tree)]
    with jax.numpy_dtype_promotion("standard"):
        return jtu.tree_reduce(jnp.add, terms)
