"""How one linear system of a derivative is solved, and what its answer is worth.

Every failure is an answer of NaN, or of zero where nobody asked; nothing is raised.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool

from ._custom_types import LinearSolver, PyTree
from ._entries import nonzero_and_finite
from ._solution import is_successful
from ._state import real_dtype
from .linear_solvers._dense import UNSURE
from .linear_solvers._measured import (
    AbstractMeasuredSolver,
    as_given,
    Asked,
    in_range,
    Measured,
)
from .linear_solvers._residual import is_zero, norm


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


def normalised(
    rule: LinearRule, vector: PyTree[Array], options: dict[str, Any]
) -> Asked:
    """The question in other units, so that its square is a number, and not zero.

    So an absolute tolerance is one relative to a largest entry below one. Where there
    is none, float64 has the range as it is.
    """
    wide = jnp.finfo(real_dtype(vector)).bits >= 64
    relative = isinstance(rule.solver, AbstractMeasuredSolver) and is_zero(
        getattr(rule.solver, "atol", 0.0)
    )
    if wide and relative:
        return as_given(vector, options)
    return in_range(vector, options, small=1.0)


def _answer(rule: LinearRule, state: Any, asked: Asked) -> Measured:
    """The solution and what it is worth.

    A solver of ours has measured its answer; of any other, Krylov solvers divide by the
    norm of `b`, and some call an answer good that is not finite.
    """
    if isinstance(rule.solver, AbstractMeasuredSolver):
        return rule.solver.answer(state, asked.vector, asked.options)
    x, result, stats = rule.solver.compute(state, asked.vector, asked.options)
    nonzero, finite = nonzero_and_finite(asked.vector, x)
    return Measured(x, nonzero, finite & is_successful(result), result, stats)


def directly(
    rule: LinearRule, state: Any, vector: PyTree[Array]
) -> tuple[Asked, Measured]:
    """The system for a tangent in other units, and its answer in them."""
    asked = normalised(rule, vector, rule.options)
    return asked, _answer(rule, state, asked)


def transposed(
    rule: LinearRule, state: Any, vector: PyTree[Array]
) -> tuple[Asked, Measured]:
    """The transposed system for a cotangent in other units, and its answer in them."""
    state, options = rule.solver.transpose(state, rule.options)
    asked = normalised(rule, vector, options)
    return asked, _answer(rule, state, asked)


def solution(
    rule: LinearRule,
    asked: Asked,
    found: Measured,
    nan: Bool[Array, ""],
    signs: Sequence[Bool[Array, ""]],
) -> PyTree[Array]:
    """The solution where it is one, else NaN or zero: one choice for each entry.

    It is none where any of `signs` says that something is wrong.
    """
    keep = lax.bitwise_and(lax.bitwise_and(found.good, found.asked), rule.trusted)
    for wrong in signs:
        keep = lax.bitwise_and(keep, lax.bitwise_not(wrong))

    def leaf(x: Array) -> Array:
        missing, zero = (lax.full_like(x, value, shape=()) for value in (jnp.nan, 0))
        other = lax.select(nan, missing, zero)
        return lax.select(keep, x, lax.broadcast(other, x.shape))

    return jtu.tree_map(leaf, asked.as_asked(found.x))


def trusted_if(rule: LinearRule, fine: Bool[Array, ""]) -> LinearRule:
    """The rule, trusted no further."""
    return dataclasses.replace(rule, trusted=lax.bitwise_and(rule.trusted, fine))


def factorised(
    rule: LinearRule,
    operator: lx.AbstractLinearOperator,
    value: PyTree[Array],
    y: PyTree[Array],
) -> Any:
    """What the solver computes from the operator alone, at `y` of residual `value`."""
    return rule.solver.init(operator, _at_a_point(rule, operator, value, y))


def _at_a_point(
    rule: LinearRule,
    operator: lx.AbstractLinearOperator,
    value: PyTree[Array],
    y: PyTree[Array],
) -> dict[str, Any]:
    """The options, with how well a symmetric operator is known.

    A minimum is found up to a gradient `g`. A flat direction, the motion `t = G y` of a
    symmetry with generator `G`, has the curvature `A t = -G g` there instead of zero:
    so much is uncertain of `A`, relative to `t`.
    """
    ours = isinstance(rule.solver, AbstractMeasuredSolver)
    if not ours or not lx.is_symmetric(operator):
        return rule.options
    size = norm(y)
    error = UNSURE * norm(value) / jnp.where(size > 0, size, jnp.inf)
    return {"operator_error": error, **rule.options}
