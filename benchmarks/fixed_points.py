"""Fixed-point solvers on fourteen maps, as a Markdown table.

Run `python benchmarks/fixed_points.py`. Everyone is asked for an absolute tolerance of
1e-8; a map counts as solved where `max|fn(y) - y| < 1e-8` holds for what was returned,
whatever the solver says. Evaluations are counted: by SciPy's wrapper, or as the steps
of solvers that evaluate once a step. Times are the best of five runs, compiled where
that is possible, in milliseconds.
"""

import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import scipy.optimize
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from fixed_point_maps import cast, FixedPointMap, MAPS

from eqximplicit.solvers.anderson import Anderson
from eqximplicit.solvers.auto_fixed_point import AutoFixedPoint
from eqximplicit.solvers.broyden import Broyden

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxopt  # pyright: ignore[reportMissingTypeStubs]

jax.config.update("jax_enable_x64", True)

TOL = 1e-8
MAX_STEPS = 2000


class Flat(NamedTuple):
    """A map on a flat vector: what all contestants can be given."""

    fn: Callable[[Any], Any]
    x0: Any


def flat(p: FixedPointMap) -> Flat:
    args = cast(p.args, jnp.float64)
    x0, unravel = ravel_pytree(cast(p.y0, jnp.float64))
    return Flat(lambda x: ravel_pytree(p.fn(unravel(x), args))[0], x0)


def best_of_five(run: Callable[[], Any]) -> tuple[Any, float]:
    out, times = jax.block_until_ready(run()), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return out, 1e3 * min(times)


def with_optimistix(solver: Any) -> Callable[[Flat], tuple[Any, int, float]]:
    def run(problem: Flat) -> tuple[Any, int, float]:
        @jax.jit
        def solve(x0: Any) -> Any:
            sol = optx.fixed_point(
                lambda y, _: problem.fn(y),
                solver,
                x0,
                max_steps=MAX_STEPS,
                throw=False,
            )
            return sol.value, sol.stats["num_steps"]

        (x, steps), milliseconds = best_of_five(lambda: solve(problem.x0))
        return x, int(steps), milliseconds

    return run


def with_jaxopt(make: Callable[[Any], Any]) -> Callable[[Flat], tuple[Any, int, float]]:
    def run(problem: Flat) -> tuple[Any, int, float]:
        solver = make(problem.fn)
        solve = jax.jit(lambda x0: solver.run(x0))
        (x, state), milliseconds = best_of_five(lambda: solve(problem.x0))
        return x, int(state.iter_num), milliseconds

    return run


def with_scipy(problem: Flat) -> tuple[Any, int, float]:
    fn = jax.jit(lambda x: problem.fn(x) - x)
    count = 0

    def counted(x: Any) -> Any:
        nonlocal count
        count += 1
        return np.asarray(fn(x))

    def run() -> Any:
        nonlocal count
        count = 0
        return scipy.optimize.anderson(
            counted, np.asarray(problem.x0), f_tol=TOL, maxiter=MAX_STEPS
        )

    x, milliseconds = best_of_five(run)
    return x, count, milliseconds


CONTESTANTS: dict[str, Callable[[Flat], tuple[Any, int, float]]] = {
    "AutoFixedPoint": with_optimistix(AutoFixedPoint(rtol=0.0, atol=TOL)),
    "Anderson": with_optimistix(Anderson(rtol=0.0, atol=TOL)),
    "Broyden": with_optimistix(Broyden(rtol=0.0, atol=TOL)),
    "optx.FixedPointIteration": with_optimistix(
        optx.FixedPointIteration(rtol=0.0, atol=TOL)
    ),
    "jaxopt.AndersonAcceleration": with_jaxopt(
        lambda fn: jaxopt.AndersonAcceleration(fn, tol=TOL, maxiter=MAX_STEPS)
    ),
    "jaxopt.FixedPointIteration": with_jaxopt(
        lambda fn: jaxopt.FixedPointIteration(fn, tol=TOL, maxiter=MAX_STEPS)
    ),
    "scipy anderson": with_scipy,
}


def cell(run: Callable[[Flat], tuple[Any, int, float]], problem: Flat) -> str:
    """`evaluations (milliseconds)`, or what went wrong."""
    try:
        x, count, milliseconds = run(problem)
    except Exception as error:  # a benchmark goes on
        return type(error).__name__
    residual = float(jnp.max(jnp.abs(problem.fn(x) - x)))
    if not residual < TOL:
        return f"no, {residual:.0e}"
    return f"{count} ({milliseconds:.2f})"


def main() -> None:
    warnings.simplefilter("ignore")
    print("| map | n | " + " | ".join(CONTESTANTS) + " |")
    print("|---|---|" + "---|" * len(CONTESTANTS))
    solved = dict.fromkeys(CONTESTANTS, 0)
    for p in MAPS:
        problem = flat(p)
        cells = {name: cell(run, problem) for name, run in CONTESTANTS.items()}
        for name, text in cells.items():
            solved[name] += text[0].isdigit()
        row = " | ".join(cells.values())
        print(f"| {p.name} | {problem.x0.size} | {row} |", flush=True)
    print("| **solved** | | " + " | ".join(map(str, solved.values())) + " |")


if __name__ == "__main__":
    main()
