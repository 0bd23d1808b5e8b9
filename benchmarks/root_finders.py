"""Prints a Markdown table of root finders on the standard systems and MINPACK's runs.

Run it as `python benchmarks/root_finders.py`. A point counts as solved when
`max|f| < 1e-8` there, whatever the solver says; a success claimed with `max|f|` above
1e-6 is *wrong*, between the two *loose*. Evaluations are those of the function and of
its JVPs, `n` for a dense Jacobian: as reported by the solver, otherwise `n + 1` per
step; their median is over the solved standard systems.
"""

import functools
import sys
import time
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import scipy.optimize

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from standard_systems import MINPACK_RUNS, STANDARD_SYSTEMS

from eqximplicit.solvers import AutoRootFinder

jax.config.update("jax_enable_x64", True)
SOLVED, WRONG, MAX_STEPS = 1e-8, 1e-6, 512

OPTIMISTIX = {
    "**AutoRootFinder**": AutoRootFinder(),
    "optx.Newton": optx.Newton(rtol=1e-10, atol=1e-10),
    "optx.Dogleg": optx.Dogleg(rtol=1e-10, atol=1e-10),
    "optx.LevenbergMarquardt": optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10),
}


@functools.cache
def compiled(fn):
    """The function and its Jacobian, compiled; systems share functions."""
    plain = lambda x: fn(x, None)
    return jax.jit(plain), jax.jit(jax.jacfwd(plain))


@eqx.filter_jit
def solve(solver, fn, y0):
    sol = optx.root_find(fn, solver, y0, max_steps=MAX_STEPS, throw=False)
    return sol.value, sol.stats, sol.result == optx.RESULTS.successful


def optimistix_run(solver, system):
    y0 = jnp.asarray(system.start)
    value, stats, claimed = solve(solver, system.fn, y0)
    evaluations = stats.get("num_evaluations")
    if evaluations is None:  # one linearisation and n JVPs in every step
        evaluations = stats["num_steps"] * (1 + y0.size)
    return np.asarray(value), bool(claimed), int(evaluations)


def scipy_run(method, system):
    fn, jac = compiled(system.fn)
    n = system.start.size
    sol = scipy.optimize.root(
        lambda x: np.asarray(fn(x)),
        system.start,
        jac=lambda x: np.asarray(jac(x)),
        method=method,
    )
    return sol.x, bool(sol.success), int(sol.nfev + n * sol.get("njev", 0))


@functools.cache
def jaxopt_solver(fn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt
    options = {"maxiter": MAX_STEPS, "tol": 1e-10, "xtol": 0.0, "gtol": 1e-10}
    return jax.jit(jaxopt.LevenbergMarquardt(lambda x: fn(x, None), **options).run)


def jaxopt_run(system):
    y0 = jnp.asarray(system.start)
    sol = jaxopt_solver(system.fn)(y0)
    # It has no verdict of its own: below `maxiter` it says that it has converged.
    claimed = int(sol.state.iter_num) < MAX_STEPS
    return np.asarray(sol.params), claimed, int(sol.state.iter_num) * (1 + y0.size)


def compile_times(solvers, rounds=5):
    """CPU seconds to trace and compile at n = 10: medians, everyone in turns."""
    system = next(s for s in STANDARD_SYSTEMS if s.name == "Broyden tridiagonal")
    y0, seconds = jnp.asarray(system.start), {name: [] for name in solvers}
    for _ in range(rounds):
        for name, solver in solvers.items():
            jax.clear_caches()
            start = time.process_time()
            solve.lower(solver, system.fn, y0).compile()
            seconds[name].append(time.process_time() - start)
    return {name: f"{np.median(taken):.2f}" for name, taken in seconds.items()}


def row(name, run, compile_seconds):
    solved, wrong, loose, costs = [0, 0], 0, 0, []
    for which, systems in enumerate((STANDARD_SYSTEMS, MINPACK_RUNS)):
        for system in systems:
            x, claimed, cost = run(system)
            residual = float(np.max(np.abs(compiled(system.fn)[0](x))))
            solved[which] += residual < SOLVED
            wrong += claimed and not residual <= WRONG
            loose += claimed and SOLVED <= residual <= WRONG
            if which == 0 and residual < SOLVED:
                costs.append(cost)
    median = f"{np.median(costs):.0f}"
    cells = (
        name,
        f"{solved[0]}/23",
        f"{solved[1]}/54",
        wrong,
        loose,
        median,
        compile_seconds,
    )
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    print("| solver | standard | MINPACK | wrong | loose | evaluations | compile (s) |")
    print("|---|---|---|---|---|---|---|")
    seconds = compile_times(OPTIMISTIX)
    for name, solver in OPTIMISTIX.items():
        run = lambda s, solver=solver: optimistix_run(solver, s)
        row(name, run, seconds[name])
    row("jaxopt.LevenbergMarquardt", jaxopt_run, "")
    for method in ("hybr", "lm"):
        row(f"scipy {method}", lambda s, m=method: scipy_run(m, s), "")


if __name__ == "__main__":
    main()
