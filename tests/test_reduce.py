"""Sums and maxima, beside NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit._reduce import largest, total
from eqximplicit._state import every, peak

SHAPES = [(), (0,), (1,), (3,), (16,), (17,), (5, 3), (3, 40), (2, 3, 4)]
DRAW = np.random.default_rng(3)


def axes_of(shape):
    every_one = tuple(range(len(shape)))
    return [None, every_one, *every_one, *[every_one[1:]][: len(shape) > 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sum_and_maximum(shape, dtype):
    x = jnp.asarray(DRAW.normal(size=shape), dtype)
    exact = np.asarray(x, np.float64)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    for axis in axes_of(shape):
        found, top = total(x, axis), largest(jnp.abs(x), axis)
        assert found.dtype == top.dtype == x.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact.sum(axis=axis), rtol, atol=rtol
        )
        np.testing.assert_array_equal(
            np.asarray(top, np.float64), np.abs(exact).max(axis=axis, initial=0)
        )


@pytest.mark.parametrize("n", [1, 5, 16, 17, 5000])
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
