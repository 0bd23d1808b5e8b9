"""What a solve returns: the value, whether it may be trusted, and why not."""

import warnings
from typing import Any, Generic, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool

from ._vector import fitting

Y = TypeVar("Y")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as _TypeVar  # one with a default

    Aux = _TypeVar("Aux", default=Any)
    _BaseResults = eqx.Enumeration  # lineax, the root of the others, has no types
else:
    Aux = TypeVar("Aux")
    _BaseResults = optx.RESULTS


with warnings.catch_warnings():
    # Some messages of lineax and optimistix have no remedy; ours take their place.
    warnings.simplefilter("ignore")

    class RESULTS(_BaseResults):
        """How a solve ended: optimistix's codes, and finer reasons for a failure.

        Every message is one cause, then one remedy. `RESULTS[result]` is the message.
        """

        successful = ""
        if TYPE_CHECKING:
            max_steps_reached = breakdown = stagnation = conlim = ""
            nonlinear_max_steps_reached = ""
        singular = (
            "A linear system of the solve is singular, or nearly so. Start from "
            "another `y0`, remove redundant equations, or use a regularised solver "
            "such as `optx.LevenbergMarquardt` or the default one."
        )
        nonfinite_input = (
            "A linear system of the solve has entries that are not finite (inf or "
            "NaN). Start from another `y0`, or keep the function finite where the "
            "solver may look (`jax.debug_nans` finds the operation)."
        )
        nonlinear_divergence = (
            "The solve diverged: no step from the best point found leads closer to a "
            "solution. Start from another `y0`, rescale the equations, or use a "
            "safeguarded solver such as the default one."
        )
        nonfinite = (
            "The solve met values that are not finite (inf or NaN). Start from another "
            "`y0`, or keep the function finite where the solver may look "
            "(`jax.debug_nans` finds the operation)."
        )
        local_minimum = (
            "The solver stopped at a local minimum of the residual norm that is not a "
            "root: no small step reduces the residual. Start from another `y0`, or "
            "check that a root exists for these parameters."
        )
        singular_jacobian = (
            "The Jacobian is singular at the best point found, so no Newton step "
            "exists. Start from another `y0`, remove redundant equations, or state the "
            "problem as least squares."
        )
        unattainable_tolerance = (
            "The requested tolerance is below what this floating-point precision can "
            "resolve for this function. Loosen `rtol`/`atol`, rescale the equations, "
            "or use float64."
        )
        nonfinite_start = (
            "The function is not finite (inf or NaN) at the initial guess. Pass a `y0` "
            "inside the function's domain."
        )
        saddle_point = (
            "The solver stopped at a stationary point that is not a minimum: the "
            "Hessian has a direction of negative curvature. Perturb `y0` away from the "
            "symmetry or saddle."
        )
        residual_too_large = (
            "The residual at the solution exceeds `residual_tol`, so its implicit "
            "derivative would belong to another problem. Tighten the solver's "
            "tolerance, raise `max_steps`, or loosen `residual_tol`."
        )
        host_failure = (
            "The solver on the host reported failure. Its own message is in its log; "
            "loosen its tolerance, raise its iteration limit, or start from another "
            "`y0`."
        )
        flat_objective = (
            "The gradient is within tolerance, but so small a curvature puts the "
            "minimum far away, if there is one. Check that the objective has a "
            "minimum, rescale it, or lower `atol`."
        )
        nonfinite_jacobian = (
            "The derivative of the function (its Jacobian or gradient) is not finite "
            "(inf or NaN) where the function is, so there is no step. Start from "
            "another `y0`, or write the function without a root or a power whose slope "
            "is infinite there."
        )


def as_results(result: Any) -> RESULTS:
    """The same code as an item of our `RESULTS`.

    A subclass numbers its base's items first, so the number carries over. (`promote`
    looks it up in an array, which costs every solve a gather.)
    """
    if isinstance(result, RESULTS):
        return result
    return jtu.tree_unflatten(
        jtu.tree_structure(RESULTS.successful), jtu.tree_leaves(result)
    )


def where_result(pred: Bool[Array, ""], a: Any, b: Any) -> RESULTS:
    """The item `a` where `pred` holds, else the item `b`."""
    return RESULTS.where(pred, a, b)


def is_successful(result: Any) -> Bool[Array, ""] | bool:
    """Whether a code says success; a plain `True` where it is so at trace time."""
    for codes in (lx.RESULTS, optx.RESULTS, RESULTS):
        if isinstance(result, codes):
            return True if result is codes.successful else result == codes.successful
    raise TypeError(f"Expected a result code, got {result!r}.")


class Solution(eqx.Module, Generic[Y, Aux]):
    """The solution of a condition, with what is known about its quality.

    **Attributes:**

    - `value`: the solution, with the structure, shapes and dtypes of `y0`.
    - `result`: a [`eqximplicit.RESULTS`][] item; `RESULTS[result]` is its message.
    - `aux`: auxiliary output of the function or the solver; `None` without `has_aux`.
        Under `ImplicitAdjoint` it is a constant: what is to be differentiated is
        computed from `value` again.
    - `stats`: `num_steps` (int array, shape `()`; `-1` when a callable does not report
        it), `residual_norm` (float array, shape `()`: the largest absolute entry of
        the residual at `value`) and whatever the solver adds. Dimensionless.
    """

    value: Y
    result: RESULTS
    aux: Aux
    stats: dict[str, Any]

    def value_or(self, default: Y) -> Y:
        """Returns the value where the solve succeeded, and `default` where it did not.

        The derivative is that of whichever was chosen, lane by lane: a failed solve,
        whose own derivative is NaN, leaves none in that of `default`.

        **Arguments:**

        - `default`: structured as `value`; each leaf of its shape, or a scalar.

        **Returns:** a pytree structured as `value`, of its shapes and dtypes. Solve
        with `throw=False`, or a failure raises before there is anything to choose.

        **Raises:** `ValueError` if `default` does not fit `value`.

        !!! example

            ```python
            y = layer.solve(y0, args).value_or(jnp.zeros(3))
            ```
        """
        ok = jnp.asarray(self.result == RESULTS.successful)
        ours, theirs = jtu.tree_structure(self.value), jtu.tree_structure(default)
        if ours != theirs:
            raise ValueError(
                f"The default of `value_or` has structure {theirs}, the value {ours}. "
                "Pass a default structured as the solution."
            )
        return jtu.tree_map(lambda y, d: _chosen(ok, y, d), self.value, default)


def _chosen(ok: Bool[Array, "..."], y: Array, default: Any) -> Array:
    other = fitting("default of `value_or`", default, y, y.shape, ())
    # A batch of solutions has a batch of results, in front of the axes of a value.
    lanes = jnp.reshape(ok, ok.shape + (1,) * (y.ndim - ok.ndim))
    return jnp.where(lanes, y, jnp.broadcast_to(other, y.shape))
