"""The DEQ layer, the budget that accepts, and the Jacobian's two numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import Neumann
from eqximplicit.nn import (
    DEQ,
    FixedBudget,
    jacobian_frobenius_squared,
    spectral_radius,
)
from eqximplicit.solvers import AutoFixedPoint

HIDDEN, INPUT, BATCH = 5, 3, 4
SOLVED = 3e-8  # the solver's tolerance, times a condition number below 3
# Cheap to compile; the default solver has tests of its own.
PLAIN = optx.FixedPointIteration(rtol=1e-8, atol=1e-8)


class Cell(eqx.Module):
    recur: jax.Array
    inject: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.recur @ z + self.inject @ x)


def make_cell(size=0.6):
    """A cell whose recurrent matrix has the spectral norm `size`."""
    rng = np.random.default_rng(0)
    recur = rng.standard_normal((HIDDEN, HIDDEN))
    return Cell(
        jnp.asarray(size * recur / np.linalg.norm(recur, 2)),
        jnp.asarray(rng.standard_normal((HIDDEN, INPUT))),
    )


X = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, INPUT)))
TARGET = jnp.asarray(np.random.default_rng(2).standard_normal(HIDDEN))


def solution_in_numpy(cell, x):
    recur, inject, x = (np.asarray(a, float) for a in (cell.recur, cell.inject, x))
    drive = inject @ x
    z = np.zeros(HIDDEN)
    for _ in range(2000):
        z = np.tanh(recur @ z + drive)
    return z


def gradients_in_numpy(cell, x, z, ct_z, inverse=np.linalg.inv):
    """The cotangents of recur, inject and x: the theorem with dense matrices at z."""
    recur, inject, x = (np.asarray(a, float) for a in (cell.recur, cell.inject, x))
    slope = 1 - np.tanh(recur @ z + inject @ x) ** 2
    jacobian = slope[:, None] * recur
    u = slope * (inverse(np.eye(HIDDEN) - jacobian).T @ ct_z)
    return np.outer(u, z), np.outer(u, x), inject.T @ u


@eqx.filter_jit
def value_and_gradients(layer, x, z0=None, key=None):
    def loss(layer_and_x):
        layer, x = layer_and_x
        z = layer(x, z0=z0, key=key)
        return jnp.vdot(TARGET, z), z

    (_, z), grads = eqx.filter_value_and_grad(loss, has_aux=True)((layer, x))
    return z, grads


def assert_gradients(grads, expected, tol):
    layer, x = grads
    for got, want in zip(
        (layer.cell.recur, layer.cell.inject, x), expected, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=tol)


# --- The layer, exactly


def test_value_and_exact_gradients_are_those_of_dense_algebra():
    cell, x = make_cell(), X[0]
    z, grads = value_and_gradients(DEQ(cell), x)
    want = solution_in_numpy(cell, x)
    np.testing.assert_allclose(z, want, rtol=0, atol=SOLVED)
    assert_gradients(grads, gradients_in_numpy(cell, x, want, TARGET), 20 * SOLVED)


def test_gradients_of_a_map_that_plain_iteration_cannot_solve():
    cell, x = make_cell(2.5), X[0]
    layer = DEQ(cell, optx.Newton(rtol=1e-12, atol=1e-12))
    z, grads = value_and_gradients(layer, x)
    assert np.max(np.abs(np.tanh(cell.recur @ z + cell.inject @ x) - z)) < 1e-11
    assert_gradients(grads, gradients_in_numpy(cell, x, np.asarray(z), TARGET), 1e-9)


def test_forward_mode_is_the_transpose_of_reverse_mode():
    layer, x = DEQ(make_cell(), PLAIN), X[0]
    forward = jax.jit(jax.jacfwd(layer))(x)
    reverse = jax.jit(jax.jacrev(layer))(x)
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=1e-12)


def test_vmap_equals_batched_state_equals_loop():
    cell = make_cell()

    def batched(z, x):
        return jax.vmap(cell)(z, x)

    one_by_one = np.stack([solution_in_numpy(cell, x) for x in X])
    by_vmap = jax.jit(jax.vmap(DEQ(cell, PLAIN)))(X)
    at_once = DEQ(batched, PLAIN)(X, z0=jnp.zeros((BATCH, HIDDEN)))
    np.testing.assert_allclose(by_vmap, one_by_one, rtol=0, atol=SOLVED)
    np.testing.assert_allclose(at_once, one_by_one, rtol=0, atol=SOLVED)


def test_gradient_of_vmapped_layer_sums_the_examples():
    cell = make_cell()

    @eqx.filter_jit
    def gradient(layer):
        return eqx.filter_grad(lambda l: jnp.sum(jax.vmap(l)(X) @ TARGET))(layer)

    each = [gradients_in_numpy(cell, x, solution_in_numpy(cell, x), TARGET) for x in X]
    grads = gradient(DEQ(cell, PLAIN)).cell
    np.testing.assert_allclose(grads.recur, sum(g[0] for g in each), atol=1e-6)
    np.testing.assert_allclose(grads.inject, sum(g[1] for g in each), atol=1e-6)


def test_lambda_cell_has_gradient_of_what_it_captured():
    cell, x = make_cell(), X[0]

    def loss(recur):
        z0 = jnp.zeros(HIDDEN)
        layer = DEQ(lambda z, x: jnp.tanh(recur @ z + cell.inject @ x))
        return jnp.vdot(TARGET, layer(x, z0=z0))

    want, _, _ = gradients_in_numpy(cell, x, solution_in_numpy(cell, x), TARGET)
    np.testing.assert_allclose(jax.grad(loss)(cell.recur), want, atol=20 * SOLVED)


def test_memory_of_the_gradient_does_not_grow_with_steps():
    def bytes_used(num_steps):
        budget = FixedBudget(optx.FixedPointIteration(rtol=0.0, atol=0.0), num_steps)
        layer = DEQ(make_cell(), budget, max_steps=None)
        lowered = value_and_gradients.lower(layer, X[0])
        return lowered.compile().compiled.memory_analysis().temp_size_in_bytes

    assert bytes_used(2000) == bytes_used(2)


# --- The shape of the state


class ConvCell(eqx.Module):
    conv: eqx.nn.Conv2d
    inject: eqx.nn.Conv2d

    def __call__(self, z, x):
        return jnp.tanh(0.2 * self.conv(z) + self.inject(x))


def conv_cell():
    k1, k2 = jax.random.split(jax.random.key(0))
    return ConvCell(
        eqx.nn.Conv2d(6, 6, 3, padding=1, key=k1),
        eqx.nn.Conv2d(1, 6, 3, padding=1, key=k2),
    )


class TwoPartCell(eqx.Module):
    def initial_state(self, x):
        return {"slow": jnp.zeros(2), "fast": jnp.zeros(x.shape)}

    def __call__(self, z, x):
        slow = 0.5 * z["slow"] + jnp.sum(x)
        return {"slow": slow, "fast": 0.25 * z["fast"] + x}


@pytest.mark.parametrize(
    ("cell", "x", "shape"),
    [
        (lambda z, x: 0.5 * z + x, jnp.ones(7), (7,)),
        (lambda z, x: 0.5 * z + x.astype(z.dtype), jnp.arange(7), (7,)),
        (lambda z, x: jnp.tanh(0.1 * jnp.mean(z) + x[:2]), jnp.ones(7), (2,)),
        (make_cell(), X[0], (HIDDEN,)),
        (conv_cell(), jnp.ones((1, 8, 8)), (6, 8, 8)),
        (lambda z, x: 0.5 * z + x, jnp.array(1.0), ()),
        (lambda z, x: 0.5 * z + x[0] * x[1]["b"], (jnp.ones(3), {"b": 2.0}), (3,)),
    ],
    ids=["as x", "integers", "broadcast", "hidden size", "channels", "scalar", "tree"],
)
def test_state_shape_is_inferred_from_the_cell(cell, x, shape):
    assert DEQ(cell, PLAIN)(x).shape == shape


@pytest.mark.parametrize("x", [0.3, 1, {"a": 0.3}], ids=["float", "integer", "tree"])
def test_python_numbers_are_inputs_like_scalar_arrays(x):
    layer = DEQ(lambda z, x: 0.5 * z + sum(jtu.tree_leaves(x)), PLAIN)
    z = layer(x)
    assert z.shape == ()
    np.testing.assert_allclose(z, 2 * jtu.tree_leaves(x)[0], atol=1e-7)


def test_cell_may_say_its_initial_state_itself():
    z = DEQ(TwoPartCell(), PLAIN)(X[0])
    np.testing.assert_allclose(z["slow"], np.full(2, 2 * np.sum(X[0])), atol=1e-7)
    np.testing.assert_allclose(z["fast"], X[0] / 0.75, atol=1e-7)


def test_float32_input_gives_float32_state():
    cell = make_cell()
    single = jtu.tree_map(lambda a: a.astype(jnp.float32), (cell, X[0]))
    z = DEQ(single[0])(single[1])
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, solution_in_numpy(cell, X[0]), atol=1e-4)


def test_state_that_cannot_be_told_is_asked_for():
    cell = make_cell()
    layer = DEQ(lambda z, x: jnp.tanh(cell.recur @ z + cell.inject @ x))
    with pytest.raises(
        ValueError, match=r"cannot be told.*tried the shapes \[3\].*`z0`"
    ):
        layer(X[0])


def test_cell_of_another_shape_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"`Cell` of a DEQ.*returned float64\[5\] for the state float64\[1\]",
    ):
        DEQ(Cell(jnp.ones((HIDDEN, 1)), make_cell().inject))(X[0], z0=jnp.zeros(1))


def test_cell_of_another_structure_is_refused_by_name():
    with pytest.raises(ValueError, match=r"returned \('float64\[3\]',\) for the state"):
        DEQ(lambda z, x: (z,))(X[0], z0=jnp.zeros(3))


# --- Keys


class DropoutCell(eqx.Module):
    cell: Cell
    dropout: eqx.nn.Dropout

    def __call__(self, z, x, *, key=None):
        return self.dropout(self.cell(z, x), key=key)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_dropout_mask_is_fixed_along_the_solve(make_key):
    cell = DropoutCell(make_cell(), eqx.nn.Dropout(0.4))
    key = make_key(3)
    z, grads = value_and_gradients(DEQ(cell, PLAIN), X[0], key=key)
    mask = np.asarray(cell.dropout(jnp.ones(HIDDEN), key=key))
    assert 0 < np.sum(mask == 0) < HIDDEN

    recur, drive = np.asarray(cell.cell.recur), np.asarray(cell.cell.inject @ X[0])
    want = np.zeros(HIDDEN)
    for _ in range(2000):
        want = mask * np.tanh(recur @ want + drive)
    np.testing.assert_allclose(z, want, atol=SOLVED)
    slope = mask * (1 - np.tanh(recur @ want + drive) ** 2)
    ct = np.linalg.solve((np.eye(HIDDEN) - slope[:, None] * recur).T, TARGET)
    np.testing.assert_allclose(
        grads[1], cell.cell.inject.T @ (slope * ct), atol=20 * SOLVED
    )


def test_inference_mode_needs_no_key():
    cell = DropoutCell(make_cell(), eqx.nn.Dropout(0.4))
    layer = eqx.nn.inference_mode(DEQ(cell, PLAIN))
    np.testing.assert_allclose(
        layer(X[0]), solution_in_numpy(cell.cell, X[0]), atol=SOLVED
    )


# --- In a model


@pytest.mark.slow
def test_sequential_passes_each_example_and_key_through():
    cell = DropoutCell(make_cell(), eqx.nn.Dropout(0.4))
    head = eqx.nn.Linear(HIDDEN, 2, key=jax.random.key(0))
    model = eqx.nn.Sequential([DEQ(cell, PLAIN), head])
    keys = jax.random.split(jax.random.key(1), BATCH)
    out = jax.jit(jax.vmap(lambda x, k: model(x, key=k)))(X, keys)
    first = DEQ(cell, PLAIN)(X[0], key=jax.random.split(keys[0], 2)[0])
    assert out.shape == (BATCH, 2)
    np.testing.assert_allclose(out[0], head(first), atol=1e-7)


def test_warm_start_in_sequential_needs_fewer_steps():
    def make():
        layer = DEQ(make_cell(0.9), PLAIN, warm_start=jnp.zeros(HIDDEN))
        return eqx.nn.Sequential([layer, eqx.nn.Lambda(jnp.sum)])

    model, state = eqx.nn.make_with_state(make)()
    layer = model[0]
    cold = layer.solve(X[0], state).stats["num_steps"]
    out, state = eqx.filter_jit(model)(X[0], state)
    warm = layer.solve(X[0], state).stats["num_steps"]
    want = solution_in_numpy(layer.cell, X[0])
    np.testing.assert_allclose(out, np.sum(want), atol=5 * SOLVED)
    np.testing.assert_allclose(state.get(layer.warm_start), want, atol=SOLVED)
    assert warm <= 2 < 10 < cold


def test_warm_start_carries_no_derivative():
    layer, state = eqx.nn.make_with_state(DEQ)(
        make_cell(), PLAIN, warm_start=jnp.zeros(HIDDEN)
    )

    @eqx.filter_jit
    def first_of_two(layer):
        _, after = layer(X[0], state)
        z, _ = layer(X[1], after)
        return jnp.vdot(TARGET, z)

    grads = eqx.filter_grad(first_of_two)(layer)
    z = solution_in_numpy(layer.cell, X[1])
    want = gradients_in_numpy(layer.cell, X[1], z, TARGET)
    np.testing.assert_allclose(grads.cell.recur, want[0], atol=20 * SOLVED)


def test_warm_start_of_each_example_under_vmap():
    layer, state = eqx.nn.make_with_state(DEQ)(
        make_cell(), PLAIN, warm_start=jnp.zeros(HIDDEN)
    )
    state = jtu.tree_map(lambda s: jnp.broadcast_to(s, (BATCH, *s.shape)), state)
    z, state = eqx.filter_jit(eqx.filter_vmap(layer))(X, state)
    np.testing.assert_allclose(state.get(layer.warm_start), z, rtol=0, atol=0)


def test_failed_solve_is_not_stored():
    def explode(z, x):
        return z**2 + x

    layer, state = eqx.nn.make_with_state(DEQ)(
        explode, PLAIN, throw=False, warm_start=jnp.full(3, 0.5)
    )
    _, state = layer(jnp.full(3, 10.0), state)
    np.testing.assert_allclose(state.get(layer.warm_start), np.full(3, 0.5), atol=0)


def test_stateful_and_stateless_calls_are_told_apart():
    with pytest.raises(ValueError, match=r"has a warm start: call it as"):
        DEQ(make_cell(), warm_start=jnp.zeros(HIDDEN))(X[0])
    _, state = eqx.nn.make_with_state(DEQ)(
        make_cell(), PLAIN, warm_start=jnp.zeros(HIDDEN)
    )
    with pytest.raises(ValueError, match=r"has no memory: construct it with"):
        DEQ(make_cell(), PLAIN)(X[0], state)


# --- Budgets

PICARD = optx.FixedPointIteration(rtol=0.0, atol=0.0)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_budget_accepts_an_unconverged_state_with_finite_gradients(num_steps):
    cell, x = make_cell(), X[0]
    layer = DEQ(cell, FixedBudget(PICARD, num_steps))
    z, grads = value_and_gradients(layer, x)
    stats = layer.solve(x).stats
    want = np.zeros(HIDDEN)
    for _ in range(num_steps):
        want = np.tanh(cell.recur @ want + cell.inject @ x)
    np.testing.assert_allclose(z, want, rtol=0, atol=1e-14)
    assert stats["num_steps"] == num_steps
    assert not stats["converged"]
    assert_gradients(grads, gradients_in_numpy(cell, x, want, TARGET), 1e-12)


def test_without_the_budget_the_same_solve_has_nan_gradients():
    layer = DEQ(make_cell(), PICARD, max_steps=3, throw=False)
    z, grads = value_and_gradients(layer, X[0])
    assert np.all(np.isfinite(z))
    assert np.all(np.isnan(grads[0].cell.recur))
    assert layer.solve(X[0]).result == eqi.RESULTS.nonlinear_max_steps_reached


def test_failing_solve_throws_by_default():
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of steps"):
        DEQ(make_cell(), PICARD, max_steps=3)(X[0])


def test_budget_stops_early_at_convergence():
    picard = optx.FixedPointIteration(rtol=1e-3, atol=1e-3)
    stats = DEQ(make_cell(), FixedBudget(picard, 200)).solve(X[0]).stats
    assert stats["converged"]
    assert stats["num_steps"] < 50


@pytest.mark.parametrize(
    "solver",
    [optx.Newton(rtol=1e-10, atol=1e-10), AutoFixedPoint(rtol=1e-10, atol=1e-10)],
    ids=["root finder", "default"],
)
def test_budget_wraps_other_solvers(solver):
    cell = make_cell()
    sol = DEQ(cell, FixedBudget(solver, 60)).solve(X[0])
    np.testing.assert_allclose(sol.value, solution_in_numpy(cell, X[0]), atol=1e-9)
    assert sol.stats["converged"]


def test_budget_may_be_an_array():
    cell, x = make_cell(), X[0]
    after = jax.jit(jax.vmap(lambda n: DEQ(cell, FixedBudget(PICARD, n))(x)))
    first = np.tanh(cell.inject @ x)
    second = np.tanh(cell.recur @ first + cell.inject @ x)
    np.testing.assert_allclose(after(jnp.array([1, 2])), [first, second], atol=1e-14)


def test_budget_works_in_optimistix():
    cell = make_cell()
    sol = optx.fixed_point(cell, FixedBudget(PICARD, 200), jnp.zeros(HIDDEN), X[0])
    np.testing.assert_allclose(sol.value, solution_in_numpy(cell, X[0]), atol=1e-12)


def test_state_that_is_not_finite_fails_within_the_budget():
    layer = DEQ(lambda z, x: jnp.exp(z) + x, FixedBudget(PICARD, 20), throw=False)
    z, grads = eqx.filter_jit(jax.value_and_grad(lambda x: layer(x)))(jnp.array(9.0))
    assert layer.solve(jnp.array(9.0)).result == eqi.RESULTS.nonfinite
    assert np.isnan(grads)


def test_bad_budgets_are_refused():
    with pytest.raises(TypeError, match=r"needs a fixed-point solver.*got BFGS"):
        FixedBudget(optx.BFGS(rtol=1e-3, atol=1e-3), 3)
    with pytest.raises(ValueError, match=r"`num_steps` must be at least 1; got 0"):
        FixedBudget(PICARD, 0)
    with pytest.raises(ValueError, match=r"budget of 30 steps exceeds `max_steps=20`"):
        DEQ(make_cell(), FixedBudget(PICARD, 30), max_steps=20)


# --- Mixed precision

BF16 = float(jnp.finfo(jnp.bfloat16).eps)


def test_bfloat16_cell_is_solved_in_float32():
    cell, x = jtu.tree_map(lambda a: a.astype(jnp.float32), (make_cell(), X[0]))
    seen = []

    def spy(z, x):
        seen.append((z.dtype, x.dtype))
        return cell(z.astype(jnp.float32), x.astype(jnp.float32)).astype(z.dtype)

    DEQ(spy, compute_dtype=jnp.bfloat16)(x, z0=jnp.zeros(HIDDEN, jnp.float32))
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))}

    layer = DEQ(cell, compute_dtype=jnp.bfloat16)
    single = jnp.asarray(TARGET, jnp.float32)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(layer):
        z = layer(x)
        return jnp.vdot(single, z), z

    (_, z), grads = loss(layer)
    want = solution_in_numpy(cell, x)
    assert z.dtype == jnp.float32
    assert grads.cell.recur.dtype == jnp.float32  # master weights, master gradients
    np.testing.assert_allclose(z, want, atol=8 * BF16)
    expected = gradients_in_numpy(cell, x, want, TARGET)
    np.testing.assert_allclose(grads.cell.recur, expected[0], atol=16 * BF16)
    np.testing.assert_allclose(grads.cell.inject, expected[1], atol=16 * BF16)


def test_default_adjoint_of_a_large_bfloat16_cell():
    # Above 2048 unknowns no factorisation stands behind the iteration.
    lanes, n = 40, 64
    draw = np.random.default_rng(3).normal
    recur, x = 0.5 * draw(size=(n, n)) / np.sqrt(n), draw(size=(lanes, n))
    cell = lambda z, x: jnp.tanh(z @ jnp.asarray(recur, z.dtype) + x)
    single = jnp.asarray(x, jnp.float32)
    norm = lambda z: optx.max_norm(z).astype(float)  # optimistix keeps it in float64
    plain = optx.FixedPointIteration(rtol=1e-2, atol=1e-2, norm=norm)
    layer = DEQ(cell, plain, compute_dtype=jnp.bfloat16)
    loss = lambda x: jnp.sum(layer(x, z0=jnp.zeros_like(x)) ** 2)
    slope = jax.jit(jax.grad(loss))(single)

    z = np.zeros_like(x)
    for _ in range(60):
        z = np.tanh(z @ recur + x)
    adjoint = 2 * z
    for _ in range(60):
        adjoint = 2 * z + (adjoint * (1 - z**2)) @ recur.T
    want = adjoint * (1 - z**2)
    slope = np.asarray(slope, float)
    assert np.linalg.norm(slope - want) < 4 * BF16 * np.linalg.norm(want)


def test_integer_compute_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`compute_dtype` must be a real floating"):
        DEQ(make_cell(), compute_dtype=jnp.int32)


# --- Approximate gradients


def neumann_inverse(num_terms, damping):
    """What a damped Neumann series of so many terms takes for the inverse of A."""

    def inverse(a):
        step = np.eye(len(a)) - damping * a
        powers = [np.linalg.matrix_power(step, k) for k in range(num_terms)]
        return damping * sum(powers)

    return inverse


@pytest.mark.parametrize(
    ("solver", "inverse"),
    [
        (Neumann(1), neumann_inverse(1, 1.0)),
        (Neumann(5, damping=0.5), neumann_inverse(5, 0.5)),
        (Neumann(3), neumann_inverse(3, 1.0)),
    ],
    ids=["JFB", "phantom", "truncated"],
)
def test_approximate_gradients_are_linear_solvers(solver, inverse):
    cell, x = make_cell(), X[0]
    z, grads = value_and_gradients(DEQ(cell, PLAIN, eqi.ImplicitAdjoint(solver)), x)
    want = gradients_in_numpy(cell, x, np.asarray(z), TARGET, inverse)
    assert_gradients(grads, want, 1e-12)
    exact = gradients_in_numpy(cell, x, np.asarray(z), TARGET)
    assert np.max(np.abs(want[0] - exact[0])) > 1e-2


def test_jacobian_free_gradient_is_that_of_one_more_application():
    cell, x = make_cell(), X[0]
    z = jnp.asarray(solution_in_numpy(cell, x))
    want = eqx.filter_grad(lambda cell: jnp.vdot(TARGET, cell(z, x)))(cell)
    jfb = DEQ(cell, PLAIN, eqi.ImplicitAdjoint(Neumann(1)))
    _, (grads, _) = value_and_gradients(jfb, x)
    np.testing.assert_allclose(grads.cell.recur, want.recur, rtol=0, atol=SOLVED)


# --- The Jacobian's two numbers


def linear(matrix):
    return lambda y, args: matrix @ y


def test_frobenius_estimate_is_exact_for_a_diagonal_jacobian():
    diagonal = jnp.array([0.5, -2.0, 3.0])
    got = jacobian_frobenius_squared(
        lambda y, a: a * y, jnp.ones(3), diagonal, key=jax.random.key(0)
    )
    np.testing.assert_allclose(got, 0.25 + 4 + 9, rtol=1e-14)


@pytest.mark.slow
def test_frobenius_estimate_is_unbiased_and_differentiable():
    cell, x = make_cell(), X[0]
    z = jnp.asarray(solution_in_numpy(cell, x))
    num_samples = 5_000

    @jax.jit
    @jax.value_and_grad
    def penalty(recur):
        fn = eqx.tree_at(lambda c: c.recur, cell, recur)
        return jacobian_frobenius_squared(
            fn, z, x, key=jax.random.key(0), num_samples=num_samples
        )

    @jax.value_and_grad
    def dense(recur):
        fn = eqx.tree_at(lambda c: c.recur, cell, recur)
        return jnp.sum(jax.jacobian(fn)(z, x) ** 2)

    value, grad = penalty(cell.recur)
    want_value, want_grad = dense(cell.recur)
    # The standard error of the estimates, each of a variance of about the value².
    standard_error = want_value / np.sqrt(num_samples)
    assert abs(value - want_value) < 5 * standard_error
    scale = float(jnp.max(jnp.abs(want_grad)))
    np.testing.assert_allclose(grad, want_grad, atol=0.1 * scale)


@pytest.mark.slow
def test_frobenius_estimate_of_a_tree_of_mixed_precision():
    def fn(y, _):
        return {"a": 2 * y["a"], "b": 3 * y["b"]}

    y = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((2, 2))}
    got = jacobian_frobenius_squared(fn, y, key=jax.random.key(0))
    np.testing.assert_allclose(got, 2 * 4 + 4 * 9, rtol=1e-6)


ROTATION = jnp.array([[0.0, -0.9], [0.9, 0.0]])


@pytest.mark.parametrize(
    ("matrix", "want"),
    [
        (jnp.diag(jnp.array([0.3, -0.8, 0.5])), 0.8),
        (jax.scipy.linalg.block_diag(ROTATION, 0.5 * jnp.eye(2)), 0.9),
        (jnp.zeros((3, 3)), 0.0),
        (jnp.eye(4, k=1), 0.0),
        (jnp.array([[0.5, 100.0], [0.0, 0.4]]), 0.5),
        (jnp.diag(jnp.array([0.7, -0.7, 0.1])), 0.7),
        (jnp.array([[2.0]]), 2.0),
    ],
    ids=[
        "real",
        "complex pair",
        "zero",
        "nilpotent",
        "far from normal",
        "opposite signs",
        "one",
    ],
)
def test_spectral_radius_of_a_known_matrix(matrix, want):
    y = jnp.ones(len(matrix))
    got = spectral_radius(linear(matrix), y, key=jax.random.key(0), num_steps=200)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_spectral_radius_of_a_cell_is_the_largest_eigenvalue():
    cell, x = make_cell(), X[0]
    z = DEQ(cell, PLAIN)(x)
    got = jax.jit(lambda z: spectral_radius(cell, z, x, key=jax.random.key(0)))(z)
    dense = np.linalg.eigvals(jax.jacobian(cell)(z, x))
    np.testing.assert_allclose(got, np.max(np.abs(dense)), rtol=1e-3)


@pytest.mark.slow
def test_jacobian_numbers_under_vmap():
    cell, key = make_cell(), jax.random.key(0)
    z = jax.vmap(DEQ(cell, PLAIN))(X)
    radii = jax.vmap(lambda z, x: spectral_radius(cell, z, x, key=key))(z, X)
    dense = np.linalg.eigvals(jax.vmap(jax.jacobian(cell))(z, X))
    np.testing.assert_allclose(radii, np.max(np.abs(dense), axis=1), rtol=1e-3)


@pytest.mark.parametrize("number", [jacobian_frobenius_squared, spectral_radius])
def test_jacobian_numbers_refuse_what_they_cannot_do(number):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="defined for a real state; got complex128"):
        number(lambda y, _: y, jnp.ones(2, jnp.complex128), key=key)
    with pytest.raises(ValueError, match="does not match the state"):
        number(lambda y, _: y[:1], jnp.ones(2), key=key)


def test_jacobian_numbers_refuse_empty_budgets():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        jacobian_frobenius_squared(lambda y, _: y, jnp.ones(2), key=key, num_samples=0)
    with pytest.raises(ValueError, match="`num_steps` must be at least 2; got 1"):
        spectral_radius(lambda y, _: y, jnp.ones(2), key=key, num_steps=1)


@pytest.mark.parametrize("n", [3, 40])
def test_budget_is_accepted_where_the_map_bends(n):
    # tanh(y) = y but at zero: a double root, from which three steps are far.
    solver = FixedBudget(optx.FixedPointIteration(rtol=1e-3, atol=1e-3), num_steps=3)
    condition = eqi.FixedPoint(lambda y, a: a * jnp.tanh(y))
    layer = eqi.ImplicitFunction(condition, solver)
    start, a = jnp.full(n, 0.5), jnp.ones(n)
    y = np.asarray(layer(start, a))
    slope = jax.jit(jax.grad(lambda a: jnp.sum(layer(start, a))))(a)
    np.testing.assert_allclose(slope, np.tanh(y) / np.tanh(y) ** 2, rtol=1e-6)
