"""The rule over random states, dtypes, tags and values, against a dense solve."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import eqximplicit as eqi

STATES = {
    "scalar": np.zeros(()),
    "nested": {"a": np.zeros(2), "b": (np.zeros((1, 2)), [np.zeros(())])},
    "two precisions": [np.zeros(2, np.float32), np.zeros((2, 1))],
    "complex": {"z": np.zeros(2, complex), "x": np.zeros(1)},
    "an empty leaf": (np.zeros(0), np.zeros(3, np.float32)),
}
TAGS = {
    "none": frozenset(),
    "symmetric": lx.symmetric_tag,
    "definite": lx.positive_semidefinite_tag,
}
PARAMETERS = 3
# Rounding times a condition number below 10, in the coarsest precision of the state.
TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-9}


def vector(state):
    """All numbers of a state, real and imaginary, in double precision."""
    parts = [
        part.ravel().astype(float)
        for leaf in jax.tree.leaves(state)
        for part in ([leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf])
    ]
    return jnp.concatenate(parts)


def unvector(numbers, like):
    leaves, start = [], 0
    for leaf in jax.tree.leaves(like):
        part = numbers[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
        if jnp.iscomplexobj(leaf):
            imaginary = numbers[start : start + leaf.size].reshape(leaf.shape)
            part, start = jax.lax.complex(part, imaginary), start + leaf.size
        leaves.append(part.astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def matrices(size, tags):
    """`M` and `N` of the residual `M y + y³/3 - N θ - c`; `M` is as the tag says."""
    rng = np.random.default_rng(size)
    m = np.eye(size) + 0.3 * rng.uniform(-1, 1, (size, size)) / size
    m = m if tags == "none" else (m + m.T) / 2
    return (-m if tags == "symmetric" else m), rng.normal(size=(size, PARAMETERS))


@functools.cache
def derivatives(state, tags):
    """Jitted `(y, theta, t_theta, ct) -> (t_y, ct_theta)`, all of them flat."""
    like = STATES[state]
    m, n = matrices(vector(like).size, tags)
    bend = -1.0 if tags == "symmetric" else 1.0  # so that ∂F/∂y stays regular

    def left(y):
        numbers = vector(y)
        return jnp.asarray(m) @ numbers + bend * numbers**3 / 3

    def residual(y, args):
        theta, constant = args
        return unvector(left(y) - jnp.asarray(n) @ theta - constant, like)

    @jax.jit
    def run(y, theta, t_theta, ct):
        y = unvector(y, like)
        constant = left(y) - jnp.asarray(n) @ theta
        condition = eqi.Root(residual, TAGS[tags])

        def solution(theta):
            return vector(eqi.implicit_solution(condition, y, (theta, constant)))

        t_y = jax.jvp(solution, (theta,), (t_theta,))[1]
        return t_y, jax.vjp(solution, theta)[1](ct)[0]

    return run, (m, n, bend)


def numbers(size):
    wide = st.floats(-2, 2, allow_subnormal=False)
    return st.lists(wide, min_size=size, max_size=size).map(np.array)


@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("state", STATES)
@settings(max_examples=20)
@given(data=st.data())
def test_derivative_is_that_of_a_dense_solve_in_both_modes(state, tags, data):
    run, (m, n, bend) = derivatives(state, tags)
    size = len(m)
    y, ct = data.draw(numbers(size)), data.draw(numbers(size))
    theta, t_theta = data.draw(numbers(PARAMETERS)), data.draw(numbers(PARAMETERS))
    y = np.asarray(vector(unvector(jnp.asarray(y), STATES[state])))  # as it is stored
    t_y, ct_theta = run(y, theta, t_theta, ct)
    jacobian = np.linalg.solve(m + bend * np.diag(y**2), n)
    coarsest = max(np.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(STATES[state]))
    tol = TOLERANCE[np.dtype(np.float32 if coarsest > 1e-10 else np.float64)]
    np.testing.assert_allclose(t_y, jacobian @ t_theta, rtol=tol, atol=10 * tol)
    np.testing.assert_allclose(ct_theta, ct @ jacobian, rtol=tol, atol=10 * tol)
