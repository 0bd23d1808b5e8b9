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
from jaxtyping import Array, Bool

from ._custom_types import LinearSolver, PyTree
from ._solution import is_successful
from ._state import filled, nonzero_and_finite, select, stop_gradient


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


def _solved(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> tuple[PyTree[Array], Bool[Array, ""], Bool[Array, ""]]:
    """The solution, NaN where it failed; whether `b` is not zero, and `A` is regular.

    Where `b` is zero the solution is zero: Krylov solvers divide by its norm.
    """
    solution, result, _ = rule.solver.compute(state, vector, options)
    asked, finite = nonzero_and_finite(vector, solution)
    ok = finite & rule.trusted & is_successful(result)
    regular = jnp.asarray(result != lx.RESULTS.singular) & rule.trusted
    return select(ok, solution, filled(solution, jnp.nan)), asked, regular


def _tangent(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> PyTree[Array]:
    # At a double root ∂F/∂θ is zero together with ∂F/∂y: that zero says nothing.
    solution, asked, regular = _solved(rule, state, options, vector)
    return select(asked | ~regular, solution, filled(solution, 0))


def _cotangent(
    rule: LinearRule, state: Any, options: dict[str, Any], vector: PyTree[Array]
) -> PyTree[Array]:
    # A zero cotangent is a lane that nobody asks about, and it must stay zero.
    solution, asked, _ = _solved(rule, state, options, vector)
    return select(asked, solution, filled(solution, 0))


def _joined(tree: PyTree[Array]) -> PyTree[Array]:
    # The transpose rule of `custom_linear_solve` wants all leaves of a right-hand side,
    # `b`, `Ȧx` or `Ȧᵀx`, to depend on θ as soon as one does. One primitive joins them.
    several = len(jtu.tree_leaves(tree)) > 1
    return jax.lax.optimization_barrier(tree) if several else tree


def differentiable_linear_solve(
    mv: Callable[[PyTree[Array]], PyTree[Array]],
    vector: PyTree[Array],
    rule: LinearRule,
) -> PyTree[Array]:
    r"""The solution `x` of `A x = b` for the linear map `A = mv`, in any AD mode.

    `jax.lax.custom_linear_solve` supplies the derivative

        ẋ  =  A⁻¹ (ḃ - Ȧ x)        b̄  =  A⁻ᵀ x̄        Ā  =  -b̄ xᵀ

    and calls the solver once more for each. What the solver computes from `A` alone (a
    factorisation) is computed once, and serves every right-hand side and the transpose.

    **Arguments:**

    - `mv`: a linear map on pytrees of the structure of `vector`, of one real dtype.
    - `vector`: the right-hand side `b`.
    - `rule`: the linear solver, its options, the tags of `A`, and whether to trust it.

    **Returns:** `x`, structured as `vector`. All NaN where the solver failed, the
    solution is not finite, or `rule.trusted` is false. A zero `b` is answered by zero:
    always in the transposed solve, in the forward one unless the operator is singular.
    """
    # `eval_shape` keeps the sharding, which `shard_map` wants to see again.
    structure = jax.eval_shape(lambda: vector)
    operator = lx.FunctionLinearOperator(mv, structure, rule.tags)
    # The factorisation carries no derivative: that of A enters through `operator.mv`.
    frozen: lx.AbstractLinearOperator = stop_gradient(operator)
    state = stop_gradient(rule.solver.init(frozen, rule.options))

    def solve(_: Any, b: PyTree[Array]) -> PyTree[Array]:
        return _tangent(rule, state, rule.options, b)

    def transpose_solve(_: Any, b: PyTree[Array]) -> PyTree[Array]:
        transposed, options = rule.solver.transpose(state, rule.options)
        return _cotangent(rule, transposed, options, b)

    return jax.lax.custom_linear_solve(
        lambda x: _joined(operator.mv(_joined(x))),
        _joined(vector),
        solve,
        transpose_solve,
    )
