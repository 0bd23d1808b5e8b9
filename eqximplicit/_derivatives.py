"""The derivative of a layer, four ways: forward, reverse, differences, unrolled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._adjoint import UnrolledAdjoint
from ._point import flat, is_iterative, Point, unflat
from ._solution import RESULTS, Solution

Vector = np.ndarray[Any, np.dtype[Any]]


class Differences(eqx.Module):
    """Central differences of the solver along one direction.

    **Attributes:**

    - `value`: the quotient; `noise`: how far it changes with the step.
    - `one_sided`: the forward minus the backward quotient, at the smallest step.
    - `wide`: the same at the largest step. At a kink the two are alike.
    - `failed`: whether a perturbed solve failed.
    """

    value: Vector
    noise: float
    one_sided: float
    wide: float
    failed: bool


class Derivatives(eqx.Module):
    """A directional derivative `ẏ`, and what it was compared with.

    All errors are Euclidean, relative to the larger of the two sides; `None` where
    there is nothing to compare with. Without forward mode, the vectors have one entry,
    the derivative along a cotangent.
    """

    implicit: Vector
    differences: Differences
    unrolled: Vector | None
    transposition: float | None

    @property
    def relative_noise(self) -> float:
        """The noise of the differences, relative to the derivative."""
        sides = (self.implicit, self.differences.value)
        scale = max(float(np.linalg.norm(side)) for side in sides)
        return self.differences.noise / (scale or 1.0)


def direction(tree: Any, random: np.random.Generator) -> Any:
    """A random tangent whose leaves have the sizes of those of `tree`."""

    def leaf_direction(x: Any) -> Any:
        draw = random.standard_normal(x.shape)
        if jnp.iscomplexobj(x):
            draw = draw + 1j * random.standard_normal(x.shape)
        size = float(np.sqrt(np.mean(np.abs(np.asarray(x)) ** 2))) if x.size else 0.0
        finite = size if np.isfinite(size) and size > 0 else 1.0
        return jnp.asarray(draw * finite, x.dtype)

    return jtu.tree_map(leaf_direction, eqx.filter(tree, eqx.is_inexact_array))


def _moved(tree: Any, t_tree: Any, h: float) -> Any:
    def move(t: Any, x: Any) -> Any:
        return x if t is None else x + jnp.asarray(h, t.dtype) * t

    return jtu.tree_map(move, t_tree, tree, is_leaf=lambda t: t is None)


def steps(eps: float) -> tuple[float, ...]:
    """Step sizes, relative to the parameters, from long to short."""
    return tuple(k * eps**0.25 for k in (10.0, 3.0, 1.0))


def differences(
    solve: Callable[[Any], tuple[Vector, bool]],
    here: Vector,
    x: Any,
    t_x: Any,
    eps: float,
) -> Differences:
    """Differences of `solve` at `x` in the direction `t_x`, at three step sizes."""
    quotients, gaps, failed = list[Vector](), list[float](), False
    for h in steps(eps):
        (above, ok), (below, ok_too) = (
            solve(_moved(x, t_x, h)),
            solve(_moved(x, t_x, -h)),
        )
        quotients.append((above - below) / (2 * h))
        gaps.append(float(np.linalg.norm(above - 2 * here + below)) / h)
        failed = failed or not (ok and ok_too)
    changes = [
        float(np.linalg.norm(a - b))
        for a, b in zip(quotients, quotients[1:], strict=False)
    ]
    best = int(np.argmin(changes))
    return Differences(quotients[best + 1], changes[best], gaps[-1], gaps[0], failed)


def deviation(a: Vector, b: Vector) -> float:
    """`‖a - b‖` over the larger of `‖a‖` and `‖b‖`; zero if both vanish."""
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    return float(np.linalg.norm(a - b)) / scale if scale else 0.0


def observed(solution: Solution[Any, Any]) -> tuple[Vector, bool]:
    """The flat value of a solution, and whether the solver succeeded."""
    return flat(solution.value), bool(solution.result == RESULTS.successful)


def _split(point: Point) -> tuple[Any, Any]:
    return eqx.partition(point.subject.theta, eqx.is_inexact_array)


def _unrolled(point: Point, t_theta: Any) -> Vector | None:
    """The derivative of the solver's own steps, where JAX can take it."""
    if not is_iterative(point.subject.layer):
        return None
    moving, resting = _split(point)

    def value(moving: Any) -> Any:
        layer, args = point.subject.at(eqx.combine(moving, resting))
        live = dataclasses.replace(layer, adjoint=UnrolledAdjoint(mode="forward"))
        return live.solve(point.subject.y0, args).value

    try:
        tangent = flat(eqx.filter_jvp(value, (moving,), (t_theta,))[1])
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None  # a step that JAX cannot differentiate (a host call, say)
    return tangent if np.isfinite(tangent).all() else None


def _pairing(a: Any, b: Any) -> float:
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return float(sum(np.sum(np.real(np.asarray(x) * np.asarray(y))) for x, y in pairs))


def modes(point: Point) -> frozenset[str]:
    """The modes of differentiation that the adjoint of the layer has."""
    adjoint = point.subject.layer.adjoint
    one = isinstance(adjoint, UnrolledAdjoint)
    return frozenset({adjoint.mode} if one else {"forward", "reverse"})


def _relative_gap(left: float, right: float) -> float:
    scale = max(abs(left), abs(right))
    return abs(left - right) / scale if scale else 0.0


def derivatives(
    point: Point, project: Callable[[Vector], Vector], random: np.random.Generator
) -> Derivatives | None:
    """Takes one random directional derivative of the solution in all four ways.

    `project` takes vectors to the subspace in which the solution is unique: all of it
    but for the flat directions of a Hessian. An adjoint without forward mode is
    compared along a random cotangent `ȳ`, as `<ȳ, ẏ>`. `None` if nothing can be moved.
    """
    moving, resting = _split(point)
    if not jtu.tree_leaves(moving):
        return None
    t_theta = direction(moving, random)
    drawn = project(random.standard_normal(flat(point.y).size))
    drawn = flat(unflat(drawn, point.y))  # rounded as a cotangent is
    tangent, paired = _by_own_modes(point, t_theta, drawn)
    seen = project if tangent is not None else lambda v: np.array([drawn @ v])

    def solve(moved: Any) -> tuple[Vector, bool]:
        y, ok = observed(point.subject.solve(eqx.combine(moved, resting)))
        return seen(y), ok

    unrolled = _unrolled(point, t_theta)
    here = seen(flat(point.y))
    return Derivatives(
        implicit=np.array([paired]) if tangent is None else project(tangent),
        differences=differences(solve, here, moving, t_theta, point.eps),
        unrolled=None if unrolled is None else seen(unrolled),
        transposition=None
        if tangent is None or paired is None
        else _relative_gap(float(drawn @ tangent), paired),
    )


def _by_own_modes(
    point: Point, t_theta: Any, ct: Vector
) -> tuple[Vector | None, float | None]:
    """`ẏ` by forward mode, and `<θ̄, θ̇>` by reverse mode from `ȳ`, as far as there."""
    moving, resting = _split(point)

    def value(moving: Any) -> Any:
        return point.subject.solve(eqx.combine(moving, resting)).value

    tangent = paired = None
    if "forward" in modes(point):
        tangent = flat(eqx.filter_jvp(value, (moving,), (t_theta,))[1])
    if "reverse" in modes(point):
        # JAX pairs cotangents without a conjugate.
        ct_y = jtu.tree_map(jnp.conj, unflat(ct, point.y))
        paired = _pairing(eqx.filter_vjp(value, moving)[1](ct_y)[0], t_theta)
    return tangent, paired
