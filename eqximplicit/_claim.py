r"""What a solver claims of its value, and whether the value contradicts that.

optimistix's solvers stop when a step is small, and call that success. A step may be
small far from any solution (a tiny learning rate, a flat map), and at a saddle. Both
are seen at the value itself where the derivative is taken, at the cost of products with
the Jacobian that is there anyway. A solve without a derivative computes nothing here.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool

from ._condition import AbstractCondition, LeastSquares, Minimum
from ._custom_types import PyTree
from .linear_solvers._residual import dot
from .solvers import _vector_space as vs, FIRE
from .solvers._curvature import extreme_curvatures

# The distance from a solution is only estimated, and a solver measures it in its own
# way: it is held to its tolerance times this, and never to more than three digits of a
# state of order one.
_SLACK, _DIGITS = 100.0, 1e-3
# Their step is itself the estimate of the distance.
_MEASURED = (optx.Newton, optx.Chord)


class Claim(eqx.Module):
    r"""What is held against a value: a distance, a curvature, or both.

    **Attributes:**

    - `distance`: how far from a solution the value may be, relative to
        $\sqrt{1 + \|y\|^2}$; `None` if the solver has measured that.
    - `minimum`: whether it was said to be a minimum.
    """

    distance: Any
    minimum: bool = eqx.field(static=True)

    def contradicted(
        self,
        y: PyTree[Array],
        residual: PyTree[Array],
        mv: Callable[[Any], PyTree[Array]],
    ) -> Bool[Array, ""]:
        """Returns whether `y`, with its `residual` and Jacobian `mv`, is neither."""
        wrong = list[Bool[Array, ""]]()
        if self.distance is not None:
            wrong.append(_is_farther(self.distance, y, residual, mv))
        if self.minimum:
            wrong.append(_is_saddle(y, mv))
        return functools.reduce(jnp.logical_or, wrong)


def claim_of(solver: Any, condition: AbstractCondition[Any, Any]) -> Claim | None:
    """What `solver` claims by reporting success; `None` if nothing is to be tested.

    Only optimistix's own solvers are held to a distance, and `FIRE` to having found a
    minimum: a callable has claimed nothing, and the other solvers of this package
    measure what they claim.
    """
    theirs = type(solver).__module__.partition(".")[0] == "optimistix"
    distance = None
    if theirs and not isinstance(solver, _MEASURED):
        distance = _largest(_SLACK * solver.rtol, _SLACK * solver.atol, _DIGITS)
    extremal = isinstance(condition, (Minimum, LeastSquares))
    minimum = extremal and (theirs or isinstance(solver, FIRE))
    claims = distance is not None or minimum
    return Claim(distance, minimum) if claims else None


def _largest(*values: Any) -> Any:
    if all(isinstance(value, float) for value in values):
        return max(values)
    return functools.reduce(jnp.maximum, values)


def _is_farther(
    distance: Any,
    y: PyTree[Array],
    residual: PyTree[Array],
    mv: Callable[[Any], PyTree[Array]],
) -> Bool[Array, ""]:
    r"""Whether `y` is farther than that from a solution, by $\|F\| / \|F' v\|$.

    With entries of `v` of order one and no pattern, $\|F' v\|$ is about the Frobenius
    norm of $F'$. So this is the root mean square of Newton's step $F'^{-1} F$ if all
    singular values are alike, and about its length at most whatever they are.
    """
    change = mv(jtu.tree_map(_even, y))
    limit = jnp.asarray(distance, vs.real_dtype(y)) ** 2 * (1 + dot(y, y))
    return dot(residual, residual) > limit * dot(change, change)


def _even(x: Array) -> Array:
    """Numbers between -1 and 1 without a pattern, in the shape of `x`."""
    phase = jnp.ones(x.shape, jnp.float32)
    for k in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.float32, x.shape, k)
        phase = phase + 2 ** (0.5 / (k + 1)) * index
    return jnp.cos(phase).astype(x.dtype)


def _is_saddle(y: PyTree[Array], mv: Callable[[Any], PyTree[Array]]) -> Bool[Array, ""]:
    lowest, largest = extreme_curvatures(mv, y)
    return lowest < -(vs.resolution(y) ** 0.5) * largest
