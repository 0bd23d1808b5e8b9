"""Minima with flat directions, found up to a tolerance: a ring of beads on springs.

The energy does not change as the ring is moved or turned, so three curvatures are zero;
beside the minimum, that of the rotation is as small as the gradient there.
"""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import DirectSymmetric


def distances(beads, far):
    apart = beads - jnp.roll(beads, far, 0)
    return jnp.sqrt(jnp.sum(apart**2, 1))


def energy(beads, rest):
    near, far = jnp.split(rest, 2)
    bonds = jnp.sum((distances(beads, 1) - near) ** 2)
    return bonds + jnp.sum((distances(beads, 2) - far) ** 2)


def observed(beads):
    """Depends on distances alone, as the energy does."""
    return jnp.sum(jnp.sin(jnp.sum((beads[:, None] - beads[None]) ** 2, -1)))


@functools.cache
def rings(n, lanes):
    angle = np.arange(n) * 2 * np.pi / n
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    draw = np.random.default_rng(0)
    rest = np.repeat([2 * np.sin(np.pi / n), 2 * np.sin(2 * np.pi / n)], n)
    rests = rest + 0.02 * rest.mean() * draw.normal(size=(lanes, 2 * n))
    return jnp.asarray(ring + 0.03 * draw.normal(size=ring.shape)), jnp.asarray(rests)


def by_pseudo_inverse(beads, rest, num_steps):
    """The gradient by NumPy, at the minimum that some Newton steps lead to."""
    n = beads.size
    slope = jax.jit(jax.grad(energy))
    hessian = jax.jit(jax.hessian(energy))
    inverse = lambda y: np.linalg.pinv(hessian(y, rest).reshape(n, n), rcond=1e-6)
    for _ in range(num_steps):
        step = inverse(beads) @ np.asarray(slope(beads, rest)).ravel()
        beads = beads - step.reshape(beads.shape)
    mixed = jax.jacobian(slope, argnums=1)(beads, rest).reshape(n, -1)
    cotangent = np.asarray(jax.grad(observed)(beads)).ravel()
    return -np.asarray(mixed).T @ (inverse(beads) @ cotangent)


SOLVERS = {
    "FIRE, 1e-6": eqi.FIRE(1e-6, 1e-6),
    "FIRE, 1e-8": eqi.FIRE(1e-8, 1e-8),
    "BFGS, 1e-6": optx.BFGS(1e-6, 1e-6),
    "BFGS, 1e-10": optx.BFGS(1e-10, 1e-10),
    "default": eqi.AutoMinimiser(),
}


# Left to the slow session.
LATER = [name for name in SOLVERS if name not in ("default", "FIRE, 1e-8")]


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (5, "default"),
        (5, "FIRE, 1e-8"),
        pytest.param(20, "FIRE, 1e-8", marks=pytest.mark.slow),
        *(pytest.param(5, name, marks=pytest.mark.slow) for name in LATER),
    ],
)
def test_a_minimum_that_may_be_turned_has_a_gradient(n, name):
    ring, rests = rings(n, 12)
    layer = eqi.ImplicitFunction(
        eqi.Minimum(energy), SOLVERS[name], max_steps=40_000, throw=False
    )
    found = jax.jit(jax.vmap(lambda rest: layer(ring, rest)))(rests)
    gradient = jax.vmap(jax.grad(lambda rest: observed(layer(ring, rest))))
    for beads, rest, slope in zip(found, rests, jax.jit(gradient)(rests), strict=True):
        # Of many beads soft modes are farther from the minimum than the force tells,
        # and the derivative is compared with that at the same place.
        expected = by_pseudo_inverse(beads, rest, 3 if n == 5 else 0)
        rtol = 1e-3 if n > 5 else 1e-4 if "1e-6" in name else 1e-5
        np.testing.assert_allclose(
            slope, expected, rtol=0, atol=rtol * np.abs(expected).max()
        )


@pytest.mark.parametrize("soft", [1e-12, 1e-10, 3e-10, 1e-9, 1e-7])
def test_almost_flat_direction_leaves_the_others_exact(soft):
    """Eigenvalues just above those that count as zero are no source of rounding."""
    n = 10
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(n, n)))[0]
    values = np.concatenate([np.linspace(1, 4, n - 2), [0.0, 4 * soft]])
    matrix = jnp.asarray((basis * values) @ basis.T)
    operator = lx.MatrixLinearOperator((matrix + matrix.T) / 2, lx.symmetric_tag)
    b = basis[:, : n - 2] @ np.random.default_rng(4).normal(size=n - 2)
    out = lx.linear_solve(operator, jnp.asarray(b), DirectSymmetric(), throw=False)
    assert bool(out.result == lx.RESULTS.successful)
    np.testing.assert_allclose(matrix @ out.value, b, rtol=0, atol=1e-12)


def test_right_hand_side_off_the_range_fails_however_the_operator_is_known():
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
    matrix = jnp.asarray((basis * [3.0, 2.0, 1.5, 1.0, 1.0, 0.0]) @ basis.T)
    operator = lx.MatrixLinearOperator((matrix + matrix.T) / 2, lx.symmetric_tag)
    solve = functools.partial(lx.linear_solve, operator, throw=False)
    for part, error, accepted in ((1e-6, 0.0, False), (1e-6, 1e-5, True)):
        b = jnp.asarray(basis[:, 0] + part * basis[:, -1])
        out = solve(b, DirectSymmetric(), options={"operator_error": error})
        assert bool(out.result == lx.RESULTS.successful) == accepted
    b = jnp.asarray(basis[:, 0] + 1e-2 * basis[:, -1])
    out = solve(b, DirectSymmetric(), options={"operator_error": 1.0})
    assert bool(out.result == lx.RESULTS.singular)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_minimum_without_curvature_has_no_derivative(n):
    """At `y = a` it is one, yet the Hessian and the mixed derivative are zero."""
    solver = lambda y0, a: jnp.broadcast_to(a, y0.shape)
    layer = eqi.ImplicitFunction(
        eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 4)), solver
    )
    solution = lambda a: layer(jnp.zeros(n), a)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert np.isnan(jax.jit(jacobian(solution))(jnp.array(2.0))).all()
