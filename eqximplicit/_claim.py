r"""What a solver claims of its value, and whether the value contradicts that.

optimistix's solvers stop when a step is small, and call that success. A step may be
small far from any solution (a tiny learning rate, a flat map), at a saddle, and at a
solution that turns back or parts in two. All are seen at the value itself where the
derivative is taken: the first in the linear solve that is made anyway (`_linear.py`),
the second in the Hessian, the third along Newton's step. A solve without a derivative
computes nothing of it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float

from ._custom_types import PyTree
from ._entries import max_abs
from ._lanes import any_lane
from .linear_solvers._residual import inner
from .solvers._curvature import extreme_curvatures, is_negative
from .solvers._default import ROUNDINGS
from .solvers._multiple import bends, bends_along


class Claim(eqx.Module):
    r"""What is held against a value: a distance, a curvature, or both.

    **Attributes:**

    - `distance`: how far from a solution the value may be, relative to
        $\sqrt{1 + \|y\|^2}$; `None` for any.
    - `measured`: whether the solver is known to have looked at the residual there.
    - `minimum`: whether it was said to be a minimum.
    - `multiple`: whether it may be a multiple root, for all that is known.
    """

    distance: Any
    measured: bool = eqx.field(static=True)
    minimum: bool = eqx.field(static=True)
    multiple: Bool[Array, ""] | bool


class Doubt(eqx.Module):
    r"""The residual of a value that is claimed to be a solution.

    Newton's step from the value, $A^{-1} F$, is its distance from a solution, and must
    not exceed `distance` times $\sqrt{1 + \|y\|^2}$. A cotangent tells as much of it
    as the derivative depends on: $\langle \bar y, A^{-1} F\rangle = \langle
    A^{-T}\bar y, F\rangle$. A tangent tells nothing, and the step is estimated by
    $\|F\| / \|A v\|$: with entries of $v$ of order one and no pattern, $\|A v\|$ is
    about the Frobenius norm of $A$. So it is the root mean square of the step if all
    singular values are alike, and about its length at most whatever they are.
    """

    y: PyTree[Array]
    residual: PyTree[Array]
    distance: Float[Array, ""]
    change: PyTree[Array]  # A v

    def contradicts_cotangent(
        self, vector: PyTree[Array], x: PyTree[Array]
    ) -> Bool[Array, ""]:
        """Whether the step is too long, along the cotangent `vector`."""
        moved = inner(x, self.residual)
        return _exceeds(moved * moved, self._allowed() * inner(vector, vector))

    def contradicts(self) -> Bool[Array, ""]:
        """Whether Newton's step is too long, by estimate."""
        left = inner(self.residual, self.residual)
        return _exceeds(left, self._allowed() * inner(self.change, self.change))

    def _allowed(self) -> Float[Array, ""]:
        """The square of the longest step."""
        return self.distance**2 * (1 + inner(self.y, self.y))


class Bend(eqx.Module):
    """The residual near a value that may be a multiple root."""

    y: PyTree[Array]
    value: PyTree[Array]
    coefficients: Any
    asked: Bool[Array, ""] | bool
    residual: Callable[[Any, PyTree[Array]], PyTree[Array]] = eqx.field(static=True)

    def is_found(
        self,
        solved: Callable[[PyTree[Array]], PyTree[Array]],
        *,
        symmetric: bool,
        in_loop: bool,
    ) -> Bool[Array, ""]:
        """Whether there is one along Newton's step; `solved` takes `b` to `A⁻¹ b`."""
        bent = lambda: bends(
            self._of_y, solved, self.y, self.value, symmetric=symmetric, in_loop=in_loop
        )
        if isinstance(self.asked, bool):
            return bent()
        no = jnp.zeros_like(self.asked)
        return lax.cond(any_lane(self.asked), lambda: self.asked & bent(), lambda: no)

    def contradicts(self, vector: PyTree[Array], x: PyTree[Array]) -> Bool[Array, ""]:
        """Whether there is one along the solution `x` of `A x = vector`."""
        bent = bends_along(self._of_y, self.y, self.value, vector, x)
        return bent & self.asked

    def _of_y(self, y: PyTree[Array]) -> PyTree[Array]:
        return self.residual(self.coefficients, y)


def is_saddle(
    y: PyTree[Array], gradient: PyTree[Array], mv: Callable[[Any], PyTree[Array]]
) -> Bool[Array, ""]:
    """Whether a Hessian `mv` at `y` has a direction of negative curvature."""
    lowest, largest = extreme_curvatures(mv, y)
    return is_negative(lowest, largest, y, gradient)


def is_rounding(
    residual: Callable[[Any], PyTree[Array]],
    y: PyTree[Array],
    left: PyTree[Array],
    eps: float,
) -> Bool[Array, ""]:
    """Whether roundings of `y` move the residual by as much as is `left` of it."""
    moved = residual(jtu.tree_map(lambda x: x * (1 + eps), y))
    change = jtu.tree_map(lambda a, b: a - b, moved, left)
    return max_abs(left) <= ROUNDINGS * max_abs(change)


def _exceeds(number: Array, limit: Array) -> Bool[Array, ""]:
    """Whether it does, or is NaN."""
    return lax.bitwise_not(lax.le(number, limit))
