"""A direct solver for what is on one device, and another one for the rest."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array

from .._custom_types import PyTree
from .._lanes import any_lane
from .._placement import on_one_device
from ._measured import AbstractMeasuredSolver, Measured
from ._residual import where


class PlacedState(eqx.Module):
    """The states of both solvers; what is computed for one alone is dropped."""

    direct: Any
    otherwise: Any


class OnOneDevice(AbstractMeasuredSolver[PlacedState]):
    """`direct` on one device, where it has an answer; `otherwise` in any other case.

    Of a program for several devices the compiler drops the direct solver.
    """

    direct: AbstractMeasuredSolver[Any]
    otherwise: AbstractMeasuredSolver[Any]

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> PlacedState:
        """Returns the states of both."""
        return PlacedState(
            self.direct.init(operator, options), self.otherwise.init(operator, options)
        )

    def is_exact(self, state: PlacedState) -> bool:
        """Whether both solve the system."""
        return self.direct.is_exact(state.direct) and self.otherwise.is_exact(
            state.otherwise
        )

    def answer(
        self, state: PlacedState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, its `residual_norm`, and who answered.

        `fallback` is zero if that was `direct`, and otherwise one more than
        `otherwise` says. What a solver does not tell is zero steps, and a
        `condition_estimate` of NaN.
        """
        dtype = jtu.tree_leaves(vector)[0].dtype

        def by(solver: AbstractMeasuredSolver[Any], state: Any, turn: int) -> Measured:
            found = solver.answer(state, vector, options)
            told, estimate = found.stats, "condition_estimate"
            stats = {
                "residual_norm": told["residual_norm"].astype(dtype),
                "num_steps": jnp.asarray(told.get("num_steps", 0), int),
                "fallback": jnp.asarray(told.get("fallback", 0) + turn, int),
                estimate: jnp.asarray(told.get(estimate, jnp.nan), dtype),
            }
            return Measured(found.x, found.asked, found.good, found.result, stats)

        def otherwise() -> Measured:
            return by(self.otherwise, state.otherwise, 1)

        def directly() -> Measured:
            found = by(self.direct, state.direct, 0)
            need = found.asked & ~found.good
            return jax.lax.cond(
                any_lane(need), lambda: where(need, otherwise(), found), lambda: found
            )

        return jax.lax.cond(on_one_device(), directly, otherwise)

    def transpose(
        self, state: PlacedState, options: dict[str, Any]
    ) -> tuple[PlacedState, dict[str, Any]]:
        """Returns the states of the transposed operator."""
        direct, _ = self.direct.transpose(state.direct, options)
        otherwise, options = self.otherwise.transpose(state.otherwise, options)
        return PlacedState(direct, otherwise), options

    def conj(
        self, state: PlacedState, options: dict[str, Any]
    ) -> tuple[PlacedState, dict[str, Any]]:
        """Returns the same states: matrices are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """`True`: a singular operator is a failure."""
        return True
