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
