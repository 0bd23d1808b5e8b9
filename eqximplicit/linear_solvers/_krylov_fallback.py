"""What a matrix-free solve falls back on, and what it answers with either way."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import LinearSolver, PyTree
from ._krylov_iterations import Found


class KrylovState(eqx.Module):
    """A linearised operator; `sign` is -1 for one tagged negative.

    `error` is how far off a symmetric operator may be, in norm; `None` for not at all.
    `rounding` is the epsilon of the lowest precision in a product.
    """

    operator: lx.AbstractLinearOperator
    error: Float[Array, ""] | None
    sign: int = eqx.field(static=True)
    symmetric: bool = eqx.field(static=True)
    rounding: float = eqx.field(static=True)
    transposed: bool = eqx.field(default=False, static=True)  # of a symmetric one


class Outcome(eqx.Module):
    """An answer, its squared residual norm, the products it took, and who gave it."""

    x: PyTree[Array]
    rr: Float[Array, ""]
    steps: Int[Array, ""]
    direct: Bool[Array, ""]  # whether the direct solver answered,
    failed: Bool[Array, ""]  # and could not


def iterated(found: Found) -> Outcome:
    """The answer of an iteration."""
    no = jnp.asarray(False)
    return Outcome(found.x, found.rr, found.steps, no, no)


def direct(
    solver: LinearSolver,
    factors: Any,
    vector: PyTree[Array],
    options: dict[str, Any],
    steps: Int[Array, ""],
) -> Outcome:
    """The answer of a direct solver, after so many `steps` of another."""
    x, result, stats = solver.compute(factors, vector, options)
    yes = jnp.asarray(True)
    failed = result != lx.RESULTS.successful
    return Outcome(x, stats["residual_norm"] ** 2, steps, yes, failed)


def factorised(solver: LinearSolver, state: KrylovState) -> Any:
    """What a direct solver computes from the operator."""
    options = {} if state.error is None else {"operator_error": state.error}
    factors = solver.init(state.operator, options)
    # A direct solver does not take a tag at its word: the matrix may be skew.
    return solver.transpose(factors, {})[0] if state.transposed else factors


def columns(
    solver: LinearSolver, state: KrylovState, vector: PyTree[Array], axes: Any
) -> Outcome:
    """The answers to many right-hand sides, along `axes`, by one factorisation."""
    factors = factorised(solver, state)
    none = jnp.asarray(0)
    return jax.vmap(lambda b: direct(solver, factors, b, {}, none), (axes,))(vector)
