"""A direct solver for what is on one device, and another one for what is not."""

from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array

from .._custom_types import PyTree
from .._placement import on_one_device
from ._measured import AbstractMeasuredSolver, Measured


class PlacedState(eqx.Module):
    """The states of both solvers; what is computed for one alone is dropped."""

    direct: Any
    otherwise: Any


class OnOneDevice(AbstractMeasuredSolver[PlacedState]):
    """`direct` on one device, `otherwise` for a state that may be sharded.

    The compiler decides, and compiles one of the two.
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

        def by(solver: AbstractMeasuredSolver[Any], state: Any) -> Measured:
            found = solver.answer(state, vector, options)
            stats = {"residual_norm": found.stats["residual_norm"]}
            return Measured(found.x, found.asked, found.good, found.result, stats)

        return jax.lax.cond(
            on_one_device(),
            lambda: by(self.direct, state.direct),
            lambda: by(self.otherwise, state.otherwise),
        )

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
