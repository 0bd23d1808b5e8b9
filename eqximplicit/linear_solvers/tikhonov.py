"""Tikhonov regularisation, for systems that are nearly singular."""

from typing import Any

import equinox as eqx
import lineax as lx
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from .._custom_types import PyTree
from ._dense import MAX_BYTES
from ._measured import AbstractMeasuredSolver, approximate, Measured
from ._residual import norm
from ._spectral import decompose, structure_key
from .least_norm import LeastNormState


class Tikhonov(AbstractMeasuredSolver[LeastNormState]):
    r"""The regularised solution of a singular or nearly singular system.

    $$x = \arg\min_x\; \lVert Ax - b\rVert_2^2 + \delta^2\lVert x\rVert_2^2
        = (A^\top A + \delta^2 I)^{-1} A^\top b, \qquad \lVert x\rVert_2 \le
        \frac{\lVert b\rVert_2}{2\delta}.$$

    Each singular value $\sigma$ is inverted as $\sigma / (\sigma^2 + \delta^2)$, so
    that the condition number is not squared. Inexact by design: the result is
    successful if it is finite, and `stats["residual_norm"]` is `‖b - A x‖₂`. The
    operator may have any shape.

    **Arguments:**

    - `damping`: $\delta$, positive, in the units of `A`.
    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.

    ??? cite "References"

        P. C. Hansen, *Rank-Deficient and Discrete Ill-Posed Problems* (SIAM, 1998),
        section 5.1: Tikhonov regularisation and its filter factors.
    """

    damping: float = 1e-3
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def __check_init__(self) -> None:
        """Refuses a damping that is not positive."""
        if not isinstance(self.damping, Tracer) and self.damping <= 0:
            raise ValueError(
                f"`Tikhonov(damping={self.damping})` must be positive; for none at all "
                "use `LeastNorm()`."
            )

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> LeastNormState:
        """Returns the decomposition of the matrix of `operator`, computed once."""
        del options
        spectrum = decompose(operator, self.max_bytes, "Tikhonov")
        return LeastNormState(spectrum, structure_key(operator.out_structure()))

    def answer(
        self, state: LeastNormState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the regularised solution, its result and its `residual_norm`."""
        del options
        b, _ = ravel_pytree(vector)
        s = state.spectrum.s
        x, r = state.spectrum.apply(s / (s**2 + self.damping**2), b)
        return approximate(state.spectrum.lay_out(x), b, norm(r))

    def transpose(
        self, state: LeastNormState, options: dict[str, Any]
    ) -> tuple[LeastNormState, dict[str, Any]]:
        """Returns the state of the transposed operator: the same decomposition."""
        return state.transpose(), options

    def conj(
        self, state: LeastNormState, options: dict[str, Any]
    ) -> tuple[LeastNormState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: no."""
        return False
