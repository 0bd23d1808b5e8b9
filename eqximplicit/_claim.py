r"""What a solver claims of its value, and whether the value contradicts that.

optimistix's solvers stop when a step is small, and call that success. A step may be
small far from any solution (a tiny learning rate, a flat map), and at a saddle. Both
are seen at the value itself where the derivative is taken: the one in the linear solve
that is made anyway (`_linear.py`), the other in the Hessian. A solve without a
derivative computes nothing of it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from ._custom_types import PyTree
from ._state import max_abs
from .solvers._curvature import extreme_curvatures, is_negative
from .solvers._default import ROUNDINGS


class Claim(eqx.Module):
    r"""What is held against a value: a distance, a curvature, or both.

    **Attributes:**

    - `distance`: how far from a solution the value may be, relative to
        $\sqrt{1 + \|y\|^2}$; `None` if the solver has measured that.
    - `minimum`: whether it was said to be a minimum.
    """

    distance: Any
    minimum: bool = eqx.field(static=True)


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
