"""The extreme curvatures of more unknowns than make a dense eigenvalue problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit.solvers import _curvature as curvature

N = 200
SPECTRA = {
    "well conditioned": np.linspace(1.0, 10.0, N),
    "one number": np.full(N, 3.0),
    "negative": np.append(np.linspace(1.0, 10.0, N - 1), -0.5),
    "a little negative": np.append(np.linspace(1.0, 10.0, N - 1), -1e-5),
    "all negative": -np.linspace(1.0, 10.0, N),
    "flat": np.append(np.linspace(1.0, 10.0, N - 2), [0.0, 0.0]),
    "zero": np.zeros(N),
}


def hessian(values):
    draw = np.random.default_rng(5).normal(size=(N, N))
    axes = np.linalg.qr(draw)[0]
    return jnp.asarray((axes * values) @ axes.T)


@jax.jit
def counted(matrix):
    """The extreme curvatures, and how many products they took."""
    hvp, y = lambda v: matrix @ v, jnp.zeros(N)
    lowest, largest = curvature.extreme_curvatures(hvp, y)
    start = curvature.random_like(y)
    tridiagonal = curvature.lanczos(hvp, start, curvature.LANCZOS_STEPS)
    return lowest, largest, 1 + jnp.sum(jnp.diagonal(tridiagonal, 1) > 0)


@pytest.mark.parametrize("kind", SPECTRA)
def test_extreme_curvatures_are_those_of_the_spectrum(kind):
    values = SPECTRA[kind]
    lowest, largest, _ = counted(hessian(values))
    size = np.max(np.abs(values))
    # Where there is nothing negative to be found, roughly.
    loose = 0.1 if values.min() > 0 else 1e-3
    np.testing.assert_allclose(lowest, values.min(), rtol=loose, atol=1e-12 * size)
    np.testing.assert_allclose(largest, size, rtol=0.01, atol=1e-300)
    assert float(lowest) >= values.min() - 1e-12 * size


def test_well_conditioned_takes_few_products():
    (_, _, few), (_, _, all_of_them) = (
        counted(hessian(SPECTRA[kind])) for kind in ("well conditioned", "negative")
    )
    assert int(few) < 35
    assert int(all_of_them) == curvature.LANCZOS_STEPS


def test_lanes_end_together_and_are_those_of_single_runs():
    kinds = ("well conditioned", "negative", "one number")
    matrices = jnp.stack([*(hessian(SPECTRA[k]) for k in kinds), 2 * jnp.eye(N)])
    lowest, largest, _ = jax.vmap(counted)(matrices)
    for i, matrix in enumerate(matrices):
        alone = counted(matrix)
        np.testing.assert_allclose(lowest[i], alone[0], rtol=0.1)
        np.testing.assert_allclose(largest[i], alone[1], rtol=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_a_negative_direction_among_many_is_not_missed(seed):
    draw = np.random.default_rng(seed)
    values = np.abs(draw.normal(size=N)) + 0.2
    values[0] = -draw.uniform(0.01, 0.5)
    axes = np.linalg.qr(draw.normal(size=(N, N)))[0]
    lowest, _, _ = counted(jnp.asarray((axes * values) @ axes.T))
    np.testing.assert_allclose(lowest, values.min(), rtol=1e-3)
