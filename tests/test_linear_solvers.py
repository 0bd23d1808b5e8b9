"""Every linear solver against dense algebra: solution, transpose, result, residual."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from jax.test_util import check_grads

import eqximplicit as eqi
from eqximplicit.linear_solvers import (
    _permutation,
    AutoLinearSolver,
    Checked,
    DirectLU,
    DirectSymmetric,
    HybridKrylov,
    LeastNorm,
    Neumann,
    NormalCG,
    Nystrom,
    Tikhonov,
)
from eqximplicit.linear_solvers.checked import checked
from eqximplicit.solvers._thin_qr import ThinQR

ITERATIVE = {np.float64: 1e-8, np.float32: 2e-4}  # times the relative tolerance
DTYPES = (np.float64, np.float32)
RNG_SEED = 20


def _vector(b, dtype=np.float64):
    """A state of two leaves and two shapes; the first half is `a`."""
    k = len(b) // 2
    b = jnp.asarray(b, dtype)
    return {"a": b[:k], "b": b[k:].reshape(-1, 1)}


def _flat(x):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jtu.tree_leaves(x)])


def _operator(matrix, tags=(), dtype=np.float64):
    matrix = jnp.asarray(matrix, dtype)
    k = matrix.shape[1] // 2
    struct = jax.eval_shape(lambda: _vector(np.zeros(matrix.shape[1]), dtype))

    def mv(v):
        w = matrix @ jnp.concatenate([v["a"], v["b"].reshape(-1)])
        return {"a": w[:k], "b": w[k:].reshape(-1, 1)}

    return lx.FunctionLinearOperator(mv, struct, tags)


def _run(solver, operator, b, dtype=np.float64, options=None, transpose=False):
    """Solution, whether it is successful, and stats; jitted as a rule would."""
    options = {} if options is None else options

    @jax.jit
    def solve(b):
        state, opts = solver.init(operator, options), options
        if transpose:
            state, opts = solver.transpose(state, options)
        x, result, stats = solver.compute(state, b, opts)
        return x, result == lx.RESULTS.successful, stats

    x, ok, stats = solve(_vector(b, dtype))
    return _flat(x), bool(ok), stats


def _contraction(n, rng):
    return np.eye(n) - 0.5 * rng.normal(size=(n, n)) / np.sqrt(n)


def _general(n, rng):
    return rng.normal(size=(n, n)) + 2 * np.diag(rng.choice([-1, 1], n) * np.sqrt(n))


def _definite(n, rng):
    g = rng.normal(size=(n, n))
    return g @ g.T / n + 0.2 * np.eye(n)


def _indefinite(n, rng):
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return (q * (rng.choice([-1, 1], n) * rng.uniform(1, 5, n))) @ q.T


def _translation_invariant(n, rng):
    """Positive semidefinite, singular in the direction (1, ..., 1)."""
    project = np.eye(n) - np.ones((n, n)) / n
    return project @ _definite(n, rng) @ project


REGULAR = [
    (AutoLinearSolver(), _contraction, (), 2),
    (AutoLinearSolver(), _general, (), 3),
    (AutoLinearSolver(), _general, (), 12),
    (AutoLinearSolver(), _contraction, (), 50),
    (AutoLinearSolver(), _general, (), 50),
    (AutoLinearSolver(), _definite, lx.positive_semidefinite_tag, 3),
    (AutoLinearSolver(), _definite, lx.symmetric_tag, 12),
    (AutoLinearSolver(), _indefinite, lx.symmetric_tag, 2),
    (AutoLinearSolver(), _indefinite, lx.symmetric_tag, 12),
    (AutoLinearSolver(), _indefinite, lx.symmetric_tag, 50),
    (AutoLinearSolver(), _definite, lx.positive_semidefinite_tag, 50),
    (DirectLU(), _general, (), 20),
    (DirectSymmetric(), _definite, lx.symmetric_tag, 20),
    (HybridKrylov(), _general, (), 30),
    (HybridKrylov(restart=40), _indefinite, lx.symmetric_tag, 30),
    (HybridKrylov(fallback=DirectLU()), _general, (), 30),
    (Neumann(), _contraction, (), 30),
    (NormalCG(rtol=1e-11, atol=1e-11), _contraction, (), 12),
    (LeastNorm(), _general, (), 12),
    (LeastNorm(), _indefinite, lx.symmetric_tag, 12),
    (Checked(lx.GMRES(rtol=1e-10, atol=1e-10)), _contraction, (), 12),
]
_IDS = [f"{type(s).__name__}-{m.__name__[1:]}-{n}" for s, m, _, n in REGULAR]


def _three_solves(solver, operator):
    """Solves `A x = b`; `Aᵀ x = b` by the transposed state; and by that of `Aᵀ`."""

    @jax.jit
    def solve(b):
        state = solver.init(operator, {})
        other, options = solver.transpose(state, {})
        anew = solver.init(operator.transpose(), {})
        answers = [
            solver.compute(state, b, {}),
            solver.compute(other, b, options),
            solver.compute(anew, b, {}),
        ]
        return [(x, r == lx.RESULTS.successful, stats) for x, r, stats in answers]

    return lambda b: [(_flat(x), bool(ok), st) for x, ok, st in solve(_vector(b))]


@pytest.mark.parametrize(("solver", "make", "tags", "n"), REGULAR, ids=_IDS)
def test_system_and_transpose_match_dense_solve_and_zero_gives_zero(
    solver, make, tags, n
):
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = make(n, rng), rng.normal(size=n)
    solve = _three_solves(solver, _operator(matrix, tags))
    for (x, ok, stats), dense in zip(
        solve(b), (matrix, matrix.T, matrix.T), strict=True
    ):
        assert ok
        assert np.max(np.abs(x - np.linalg.solve(dense, b))) < ITERATIVE[np.float64]
        measured = np.linalg.norm(b - dense @ x)
        assert float(stats["residual_norm"]) == pytest.approx(measured, abs=1e-10)
    for x, ok, stats in solve(0 * b):
        assert ok
        assert np.all(x == 0)
        assert float(stats["residual_norm"]) == 0
    for _, ok, _ in solve(np.nan * b):
        assert not ok


APPROXIMATE = [
    (Neumann(3), _contraction, ()),
    (Neumann(1), _contraction, ()),
    (NormalCG(max_steps=4), _contraction, ()),
    (Nystrom(3, rho=0.1), _definite, lx.positive_semidefinite_tag),
    (Tikhonov(0.1), _general, ()),
]


@pytest.mark.parametrize(("solver", "make", "tags"), APPROXIMATE)
def test_inexact_by_design_is_successful_with_its_residual(solver, make, tags):
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = make(6, rng), rng.normal(size=6)
    solve = _three_solves(solver, _operator(matrix, tags))
    for (x, ok, stats), dense in zip(
        solve(b), (matrix, matrix.T, matrix.T), strict=True
    ):
        assert ok
        residual = np.linalg.norm(b - dense @ x)
        assert residual > 1e-3  # it really is inexact
        assert float(stats["residual_norm"]) == pytest.approx(residual, rel=1e-9)
    assert np.max(np.abs(solve(b)[1][0] - solve(b)[2][0])) < 1e-12
    for x, ok, _ in solve(0 * b):
        assert ok
        assert np.all(x == 0)
    for _, ok, _ in solve(np.nan * b):
        assert not ok


@pytest.mark.parametrize(
    ("solver", "make", "tags", "n"), REGULAR[2:11:2], ids=_IDS[2:11:2]
)
def test_float32(solver, make, tags, n):
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = make(n, rng), rng.normal(size=n)
    x, ok, _ = _run(solver, _operator(matrix, tags, np.float32), b, np.float32)
    expected = np.linalg.solve(matrix.astype(np.float32).astype(float), b)
    assert ok
    assert x.dtype == np.float32
    assert np.max(np.abs(x - expected)) < ITERATIVE[np.float32] * np.max(
        np.abs(expected)
    )


@pytest.mark.parametrize("n", [2, 12, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_direction_of_a_minimum_gives_the_minimum_norm_solution(n, dtype):
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _translation_invariant(n, rng), rng.normal(size=n)
    b -= b.mean()
    operator = _operator(matrix, lx.symmetric_tag, dtype)
    x, ok, _ = _run(AutoLinearSolver(), operator, b, dtype)
    expected = np.linalg.pinv(matrix, rcond=1e-6) @ b
    assert ok
    assert np.max(np.abs(x - expected)) < ITERATIVE[dtype] * np.max(np.abs(expected))


SOFT = [(np.float64, 1e8, 1e-12, part) for part in (1e-3, 1.0, None)]
SOFT += [(np.float64, 1.0, 2e-11, 1e-7), (np.float32, 1.0, 3e-5, 2e-3)]


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(("dtype", "stiff", "soft", "part"), SOFT)
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_soft_direction_that_is_cut_is_no_null_space(n, dtype, stiff, soft, part, size):
    """A right-hand side with a `part` in it, or there alone, whatever its size."""
    basis = np.linalg.qr(np.random.default_rng(RNG_SEED).normal(size=(n, n)))[0]
    matrix = stiff * basis @ np.diag([*np.ones(n - 1), soft]) @ basis.T
    operator = _operator((matrix + matrix.T) / 2, lx.symmetric_tag, dtype)
    b = basis[:, -1] if part is None else basis[:, 0] + part * basis[:, -1]
    x, ok, _ = _run(AutoLinearSolver(), operator, size * b, dtype)
    given = np.asarray(operator.as_matrix(), float), (size * b).astype(dtype)
    expected = np.linalg.solve(*given)
    # Cholesky may have kept it, to half of the digits that are left of it.
    close = np.linalg.norm(x - expected) < 0.05 * np.linalg.norm(expected)
    assert not ok or close
    # Without a part in it, or if asked for, the rest is answered.
    x, ok, _ = _run(AutoLinearSolver(), operator, size * basis[:, 0], dtype)
    assert ok
    expected = size / stiff * basis[:, 0]
    assert np.linalg.norm(x - expected) < 0.05 * np.linalg.norm(expected)
    _, ok, _ = _run(DirectSymmetric(rcond=0.1), operator, size * basis[:, 0], dtype)
    assert ok


@pytest.mark.parametrize("n", [3, 12, 50])
def test_inconsistent_flat_direction_fails_unless_projected(n):
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _translation_invariant(n, rng), rng.normal(size=n)
    operator = _operator(matrix, lx.symmetric_tag)
    _, ok, _ = _run(AutoLinearSolver(), operator, b)
    assert not ok
    x, ok, _ = _run(AutoLinearSolver(), operator, b, options={"project": True})
    assert ok
    assert np.max(np.abs(x - np.linalg.pinv(matrix, rcond=1e-9) @ b)) < 1e-10


@pytest.mark.parametrize("n", [3, 12, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_deficient_matrix_fails_even_if_consistent(n, dtype):
    rng = np.random.default_rng(RNG_SEED)
    matrix = 10 * rng.normal(size=(n, n - 1)) @ rng.normal(size=(n - 1, n))
    b = matrix @ rng.normal(size=n)
    operator = _operator(matrix, (), dtype)
    _, ok, _ = _run(AutoLinearSolver(), operator, b, dtype)
    assert not ok


# Matrices near one of rank one, of which the determinant cancels twice.
NEAR_ONES = [
    (np.float64, 1e-6, 1e-8),
    (np.float64, 1e-9, 1e-5),
    (np.float32, 5e-3, 1e-4),
    (np.float32, 3e-4, 2e-3),
]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "apart", "error"), NEAR_ONES)
def test_matrix_near_rank_one_is_solved(n, dtype, apart, error):
    matrix = np.ones((n, n)) + apart * np.diag([1.0, -2.0, 3.0, 1.5][:n])
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix, dtype))
    matrix = np.asarray(operator.matrix, float)
    b = jnp.asarray([1.0, -2.0, 0.5, 0.25][:n], dtype)
    for system, dense in ((operator, matrix), (operator.T, matrix.T)):
        out = lx.linear_solve(system, b, AutoLinearSolver(), throw=False)
        assert bool(out.result == lx.RESULTS.successful)
        expected = np.linalg.solve(dense, np.asarray(b, float))
        assert np.linalg.norm(
            np.asarray(out.value) - expected
        ) < error * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_of_rank_one_fails_even_if_consistent(dtype):
    rng = np.random.default_rng(RNG_SEED)
    for _ in range(5):
        column, row = rng.normal(size=(2, 3))
        operator = lx.MatrixLinearOperator(jnp.asarray(np.outer(column, row), dtype))
        b = jnp.asarray(column, dtype)
        out = lx.linear_solve(operator, b, AutoLinearSolver(), throw=False)
        assert not bool(out.result == lx.RESULTS.successful)


@pytest.mark.parametrize(
    ("dtype", "condition", "error"), [(np.float64, 1e10, 1e-5), (np.float32, 2e4, 1e-2)]
)
def test_regular_matrix_needs_no_consistent_right_hand_side(dtype, condition, error):
    """Indefinite ones, such as those of saddle points, however ill-conditioned."""
    rng = np.random.default_rng(RNG_SEED)
    basis = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    values = np.geomspace(1, 1 / condition, 10) * (-1.0) ** np.arange(10)
    matrix = jnp.asarray(basis @ np.diag(values) @ basis.T, dtype)
    matrix, b = (matrix + matrix.T) / 2, jnp.asarray(rng.normal(size=10), dtype)
    expected = np.linalg.solve(np.asarray(matrix, float), np.asarray(b, float))
    symmetric = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
    solves = (
        (symmetric, AutoLinearSolver()),
        (symmetric, LeastNorm()),
        (lx.MatrixLinearOperator(matrix), LeastNorm()),
    )
    for operator, solver in solves:
        out = lx.linear_solve(operator, b, solver, throw=False)
        assert bool(out.result == lx.RESULTS.successful)
        assert np.linalg.norm(
            np.asarray(out.value) - expected
        ) < error * np.linalg.norm(expected)


def test_badly_scaled_regular_matrix_is_not_called_singular():
    rng = np.random.default_rng(RNG_SEED)
    for n in (2, 3, 12):
        rows, cols = 10.0 ** rng.uniform(-9, 9, n), 10.0 ** rng.uniform(-9, 9, n)
        core, expected = _general(n, rng), rng.normal(size=n)
        matrix = rows[:, None] * core * cols[None, :]
        x, ok, _ = _run(
            AutoLinearSolver(), _operator(matrix), matrix @ (expected / cols)
        )
        assert ok
        assert np.max(np.abs(x * cols - expected)) < 1e-10


STRUCTURED = [
    (np.diag, (6,), lx.diagonal_tag, "Diagonal"),
    (lambda m: np.triu(np.tril(m, 1), -1), (6, 6), lx.tridiagonal_tag, "Tridiagonal"),
    (np.tril, (6, 6), lx.lower_triangular_tag, "Triangular"),
    (np.triu, (6, 6), lx.upper_triangular_tag, "Triangular"),
]


@pytest.mark.parametrize(("keep", "shape", "tag", "name"), STRUCTURED)
def test_structured_operator_goes_to_lineax_and_is_solved(keep, shape, tag, name):
    rng = np.random.default_rng(RNG_SEED)
    matrix = keep(rng.normal(size=shape)) + 4 * np.eye(6)
    operator, b = _operator(matrix, tag), rng.normal(size=6)
    chosen = AutoLinearSolver().select(operator)
    assert type(chosen.solver.solver).__name__ == name
    assert f"tagged {name.lower()}" in chosen.reason
    for transpose in (False, True):
        x, ok, _ = _run(AutoLinearSolver(), operator, b, transpose=transpose)
        dense = matrix.T if transpose else matrix
        assert ok
        assert np.max(np.abs(x - np.linalg.solve(dense, b))) < 1e-11


def test_singular_tridiagonal_matrix_fails_even_if_consistent():
    n = 30  # the Laplacian of a path: constants are in its null space
    off = np.ones(n - 1)
    matrix = np.diag(np.r_[1.1, 2.2 * off[1:], 1.1])
    matrix -= 1.1 * (np.diag(off, 1) + np.diag(off, -1))
    b = matrix @ np.random.default_rng(RNG_SEED).normal(size=n)
    _, ok, _ = _run(AutoLinearSolver(), _operator(matrix, lx.tridiagonal_tag), b)
    assert not ok


def test_false_tag_fails_by_the_measured_residual():
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _general(6, rng), rng.normal(size=6)
    for tag in (lx.diagonal_tag, lx.tridiagonal_tag, lx.lower_triangular_tag):
        _, ok, _ = _run(AutoLinearSolver(), _operator(matrix, tag), b)
        assert not ok


def test_stagnation_of_a_matrix_free_solve_is_a_failure():
    n = 60  # a cyclic shift: GMRES makes no progress before step n
    shift, b = np.roll(np.eye(n), 1, axis=0), np.eye(n)[0]
    _, ok, stats = _run(HybridKrylov(restart=10), _operator(shift), b)
    assert not ok
    assert int(stats["num_steps"]) < 40
    x, ok, _ = _run(HybridKrylov(restart=60), _operator(shift), b)
    assert ok
    assert np.allclose(x, shift.T @ b)


def test_krylov_does_not_break_down_where_the_curvature_vanishes():
    matrix = np.kron(np.eye(10), [[0.0, 2.0], [-3.0, 0.0]])  # rᵀ A r is near zero
    b = np.tile([1.0, 0.0], 10)
    x, ok, _ = _run(HybridKrylov(), _operator(matrix), b)
    assert ok
    assert np.max(np.abs(x - np.linalg.solve(matrix, b))) < 1e-9


def _deq_operator(dtype):
    """The adjoint of one DEQ state of 32 x 64 entries, batch first."""
    rng = np.random.default_rng(RNG_SEED)
    w = jnp.asarray(0.4 * rng.normal(size=(64, 64)) / 8, dtype)
    z = jnp.asarray(np.tanh(rng.normal(size=(32, 64))), dtype)
    struct = jax.ShapeDtypeStruct((32, 64), dtype)
    operator = lx.FunctionLinearOperator(lambda v: v - (1 - z**2) * (v @ w), struct)
    return operator, jnp.asarray(rng.normal(size=(32, 64)), dtype)


def test_float32_deq_adjoint_takes_few_products():
    operator, b = _deq_operator(jnp.float32)
    solver = AutoLinearSolver(rtol=1e-5, fallback_size=0)
    x, result, stats = solver.compute(solver.init(operator, {}), b, {})
    assert result == lx.RESULTS.successful
    assert int(stats["num_steps"]) <= 14
    assert float(jnp.linalg.norm(b - operator.mv(x))) < 1e-5 * float(jnp.linalg.norm(b))


def test_one_factorisation_for_all_columns():
    rng = np.random.default_rng(RNG_SEED)
    matrix = _contraction(80, rng)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    solver = AutoLinearSolver()

    def inverse(columns):
        state = solver.init(operator, {})
        return jax.vmap(lambda b: solver.compute(state, b, {})[0])(columns)

    compiled = jax.jit(inverse).lower(jnp.eye(80)).as_text()
    assert compiled.count("lapack_dgetrf") == 1
    assert np.max(np.abs(inverse(jnp.eye(80)).T - np.linalg.inv(matrix))) < 1e-12


def test_lanes_are_independent_under_vmap_of_operators():
    rng = np.random.default_rng(RNG_SEED)
    for n, make in ((2, _general), (12, _general), (40, _contraction)):
        matrices = np.stack([make(n, rng) for _ in range(4)])
        matrices[1] = np.ones((n, n))  # singular
        b = rng.normal(size=(4, n))

        @jax.jit
        @jax.vmap
        def solve(matrix, b):
            solver = AutoLinearSolver()
            operator = lx.MatrixLinearOperator(matrix)
            x, result, _ = solver.compute(solver.init(operator, {}), b, {})
            return x, result == lx.RESULTS.successful

        x, ok = solve(jnp.asarray(matrices), jnp.asarray(b))
        assert ok.tolist() == [True, False, True, True]
        for i in (0, 2, 3):
            assert np.max(np.abs(x[i] - np.linalg.solve(matrices[i], b[i]))) < 1e-8


def test_lanes_are_independent_under_vmap_of_hessians():
    rng = np.random.default_rng(RNG_SEED)
    makers = (_definite, _translation_invariant, _indefinite)
    matrices = np.stack([make(8, rng) for make in makers])
    b = rng.normal(size=(3, 8))
    b[1] -= b[1].mean()

    @jax.jit
    @jax.vmap
    def solve(matrix, b):
        solver = AutoLinearSolver()
        operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
        x, result, _ = solver.compute(solver.init(operator, {}), b, {})
        return x, result == lx.RESULTS.successful

    x, ok = solve(jnp.asarray(matrices), jnp.asarray(b))
    assert ok.all()
    for i in range(3):
        expected = np.linalg.pinv(matrices[i], rcond=1e-9) @ b[i]
        assert np.max(np.abs(x[i] - expected)) < 1e-11


@pytest.mark.parametrize("n", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_second_derivatives_inside_a_custom_linear_solve(n):
    rng = np.random.default_rng(RNG_SEED)
    matrix = jnp.asarray(_contraction(n, rng))
    b, solver = jnp.asarray(rng.normal(size=n)), AutoLinearSolver(rtol=1e-13)

    def solution(t):
        operator = lx.MatrixLinearOperator(matrix * jnp.cos(t))
        frozen = lx.MatrixLinearOperator(jax.lax.stop_gradient(operator.matrix))
        state = solver.init(frozen, {})
        return jax.lax.custom_linear_solve(
            operator.mv,
            b * t,
            lambda _, b: solver.compute(state, b, {})[0],
            lambda _, b: solver.compute(solver.transpose(state, {})[0], b, {})[0],
        )

    check_grads(jax.jit(solution), (0.3,), order=2, modes=("fwd", "rev"))


def test_works_and_is_differentiable_in_lineax_linear_solve():
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = jnp.asarray(_contraction(5, rng)), jnp.asarray(rng.normal(size=5))

    def solution(matrix):
        return lx.linear_solve(
            lx.MatrixLinearOperator(matrix), b, AutoLinearSolver()
        ).value

    x = solution(matrix)
    grad = jax.grad(lambda m: jnp.sum(solution(m)))(matrix)
    expected = -jnp.outer(jnp.linalg.solve(matrix.T, jnp.ones(5)), x)
    assert jnp.max(jnp.abs(grad - expected)) < 1e-12


# Approximations against their formulas.


def test_neumann_terms_match_the_series():
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _contraction(6, rng), rng.normal(size=6)
    operator = _operator(matrix)
    x, _, _ = _run(Neumann(1), operator, b)
    assert np.all(x == b)  # Jacobian-free backpropagation
    for solver, step in ((Neumann(4), 1.0), (Neumann(4, damping=0.5), 0.5)):
        power = np.eye(6) - step * matrix
        series = sum(step * np.linalg.matrix_power(power, k) @ b for k in range(4))
        x, _, _ = _run(solver, operator, b)
        assert np.max(np.abs(x - series)) < 1e-13
    x, _, _ = _run(Neumann(4, alpha=-1.0), _operator(-matrix), b)
    y, _, _ = _run(Neumann(4), operator, -b)
    assert np.max(np.abs(x - y)) < 1e-13


def test_divergent_series_is_a_failure():
    operator = _operator(5 * np.eye(4))
    _, ok, _ = _run(Neumann(), operator, np.ones(4))
    assert not ok
    _, ok, _ = _run(Neumann(max_steps=3), _operator(0.5 * np.eye(4)), np.ones(4))
    assert not ok  # out of steps


def test_nystrom_matches_its_formula_and_is_exact_at_full_rank():
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _definite(8, rng), rng.normal(size=8)
    operator = _operator(matrix, lx.positive_semidefinite_tag)
    solver = Nystrom(3, rho=0.1)
    chosen = np.asarray(
        jax.random.choice(jax.random.PRNGKey(0), 8, (3,), replace=False)
    )
    c, w = matrix[:, chosen], matrix[np.ix_(chosen, chosen)]
    low_rank = c @ np.linalg.solve(w, c.T) + 0.1 * np.eye(8)
    x, _, _ = _run(solver, operator, b)
    assert np.max(np.abs(x - np.linalg.solve(low_rank, b))) < 1e-11
    x, _, _ = _run(Nystrom(8, rho=0.1), operator, b)
    assert np.max(np.abs(x - np.linalg.solve(matrix + 0.1 * np.eye(8), b))) < 1e-11
    negative = _operator(-matrix, lx.negative_semidefinite_tag)
    y, _, _ = _run(Nystrom(8, rho=0.1), negative, b)
    assert np.max(np.abs(x + y)) < 1e-11


def test_nystrom_of_an_operator_of_lower_rank():
    rng = np.random.default_rng(RNG_SEED)
    g = rng.normal(size=(8, 2))
    operator = _operator(g @ g.T, lx.positive_semidefinite_tag)
    b = rng.normal(size=8)
    x, ok, _ = _run(Nystrom(5, rho=0.1), operator, b)
    assert ok
    assert np.max(np.abs(x - np.linalg.solve(g @ g.T + 0.1 * np.eye(8), b))) < 1e-9


def test_tikhonov_matches_the_normal_equations():
    rng = np.random.default_rng(RNG_SEED)
    matrix, b = _general(6, rng), rng.normal(size=6)
    for transpose in (False, True):
        a = matrix.T if transpose else matrix
        x, _, _ = _run(Tikhonov(0.3), _operator(matrix), b, transpose=transpose)
        expected = np.linalg.solve(a.T @ a + 0.09 * np.eye(6), a.T @ b)
        assert np.max(np.abs(x - expected)) < 1e-12


def test_least_norm_of_singular_and_rectangular_systems():
    rng = np.random.default_rng(RNG_SEED)
    for shape in ((6, 6), (4, 7), (7, 4)):
        matrix = rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))
        operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
        for consistent in (True, False):
            b = matrix @ rng.normal(size=shape[1])
            b = b if consistent else b + rng.normal(size=shape[0])
            for solver in (LeastNorm(), LeastNorm(least_squares=True)):
                state = solver.init(operator, {})
                x, result, stats = solver.compute(state, jnp.asarray(b), {})
                asked = consistent or solver.least_squares
                assert bool(result == lx.RESULTS.successful) == asked
                assert int(stats["rank"]) == 3
                assert (
                    np.max(np.abs(x - np.linalg.pinv(matrix, rcond=1e-9) @ b)) < 1e-11
                )


def test_imaml_gradient_by_five_normal_cg_steps_and_a_hundred_neumann_terms():
    """The meta-gradient that TorchOpt prints for its iMAML example."""
    path = Path(__file__).parent / "data" / "imaml_reference.json"
    case = json.loads(path.read_text())
    hessian, ct = np.array(case["hessian"]), np.array(case["outer_gradient"])
    for solver in (NormalCG(max_steps=5), Neumann(101, alpha=0.1)):
        x, ok, _ = _run(solver, _operator(hessian, lx.symmetric_tag), ct)
        assert ok
        assert np.max(np.abs(x - np.array(case["printed"]))) < 5e-5
    x, _, _ = _run(Neumann(101, alpha=0.1), _operator(hessian), ct)
    assert np.max(np.abs(x - np.array(case["neumann_float64"]))) < 1e-10


# Options.


def test_preconditioner_and_warm_starts_survive_transposition():
    rng = np.random.default_rng(RNG_SEED)
    n = 40
    scales = 10.0 ** rng.uniform(-1, 1, n)
    matrix, b = scales[:, None] * _contraction(n, rng), rng.normal(size=n)
    operator = _operator(matrix)
    approximate_inverse = _operator(np.diag(1 / scales))
    options = {
        "preconditioner": approximate_inverse,
        "y0": _vector(np.linalg.solve(matrix, b)),
        "y0_transpose": _vector(np.linalg.solve(matrix.T, b)),
    }
    for solver in (Neumann(), HybridKrylov()):
        for transpose in (False, True):
            dense = matrix.T if transpose else matrix
            only = {"preconditioner": approximate_inverse}
            x, ok, cold = _run(solver, operator, b, options=only, transpose=transpose)
            assert ok
            assert np.max(np.abs(x - np.linalg.solve(dense, b))) < 1e-7
            x, ok, warm = _run(
                solver, operator, b, options=options, transpose=transpose
            )
            assert ok
            assert np.max(np.abs(x - np.linalg.solve(dense, b))) < 1e-7
            assert int(warm["num_steps"]) <= 1 < int(cold["num_steps"])


def test_option_that_does_not_fit_is_refused():
    operator, b = _operator(_contraction(40, np.random.default_rng(0))), np.ones(40)
    with pytest.raises(ValueError, match="option `y0` does not fit"):
        _run(AutoLinearSolver(), operator, b, options={"y0": jnp.ones(3)})


# Refusals at trace time.


def _large(tags):
    struct = jax.ShapeDtypeStruct((200_000,), jnp.float64)
    return lx.FunctionLinearOperator(lambda v: v, struct, tags)


def test_matrix_too_large_is_refused_with_its_bytes():
    needed = 200_000**2 * 8
    with pytest.raises(ValueError, match=f"{needed} bytes"):
        AutoLinearSolver().init(_large(lx.lower_triangular_tag), {})
    for solver in (DirectLU(), LeastNorm(), Tikhonov()):
        with pytest.raises(ValueError, match="max_bytes"):
            solver.init(_large(()), {})


def test_select_explains_itself():
    solver = AutoLinearSolver()
    assert "matrix-free" in solver.select(_large(())).reason
    assert "conjugate gradients" in solver.select(_large(lx.symmetric_tag)).reason
    assert "LU" in solver.select(_operator(np.eye(8))).reason
    assert "closed form" in solver.select(_operator(np.eye(2))).reason
    assert "Cholesky" in solver.select(_operator(np.eye(8), lx.symmetric_tag)).reason


def test_square_solvers_refuse_rectangular_and_complex_systems():
    tall = lx.MatrixLinearOperator(jnp.ones((3, 2)))
    turning = lx.MatrixLinearOperator(jnp.eye(2, dtype=jnp.complex128))
    for solver in (AutoLinearSolver(), HybridKrylov(), Neumann(), DirectLU()):
        with pytest.raises(ValueError, match="needs a square system"):
            solver.init(tall, {})
        with pytest.raises(ValueError, match="one real floating dtype"):
            solver.init(turning, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neumann(0), "num_terms=0.* at least 1"),
        (lambda: Neumann(rtol=-1.0), "`Neumann.rtol=.* at least 0"),
        (lambda: HybridKrylov(rtol=-1.0), "at least 0"),
        (lambda: HybridKrylov(atol=float("nan")), "finite"),
        (lambda: HybridKrylov(restart=-1), "restart=-1"),
        (lambda: AutoLinearSolver(rtol=-1.0), "at least 0"),
        (lambda: NormalCG(), "Nothing stops"),
        (lambda: NormalCG(max_steps=0), "max_steps=0.* at least 1"),
        (lambda: NormalCG(rtol=-1e-3), "at least 0"),
        (lambda: Nystrom(0), "at least 1"),
        (lambda: Nystrom(2, rho=0.0), "must be positive"),
        (lambda: Tikhonov(0.0), "must be positive"),
        (
            lambda: Nystrom(9).init(_operator(np.eye(8), lx.symmetric_tag), {}),
            "exceeds the number of unknowns, 8",
        ),
        (lambda: Nystrom(2).init(_operator(np.eye(8)), {}), "symmetric operator"),
        (lambda: DirectSymmetric().init(_operator(np.eye(8)), {}), "symmetric tag"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unreachable_tolerance_is_a_failure_not_an_answer():
    rng = np.random.default_rng(RNG_SEED)
    q, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    matrix = (q * np.logspace(0, -5, 40)) @ q.T
    operator = _operator(matrix, lx.positive_semidefinite_tag, np.float32)
    b = np.ones(40)
    with pytest.warns(UserWarning, match="asks for more than the floating-point"):
        _, ok, stats = _run(HybridKrylov(rtol=1e-9), operator, b, np.float32)
    assert not ok
    assert np.isfinite(float(stats["residual_norm"]))


def test_solvers_are_pytrees_without_arrays():
    for solver in (AutoLinearSolver(), Neumann(3), HybridKrylov()):
        assert not any(eqx.is_array(leaf) for leaf in jtu.tree_leaves(solver))


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(np.float32, 1e4), (np.float64, 1e8)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_lu_does_not_mind_the_scale_of_a_row(n, dtype, ratio):
    rng = np.random.default_rng(n)
    rows = np.geomspace(ratio, 1 / ratio, n)
    matrix, x = rng.normal(size=(n, n)) + 3 * np.eye(n), rng.normal(size=n)
    scaled = (rows[:, None] * matrix).astype(dtype)
    operator = lx.MatrixLinearOperator(jnp.asarray(scaled))
    solver = DirectLU()
    state = solver.init(operator, {})
    found, result, _ = solver.compute(state, jnp.asarray(scaled @ x.astype(dtype)), {})
    assert bool(result == lx.RESULTS.successful)
    exact = np.linalg.solve(scaled.astype(float), scaled @ x.astype(dtype))
    np.testing.assert_allclose(found, exact, rtol=1e3 * np.finfo(dtype).eps)


def _growing(n):
    """Wilkinson's matrix, on which partial pivoting loses `n` bits."""
    matrix = np.eye(n) - np.tril(np.ones((n, n)), -1)
    matrix[:, -1] = 1
    return matrix


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize(("n", "accurate"), [(12, True), (80, False)])
def test_lu_knows_when_its_factors_are_not_accurate(n, accurate, columns):
    solver, matrix = DirectLU(), _growing(n)
    x = np.random.default_rng(n).normal(size=(columns, n))
    b = jnp.asarray(x @ matrix.T)
    state = solver.init(lx.MatrixLinearOperator(jnp.asarray(matrix)), {})
    solve = lambda b: solver.compute(state, b, {})[:2]
    found, result = jax.vmap(solve)(b) if columns > 1 else solve(b[0])
    assert np.all(np.asarray(result == lx.RESULTS.successful) == accurate)
    assert np.allclose(found, x if columns > 1 else x[0], rtol=1e-6) == accurate


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0], ids=str)
def test_one_bad_column_of_lu_harms_no_other(bad):
    solver, matrix = DirectLU(), np.random.default_rng(0).normal(size=(5, 5))
    b = np.eye(5)
    b[2] = bad
    state = solver.init(lx.MatrixLinearOperator(jnp.asarray(matrix)), {})
    found, result, _ = jax.vmap(lambda b: solver.compute(state, b, {}))(b)
    rest = [0, 1, 3, 4]
    np.testing.assert_allclose(found[np.array(rest)], np.linalg.inv(matrix).T[rest])
    good = np.asarray(result == lx.RESULTS.successful)
    assert good.tolist() == [True, True, bad == 0, True, True]


@pytest.mark.parametrize("n", [2, 5])
def test_lu_calls_a_matrix_singular_whatever_is_asked(n):
    solver, matrix = DirectLU(), jnp.ones((n, n))
    state = solver.init(lx.MatrixLinearOperator(matrix), {})
    for b in (jnp.zeros(n), jnp.ones(n), jnp.arange(1.0, n + 1)):
        _, result, _ = solver.compute(state, b, {})
        assert bool(result == lx.RESULTS.singular)
    _, result, _ = solver.compute(state, jnp.full(n, jnp.nan), {})
    assert bool(result == lx.RESULTS.nonfinite_input)


def test_lineax_lu_and_qr_are_done_by_ours_and_only_they():
    full, diagonal = _operator(np.ones((5, 5))), _operator(np.eye(5), lx.diagonal_tag)
    automatic = lx.AutoLinearSolver(well_posed=None)
    for solver in (lx.LU(), lx.QR(), automatic):
        assert isinstance(checked(solver, full), DirectLU)
    for solver, operator in ((lx.BiCGStab(1e-6, 1e-6), full), (automatic, diagonal)):
        kept = checked(solver, operator)
        assert isinstance(kept, Checked)
        assert kept.solver is solver


def test_lineax_lu_in_a_rule_knows_a_double_root():
    # Each entry is found as a double root: nothing follows from ∂F/∂y = ∂F/∂a = 0.
    a = jnp.arange(1.0, 6.0)
    root = eqi.Root(lambda y, a: (y - a) ** 2)
    for solver in (lx.LU(), lx.AutoLinearSolver(well_posed=None)):
        y = lambda a, s=solver: eqi.implicit_solution(root, a, a, linear_solver=s)
        assert bool(jnp.all(jnp.isnan(jax.jvp(y, (a,), (jnp.ones(5),))[1])))


@pytest.mark.parametrize("inverse", [False, True])
def test_exchanges_are_followed_as_they_are_carried_out(inverse):
    matrix = np.random.default_rng(3).normal(size=(7, 7))
    _, pivots, rows = jax.lax.linalg.lu(jnp.asarray(matrix))
    wanted = np.argsort(rows) if inverse else np.asarray(rows)
    for find in (_permutation.by_following, _permutation.by_exchanging):
        assert find(pivots, inverse=inverse).tolist() == wanted.tolist()


def on_a_ring(num_nodes, linear_solver):
    """Potentials `y` of `L y = f` on a ring, which has them where `f` sums to zero."""
    eye = np.eye(num_nodes)
    matrix = 2 * eye - np.roll(eye, 1, axis=0) - np.roll(eye, -1, axis=0)
    inverse, matrix = jnp.asarray(np.linalg.pinv(matrix)), jnp.asarray(matrix)

    def potentials(f):
        y = inverse @ f
        root = eqi.Root(lambda y, f: matrix @ y - f)
        return eqi.implicit_solution(root, y, f, linear_solver=linear_solver)

    return potentials, np.asarray(inverse)


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [2, 5])
def test_least_norm_in_reverse_asks_whether_parameters_leave_a_solution(num_nodes):
    ct = np.random.default_rng(RNG_SEED).normal(size=num_nodes)
    ct -= ct.mean()
    flow = jnp.arange(1.0, num_nodes + 1)
    centred = lambda f: f - jnp.mean(f)

    def slopes(linear_solver):
        potentials, inverse = on_a_ring(num_nodes, linear_solver)
        loss = lambda f: ct @ potentials(f)
        outside = jax.grad(lambda f: loss(centred(f)))(flow)
        forward = jax.jacfwd(lambda f: loss(centred(f)))(flow)
        bare = jax.grad(loss)(centred(flow))
        return outside, forward, bare, inverse @ ct

    # What `f` is computed from, reverse mode does not see.
    outside, forward, bare, exact = slopes(LeastNorm())
    assert np.all(np.isnan(outside))
    assert np.all(np.isnan(bare))
    np.testing.assert_allclose(forward, exact, atol=1e-10)
    outside, forward, bare, exact = slopes(LeastNorm(least_squares=True))
    for slope in (outside, forward, bare):
        np.testing.assert_allclose(slope, exact, atol=1e-10)
    # Here the condition sees that there is a solution whatever the parameters are.
    root = eqi.Root(lambda y, f: y - jnp.mean(y) - (f - jnp.mean(f)))
    centre = lambda f: eqi.implicit_solution(
        root, centred(f), f, linear_solver=LeastNorm()
    )
    slope = jax.vmap(jax.grad(lambda f: ct @ centre(f)))(jnp.stack([flow, -flow]))
    np.testing.assert_allclose(slope, np.stack([ct, ct]), atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 32, 33])
def test_elimination_does_not_depend_on_the_scale_of_rows_and_columns(n, dtype):
    draw = np.random.default_rng(n)
    plain = draw.normal(size=(n, n))
    singular = plain.copy()
    singular[-1] = draw.normal(size=n - 1) @ plain[:-1]
    rows, columns = 2.0 ** draw.integers(-20, 20, size=(2, n))
    for matrix, regular in ((plain, True), (singular, False)):
        scaled = rows[:, None] * matrix * columns
        operator, wanted = _operator(scaled, (), dtype), draw.normal(size=n) / columns
        for transposed in (False, True):
            system = operator.T if transposed else operator
            dense = np.asarray(system.as_matrix(), float)
            x = draw.normal(size=n) / rows if transposed else wanted
            found, ok, _ = _run(DirectLU(), system, dense @ x, dtype)
            assert bool(ok) == regular
            scale = rows if transposed else columns
            error = np.abs(found - x) * scale
            assert not ok or np.max(error) < 1e5 * np.finfo(dtype).eps


def sparse_draws(n, count):
    """Regular matrices, of which most entries are zero."""
    draw, found = np.random.default_rng(n), []
    while len(found) < count:
        entries = draw.choice([-1.0, 1.0, 2.0, 0.3], size=(n, n))
        matrix = np.where(draw.random((n, n)) < 2.0 / n, entries, 0.0)
        matrix += np.diag(draw.choice([0.0, 0.7], size=n))
        if np.linalg.cond(matrix) < 1e3:
            found.append(matrix)
    return np.stack(found)


SOLVED_BY = [DirectLU(), AutoLinearSolver(), eqi.SparseDirect(), LeastNorm()]


@pytest.mark.parametrize("solver", SOLVED_BY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (33, np.float64),
        (9, np.float32),
        *(
            pytest.param(n, dtype, marks=pytest.mark.slow)
            for n, dtype in (
                (4, np.float64),
                (9, np.float64),
                (4, np.float32),
                (33, np.float32),
            )
        ),
    ],
)
def test_solution_with_entries_that_are_zero_but_for_rounding(n, dtype, solver):
    # Elimination of these fills in what cancels: the zeros become 1e-17.
    matrices = sparse_draws(n, 20)

    def solve(matrix):
        if isinstance(solver, eqi.SparseDirect):  # its pattern is that of the function
            operator = lx.FunctionLinearOperator(
                lambda v: matrix @ v, jax.eval_shape(lambda: matrix[0])
            )
        else:
            operator = lx.MatrixLinearOperator(matrix)

        def answers(operator):
            state = solver.init(operator, {})
            found = [
                solver.compute(state, e, {})[:2] for e in jnp.eye(n, dtype=dtype)[:4]
            ]
            return jnp.stack([jnp.where(is_ok(r), x, jnp.nan) for x, r in found])

        return answers(operator), answers(operator.T)

    is_ok = lambda result: result == lx.RESULTS.successful
    for found, exact in zip(
        jax.jit(jax.vmap(solve))(jnp.asarray(matrices, dtype)),
        (np.linalg.inv(matrices), np.linalg.inv(matrices.transpose(0, 2, 1))),
        strict=True,
    ):
        wanted = exact.transpose(0, 2, 1)[:, :4]
        error = np.max(np.abs(np.asarray(found, float) - wanted))
        assert error < (1e-8 if dtype == np.float64 else 1e-2)


@pytest.mark.parametrize("rows", [4, 9])
def test_thin_factors_give_least_squares_and_their_derivatives(rows):
    draw = np.random.default_rng(rows)
    matrix, b, ct = draw.normal(size=(rows, 4)), draw.normal(size=rows), np.ones(4)

    def solved(b):
        operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
        return lx.linear_solve(operator, b, ThinQR()).value

    inverse = np.linalg.pinv(matrix)
    np.testing.assert_allclose(solved(jnp.asarray(b)), inverse @ b, rtol=1e-9)
    pull = jax.vjp(solved, jnp.asarray(b))[1](jnp.asarray(ct))[0]
    np.testing.assert_allclose(pull, inverse.T @ ct, rtol=1e-9)


# --- found by review


def test_nystrom_of_all_columns_is_exact_in_single_precision():
    n, rho = 50, 1e-3
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    hessian = (q * np.logspace(0, -3, n)) @ q.T
    hessian = ((hessian + hessian.T) / 2).astype(np.float32)
    b = q @ np.ones(n)
    operator = lx.MatrixLinearOperator(
        jnp.asarray(hessian), lx.positive_semidefinite_tag
    )
    x = lx.linear_solve(operator, jnp.asarray(b, jnp.float32), Nystrom(n, rho=rho))
    found = np.asarray(x.value, float)
    exact = np.linalg.solve(hessian.astype(float) + rho * np.eye(n), b)
    assert np.linalg.norm(found - exact) < 1e-4 * np.linalg.norm(exact)


def test_nystrom_in_small_units():
    operator = lx.MatrixLinearOperator(
        jnp.asarray(np.diag([3e-20, 2e-20, 1e-20]), jnp.float32), lx.symmetric_tag
    )
    x = lx.linear_solve(operator, jnp.ones(3, jnp.float32), Nystrom(3, rho=1e-21)).value
    np.testing.assert_allclose(x * 1e-20, 1 / np.array([3.1, 2.1, 1.1]), rtol=1e-5)


@pytest.mark.parametrize("max_steps", [17, 19, 100])
def test_without_a_second_phase_the_residual_is_that_of_the_answer(max_steps):
    n, rng = 40, np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    matrix = (q * np.linspace(1 / 3, 1, n)) @ q.T
    matrix = ((matrix + matrix.T) / 2).astype(np.float32)
    b, y0 = rng.normal(size=n), 1e6 * rng.normal(size=n)
    b, y0 = jnp.asarray(b, jnp.float32), jnp.asarray(y0, jnp.float32)
    operator = lx.MatrixLinearOperator(
        jnp.asarray(matrix), lx.positive_semidefinite_tag
    )
    solver = HybridKrylov(restart=0, max_steps=max_steps)
    found = lx.linear_solve(operator, b, solver, options={"y0": y0}, throw=False)
    x = np.asarray(found.value, float)
    left = np.linalg.norm(np.asarray(b, float) - matrix.astype(float) @ x)
    # The rounding of a residual aside.
    np.testing.assert_allclose(found.stats["residual_norm"], left, rtol=0.2, atol=1e-5)
    good = left < 1e-3 * np.linalg.norm(b)
    assert (found.result == lx.RESULTS.successful) == good


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_normal_cg_takes_its_steps_from_a_warm_start_too(steps):
    rng = np.random.default_rng(0)
    matrix, b, y0 = rng.normal(size=(6, 6)), rng.normal(size=6), rng.normal(size=6)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    options = {"y0": jnp.asarray(y0)}
    found = lx.linear_solve(operator, jnp.asarray(b), NormalCG(steps), options=options)
    # The best of the Krylov space of the normal equations.
    normal, right = matrix.T @ matrix, matrix.T @ (b - matrix @ y0)
    basis = [np.linalg.matrix_power(normal, k) @ right for k in range(steps)]
    best = np.linalg.lstsq(matrix @ np.stack(basis, 1), b - matrix @ y0, rcond=None)[0]
    wanted = y0 + np.stack(basis, 1) @ best
    np.testing.assert_allclose(found.value, wanted, rtol=1e-8)
    assert found.stats["num_steps"] == steps


@pytest.mark.parametrize("solver", [HybridKrylov(), Neumann()])
def test_iterations_of_a_half_precision_operator(solver):
    operator = lx.MatrixLinearOperator(jnp.asarray(0.9 * np.eye(40), jnp.bfloat16))
    x = lx.linear_solve(operator, jnp.ones(40, jnp.bfloat16), solver).value
    np.testing.assert_allclose(np.asarray(x, float), 1 / 0.9, rtol=2e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda rcond: DirectSymmetric(rcond=rcond),
        lambda rcond: AutoLinearSolver(rcond=rcond),
        lambda rcond: LeastNorm(rcond=rcond),
        lambda rcond: LeastNorm(rcond=rcond, least_squares=True),
    ],
)
def test_rcond_may_be_traced(make):
    operator = lx.MatrixLinearOperator(
        jnp.diag(jnp.array([1.0, 2, 0])), lx.symmetric_tag
    )
    b = jnp.array([1.0, 1.0, 0.0])
    solve = jax.jit(lambda rcond: lx.linear_solve(operator, b, make(rcond)).value)
    np.testing.assert_allclose(solve(1e-8), [1, 0.5, 0], atol=1e-12)
