"""What the forward solver knows of the inverse serves the derivative."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

N = 6
DRAW = np.random.default_rng(0).normal
MATRIX = 2 * np.eye(N) + DRAW(size=(N, N)) / 2  # `I - MATRIX` does not contract
HESSIAN = MATRIX @ MATRIX.T / 4 + np.eye(N)
B, TANGENT, COTANGENT = (jnp.asarray(x) for x in DRAW(size=(3, N)))
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def root(y, b):
    return jnp.asarray(MATRIX) @ y + 0.1 * y**3 - b


def objective(y, b):
    return y @ (jnp.asarray(HESSIAN) @ y) / 2 + 0.025 * jnp.sum(y**4) - b @ y


CASES = {
    "Broyden": (eqi.Root(root), eqi.Broyden(**TIGHT), MATRIX),
    "Chord": (eqi.Root(root), optx.Chord(**TIGHT), MATRIX),
    "Chord of a fixed point": (
        eqi.FixedPoint(lambda y, b: y - root(y, b)),
        optx.Chord(**TIGHT),
        MATRIX,
    ),
    "BFGS": (eqi.Minimum(objective), optx.BFGS(**TIGHT), HESSIAN),
}


def derivatives(condition, solver, linear_solver, reuse=True):
    """The value, and its derivatives by both modes."""
    adjoint = eqi.ImplicitAdjoint(linear_solver, reuse=reuse)
    layer = eqi.ImplicitFunction(condition, solver, adjoint, throw=False)

    @jax.jit
    def run(b):
        solution = lambda b: layer(jnp.zeros(N), b)
        pushed = jax.jvp(solution, (b,), (TANGENT,))[1]
        return solution(b), pushed, jax.vjp(solution, b)[1](COTANGENT)[0]

    return run(B)


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_with_the_inverse_is_exact_where_it_diverges_without(name):
    condition, solver, linear = CASES[name]
    y, pushed, pulled = derivatives(condition, solver, eqi.Neumann(rtol=1e-9))
    matrix = linear + np.diag(0.3 * np.asarray(y) ** 2)
    np.testing.assert_allclose(pushed, np.linalg.solve(matrix, TANGENT), atol=1e-7)
    wanted = np.linalg.solve(matrix.T, COTANGENT)
    np.testing.assert_allclose(pulled, wanted, atol=1e-7)
    _, _, alone = derivatives(condition, solver, eqi.Neumann(rtol=1e-9), reuse=False)
    assert np.isnan(alone).all()


@pytest.mark.parametrize("name", CASES)
def test_one_term_is_the_inverse_of_the_solver_and_its_transpose(name):
    condition, solver, _ = CASES[name]
    _, pushed, pulled = derivatives(condition, solver, eqi.Neumann(1))
    np.testing.assert_allclose(COTANGENT @ pushed, pulled @ TANGENT, rtol=1e-10)


def test_one_term_with_the_factors_of_a_linear_equation_is_exact():
    condition = eqi.Root(lambda y, b: jnp.asarray(MATRIX) @ y - b)
    _, pushed, pulled = derivatives(condition, optx.Chord(**TIGHT), eqi.Neumann(1))
    np.testing.assert_allclose(pushed, np.linalg.solve(MATRIX, TANGENT), atol=1e-12)
    wanted = np.linalg.solve(MATRIX.T, COTANGENT)
    np.testing.assert_allclose(pulled, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "rtol"), [(eqi.Broyden(**TIGHT), 1e-3), (optx.Chord(**TIGHT), 5e-2)]
)
def test_the_inverse_of_each_lane_is_its_own(solver, rtol):
    # Of one number the secant is the derivative up to the last step, and the slope at
    # the guess is not far off.
    adjoint = eqi.ImplicitAdjoint(eqi.Neumann(5), reuse=True)
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, b: y**3 + y - b), solver, adjoint)
    b = jnp.linspace(0.5, 4.0, 7)
    y, slope = jax.vmap(jax.value_and_grad(lambda b: layer(b / 2, b)))(b)
    np.testing.assert_allclose(slope, 1 / (1 + 3 * y**2), rtol=rtol)


def test_a_complex_state_has_an_inverse_in_its_real_form():
    adjoint = eqi.ImplicitAdjoint(eqi.Neumann(rtol=1e-9), reuse=True)
    condition = eqi.Root(lambda z, c: z**2 - c)
    layer = eqi.ImplicitFunction(condition, eqi.Broyden(**TIGHT), adjoint)
    z, slope = jax.jvp(
        lambda c: layer(jnp.asarray(1.0 + 1.0j), c),
        (jnp.asarray(1.0 + 2.0j),),
        (jnp.asarray(0.3 - 0.4j),),
    )
    np.testing.assert_allclose(slope, (0.3 - 0.4j) / (2 * z), rtol=1e-7)


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (optx.Newton(**TIGHT), "`Newton` has none for a `Root`. Use `eqi.Broyden`"),
        (lambda y0, b: b, "a callable, or a solver on the host, has none"),
    ],
)
def test_a_solver_without_an_inverse_is_refused(solver, match):
    with pytest.raises(ValueError, match=match):
        derivatives(eqi.Root(root), solver, eqi.Neumann(1))


def test_two_preconditioners_and_other_drivers_are_refused():
    operator = lx.IdentityLinearOperator(jax.eval_shape(lambda: B))
    with pytest.raises(ValueError, match="Leave one of them out"):
        eqi.ImplicitAdjoint(options={"preconditioner": operator}, reuse=True)
    adjoint = eqi.ImplicitAdjoint(reuse=True)
    with pytest.raises(ValueError, match="optimistix does not tell"):
        optx.root_find(root, optx.Chord(**TIGHT), jnp.zeros(N), B, adjoint=adjoint)
