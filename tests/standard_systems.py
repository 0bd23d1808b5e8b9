"""Standard systems of nonlinear equations, from their published definitions.

`STANDARD_SYSTEMS` are the 23 systems of the "23 test problems" page of
NonlinearSolve.jl (itself after J. Burkardt's `test_nonlin`): fourteen of Moré, Garbow
and Hillstrom, and nine more. `MINPACK_RUNS` are the 55 runs of MINPACK's own test
driver: the fourteen systems at 22 sizes, with starts times 1, 10 and 100. All but
Chebyquad at `n = 8` have a root; that run is kept, with `has_root=False`.

Each function has the signature `fn(x, args)` and keeps the dtype of `x`. Where two
sources disagree (Watson's function, the nodes of the H-equation), the original
publication is followed. All quantities are dimensionless.

??? cite "References"

    - J. J. Moré, B. S. Garbow, K. E. Hillstrom, "Testing unconstrained optimization
      software", ACM TOMS 7 (1981) 17-41: the fourteen systems and their starts.
    - J. J. Moré, B. S. Garbow, K. E. Hillstrom, "User guide for MINPACK-1",
      ANL-80-74 (1980): the driver's sizes and factors.
    - J. E. Dennis, R. B. Schnabel, "Numerical Methods for Unconstrained Optimization
      and Nonlinear Equations" (1983): the 2 by 2 example.
    - C. T. Kelley, "Iterative Methods for Linear and Nonlinear Equations" (1995),
      section 5.6: the Chandrasekhar H-equation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class System(NamedTuple):
    """A system `fn(x, args) = 0` and its start, a NumPy float64 vector."""

    name: str
    fn: Callable[[Float[Array, " n"], Any], Float[Array, " n"]]
    start: np.ndarray
    has_root: bool = True


def _index(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.arange(1, x.size + 1, dtype=x.dtype)


def rosenbrock(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    return jnp.concatenate([1.0 - x[:1], 10.0 * (x[1:] - x[:-1] ** 2)])


def powell_singular(x: Float[Array, "4"], args: Any) -> Float[Array, "4"]:
    del args
    a, b, c, d = x
    last = 10.0**0.5 * (a - d) ** 2
    return jnp.stack([a + 10.0 * b, 5.0**0.5 * (c - d), (b - 2.0 * c) ** 2, last])


def powell_badly_scaled(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    return jnp.stack([1e4 * x[0] * x[1] - 1.0, jnp.sum(jnp.exp(-x)) - 1.0001])


def wood(x: Float[Array, "4"], args: Any) -> Float[Array, "4"]:
    del args
    a, b, c, d = x
    t1, t2 = b - a**2, d - c**2
    f1 = -200.0 * a * t1 - (1.0 - a)
    f2 = 200.0 * t1 + 20.2 * (b - 1.0) + 19.8 * (d - 1.0)
    f3 = -180.0 * c * t2 - (1.0 - c)
    f4 = 180.0 * t2 + 20.2 * (d - 1.0) + 19.8 * (b - 1.0)
    return jnp.stack([f1, f2, f3, f4])


def helical_valley(x: Float[Array, "3"], args: Any) -> Float[Array, "3"]:
    del args
    a, b, c = x
    safe = jnp.where(a == 0.0, 1.0, a)
    turn = jnp.arctan(b / safe) / (2.0 * np.pi) + jnp.where(a < 0.0, 0.5, 0.0)
    turn = jnp.where(a == 0.0, 0.25 * jnp.sign(b), turn)
    radius = jnp.sqrt(a**2 + b**2)
    return jnp.stack([10.0 * (c - 10.0 * turn), 10.0 * (radius - 1.0), c])


def watson(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    """Gradient (halved) of Watson's 31-term sum of squares."""
    del args
    t, degree = np.arange(1, 30)[:, None] / 29.0, np.arange(x.size)[None, :]
    powers = jnp.asarray(t**degree, x.dtype)
    slope = jnp.asarray(degree * t ** (degree - 1.0), x.dtype)
    series = powers @ x
    residual = slope @ x - series**2 - 1.0
    total = (slope - 2.0 * series[:, None] * powers).T @ residual
    last = x[1] - x[0] ** 2 - 1.0
    return total.at[0].add(x[0] * (1.0 - 2.0 * last)).at[1].add(last)


def _chebyshev_means(x: Float[Array, " n"]) -> Float[Array, " n"]:
    before, now, means = jnp.ones_like(x), x, []
    for degree in range(1, x.size + 1):
        integral = 0.0 if degree % 2 else 1.0 / (degree**2 - 1.0)
        means.append(jnp.mean(now) + integral)
        before, now = now, 2.0 * x * now - before
    return jnp.stack(means)


def chebyquad(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    """Chebyshev quadrature on [0, 1], as in Moré, Garbow and Hillstrom."""
    del args
    return _chebyshev_means(2.0 * x - 1.0)


def chebyquad_symmetric(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    """Chebyshev quadrature on [-1, 1], as on NonlinearSolve.jl's page."""
    del args
    return _chebyshev_means(x)


def brown_almost_linear(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    linear = x[:-1] + jnp.sum(x) - (x.size + 1.0)
    return jnp.append(linear, jnp.prod(x) - 1.0)


def discrete_boundary_value(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    h = 1.0 / (x.size + 1)
    padded = jnp.pad(x, 1)
    cubic = 0.5 * h**2 * (x + _index(x) * h + 1.0) ** 3
    return 2.0 * x + cubic - padded[:-2] - padded[2:]


def discrete_integral(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    h = 1.0 / (x.size + 1)
    t = _index(x) * h
    cube = (x + t + 1.0) ** 3
    kernel = jnp.minimum(t[:, None], t[None, :]) - t[:, None] * t[None, :]
    return x + 0.5 * h * kernel @ cube


def trigonometric(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    return x.size - jnp.sum(jnp.cos(x)) + _index(x) * (1.0 - jnp.cos(x)) - jnp.sin(x)


def variably_dimensioned(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    total = jnp.sum(_index(x) * (x - 1.0))
    return x - 1.0 + _index(x) * total * (1.0 + 2.0 * total**2)


def broyden_tridiagonal(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    padded = jnp.pad(x, 1)
    return (3.0 - 2.0 * x) * x + 1.0 - padded[:-2] - 2.0 * padded[2:]


def broyden_banded(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    del args
    offset = np.arange(x.size)[None, :] - np.arange(x.size)[:, None]
    band = (offset >= -5) & (offset <= 1) & (offset != 0)
    return x * (2.0 + 5.0 * x**2) + 1.0 - jnp.asarray(band, x.dtype) @ (x * (1.0 + x))


def _matrix_square_root(size: int) -> Callable[[Array, Any], Array]:
    target = 1e-4 * np.eye(size)
    target[0, 1] = 1.0

    def fn(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
        del args
        matrix = x.reshape(size, size)
        return (matrix @ matrix - jnp.asarray(target, x.dtype)).ravel()

    return fn


def dennis_schnabel(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    return jnp.stack([x[0] + x[1] - 3.0, x[0] ** 2 + x[1] ** 2 - 9.0])


def _one_minus_gaussian_over(x: Float[Array, ""]) -> Float[Array, ""]:
    safe = jnp.where(x == 0.0, 1.0, x)
    return jnp.where(x == 0.0, 0.0, -jnp.expm1(-(safe**2)) / safe)


def sample_18(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    first = x[1] ** 2 * _one_minus_gaussian_over(x[0])
    return jnp.stack([first, x[0] * _one_minus_gaussian_over(x[1])])


def sample_19(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    return x * jnp.sum(x**2)


def scalar_double_root(x: Float[Array, "1"], args: Any) -> Float[Array, "1"]:
    del args
    return x * (x - 5.0) ** 2


def freudenstein_roth(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    a, b = x
    first = a - b**3 + 5.0 * b**2 - 2.0 * b - 13.0
    return jnp.stack([first, a + b**3 + b**2 - 14.0 * b - 29.0])


def boggs(x: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
    del args
    return jnp.stack([x[0] ** 2 - x[1] + 1.0, x[0] - jnp.cos(0.5 * np.pi * x[1])])


def chandrasekhar(x: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
    """The H-equation at c = 0.9, by the midpoint rule."""
    del args
    mu = (_index(x) - 0.5) / x.size
    integral = (mu[:, None] / (mu[:, None] + mu[None, :])) @ x
    return x - 1.0 / (1.0 - 0.9 / (2.0 * x.size) * integral)


def _grid(n: int) -> np.ndarray:
    return np.arange(1, n + 1) / (n + 1.0)


def _standard_systems() -> tuple[System, ...]:
    ones, t = np.ones(10), _grid(10)
    ramp = 1.0 - np.arange(1, 11) / 10.0
    root2, root3 = _matrix_square_root(2), _matrix_square_root(3)
    return (
        System("Rosenbrock", rosenbrock, np.append(-1.2, ones[1:])),
        System("Powell singular", powell_singular, np.array([3.0, -1.0, 0.0, 1.0])),
        System("Powell badly scaled", powell_badly_scaled, np.array([0.0, 1.0])),
        System("Wood", wood, np.array([-3.0, -1.0, -3.0, -1.0])),
        System("helical valley", helical_valley, np.array([-1.0, 0.0, 0.0])),
        System("Watson", watson, np.zeros(2)),
        System("Chebyquad", chebyquad_symmetric, np.array([0.0, 2.0 / 3.0])),
        System("Brown almost linear", brown_almost_linear, 0.5 * ones),
        System("discrete boundary value", discrete_boundary_value, t * (t - 1.0)),
        System("discrete integral", discrete_integral, t * (t - 1.0)),
        System("trigonometric", trigonometric, 0.1 * ones),
        System("variably dimensioned", variably_dimensioned, ramp),
        System("Broyden tridiagonal", broyden_tridiagonal, -ones),
        System("Broyden banded", broyden_banded, -ones),
        System("matrix square root 2", root2, np.eye(2).ravel()),
        System("matrix square root 3", root3, np.eye(3).ravel()),
        System("Dennis-Schnabel", dennis_schnabel, np.array([1.0, 5.0])),
        System("sample 18", sample_18, np.array([2.0, 2.0])),
        System("sample 19", sample_19, np.array([3.0, 3.0])),
        System("scalar double root", scalar_double_root, np.array([1.0])),
        System("Freudenstein-Roth", freudenstein_roth, np.array([0.5, -2.0])),
        System("Boggs", boggs, np.array([1.0, 0.0])),
        System("Chandrasekhar", chandrasekhar, ones),
    )


def _minpack_start(number: int, n: int) -> np.ndarray:
    t = _grid(n)
    starts = {
        1: np.array([-1.2, 1.0]),
        2: np.array([3.0, -1.0, 0.0, 1.0]),
        3: np.array([0.0, 1.0]),
        4: np.array([-3.0, -1.0, -3.0, -1.0]),
        5: np.array([-1.0, 0.0, 0.0]),
        6: np.zeros(n),
        7: t,
        8: 0.5 * np.ones(n),
        9: t * (t - 1.0),
        10: t * (t - 1.0),
        11: np.ones(n) / n,
        12: 1.0 - np.arange(1, n + 1) / n,
        13: -np.ones(n),
        14: -np.ones(n),
    }
    return starts[number]


# (number of the system, n, how many of the factors 1, 10, 100).
_MINPACK_CASES = (
    *((1, 2, 3), (2, 4, 3), (3, 2, 2), (4, 4, 3), (5, 3, 3), (6, 6, 2), (6, 9, 2)),
    *((7, 5, 3), (7, 6, 3), (7, 7, 3), (7, 8, 1), (7, 9, 1)),
    *((8, 10, 3), (8, 30, 1), (8, 40, 1), (9, 10, 3), (10, 1, 3), (10, 10, 3)),
    *((11, 10, 3), (12, 10, 3), (13, 10, 3), (14, 10, 3)),
)

_MINPACK_FUNCTIONS = (
    *(rosenbrock, powell_singular, powell_badly_scaled, wood, helical_valley),
    *(watson, chebyquad, brown_almost_linear, discrete_boundary_value),
    *(discrete_integral, trigonometric, variably_dimensioned, broyden_tridiagonal),
    broyden_banded,
)


def _minpack_runs() -> tuple[System, ...]:
    runs: list[System] = []
    for number, n, tries in _MINPACK_CASES:
        fn, start = _MINPACK_FUNCTIONS[number - 1], _minpack_start(number, n)
        for factor in (1.0, 10.0, 100.0)[:tries]:
            # MINPACK's rule for a start at the origin: every entry is the factor.
            moved = start if factor == 1.0 else factor * start
            moved = factor * np.ones(n) if factor > 1.0 and not start.any() else moved
            name = f"{fn.__name__} n={n} x{factor:g}"
            runs.append(System(name, fn, moved, (number, n) != (7, 8)))
    return tuple(runs)


STANDARD_SYSTEMS = _standard_systems()
MINPACK_RUNS = _minpack_runs()
