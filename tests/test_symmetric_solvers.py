"""Symmetric systems: matrices that are symmetric but for rounding, or not at all."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import DirectSymmetric, LeastNorm, Tikhonov
from eqximplicit.linear_solvers._dense import skewness

SPECTRAL = (LeastNorm(), LeastNorm(least_squares=True), Tikhonov(1e-6))
JACOBIANS = (jax.jacfwd, jax.jacrev)


def _succeeded(out):
    return bool(out.result == lx.RESULTS.successful)


def _nonsymmetric(n, size=1.0):
    rng = np.random.default_rng(n)
    symmetric = rng.normal(size=(n, n)) / (4 * n**0.5)
    return np.eye(n) + symmetric + symmetric.T + size * np.triu(np.ones((n, n)), 1)


def _solve(matrix, b, solver, tags=lx.symmetric_tag):
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), tags)
    return lx.linear_solve(operator, jnp.asarray(b), solver, throw=False)


def _jacobians(matrix, solver, inside=None):
    """Both Jacobians of the solution of `A y = a`, whose operator is tagged.

    Of something in the precision `inside`, too, that adds nothing.
    """
    matrix = jnp.asarray(matrix)

    def residual(y, a):
        left = matrix @ y - a
        return left if inside is None else left + 0 * y.astype(inside).astype(y.dtype)

    condition = eqi.Root(residual, tags=lx.symmetric_tag)
    a = jnp.ones(len(matrix), matrix.dtype)
    y = jnp.linalg.solve(matrix, a)
    solution = lambda a: eqi.implicit_solution(condition, y, a, linear_solver=solver)
    return [jax.jit(jacobian(solution))(a) for jacobian in JACOBIANS]


# --- Coarser precision inside ---------------------------------------------------------

# Of the largest entry: some roundings of the inner precision.
MIXED = [
    (jnp.bfloat16, jnp.bfloat16, 5e-2),
    (jnp.float32, jnp.bfloat16, 3e-2),
    (jnp.float64, jnp.float32, 1e-5),
]


DRAWS = 4


def _objective(inside):
    """Logistic regression, its products in the precision `inside`."""

    def objective(w, args):
        x, lam = args
        margins = x.astype(inside) @ w.astype(inside)
        loss = jnp.mean(jax.nn.softplus(-margins).astype(w.dtype))
        return loss + lam / 2 * jnp.sum(w**2)

    return objective


def _data(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(DRAWS, 50, n))
    labels = np.sign(x @ np.linspace(-1, 1, n) + rng.normal(size=(DRAWS, 50)))
    return jnp.asarray(labels[..., None] * x)


def _by_newton(fn, y, args, t_args):
    """A root of `fn`, and its derivative along `t_args`, in float64."""

    def step(y, b):
        return -jnp.linalg.solve(jax.jacfwd(fn)(y, args), b)

    y = jax.lax.fori_loop(0, 20, lambda _, y: y + step(y, fn(y, args)), y)
    moved = jax.jvp(lambda args: fn(y, args), (args,), (t_args,))[1]
    return y, step(y, moved)


@pytest.mark.parametrize(
    ("n", "state", "inside", "rtol"),
    [
        *((3, *case) for case in MIXED),
        *(
            pytest.param(n, *case, marks=pytest.mark.slow)
            for n in (2, 8)
            for case in MIXED
        ),
        pytest.param(40, *MIXED[1], marks=pytest.mark.slow),
    ],
)
def test_minimum_has_a_derivative_in_mixed_precision(n, state, inside, rtol):
    slope = jax.grad(_objective(jnp.float64))

    def exact(x):
        t_args = (jnp.zeros_like(x), jnp.asarray(1.0))
        return _by_newton(slope, jnp.zeros(n), (x, jnp.asarray(1.0)), t_args)

    x = _data(n)
    y, want = jax.jit(jax.vmap(exact))(x)
    condition = eqi.Minimum(_objective(inside))
    lam = jnp.asarray(1.0, state)
    for jacobian in JACOBIANS:
        derivative = jacobian(
            lambda lam, y, x: eqi.implicit_solution(condition, y, (x, lam))
        )
        lanes = jax.vmap(derivative, (None, 0, 0))
        got = jax.jit(lanes)(lam, y.astype(state), x.astype(state))
        atol = rtol * np.abs(want).max()
        np.testing.assert_allclose(got.astype(float), want, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 8])
def test_least_squares_has_a_derivative_in_half_precision(n):
    def residual(z, args):
        matrix, x = args
        return z - jnp.tanh(matrix @ z + x)

    def exact(matrix):
        args, t_args = (matrix, jnp.ones(n)), (jnp.zeros_like(matrix), jnp.ones(n))
        return _by_newton(residual, jnp.zeros(n), args, t_args)

    rng = np.random.default_rng(n)
    matrices = jnp.asarray(rng.normal(size=(DRAWS, n, n)) / (4 * n**0.5))
    y, want = jax.jit(jax.vmap(exact))(matrices)
    condition = eqi.LeastSquares(residual)
    half = jnp.bfloat16
    for jacobian in JACOBIANS:
        derivative = jacobian(
            lambda x, y, matrix: eqi.implicit_solution(condition, y, (matrix, x))
        )
        lanes = jax.vmap(derivative, (None, 0, 0))
        got = jax.jit(lanes)(jnp.ones(n, half), y.astype(half), matrices.astype(half))
        got = np.asarray(got, float).sum(2)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [DirectSymmetric(), *SPECTRAL])
@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_matrix_that_is_nearly_symmetric_is_inverted_without_its_tag(n, solver):
    """Rounding or a false tag: the inverse is right for both, and its transpose."""
    matrix = _nonsymmetric(n, size=3e-3)
    for got in _jacobians(matrix, solver, jnp.bfloat16):
        np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [3, 8])
def test_direction_that_is_all_rounding_has_no_derivative(n):
    """Divided by its curvature, which is as uncertain as the skew is large."""
    basis = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))[0]
    matrix = (basis * np.linspace(0, 2, n)) @ basis.T
    matrix = np.asarray(matrix + 1e-3 * np.triu(np.ones((n, n)), 1), np.float32)
    out = _solve(matrix, basis[:, -1].astype(np.float32), DirectSymmetric())
    assert not _succeeded(out)


def test_lanes_of_any_skew_do_not_disturb_each_other():
    n = 6
    sizes = (0.0, 1e-3, 1.0)
    matrices = np.stack([_nonsymmetric(n, size) for size in sizes])
    solve = lambda matrix: _jacobians_of_lane(matrix)
    forward, reverse = jax.jit(jax.vmap(solve))(jnp.asarray(matrices))
    for got in (forward, reverse):
        for lane in (0, 1):
            want = np.linalg.inv(matrices[lane])
            np.testing.assert_allclose(got[lane], want, rtol=0, atol=1e-10)
        assert np.isnan(got[2]).all()


def _jacobians_of_lane(matrix):
    return _jacobians(matrix, DirectSymmetric(), jnp.float16)


@pytest.mark.parametrize("n", [2, 8])
def test_where_nothing_is_coarse_a_small_skew_is_a_false_tag(n):
    for got in _jacobians(_nonsymmetric(n, size=3e-3), DirectSymmetric()):
        assert np.isnan(got).all()


# --- False tags -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DirectSymmetric(), *SPECTRAL])
@pytest.mark.parametrize("n", [2, 4, 40])
def test_false_symmetric_tag_has_no_derivative(n, solver):
    matrix = _nonsymmetric(n, size=0.3)
    assert not _succeeded(_solve(matrix, np.ones(n), solver))
    for jacobian in _jacobians(matrix, solver):
        assert np.isnan(jacobian).all()


@pytest.mark.parametrize("solver", SPECTRAL)
def test_residual_is_that_of_the_matrix(solver):
    """Not that of the mean with its transpose, which eigenvectors solve for."""
    matrix, b = _nonsymmetric(5, size=1e-2), np.ones(5)
    out = _solve(matrix, b, solver)
    assert _succeeded(out)
    np.testing.assert_allclose(matrix @ out.value, b, rtol=0, atol=1e-10)


# --- Matrices that are not finite -----------------------------------------------------


@pytest.mark.parametrize("solver", SPECTRAL)
@pytest.mark.parametrize("n", [3, 4, 17])
@pytest.mark.parametrize("tags", [(), lx.symmetric_tag])
def test_infinite_entry_fails_in_its_own_lane(n, solver, tags):
    """LAPACK's singular values of such a matrix take forever."""
    sound = np.eye(n) + 0.1 * np.ones((n, n))
    bad = [sound.copy() for _ in range(3)]
    bad[0][0, 0], bad[1][0, 0] = np.inf, np.nan
    bad[2][0, -1] = bad[2][-1, 0] = -np.inf

    def solve(matrix):
        out = _solve(matrix, np.ones(n), solver, tags)
        return out.value, out.result == lx.RESULTS.successful

    values, good = jax.jit(jax.vmap(solve))(jnp.asarray([sound, *bad]))
    assert good.tolist() == [True, False, False, False]
    np.testing.assert_allclose(sound @ values[0], np.ones(n), rtol=0, atol=1e-9)
    assert np.isnan(values[1:]).all()


# --- Small eigenvalues of indefinite matrices -----------------------------------------


def _indefinite(n, smallest, dtype):
    rng = np.random.default_rng(n)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = rng.uniform(0.5, 1, n) * rng.choice([-1, 1], n)
    values[0] = smallest
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).astype(dtype), basis


# Twice the largest eigenvalue that counts as zero, and half of it.
SMALLEST = [(8, 3e-6), (32, 6e-6), (200, 1.4e-5)]


@pytest.mark.parametrize(("n", "smallest"), [*SMALLEST, (200, 3e-4)])
@pytest.mark.parametrize("part", [1e-2, 1e-4, 1e-6])
def test_small_eigenvalue_of_an_indefinite_matrix_is_not_lost(n, smallest, part):
    matrix, basis = _indefinite(n, smallest, np.float32)
    b = (basis[:, 1:].sum(1) / n**0.5 + part * basis[:, 0]).astype(np.float32)
    want = np.linalg.solve(matrix.astype(float), b.astype(float))
    out = _solve(matrix, b, DirectSymmetric())
    assert _succeeded(out)
    # The condition number is up to 3e5, and few digits are left in float32.
    atol = 0.1 * np.abs(want).max()
    np.testing.assert_allclose(out.value, want, rtol=0, atol=atol)


@pytest.mark.parametrize(("n", "smallest"), SMALLEST)
def test_what_may_be_zero_fails_where_the_right_hand_side_is_not(n, smallest):
    matrix, basis = _indefinite(n, smallest / 4, np.float32)
    b = (basis[:, 1:].sum(1) / n**0.5 + 1e-4 * basis[:, 0]).astype(np.float32)
    assert not _succeeded(_solve(matrix, b, DirectSymmetric()))


def test_gradient_of_a_tagged_root_keeps_every_direction():
    n = 200
    matrix, basis = _indefinite(n, 3e-4, np.float32)
    matrix, weights = jnp.asarray(matrix), jnp.asarray(basis @ np.ones(n), jnp.float32)
    # So small a part is not missed in the residual.
    weights = weights - (1 - 1e-3) * jnp.asarray(basis[:, 0], jnp.float32)
    condition = eqi.Root(lambda y, a: matrix @ y - a, tags=lx.symmetric_tag)
    a = jnp.ones(n, jnp.float32)
    y = jnp.linalg.solve(matrix, a)
    gradient = jax.grad(
        lambda a: jnp.vdot(weights, eqi.implicit_solution(condition, y, a))
    )(a)
    want = np.linalg.solve(np.asarray(matrix, float), np.asarray(weights, float))
    got = np.asarray(gradient, float)
    np.testing.assert_allclose(got @ basis[:, 0], want @ basis[:, 0], rtol=1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 8, 32, 200])
def test_flat_direction_of_an_indefinite_matrix_is_found(n, dtype):
    rng = np.random.default_rng(n)
    project = (np.eye(n) - np.ones((n, n)) / n).astype(dtype)
    for _ in range(5):
        curved = rng.normal(size=(n, n)).astype(dtype)
        matrix = project @ (curved + curved.T) @ project
        matrix = (matrix + matrix.T) / 2
        want = project @ rng.normal(size=n).astype(dtype)
        out = _solve(matrix, matrix @ want, DirectSymmetric())
        assert _succeeded(out)
        atol = 1e4 * np.finfo(dtype).eps * np.abs(want).max()
        np.testing.assert_allclose(out.value, want, rtol=0, atol=atol)


# --- lineax's own derivative ----------------------------------------------------------


@pytest.mark.slow
def test_lineax_differentiates_a_wide_least_norm_solution():
    rng = np.random.default_rng(0)
    wide, t_wide = (jnp.asarray(rng.normal(size=(3, 5))) for _ in range(2))
    b = jnp.ones(3)

    def solution(solver):
        solve = lambda a, b: lx.linear_solve(lx.MatrixLinearOperator(a), b, solver)
        return lambda a, b: solve(a, b).value

    ours, theirs = solution(LeastNorm()), solution(lx.SVD())
    tangents = [jax.jvp(f, (wide, b), (t_wide, b))[1] for f in (ours, theirs)]
    np.testing.assert_allclose(*tangents, rtol=1e-10)
    for k in range(2):
        got, want = (jax.jacrev(f, k)(wide, b) for f in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    tall = lx.MatrixLinearOperator(wide.T)
    out = lx.linear_solve(tall, jnp.ones(5), LeastNorm(), throw=False)
    assert not _succeeded(out)


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("hole", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 5), (-1, -1)])
def test_matrix_that_is_not_finite_is_as_skew_as_can_be(n, hole, place):
    # No comparison with NaN holds. XLA's maximum of many entries passes over it.
    matrix = jnp.eye(n).at[place].set(hole)
    assert jnp.isnan(jax.jit(skewness)(matrix))
