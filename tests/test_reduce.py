"""Sums and maxima, beside NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit._entries import every, peak
from eqximplicit._reduce import anywhere, largest, total

SHAPES = [
    *[(), (0,), (1,), (3,), (16,), (17,), (33,), (1000,), (1025,), (4095,), (5000,)],
    *[(5, 3), (3, 40), (40, 3), (2, 3, 4), (2, 50, 40), (3, 2000)],
]
DRAW = np.random.default_rng(3)


def axes_of(shape):
    every_one = tuple(range(len(shape)))
    return [
        None,
        every_one,
        *every_one,
        *[-1][: len(shape)],
        *[every_one[1:]][: len(shape) > 1],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sum_and_maximum(shape, dtype):
    x = jnp.asarray(DRAW.normal(size=shape), dtype)
    exact = np.asarray(x, np.float64)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    for axis in axes_of(shape):
        both = lambda x, axis=axis: (total(x, axis), largest(jnp.abs(x), axis))
        found, top = jax.jit(both)(x)
        assert found.dtype == top.dtype == x.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact.sum(axis=axis), rtol, atol=rtol
        )
        np.testing.assert_array_equal(
            np.asarray(top, np.float64), np.abs(exact).max(axis=axis, initial=0)
        )


@pytest.mark.parametrize("n", [1, 5, 16, 17, 100, 1000, 4095, 5000])
def test_one_entry_that_is_not_finite_is_seen_wherever_it_is(n):
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, n // 2, n - 1):
            x = jnp.ones(n).at[place].set(value)
            assert np.isnan(jax.jit(peak)(x))
            assert not jax.jit(lambda x: every(jnp.isfinite(x)))(x)
    assert every(jnp.isfinite(jnp.ones(n)))


def test_derivatives_and_lanes():
    x = jnp.asarray(DRAW.normal(size=(7, 6)))
    np.testing.assert_array_equal(jax.grad(lambda x: total(x[0]))(x)[0], np.ones(6))
    np.testing.assert_allclose(jax.vmap(total)(x), np.asarray(x).sum(1))
    np.testing.assert_allclose(jax.vmap(largest)(x**2), (np.asarray(x) ** 2).max(1))
    transposed = jax.linear_transpose(lambda x: total(x, 1), x)
    np.testing.assert_array_equal(
        transposed(jnp.arange(7.0))[0], np.arange(7.0)[:, None] * np.ones(6)
    )
    second = jax.vmap(lambda x: total(x, 0), in_axes=1, out_axes=1)
    cube = jnp.asarray(DRAW.normal(size=(3, 4, 5)))
    np.testing.assert_allclose(second(cube), np.asarray(cube).sum(0).T)


@pytest.mark.parametrize("n", [1, 16, 32, 33, 100, 4095, 5000])
def test_flags_that_are_set_anywhere(n):
    flags = lambda *places: jnp.zeros(n, bool).at[jnp.array(places, int)].set(True)
    found = jax.jit(anywhere)(flags(), flags(n - 1), flags(n // 2, 0))
    assert [bool(x) for x in found] == [False, True, True]
    rows = jnp.stack([flags(), flags(n // 3)])
    (first, second) = jax.jit(jax.vmap(anywhere))(rows, ~rows)
    np.testing.assert_array_equal(first, [False, True])
    np.testing.assert_array_equal(second, [True, n > 1])


@pytest.mark.parametrize("n", [33, 100, 1000, 4095])
def test_one_kernel_where_the_compiler_makes_three(n):
    def windows(fn):
        program = jax.jit(fn).lower(jnp.ones(n)).compile().as_text()
        return program.count(" reduce-window(")

    assert windows(jnp.sum) >= 1  # else there is no need for `_reduce.py`
    assert windows(total) == windows(peak) == 0
    assert windows(lambda x: anywhere(x > 0, x < 0)) == 0
