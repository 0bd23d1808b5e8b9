"""Implicit Euler for nonlinear diffusion: sparse adjoints that nobody has to write.

1-D with 20 000 unknowns against a handwritten tridiagonal solve (Jacobian, adjoint in
closed form); 2-D with 100 x 100 unknowns against SciPy's SuperLU on the host. Both
solve one step by Newton's method from the old state and differentiate the squared
distance to a target with respect to a field of diffusivities.

    python benchmarks/sparse.py            # prints a Markdown table
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl

jax.config.update("jax_enable_x64", True)

from eqximplicit import implicit_solution, Root  # noqa: E402
from eqximplicit.linear_solvers import AutoLinearSolver, SparseDirect  # noqa: E402

LINE, SIDE, DT, NEWTON = 20_000, 100, 4.0, 4
ROUNDS = 30


def conductivity(u: Any) -> Any:
    return 1 + 0.5 * u**2


# --- The two problems: residual(u, (k, old)) = 0 ------------------------------------


def line(u: jax.Array, args: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Walls at 0; `k` lives on the `n + 1` faces."""
    k, old = args
    wide = jnp.pad(u, 1)
    flux = k * 0.5 * (conductivity(wide[1:]) + conductivity(wide[:-1])) * jnp.diff(wide)
    return u - old - DT * jnp.diff(flux)


def plane(u: jax.Array, args: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Walls at 0; `k` lives on the cells."""
    k, old = args
    wide, c = jnp.pad(u, 1), conductivity(jnp.pad(u, 1)) * jnp.pad(k, 1, mode="edge")
    down = 0.5 * (c[1:, 1:-1] + c[:-1, 1:-1]) * jnp.diff(wide[:, 1:-1], axis=0)
    right = 0.5 * (c[1:-1, 1:] + c[1:-1, :-1]) * jnp.diff(wide[1:-1], axis=1)
    return u - old - DT * (jnp.diff(down, axis=0) + jnp.diff(right, axis=1))


def distance(u: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.sum((u - 0.5 * old) ** 2)


def newton(residual: Callable, solve: Callable, old: jax.Array) -> jax.Array:
    def step(_: int, u: jax.Array) -> jax.Array:
        return u - solve(u, residual(u))

    return jax.lax.fori_loop(0, NEWTON, step, old)


# --- Ours: the residual is all that is given ----------------------------------------


def ours(problem: Callable, linear_solver: Any) -> Callable:
    forward = SparseDirect()

    def loss(k: jax.Array, old: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient((k, old))

        def solve(u: jax.Array, r: jax.Array) -> jax.Array:
            operator = lx.JacobianLinearOperator(problem, u, fixed)
            return forward.compute(forward.init(operator, {}), r, {})[0]

        u = newton(lambda u: problem(u, fixed), solve, old)
        u = implicit_solution(Root(problem), u, (k, old), linear_solver=linear_solver)
        return distance(u, old)

    return jax.jit(jax.value_and_grad(loss))


# --- By hand, 1-D: closed-form Jacobian, tridiagonal solves, adjoint ------------------


def line_jacobian(u: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = jnp.pad(u, 1)
    c, slope = conductivity(wide), wide
    mean, rise = 0.5 * (c[1:] + c[:-1]), jnp.diff(wide)
    right = k * (0.5 * slope[1:] * rise + mean)  # d flux[i] / d wide[i + 1]
    left = k * (0.5 * slope[:-1] * rise - mean)  # d flux[i] / d wide[i]
    lower = DT * left[:-1]
    upper = -DT * right[1:]
    middle = 1 - DT * (left[1:] - right[:-1])
    return lower.at[0].set(0.0), middle, upper.at[-1].set(0.0)


def by_hand(k: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
    tridiagonal = jax.lax.linalg.tridiagonal_solve

    def solve(u: jax.Array, r: jax.Array) -> jax.Array:
        return tridiagonal(*line_jacobian(u, k), r[:, None])[:, 0]

    u = newton(lambda u: line(u, (k, old)), solve, old)
    lower, middle, upper = line_jacobian(u, k)
    down, up = jnp.pad(upper[:-1], (1, 0)), jnp.pad(lower[1:], (0, 1))
    ct = tridiagonal(down, middle, up, 2 * (u - 0.5 * old)[:, None])[:, 0]
    wide = jnp.pad(u, 1)
    gradient = 0.5 * (conductivity(wide[1:]) + conductivity(wide[:-1])) * jnp.diff(wide)
    return distance(u, old), -DT * jnp.diff(jnp.pad(ct, 1)) * gradient


# --- On the host, 2-D: SciPy ----------------------------------------------------------


def on_host(k: jax.Array, old: jax.Array) -> tuple[float, np.ndarray]:
    """Newton and adjoint with SuperLU; products and the pattern from the jaxpr."""
    u = old
    for _ in range(NEWTON):
        r = np.asarray(plane(u, (k, old))).reshape(-1)
        u = u - spl.spsolve(host_jacobian(u, k, old), r).reshape(u.shape)
    matrix = host_jacobian(u, k, old)
    ct = spl.spsolve(matrix.T.tocsc(), np.asarray(2 * (u - 0.5 * old)).reshape(-1))
    _, pullback = jax.vjp(lambda k: plane(u, (k, old)), k)
    return float(distance(u, old)), -np.asarray(pullback(ct.reshape(u.shape))[0])


def host_jacobian(u: jax.Array, k: jax.Array, old: jax.Array) -> sp.csc_array:
    """Five products: cells (i, j) with equal (i + 2 j) mod 5 share no neighbour."""
    i, j = np.indices(u.shape)
    colour = (i + 2 * j) % 5
    number, rows, cols, values = np.arange(u.size).reshape(u.shape), [], [], []
    for c in range(5):
        seed = jnp.asarray((colour == c).astype(float))
        product = np.asarray(push(u, k, old, seed))
        for di, dj in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            a, b = i + di, j + dj
            inside = (a >= 0) & (a < SIDE) & (b >= 0) & (b < SIDE) & (colour == c)
            rows.append(number[a[inside], b[inside]])
            cols.append(number[inside])
            values.append(product[a[inside], b[inside]])
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))
    return sp.csc_array(entries, shape=(u.size, u.size))


@jax.jit
def push(u: jax.Array, k: jax.Array, old: jax.Array, seed: jax.Array) -> jax.Array:
    return jax.jvp(lambda u: plane(u, (k, old)), (u,), (seed,))[1]


# --- Timing ---------------------------------------------------------------------------


def first_call(fn: Callable, *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def interleaved(fns: dict[str, Callable], *args: Any) -> dict[str, float]:
    """Medians of `ROUNDS` rounds in which every contestant runs once, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(ROUNDS):
        for name, fn in fns.items():
            times[name].append(first_call(fn, *args))
    return {name: statistics.median(ts) for name, ts in times.items()}


def report(title: str, contestants: dict[str, Callable], k: Any, old: Any) -> None:
    """The first contestant is the reference of ratios and of the gradient's error."""
    first = {name: first_call(fn, k, old) for name, fn in contestants.items()}
    run = interleaved(contestants, k, old)
    reference = next(iter(contestants))
    truth = np.asarray(contestants[reference](k, old)[1])
    for name, fn in contestants.items():
        found = np.asarray(fn(k, old)[1])
        error = np.max(np.abs(found - truth)) / np.max(np.abs(truth))
        print(
            f"| {title} | {name} | {1e3 * run[name]:.2f} | "
            f"{run[name] / run[reference]:.2f} | {first[name]:.2f} | {error:.1e} |"
        )


def main() -> None:
    default = "--sparse-only" not in sys.argv
    columns = "problem|contestant|value and gradient [ms]|ratio|first call [s]|error"
    print(f"| {columns.replace('|', ' | ')} |\n|---|---|---|---|---|---|")
    draw = np.random.default_rng(0)
    old = jnp.asarray(np.sin(np.linspace(0, 9, LINE)) + 0.1 * draw.normal(size=LINE))
    k = jnp.asarray(draw.uniform(0.5, 1.5, LINE + 1))
    contestants: dict[str, Callable] = {"by hand": jax.jit(by_hand)}
    contestants["SparseDirect"] = ours(line, SparseDirect())
    if default:
        contestants["default"] = ours(line, AutoLinearSolver())
    report(f"1-D, n = {LINE}", contestants, k, old)
    old = jnp.asarray(draw.normal(size=(SIDE, SIDE)))
    k = jnp.asarray(draw.uniform(0.5, 1.5, (SIDE, SIDE)))
    contestants = {"SciPy": on_host, "SparseDirect": ours(plane, SparseDirect())}
    if default:
        contestants["default"] = ours(plane, AutoLinearSolver())
    report(f"2-D, n = {SIDE * SIDE}", contestants, k, old)


if __name__ == "__main__":
    main()
