"""JOIN, in one line: solve a condition now, with a good default for everything.

The four signatures are written out, for whoever reads them in an editor; a test holds
them to each other and to `ImplicitFunction`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from ._adjoint import AbstractAdjoint
from ._condition import FixedPoint, LeastSquares, Minimum, Root
from ._function import ImplicitFunction
from ._monitor import Monitor
from ._solution import Solution

Y = TypeVar("Y")
Args = TypeVar("Args")


def root_find(
    fn: Callable[[Y, Args], Any],
    y0: Y,
    args: Args = None,
    *,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    has_aux: bool = False,
    max_steps: int | None = 512,
    throw: bool = True,
    tags: object = frozenset(),
    residual_tol: float | None = None,
    options: dict[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Solution[Y, Any]:
    """Returns the solution of `fn(y, args) = 0`.

    **Arguments:**

    - `fn`: `fn(y, args)` returns the residual: as many leaves as `y`, of its shapes.
    - `y0`: the initial guess, any pytree of numbers and arrays. It has no derivative.
    - `args`: the second argument of `fn`, any pytree.
    - `tags`: lineax tags of `∂fn/∂y`.
    - `solver`, `adjoint`, `has_aux`, `max_steps`, `throw`, `residual_tol`, `options`,
        `monitor`: as in [`eqximplicit.ImplicitFunction`][].

    **Returns:** a [`eqximplicit.Solution`][]; its `value` is differentiable in `args`
    and in every array that `fn` holds or captured.

    **Raises:** as [`eqximplicit.ImplicitFunction`][].
    """
    layer = ImplicitFunction(
        Root[Y, Args](fn, tags),
        solver,
        adjoint,
        max_steps=max_steps,
        throw=throw,
        has_aux=has_aux,
        residual_tol=residual_tol,
        options=options,
        monitor=monitor,
    )
    return layer.solve(y0, args)


def fixed_point(
    fn: Callable[[Y, Args], Any],
    y0: Y,
    args: Args = None,
    *,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    has_aux: bool = False,
    max_steps: int | None = 512,
    throw: bool = True,
    tags: object = frozenset(),
    residual_tol: float | None = None,
    options: dict[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Solution[Y, Any]:
    """Returns the solution of `y = fn(y, args)`.

    **Arguments:**

    - `fn`: `fn(y, args)` returns the image of `y`: its structure, shapes and dtypes.
    - `y0`: the initial guess, any pytree of numbers and arrays. It has no derivative.
    - `args`: the second argument of `fn`, any pytree.
    - `tags`: lineax tags of `I - ∂fn/∂y`.
    - `solver`, `adjoint`, `has_aux`, `max_steps`, `throw`, `residual_tol`, `options`,
        `monitor`: as in [`eqximplicit.ImplicitFunction`][].

    **Returns:** a [`eqximplicit.Solution`][]; its `value` is differentiable in `args`
    and in every array that `fn` holds or captured.

    **Raises:** as [`eqximplicit.ImplicitFunction`][].
    """
    layer = ImplicitFunction(
        FixedPoint[Y, Args](fn, tags),
        solver,
        adjoint,
        max_steps=max_steps,
        throw=throw,
        has_aux=has_aux,
        residual_tol=residual_tol,
        options=options,
        monitor=monitor,
    )
    return layer.solve(y0, args)


def minimise(
    fn: Callable[[Y, Args], Any],
    y0: Y,
    args: Args = None,
    *,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    has_aux: bool = False,
    max_steps: int | None = 512,
    throw: bool = True,
    tags: object = frozenset(),
    residual_tol: float | None = None,
    options: dict[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Solution[Y, Any]:
    """Returns a minimum of the scalar `fn(y, args)`.

    **Arguments:**

    - `fn`: `fn(y, args)` returns the objective: a real scalar, shape `()`.
    - `y0`: the initial guess, any pytree of numbers and arrays. It has no derivative.
    - `args`: the second argument of `fn`, any pytree.
    - `tags`: lineax tags of the Hessian.
    - `solver`, `adjoint`, `has_aux`, `max_steps`, `throw`, `residual_tol`, `options`,
        `monitor`: as in [`eqximplicit.ImplicitFunction`][].

    **Returns:** a [`eqximplicit.Solution`][]; its `value` is differentiable in `args`
    and in every array that `fn` holds or captured.

    **Raises:** as [`eqximplicit.ImplicitFunction`][].
    """
    layer = ImplicitFunction(
        Minimum[Y, Args](fn, tags),
        solver,
        adjoint,
        max_steps=max_steps,
        throw=throw,
        has_aux=has_aux,
        residual_tol=residual_tol,
        options=options,
        monitor=monitor,
    )
    return layer.solve(y0, args)


def least_squares(
    fn: Callable[[Y, Args], Any],
    y0: Y,
    args: Args = None,
    *,
    solver: Any = None,
    adjoint: AbstractAdjoint | None = None,
    has_aux: bool = False,
    max_steps: int | None = 512,
    throw: bool = True,
    tags: object = frozenset(),
    residual_tol: float | None = None,
    options: dict[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Solution[Y, Any]:
    """Returns a minimum of `½ ‖fn(y, args)‖²`.

    **Arguments:**

    - `fn`: `fn(y, args)` returns the residuals: any pytree of arrays.
    - `y0`: the initial guess, any pytree of numbers and arrays. It has no derivative.
    - `args`: the second argument of `fn`, any pytree.
    - `tags`: lineax tags of the Hessian.
    - `solver`, `adjoint`, `has_aux`, `max_steps`, `throw`, `residual_tol`, `options`,
        `monitor`: as in [`eqximplicit.ImplicitFunction`][].

    **Returns:** a [`eqximplicit.Solution`][]; its `value` is differentiable in `args`
    and in every array that `fn` holds or captured.

    **Raises:** as [`eqximplicit.ImplicitFunction`][].
    """
    layer = ImplicitFunction(
        LeastSquares[Y, Args](fn, tags),
        solver,
        adjoint,
        max_steps=max_steps,
        throw=throw,
        has_aux=has_aux,
        residual_tol=residual_tol,
        options=options,
        monitor=monitor,
    )
    return layer.solve(y0, args)
