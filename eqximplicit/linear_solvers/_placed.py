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
from .._placement import by_placement
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
        return by_placement(_directly, _otherwise, (self, state, vector, options))

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


_Question = tuple[OnOneDevice, PlacedState, PyTree[Array], dict[str, Any]]


def _directly(question: _Question) -> Measured:
    solver, state, vector, options = question
    found = _told(solver.direct.answer(state.direct, vector, options), vector, 0)
    need = found.asked & ~found.good
    return jax.lax.cond(
        any_lane(need),
        lambda: where(need, _otherwise(question), found),
        lambda: found,
    )


def _otherwise(question: _Question) -> Measured:
    solver, state, vector, options = question
    found = solver.otherwise.answer(state.otherwise, vector, options)
    return _told(found, vector, 1)


def _told(found: Measured, vector: PyTree[Array], turn: int) -> Measured:
    """An answer with the same statistics, whoever gave it."""
    dtype = jtu.tree_leaves(vector)[0].dtype
    told, estimate = found.stats, "condition_estimate"
    stats = {
        "residual_norm": told["residual_norm"].astype(dtype),
        "num_steps": jnp.asarray(told.get("num_steps", 0), int),
        "fallback": jnp.asarray(told.get("fallback", 0) + turn, int),
        estimate: jnp.asarray(told.get(estimate, jnp.nan), dtype),
    }
    return Measured(found.x, found.asked, found.good, found.result, stats)
