"""What has to hold on a GPU as well: `pytest -m gpu`, deselected where JAX finds none.

Every case is held against NumPy in float64. Nothing here mentions a device but the
check of where the numbers are, so the cases also run, unmarked, on a CPU.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

pytestmark = pytest.mark.gpu

N = 24
# The default solvers stop at 1e-5 and 1e-8; the condition numbers are below 10.
TOL = {jnp.float32: 1e-3, jnp.float64: 1e-7}
STOP = {jnp.float32: 1e-6, jnp.float64: 1e-12}
LINEAR_SOLVERS = {
    "default": lambda tol: eqi.AutoLinearSolver(),
    "LU": lambda tol: lx.LU(),
    "HybridKrylov": lambda tol: eqi.HybridKrylov(rtol=tol),
    "NormalCG": lambda tol: eqi.NormalCG(rtol=tol),
    "Neumann": lambda tol: eqi.Neumann(rtol=tol),
    "GMRES": lambda tol: lx.GMRES(rtol=tol, atol=tol),
}
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=str)


@pytest.fixture(autouse=True)
def full_precision():
    """GPUs multiply float32 matrices in a shorter format unless told not to."""
    with jax.default_matmul_precision("highest"):
        yield


def cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def problem():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(N, N))
    return 0.7 * w / np.linalg.norm(w, 2), rng.normal(size=N)


def reference(w, x):
    """The solution, and the gradient of the sum of its squares, by dense algebra."""
    z = np.zeros(N)
    for _ in range(300):
        z = np.tanh(w @ z + x)
    slope = 1 - z**2
    u = np.linalg.solve(np.eye(N) - (slope[:, None] * w).T, 2 * z) * slope
    return z, (np.outer(u, z), u)


def assert_here(*arrays):
    """All of the numbers are on the default device, and on no other."""
    assert {d for a in arrays for d in a.devices()} == {jax.devices()[0]}


@each_dtype
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_gradient_of_a_layer(name, dtype):
    adjoint = eqi.ImplicitAdjoint(linear_solver=LINEAR_SOLVERS[name](STOP[dtype]))
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), adjoint=adjoint, throw=False)
    w, x = (jnp.asarray(v, dtype) for v in problem())

    @jax.jit
    def run(w, x):
        def loss(w, x):
            z = layer(jnp.zeros_like(x), (w, x))
            return jnp.sum(z**2), z

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(w, x)

    (w_bar, x_bar), z = run(w, x)
    assert_here(w_bar, x_bar, z)
    assert z.dtype == w_bar.dtype == x_bar.dtype == dtype
    exact, (exact_w, exact_x) = reference(*problem())
    np.testing.assert_allclose(z, exact, atol=TOL[dtype])
    np.testing.assert_allclose(w_bar, exact_w, atol=TOL[dtype])
    np.testing.assert_allclose(x_bar, exact_x, atol=TOL[dtype])


@each_dtype
def test_forward_and_reverse_jacobians_of_the_default_root_finder(dtype):
    w, x = (jnp.asarray(v, dtype) for v in problem())
    layer = eqi.ImplicitFunction(eqi.Root(lambda z, a: z - cell(z, a)), throw=False)
    solution = lambda x: layer(jnp.zeros_like(x), (w, x))
    forward, reverse = jax.jit(
        lambda x: (jax.jacfwd(solution)(x), jax.jacrev(solution)(x))
    )(x)
    assert_here(forward, reverse)
    z, _ = reference(*problem())
    slope = np.diag(1 - z**2)
    exact = np.linalg.solve(np.eye(N) - slope @ problem()[0], slope)
    np.testing.assert_allclose(forward, exact, atol=TOL[dtype])
    np.testing.assert_allclose(reverse, exact, atol=TOL[dtype])


@each_dtype
def test_sparse_solver_needs_no_library_of_the_host(dtype):
    # -Δu + u³ = b on a 6 x 6 grid: its pattern is not banded, KLU is for CPU only.
    m = 6
    rng = np.random.default_rng(1)
    line = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)
    laplacian = np.kron(line, np.eye(m)) + np.kron(np.eye(m), line)
    u = rng.normal(size=m * m)
    b = laplacian @ u + u**3

    def residual(u, b):
        padded = jnp.pad(u.reshape(m, m), 1)
        around = padded[:-2, 1:-1] + padded[2:, 1:-1]
        around = around + padded[1:-1, :-2] + padded[1:-1, 2:]
        return 4 * u + u**3 - around.reshape(-1) - b

    condition, solver = eqi.Root(residual), eqi.SparseDirect()

    @jax.jit
    def gradient(b):
        def loss(b):
            found = jnp.asarray(u, dtype)
            y = eqi.implicit_solution(condition, found, b, linear_solver=solver)
            return jnp.sum(y**2)

        return jax.grad(loss)(b)

    b_bar = gradient(jnp.asarray(b, dtype))
    assert_here(b_bar)
    exact = np.linalg.solve(laplacian + np.diag(3 * u**2), 2 * u)
    np.testing.assert_allclose(b_bar, exact, atol=TOL[dtype])


@each_dtype
@pytest.mark.parametrize("kind", [eqi.Anderson, eqi.Broyden, eqi.AutoFixedPoint])
def test_lanes_are_independent(kind, dtype):
    rates = np.linspace(1.5, 2.9, 500)
    rates[7] = np.nan
    fn = lambda y, r: r * y * (1 - y)
    layer = eqi.ImplicitFunction(eqi.FixedPoint(fn), kind(), throw=False)
    lane = jax.value_and_grad(lambda r: layer(jnp.full(1, 0.55, dtype), r)[0])
    y, slope = jax.jit(jax.vmap(lane))(jnp.asarray(rates, dtype))
    assert_here(y, slope)
    np.testing.assert_allclose(
        np.delete(y, 7), 1 - 1 / np.delete(rates, 7), atol=TOL[dtype]
    )
    exact = 1 / np.delete(rates, 7) ** 2
    np.testing.assert_allclose(np.delete(slope, 7), exact, atol=TOL[dtype])
    assert np.isnan(slope[7])


def test_unrolled_gradient_agrees():
    w, x = (jnp.asarray(v) for v in problem())
    picard = optx.FixedPointIteration(rtol=1e-12, atol=1e-12)
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(cell), picard, eqi.UnrolledAdjoint(), throw=False
    )
    loss = lambda x: jnp.sum(layer(jnp.zeros_like(x), (w, x)) ** 2)
    x_bar = jax.jit(jax.grad(loss))(x)
    assert_here(x_bar)
    np.testing.assert_allclose(x_bar, reference(*problem())[1][1], atol=1e-9)
