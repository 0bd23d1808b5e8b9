"""The problems of the benchmarks, each once: data, a float64 reference, contestants.

Fixed points and roots are here, `bilevel.py` has the two bilevel problems, and the
implicit Euler steps with their sparse Jacobians are a script apart, `sparse.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import bilevel
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import scipy.linalg
import sparse
from common import (
    around_loop,
    BY_HAND,
    by_optimistix,
    dense_adjoint,
    fixed_point_by_hand,
    jaxopt,
    jaxopt_linear,
    layer_call,
    lineax_adjoint,
    MATCHED,
    MATCHED_LU,
    NAMED,
    OURS,
    OWN,
    OWN_LU,
    picard,
    picard_adjoint,
    SAME,
    SAME_LU,
    Solve,
    SOLVER,
    SOLVER_LU,
    sum_of_squares,
    unrolled,
    value_and_grad,
    Workload,
)

import eqximplicit as eqi

# --- z = tanh(z W + x): the layer of a deep equilibrium model -------------------------


def tanh_cell(z: Any, theta: Any) -> Any:
    w, x = theta
    return jnp.tanh(z @ w + x)


def tanh_data(n: int, batch: tuple[int, ...], dtype: Any) -> Any:
    draw = np.random.default_rng(n)
    w = 0.5 * draw.normal(size=(n, n)) / np.sqrt(n)
    return jnp.asarray(w, dtype), jnp.asarray(draw.normal(size=(*batch, n)), dtype)


def tanh_solution(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fixed point and the slope of `tanh` there, to rounding."""
    z = np.zeros_like(x)
    for _ in range(200):
        z = np.tanh(z @ w + x)
    return z, 1 - z**2


def tanh_reference(theta: Any) -> Any:
    """The gradient of `sum(z²)`, by 200 terms of the adjoint series."""
    w, x = (np.asarray(leaf, np.float64) for leaf in theta)
    z, slope = tanh_solution(w, x)
    adjoint = ct = 2 * z
    for _ in range(200):
        adjoint = ct + (adjoint * slope) @ w.T
    ct_x = adjoint * slope
    return np.atleast_2d(z).T @ np.atleast_2d(ct_x), ct_x


def tanh_solves(z0: Any, tol: float, adjoint_rtol: float) -> dict[str, Solve]:
    """Every contestant for the fixed point of `tanh_cell`."""
    small = z0.size <= 32
    condition, neumann = eqi.FixedPoint(tanh_cell), eqi.Neumann(rtol=adjoint_rtol)
    plain = optx.FixedPointIteration(rtol=tol, atol=tol)
    by_default = eqi.ImplicitAdjoint(eqi.AutoLinearSolver(rtol=adjoint_rtol))
    ours, named = (
        eqi.ImplicitFunction(condition, solver, by_default, throw=False)
        for solver in (eqi.AutoFixedPoint(rtol=tol, atol=tol), plain)
    )
    matched = eqi.ImplicitFunction(
        condition,
        plain,
        eqi.ImplicitAdjoint(neumann),
        throw=False,
    )
    by_hand = functools.partial(fixed_point_by_hand, tanh_cell, z0, tol)
    solves = {
        OURS: layer_call(ours, z0),
        NAMED: layer_call(named, z0),
        MATCHED: layer_call(matched, z0),
        BY_HAND: by_hand(picard_adjoint(adjoint_rtol)),
        SAME: by_hand(lineax_adjoint(neumann)),
        OWN: around_loop(tanh_cell, z0, tol, neumann),
        "optimistix, GMRES": tanh_optimistix(
            tol, z0, lx.GMRES(rtol=adjoint_rtol, atol=adjoint_rtol)
        ),
        "jaxopt": tanh_jaxopt(z0, tol, jaxopt_linear.solve_normal_cg, adjoint_rtol),
        "jaxopt, GMRES": tanh_jaxopt(z0, tol, jaxopt_linear.solve_gmres, adjoint_rtol),
        "unrolled": unrolled(tanh_cell, z0, 30 if z0.dtype == jnp.float64 else 20),
    }
    if small:
        solves["by hand, LU"] = by_hand(dense_adjoint)
    if z0.ndim == 1 and z0.size <= 100:
        elimination = eqi.ImplicitAdjoint(lx.LU())
        layer = eqi.ImplicitFunction(condition, plain, elimination, throw=False)
        solves[MATCHED_LU] = layer_call(layer, z0)
        rule, loop = lineax_adjoint(lx.LU()), by_optimistix(tanh_cell, z0, tol)
        solves[SAME_LU], solves[SOLVER_LU] = by_hand(rule), by_hand(rule, loop)
        solves[OWN_LU] = around_loop(tanh_cell, z0, tol, lx.LU())
    if z0.ndim == 1:  # optimistix keeps its error in the default dtype
        loop = by_optimistix(tanh_cell, z0, tol)
        solves[SOLVER] = by_hand(lineax_adjoint(neumann), loop)
        solves["optimistix"] = tanh_optimistix(
            tol, z0, lx.AutoLinearSolver(well_posed=None)
        )
    return solves


def tanh_optimistix(tol: float, z0: Any, linear_solver: Any) -> Solve:
    # Its state is of the default dtype, float64 here, whatever that of `z0` is.
    wide = lambda y: optx.max_norm(y).astype(jnp.result_type(float))
    solver = optx.FixedPointIteration(rtol=tol, atol=tol, norm=wide)

    def solve(theta: Any) -> Any:
        return optx.fixed_point(
            tanh_cell,
            solver,
            z0,
            theta,
            adjoint=optx.ImplicitAdjoint(linear_solver),
            max_steps=512,
            throw=False,
        ).value

    return solve


def tanh_jaxopt(z0: Any, tol: float, linear_solve: Any, rtol: float) -> Solve:
    def solve(theta: Any) -> Any:
        solver = jaxopt.FixedPointIteration(
            tanh_cell,
            maxiter=512,
            tol=tol,
            implicit_diff_solve=functools.partial(linear_solve, tol=rtol),
        )
        return solver.run(z0, theta).params

    return solve


def tanh_workload(n: int) -> Workload:
    theta = tanh_data(n, (), jnp.float64)
    solves = tanh_solves(jnp.zeros_like(theta[1]), 1e-8, 1e-7)
    return Workload(
        title=f"tanh fixed point, n = {n}",
        theta=theta,
        solves=solves,
        gradients=value_and_grad(sum_of_squares, solves),
        reference=tanh_reference(theta),
        rtol=1e-6,
        limit=1.1,
    )


def deq() -> Workload:
    theta = tanh_data(256, (64,), jnp.float32)
    z0 = jnp.zeros_like(theta[1])
    solves = tanh_solves(z0, 1e-5, 1e-5)

    def approximated(linear_solver: Any) -> Callable[[Any], Any]:
        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(tanh_cell),
            optx.FixedPointIteration(rtol=1e-5, atol=1e-5),
            eqi.ImplicitAdjoint(linear_solver),
            throw=False,
        )
        return jax.grad(lambda theta: sum_of_squares(layer(z0, theta)))

    return Workload(
        title="DEQ, batch 64, width 256, float32",
        theta=theta,
        solves=solves,
        gradients=value_and_grad(sum_of_squares, solves),
        reference=tanh_reference(theta),
        rtol=1e-4,
        limit=1.1,
        approximated=approximated,
    )


# --- The whole Jacobian dz/dx of the same equation, one factorisation for all of it


def jacobian(mode: str) -> Workload:
    """`mode` is `"fwd"` or `"rev"`."""
    w, x = tanh_data(200, (), jnp.float64)
    z0 = jnp.zeros_like(x)
    every = tanh_solves(z0, 1e-8, 1e-7)
    names = (OURS, NAMED, "optimistix", "jaxopt, GMRES")
    if mode == "fwd":  # jaxopt has no forward mode through a `custom_vjp`
        names = (OURS, NAMED, "optimistix")
    transform = jax.jacfwd if mode == "fwd" else jax.jacrev
    solves = {name: lambda x, s=every[name]: s((w, x)) for name in names}
    matched = eqi.ImplicitFunction(
        eqi.FixedPoint(tanh_cell),
        optx.FixedPointIteration(rtol=1e-8, atol=1e-8),
        eqi.ImplicitAdjoint(eqi.DirectLU()),
        throw=False,
    )
    solves[MATCHED] = lambda x: matched(z0, (w, x))
    gradients = {name: transform(solve) for name, solve in solves.items()}
    gradients[BY_HAND] = lambda x: jacobian_by_hand(w, x, mode)
    solves[BY_HAND] = lambda x: picard(lambda z: tanh_cell(z, (w, x)), z0, 1e-8)
    _, slope = tanh_solution(np.asarray(w), np.asarray(x))
    matrix = np.eye(200) - slope[:, None] * np.asarray(w).T
    return Workload(
        title=f"200 x 200 Jacobian, jac{mode}",
        theta=x,
        solves=solves,
        gradients=gradients,
        reference=np.linalg.solve(matrix, np.diag(slope)),
        rtol=1e-6,
        limit=1.2,
    )


def jacobian_by_hand(w: Any, x: Any, mode: str) -> Any:
    z = picard(lambda z: tanh_cell(z, (w, x)), jnp.zeros_like(x), 1e-8)
    jac = jax.jacfwd if mode == "fwd" else jax.jacrev
    by_z = jac(lambda z: tanh_cell(z, (w, x)))(z)
    by_x = jac(lambda x: tanh_cell(z, (w, x)))(x)
    return jnp.linalg.solve(jnp.eye(z.size) - by_z, by_x)


# --- Two equations on a pytree: the first example -------------------------------------


def pair_map(x: Any, para: Any) -> Any:
    first = jnp.sqrt(para["alpha"] - x[0] * x[1])
    return first, jnp.sqrt((57 - x[1]) / (para["beta"] * first))


def pair_adjoint(transposed: Callable[[Any], Any], ct: Any) -> Any:
    """Solves `u = ct + Jᵀ u` for two numbers by Cramer's rule."""
    one, zero = jnp.ones_like(ct[0]), jnp.zeros_like(ct[0])
    (a, c), (b, d) = transposed((one, zero)), transposed((zero, one))
    det = (1 - a) * (1 - d) - b * c
    return (
        ((1 - d) * ct[0] + b * ct[1]) / det,
        (c * ct[0] + (1 - a) * ct[1]) / det,
    )


def pair() -> Workload:
    tol = 1e-10
    theta = {"alpha": jnp.array(10.0), "beta": jnp.array(3.0)}
    x0 = (jnp.array(1.5), jnp.array(3.5))
    condition = eqi.FixedPoint(pair_map)
    plain = optx.FixedPointIteration(rtol=tol, atol=tol)

    def optimistix(theta: Any) -> Any:
        return optx.fixed_point(
            pair_map, plain, x0, theta, throw=False, max_steps=512
        ).value

    def with_jaxopt(theta: Any) -> Any:
        solver = jaxopt.FixedPointIteration(pair_map, maxiter=512, tol=tol)
        return solver.run(x0, theta).params

    def layer(solver: Any, linear_solver: Any = eqi.AutoLinearSolver()) -> Solve:
        adjoint = eqi.ImplicitAdjoint(linear_solver)
        solved = eqi.ImplicitFunction(condition, solver, adjoint, throw=False)
        return layer_call(solved, x0)

    by_hand = functools.partial(fixed_point_by_hand, pair_map, x0, tol)
    rule, rule_lu = map(lineax_adjoint, (eqi.AutoLinearSolver(), lx.LU()))
    loop = by_optimistix(pair_map, x0, tol)
    solves = {
        OURS: layer(eqi.AutoFixedPoint(rtol=tol, atol=tol)),
        MATCHED: layer(plain),
        BY_HAND: by_hand(pair_adjoint),
        SAME: by_hand(rule),
        SOLVER: by_hand(rule, loop),
        OWN: around_loop(pair_map, x0, tol, eqi.AutoLinearSolver()),
        MATCHED_LU: layer(plain, lx.LU()),
        SAME_LU: by_hand(rule_lu),
        SOLVER_LU: by_hand(rule_lu, loop),
        OWN_LU: around_loop(pair_map, x0, tol, lx.LU()),
        "optimistix": optimistix,
        "jaxopt": with_jaxopt,
        "unrolled": unrolled(pair_map, x0, 60),
    }
    by_alpha, by_beta = np.array([37, -27]) / 205, np.array([36, -126]) / 205
    ct = 2 * np.array([2.0, 3.0])
    return Workload(
        title="Two equations on a pytree",
        theta=theta,
        solves=solves,
        gradients=value_and_grad(sum_of_squares, solves),
        reference={"alpha": ct @ by_alpha, "beta": ct @ by_beta},
        rtol=1e-6,
        limit=1.1,
    )


# --- Ten thousand small roots under vmap ----------------------------------------------

LANES = 10_000


def small_residual(y: Any, a: Any) -> Any:
    """`y + y³ = a`, and in two dimensions a rotation of `y` as well."""
    if y.ndim == 0:
        return y + y**3 - a
    return y + y**3 + 0.3 * jnp.stack([y[1], -y[0]]) - a


def small_newton(a: Any, dims: int) -> Any:
    """Newton's method for all lanes at once, in closed form; lanes come last."""

    def step(y: Any) -> Any:
        if dims == 1:
            return y - (y + y**3 - a) / (1 + 3 * y**2)
        u, v = y
        f = u + u**3 + 0.3 * v - a[0], v + v**3 - 0.3 * u - a[1]
        p, q = 1 + 3 * u**2, 1 + 3 * v**2
        det = p * q + 0.09
        return u - (q * f[0] - 0.3 * f[1]) / det, v - (0.3 * f[0] + p * f[1]) / det

    y0 = jnp.zeros_like(a) if dims == 1 else (jnp.zeros_like(a[0]),) * 2
    return picard(step, y0, 1e-9)


def small_by_hand(dims: int) -> Solve:
    def columns(a: Any) -> Any:
        return a if dims == 1 else (a[:, 0], a[:, 1])

    def together(y: Any) -> Any:
        return y if dims == 1 else jnp.stack(y, axis=1)

    @jax.custom_vjp
    def solve(a: Any) -> Any:
        return together(small_newton(columns(a), dims))

    def forward(a: Any) -> Any:
        y = solve(a)
        return y, y

    def backward(y: Any, ct: Any) -> Any:
        if dims == 1:
            return (ct / (1 + 3 * y**2),)
        p, q = 1 + 3 * y[:, 0] ** 2, 1 + 3 * y[:, 1] ** 2
        det = p * q + 0.09
        u, v = ct[:, 0], ct[:, 1]
        return (jnp.stack([(q * u + 0.3 * v) / det, (p * v - 0.3 * u) / det], 1),)

    solve.defvjp(forward, backward)
    return solve


def small_reference(a: np.ndarray) -> np.ndarray:
    """The gradient of `sum(y²)`, by forty Newton steps and dense solves."""
    lanes = a.reshape(LANES, -1)
    dims = lanes.shape[1]
    rotation = 0.3 * np.array([[0, 1], [-1, 0]]) if dims == 2 else np.zeros((1, 1))
    y = np.zeros_like(lanes)

    def slope(y: np.ndarray) -> np.ndarray:
        return np.eye(dims) * (1 + 3 * y**2)[:, :, None] + rotation

    for _ in range(40):
        f = y + y**3 + y @ rotation.T - lanes
        y = y - np.linalg.solve(slope(y), f[:, :, None])[:, :, 0]
    ct = np.linalg.solve(slope(y).transpose(0, 2, 1), 2 * y[:, :, None])
    return ct[:, :, 0].reshape(a.shape)


def small_roots(dims: int) -> Workload:
    """`dims` is 1 or 2."""
    shape = (LANES,) if dims == 1 else (LANES, 2)
    a = jnp.asarray(np.random.default_rng(dims).normal(scale=2.0, size=shape))
    y0, tol = jnp.zeros(shape[1:]), 1e-9
    newton = optx.Newton(rtol=tol, atol=tol)
    default = eqi.ImplicitFunction(eqi.Root(small_residual), throw=False)
    matched = eqi.ImplicitFunction(eqi.Root(small_residual), newton, throw=False)

    def optimistix(a: Any) -> Any:
        return optx.root_find(small_residual, newton, y0, a, throw=False).value

    divide = lambda mv, b: b / mv(jnp.ones_like(b))  # its LU refuses a scalar
    peer = divide if dims == 1 else jaxopt_linear.solve_lu

    @jaxopt.implicit_diff.custom_root(small_residual, solve=peer)
    def with_jaxopt(init: Any, a: Any) -> Any:
        del init
        columns = a if dims == 1 else (a[0], a[1])
        y = small_newton(columns, dims)
        return y if dims == 1 else jnp.stack(y)

    solves = {
        OURS: jax.vmap(layer_call(default, y0)),
        MATCHED: jax.vmap(layer_call(matched, y0)),
        BY_HAND: small_by_hand(dims),
        "optimistix": jax.vmap(optimistix),
        "jaxopt, Newton by hand": jax.vmap(lambda a: with_jaxopt(None, a)),
        "unrolled": jax.vmap(unrolled(small_step, y0, 12)),
    }
    return Workload(
        title=f"10 000 roots in {dims}-D under vmap",
        theta=a,
        solves=solves,
        gradients=value_and_grad(sum_of_squares, solves),
        reference=small_reference(np.asarray(a)),
        rtol=1e-6,
        limit=1.1,
    )


def small_step(y: Any, a: Any) -> Any:
    slope = jax.jacfwd(small_residual)(y, a)
    f = small_residual(y, a)
    return y - (f / slope if y.ndim == 0 else jnp.linalg.solve(slope, f))


# --- Implicit Euler for nonlinear diffusion, 20 000 unknowns --------------------------


def euler_reference(k: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Newton's method on bands found by complex steps, and one banded solve."""

    def residual(u: Any) -> Any:
        wide = np.pad(u, 1)
        c = 1 + 0.5 * wide**2
        return u - old - sparse.DT * np.diff(k * 0.5 * (c[1:] + c[:-1]) * np.diff(wide))

    def bands(u: np.ndarray) -> np.ndarray:
        found, rows = np.zeros((3, u.size)), np.arange(u.size)
        for colour in range(3):
            step = 1e-30j * (rows % 3 == colour)
            image = residual(u + step).imag / 1e-30
            for offset in (-1, 0, 1):  # entry (row, row + offset)
                mine = (rows + offset) % 3 == colour
                mine &= (rows + offset >= 0) & (rows + offset < u.size)
                found[1 - offset, rows[mine] + offset] = image[mine]
        return found

    def transposed(found: np.ndarray) -> np.ndarray:
        upper, middle, lower = found
        return np.stack([np.roll(lower, 1), middle, np.roll(upper, -1)])

    u = old
    for _ in range(sparse.NEWTON):
        u = u - scipy.linalg.solve_banded((1, 1), bands(u), residual(u))
    ct = scipy.linalg.solve_banded((1, 1), transposed(bands(u)), 2 * (u - 0.5 * old))
    wide = np.pad(u, 1)
    c = 1 + 0.5 * wide**2
    flux = 0.5 * (c[1:] + c[:-1]) * np.diff(wide)
    return -sparse.DT * np.diff(np.pad(ct, 1)) * flux


def euler() -> Workload:
    """The one-dimensional problem of `sparse.py`: no tags, no pattern given."""
    draw, n = np.random.default_rng(0), sparse.LINE
    old = np.sin(np.linspace(0, 9, n)) + 0.1 * draw.normal(size=n)
    k = draw.uniform(0.5, 1.5, n + 1)
    ours = {
        OURS: eqi.AutoLinearSolver(),
        MATCHED: eqi.SparseDirect(),
    }
    gradients = {
        name: lambda k, run=sparse.ours(sparse.line, solver): run(k, jnp.asarray(old))
        for name, solver in ours.items()
    }
    gradients[BY_HAND] = lambda k: sparse.by_hand(k, jnp.asarray(old))
    return Workload(
        title="Implicit Euler in 1-D, n = 20 000",
        theta=jnp.asarray(k),
        solves={},
        gradients=gradients,
        reference=euler_reference(k, old),
        rtol=1e-6,
        limit=2.0,
    )


# --- All of them ----------------------------------------------------------------------

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "pair": pair,
    "tanh10": lambda: tanh_workload(10),
    "tanh100": lambda: tanh_workload(100),
    "tanh1000": lambda: tanh_workload(1000),
    "logistic": bilevel.logistic,
    "deq": deq,
    "euler": euler,
    "roots1d": lambda: small_roots(1),
    "roots2d": lambda: small_roots(2),
    "jacfwd": lambda: jacobian("fwd"),
    "jacrev": lambda: jacobian("rev"),
    "imaml_cg": lambda: bilevel.imaml("cg"),
    "imaml_neumann": lambda: bilevel.imaml("neumann"),
}
