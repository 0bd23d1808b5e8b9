"""SparseDirect against dense linear algebra, its sparsity against dense Jacobians."""

import functools
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import (
    _banded_plans,
    _klu,
    _pattern,
    _sparse_plans,
    _three_diagonals,
)
from eqximplicit.linear_solvers.sparse import detect_structure, SparseDirect

jax.config.update("jax_enable_x64", True)

EXACT = 1e-11  # well-conditioned systems, float64
SECOND = 1e-9  # second derivatives of the same
SINGLE = 2e-5  # the same in float32


def diffusion(y, dt=0.3):
    """A nonlinear diffusion on a line: tridiagonal, not symmetric."""
    wide = jnp.concatenate([jnp.zeros(1, y.dtype), y, jnp.ones(1, y.dtype)])
    middle = 0.5 * (wide[1:] + wide[:-1])
    flux = (1 + middle**2) * jnp.diff(wide) * (1 + 0.3 * jnp.sin(middle))
    return y - dt * jnp.diff(flux) + 0.1 * y**3


def plane(y, dt=0.2):
    """The same on a square: five diagonals, far apart."""
    wide = jnp.pad(y, 1)
    up = (1 + wide[1:] ** 2) * (wide[1:] - wide[:-1])
    side = (1 + wide[:, :-1] ** 2) * (wide[:, 1:] - wide[:, :-1])
    div = jnp.diff(up, axis=0)[:, 1:-1] + jnp.diff(side, axis=1)[1:-1]
    return y - dt * div


def ring(y):
    return 3 * y + jnp.sin(jnp.roll(y, 1)) - 0.5 * jnp.roll(y, -2) ** 2


def pair(y):
    """Two fields coupled in each point, with a scalar that every point feels."""
    u, v, s = y["u"], y["v"], y["s"]
    return {
        "u": diffusion(u) + u * v * s,
        "v": 3 * v - u**2 + 0.2 * s,
        "s": 2 * s + jnp.mean(u) + 0.1 * s**2,
    }


def stencil(y):
    return y.at[2:-2].add(0.1 * y[4:] - 0.2 * y[:-4] ** 2)


def scattered(y):
    index = np.array([3, 1, 4, 1, 5])
    return 2 * y + jnp.zeros_like(y).at[index].add(jnp.sin(y[index[::-1]]))


def local_blocks(y):
    matrix = jnp.arange(9.0).reshape(3, 3) / 9 + 2 * jnp.eye(3)
    return jax.vmap(lambda v: matrix @ jnp.sin(v))(y.reshape(-1, 3)).reshape(-1)


def chosen(y):
    first = jnp.where(jnp.arange(y.size) % 2 == 0, y**2, jnp.roll(y, 1))
    return 3 * y + 0.1 * jnp.where(y > 0, first, y[::-1])


def padded(y):
    shifted = jax.lax.pad(y**2, 0.0, ((-3, 3, 0),))
    return 2 * y + jax.lax.pad(y[::2], 0.0, ((1, 0, 1),)) + 0.3 * shifted


def halves(y):
    first, second = jnp.split(y, 2)
    return jnp.concatenate([first**2 + second, jnp.exp(second)]) + 0.1 * y[-1]


def convolved(y):
    return y + 0.1 * jnp.convolve(y, jnp.array([1.0, 2.0, 0.5]), mode="same")


def scanned(y):
    def step(carry, x):
        return 0.5 * x + 0.1 * carry, carry + 2 * x

    return jax.lax.scan(step, jnp.zeros(()), y)[1]


def vector(n, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 1.0, n))


STATES = {
    "diagonal": (lambda y: y**3 + y, vector(12)),
    "diffusion": (diffusion, vector(20)),
    "plane": (plane, vector(100).reshape(10, 10)),
    "ring": (ring, vector(90)),
    "pair": (pair, {"u": vector(30), "v": vector(30, 1), "s": vector(1)[0]}),
    "stencil": (stencil, vector(80)),
    "scattered": (scattered, vector(9)),
    "local_blocks": (local_blocks, vector(72)),
    "chosen": (chosen, vector(17)),
    "padded": (padded, vector(10)),
    "halves": (halves, vector(70)),
    "convolved": (convolved, vector(25)),
    "scanned": (scanned, vector(8)),
    "one": (lambda y: jnp.sin(y), vector(1)),
    "two": (lambda y: y + 0.3 * y[::-1] ** 2, vector(2)),
}
EVERY = pytest.mark.parametrize("name", list(STATES))


@functools.lru_cache
def with_args(fn):
    return lambda y, _: fn(y)


def jacobian_of(fn, y):
    return lx.JacobianLinearOperator(with_args(fn), y)


@eqx.filter_jit
def as_matrix(operator):
    return operator.as_matrix()


def dense(operator):
    return np.asarray(as_matrix(operator))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jtu.tree_leaves(tree)])


def like(y, seed=7):
    leaves, treedef = jtu.tree_flatten(y)
    draw = np.random.default_rng(seed)
    new = [jnp.asarray(draw.normal(size=x.shape)).astype(x.dtype) for x in leaves]
    return jtu.tree_unflatten(treedef, new)


@functools.partial(jax.jit, static_argnums=(0, 3))
def both_ways(fn, y, b, backend="auto"):
    operator, solver = jacobian_of(fn, y), SparseDirect(backend)
    state = solver.init(operator, {})
    x, result, _ = solver.compute(state, b, {})
    state_t, _ = solver.transpose(state, {})
    x_t, result_t, _ = solver.compute(state_t, b, {})
    ok = (result == lx.RESULTS.successful) & (result_t == lx.RESULTS.successful)
    return x, x_t, ok


def solve_by_rule(operator, b, solver):
    state = jax.lax.stop_gradient(solver.init(operator, {}))

    def solve(_, b):
        return solver.compute(state, b, {})[0]

    def transpose_solve(_, b):
        return solver.compute(solver.transpose(state, {})[0], b, {})[0]

    return jax.lax.custom_linear_solve(operator.mv, b, solve, transpose_solve)


# --- Detection ---------------------------------------------------------------------


@EVERY
def test_pattern_covers_the_dense_jacobian(name):
    fn, y = STATES[name]
    structure = detect_structure(jacobian_of(fn, y))
    outside = np.ones((structure.size, structure.size), bool)
    outside[structure.rows, structure.cols] = False
    matrix = dense(jacobian_of(fn, y))
    assert np.all(matrix[outside] == 0)
    if name != "chosen":  # both branches of a selection count
        assert structure.nnz == np.count_nonzero(matrix)


def on_rows(mix, scale=0.1):
    """A map of 20 rows of 5, which `mix` couples by arrays of one row or column."""
    return lambda y: 3 * y + scale * mix(y.reshape(20, 5)).reshape(-1)


def selected(rows):
    other = rows * rows.sum(1, keepdims=True)
    by_row = jnp.where(rows[:, :1] > 0.5, other, rows * rows[:1])
    return by_row + jax.lax.select_n(rows[0, 0] > 0.5, rows, other) + rows[3, 1] * rows


BROADCASTS = {
    "softmax": on_rows(jax.nn.softmax),
    "centred": on_rows(lambda rows: rows - rows.mean(1, keepdims=True)),
    "normed": on_rows(lambda r: r / jnp.linalg.norm(r, axis=1, keepdims=True)),
    "row_sums": on_rows(lambda rows: rows * rows.sum(1, keepdims=True)),
    "first_row": on_rows(lambda rows: rows * rows[:1]),
    "outer": on_rows(lambda rows: rows[:, :1] * rows[:1, :]),
    "kron": lambda y: 4 * y + 0.1 * jnp.kron(y[:10], jnp.ones(10)),
    "constant": on_rows(lambda rows: rows[:, :1] * jnp.ones((1, 5))),
    "clamped": on_rows(lambda rows: jax.lax.clamp(0.3, rows, 0.7) * rows[:, 1:2]),
    "selected": on_rows(selected),
}


@pytest.mark.parametrize("name", list(BROADCASTS))
def test_an_axis_of_one_entry_is_repeated(name):
    fn, y = BROADCASTS[name], vector(100)
    structure, matrix = detect_structure(jacobian_of(fn, y)), dense(jacobian_of(fn, y))
    found = np.zeros(matrix.shape, bool)
    found[structure.rows, structure.cols] = True
    if name == "selected":  # both branches of a selection count
        found &= matrix != 0
    np.testing.assert_array_equal(found, matrix != 0)
    x, x_t, ok = both_ways(fn, y, like(y))
    assert bool(ok)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, like(y)), atol=EXACT)
    np.testing.assert_allclose(x_t, np.linalg.solve(matrix.T, like(y)), atol=EXACT)


def test_kinds_and_colours_are_those_of_the_textbook():
    kinds = {k: detect_structure(jacobian_of(*STATES[k])).kind for k in STATES}
    assert kinds["diagonal"] == kinds["one"] == "diagonal"
    assert kinds["diffusion"] == kinds["convolved"] == kinds["two"] == "tridiagonal"
    assert kinds["stencil"] == kinds["local_blocks"] == "banded"
    assert kinds["plane"] == kinds["ring"] == kinds["pair"] == "sparse"
    large = detect_structure(jacobian_of(lambda y: y + jnp.sum(y), jnp.ones(2000)))
    assert (large.kind, large.nnz) == ("dense", 2000**2)
    tri = detect_structure(jacobian_of(*STATES["diffusion"]))
    assert (tri.nnz, tri.lower, tri.upper, tri.colours) == (58, 1, 1, 3)


def test_detection_is_cached_by_structure_and_knows_index_values():
    def shifted(by, scale):
        index = (np.arange(30) + by) % 30
        return detect_structure(jacobian_of(lambda y: scale * y[index], jnp.ones(30)))

    assert shifted(0, 2 * jnp.ones(30)) is shifted(0, 3 * jnp.ones(30))
    assert shifted(0, jnp.ones(30)).kind == "diagonal"
    assert shifted(1, jnp.ones(30)).kind == "sparse"


def test_detection_under_transformations_leaks_no_tracer():
    def kind(y, scale):
        operator = lx.JacobianLinearOperator(lambda y, _: scale * diffusion(y), y)
        structure = detect_structure(operator)
        assert structure is not None
        assert structure.kind == "tridiagonal"
        return jnp.sum(y * scale)

    with jax.checking_leaks():
        jax.jit(jax.vmap(jax.grad(kind)))(jnp.ones((3, 21)), jnp.arange(1.0, 4.0))
    eager = detect_structure(jacobian_of(lambda y: 2.0 * diffusion(y), jnp.ones(21)))
    assert eager.kind == "tridiagonal"


def test_not_square_raises():
    operator = jacobian_of(lambda y: y[:2], jnp.ones(3))
    with pytest.raises(ValueError, match="2 rows and 3 columns"):
        detect_structure(operator)


# --- Solving -----------------------------------------------------------------------


@EVERY
def test_solution_and_transposed_solution_match_a_dense_solve(name):
    fn, y = STATES[name]
    b = like(y)
    x, x_t, ok = both_ways(fn, y, b)
    matrix = dense(jacobian_of(fn, y))
    assert bool(ok)
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    np.testing.assert_allclose(flat(x), np.linalg.solve(matrix, flat(b)), rtol=EXACT)
    expected = np.linalg.solve(matrix.T, flat(b))
    np.testing.assert_allclose(flat(x_t), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("plane", "blocks"), ("pair", "klu")],
)
def test_both_backends_match_a_dense_solve(name, backend):
    fn, y = STATES[name]
    b = like(y)
    x, x_t, ok = both_ways(fn, y, b, backend)
    matrix = dense(jacobian_of(fn, y))
    assert bool(ok)
    np.testing.assert_allclose(flat(x), np.linalg.solve(matrix, flat(b)), rtol=EXACT)
    expected = np.linalg.solve(matrix.T, flat(b))
    np.testing.assert_allclose(flat(x_t), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["diffusion", "plane"])
def test_float32(name):
    fn, y = STATES[name]
    y = y.astype(jnp.float32)
    b = like(y)
    x, x_t, ok = both_ways(fn, y, b)
    matrix = dense(jacobian_of(fn, y)).astype(np.float64)
    assert bool(ok)
    assert x.dtype == x_t.dtype == jnp.float32
    expected = np.linalg.solve(matrix, flat(b)), np.linalg.solve(matrix.T, flat(b))
    np.testing.assert_allclose(flat(x), expected[0], atol=SINGLE)
    np.testing.assert_allclose(flat(x_t), expected[1], atol=SINGLE)


def drift(y, left, right):
    """Implicit Euler for a linear diffusion with a drift, walls at zero."""
    wide = jnp.pad(y, 1)
    return (1 + left + right) * y - left * wide[:-2] - right * wide[2:]


def read_off(y, left, right):
    """The same, and its diagonals are not seen in the jaxpr."""
    first = (1 + left + right) * y[0] - right * y[1]
    return drift(y, left, right).at[0].set(first)


@pytest.mark.parametrize(
    ("n", "dtype", "rate"),
    [(2000, jnp.float64, 5.0), (300, jnp.float32, 5.0), (1600, jnp.float32, 100.0)],
)
@pytest.mark.parametrize("fn", [drift, read_off])
def test_the_answer_to_a_point_load_may_underflow(fn, n, dtype, rate):
    fn = functools.partial(fn, left=rate, right=0.9 * rate)
    b = jnp.zeros(n, dtype).at[n // 20].set(1.0)
    x, x_t, ok = both_ways(fn, jnp.ones(n, dtype), b)
    matrix = dense(jacobian_of(fn, jnp.ones(n)))
    expected = np.linalg.solve(matrix, b), np.linalg.solve(matrix.T, b)
    assert min(abs(expected[0])) < float(jnp.finfo(dtype).tiny)
    assert bool(ok)
    tolerance = EXACT if dtype == jnp.float64 else SINGLE
    np.testing.assert_allclose(x, expected[0], atol=tolerance)
    np.testing.assert_allclose(x_t, expected[1], atol=tolerance)


def test_where_a_solution_has_decayed_it_is_still_judged_in_the_units_of_its_row():
    n, units = 1000, 10.0 ** jnp.linspace(-15, 15, 1000)
    bands = tuple(units * c for c in (jnp.full(n, -0.5), jnp.full(n, 2.0), -0.4))
    b = (units * jnp.zeros(n)).at[n // 3].set(units[n // 3])
    x = _three_diagonals.band_solve(tuple(v / units for v in bands), b / units)
    accepted = lambda x: np.asarray(_banded_plans._small_backward_error(bands, x, b))
    assert np.all(accepted(x))
    for at in (0, n // 3, n - 1):
        assert not accepted(x.at[at].add(1e-10))[at]
        assert not np.any(accepted(x.at[at].set(jnp.nan)))
        assert not np.any(accepted(x.at[at].set(jnp.inf)))


@pytest.mark.parametrize(("n", "dtype"), [(1700, jnp.float64), (240, jnp.float32)])
def test_derivative_of_an_implicit_step_at_one_point(n, dtype):
    def residual(u, args):
        k, old = args
        wide = jnp.pad(u, 1)
        middle = 0.5 * (wide[1:] + wide[:-1])
        return u - old - 4 * jnp.diff(k * (1 + 0.5 * middle**2) * jnp.diff(wide))

    adjoint = eqi.ImplicitAdjoint(linear_solver=SparseDirect())
    solver = optx.Newton(1e-5, 1e-5)
    layer = eqi.ImplicitFunction(eqi.Root(residual), solver, adjoint=adjoint)
    k, old = jnp.linspace(0.8, 1.2, n + 1), jnp.sin(jnp.linspace(0, 3, n))
    k, old = k.astype(dtype), old.astype(dtype)
    gradient = jax.jit(jax.grad(lambda k: layer(old, (k, old))[n // 20]))(k)

    k, old = k.astype(jnp.float64), old.astype(jnp.float64)
    u = layer(old, (k, old))
    by_u, by_k = jax.jit(jax.jacfwd(lambda u, k: residual(u, (k, old)), (0, 1)))(u, k)
    expected = -np.linalg.solve(np.asarray(by_u).T, np.eye(n)[n // 20]) @ by_k
    np.testing.assert_allclose(gradient, expected, atol=SINGLE)


def test_mixed_float_dtypes_are_kept():
    def fn(y):
        wide = y["single"].astype(jnp.float64)
        double = diffusion(y["double"]) + 0.1 * wide
        single = (2 * wide - 0.1 * y["double"]).astype(jnp.float32)
        return {"single": single, "double": double}

    y = {"single": vector(40).astype(jnp.float32), "double": vector(40, 1)}
    b = like(y)
    x, _, ok = both_ways(fn, y, b)
    assert bool(ok)
    assert (x["single"].dtype, x["double"].dtype) == (jnp.float32, jnp.float64)
    residual = jtu.tree_map(lambda a, b: a - b, jacobian_of(fn, y).mv(x), b)
    assert np.max(np.abs(flat(residual))) < SINGLE


@pytest.mark.parametrize(
    ("reach", "backend"), [(0, "auto"), (1, "auto"), (3, "klu"), (3, "blocks")]
)
def test_complex(reach, backend):
    n = 80
    c = jax.lax.complex(vector(n), vector(n, 1))

    def mv(x):
        far = jnp.roll(x, 3) if reach == 3 else jnp.pad(x, 1)[2 * reach :][:n]
        return (4 + 1j) * x + (c * far if reach else 0 * x)

    operator = lx.FunctionLinearOperator(mv, jax.ShapeDtypeStruct((n,), c.dtype))
    matrix, solver = dense(operator), SparseDirect(backend)

    @jax.jit
    def solve_all(b):
        state = solver.init(operator, {})
        conj, _ = solver.conj(state, {})
        adjoint, _ = solver.transpose(conj, {})
        done = [solver.compute(s, b, {}) for s in (state, conj, adjoint)]
        return [(x, result == lx.RESULTS.successful) for x, result, _ in done]

    for (x, ok), m in zip(
        solve_all(c), (matrix, matrix.conj(), matrix.conj().T), strict=True
    ):
        assert bool(ok)
        np.testing.assert_allclose(np.asarray(x), np.linalg.solve(m, c), rtol=1e-10)


def test_real_beside_complex_is_refused():
    operator = jacobian_of(lambda y: y, (jnp.ones(3), jnp.ones(3, complex)))
    with pytest.raises(ValueError, match="all real or all complex"):
        SparseDirect().init(operator, {})


@pytest.mark.parametrize("name", ["diffusion", "plane"])
def test_inside_lineax_linear_solve(name):
    fn, y = STATES[name]
    operator, b = jacobian_of(fn, y), like(y)
    solution = eqx.filter_jit(lx.linear_solve)(operator, b, SparseDirect())
    expected = np.linalg.solve(dense(operator), flat(b))
    np.testing.assert_allclose(flat(solution.value), expected, rtol=EXACT)
    assert float(solution.stats["residual_norm"]) < EXACT


@pytest.mark.parametrize(
    ("name", "backend"),
    [("diffusion", "auto"), ("plane", "klu"), ("plane", "blocks")],
)
def test_batched_values_share_the_pattern(name, backend):
    fn, y = STATES[name]
    ys = jnp.stack([y, 0.5 * y, y[::-1]])
    bs = jnp.stack([like(y, i) for i in range(3)])
    x, x_t, ok = jax.vmap(lambda y, b: both_ways(fn, y, b, backend))(ys, bs)
    assert bool(jnp.all(ok))
    for i in range(3):
        one = both_ways(fn, ys[i], bs[i], backend)
        np.testing.assert_allclose(flat(x[i]), flat(one[0]), rtol=EXACT)
        np.testing.assert_allclose(flat(x_t[i]), flat(one[1]), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["diffusion", "plane"])
def test_the_inverse_as_many_right_hand_sides_is_one_factorisation(name):
    fn, y = STATES[name]
    eye = jnp.eye(y.size).reshape(-1, *y.shape)

    def inverse(y):
        return jax.vmap(lambda b: solve_by_rule(jacobian_of(fn, y), b, SparseDirect()))(
            eye
        )

    found = jax.jit(inverse)(y).reshape(y.size, y.size).T
    expected = np.linalg.inv(dense(jacobian_of(fn, y)))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=EXACT)
    text = str(jax.make_jaxpr(inverse)(y))
    if name == "plane":  # one matrix, with all right-hand sides as its columns
        assert f"c128[1,{y.size},{2 * y.size}]" in text


@pytest.mark.parametrize(
    "name", ["diffusion", pytest.param("plane", marks=pytest.mark.slow)]
)
def test_first_and_second_derivatives_match_a_dense_solve(name):
    fn, y = STATES[name]
    b, w = like(y), like(y, 3)

    def value(solve, t):
        operator = jacobian_of(lambda z: fn(z) + t * z**2, y * (1 + t))
        return jnp.sum(w * solve(operator, b + t * w) ** 2)

    def reference(operator, b):
        return jnp.linalg.solve(operator.as_matrix(), b.reshape(-1)).reshape(b.shape)

    def ours(operator, b):
        return solve_by_rule(operator, b, SparseDirect())

    def derivatives(solve):
        f = functools.partial(value, solve)
        second = (jax.grad(jax.grad(f)), jax.jacfwd(jax.grad(f)))
        return jax.jit(lambda t: [d(t) for d in (jax.grad(f), jax.jacfwd(f), *second)])

    for found, expected in zip(
        derivatives(ours)(0.1), derivatives(reference)(0.1), strict=True
    ):
        np.testing.assert_allclose(float(found), float(expected), rtol=SECOND)


def test_columns_or_rows_are_compressed_into_few_products():
    solver = SparseDirect()
    fn, y = plane, jnp.ones((30, 30))
    init = lambda fn, y: jax.eval_shape(lambda: solver.init(jacobian_of(fn, y), {}))
    assert init(fn, y).plan.colouring.count <= 9
    base = lambda y: 2 * y + 0.1 * jnp.roll(y, 3)
    row = lambda y: base(y).at[0].add(jnp.sum(y))
    column = lambda y: base(y) + 0.1 * y[0] ** 2
    for fn, mode in ((column, "fwd"), (row, "rev")):
        colouring = init(fn, vector(90)).plan.colouring
        assert colouring.count <= 5
        assert colouring.mode == mode
        x, _, ok = both_ways(fn, vector(90), like(vector(90)))
        expected = np.linalg.solve(dense(jacobian_of(fn, vector(90))), like(vector(90)))
        assert bool(ok)
        np.testing.assert_allclose(flat(x), expected, rtol=1e-9)


# --- Honesty -----------------------------------------------------------------------


def neumann(y):
    """Singular: constants are in the kernel, and the sum of the image is zero."""
    return jnp.diff(jnp.pad((1.3 + 0.1 * y[1:]) * jnp.diff(y), 1))


def neumann_plane(y):
    up = jnp.diff(jnp.pad(1.7 * jnp.diff(y, axis=0), ((1, 1), (0, 0))), axis=0)
    return up + jnp.diff(jnp.pad(0.3 * jnp.diff(y, axis=1), ((0, 0), (1, 1))), axis=1)


def zero_row(y):
    return (3 * y + jnp.roll(y, 2)) * jnp.where(jnp.arange(y.size) == 4, 0.0, 1.0)


def crowded(y):
    """Three rows of one entry each, all in one column."""
    return jnp.concatenate([ring(y)[:5], jnp.repeat(y[9:10], 3), ring(y)[8:]])


SINGULAR = {
    "diagonal": (lambda y: y * jnp.where(jnp.arange(y.size) == 4, 0.0, 1.0), 12),
    "neumann": (neumann, 300),
    "neumann_plane": (neumann_plane, (12, 11)),
    "zero_row": (zero_row, 90),
    "empty_row": (lambda y: ring(y).at[5].set(0.0), 90),
    "empty_column": (lambda y: ring(y.at[5].set(0.0)), 90),
    "crowded_column": (crowded, 90),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("diagonal", "auto"),
        ("neumann", "auto"),
        ("neumann_plane", "klu"),
        ("neumann_plane", "blocks"),
        ("zero_row", "klu"),
        ("zero_row", "blocks"),
        ("empty_row", "klu"),
        ("empty_column", "klu"),
        ("crowded_column", "klu"),
    ],
)
def test_singular_systems_fail_and_never_raise(name, backend):
    fn, shape = SINGULAR[name]
    y = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1, shape))
    operator = jacobian_of(fn, y)
    consistent, inconsistent = operator.mv(like(y)), like(y)
    for b in (consistent, inconsistent):
        x, x_t, ok = both_ways(fn, y, b, backend)
        assert not bool(ok)
        assert np.all(np.isnan(x))
        assert np.all(np.isnan(x_t))


@pytest.mark.parametrize("backend", ["klu", "blocks"])
def test_a_singular_lane_leaves_the_others_alone(backend):
    def solve(a, y):
        operator = jacobian_of(lambda y: neumann_plane(y) + a * y, y)
        return solve_by_rule(operator, y, SparseDirect(backend))

    y = vector(99).reshape(9, 11)
    x = jax.jit(jax.vmap(solve, in_axes=(0, None)))(jnp.array([1.0, 0.0, -2.0]), y)
    assert np.all(np.isnan(x[1]))
    for i, a in ((0, 1.0), (2, -2.0)):
        matrix = dense(jacobian_of(lambda y, a=a: neumann_plane(y) + a * y, y))
        expected = np.linalg.solve(matrix, y.reshape(-1))
        np.testing.assert_allclose(flat(x[i]), expected, rtol=1e-9)


def test_a_zero_row_of_a_complex_lane_leaves_the_others_alone():
    y = jax.lax.complex(vector(90), vector(90, 1))

    def solve(row):
        operator = jacobian_of(lambda y: ring(y).at[4].multiply(row), y)
        return solve_by_rule(operator, y, SparseDirect("klu"))

    x = jax.jit(jax.vmap(solve))(jnp.array([1.0, 0.0], complex))
    assert np.all(np.isnan(x[1]))
    expected = np.linalg.solve(dense(lx.JacobianLinearOperator(with_args(ring), y)), y)
    np.testing.assert_allclose(x[0], expected, rtol=1e-9)


def test_derivatives_of_a_state_that_its_condition_does_not_determine_are_nan():
    def condition(y, a):
        return jax.lax.dynamic_update_slice(3 * y, jnp.sin(y[:5]), (20,)) - a

    def root(a):
        given = eqi.Root(condition), jnp.ones(100), a
        return eqi.implicit_solution(*given, linear_solver=SparseDirect())

    every = jnp.arange(3.0)
    for derivative in (jax.jacfwd(root), jax.grad(lambda a: jnp.sum(root(a)))):
        assert np.all(np.isnan(jax.jit(jax.vmap(derivative))(every)))


@EVERY
def test_zero_right_hand_side_gives_zero(name):
    fn, y = STATES[name]
    x, x_t, ok = both_ways(fn, y, jtu.tree_map(jnp.zeros_like, y))
    assert bool(ok)
    assert not np.any(flat(x))
    assert not np.any(flat(x_t))


def test_nonfinite_entries_fail():
    fn, y = STATES["diffusion"]
    x, _, ok = both_ways(fn, y.at[3].set(jnp.nan), like(y))
    assert not bool(ok)
    assert np.all(np.isnan(x))


@pytest.mark.parametrize("fn", [ring, diffusion])
def test_badly_scaled_equations_are_not_taken_for_singular(fn):
    units, y = 10.0 ** jnp.linspace(-9, 9, 90), vector(90)
    x, _, ok = both_ways(lambda y: units * fn(y), y, units * y)
    assert bool(ok)
    expected = np.linalg.solve(dense(jacobian_of(fn, y)), y)
    np.testing.assert_allclose(flat(x), expected, rtol=1e-9)


@pytest.mark.parametrize("pivot", [1e-1, 1e-2, 2e-3])
def test_blocks_lose_no_digits_of_a_part_beside_a_larger_one(pivot):
    # A Laplacian with large solutions, and a part that needs other pivots than those of
    # its blocks, of condition 3.
    m, n, q = 300, 64, 16

    def residual(y, b):
        up, w = jnp.pad(y["u"], 1), jnp.pad(y["v"], q)
        near = w[q - 1 : -q - 1] + w[q + 1 : n + q + 1] + y["v"]
        far = w[: -2 * q] + w[2 * q :]
        laplacian = 2 * y["u"] - up[:-2] - up[2:]
        return {"u": laplacian - b["u"], "v": far + pivot * near - b["v"]}

    draws = np.random.default_rng(0).normal(size=m + n)
    b = {
        "u": jnp.asarray(draws[:m], jnp.float32),
        "v": jnp.asarray(draws[m:], jnp.float32),
    }
    y = jtu.tree_map(jnp.zeros_like, b)
    matrix = np.asarray(
        jax.jacfwd(lambda v: residual({**y, "v": v}, b)["v"])(y["v"]), float
    )
    wanted = np.linalg.solve(matrix, draws[m:]), np.linalg.solve(matrix.T, draws[m:])

    @jax.jit
    def both(b):
        solution = lambda b: eqi.implicit_solution(
            eqi.Root(residual), y, b, linear_solver=SparseDirect(backend="blocks")
        )
        return jax.jvp(solution, (b,), (b,))[1]["v"], jax.vjp(solution, b)[1](b)[0]["v"]

    for got, want in zip(both(b), wanted, strict=True):
        # The last one loses too many of them to bring all back.
        if pivot < 1e-2 and np.isnan(got).all():
            continue
        np.testing.assert_allclose(got, want, atol=1e-5 * np.max(np.abs(want)))


def test_elimination_that_loses_the_digits_is_no_singular_matrix():
    # Wilkinson's matrix, whose last pivot is a power of two, and its condition is not.
    n = 120
    matrix = np.eye(n) - np.tri(n, k=-1)
    matrix[:, -1] = 1
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    b = jnp.asarray(np.random.default_rng(0).normal(size=n))
    solution = lx.linear_solve(operator, b, SparseDirect(), throw=False)
    assert np.isnan(solution.value).all()
    assert solution.result == lx.RESULTS.breakdown
    assert solution.stats["condition_estimate"] < 1e3


REDUCTIONS = {
    "all": lambda v: 3 * v + jax.lax.reduce(v, 0.0, lambda a, b: a + b * 1.0, (0,)),
    "rows": lambda v: (
        3 * v.reshape(6, 6)
        + jax.lax.reduce(v.reshape(6, 6), 0.0, lambda a, b: a + 1.0 * b, (1,))[:, None]
    ).reshape(-1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_body_of_a_reduction_is_no_call(name):
    struct = jax.ShapeDtypeStruct((36,), jnp.float64)
    operator = lx.FunctionLinearOperator(REDUCTIONS[name], struct)
    b = jnp.arange(36.0)
    x = lx.linear_solve(operator, b, eqi.AutoLinearSolver()).value
    np.testing.assert_allclose(x, np.linalg.solve(operator.as_matrix(), b), atol=1e-8)
    with pytest.raises(ValueError, match="cannot find the sparsity"):
        lx.linear_solve(operator, b, SparseDirect())


def test_an_operator_that_is_not_linear_is_a_breakdown():
    struct = jax.ShapeDtypeStruct((90,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda x: 2 * ring(x) + x**2, struct)
    solver = SparseDirect()
    solve = jax.jit(lambda b: solver.compute(solver.init(operator, {}), b, {}))
    x, result, _ = solve(vector(90))
    assert bool(result == lx.RESULTS.breakdown)
    assert np.all(np.isnan(x))


def test_diagonals_come_from_the_jaxpr_without_products():
    def products(fn):
        init = lambda y: SparseDirect().init(jacobian_of(fn, y), {})
        return "f64[4,20]" in str(jax.make_jaxpr(init)(vector(20)))

    # One for each colour, and one to compare with.
    assert not products(diffusion)
    assert products(lambda y: diffusion(y).at[0].set(y[0]))


def test_what_a_stencil_has_beside_its_diagonals_must_be_zero():
    struct, solver = jax.ShapeDtypeStruct((20,), jnp.float64), SparseDirect()

    @jax.jit
    def solve(b, wall):
        mv = lambda v: 2 * v + jnp.concatenate([jnp.full(1, wall), v[:-1]])
        operator = lx.FunctionLinearOperator(mv, struct)
        return solver.compute(solver.init(operator, {}), b, {})[:2]

    x, result = solve(vector(20), 0.0)
    assert bool(result == lx.RESULTS.successful)
    np.testing.assert_allclose(2 * x + np.append(0, x[:-1]), vector(20), rtol=EXACT)
    x, result = solve(vector(20), 1.0)
    assert bool(result == lx.RESULTS.breakdown)
    assert np.all(np.isnan(x))


def test_a_large_dense_operator_is_refused():
    operator = jacobian_of(lambda y: y + jnp.sum(y), jnp.ones(2000))
    with pytest.raises(ValueError, match="got a dense operator"):
        SparseDirect().init(operator, {})


# --- Optional dependencies ---------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch):
    for name in ("asdex", "klujax"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(_klu, "_LOADED", {})
    monkeypatch.setattr(_pattern, "_CACHE", {})
    _sparse_plans.plan_for.cache_clear()


@pytest.mark.usefixtures("nothing_installed")
def test_bands_need_no_optional_dependency():
    for name in ("diffusion", "stencil"):
        fn, y = STATES[name]
        b, solver, operator = like(y), SparseDirect(), jacobian_of(fn, y)
        solve = jax.jit(lambda b: solver.compute(solver.init(operator, {}), b, {}))  # noqa: B023
        x, result, _ = solve(b)
        assert bool(result == lx.RESULTS.successful)
        expected = np.linalg.solve(dense(operator), flat(b))
        np.testing.assert_allclose(flat(x), expected, rtol=EXACT)


def test_an_operation_that_asdex_does_not_know_is_refused_in_our_words():
    pytest.importorskip("asdex")
    circulant = lambda y: y + 0.1 * jnp.fft.ifft(jnp.fft.fft(y)).real
    operator = jacobian_of(circulant, jnp.ones(8))
    with pytest.raises(ValueError, match="`SparseDirect` cannot find .*'fft'.*Pass an"):
        SparseDirect().init(operator, {})


@pytest.mark.usefixtures("nothing_installed")
def test_missing_dependencies_name_the_extra():
    wide = jacobian_of(plane, jnp.ones((20, 20)))
    with pytest.raises(ImportError, match=r"pip install eqximplicit\[sparse\]"):
        SparseDirect().init(wide, {})
    with pytest.raises(ImportError, match=r"pip install eqximplicit\[sparse\]"):
        SparseDirect("klu").init(jacobian_of(*STATES["stencil"]), {})
    unknown = jacobian_of(*STATES["scanned"])
    assert detect_structure(unknown) is None
    with pytest.raises(ImportError, match=r"pip install eqximplicit\[sparse\]"):
        SparseDirect().init(unknown, {})


def test_without_x64_and_with_the_configuration_untouched():
    program = """
    import jax, jax.numpy as jnp, lineax as lx, numpy as np
    from eqximplicit.linear_solvers.sparse import SparseDirect
    names = ("jax_enable_x64", "jax_platform_name")
    before = [jax.config.read(n) for n in names]
    fn = lambda y, _: 3 * y + jnp.sin(jnp.roll(y, 1)) - 0.5 * jnp.roll(y, -2) ** 2
    y = jnp.linspace(0.1, 1.0, 90)
    operator = lx.JacobianLinearOperator(fn, y)
    solution = jax.jit(lambda b: lx.linear_solve(operator, b, SparseDirect("klu")))(y)
    expected = np.linalg.solve(np.asarray(operator.as_matrix(), np.float64), y)
    assert solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.value, expected, atol=2e-5)
    assert [jax.config.read(n) for n in names] == before
    """
    code = textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def chain_of(n):
    """A non-symmetric tridiagonal map that no Picard iteration could solve."""
    draw = np.random.default_rng(n)
    lower, middle, upper = draw.normal(size=(3, n))
    middle = middle + 4 * np.sign(middle)
    matrix = np.diag(middle) + np.diag(lower[1:], -1) + np.diag(upper[:-1], 1)

    def mv(x):
        wide = jnp.pad(x, 1)
        return lower * wide[:-2] + middle * x + upper * wide[2:]

    return matrix, lx.FunctionLinearOperator(mv, jax.ShapeDtypeStruct((n,), float))


@pytest.mark.parametrize("n", [20, pytest.param(33, marks=pytest.mark.slow), 300])
def test_the_default_finds_bands(n):
    matrix, operator = chain_of(n)
    chosen = eqi.AutoLinearSolver().select(operator)
    assert ("tridiagonal by its jaxpr" in chosen.reason) == (n > 32)
    solve = lambda op, b: lx.linear_solve(op, b, eqi.AutoLinearSolver()).value
    b = np.random.default_rng(0).normal(size=(3, n))
    found = jax.jit(lambda b: jax.vmap(lambda b: solve(operator, b))(b))(b)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, b.T).T, rtol=1e-9)
    transposed = jax.jit(lambda b: solve(operator.T, b))(b[0])
    np.testing.assert_allclose(transposed, np.linalg.solve(matrix.T, b[0]), rtol=1e-9)


def test_the_default_does_not_take_a_full_matrix_for_bands():
    matrix = np.eye(64) + 0.1 * np.random.default_rng(0).normal(size=(64, 64)) / 8
    full = lambda x: jnp.asarray(matrix) @ x
    operator = lx.FunctionLinearOperator(full, jax.ShapeDtypeStruct((64,), float))
    assert "matrix-free" in eqi.AutoLinearSolver().select(operator).reason
    _, bands = chain_of(64)
    symmetric = lx.TaggedLinearOperator(bands, lx.symmetric_tag)
    # It may be singular, for which elimination has no answer.
    assert "conjugate gradients" in eqi.AutoLinearSolver().select(symmetric).reason


def test_default_derivative_of_an_implicit_step_of_diffusion():
    n, dt = 400, 10.0

    def residual(u, k):
        flux = k * jnp.diff(jnp.pad(u, 1))
        return u - jnp.sin(jnp.linspace(0, 3, n)) - dt * jnp.diff(flux)

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(1e-10, 1e-10))
    k = np.random.default_rng(0).uniform(0.5, 1.5, n + 1)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(layer(jnp.zeros(n), k) ** 2)))(k)

    d = np.diff(np.eye(n + 1), axis=0)
    pad = np.eye(n + 2, n, -1)
    differences = np.diff(np.eye(n + 2), axis=0) @ pad
    matrix = np.eye(n) - dt * d @ (k[:, None] * differences)
    u = np.linalg.solve(matrix, np.sin(np.linspace(0, 3, n)))
    adjoint = np.linalg.solve(matrix.T, 2 * u)
    exact = dt * (d.T @ adjoint) * (differences @ u)
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("state", "inside"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float16),
        (jnp.float64, jnp.float32),
        *(
            pytest.param(state, inside, marks=pytest.mark.slow)
            for state, inside in (
                (jnp.bfloat16, jnp.float16),
                (jnp.bfloat16, jnp.float32),
                (jnp.float32, jnp.bfloat16),
                (jnp.float32, jnp.float32),
                (jnp.float64, jnp.bfloat16),
                (jnp.float64, jnp.float16),
            )
        ),
    ],
)
def test_default_takes_no_bands_from_products_of_lower_precision(state, inside):
    def fn(y, w):
        return (0.5 * jnp.tanh(y.astype(inside))).astype(state) + w

    def total(w):
        layer = eqi.ImplicitFunction(eqi.FixedPoint(fn), throw=False)
        return jnp.sum(layer(jnp.zeros_like(w), w).astype(jnp.float32))

    w = jnp.linspace(0.3, 0.4, 100).astype(state)
    gradient = jax.jit(jax.grad(total))(w).astype(jnp.float64)
    y = np.zeros(100)
    for _ in range(100):
        y = 0.5 * np.tanh(y) + np.linspace(0.3, 0.4, 100)
    np.testing.assert_allclose(gradient, 1 / (1 - 0.5 / np.cosh(y) ** 2), rtol=0.02)


def test_default_asks_the_iterations_where_elimination_has_no_answer():
    # A condition number of 5e5 is beyond what bands in float32 are trusted with.
    n = 2000
    x = np.sin(np.pi * np.arange(1, n + 1) / (n + 1))

    def residual(y, w):
        wide = jnp.pad(y, 1)
        return 2 * y - wide[:-2] - wide[2:] - w

    def total(w):
        root = eqi.implicit_solution(eqi.Root(residual), jnp.zeros_like(w), w)
        return jnp.sum(root * jnp.asarray(x, w.dtype))

    gradient = jax.jit(jax.grad(total))(jnp.zeros(n, jnp.float32))
    # A sine is an eigenvector.
    exact = x / (4 * np.sin(np.pi / (2 * (n + 1))) ** 2)
    np.testing.assert_allclose(gradient, exact, rtol=0.05, atol=0.01 * exact.max())


@pytest.mark.slow
def test_products_that_do_not_fit_are_refused_with_their_bytes():
    """A dense row and a dense column: every column has a colour of its own."""

    def arrow(y, a):
        first = 10 * y[:1] + 0.1 * jnp.sum(y[1:])
        return jnp.concatenate([first, 3 * y[1:] + 0.2 * y[0]]) - a

    y, small = jnp.ones(400), eqi.SparseDirect(max_bytes=10_000)
    solution = lambda a, solver: eqi.implicit_solution(
        eqi.Root(arrow), y, a, linear_solver=solver
    )
    with pytest.raises(ValueError, match="would materialise a 400 x 400 .* 1280000 b"):
        jax.jacfwd(lambda a: solution(a, small))(1.0)
    slope = jax.jacfwd(lambda a: solution(a, eqi.SparseDirect()))(1.0)
    matrix = np.asarray(jax.jacfwd(lambda y: arrow(y, 0.0))(y))
    np.testing.assert_allclose(slope, np.linalg.solve(matrix, np.ones(400)), rtol=1e-12)
