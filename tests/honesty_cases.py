"""Cases in which a derivative may go wrong without a word.

A case is a function of one number, and what is known of its derivative.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx

import eqximplicit as eqi


@dataclasses.dataclass(frozen=True)
class Case:
    """`fn(a)` at `at`. `slope` is its derivative, the ends of an interval of one-sided
    ones, or `None` where there is none, so that no finite answer is right."""

    fn: Callable[[jax.Array], jax.Array]
    at: float
    slope: float | tuple[float, float] | None
    refused: str | None = None  # what an error must say, if there is one
    only_ends: bool = False  # whether nothing between two slopes is right


def solution(condition, y0, solver=None, linear_solver=None, pick=jnp.sum, **kwargs):
    adjoint = eqi.ImplicitAdjoint(linear_solver=linear_solver or eqi.AutoLinearSolver())
    layer = eqi.ImplicitFunction(condition, solver, adjoint, throw=False, **kwargs)
    return lambda a: pick(layer(y0, a))


def minimum(fn, y0=1.0, solver=None, **kwargs):
    return solution(eqi.Minimum(fn), jnp.asarray(y0), solver, **kwargs)


def fixed_point(fn, y0=1.0, solver=None, **kwargs):
    return solution(eqi.FixedPoint(fn), jnp.asarray(y0), solver, **kwargs)


def least_squares(fn, y0=1.0, solver=None, **kwargs):
    return solution(eqi.LeastSquares(fn), jnp.asarray(y0), solver, **kwargs)


def root(fn, y0=1.0, solver=None, tags=frozenset(), **kwargs):
    return solution(eqi.Root(fn, tags), jnp.asarray(y0), solver, **kwargs)


def linear(matrix, direction=(1.0, 1.0), **kwargs):
    """The root of `A y = a d`, given exactly."""
    matrix, direction = np.asarray(matrix), np.asarray(direction)
    inverse = np.linalg.pinv(matrix)
    fn = lambda y, a: jnp.asarray(matrix) @ y - a * jnp.asarray(direction)
    solve = lambda y0, a: jnp.asarray(inverse @ direction) * a
    return root(fn, np.zeros(len(direction)), solve, **kwargs)


def first(y):
    return y[0]


def lane_sum(fn, lanes, mask):
    """The sum over some lanes of a batch."""
    return lambda a: jnp.sum(jnp.where(mask, jax.vmap(lambda s: fn(a * s))(lanes), 0.0))


NEWTON = optx.Newton(rtol=1e-10, atol=1e-10)
DESCENT = optx.GradientDescent(learning_rate=1e-9, rtol=1e-6, atol=1e-6)
SKEW = [[2.0, 1.0], [-0.5, 1.5]]
INDEFINITE = [[1.0, 2.0], [2.0, 1.0]]
DIRECTION = np.array([1.0, 2.0])
LANE = root(lambda y, a: y**2 - a)
SHAPES = "does not match the state"


def total_slope(matrix, direction=(1.0, 1.0)):
    return float(np.sum(np.linalg.solve(matrix, direction)))


# Either minimum, (±√a, 0), will do: that of a = 2 moves by ±1/(2√2).
RIDGE_SLOPES = (-1 / np.sqrt(8), 1 / np.sqrt(8))


def wide_ridge(y, a):
    return y[0] ** 4 / 4 - a * y[0] ** 2 / 2 + y[1] ** 2


def stiff_ridge(y, a):
    return y[0] ** 4 / 4 - a * y[0] ** 2 / 2 + 1e10 * y[1] ** 2


def touching(y, a):
    return jnp.stack([y[0] ** 2 + y[1] ** 2 - 1, y[1] - a])


def six_that_turn(y, a):
    others = y + 0.2 * jnp.sin(jnp.roll(y, 1)) - 1
    return others.at[0].set((y[0] - 1) ** 2 - a)


def complex_root(power_of):
    fn = lambda y, a: power_of(y) - a * (1.0 + 1.0j)
    return root(fn, 1.0 + 0.5j, pick=jnp.real)


def in_dtype(dtype, of_layer):
    return lambda a: of_layer(a.astype(dtype)).astype(float)


def in_single(fn, solver):
    return in_dtype(jnp.float32, root(fn, jnp.asarray(1.5, jnp.float32), solver))


CASES = {
    "simple root": Case(root(lambda y, a: y**3 - a), 8.0, 1 / 12),
    "double root, found": Case(root(lambda y, a: (y - a) ** 2), 2.0, 1.0),
    "double root, given": Case(
        root(lambda y, a: (y - a) ** 2, 1.0, lambda _, a: a), 2.0, 1.0
    ),
    "triple root, found": Case(root(lambda y, a: (y - a) ** 3), 2.0, 1.0),
    "triple root, given": Case(
        root(lambda y, a: (y - a) ** 3, 1.0, lambda _, a: a), 2.0, 1.0
    ),
    "root that turns back": Case(root(lambda y, a: y**2 - a), 0.0, None),
    "root that turns back, by Newton": Case(
        root(lambda y, a: y**2 - a, 1.0, NEWTON), 0.0, None
    ),
    "circle and tangent": Case(root(touching, np.ones(2) / 2), 1.0, None),
    "root of six that turns back": Case(
        root(six_that_turn, np.full(6, 2.0)), 0.0, None
    ),
    # Neither is close enough to one that does.
    "roots near each other": Case(
        root(lambda y, a: y**2 - 1e-6 * a), 0.5, 5e-7 / 5e-7**0.5
    ),
    "root of six": Case(root(six_that_turn, np.full(6, 2.0), pick=first), 0.25, 1.0),
    "no root": Case(root(lambda y, a: y**2 + a), 1.0, None),
    "no root, by Newton": Case(root(lambda y, a: y**2 + a, 1.0, NEWTON), 1.0, None),
    "line of roots": Case(
        linear([[1.0, 1.0], [2.0, 2.0]], (1.0, 2.0), pick=first), 1.0, None
    ),
    "line of roots, least norm": Case(
        linear([[1.0, 1.0], [2.0, 2.0]], (1.0, 2.0), linear_solver=eqi.LeastNorm()),
        1.0,
        1.0,
    ),
    "inconsistent": Case(linear([[1.0, 1.0], [1.0, 1.0]], (1.0, -1.0)), 0.0, None),
    "inconsistent, least norm": Case(
        linear([[1.0, 1.0], [1.0, 1.0]], (1.0, -1.0), linear_solver=eqi.LeastNorm()),
        0.0,
        None,
    ),
    "flat minimum": Case(
        solution(
            eqi.Minimum(lambda y, a: (y[0] - y[1] - a) ** 2),
            jnp.zeros(2),
            pick=lambda y: y[0] - y[1],
        ),
        1.0,
        1.0,
    ),
    "kink in the state": Case(
        root(lambda y, a: y + jnp.abs(y) - a, 1.0), 0.0, (0.5, 1.0)
    ),
    "kink in the parameter": Case(root(lambda y, a: y - jnp.abs(a)), 0.0, (-1.0, 1.0)),
    "start on a ridge": Case(
        solution(eqi.Minimum(wide_ridge), jnp.array([0.0, 0.5]), pick=jnp.sum),
        2.0,
        RIDGE_SLOPES,
        only_ends=True,
    ),
    "start on a ridge, BFGS": Case(
        solution(
            eqi.Minimum(wide_ridge),
            jnp.array([0.0, 0.5]),
            optx.BFGS(rtol=1e-8, atol=1e-8),
            pick=jnp.sum,
        ),
        2.0,
        RIDGE_SLOPES,
        only_ends=True,
    ),
    "start on a ridge, stiff across": Case(
        solution(eqi.Minimum(stiff_ridge), jnp.array([0.0, 0.5])),
        2.0,
        RIDGE_SLOPES,
        only_ends=True,
    ),
    "start on a ridge, stiff across, BFGS": Case(
        solution(
            eqi.Minimum(stiff_ridge),
            jnp.array([0.0, 0.5]),
            optx.BFGS(rtol=1e-8, atol=1e-8),
        ),
        2.0,
        RIDGE_SLOPES,
        only_ends=True,
    ),
    "stopped early": Case(
        root(lambda y, a: y**3 - a, 5.0, NEWTON, max_steps=2), 8.0, 1 / 12
    ),
    "stopped early, tolerance": Case(
        root(
            lambda y, a: y**3 - a,
            5.0,
            lambda y, a: y - 0.01 * (y**3 - a),
            residual_tol=1e-6,
        ),
        8.0,
        1 / 12,
    ),
    "tiny steps, fixed point": Case(
        solution(eqi.FixedPoint(lambda y, a: y - 1e-9 * (y**3 - a)), jnp.array(1.0)),
        8.0,
        1 / 12,
    ),
    "tiny steps, descent": Case(
        solution(eqi.Minimum(lambda y, a: y**4 / 4 - a * y), jnp.array(1.0), DESCENT),
        8.0,
        1 / 12,
    ),
    "NaN in the solve": Case(
        root(lambda y, a: a * jnp.sqrt(y) - 1, 9.0, NEWTON), 1.0, -2.0
    ),
    "CG, false PSD tag": Case(
        linear(
            INDEFINITE,
            DIRECTION,
            linear_solver=lx.CG(rtol=1e-10, atol=1e-10),
            tags=lx.positive_semidefinite_tag,
        ),
        1.0,
        total_slope(INDEFINITE, DIRECTION),
    ),
    "CG, false symmetric tag": Case(
        linear(
            SKEW,
            DIRECTION,
            linear_solver=lx.CG(rtol=1e-10, atol=1e-10),
            tags=lx.positive_semidefinite_tag,
        ),
        1.0,
        total_slope(SKEW, DIRECTION),
    ),
    "default, false symmetric tag": Case(
        linear(SKEW, DIRECTION, tags=lx.symmetric_tag),
        1.0,
        total_slope(SKEW, DIRECTION),
    ),
    "linear solver runs out": Case(
        linear(SKEW, DIRECTION, linear_solver=eqi.HybridKrylov(max_steps=1, restart=1)),
        1.0,
        total_slope(SKEW, DIRECTION),
    ),
    "linear solver stagnates": Case(
        linear(
            SKEW,
            DIRECTION,
            linear_solver=lx.GMRES(
                rtol=1e-10, atol=1e-10, restart=1, stagnation_iters=2
            ),
        ),
        1.0,
        total_slope(SKEW, DIRECTION),
    ),
    "condition number 1e8": Case(linear(np.diag([1.0, 1e-8]), (1.0, 1e-8)), 1.0, 2.0),
    "condition number 1e8, dense": Case(
        linear([[1.0, 1.0], [1.0, 1.0 + 4e-8]], (2.0, 2.0)), 1.0, 2.0
    ),
    "healthy lanes beside a failed one": Case(
        lane_sum(LANE, jnp.array([4.0, -1.0]), jnp.array([True, False])), 1.0, 1.0
    ),
    "the failed lane": Case(
        lane_sum(LANE, jnp.array([4.0, -1.0]), jnp.array([False, True])), 1.0, None
    ),
    "residual that broadcasts": Case(
        root(lambda y, a: y[:, None] - a * jnp.ones((1, 2)), jnp.ones(2)),
        1.0,
        None,
        SHAPES,
    ),
    "integer state": Case(root(lambda y, a: y**2 - a, jnp.array(3)), 4.0, 0.25),
    "empty state": Case(root(lambda y, a: y, jnp.zeros(0)), 1.0, None, "is empty"),
    "single precision, double tolerance": Case(
        in_single(lambda y, a: y**3 - a, optx.Newton(rtol=1e-13, atol=1e-13)),
        7.3,
        7.3 ** (-2 / 3) / 3,
    ),
    "single precision, default": Case(
        in_single(lambda y, a: y**3 - a, None), 7.3, 7.3 ** (-2 / 3) / 3
    ),
    "holomorphic": Case(
        complex_root(lambda y: y * y),
        2.0,
        float(np.real(np.sqrt(1 + 1j)) / np.sqrt(2.0) / 2),
    ),
    "not holomorphic": Case(
        complex_root(lambda y: y + 0.5 * jnp.conj(y)), 2.0, 1 / 1.5
    ),
    "repelling fixed point": Case(
        solution(eqi.FixedPoint(lambda y, a: 2 * y + a), jnp.array(1.0)), 1.0, -1.0
    ),
}


# More of the same kinds, in other forms.


def both(first, second):
    """A function of two unknowns, from its two components."""
    return lambda y, a: jnp.stack([first(y, a), second(y, a)])


def near_singular(n, smallest):
    """A matrix of condition number `1 / smallest`, and the direction `A 1`."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    matrix = left @ np.diag(np.geomspace(1.0, smallest, n)) @ right
    return matrix, matrix @ np.ones(n)


def ill_conditioned(n, smallest, **kwargs):
    matrix, direction = near_singular(n, smallest)
    fn = lambda y, a: jnp.asarray(matrix) @ y - a * jnp.asarray(direction)
    return root(fn, np.zeros(n), lambda y0, a: a * jnp.ones(n), **kwargs)


def single_precision_system():
    """A system of condition number 1e8 whose solution is given exactly."""
    matrix, direction = map(np.float32, near_singular(6, 1e-8))
    fn = lambda y, a: jnp.asarray(matrix) @ y - a * jnp.asarray(direction)
    return root(fn, np.zeros(6, np.float32), lambda y0, a: a * jnp.ones(6, jnp.float32))


def cubic(y, a):
    return y**3 - a


def tiny_map(y, a):
    return y - 1e-9 * cubic(y, a)


def tiny_quartic(y, a):
    return jnp.sum(y**4 / 4 - a * y)


SOFT = {"rtol": 1e-6, "atol": 1e-6}
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
CUBE_ROOT = 1 / 12  # the slope of the cube root at 8
UPPER = [[2.0, 1.0], [0.0, 1.5]]

CASES |= {
    "double root in the plane": Case(
        root(both(lambda y, a: (y[0] - a) ** 2, lambda y, a: y[1] - y[0]), np.ones(2)),
        2.0,
        2.0,
    ),
    "triple root in the plane, given": Case(
        root(
            both(lambda y, a: (y[0] - a) ** 3, lambda y, a: y[1] - y[0]),
            np.ones(2),
            lambda _, a: jnp.stack([a, a]),
        ),
        2.0,
        2.0,
    ),
    "no root, exponential": Case(root(lambda y, a: jnp.exp(y) + a), 1.0, None),
    "no root in the plane": Case(
        root(
            both(lambda y, a: y[0] ** 2 + y[1] ** 2 + a, lambda y, a: y[0] - y[1]),
            np.ones(2),
        ),
        1.0,
        None,
    ),
    "no fixed point": Case(fixed_point(lambda y, a: y + a), 1.0, None),
    "no minimum": Case(minimum(lambda y, a: jnp.exp(-a * y)), 1.0, None),
    "line of roots, found": Case(
        root(
            both(lambda y, a: y[0] + y[1] - a, lambda y, a: 2 * (y[0] + y[1] - a)),
            np.zeros(2),
            pick=first,
        ),
        1.0,
        None,
    ),
    "circle of roots": Case(
        root(
            both(
                lambda y, a: jnp.sum(y**2) - a, lambda y, a: y[0] * (jnp.sum(y**2) - a)
            ),
            np.array([1.0, 0.5]),
            pick=first,
        ),
        2.0,
        None,
    ),
    "line of least squares": Case(
        least_squares(
            lambda y, a: y[0] + 2 * y[1] - a,
            np.zeros(2),
            pick=lambda y: y[0] + 2 * y[1],
        ),
        1.0,
        1.0,
    ),
    "kink, one-sided slopes": Case(
        root(lambda y, a: jnp.maximum(y, 3 * y) - a), 0.0, (1 / 3, 1.0)
    ),
    "kink of a minimum": Case(
        minimum(lambda y, a: jnp.abs(y - a) + 0.5 * (y - a) ** 2, 0.5), 1.0, 1.0
    ),
    "start on a ridge, least squares": Case(
        least_squares(lambda y, a: y**2 - a, 0.0), 4.0, (-0.25, 0.25), only_ends=True
    ),
    "start on a ridge, FIRE": Case(
        minimum(wide_ridge, np.array([0.0, 0.5]), eqi.FIRE(**TIGHT), max_steps=2000),
        2.0,
        RIDGE_SLOPES,
        only_ends=True,
    ),
    "stopped early, Picard": Case(
        fixed_point(
            lambda y, a: jnp.cos(a * y),
            1.0,
            optx.FixedPointIteration(**TIGHT),
            max_steps=3,
        ),
        1.0,
        None,
    ),
    "stopped early, BFGS": Case(
        minimum(tiny_quartic, 5.0, optx.BFGS(**TIGHT), max_steps=2), 8.0, CUBE_ROOT
    ),
    "tiny steps, Picard": Case(
        fixed_point(tiny_map, 1.0, optx.FixedPointIteration(**SOFT)), 8.0, CUBE_ROOT
    ),
    "tiny steps, optax": Case(
        minimum(tiny_quartic, 1.0, optx.OptaxMinimiser(optax.sgd(1e-9), **SOFT)),
        8.0,
        CUBE_ROOT,
    ),
    "tiny steps in many dimensions": Case(
        minimum(tiny_quartic, np.linspace(0.5, 1.5, 50), DESCENT, pick=jnp.mean),
        8.0,
        CUBE_ROOT,
    ),
    "gradient descent, converged": Case(
        minimum(
            tiny_quartic,
            1.5,
            optx.GradientDescent(learning_rate=0.05, **TIGHT),
        ),
        8.0,
        CUBE_ROOT,
    ),
    "NaN in the solve, default": Case(
        root(lambda y, a: a * jnp.sqrt(y) - 1, 9.0), 1.0, -2.0
    ),
    "NaN at the guess": Case(root(lambda y, a: jnp.log(y) - a, -1.0), 0.0, 1.0),
    "default, false PSD tag": Case(
        linear(INDEFINITE, DIRECTION, tags=lx.positive_semidefinite_tag),
        1.0,
        total_slope(INDEFINITE, DIRECTION),
    ),
    "default, false diagonal tag": Case(
        linear(SKEW, DIRECTION, tags=lx.diagonal_tag), 1.0, total_slope(SKEW, DIRECTION)
    ),
    "default, false triangular tag": Case(
        linear(SKEW, DIRECTION, tags=lx.lower_triangular_tag),
        1.0,
        total_slope(SKEW, DIRECTION),
    ),
    "default, true triangular tag": Case(
        linear(UPPER, DIRECTION, tags=lx.upper_triangular_tag),
        1.0,
        total_slope(UPPER, DIRECTION),
    ),
    "GMRES out of steps": Case(
        ill_conditioned(
            12,
            1e-2,
            linear_solver=lx.GMRES(rtol=1e-10, atol=1e-10, restart=2, max_steps=2),
        ),
        1.0,
        12.0,
    ),
    "condition number 1e8, six unknowns": Case(ill_conditioned(6, 1e-8), 1.0, 6.0),
    "condition number 1e8, matrix-free": Case(ill_conditioned(60, 1e-8), 1.0, 60.0),
    "condition number 1e8, units": Case(
        root(
            both(lambda y, a: 1e8 * (y[0] * y[1] - a), lambda y, a: y[0] - 1e-8 * y[1]),
            np.array([1e-4, 1e4]),
            pick=lambda y: 1e4 * y[0],
        ),
        1.0,
        0.5,
    ),
    "condition number 1e8, contraction": Case(
        fixed_point(lambda y, a: (1 - 1e-8) * y + 1e-8 * a), 1.0, 1.0
    ),
    "condition number 1e8, minimum": Case(
        minimum(lambda y, a: (y[0] - a) ** 2 + 1e-8 * (y[1] - a) ** 2, np.zeros(2)),
        1.0,
        2.0,
    ),
    "singular matrix, exactly": Case(
        linear([[1.0, 2.0], [2.0, 4.0]], (1.0, 2.0), pick=first),
        1.0,
        None,
    ),
    "singular lane": Case(
        lane_sum(
            lambda s: root(lambda y, a: a * (y - 2.0), 1.0, lambda y, a: y)(s),
            jnp.array([1.0, 0.0]),
            jnp.array([False, True]),
        ),
        1.0,
        None,
    ),
    "map that broadcasts": Case(
        fixed_point(lambda y, a: a * jnp.ones((2, 2)) * y[None], np.ones(2)),
        0.5,
        None,
        SHAPES,
    ),
    "scalar residual of a vector": Case(
        root(lambda y, a: jnp.sum(y) - a, np.ones(2)), 1.0, None, SHAPES
    ),
    "boolean state": Case(root(lambda y, a: y * a, np.array(True)), 1.0, None, "bool"),
    "single precision, minimum": Case(
        in_dtype(jnp.float32, minimum(tiny_quartic, np.float32(1.5))),
        8.0,
        CUBE_ROOT,
    ),
    "single precision, condition number 1e8": Case(
        in_dtype(jnp.float32, single_precision_system()), 1.0, 6.0
    ),
    "holomorphic, fixed point": Case(
        fixed_point(lambda y, a: 0.5j * y + a, 1.0 + 0.0j, pick=jnp.real),
        1.0,
        float(np.real(1 / (1 - 0.5j))),
    ),
    "modulus of a complex root": Case(
        root(
            lambda y, a: y * jnp.abs(y).astype(complex) - a * (1.0 + 0.0j),
            1.0 + 0.1j,
            pick=jnp.real,
        ),
        4.0,
        0.25,
    ),
}
