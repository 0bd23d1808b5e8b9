"""Openings: the plain method, as long as it works, before a robust one is started.

Most problems are easy. A robust solver keeps a record of what it has seen, and has many
decisions to take in every step; plain iteration and Newton's method need neither. So a
default solver opens with the plain method in a loop of its own, with nothing to carry
but the state, and is itself only started, under `jax.vmap` in any lane, where that
has stopped to converge well.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .._custom_types import PyTree
from .._problem import IteratedFn

# A budget below this is not shared with an opening.
LEAST_BUDGET = 32


class Opened(eqx.Module):
    """How far the opening has come.

    **Attributes:**

    - `y`: the solution where `solved`; where not, a start for the robust solver.
    - `aux`: the auxiliary output of the function at `y` where `solved`.
    - `num_steps`: the evaluations of the function so far,
    - `budget`: and those that count against `max_steps`, whatever other lanes did.
    - `stats`: where `solved`, the statistics that the robust solver would report.
    - `seen`: what the robust solver can start with besides `y`.
    """

    y: PyTree[Array]
    aux: Any
    solved: Bool[Array, ""]
    num_steps: Int[Array, ""]
    budget: Int[Array, ""]
    stats: dict[str, Any]
    seen: Any = None


class AbstractOpening(eqx.Module):
    """A solver that has an opening."""

    @abc.abstractmethod
    def opening(
        self,
        fn: IteratedFn,
        y: PyTree[Array],
        args: Any,
        aux: Any,
        max_steps: int | None,
    ) -> Opened | None:
        """Returns the outcome of the opening, or `None` if this state has none.

        `aux` is structured as the auxiliary output of `fn`.
        """

    def continued(self, state: Any, opened: Opened) -> tuple[Any, Int[Array, ""]]:
        """Returns the state of `init`, knowing what has been seen.

        And the number of steps that will repeat what the opening did.
        """
        del opened
        return state, jnp.zeros((), int)


def chosen(
    solved: Bool[Array, ""], opened: PyTree[Any], finished: PyTree[Any]
) -> PyTree[Any]:
    """The outcome of the opening where it solved the problem, else the other one."""
    return jtu.tree_map(lambda a, b: jnp.where(solved, a, b), opened, finished)
