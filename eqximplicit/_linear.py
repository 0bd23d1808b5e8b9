r"""THE RULE, second half: a linear solve over lineax that can itself be differentiated.

`lx.linear_solve` raises in its tangent and transposed solves; here every solve, forward
or transposed, answers a failure with NaN in its own lane, so a backward pass neither
throws nor calls the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool

from ._claim import Bend, Claim, Doubt, is_saddle
from ._custom_types import PyTree
from ._entries import all_finite
from ._linear_rule import (
    directly,
    factorised,
    LinearRule,
    normalised,
    solution,
    transposed,
    trusted_if,
)
from ._linearise import Linearised
from ._one_kernel import in_one_kernel
from ._primitives import flatten, Leaves, linear_solve, LinearSystem, once
from ._state import real_dtype, stop_gradient
from .linear_solvers import LeastNorm
from .linear_solvers._measured import AbstractMeasuredSolver
from .linear_solvers._residual import even
from .linear_solvers.checked import checked


class _System(NamedTuple):
    """What the solver has computed from an operator, and how to use it."""

    rule: LinearRule
    state: Any
    doubt: Doubt | None
    bend: Bend | None
    movable: Bool[Array, ""] | None  # as `_is_movable`


def _tangent(system: _System, vector: PyTree[Array]) -> PyTree[Array]:
    # At a double root ∂F/∂θ is zero together with ∂F/∂y: that zero says nothing.
    rule, state, doubt, bend, _ = system
    asked, found = directly(rule, state, vector)
    singular = jnp.asarray(found.result == lx.RESULTS.singular) | ~rule.trusted
    signs = [] if doubt is None else [doubt.contradicts()]
    if bend is not None:
        signs.append(bend.contradicts(asked.vector, found.x))
    return solution(rule, asked, found, found.asked | singular, signs)


def _cotangent(system: _System, vector: PyTree[Array]) -> PyTree[Array]:
    # A zero cotangent is a lane that nobody asks about, and it must stay zero.
    rule, state, doubt, bend, movable = system
    asked, found = transposed(rule, state, vector)
    signs = [] if movable is None else [lax.bitwise_not(movable)]
    if doubt is not None:
        signs.append(doubt.contradicts_cotangent(asked.vector, found.x))
    if bend is not None:
        signs.append(bend.contradicts(asked.vector, found.x))
    return solution(rule, asked, found, found.asked, signs)


def _examined(
    rule: LinearRule,
    claim: Claim | None,
    y: PyTree[Array],
    value: PyTree[Array],
    mv: Callable[[Any], PyTree[Array]],
) -> tuple[LinearRule, Doubt | None]:
    """The rule, trusted no further than the curvature allows, and what is in doubt."""
    if claim is None or (claim.distance is None and not claim.measured):
        # So nobody else holds the value against the condition.
        rule = trusted_if(rule, all_finite(value))
    if claim is None:
        return rule, None
    if claim.minimum:
        rule = trusted_if(rule, ~is_saddle(y, value, mv))
    if claim.distance is None:
        return rule, None
    distance = jnp.asarray(claim.distance, real_dtype(y))
    return rule, Doubt(y, value, distance, mv(even(y)))


def _bend_in_question(
    claim: Claim | None,
    residual: Callable[[Any, PyTree[Array]], PyTree[Array]],
    coefficients: Any,
    y: PyTree[Array],
    value: PyTree[Array],
) -> Bend | None:
    if claim is None or claim.multiple is False:
        return None
    left = jtu.tree_map(once, value)  # a step of rounding is one step, not several
    return Bend(y, left, coefficients, claim.multiple, residual)


def _unless_multiple(
    rule: LinearRule, bend: Bend | None, state: Any, symmetric: bool
) -> tuple[LinearRule, Bend | None]:
    """The rule, trusted only at a simple root, and what each of its answers is asked.

    A factorisation makes Newton's step cheap. An iteration of a symmetric operator is
    asked along its answers instead; of any other, it has Newton's step to find.
    """
    solver = rule.solver
    ours = isinstance(solver, AbstractMeasuredSolver)
    if bend is None or not (ours and solver.is_exact(state)):
        return rule, None
    direct = solver.is_direct(state)
    if symmetric and not direct:
        return rule, bend

    def solved(b: PyTree[Array]) -> PyTree[Array]:
        asked = normalised(rule, b, rule.options)
        if isinstance(bend.asked, bool):
            x = solver.answer(state, asked.vector, asked.options).x
        else:
            x = solver.seldom(state, asked.vector, asked.options)
        return asked.as_asked(x)

    bent = bend.is_found(solved, symmetric=symmetric, in_loop=not direct)
    return trusted_if(rule, lax.bitwise_not(bent)), None


def _is_movable(
    rule: LinearRule, state: Any, sample: Callable[[], PyTree[Array]] | None
) -> Bool[Array, ""] | None:
    """Whether the solution moves along a tangent of the parameters without a pattern.

    `LeastNorm` of a singular system fails for a tangent along which there is no
    solution. A cotangent knows nothing of that: it asks for all tangents at once, and
    so for any.
    """
    strict = isinstance(rule.solver, LeastNorm) and not rule.solver.least_squares
    if sample is None or not strict or rule.options.get("project", False):
        return None
    return directly(rule, state, sample())[1].good


def differentiable_linear_solve(
    residual: Callable[[Any, PyTree[Array]], PyTree[Array]],
    coefficients: Any,
    at: PyTree[Array],
    linear: Linearised,
    vector: PyTree[Array],
    rule: LinearRule,
    claim: Claim | None = None,
    sample: Callable[[], PyTree[Array]] | None = None,
) -> PyTree[Array]:
    r"""The solution `x` of `A x = b` for `A = ∂residual/∂y`, in any AD mode.

    It has the derivative

        ẋ  =  A⁻¹ (ḃ - Ȧ x)        b̄  =  A⁻ᵀ x̄        Ā  =  -b̄ xᵀ

    each of them a solve of the same kind. What the solver computes from `A` alone (a
    factorisation) is computed once, and serves every right-hand side and the transpose.

    **Arguments:**

    - `residual`: `(coefficients, y)` to a pytree like `vector`, of one real dtype.
    - `coefficients`, `at`: where the residual is linearised; `A` depends on both.
    - `linear`: the residual linearised there, along `y` (and whatever else).
    - `vector`: the right-hand side `b`.
    - `rule`: the linear solver, its options, the tags of `A`, and whether to trust it.
    - `claim`: what was claimed of `at`.
    - `sample`: a right-hand side that tells of all those there may be.

    **Returns:** `x`, structured as `vector`. All NaN where the solver failed, the
    solution is not finite (but for entries that overflow in the end), `rule.trusted` is
    false or `claim` is contradicted. A zero `b` is answered by zero: always in the
    transposed solve, in the forward one unless the operator is singular.
    """
    c_leaves, linearised_at = flatten((coefficients, at))
    b_leaves, b_tree = jtu.tree_flatten(vector)

    # The factorisation carries no derivative: that of A enters through `apply`.
    frozen, y, linear = stop_gradient((coefficients, at, linear))
    value, mv = linear.value, linear.along_y
    # `eval_shape` keeps the sharding, which `shard_map` wants to see again.
    structure = jax.eval_shape(lambda: vector)
    operator = lx.FunctionLinearOperator(mv, structure, rule.tags)
    rule = dataclasses.replace(rule, solver=checked(rule.solver, operator))
    rule, doubt = _examined(rule, claim, y, value, mv)
    state = factorised(rule, operator, value, y)
    bend = _bend_in_question(claim, residual, frozen, y, value)
    rule, bend = _unless_multiple(rule, bend, state, lx.is_symmetric(operator))
    movable = _is_movable(rule, state, sample)
    f_leaves, factors = flatten((rule, state, doubt, bend, movable))

    def apply(leaves: Leaves, v: Leaves) -> Leaves:
        coefficients, y = linearised_at.restored(leaves)
        tangent = jtu.tree_unflatten(b_tree, v)
        image = jax.jvp(lambda y: residual(coefficients, y), (y,), (tangent,))[1]
        return jtu.tree_leaves(image)

    def solved_by(how: Callable[..., PyTree[Array]]) -> Callable[..., Leaves]:
        def solve(leaves: Leaves, b: Leaves) -> Leaves:
            system, vector = factors.restored(leaves), jtu.tree_unflatten(b_tree, b)
            x = in_one_kernel(lambda: how(_System(*system), vector))
            return jtu.tree_leaves(x)

        return solve

    system = LinearSystem(apply, solved_by(_tangent), solved_by(_cotangent))
    x = linear_solve(f_leaves, c_leaves, b_leaves, system)
    return jtu.tree_unflatten(b_tree, x)
