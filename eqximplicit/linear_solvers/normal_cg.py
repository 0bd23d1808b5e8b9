"""Conjugate gradients on the normal equations, stopped early on purpose."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from .._custom_types import PyTree
from .._entries import greatest, max_abs
from .._ranges import refuse_below, refuse_negative
from ._iterations import Found, System
from ._krylov_iterations import conjugate_gradient
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._residual import (
    add,
    dot,
    epsilon,
    is_zero,
    minus,
    norm,
    require_like,
    require_real,
    size,
    transposed_options,
    warn_if_unreachable,
)
from ._rounding import rounding_of_products

# As SciPy and lineax: in exact arithmetic one would do.
_STEPS_PER_UNKNOWN = 10
# What is accepted in any case, and how much more than it was asked for.
_ACCEPT, _SLACK = 1e-4, 10.0


class NormalCGState(eqx.Module):
    """A linearised operator; `rounding` is the epsilon of a product, or of `x`."""

    operator: lx.AbstractLinearOperator
    rounding: float = eqx.field(static=True)


class NormalCG(AbstractMeasuredSolver[NormalCGState]):
    r"""`max_steps` steps of conjugate gradients on $A^\top A x = A^\top b$.

    As TorchOpt's `solve_normal_cg(maxiter=..., atol=...)` and jaxopt's: where the steps
    are used up the answer is inexact by design, so the result is successful if it is
    finite, and `stats["residual_norm"]` says how far it is off. Without `max_steps` it
    runs to the tolerance, and a residual above it is a failure. The transposed system
    is solved by its own normal equations, $A A^\top x = A b$. Unlike in lineax's
    `Normal(CG(...))`, a start of zero takes no product.

    Products: two per step. The condition number is squared; for a symmetric positive
    operator use `lineax.CG`, and `AutoLinearSolver` otherwise.

    **Arguments:**

    - `max_steps`: the number of steps; `None` to run to the tolerance.
    - `rtol`, `atol`: stop earlier at `‖Aᵀ (b - A x)‖₂ <= rtol ‖Aᵀ b‖₂ + atol`; at the
        latest at the resolution of the products. Of an operator with fewer equations
        than unknowns, `‖b - A x‖₂ <= rtol ‖b‖₂ + atol`.
    - `accept`: without `max_steps`, the relative residual `‖b - A x‖₂ / ‖b‖₂` above
        which the solve has failed; 1e-4 if `None`, or ten times what it was asked for
        if that is more.

    **Options:**

    - `preconditioner`: an approximate inverse of `A`, a lineax operator.
    - `y0`: where to start; `y0_transpose` in the transposed system.
    """

    max_steps: int | None = eqx.field(default=None, static=True)
    rtol: float = 0.0
    atol: float = 0.0
    accept: float | None = None

    def __check_init__(self) -> None:
        """Refuses a solver that would never stop."""
        if self.max_steps is None and is_zero(self.rtol) and is_zero(self.atol):
            raise ValueError(
                "Nothing stops `NormalCG()`: pass `max_steps`, `rtol` or `atol`."
            )
        refuse_below("NormalCG", 1, max_steps=self.max_steps)
        refuse_negative("NormalCG", rtol=self.rtol, atol=self.atol, accept=self.accept)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> NormalCGState:
        """Returns the linearised operator."""
        del options
        require_real(operator)
        exact = self.max_steps is None  # else nobody asks how exact the products are
        own = epsilon(operator.in_structure())
        rounding = rounding_of_products(operator) if exact else own
        if exact:
            warn_if_unreachable("NormalCG", self.rtol, self.atol, rounding)
        return NormalCGState(lx.linearise(operator), rounding)

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
        x, _, steps = self._iterated(state, vector, options)
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
        rr, bb, (rtol, atol) = dot(r, r), dot(vector, vector), self._accepted(state)
        return measured(x, rr, bb, rtol=rtol, atol=atol, num_steps=steps)

    def _accepted(self, state: NormalCGState) -> tuple[Any, Any]:
        if self.accept is not None:
            return self.accept, 0.0
        asked = greatest(self.rtol, state.rounding)
        return greatest(_ACCEPT, _SLACK * asked), _SLACK * self.atol

    def _iterated(
        self, state: NormalCGState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Found:
        """The last iterate; of a wide operator, iterated in the space of `b`."""
        operator = state.operator
        mv, back, y0 = operator.mv, operator.transpose().mv, options.get("y0")
        preconditioner = options.get("preconditioner")
        if operator.out_size() >= operator.in_size():
            squared = _squared(preconditioner)
            tall = lambda v: back(mv(v))
            return self._solve(tall, back(vector), squared, y0, state.rounding)
        squared = _squared(preconditioner and preconditioner.transpose())
        left = vector if y0 is None else minus(vector, mv(y0))
        wide = lambda v: mv(back(v))
        found = self._solve(wide, left, squared, None, state.rounding)
        x = back(found.x)
        return found._replace(x=x if y0 is None else add(y0, x))

    def _solve(
        self,
        mv: Callable[[PyTree[Array]], PyTree[Array]],
        b: PyTree[Array],
        precondition: Callable[[PyTree[Array]], PyTree[Array]],
        y0: PyTree[Array] | None,
        rounding: float,
    ) -> Found:
        most = (
            _STEPS_PER_UNKNOWN * size(b) if self.max_steps is None else self.max_steps
        )
        begun = 0 if y0 is None else 1  # the product of a start is counted, but no step
        system = System(
            mv=mv,
            precondition=precondition,
            b=b,
            bb=dot(b, b),
            rtol=greatest(self.rtol, rounding),
            atol=self.atol,
            max_steps=most + begun,
        )
        found = conjugate_gradient(system, y0)
        return found._replace(steps=found.steps - begun)

    def transpose(
        self, state: NormalCGState, options: dict[str, Any]
    ) -> tuple[NormalCGState, dict[str, Any]]:
        """Returns the state of the transposed operator, and its options."""
        transposed = state.operator.transpose()
        return NormalCGState(transposed, state.rounding), transposed_options(options)

    def conj(
        self, state: NormalCGState, options: dict[str, Any]
    ) -> tuple[NormalCGState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: yes."""
        return True


def _squared(
    preconditioner: lx.AbstractLinearOperator | None,
) -> Callable[[PyTree[Array]], PyTree[Array]]:
    """`M Mᵀ`, which is an approximate inverse of `Aᵀ A` if `M` is one of `A`."""
    if preconditioner is None:
        return lambda r: r
    transposed = preconditioner.transpose()
    return lambda r: preconditioner.mv(transposed.mv(r))
