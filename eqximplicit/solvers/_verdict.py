"""When a fixed-point solve is over, and how: decided at the very point returned."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Scalar

from .._entries import peak
from .._ranges import refuse_negative
from .._solution import as_results, RESULTS
from . import _vector_space as vs

Y = TypeVar("Y")
AT_ROUNDING = 4.0  # a residual this many roundings of `y` large cannot be improved
NEAR_ROUNDING = 1e3  # one this large may be rounding, if nothing improves it
FADE = 0.5  # per step, of the error per residual that an older secant has shown


def check_tolerances(name: str, rtol: Any, atol: Any) -> None:
    """Refuses a negative tolerance, and warns of one that no state can reach."""
    refuse_negative(name, rtol=rtol, atol=atol)
    warn_if_unreachable(name, rtol, atol, float(jnp.finfo(jnp.result_type(float)).eps))


def warn_if_unreachable(name: str, rtol: Any, atol: Any, eps: float) -> None:
    """Warns if both tolerances are below the relative resolution `eps`."""
    known = isinstance(rtol, (int, float)) and isinstance(atol, (int, float))
    if known and max(rtol, atol) < eps:
        warnings.warn(
            f"`{name}(rtol={rtol}, atol={atol})` asks for more than the floating-point "
            f"resolution {eps:.1e} of the state; a state of order 1 cannot reach it. "
            "Loosen `rtol`/`atol` or use float64.",
            stacklevel=4,
        )


def check_window(name: str, window: Any) -> None:
    """Refuses a history of no pairs."""
    if not isinstance(window, int) or window < 1:
        raise ValueError(
            f"`{name}(window=...)` must be at least 1, a whole number; got {window}."
        )


def check_budget(name: str, window: int, options: dict[str, Any]) -> None:
    """Refuses a window that `options["max_steps"]`, where given, can never fill."""
    max_steps = options.get("max_steps")
    if max_steps is not None and window > max_steps:
        raise ValueError(
            f"`{name}(window={window})` is larger than `max_steps={max_steps}`: the "
            "history could never fill. Pass a smaller `window` or more steps."
        )


def check_window_fits(solver: Any, max_steps: int | None) -> None:
    """Refuses a window that somebody chose and that `max_steps` can never fill."""
    fields = {f.name: f.default for f in dataclasses.fields(solver)}
    window = getattr(solver, "window", None)
    if "window" in fields and window != fields["window"]:
        check_budget(type(solver).__name__, solver.window, {"max_steps": max_steps})


class Point(eqx.Module, Generic[Y]):
    """A state, its residual, and the Euclidean length of that."""

    y: Y
    residual: Y
    merit: Float[Array, ""]


class Best(eqx.Module, Generic[Y]):
    """The best point so far: the one with the smallest residual.

    **Attributes:**

    - `point`, `aux`: the point, and the auxiliary output of the function there.
    - `residual`, `error`: its residual, and the estimate of its distance from the
        solution, in units of the tolerance: below 1 is good enough.
    - `floor`: its residual in units of the rounding of `y`.
    """

    point: Point[Y]
    aux: Any
    residual: Float[Array, ""]
    error: Float[Array, ""]
    floor: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        good = (self.error < 1) | (self.floor <= AT_ROUNDING)
        return (self.residual < 1) & good

    @property
    def as_good_as_possible(self) -> Bool[Array, ""]:
        """Whether the residual is within tolerance, and may be nothing but rounding."""
        return (self.residual < 1) & (self.floor <= NEAR_ROUNDING)


def point_with(y: Y, residual: Y) -> tuple[Point[Y], Bool[Array, ""]]:
    """Returns `y` with its residual, made zero if that is not finite."""
    merit = jax.lax.stop_gradient(vs.length(residual, vs.real_dtype(y)))
    finite = vs.all_finite(residual) & jnp.isfinite(merit)
    residual = vs.select(finite, residual, vs.zeros_like(y))
    return Point(y, residual, jnp.where(finite, merit, jnp.inf)), finite


def point_at(y: Y, image: Y) -> tuple[Point[Y], Bool[Array, ""]]:
    """Returns `y` with the residual `image - y` of a fixed-point map."""
    return point_with(y, vs.minus(image, y))


def amplification_of(best: Best[Any]) -> Float[Array, ""]:
    """Returns the estimated error per residual of a fixed point; zero at rounding."""
    return best.error / jnp.where(best.residual > 0, best.residual, jnp.inf)


class Tolerance(eqx.Module):
    """The unit in which a deviation from `y` is measured: `atol + rtol |y|`."""

    rtol: float
    atol: float
    norm: Callable[[Any], Scalar]

    def unit(self, y: Array) -> Array:
        """Returns the unit for the entries of a leaf."""
        return self.atol + self.rtol * jnp.abs(y)

    def measure(self, deviation: Any, y: Any) -> Float[Array, ""]:
        """Returns the norm of `deviation / (atol + rtol |y|)`."""
        dtype = vs.real_dtype(y)

        def leaf(d: Array, yi: Array) -> Array:
            d, unit = jnp.abs(d), self.unit(yi)
            ratio = d / jnp.where(unit == 0, 1, unit)
            return jnp.where(unit == 0, jnp.where(d == 0, 0.0, jnp.inf), ratio)

        ratios = jtu.tree_map(leaf, deviation, y)
        return jax.lax.stop_gradient(vs.norm_of(self.norm, ratios, dtype))

    def measures(self, deviations: Sequence[Any], y: Any) -> list[Float[Array, ""]]:
        """Returns `measure` of several deviations, in one reduction."""
        stack = jtu.tree_map(lambda *leaves: vs.in_one(leaves), *deviations)
        return vs.apart(jax.vmap(lambda d: self.measure(d, y))(stack))

    def amplification(self, dy: Any, dr: Any, y: Any) -> Float[Array, ""]:
        r"""Returns the error per residual, estimated from one secant pair.

        A plain iteration that contracts by $\rho$ has $\Delta y = r$ and
        $\Delta r = (\rho - 1) r$, so this is $1 / (1 - \rho)$, and the residual times
        this is the classical bound step $\rho / (1 - \rho)$ of the present error.
        """
        change = self.measure(dr, y)
        ratio = self.measure(dy, y) / jnp.where(change > 0, change, 1)
        return jnp.where(change > 0, jnp.maximum(ratio, 1), jnp.inf)

    def judge(
        self, point: Point[Y], aux: Any, amplification: Float[Array, ""]
    ) -> Best[Y]:
        """Returns the point with all that decides whether it is good enough."""
        residual = self.measure(point.residual, point.y)
        finite = jnp.isfinite(point.merit)
        residual = jnp.where(finite, residual, jnp.inf)
        error = jnp.where(residual > 0, residual * amplification, 0)
        floor = jnp.where(finite, in_roundings(point.residual, point.y), jnp.inf)
        return Best(point, aux, residual, error, floor)


def tolerance(
    rtol: float | None, atol: float | None, norm: Callable[[Any], Scalar], y: Any
) -> Tolerance:
    """Returns the unit for a state like `y`; `None` is what its leaves can reach."""
    return Tolerance(or_default(rtol, y), or_default(atol, y), norm)


def or_default(tol: float | None, y: Any) -> float:
    """Returns a tolerance; `None` is 1e-8 in float64 and 1e-5 in float32."""
    return max(1e-8, 84 * vs.resolution(y)) if tol is None else tol


def in_roundings(residual: Any, y: Any) -> Float[Array, ""]:
    """Returns the largest residual per rounding of the largest entry of its leaf."""
    dtype = vs.real_dtype(y)

    def leaf(r: Array, yi: Array) -> Array:
        if r.size == 0:
            return jnp.zeros((), dtype)
        both = vs.in_one([r, yi])
        worst, largest = vs.apart(peak(both, axis=tuple(range(1, both.ndim))))
        rounding = float(jnp.finfo(yi.dtype).eps) * largest
        ratio = worst / jnp.where(rounding > 0, rounding, 1)
        out = jnp.where(rounding > 0, ratio, jnp.where(worst > 0, jnp.inf, 0.0))
        return jax.lax.stop_gradient(out).astype(dtype)

    leaves: list[Array] = jtu.tree_leaves(jtu.tree_map(leaf, residual, y))
    return jnp.max(jnp.stack(leaves))


def nothing(y: Y, aux_struct: Any) -> Best[Y]:
    """Returns the best of no points: `y`, infinitely bad."""
    infinite = jnp.asarray(jnp.inf, vs.real_dtype(y))
    point = Point(y, vs.zeros_like(y), infinite)
    return Best(point, vs.zeros_like(aux_struct), infinite, infinite, infinite)


def sharpened(
    tolerance: Tolerance, best: Best[Y], anchor: Point[Y], step: Y, when: Array
) -> Best[Y]:
    """Returns the best point, with its error at least as large as the `step` from it.

    A full quasi-Newton step from a point is an estimate of that point's error.
    """
    here = when & (anchor.merit <= best.point.merit)
    error = jnp.maximum(best.error, tolerance.measure(step, anchor.y))
    return eqx.tree_at(lambda b: b.error, best, jnp.where(here, error, best.error))


def better(new: Best[Y], old: Best[Y], when: Bool[Array, ""]) -> Best[Y]:
    """Returns the one of smaller residual; the old one where not `when`."""
    return vs.select(when & (new.point.merit < old.point.merit), new, old)


def coarse(result: RESULTS) -> optx.RESULTS:
    """Returns the nearest of optimistix's codes, for its own loops."""
    # A failure without a code there is called divergence.
    failed = optx.RESULTS.where(
        result == RESULTS.nonfinite_start,
        optx.RESULTS.nonfinite,
        optx.RESULTS.nonlinear_divergence,
    )
    good = result == RESULTS.successful
    return optx.RESULTS.where(good, optx.RESULTS.successful, failed)


def divergence() -> RESULTS:
    """Returns optimistix's divergence as one of our codes."""
    return as_results(RESULTS.nonlinear_divergence)


def why_stuck(best: Best[Any]) -> RESULTS:
    """Returns the verdict on a best point that nothing improves."""
    reason = RESULTS.where(
        best.floor <= NEAR_ROUNDING,
        RESULTS.unattainable_tolerance,
        RESULTS.local_minimum,
    )
    return RESULTS.where(best.as_good_as_possible, RESULTS.successful, reason)


def statistics(
    best: Best[Any], verdict: RESULTS, result: optx.RESULTS
) -> dict[str, Any]:
    """Returns the verdict in full, and the numbers that it rests on."""
    fine = RESULTS.where(verdict == RESULTS.successful, as_results(result), verdict)
    dtype = best.error.dtype
    size = vs.norm_of(optx.max_norm, best.point.residual, dtype)
    size = jnp.where(jnp.isfinite(best.point.merit), size, jnp.inf)
    return {"result": fine, "residual_norm": size, "scaled_error": best.error}
