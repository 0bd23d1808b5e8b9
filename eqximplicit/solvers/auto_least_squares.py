"""The default least-squares solver: Levenberg-Marquardt, verified by gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Scalar

from .._solution import Aux, Y
from ..linear_solvers._small import is_placed
from . import _vector_space as vs
from ._thin_qr import ThinQR
from ._verdict import check_tolerances, or_default
from ._verified import Problem, VerifiedDescent, VerifiedState
from .auto_minimiser import refuse_complex


class AutoLeastSquares(optx.AbstractLeastSquaresSolver[Y, Any, Aux, VerifiedState]):
    r"""Levenberg-Marquardt, whose success means a local minimum of the squares.

    optimistix's `LevenbergMarquardt` runs first, on a state of the default dtype
    outside of `jax.shard_map` (with a QR decomposition up to `dense_size` unknowns,
    else matrix-free by conjugate gradients on the normal equations). Where it stops,
    trust-region Newton-CG on $\tfrac12 \sum_i r_i(y)^2$ brings its gradient
    $J^\top r$ below `atol` at the very point returned, and the curvature is checked
    once; see [`eqximplicit.AutoMinimiser`][], whose limits on derivatives hold here as
    well.

    **Arguments:**

    - `rtol`: relative change of `y` that is insignificant. Dimensionless.
    - `atol`: the norm of the gradient `J^T r` that is asked for. Dimensionless. For
        both, `None` stands for 1e-8 in float64 and for 1e-5 in float32;
        `optx.root_find` and `optx.fixed_point`, which compare with them, want numbers.
    - `norm`: the norm of the gradient; the default is the largest absolute entry.
    - `dense_size`: up to this many unknowns the Jacobian is formed.
    - `search_steps`: the largest number of Levenberg-Marquardt steps.

    **Raises:**

    - `ValueError`: a negative tolerance, or a complex state.

    !!! example

        ```python
        optx.least_squares(residuals, eqi.AutoLeastSquares(), y0, args)
        ```

    ??? cite "References"

        J. J. Moré, *The Levenberg-Marquardt algorithm: implementation and theory*,
        Lecture Notes in Mathematics 630 (1978), 105-116.
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    norm: Callable[[Any], Scalar] = optx.max_norm
    dense_size: int = 300
    search_steps: int = 400

    def __check_init__(self) -> None:
        check_tolerances("AutoLeastSquares", self.rtol, self.atol)

    def _driver(self, y: Y) -> VerifiedDescent:
        rtol, atol = or_default(self.rtol, y), or_default(self.atol, y)
        search = None
        # optimistix's damping is of the default dtype: a float32 state beside float64
        # numbers is left to Newton-CG. So is one inside `shard_map`: lineax compares
        # the structures of vectors, and of some it has forgotten the sharding.
        plain = not is_placed(jax.eval_shape(lambda: y))
        if plain and vs.one_dtype(y) and vs.real_dtype(y) == jnp.result_type(float):
            small = vs.size(y) <= self.dense_size
            cg = lx.Normal(lx.CG(rtol=1e-6, atol=1e-6))
            linear_solver: Any = ThinQR() if small else cg
            search = optx.LevenbergMarquardt(rtol, atol, linear_solver=linear_solver)
        return VerifiedDescent(
            search=search,
            objective=half_sum_of_squares,
            search_steps=self.search_steps,
            rtol=rtol,
            atol=atol,
            norm=self.norm,
        )

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Any, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: Any,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> VerifiedState:
        """Returns the state of the first phase at `y`."""
        refuse_complex("AutoLeastSquares", y)
        problem = Problem(fn, args, options, tags)
        return self._driver(y).init(problem, y, f_struct, aux_struct)

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Any, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
    ) -> tuple[Y, VerifiedState, Aux]:
        """Returns the next point, by the phase that the solve is in."""
        problem = Problem(fn, args, options, tags)
        return self._driver(y).step(problem, y, state)

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Any, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the point has been judged, and how."""
        del fn, args, options, tags
        return self._driver(y).terminate(state)

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Any, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns `y` and the verdict in `stats`."""
        del fn, args, options, tags
        return y, aux, self._driver(y).stats(state, result)


def half_sum_of_squares(residual: Any) -> Scalar:
    """Returns half the sum of squared magnitudes of all entries."""
    dtype = vs.real_dtype(residual)
    return vs.dot(residual, residual, dtype) / jnp.asarray(2, dtype)
