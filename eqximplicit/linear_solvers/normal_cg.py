"""Conjugate gradients on the normal equations, stopped early on purpose."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from .._custom_types import PyTree
from .._entries import max_abs
from .._ranges import refuse_below, refuse_negative
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._residual import (
    add,
    dot,
    is_zero,
    minus,
    norm,
    require_like,
    require_real,
    transposed_options,
)


class NormalCGState(eqx.Module):
    """A linearised operator."""

    operator: lx.AbstractLinearOperator


class NormalCG(AbstractMeasuredSolver[NormalCGState]):
    r"""`max_steps` steps of conjugate gradients on $A^\top A x = A^\top b$.

    As TorchOpt's `solve_normal_cg(maxiter=..., atol=...)` and jaxopt's: where the steps
    are used up the answer is inexact by design, so the result is successful if it is
    finite, and `stats["residual_norm"]` says how far it is off. Without `max_steps` it
    runs to the tolerance, and a residual above it is a failure. The transposed system
    is solved by its own normal equations, $A A^\top x = A b$. The iteration is lineax's
    `CG` under `Normal`.

    Products: two per step. The condition number is squared; for a symmetric positive
    operator use `lineax.CG`, and `AutoLinearSolver` otherwise.

    **Arguments:**

    - `max_steps`: the number of steps; `None` to run to the tolerance.
    - `rtol`, `atol`: stop earlier at `‖Aᵀ (b - A x)‖ <= rtol ‖Aᵀ b‖ + atol`, as lineax
        measures it (largest entry, relative entry by entry). Both zero: no test.
    - `accept`: without `max_steps`, the relative residual `‖b - A x‖₂ / ‖b‖₂` above
        which the solve has failed.

    **Options:**

    - `preconditioner`: an approximate inverse of `A`, a lineax operator.
    - `y0`: where to start; `y0_transpose` in the transposed system.
    """

    max_steps: int | None = eqx.field(default=None, static=True)
    rtol: float = 0.0
    atol: float = 0.0
    accept: float = 1e-4

    def __check_init__(self) -> None:
        """Refuses a solver that would never stop."""
        if self.max_steps is None and is_zero(self.rtol) and is_zero(self.atol):
            raise ValueError(
                "Nothing stops `NormalCG()`: pass `max_steps`, `rtol` or `atol`."
            )
        refuse_below("NormalCG", 1, max_steps=self.max_steps)
        refuse_negative("NormalCG", rtol=self.rtol, atol=self.atol)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> NormalCGState:
        """Returns the linearised operator."""
        del options
        require_real(operator)
        return NormalCGState(lx.linearise(operator))

    def is_exact(self, state: NormalCGState) -> bool:
        """Whether the iteration runs to its tolerance."""
        del state
        return self.max_steps is None

    def answer(
        self, state: NormalCGState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, its `residual_norm` and `num_steps`."""
        require_like(options.get("preconditioner"), vector, "preconditioner")
        unknown = state.operator.in_structure()
        require_like(options.get("y0"), unknown, "y0", "unknown")
        x, steps = self._iterated(state.operator, vector, options)
        r = minus(vector, state.operator.mv(x))
        if self.max_steps is not None:
            # A NaN in the operator ends the iteration at once, at a finite start. From
            # zero that is an answer of no regular square system, but to zero.
            square = state.operator.in_size() == state.operator.out_size()
            if square and "y0" not in options:
                finite = (max_abs(x) > 0) | (max_abs(vector) == 0)
            else:
                finite = jnp.isfinite(max_abs(r))
            return approximate(x, vector, norm(r), regular=finite, num_steps=steps)
        rr, bb = dot(r, r), dot(vector, vector)
        return measured(x, rr, bb, rtol=self.accept, num_steps=steps)

    def _iterated(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> tuple[PyTree[Array], Any]:
        """The last iterate, and the number of steps."""
        inner = lx.Normal(
            lx.CG(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        )
        own = {k: v for k, v in options.items() if k in ("preconditioner", "y0")}
        first = None
        if operator.out_size() < operator.in_size() and "y0" in own:
            # lineax iterates in the space of `b` then: what is left is solved for.
            first = own.pop("y0")
            vector = minus(vector, operator.mv(first))
        x, _, stats = inner.compute(inner.init(operator, own), vector, own)
        return x if first is None else add(first, x), stats["num_steps"]

    def transpose(
        self, state: NormalCGState, options: dict[str, Any]
    ) -> tuple[NormalCGState, dict[str, Any]]:
        """Returns the state of the transposed operator, and its options."""
        transposed = state.operator.transpose()
        return NormalCGState(transposed), transposed_options(options)

    def conj(
        self, state: NormalCGState, options: dict[str, Any]
    ) -> tuple[NormalCGState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: yes."""
        return True
