"""A solve that stops after so many steps and takes what it has."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, Scalar

from .._custom_types import PyTree, ShapeDtypeStruct
from ..solvers._accepted import AbstractAccepted

Y = TypeVar("Y")
Aux = TypeVar("Aux")


class _State(eqx.Module):
    inner: Any
    num_steps: Int[Array, ""]


class _Displacement(eqx.Module):
    """The root form `y - fn(y)` of a fixed-point map with auxiliary output."""

    fn: Callable[..., Any]

    def __call__(self, y: Any, args: Any) -> tuple[Any, Any]:
        out, aux = self.fn(y, args)
        return jtu.tree_map(lambda a, b: a - b, y, out), aux


class FixedBudget(
    AbstractAccepted, optx.AbstractFixedPointSolver[Y, Aux, _State], Generic[Y, Aux]
):
    r"""At most `num_steps` steps of another solver, whose last state is accepted.

    A budget that runs out is a success here, on purpose: the solution may be far from
    the equilibrium, and its implicit derivative is then that of a nearby problem (the
    linear system is built at the state that the budget bought). Without this wrapper an
    unconverged solve has NaN derivatives. `stats["converged"]` and
    `stats["residual_norm"]` say how good the state is; a NaN state still fails.

    **Arguments:**

    - `solver`: any fixed-point solver or root finder of optimistix's interface.
    - `num_steps`: the budget, at least 1: an int, or an int array of shape `()` that
        may change without compiling anew. The solve stops earlier where `solver` has
        converged or given up; with tolerances of zero it spends the whole budget.

    **Raises:** `TypeError` for a solver of another kind, `ValueError` for a budget
    below 1.

    !!! example

        ```python
        picard = optx.FixedPointIteration(rtol=1e-3, atol=1e-3)
        layer = eqi.nn.DEQ(cell, eqi.nn.FixedBudget(picard, 12))
        ```
    """

    solver: optx.AbstractIterativeSolver[Any, Any, Any, Any]
    num_steps: int | Int[Array, ""]
    rtol: float
    atol: float
    norm: Callable[[PyTree[Array]], Scalar]

    def __init__(
        self,
        solver: optx.AbstractIterativeSolver[Any, Any, Any, Any],
        num_steps: int | Int[Array, ""],
    ):
        kinds = (optx.AbstractFixedPointSolver, optx.AbstractRootFinder)
        if not isinstance(solver, kinds):
            raise TypeError(
                "`FixedBudget` needs a fixed-point solver or a root finder; got "
                f"{type(solver).__name__}."
            )
        if isinstance(num_steps, int) and num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
        self.solver = solver
        self.num_steps = num_steps
        self.rtol, self.atol, self.norm = solver.rtol, solver.atol, solver.norm

    def _fn(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        rooted = isinstance(self.solver, optx.AbstractRootFinder)
        return _Displacement(fn) if rooted else fn

    def init(
        self,
        fn: Callable[[Y, PyTree[Any]], tuple[Y, Aux]],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[ShapeDtypeStruct],
        aux_struct: PyTree[ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> _State:
        """Returns the wrapped solver's state and the count of steps."""
        inner = self.solver.init(
            self._fn(fn), y, args, options, f_struct, aux_struct, tags
        )
        return _State(inner, jnp.zeros((), jnp.int32))

    def step(
        self,
        fn: Callable[[Y, PyTree[Any]], tuple[Y, Aux]],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Y, _State, Aux]:
        """Returns one step of the wrapped solver."""
        y, inner, aux = self.solver.step(
            self._fn(fn), y, args, options, state.inner, tags
        )
        return y, _State(inner, state.num_steps + 1), aux

    def _verdict(
        self, fn: Any, y: Any, args: Any, options: Any, state: _State, tags: Any
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the wrapped solver wants to stop, and whether it is satisfied."""
        done, result = self.solver.terminate(
            self._fn(fn), y, args, options, state.inner, tags
        )
        succeeded = result == optx.RESULTS.successful
        return done | ~succeeded, done & succeeded

    def terminate(
        self,
        fn: Callable[[Y, PyTree[Any]], tuple[Y, Aux]],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the budget is spent or the wrapped solver has stopped."""
        stopped, _ = self._verdict(fn, y, args, options, state, tags)
        spent = state.num_steps >= jnp.asarray(self.num_steps, state.num_steps.dtype)
        return stopped | spent, optx.RESULTS.successful

    def postprocess(
        self,
        fn: Callable[[Y, PyTree[Any]], tuple[Y, Aux]],
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns the wrapped solver's state, and whether it had converged."""
        _, converged = self._verdict(fn, y, args, options, state, tags)
        y, aux, stats = self.solver.postprocess(
            self._fn(fn), y, aux, args, options, state.inner, tags, result
        )
        kept = {name: stat for name, stat in stats.items() if name != "result"}
        return y, aux, {**kept, "converged": converged}
