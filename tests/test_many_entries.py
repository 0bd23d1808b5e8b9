"""One entry that is not finite among thousands.

XLA's maximum for the CPU passes over a NaN in more than 4096 entries, be they of one
state or of many lanes, and a maximum is what tells whether a solve has ended well.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit._entries import every, max_abs

N, LANES = 5000, 5000


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1234, N - 1])
def test_reductions_see_every_entry(dtype, value, place):
    x = np.random.default_rng(0).normal(size=N)
    expected = np.max(np.abs(x.astype(dtype)))
    np.testing.assert_array_equal(jax.jit(max_abs)(jnp.asarray(x, dtype)), expected)
    x[place] = value
    assert np.isnan(jax.jit(max_abs)(jnp.asarray(x, dtype)))
    finite = jax.jit(lambda x: every(jnp.isfinite(x)))
    assert not finite(jnp.asarray(x, dtype))
    assert finite(jnp.zeros(N, dtype))
    assert finite(jnp.zeros(0, dtype))


def undefined(y, a):
    """A contraction but for one entry, which is NaN where `a` is negative."""
    where = jnp.arange(y.size) == y.size // 3
    return jnp.where(where, jnp.sqrt(a) + 0.5 * y, 0.5 * y + 0.5)


SOLVERS = {
    "AutoFixedPoint": eqi.AutoFixedPoint(),
    "AutoRootFinder": eqi.AutoRootFinder(),
    "Anderson": eqi.Anderson(1e-8, 1e-8, window=2),
    "Broyden": eqi.Broyden(1e-8, 1e-8),
    "optimistix": optx.FixedPointIteration(1e-8, 1e-8),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_with_one_nan_is_no_solution(name):
    condition = eqi.FixedPoint(undefined)
    layer = eqi.ImplicitFunction(condition, SOLVERS[name], throw=False, max_steps=64)
    found = eqx.filter_jit(layer.solve)(jnp.ones(N), -1.0)
    assert found.result != eqi.RESULTS.successful
    assert not np.isfinite(found.stats["residual_norm"])
    slope = jax.jit(jax.grad(lambda a: jnp.sum(layer(jnp.ones(N), a)[:5])))
    assert np.isnan(slope(-1.0))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_lane_with_one_nan_among_thousands_has_failed(name):
    condition = eqi.FixedPoint(undefined)
    layer = eqi.ImplicitFunction(condition, SOLVERS[name], throw=False, max_steps=64)
    a = np.full(LANES, 0.25)
    a[1234] = -1.0

    @jax.jit
    @jax.vmap
    def solve(a):
        found = layer.solve(jnp.ones(5), a)
        return found.value, found.result == eqi.RESULTS.successful

    value, good = solve(jnp.asarray(a))
    assert not good[1234]
    others = np.arange(LANES) != 1234
    assert np.all(good[others])
    np.testing.assert_allclose(value[others], 1.0, atol=1e-7)


@pytest.mark.parametrize("width", [1, 2])
def test_a_sparse_solve_with_one_nan_has_failed(width):
    # Tridiagonal or not, and without a dominant diagonal: a generic solution is
    # looked at as well.
    def residual(y, a):
        far = jnp.pad(y, (width, width))
        return 1.1 * y - far[: -2 * width] + far[2 * width :] - jnp.sqrt(a)

    adjoint = eqi.ImplicitAdjoint(eqi.SparseDirect())
    layer = eqi.ImplicitFunction(
        eqi.Root(residual), lambda y0, a: y0, adjoint, throw=False
    )
    slope = jax.jit(jax.grad(lambda a: jnp.sum(layer(jnp.ones(N), a))))
    a = np.ones(N)
    assert np.all(np.isfinite(slope(jnp.asarray(a))))
    a[N // 2] = 0.0  # an infinite slope of the square root
    assert not np.all(np.isfinite(slope(jnp.asarray(a))))
