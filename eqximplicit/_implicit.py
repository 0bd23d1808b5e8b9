r"""THE RULE: the derivative of a solution, attached to its finished value.

Let `y*(θ)` solve `F(y, θ) = 0`, where `θ` is everything that the condition depends on:
the arrays of its own pytree, those its function captured by closure, and `args`.
Differentiating `F(y*(θ), θ) = 0` in the direction `θ̇` gives the implicit function
theorem (Krantz & Parks, *The Implicit Function Theorem*, 2013, theorem 3.3.1):

    ∂F/∂y · ẏ  +  ∂F/∂θ · θ̇  =  0          ẏ  = -(∂F/∂y)⁻¹ (∂F/∂θ · θ̇)     forward
                                            θ̄  = -(∂F/∂θ)ᵀ (∂F/∂y)⁻ᵀ ȳ      reverse

The reverse rule is the transpose of the forward one, and JAX derives it. Nothing here
knows how `y*` was found: the value comes in finished and goes out bit for bit.
"""

from collections.abc import Callable
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from ._claim import Claim
from ._condition import AbstractCondition, Root
from ._custom_types import check_instance, LinearSolver, PyTree
from ._hoist import hoist
from ._linear import differentiable_linear_solve
from ._linear_rule import LinearRule
from ._linearise import linearised
from ._primitives import (
    attach,
    flatten,
    Leaves,
    Moving,
    moving_part,
    Structure,
    Tangent,
)
from ._reverse_only import refuse_reverse_only
from ._state import (
    as_arrays,
    as_state,
    from_real,
    numbers_as_arrays,
    real_dtype,
    select,
    stop_gradient,
    struct_of,
    to_real,
)
from ._static import refuse_static_arrays
from ._vector import vector_at
from .linear_solvers import AutoLinearSolver
from .linear_solvers._residual import even

Y = TypeVar("Y")
Args = TypeVar("Args")


class _Attachment(eqx.Module):
    """Everything on which the derivative of a solution depends, beside `θ`."""

    aux: Any
    rule: LinearRule
    claim: Claim | None


def _tangent_of(values: Any, theta: Structure, attachment: Structure) -> Tangent:
    """`ẏ` from flat lists; called once JAX wants a derivative.

    The values are `y`, or `y` and where to linearise: that moves as `y` does, if it is.
    """
    count = len(theta.dtypes)

    def tangent(moving: Moving, y: Leaves, rest: Leaves, t_moving: Leaves) -> Leaves:
        theta_leaves, attached = rest[:count], attachment.restored(rest[count:])
        *others, at = jtu.tree_unflatten(values, y)
        dtype, like = real_dtype(at), struct_of(at)
        condition, args = theta.restored(theta_leaves)
        refuse_reverse_only(condition, at, args, attached.aux)

        def residual(coefficients: Any, real_y: PyTree[Array]) -> PyTree[Array]:
            leaves, aux = coefficients
            condition, args = theta.restored(leaves)
            out = condition.residual(from_real(real_y, like), args, aux)
            return to_real(out, dtype)

        coefficients, real_at = (list(theta_leaves), attached.aux), to_real(at, dtype)
        of_moving, moved = moving_part(theta_leaves, moving)
        at_y = lambda moved, y: residual((of_moving(moved), attached.aux), y)
        linear = linearised(at_y, moved, real_at)
        t_residual = linear.along_x(list(t_moving))  # ∂F/∂θ · θ̇
        t_y = differentiable_linear_solve(
            residual,
            coefficients,
            real_at,
            linear,
            jtu.tree_map(jax.lax.neg, t_residual),
            attached.rule,
            attached.claim,
            lambda: linear.along_x(even(list(t_moving))),
        )
        t_y = from_real(t_y, like)
        if not others:
            return jtu.tree_leaves(t_y)
        still = jtu.tree_map(jnp.zeros_like, t_y)
        return jtu.tree_leaves((t_y, select(attached.rule.trusted, t_y, still)))

    return tangent


def _linear_rule(
    condition: AbstractCondition[Any, Any],
    linear_solver: LinearSolver | None,
    options: dict[str, Any] | None,
    trusted: Bool[Array, ""] | bool,
) -> LinearRule:
    return stop_gradient(
        LinearRule(
            solver=AutoLinearSolver() if linear_solver is None else linear_solver,
            options={} if options is None else options,
            tags=condition.tags,
            trusted=jnp.asarray(trusted),
        )
    )


_CONDITION = "what `y` solves, `eqi.Root(fn)` or `eqi.FixedPoint(fn)` say"


def implicit_solution(
    condition: AbstractCondition[Y, Args],
    y: Y,
    args: Args = None,
    *,
    linear_solver: LinearSolver | None = None,
    options: dict[str, Any] | None = None,
    aux: Any = None,
    trusted: Bool[Array, ""] | bool = True,
    elsewhere: Y | None = None,
    claim: Claim | None = None,
) -> Y:
    r"""Returns `y` bit for bit, with the derivative of the solution of `condition`.

    Solve in any way you like (a Python loop, SciPy, another library), then attach:

    $$\frac{\partial y}{\partial\theta} =
    -\left(\frac{\partial F}{\partial y}\right)^{-1}\frac{\partial F}{\partial\theta}$$

    where $F$ is `condition.residual` and $\theta$ is everything that the condition
    depends on: its own arrays, arrays that its function captured by closure, and
    `args`. The derivative holds in forward and reverse mode and to every order.

    **Arguments:**

    - `condition`: what `y` solves, such as `Root(fn)` or `FixedPoint(fn)`.
    - `y`: the solution, any pytree of arrays of inexact dtype. It is taken as found:
        a derivative that flows into it is dropped.
    - `args`: the argument of `fn(y, args)`, any pytree.
    - `linear_solver`: a lineax solver for `∂F/∂y`; `AutoLinearSolver()` if `None`.
    - `options`: run-time options of the linear solver, such as a preconditioner.
    - `aux`: auxiliary output for a condition with `takes_aux`; not differentiated.
    - `trusted`: bool, shape `()`. Where false, the derivative is NaN.
    - `elsewhere`: a state like `y` at which the condition is finite, the initial guess
        say. Used instead of a `y` that is not trusted, so that a choice between `y` and
        a default can be differentiated even if `y` is NaN.
    - `claim`: what a solver claims of `y`; where `y` contradicts it, the derivative is
        NaN. `None` for nothing.

    **Returns:** `y`, with the same structure, shapes and dtypes.

    **Raises:** `ValueError` if the residual does not fit `y`, or a static field of `fn`
    or `args` holds an array. A linear solve that fails
    raises nothing: its lane's derivative is NaN.

    !!! example

        ```python
        y = scipy_root(theta)                                   # found somehow
        y = eqi.implicit_solution(eqi.Root(lambda y, theta: y**3 - theta), y, theta)
        ```
    """
    check_instance("condition", condition, AbstractCondition, _CONDITION)
    refuse_static_arrays(condition.fn, "fn")
    refuse_static_arrays(args, "args")
    at = None
    if elsewhere is not None:
        at = select(jnp.asarray(trusted), as_state(y), elsewhere)
    return attached_solution(
        condition,
        y,
        args,
        linear_solver=linear_solver,
        options=options,
        aux=aux,
        trusted=trusted,
        at=at,
        claim=claim,
    )


def attached_solution(
    condition: AbstractCondition[Y, Args],
    y: Y,
    args: Args,
    *,
    linear_solver: LinearSolver | None,
    options: dict[str, Any] | None,
    aux: Any,
    trusted: Bool[Array, ""] | bool,
    at: PyTree[Array] | None,
    claim: Claim | None,
) -> Y:
    """As `implicit_solution`, linearised `at` another state if it is given.

    A NaN value would turn the zero that nobody asked for into NaN, as 0 · ∂F/∂θ.
    """
    y, aux = cast(tuple[Y, Any], stop_gradient((as_state(y), aux)))
    hoisted = hoist(condition, y, args, aux)
    rule = _linear_rule(condition, linear_solver, options, trusted)
    theta_leaves, theta = flatten(as_arrays((hoisted, args)))
    at, claim = stop_gradient((at, claim))
    rest, attachment = flatten(_Attachment(aux, rule, claim))
    leaves, treedef = jtu.tree_flatten((y,) if at is None else (y, at))
    tangent = _tangent_of(treedef, theta, attachment)
    attached = attach(leaves, theta_leaves, rest, tangent)
    return jtu.tree_unflatten(treedef, attached)[0]


def root_jvp(
    fn: Callable[[Y, Args], Y],
    y: Y,
    args: Args,
    t_args: Args,
    *,
    linear_solver: LinearSolver | None = None,
    tags: object = frozenset(),
) -> Y:
    r"""Returns the tangent of a root in the direction of a tangent of its arguments.

    It is $\dot y = -(\partial_y F)^{-1}\partial_\theta F\,\dot\theta$.

    **Arguments:**

    - `fn`: the residual `F(y, args)`, zero at `y`, with the leaf shapes of `y`.
    - `y`: the root, any pytree of arrays of inexact dtype.
    - `args`, `t_args`: the parameters and their tangent, structured alike; a float is
        an array.
    - `linear_solver`, `tags`: how `∂F/∂y` is solved, and what is known of it.

    **Returns:** the tangent of the root, structured as `y`.

    **Raises:** `ValueError` if `t_args` does not fit `args`, and as
    [`eqximplicit.implicit_solution`][].
    """
    args = _floats_as_arrays(args)
    t_args = vector_at("tangent `t_args`", t_args, "`args`", args)

    def solution(args: Args) -> Y:
        return implicit_solution(Root(fn, tags), y, args, linear_solver=linear_solver)

    return eqx.filter_jvp(solution, (args,), (t_args,))[1]


def root_vjp(
    fn: Callable[[Y, Args], Y],
    y: Y,
    args: Args,
    ct_y: Y,
    *,
    linear_solver: LinearSolver | None = None,
    tags: object = frozenset(),
) -> Args:
    r"""Returns the cotangent of the arguments of a root.

    It is $\bar\theta = -(\partial_\theta F)^T (\partial_y F)^{-T}\,\bar y$.

    **Arguments:**

    - `fn`: the residual `F(y, args)`, zero at `y`, with the leaf shapes of `y`.
    - `y`: the root, any pytree of arrays of inexact dtype.
    - `args`: the parameters, any pytree; a float is an array.
    - `ct_y`: the cotangent of the root, structured as `y`.
    - `linear_solver`, `tags`: how `∂F/∂y` is solved, and what is known of it.

    **Returns:** the cotangent of `args`; `None` in place of leaves without one.

    **Raises:** `ValueError` if `ct_y` does not fit `y`, and as
    [`eqximplicit.implicit_solution`][].
    """
    ct_y = vector_at("cotangent `ct_y`", ct_y, "`y`", as_state(y))

    def solution(args: Args) -> Y:
        return implicit_solution(Root(fn, tags), y, args, linear_solver=linear_solver)

    return eqx.filter_vjp(solution, _floats_as_arrays(args))[1](ct_y)[0]


def _floats_as_arrays(args: Args) -> Args:
    return numbers_as_arrays(args, (float, complex))
