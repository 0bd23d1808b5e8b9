"""The rule over random states, dtypes, tags and values, against a dense solve."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
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


class Pair(NamedTuple):
    first: Any
    second: Any


class Box(eqx.Module):
    inside: Any


SHAPES = ((), (1,), (2,), (2, 3))
HALF = (jnp.bfloat16, jnp.float16)
DTYPES = (*HALF, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
# Its matrix is rounded in the precision of the state on the way in and on the way out.
HALF_ROUNDINGS = 16

LEAVES = st.builds(jnp.zeros, st.sampled_from(SHAPES), st.sampled_from(DTYPES))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Box, inner)
    ),
    max_leaves=4,
)


def parity(matrix):
    return np.arange(len(matrix)) % 2


OPERATORS = {
    "none": (frozenset(), lambda m: m),
    "symmetric": (lx.symmetric_tag, lambda m: m + m.T - 4 * np.diag(parity(m))),
    "positive": (lx.positive_semidefinite_tag, lambda m: m + m.T),
    "negative": (lx.negative_semidefinite_tag, lambda m: -m - m.T),
    "diagonal": (lx.diagonal_tag, lambda m: np.diag(np.diag(m))),
    "lower triangular": (lx.lower_triangular_tag, np.tril),
}


class LinearCase(eqx.Module):
    """`A y = N theta + c` with the solution `y`, and directions to push and pull."""

    like: Any
    y: Any
    a: Any
    n: Any
    theta: Any
    t_theta: Any
    ct: Any
    tag: object = eqx.field(static=True)

    @eqx.filter_jit
    def derivatives(self):
        """The value, its tangent and its cotangent, the last two as flat numbers."""
        constant = jnp.asarray(self.a) @ vector(self.y) - self.n @ self.theta

        def residual(y, theta):
            left = jnp.asarray(self.a) @ vector(y)
            return unvector(left - self.n @ theta - constant, self.like)

        condition = eqi.Root(residual, self.tag)
        solution = lambda theta: eqi.implicit_solution(condition, self.y, theta)
        numbers = lambda theta: vector(solution(theta))
        t_y = jax.jvp(numbers, (self.theta,), (self.t_theta,))[1]
        ct_theta = jax.vjp(numbers, self.theta)[1](self.ct)[0]
        return solution(self.theta), t_y, ct_theta


@st.composite
def linear_cases(draw):
    like, name = draw(TREES), draw(st.sampled_from(sorted(OPERATORS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, (tag, shaped) = vector(like).size, OPERATORS[name]
    matrix = shaped(np.eye(size) + 0.3 * rng.uniform(-1, 1, (size, size)) / size)
    n, y = rng.normal(size=(size, PARAMETERS)), rng.uniform(-2, 2, size)
    theta, t_theta = rng.normal(size=(2, PARAMETERS))
    y = unvector(jnp.asarray(y), like)
    return LinearCase(like, y, matrix, n, theta, t_theta, rng.normal(size=size), tag)


def tolerance(state):
    """That of the coarsest precision of a state."""
    coarsest = max(jax.tree.leaves(state), key=lambda x: float(jnp.finfo(x.dtype).eps))
    limits = jnp.finfo(coarsest.dtype)
    half = limits.bits == 16
    return HALF_ROUNDINGS * float(limits.eps) if half else TOLERANCE[limits.dtype]


def assert_linear_rule(case):
    value, t_y, ct_theta = case.derivatives()
    assert jax.tree.structure(value) == jax.tree.structure(case.like)
    for got, stored in zip(*map(jax.tree.leaves, (value, case.y)), strict=True):
        assert got.dtype == stored.dtype
        assert np.asarray(got).tobytes() == np.asarray(stored).tobytes()
    jacobian, tol = np.linalg.solve(case.a, case.n), tolerance(case.like)
    t_theta, ct = case.t_theta, case.ct
    size = np.linalg.norm(jacobian, 2)
    push, pull = (tol * size * np.linalg.norm(v) for v in (t_theta, ct))
    np.testing.assert_allclose(t_y, jacobian @ t_theta, rtol=0, atol=push)
    np.testing.assert_allclose(ct_theta, ct @ jacobian, rtol=0, atol=pull)
    both = 2 * push * np.linalg.norm(ct)
    np.testing.assert_allclose(ct @ t_y, ct_theta @ t_theta, rtol=0, atol=both)


@settings(max_examples=12)
@given(linear_cases())
def test_linear_system_of_any_tree_dtypes_and_tag(case):
    assert_linear_rule(case)


@pytest.mark.slow
@settings(max_examples=100)
@given(linear_cases())
def test_linear_system_of_many_trees_dtypes_and_tags(case):
    assert_linear_rule(case)
