"""Measurements behind the thresholds of `AutoLinearSolver`: run as a script.

Contestants of one row are timed in turns, in one process; medians in microseconds, and
the number of products where there is one. `python benchmarks/linear_solvers.py`
"""

import time

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from eqximplicit.linear_solvers import AutoLinearSolver, DirectLU, DirectSymmetric

REPEATS = 15


def _median_times(contestants, *args):
    compiled = {name: jax.jit(fn) for name, fn in contestants.items()}
    first, times = {}, {name: [] for name in compiled}
    for name, fn in compiled.items():
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        first[name] = 1e3 * (time.perf_counter() - start)
    for _ in range(REPEATS):
        for name, fn in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            times[name].append(time.perf_counter() - start)
    return {n: (1e6 * float(np.median(t)), first[n]) for n, t in times.items()}


def _print(title, contestants, *args):
    for name, (run, first) in _median_times(contestants, *args).items():
        print(f"| {title} | {name} | {run:.0f} us | {first:.0f} ms |", flush=True)


def _solve(solver, make_operator):
    def solve(parameter, b):
        operator = make_operator(parameter)
        return solver.compute(solver.init(operator, {}), b, {})

    return solve


def _dense(matrix, tags=()):
    struct = jax.ShapeDtypeStruct(matrix.shape[:1], matrix.dtype)
    return lx.FunctionLinearOperator(lambda v: matrix @ v, struct, tags)


def _hand_picard(make_operator, rtol):
    def solve(parameter, b):
        mv, tol = make_operator(parameter).mv, rtol * jnp.linalg.norm(b)

        def step(carry):
            x, r = carry
            x = x + r
            return x, b - mv(x)

        start = (jnp.zeros_like(b), b)
        return jax.lax.while_loop(lambda c: jnp.linalg.norm(c[1]) > tol, step, start)[0]

    return solve


def _hand_cg(make_operator, rtol):
    def solve(parameter, b):
        return jax.scipy.sparse.linalg.cg(make_operator(parameter).mv, b, tol=rtol)[0]

    return solve


def _fixed_point_adjoint(rng):
    for n in (10, 32, 50, 100, 200, 1000):
        matrix = jnp.asarray(np.eye(n) - 0.5 * rng.normal(size=(n, n)) / np.sqrt(n))
        b = jnp.asarray(rng.normal(size=n))
        contestants = {
            "auto": _solve(AutoLinearSolver(rtol=1e-7), _dense),
            "LU": _solve(DirectLU(), _dense),
            "Picard by hand": _hand_picard(_dense, 1e-7),
        }
        _print(f"I - J, n = {n}", contestants, matrix, b)


def _deq(rng):
    w = jnp.asarray(0.5 * rng.normal(size=(256, 256)) / 16, jnp.float32)
    z = jnp.asarray(np.tanh(rng.normal(size=(64, 256))), jnp.float32)
    b = jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)

    def make(w):
        struct = jax.ShapeDtypeStruct(z.shape, z.dtype)
        return lx.FunctionLinearOperator(lambda v: v - ((1 - z**2) * v) @ w, struct)

    solver = AutoLinearSolver(rtol=1e-5)
    contestants = {
        "auto": _solve(solver, make),
        "Picard by hand": _hand_picard(make, 1e-5),
        "lineax GMRES": _solve(lx.GMRES(rtol=1e-5, atol=1e-5), make),
    }
    _print("DEQ 64 x 256 float32", contestants, w, b)
    _, _, stats = _solve(solver, make)(w, b)
    print(f"| DEQ 64 x 256 float32 | products of auto | {int(stats['num_steps'])} | |")


def _hessians(rng):
    for n in (10, 32, 50, 110, 200, 600):
        g = rng.normal(size=(n, n))
        matrix = jnp.asarray(g @ g.T / n + 0.1 * np.eye(n))
        b = jnp.asarray(rng.normal(size=n))

        def make(matrix):
            return _dense(matrix, lx.symmetric_tag)

        contestants = {
            "auto": _solve(AutoLinearSolver(rtol=1e-7), make),
            "Cholesky": _solve(DirectSymmetric(), make),
            "CG by hand": _hand_cg(make, 1e-7),
        }
        _print(f"Hessian, n = {n}", contestants, matrix, b)


def _many_small(rng):
    for n in (1, 2, 3):
        matrices = jnp.asarray(rng.normal(size=(10_000, n, n)))
        b = jnp.asarray(rng.normal(size=(10_000, n)))
        contestants = {
            "auto": jax.vmap(lambda m, b: _solve(AutoLinearSolver(), _dense)(m, b)[0]),
            "jnp.linalg.solve": jax.vmap(jnp.linalg.solve),
        }
        _print(f"10 000 systems, n = {n}", contestants, matrices, b)


def _columns(rng):
    n = 200
    matrix = jnp.asarray(np.eye(n) - 0.5 * rng.normal(size=(n, n)) / np.sqrt(n))

    def auto(matrix, columns):
        solver, operator = AutoLinearSolver(), _dense(matrix)
        state = solver.init(operator, {})
        return jax.vmap(lambda b: solver.compute(state, b, {})[0])(columns)

    def by_hand(matrix, columns):
        return jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(matrix), columns)

    contestants = {"auto": auto, "LU by hand": by_hand}
    _print("200 columns, n = 200", contestants, matrix, jnp.eye(n))


def main():
    """Prints one Markdown table."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    print("| system | solver | median | first call |\n|---|---|---|---|")
    for measure in (_fixed_point_adjoint, _deq, _hessians, _many_small, _columns):
        measure(rng)


if __name__ == "__main__":
    main()
