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
    there is nothing to compare with.
    """

    implicit: Vector
    differences: Differences
    unrolled: Vector | None
    transposition: float

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


def _transposition(
    value: Callable[[Any], Any], moving: Any, t_theta: Any, t_y: Any, ct: Any
) -> float:
    """`|<ȳ, ẏ> - <θ̄, θ̇>|`, relative to the larger."""
    ct_theta = eqx.filter_vjp(value, moving)[1](ct)[0]
    left, right = _pairing(ct, t_y), _pairing(ct_theta, t_theta)
    scale = max(abs(left), abs(right))
    return abs(left - right) / scale if scale else 0.0


def derivatives(
    point: Point, project: Callable[[Vector], Vector], random: np.random.Generator
) -> Derivatives | None:
    """Takes one random directional derivative of the solution in all four ways.

    `project` takes vectors to the subspace in which the solution is unique: all of it
    but for the flat directions of a Hessian. `None` if nothing can be moved.
    """
    moving, resting = _split(point)
    if not jtu.tree_leaves(moving):
        return None
    t_theta = direction(moving, random)

    def value(moving: Any) -> Any:
        return point.subject.solve(eqx.combine(moving, resting)).value

    _, t_y = eqx.filter_jvp(value, (moving,), (t_theta,))
    here, unrolled = project(flat(point.y)), _unrolled(point, t_theta)
    drawn = unflat(project(random.standard_normal(here.size)), point.y)
    ct = jtu.tree_map(jnp.conj, drawn)  # JAX pairs cotangents without a conjugate

    def solve(moved: Any) -> tuple[Vector, bool]:
        y, ok = observed(point.subject.solve(eqx.combine(moved, resting)))
        return project(y), ok

    return Derivatives(
        implicit=project(flat(t_y)),
        differences=differences(solve, here, moving, t_theta, point.eps),
        unrolled=None if unrolled is None else project(unrolled),
        transposition=_transposition(value, moving, t_theta, t_y, ct),
    )
