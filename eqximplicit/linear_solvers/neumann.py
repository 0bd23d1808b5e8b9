"""The Neumann series: Jacobian-free, phantom and truncated gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int

from .._custom_types import PyTree
from .._ranges import refuse_below, refuse_negative, refuse_zero
from ._iterations import picard, System
from ._measured import AbstractMeasuredSolver, approximate, Measured, measured
from ._residual import (
    add,
    dot,
    epsilon,
    minus,
    norm,
    require_like,
    scale,
    structure,
    transposed_options,
    warn_if_unreachable,
)
from ._rounding import rounding_of_products
from .krylov import default_rtol

Vector = PyTree[Array]
_LIMIT = 1e7


class NeumannState(eqx.Module):
    """A linearised operator, and the epsilon of the lowest precision in a product."""

    operator: lx.AbstractLinearOperator
    rounding: float = eqx.field(static=True)  # zero where nobody asks


class Neumann(AbstractMeasuredSolver[NeumannState]):
    r"""The Neumann series of the inverse, truncated or run to a tolerance.

    With the step $\tau$ = `damping * alpha`,

    $$x_K = \tau\sum_{k=0}^{K-1}(I - \tau A)^k\, b, \qquad
    x_{k+1} = x_k + \tau\,(b - A x_k), \quad x_1 = \tau b.$$

    A `FixedPoint(fn)` has the residual `y - fn(y)`, so $A = I - J$ with
    $J = \partial\,\mathrm{fn}/\partial y$, and $I - \tau A = (1-\tau) I + \tau J$.
    For a residual of the other sign, $A = J - I$, pass `alpha=-1`.

    | solver | is |
    |---|---|
    | `Neumann(1)` | Jacobian-free backpropagation, one-step differentiation: $x = b$ |
    | `Neumann(k)` | truncated backpropagation through `k` steps at the solution |
    | `Neumann(k, damping=d)` | the phantom gradient, unrolled `k` steps damped by `d` |
    | `Neumann(k + 1, alpha=a)` | TorchOpt's `solve_inv(ns=True, maxiter=k, alpha=a)` |
    | `Neumann()` | the adjoint's own Picard iteration, to a tolerance |

    `damping` and `alpha` act only through their product; the two names are those of the
    two literatures. A truncated series is inexact by design: its result is successful
    if it is finite, and `stats["residual_norm"]` says how far it is off. It takes
    `K - 1` products (one more if `residual_norm` is used). Run to a tolerance, it
    converges if the spectral radius of $I - \tau A$ is below one, and fails otherwise.

    **Arguments:**

    - `num_terms`: the number of terms $K$, at least 1; `None` to run to the tolerance.
    - `damping`, `alpha`: dimensionless.
    - `rtol`, `atol`: for `num_terms=None`, stops at `‖b - A x‖₂ <= rtol ‖b‖₂ + atol`;
        an `rtol` of `None` is 1e-10 in float64 and 2e-6 in float32, but not less than
        the rounding of a product in a lower precision.
    - `max_steps`: for `num_terms=None`, the largest number of products.

    **Options:**

    - `preconditioner`: `M` in $x_{k+1} = x_k + \tau M (b - A x_k)$, a lineax operator.
    - `y0`: a start $x_0$, instead of zero; `y0_transpose` in the transposed system.

    ??? cite "References"

        - S. W. Fung et al., "JFB: Jacobian-free backpropagation for implicit networks",
          AAAI 36 (2022).
        - J. Bolte, E. Pauwels, S. Vaiter, "One-step differentiation of iterative
          algorithms", NeurIPS (2023).
        - Z. Geng et al., "On training implicit models", NeurIPS (2021), eq. (9): the
          phantom gradient.
        - J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by
          implicit differentiation", AISTATS (2020), theorem 1.
    """

    num_terms: int | None = eqx.field(default=None, static=True)
    damping: float = 1.0
    alpha: float = 1.0
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = eqx.field(default=1000, static=True)

    def __check_init__(self) -> None:
        """Refuses a series without terms, negative tolerances, and terms of no size."""
        refuse_below("Neumann", 1, num_terms=self.num_terms, max_steps=self.max_steps)
        refuse_negative("Neumann", rtol=self.rtol, atol=self.atol)
        refuse_zero("Neumann", damping=self.damping, alpha=self.alpha)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> NeumannState:
        """Returns the linearised operator."""
        del options
        structure(operator)  # which refuses what is not square, or not real
        rounding = 0.0
        if self.num_terms is None:
            rounding = rounding_of_products(operator)
            warn_if_unreachable("Neumann", self.rtol, self.atol, rounding)
        return NeumannState(lx.linearise(operator), rounding)

    def is_exact(self, state: NeumannState) -> bool:
        """Whether the series is summed to a tolerance."""
        del state
        return self.num_terms is None

    def answer(
        self, state: NeumannState, vector: Vector, options: dict[str, Any]
    ) -> Measured:
        """Returns the sum, its result, its `residual_norm` and `num_steps`."""
        for key in ("preconditioner", "y0"):
            require_like(options.get(key), vector, key)
        if self.num_terms is None:
            return self._to_tolerance(state, vector, options)
        return self._truncated(state, vector, options, self.num_terms)

    def _increment(self, r: Vector, options: dict[str, Any]) -> Vector:
        preconditioner = options.get("preconditioner")
        r = r if preconditioner is None else preconditioner.mv(r)
        return scale(self.damping * self.alpha, r)

    def _truncated(
        self, state: NeumannState, vector: Vector, options: dict[str, Any], terms: int
    ) -> Measured:
        def residual(x: Vector) -> Vector:
            return minus(vector, state.operator.mv(x))

        def step(_: Int[Array, ""], x: Vector) -> Vector:
            return add(x, self._increment(residual(x), options))

        if "y0" in options:
            first, steps = options["y0"], terms
        else:
            first, steps = self._increment(vector, options), terms - 1
        x = jax.lax.fori_loop(0, steps, step, first)
        # XLA drops this product where nobody looks at the residual.
        return approximate(x, vector, norm(residual(x)), num_steps=jnp.asarray(steps))

    def _to_tolerance(
        self, state: NeumannState, vector: Vector, options: dict[str, Any]
    ) -> Measured:
        default = default_rtol(epsilon(vector), state.rounding)
        rtol = default if self.rtol is None else self.rtol
        system = System(
            mv=state.operator.mv,
            precondition=lambda r: self._increment(r, options),
            b=vector,
            bb=dot(vector, vector),
            rtol=rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )
        # Ten million times the start: it diverges, and will not come back.
        it = picard(
            system, options.get("y0"), lambda rr, _: rr <= _LIMIT**2 * system.bb
        )
        full = lx.RESULTS.where(
            it.steps >= self.max_steps,
            lx.RESULTS.max_steps_reached,
            lx.RESULTS.breakdown,
        )
        return measured(
            it.x,
            it.rr,
            system.bb,
            rtol=rtol,
            atol=self.atol,
            failure=full,
            num_steps=it.steps,
        )

    def transpose(
        self, state: NeumannState, options: dict[str, Any]
    ) -> tuple[NeumannState, dict[str, Any]]:
        """Returns the state of the transposed operator, and its options."""
        transposed = state.operator.transpose()
        return NeumannState(transposed, state.rounding), transposed_options(options)

    def conj(
        self, state: NeumannState, options: dict[str, Any]
    ) -> tuple[NeumannState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: yes."""
        return True
