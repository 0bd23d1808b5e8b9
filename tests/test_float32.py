"""The same promises where 64-bit numbers are switched off, as JAX is by default."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from problems import assert_close, CELL_GUESS, CELL_JACOBIAN, cell_layer, PROBLEMS, Var

import eqximplicit as eqi
from eqximplicit.linear_solvers._rounding import coarsest

# Some tens of roundings of single precision (6e-8), at condition numbers below 10.
SINGLE = 2e-5
NEWTON = optx.Newton(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_rule_keeps_single_precision_in_both_modes(problem):
    args = single(problem.args)
    gain = np.float32(problem.gain)

    @jax.jit
    def run(args):
        def solution(args):
            y = jnp.arcsinh(gain @ (args[0] @ args[1]))
            return eqi.implicit_solution(problem.condition(problem.fn), y, args)

        return solution(args), jax.jacfwd(solution)(args), jax.jacrev(solution)(args)

    value, forward, reverse = run(args)
    leaves = jax.tree.leaves((value, forward, reverse))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert_close(forward, problem.jacobian(problem.args), tol=SINGLE)
    assert_close(reverse, problem.jacobian(problem.args), tol=SINGLE)


def test_layer_solves_and_differentiates_in_single_precision():
    layer = eqx.tree_at(lambda layer: layer.solver, cell_layer(), NEWTON)
    layer = layer.with_params(single(layer.params))

    @eqx.filter_jit
    def run(layer, y0):
        def loss(layer):
            solution = layer.solve(y0)
            return solution.value[1].value, solution

        return eqx.filter_grad(loss, has_aux=True)(layer)

    gradient, solution = run(layer, single(CELL_GUESS))
    assert_close(solution.value, (Var(2.0), Var(3.0)), tol=SINGLE)
    assert_close(gradient.params, CELL_JACOBIAN[1], tol=SINGLE)
    assert gradient.params.alpha.dtype == jnp.float32
    assert solution.stats["residual_norm"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_state_is_solved_in_single_precision(dtype):
    # There is no LU in half precision; the state keeps its dtype all the same.
    @jax.jit
    def run(b):
        def solution(b):
            y = jnp.ones(2, dtype)
            return eqi.implicit_solution(eqi.Root(lambda y, b: y**3 + y - b), y, b)

        return jax.jvp(solution, (b,), (jnp.ones_like(b),))

    value, t_y = run(jnp.full(2, 2, dtype))
    assert value.dtype == t_y.dtype == dtype
    np.testing.assert_array_equal(t_y.astype(jnp.float32), 0.25)


def test_complex64_state_is_differentiated():
    @jax.jit
    def run(c):
        def solution(c):
            y = jnp.array(0.3 + 0.4j)
            return eqi.implicit_solution(
                eqi.Root(lambda z, c: z + 0.5 * jnp.conj(z) - c), y, c
            )

        return jax.jvp(solution, (c,), (jnp.array(0.7 - 1.1j),))[1]

    t_z = run(jnp.array(0.45 + 0.2j))
    assert t_z.dtype == jnp.complex64
    # The real part is 1.5 times, the imaginary part half of z's.
    assert_close(t_z, 0.7 / 1.5 - 1.1j / 0.5, tol=SINGLE)


def test_integer_guess_becomes_single_precision():
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, _: y**2 - 4), NEWTON)
    value = layer(3)
    assert value.dtype == jnp.float32
    assert_close(value, 2.0, tol=SINGLE)


@pytest.mark.parametrize("solver", [lx.LU(), lx.GMRES(rtol=1e-6, atol=1e-6), None])
def test_zero_right_hand_side_is_zero_in_single_precision(solver):
    matrix = jnp.array([[2.0, 1.0], [0.5, 3.0]])

    @jax.jit
    def run(b):
        def solution(b):
            condition = eqi.Root(lambda y, b: matrix @ y - b)
            return eqi.implicit_solution(condition, b, b, linear_solver=solver)

        return jax.jvp(solution, (b,), (jnp.zeros_like(b),))[1]

    assert_close(run(jnp.ones(2)), jnp.zeros(2), tol=0)


# --- half precision, which is solved in its real form, float32

HALVES = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)


@HALVES
@pytest.mark.parametrize(
    ("condition", "truth"),
    [
        (eqi.Root(lambda y, a: y**3 + y - a), np.array([0.6823, 1.0, 1.2134])),
        (
            eqi.FixedPoint(lambda y, a: jnp.cos(y * a) / 2),
            np.array([0.4502, 0.3696, 0.3049]),
        ),
        (eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 2 + y**4 / 10)), None),
    ],
    ids=["root", "fixed point", "minimum"],
)
def test_default_solvers_reach_what_half_precision_can(condition, truth, dtype):
    a = jnp.array([1.0, 2.0, 3.0], dtype)
    layer = eqi.ImplicitFunction(condition)  # raises if it fails
    y, slope = jax.value_and_grad(lambda a: layer(jnp.ones(3, dtype), a).sum())(a)
    assert y.dtype == slope.dtype == dtype
    assert np.all(np.isfinite(slope))
    if truth is not None:
        distance = 8 * float(jnp.finfo(dtype).eps)
        assert_close(layer(jnp.ones(3, dtype), a).astype(float), truth, tol=distance)


@HALVES
def test_rounding_in_half_precision_is_no_doubt_in_a_root(dtype):
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**3 + y - a))

    @jax.jit
    @jax.vmap
    def run(a):
        y, pullback = jax.vjp(lambda a: layer(jnp.ones_like(a), a), a)
        return y, pullback(jnp.ones_like(a))[0]

    draws = np.random.default_rng(0).uniform(0.5, 4, (200, 3))
    y, slope = run(jnp.asarray(draws, dtype))
    tol = 8 * float(jnp.finfo(dtype).eps)
    expected = 1 / (3 * np.asarray(y, float) ** 2 + 1)
    assert_close(slope.astype(float), expected, tol=tol)


@HALVES
def test_a_residual_of_roundings_alone_is_no_local_minimum(dtype):
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**3 + y - a), throw=False)
    result = layer.solve(jnp.ones(3, dtype), jnp.array([30.0, 60, 90], dtype)).result
    assert result == eqi.RESULTS.unattainable_tolerance, eqi.RESULTS[result]


def contraction(n):
    """A matrix with the spectral norm 1/2."""
    matrix = np.random.default_rng(n).normal(size=(n, n))
    return matrix / (2 * np.linalg.norm(matrix, 2))


def tanh_gradient(w, x, ct):
    """The cotangent of `x` for `z = tanh(z w + x)`, and `z`, in double precision."""
    z = np.zeros_like(x)
    for _ in range(60):
        z = np.tanh(z @ w + x)
    slope, adjoint = 1 - z**2, ct
    for _ in range(60):
        adjoint = ct + (adjoint * slope) @ w.T
    return adjoint * slope


def assert_close_to(got, wanted, eps):
    error = np.linalg.norm(np.asarray(got, float) - wanted)
    assert error <= 4 * eps * np.linalg.norm(wanted)


# Above 2048 unknowns no factorisation stands behind the iteration.
@HALVES
@pytest.mark.parametrize("state", ["half", "single"])
def test_products_in_half_precision_are_as_good_as_they_can_be(state, dtype):
    eps, w = float(jnp.finfo(dtype).eps), contraction(50)
    draws = np.random.default_rng(1).normal(size=(2, 50, 50))
    wanted = tanh_gradient(w, *draws)
    w, x, ct = (jnp.asarray(a, dtype) for a in (w, *draws))
    plain = optx.FixedPointIteration(rtol=4 * eps, atol=4 * eps)
    guess = x if state == "half" else single(x)

    def cell(z, x):  # computed in half precision, whatever the state is
        return jnp.tanh(z.astype(dtype) @ w + x.astype(dtype)).astype(z.dtype)

    @jax.jit
    def pulled(x, ct):
        layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), plain)
        return jax.vjp(lambda x: layer(x, x), x)[1](ct)[0]

    slope = pulled(guess, ct.astype(guess.dtype))
    assert slope.dtype == guess.dtype
    assert_close_to(slope, wanted, eps)


def shifted(offset):
    return lambda d: np.diag(d) + np.eye(len(d), k=offset) / 4


SQUARE = jnp.eye(3, dtype=jnp.float32)
FAST = 2.0**-10  # TensorFloat-32, which CPUs do not have


@pytest.mark.parametrize(
    ("program", "rounding"),
    [
        (lambda x: SQUARE @ x, FAST),
        (lambda x: jnp.matmul(SQUARE, x, precision="high"), FAST),
        (lambda x: jnp.matmul(SQUARE, x, precision="highest"), 2.0**-23),
        (lambda x: jax.lax.scan(lambda x, _: (SQUARE @ x, None), x, None, 2)[0], FAST),
        (lambda x: 2 * x, 2.0**-23),
        (lambda x: (2 * x.astype(jnp.bfloat16)).astype(jnp.float32), 2.0**-7),
        (lambda x: jax.jit(lambda x: x.astype(jnp.float16) * 2)(x), 2.0**-10),
    ],
    ids=["default", "high", "highest", "inside", "no product", "bfloat16", "float16"],
)
def test_rounding_is_that_of_the_lowest_precision(program, rounding):
    jaxpr = jax.make_jaxpr(program)(jnp.ones(3, jnp.float32)).jaxpr
    assert coarsest(jaxpr, FAST) == rounding


AUTO = eqi.AutoLinearSolver()
LINEAR = {
    "diagonal": (lx.diagonal_tag, np.diag, AUTO),
    "tridiagonal": (lx.tridiagonal_tag, shifted(1), AUTO),
    "triangular": (lx.lower_triangular_tag, shifted(-2), AUTO),
    "positive": (lx.positive_semidefinite_tag, lambda d: np.diag(d) + 0.1, AUTO),
    "by Cholesky": (
        lx.positive_semidefinite_tag,
        lambda d: np.diag(d) + 0.1,
        lx.Cholesky(),
    ),
    "sparse": (frozenset(), shifted(2), eqi.SparseDirect()),
    "normal": (frozenset(), shifted(2), eqi.NormalCG(rtol=1e-2)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_residual_is_measured_no_better_than_products_are(name):
    (tag, shaped, solver), dtype = LINEAR[name], jnp.bfloat16
    rng, n = np.random.default_rng(2), 6
    eps = max(float(jnp.finfo(dtype).eps), 1e-2 if name == "normal" else 0.0)
    matrix = np.asarray(jnp.asarray(shaped(rng.uniform(1, 2, n)), dtype), float)
    draws = rng.normal(size=(200, n))
    wanted = np.linalg.solve(matrix, draws.T).T, np.linalg.solve(matrix.T, draws.T).T

    def product(y):  # an entry at a time: a sparse matrix stays one
        rows = [[a * y[j] for j, a in enumerate(row) if a] for row in matrix.tolist()]
        return jnp.stack([sum(row[1:], row[0]) for row in rows])

    @jax.jit
    @jax.vmap
    def both(v):
        condition = eqi.Root(lambda y, b: product(y) - b, tag)
        linear = {"linear_solver": solver}
        solution = lambda b: eqi.implicit_solution(condition, b, b, **linear)
        return jax.jvp(solution, (0 * v,), (v,))[1], jax.vjp(solution, 0 * v)[1](v)[0]

    for got, want in zip(both(jnp.asarray(draws, dtype)), wanted, strict=True):
        assert_close_to(got, want, eps)
