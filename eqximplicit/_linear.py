r"""THE RULE, second half: a linear solve over lineax that can itself be differentiated.

`lx.linear_solve` raises in its tangent and transposed solves; here every solve, forward
or transposed, answers a failure with NaN in its own lane, so a backward pass neither
throws nor calls the host.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool

from ._custom_types import LinearSolver, PyTree
from ._primitives import flatten, Leaves, linear_solve, LinearSystem
from ._solution import is_successful
from ._state import nonzero_and_finite, stop_gradient
from .linear_solvers._measured import AbstractMeasuredSolver, Measured


class LinearRule(eqx.Module):
    """How the linear systems of a derivative are solved.

    **Attributes:**

    - `solver`: a lineax linear solver.
    - `options`: run-time options of that solver, such as a preconditioner.
    - `tags`: lineax tags of the operator.
    - `trusted`: bool, shape `()`. Where it is false the solution is NaN.
    """

    solver: LinearSolver
    options: dict[str, Any]
    tags: frozenset[object] = eqx.field(static=True)
    trusted: Bool[Array, ""]


def _answer(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> Measured:
    """The solution and what it is worth.

    A solver of ours has measured its answer; of any other, Krylov solvers divide by the
    norm of `b`, and some call an answer good that is not finite.
    """
    if isinstance(rule.solver, AbstractMeasuredSolver):
        return rule.solver.answer(state, vector, options)
    x, result, stats = rule.solver.compute(state, vector, options)
    asked, finite = nonzero_and_finite(vector, x)
    return Measured(x, asked, finite & is_successful(result), result, stats)


def _solved(rule: LinearRule, found: Measured, nan: Bool[Array, ""]) -> PyTree[Array]:
    """The solution where it is one, else NaN or zero: one choice for each entry."""
    keep = lax.bitwise_and(lax.bitwise_and(found.good, found.asked), rule.trusted)

    def leaf(x: Array) -> Array:
        missing, zero = (lax.full_like(x, value, shape=()) for value in (jnp.nan, 0))
        other = lax.select(nan, missing, zero)
        return lax.select(keep, x, lax.broadcast(other, x.shape))

    return jtu.tree_map(leaf, found.x)


def _tangent(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> PyTree[Array]:
    # At a double root ∂F/∂θ is zero together with ∂F/∂y: that zero says nothing.
    found = _answer(rule, state, options, vector)
    singular = jnp.asarray(found.result == lx.RESULTS.singular) | ~rule.trusted
    return _solved(rule, found, found.asked | singular)


def _cotangent(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> PyTree[Array]:
    # A zero cotangent is a lane that nobody asks about, and it must stay zero.
    found = _answer(rule, state, options, vector)
    return _solved(rule, found, found.asked)


def differentiable_linear_solve(
    residual: Callable[[Any, PyTree[Array]], PyTree[Array]],
    coefficients: Any,
    at: PyTree[Array],
    vector: PyTree[Array],
    rule: LinearRule,
) -> PyTree[Array]:
    r"""The solution `x` of `A x = b` for `A = ∂residual/∂y`, in any AD mode.

    It has the derivative

        ẋ  =  A⁻¹ (ḃ - Ȧ x)        b̄  =  A⁻ᵀ x̄        Ā  =  -b̄ xᵀ

    each of them a solve of the same kind. What the solver computes from `A` alone (a
    factorisation) is computed once, and serves every right-hand side and the transpose.

    **Arguments:**

    - `residual`: `(coefficients, y)` to a pytree like `vector`, of one real dtype.
    - `coefficients`, `at`: where the residual is linearised; `A` depends on both.
    - `vector`: the right-hand side `b`.
    - `rule`: the linear solver, its options, the tags of `A`, and whether to trust it.

    **Returns:** `x`, structured as `vector`. All NaN where the solver failed, the
    solution is not finite, or `rule.trusted` is false. A zero `b` is answered by zero:
    always in the transposed solve, in the forward one unless the operator is singular.
    """
    c_leaves, linearised_at = flatten((coefficients, at))
    b_leaves, b_tree = jtu.tree_flatten(vector)

    # The factorisation carries no derivative: that of A enters through `apply`.
    frozen, y = stop_gradient((coefficients, at))
    _, mv = jax.linearize(lambda y: residual(frozen, y), y)
    # `eval_shape` keeps the sharding, which `shard_map` wants to see again.
    structure = jax.eval_shape(lambda: vector)
    operator = lx.FunctionLinearOperator(mv, structure, rule.tags)
    state = rule.solver.init(operator, rule.options)
    f_leaves, factors = flatten((rule, state))

    def apply(leaves: Leaves, v: Leaves) -> Leaves:
        coefficients, y = linearised_at.restored(leaves)
        tangent = jtu.tree_unflatten(b_tree, v)
        image = jax.jvp(lambda y: residual(coefficients, y), (y,), (tangent,))[1]
        return jtu.tree_leaves(image)

    def solve(leaves: Leaves, b: Leaves) -> Leaves:
        rule, state = factors.restored(leaves)
        right = jtu.tree_unflatten(b_tree, b)
        return jtu.tree_leaves(_tangent(rule, state, rule.options, right))

    def solve_transposed(leaves: Leaves, b: Leaves) -> Leaves:
        rule, state = factors.restored(leaves)
        transposed, options = rule.solver.transpose(state, rule.options)
        right = jtu.tree_unflatten(b_tree, b)
        return jtu.tree_leaves(_cotangent(rule, transposed, options, right))

    system = LinearSystem(apply, solve, solve_transposed)
    x = linear_solve(f_leaves, c_leaves, b_leaves, system)
    return jtu.tree_unflatten(b_tree, x)
