"""A direct solver for what is on one device, and another one for the rest."""

from typing import Any

import equinox as eqx
import jax
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

    def answer(
        self, state: PlacedState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        dtype = jtu.tree_leaves(vector)[0].dtype

        def by(solver: AbstractMeasuredSolver[Any], state: Any) -> Measured:
            found = solver.answer(state, vector, options)
            stats = {"residual_norm": found.stats["residual_norm"].astype(dtype)}
            return Measured(found.x, found.asked, found.good, found.result, stats)

        def otherwise() -> Measured:
            return by(self.otherwise, state.otherwise)

        def directly() -> Measured:
            found = by(self.direct, state.direct)
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
