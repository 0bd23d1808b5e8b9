"""The default minimiser: chosen by size, verified by gradient and curvature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Scalar

from .._entries import greatest
from .._solution import Aux, Y
from ..linear_solvers._small import is_placed
from . import _vector_space as vs
from ._verdict import check_tolerances, or_default
from ._verified import Problem, VerifiedDescent, VerifiedState

SEARCH_TOL = 1e-4  # the search only has to come close: Newton steps do the rest


class AutoMinimiser(optx.AbstractMinimiser[Y, Aux, VerifiedState]):
    r"""A minimiser without knobs, whose success means a minimum to second order.

    It runs optimistix's `BFGS` (up to `dense_size` unknowns), `LBFGS` (above, or
    `NonlinearCG` for a dtype that this one does not take, and inside `jax.shard_map`,
    where neither runs), and no quasi-Newton phase at all for leaves of several dtypes,
    nor where the condition has `lineax.positive_semidefinite_tag`: Newton's steps are
    good ones wherever the objective is convex. Where that stops, trust-region Newton-CG
    goes on until

    $$\| \nabla f(y) \| \le \mathtt{atol}$$

    at the very point that is returned. If rounding forbids that, a point passes too
    from which the Newton step $-H^{-1} \nabla f$ promises no more than rounding can
    hide, of the objective or of `y`, or no more than a relative change `rtol` of `y`.
    A gradient below `atol` does not pass where that step is long and the objective
    would fall by more than rounding: where the curvature is positive the search goes on
    to a finer gradient, once. The Hessian is looked at there (dense up to 64
    unknowns, else by 50 Lanczos steps, 12 with that tag); if its smallest eigenvalue is
    negative beyond rounding, the point is reported as a saddle. A curvature of zero
    passes: a point like 0 of `y**3` is not told from a minimum.

    The steps contain `while` loops: derivatives come from the implicit function theorem
    or forward mode; for reverse mode through the steps name `optimistix.BFGS`.

    **Arguments:**

    - `rtol`: relative change of `y` that is insignificant. Dimensionless.
    - `atol`: the norm of the gradient that is asked for. Dimensionless. For both,
        `None` stands for 1e-8 in float64 and for 1e-5 in float32; `optx.root_find` and
        `optx.fixed_point`, which compare with them, want numbers.
    - `norm`: the norm of the gradient; the default is the largest absolute entry.
    - `dense_size`: up to this many unknowns an n x n inverse Hessian is kept.
    - `search_steps`: the largest number of quasi-Newton steps before Newton-CG.

    **Returns:** in `stats`, `result` (a finer [`eqximplicit.RESULTS`][]:
    `saddle_point`, `flat_objective`, `unattainable_tolerance`, `nonfinite_start`,
    `nonfinite_jacobian` where only the gradient is not finite at `y0`),
    `min_curvature` (NaN if the solve ended before) and `num_polish_steps`.

    **Raises:**

    - `ValueError`: a negative tolerance, or a complex state.

    !!! example

        ```python
        optx.minimise(fn, eqi.AutoMinimiser(rtol=1e-8, atol=1e-8), y0, args)
        ```

    ??? cite "References"

        J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd ed. (2006): chapter
        6 (BFGS), algorithm 7.2 (Newton-CG in a trust region).
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    norm: Callable[[Any], Scalar] = optx.max_norm
    dense_size: int = 300
    search_steps: int = 100

    def __check_init__(self) -> None:
        check_tolerances("AutoMinimiser", self.rtol, self.atol)

    def _driver(self, y: Y, tags: frozenset[object]) -> VerifiedDescent:
        rtol = or_default(self.rtol, y)
        search = None
        if lx.positive_semidefinite_tag not in tags:
            search = _by_size(y, self.dense_size, greatest(rtol, SEARCH_TOL))
        return VerifiedDescent(
            search=search,
            objective=lambda value: value,
            search_steps=self.search_steps,
            rtol=rtol,
            atol=or_default(self.atol, y),
            norm=self.norm,
        )

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        f_struct: jax.ShapeDtypeStruct,
        aux_struct: Any,
        tags: frozenset[object],
    ) -> VerifiedState:
        """Returns the state of the first phase at `y`."""
        refuse_complex("AutoMinimiser", y)
        problem = Problem(fn, args, options, tags)
        return self._driver(y, tags).init(problem, y, f_struct, aux_struct)

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
    ) -> tuple[Y, VerifiedState, Aux]:
        """Returns the next point, by the phase that the solve is in."""
        problem = Problem(fn, args, options, tags)
        return self._driver(y, tags).step(problem, y, state)

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the point has been judged, and how."""
        del fn, args, options
        return self._driver(y, tags).terminate(state)

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        aux: Aux,
        args: Any,
        options: dict[str, Any],
        state: VerifiedState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns `y` and the verdict in `stats`."""
        del fn, args, options
        return y, aux, self._driver(y, tags).stats(state, result)


def _by_size(
    y: Any, dense_size: int, tol: Any
) -> optx.AbstractMinimiser[Any, Any, Any] | None:
    if not vs.one_dtype(y):
        return None  # optimistix's minimisers promote across leaves
    if is_placed(jax.eval_shape(lambda: y)):
        return optx.NonlinearCG(rtol=tol, atol=tol)  # no linear operator is made
    if vs.size(y) <= dense_size:
        return optx.BFGS(rtol=tol, atol=tol)
    if vs.real_dtype(y) == jnp.result_type(float):
        return optx.LBFGS(rtol=tol, atol=tol)
    return optx.NonlinearCG(rtol=tol, atol=tol)  # LBFGS keeps its history in `float`


def refuse_complex(name: str, y: Any) -> None:
    """Refuses a complex state, by the name of the solver."""
    if vs.has_complex(y):
        raise ValueError(
            f"`{name}` minimises over real states; got a complex leaf. Pass its real "
            "and imaginary part as two leaves, or use `FIRE`."
        )
