"""`optimistix.Newton` in closed form: what optimistix does, on scalars."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

NEWTON = optx.Newton(rtol=1e-9, atol=1e-9)


def of_pytree(y, a):
    u, (v, w) = y["u"], y["vw"]
    return {"u": u**3 + v - a, "vw": jnp.stack([v + 0.1 * w**2 - 1, w - 0.2 * u])}


PROBLEMS = {
    "scalar": (lambda y, a: y**3 - a, 1.0),
    "double root": (lambda y, a: 1e3 * (y - a) ** 2, 1.0),
    "pair": (lambda y, a: (y[0] + y[1] - a, y[0] - y[1] ** 2), (2.0, 0.5)),
    "pytree": (of_pytree, {"u": 1.0, "vw": np.array([0.5, 0.1])}),
}


def quiet(fn, solver=NEWTON, **kwargs):
    return eqi.ImplicitFunction(eqi.Root(fn), solver, throw=False, **kwargs)


@pytest.mark.parametrize("name", PROBLEMS)
def test_iterates_and_end_are_those_of_optimistix(name):
    fn, y0 = PROBLEMS[name]
    y0 = jax.tree.map(jnp.asarray, y0)

    @eqx.filter_jit
    def both(a):
        theirs = optx.root_find(fn, NEWTON, y0, a, throw=False, max_steps=64)
        return theirs, quiet(fn, max_steps=64).solve(y0, a)

    theirs, ours = both(2.0)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    jax.tree.map(same, ours.value, theirs.value)
    assert int(ours.stats["num_steps"]) == int(theirs.stats["num_steps"])
    assert (ours.result == eqi.RESULTS.successful) == (
        theirs.result == optx.RESULTS.successful
    )


def test_lanes_end_by_themselves():
    fn = lambda y, a: jnp.log(y) - a
    solve = jax.jit(jax.vmap(lambda y0, a: quiet(fn, max_steps=16).solve(y0, a)))
    # Easy, a start from which the first step leaves the domain, and a NaN.
    found = solve(jnp.array([0.9, 9.0, 1.0]), jnp.array([0.0, 0.0, jnp.nan]))
    np.testing.assert_allclose(found.value[0], 1.0, atol=1e-12)
    assert list(found.result == eqi.RESULTS.successful) == [True, False, False]
    alone = quiet(fn, max_steps=16).solve(jnp.array(0.9), 0.0)
    assert int(found.stats["num_steps"][0]) == int(alone.stats["num_steps"])
    assert int(found.stats["num_steps"][2]) == 1


@pytest.mark.parametrize(
    ("fn", "result"),
    [
        (lambda y, a: y**2 - 1 + a, eqi.RESULTS.singular),
        (lambda y, a: jnp.log(y - 1 + a), eqi.RESULTS.nonfinite),
        (lambda y, a: y - jnp.cos(y + 1e3) + a, eqi.RESULTS.successful),
        (lambda y, a: jnp.arctan(y - 1) + a, eqi.RESULTS.nonlinear_max_steps_reached),
    ],
    ids=["singular", "not finite", "a root", "too few steps"],
)
def test_the_end_says_why(fn, result):
    steps = 2 if result == eqi.RESULTS.nonlinear_max_steps_reached else 64
    found = eqx.filter_jit(quiet(fn, max_steps=steps).solve)(jnp.array(0.0), 0.0)
    assert found.result == result
    slope = jax.jit(jax.grad(lambda a: quiet(fn, max_steps=steps)(jnp.array(0.0), a)))
    assert np.isfinite(slope(0.0)) == (result == eqi.RESULTS.successful)


def test_auxiliary_output_and_derivative():
    fn = lambda y, a: (y**3 - a, {"twice": 2 * y, "name": "cubic"})
    layer = eqi.ImplicitFunction(eqi.Root(fn), NEWTON, has_aux=True)
    found = layer.solve(jnp.array(1.5), 2.0)
    np.testing.assert_allclose(found.aux["twice"], 2 * 2 ** (1 / 3), rtol=1e-9)
    assert found.aux["name"] == "cubic"
    slope = jax.grad(lambda a: layer(jnp.array(1.5), a))(2.0)
    np.testing.assert_allclose(slope, 2 ** (-2 / 3) / 3, rtol=1e-9)


def test_three_unknowns_of_very_different_size_in_float32():
    # Products of three entries of these rows would overflow.
    scale = np.array([1e20, 1e-20, 1e15], np.float32)
    matrix = np.array([[2, 1, 0], [1, 3, 1], [0, 1, 4]], np.float32)

    def fn(y, a):
        return jnp.asarray(scale) * (jnp.asarray(matrix) @ y + 0.1 * y**3 - a)

    solver = optx.Newton(rtol=1e-5, atol=1e16)
    y = quiet(fn, solver)(jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float32))
    residual = matrix @ np.asarray(y) + 0.1 * np.asarray(y) ** 3 - 1
    np.testing.assert_allclose(residual, 0, atol=1e-5)


def lines(solver):
    layer = quiet(lambda y, a: y + y**3 - a, solver)
    solve = jax.vmap(lambda a: layer(jnp.zeros(2), a))
    return jax.jit(solve).lower(jnp.zeros((8, 2))).as_text()


def test_a_batch_of_pairs_is_no_batch_of_factorisations():
    assert "lapack" not in lines(NEWTON)
    # Where optimistix's own way is asked for, it is taken.
    assert "lapack" in lines(optx.Newton(1e-9, 1e-9, linear_solver=lx.QR()))


def test_what_a_lane_returns_does_not_depend_on_its_neighbours():
    fn = lambda y, a: (y**2 - a, 3 * y)
    layer = eqi.ImplicitFunction(eqi.Root(fn), NEWTON, throw=False, has_aux=True)
    solve = jax.jit(jax.vmap(lambda y0, a: layer.solve(y0, a)))
    # The second needs more steps, the third has a singular start.
    beside = solve(jnp.array([1.0, 50.0, 0.0]), jnp.array([2.0, 7.0, 1.0]))
    for lane, (y0, a) in enumerate([(1.0, 2.0), (50.0, 7.0), (0.0, 1.0)]):
        alone = solve(jnp.array([y0]), jnp.array([a]))
        assert beside.aux[lane] == alone.aux[0] or np.isnan(alone.aux[0])
        codes = jax.tree.leaves(beside.result), jax.tree.leaves(alone.result)
        assert [x[lane] for x in codes[0]] == [x[0] for x in codes[1]]


def test_a_pseudo_inverse_that_is_asked_for_is_taken():
    fn = lambda y, _: jnp.stack([y[0] + y[1] - 2, 2 * (y[0] + y[1]) - 4])
    solver = optx.Newton(1e-8, 1e-8, linear_solver=lx.AutoLinearSolver(None))
    least = optx.Newton(1e-8, 1e-8, linear_solver=lx.AutoLinearSolver(False))
    assert quiet(fn, solver).solve(jnp.zeros(2)).result == eqi.RESULTS.singular
    np.testing.assert_allclose(quiet(fn, least)(jnp.zeros(2)), 1.0, atol=1e-8)


def test_steps_that_are_less_than_rounding_are_not_made_for_ever():
    fn = lambda y, a: 1 + 1e30 * (y - 1) + a
    found = eqx.filter_jit(quiet(fn, max_steps=None).solve)(jnp.array(0.0), 0.0)
    assert found.result == eqi.RESULTS.nonlinear_max_steps_reached
    assert found.value == 1.0
