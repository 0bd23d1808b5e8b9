"""The small algebra of quasi-Newton histories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit.solvers._history import half_inverse


def _definite(n, condition, seed):
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (vectors * np.geomspace(1, 1 / condition, n)) @ vectors.T


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 11])
@pytest.mark.parametrize("part", [1.0, 0.3, 1e-2])
def test_half_inverse_is_that_of_the_cholesky_factor(n, dtype, part):
    # Conditions that take half of the digits that there are, or fewer.
    condition = max(1.0, part * float(np.finfo(dtype).eps) ** -0.5)
    grams = np.stack([_definite(n, condition, seed) for seed in (0, 1)])
    found = np.asarray(jax.jit(half_inverse)(jnp.asarray(grams, dtype)), np.float64)
    exact = np.linalg.inv(np.linalg.cholesky(grams))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 20 * n * np.finfo(dtype).eps * condition
    np.testing.assert_array_equal(np.triu(found, 1), 0)


@pytest.mark.parametrize("worst", [-1.0, 0.0, np.nan])
def test_half_inverse_of_a_matrix_that_is_not_definite_is_not_finite(worst):
    grams = jnp.asarray(np.stack([np.diag([1.0, worst, 2.0]), np.eye(3)]))
    bad, good = half_inverse(grams)
    assert not jnp.isfinite(bad).all()
    np.testing.assert_array_equal(good, np.eye(3))


def test_half_inverse_has_as_many_lanes_as_its_argument():
    grams = jnp.asarray(np.stack([_definite(4, 10, seed) for seed in range(6)]))
    alone = jax.vmap(lambda g: half_inverse(g[None])[0])(grams)
    np.testing.assert_allclose(alone, half_inverse(grams), rtol=1e-14, atol=1e-14)
