"""The default root finder: one loop that goes on where Newton's method gives up."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Scalar

from .._custom_types import PyTree, ShapeDtypeStruct
from .._ranges import refuse_negative
from .._solution import as_results, Aux, RESULTS, Y
from ._opening import AbstractOpening, Opened
from ._root_dense import DenseState, init_dense, step_dense, why
from ._root_krylov import (
    init_krylov,
    is_over_krylov,
    is_slow_krylov,
    KrylovState,
    step_krylov,
    why_krylov,
)
from ._root_numbers import Limits, read
from ._root_phases import is_over
from ._root_vector import real_size
from ._small_newton import is_small, newton_opening
from ._vector_space import has_complex, one_dtype, real_dtype, zeros_like

_Fn = Callable[[Y, Any], tuple[PyTree[Array], Aux]]
_State = DenseState[Any] | KrylovState[Any, Any]
# The default tolerance, and the smallest sensible one in units of the dtype's epsilon.
_ATOL, _RESOLUTION = 1e-9, 84.0


def default_atol(dtype: Any) -> float:
    """The largest residual entry of a root: 1e-9 in float64, 1e-5 in float32."""
    return max(_ATOL, _RESOLUTION * float(jnp.finfo(dtype).eps))


class AutoRootFinder(
    AbstractOpening, optx.AbstractRootFinder[Y, PyTree[Array], Aux, _State]
):
    r"""A root finder that needs no tuning and claims nothing that it has not seen.

    One compiled loop, one trial point and one linear solve per step, and the ways of
    proposing the trial change with the measured progress: full Newton steps while they
    pay, from the best point damped (Levenberg-Marquardt) steps where they do not, and
    restarts out of a stationary point of $|F|$ that is not a root. A trial where `fn`
    is not finite is a rejected step.

    The solve is successful when every entry of the residual at **the very point
    returned** is at most `atol` in absolute value, or, with the default `atol`, no more
    than rounding of its terms, which no step makes smaller; a small step or a small
    $J^T F$ alone is never success. Otherwise the best point seen is returned, with its
    residual in `stats["residual_norm"]` and the reason in `stats["result"]`, an
    [`eqximplicit.RESULTS`][]: `local_minimum`, `nonlinear_divergence`,
    `singular_jacobian`, `nonfinite_jacobian` (where one is formed),
    `unattainable_tolerance`, `nonlinear_max_steps_reached` or `nonfinite_start`. Each
    failing lane of a `jax.vmap` stops by itself. `stats["simple"]` is false at a root
    that was come to as slowly as to a multiple one, where a layer's derivative is NaN;
    without a Jacobian, `stats["slow"]` says that it may have been.

    Above `krylov_above` unknowns no Jacobian is formed: the same name then stands for
    an inexact Newton-Krylov method with backtracking (GMRES, as accurate as Eisenstat
    and Walker's forcing term asks; elimination where the jaxpr of `fn` shows at most
    three bands, on one device), whose state keeps the leaves of `y`. A state of
    complex or of several dtypes is solved with a Jacobian at any size.

    Hard problems take some hundred steps; `max_steps=512` leaves room for the restarts.

    **Arguments:**

    - `rtol`: part of every root finder's interface, and without effect: a root has the
        residual zero, and `rtol * 0` is zero.
    - `atol`: the largest absolute residual entry of a root. Dimensionless. `None`
        stands for 1e-9 in float64 and for 84 epsilon in any lower precision, which is
        1e-5 in float32; or, where rounding allows no such residual, for as little as
        it allows: then equations may have any unit.
    - `max_restarts`: how often to start again out of a stationary point of the residual
        norm, or out of a slow descent, before the solve fails.
    - `krylov_above`: the largest number of unknowns for which a Jacobian is formed.

    **Raises:**

    - `ValueError`: a negative tolerance or number; a residual that has not as many
        entries as the state.

    A tolerance below the resolution of the dtype is met by a `UserWarning`.

    !!! example

        ```python
        sol = optx.root_find(fn, eqi.AutoRootFinder(), y0, max_steps=512)
        ```

    ??? cite "References"

        S. C. Eisenstat, H. F. Walker, *Choosing the forcing terms in an inexact Newton
        method*, SIAM J. Sci. Comput. 17 (1996): choice 2 and its safeguard.
        D. W. Marquardt, *An algorithm for least-squares estimation of nonlinear
        parameters*, SIAM J. Appl. Math. 11 (1963): the damped step.
        J. J. Moré, *The Levenberg-Marquardt algorithm: implementation and theory*,
        Lecture Notes in Mathematics 630 (1978): the ratio test and column scaling.
        J. Fan, *A modified Levenberg-Marquardt algorithm for singular system of
        nonlinear equations*, J. Comput. Math. 21 (2003): a damping that vanishes with
        the residual keeps quadratic convergence, section 2.
        L. Grippo, F. Lampariello, S. Lucidi, *A class of nonmonotone stabilization
        methods in unconstrained optimization*, Numer. Math. 59 (1991): the watchdog.
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    norm: Callable[[PyTree[Array]], Scalar] = optx.max_norm
    max_restarts: int = 20
    krylov_above: int = 500

    def __check_init__(self) -> None:
        names = ("rtol", "atol", "max_restarts", "krylov_above")
        refuse_negative(
            "AutoRootFinder", **{name: getattr(self, name) for name in names}
        )
        if isinstance(self.atol, (int, float)):
            _warn_below_resolution(self.atol, jnp.result_type(float))

    def _limits(self, y: PyTree[Array]) -> Limits:
        atol = default_atol(real_dtype(y)) if self.atol is None else self.atol
        return Limits(atol, self.max_restarts, to_rounding=self.atol is None)

    def opening(
        self, fn: Any, y: Any, args: Any, aux: Any, max_steps: int | None
    ) -> Opened | None:
        """Returns the outcome of Newton's method in closed form, for small states."""
        del max_steps  # there are always enough for the few that it takes
        if not is_small(y) or real_size(y) > self.krylov_above:
            return None
        return newton_opening(fn, y, args, aux, self._limits(y).atol)

    def init(
        self,
        fn: _Fn[Y, Aux],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        f_struct: PyTree[ShapeDtypeStruct],
        aux_struct: PyTree[Any],
        tags: frozenset[object],
    ) -> _State:
        """Returns the state whose first trial is `y`; evaluates nothing."""
        del fn, args, options, tags
        _check_square(f_struct, y)
        aux = zeros_like(aux_struct)
        if _fits_krylov(f_struct, y) and real_size(y) > self.krylov_above:
            return init_krylov(y, aux)
        return init_dense(y, aux)

    def step(
        self,
        fn: _Fn[Y, Aux],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Y, _State, Aux]:
        """Returns the best point so far, after one more trial."""
        del options
        limits = self._limits(y)
        if isinstance(state, KrylovState):
            y, state = step_krylov(fn, args, y, state, tags)
            return y, state, state.aux
        y, state = step_dense(lambda y: fn(y, args), y, state, limits)
        return y, state, state.aux

    def terminate(
        self,
        fn: _Fn[Y, Aux],
        y: Y,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Returns whether the solve is over; with success only if `y` is a root."""
        del fn, args, options, tags
        limits = self._limits(y)
        if isinstance(state, KrylovState):
            done, success = is_over_krylov(state, y, limits)
        else:
            control = read(state.control)
            done, success = is_over(control, limits, state.ever_regular)
        failure = optx.RESULTS.nonlinear_divergence
        failed = done & ~success
        result = optx.RESULTS.where(failed, failure, optx.RESULTS.successful)
        return done, result

    def postprocess(
        self,
        fn: _Fn[Y, Aux],
        y: Y,
        aux: Aux,
        args: PyTree[Any],
        options: dict[str, Any],
        state: _State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Returns the best point, its `aux`, and what was seen on the way."""
        del fn, aux, args, options, tags
        limits = self._limits(y)
        if isinstance(state, KrylovState):
            reason, largest = why_krylov(state, y, limits), state.largest
            restarts = jnp.zeros_like(state.num_evaluations)
            evaluations = state.num_evaluations
            seen = {"slow": is_slow_krylov(state, y)}
        else:
            control = read(state.control)
            reason, largest = why(state, y, limits), control.best_max
            restarts = control.num_cycles.astype(int)
            evaluations = control.num_evaluations.astype(int)
            seen = {"simple": control.multiple == 0}
        ended = result == optx.RESULTS.nonlinear_max_steps_reached
        reason = RESULTS.where(ended, as_results(result), reason)
        stats = {
            "result": reason,
            "residual_norm": largest,
            "num_evaluations": evaluations,
            "num_restarts": restarts,
            **seen,
        }
        return y, state.aux, stats


def _fits_krylov(f_struct: PyTree[Any], y: PyTree[Any]) -> bool:
    shapes = [(x.shape, x.dtype) for x in jtu.tree_leaves(y)]
    same = jtu.tree_structure(f_struct) == jtu.tree_structure(y)
    same = same and shapes == [(x.shape, x.dtype) for x in jtu.tree_leaves(f_struct)]
    return same and one_dtype(y) and not has_complex(y)


def _warn_below_resolution(atol: float, dtype: Any) -> None:
    eps = float(jnp.finfo(dtype).eps)
    if atol < eps:
        warnings.warn(
            f"`AutoRootFinder(atol={atol:g})` is below the resolution {eps:.1e} of "
            f"{jnp.dtype(dtype).name}, so that no solve can succeed but by luck. Pass "
            "a larger `atol`, or leave it out.",
            stacklevel=4,
        )


def _check_square(f_struct: PyTree[Any], y: PyTree[Any]) -> None:
    if (rows := real_size(f_struct)) != (columns := real_size(y)):
        raise ValueError(
            f"`AutoRootFinder` solves as many equations as there are unknowns; got a "
            f"residual of {rows} entries for a state of {columns}. Pass the problem to "
            "`least_squares` instead."
        )
