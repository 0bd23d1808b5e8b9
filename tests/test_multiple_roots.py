"""Roots where the implicit function theorem says nothing: NaN, and only there."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from standard_systems import STANDARD_SYSTEMS

import eqximplicit as eqi
from eqximplicit.linear_solvers.auto import narrow
from eqximplicit.solvers._multiple import bends, bends_along

NEWTON = optx.Newton(rtol=1e-10, atol=1e-10)


def layer(fn, solver=None):
    return eqi.ImplicitFunction(eqi.Root(fn), solver, throw=False)


def coupled(first):
    """A system of several unknowns, of which the first is alone."""

    def fn(y, a):
        others = y + 0.2 * jnp.sin(jnp.roll(y, 1)) - 1
        return others.at[0].set(first(y[0], a))

    return fn


def touching(y, a):
    return jnp.stack([y[0] ** 2 + y[1] ** 2 - 1, y[1] - 1 - a])


MULTIPLE = {
    "turns back": (lambda y, a: y**2 - a, 1.0),
    "turns back elsewhere": (lambda y, a: (y - 1) ** 2 - a, 2.0),
    "in small units": (lambda y, a: 1e-3 * (y**2 - a), 1.0),
    "parts in two": (lambda y, a: y**3 - a * y, 1.0),
    "circle and tangent": (touching, np.full(2, 0.5)),
    "of six": (coupled(lambda y, a: (y - 1) ** 2 - a), np.full(6, 2.0)),
}
# At a = 0.5, with its slope.
SIMPLE = {
    "power": (lambda y, a: y**5 - a, 2.0, 0.2 * 0.5**-0.8),
    "in large units": (lambda y, a: 1e8 * (y**3 - a), 1.0, 0.5 ** (-2 / 3) / 3),
    "flat on the way": (lambda y, a: jnp.expm1(y) - a, 20.0, 1 / 1.5),
    "linear": (lambda y, a: 3 * y - a, 1.0, 1 / 3),
    "two of them near each other": (
        lambda y, a: y**2 - 1e-6 * a,
        1.0,
        5e-7 / 5e-7**0.5,
    ),
    "of six": (coupled(lambda y, a: y**3 - a), np.full(6, 2.0), None),
}


def slopes(fn, y0, a, dtype, solver=None):
    y0, a = jnp.asarray(y0, dtype), jnp.asarray(a, dtype)
    solve = lambda a: jnp.ravel(layer(fn, solver)(y0, a))[0]
    return jax.jvp(solve, (a,), (jnp.ones_like(a),))[1], jax.grad(solve)(a)


SINGLE = optx.Newton(rtol=1e-5, atol=1e-5)
# There rounding ends the approach, with a step of zero.
ENDED = {"circle and tangent"}
# Beside one, steps of 1e-5 are about rounding in single precision.
AT_ZERO = {"turns back", "in small units", "parts in two"}
MULTIPLE_CASES = [
    *((name, jnp.float64, None) for name in MULTIPLE),
    *((name, jnp.float32, None) for name in MULTIPLE),
    *((name, jnp.float64, NEWTON) for name in MULTIPLE if name not in ENDED),
    *((name, jnp.float32, SINGLE) for name in MULTIPLE if name in AT_ZERO),
]


@pytest.mark.parametrize(("name", "dtype", "solver"), MULTIPLE_CASES)
def test_no_derivative_at_a_multiple_root(name, dtype, solver):
    fn, y0 = MULTIPLE[name]
    assert np.isnan(slopes(fn, y0, 0.0, dtype, solver)).all()
    solution = layer(fn, solver).solve(jnp.asarray(y0, dtype), jnp.zeros((), dtype))
    assert solution.result == eqi.RESULTS.successful
    assert not solution.stats["simple"]


# The residual that this asks for, rounding does not allow in large units.
BY_NEWTON = [(name, NEWTON) for name in SIMPLE if name != "in large units"]


@pytest.mark.parametrize(
    ("name", "solver"), [*((name, None) for name in SIMPLE), *BY_NEWTON]
)
def test_simple_roots_have_theirs(name, solver):
    fn, y0, slope = SIMPLE[name]
    forward, reverse = slopes(fn, y0, 0.5, jnp.float64, solver)
    expected = slope if slope is not None else 0.5 ** (-2 / 3) / 3
    np.testing.assert_allclose([forward, reverse], expected, rtol=1e-4)


@pytest.mark.parametrize("name", SIMPLE)
def test_simple_roots_in_single_precision(name):
    fn, y0, _ = SIMPLE[name]
    solution = layer(fn).solve(jnp.asarray(y0, jnp.float32), jnp.float32(0.5))
    assert solution.result == eqi.RESULTS.successful
    # Nearer to each other than the tolerance can tell, two roots are one.
    assert solution.stats["simple"] == (name != "two of them near each other")


def test_one_lane_is_no_matter_of_the_others():
    solve = layer(lambda y, a: y**2 - a)
    lanes = jnp.array([0.0, 4.0, 0.25])
    found = jax.vmap(jax.grad(lambda a: solve(jnp.array(1.0), a)))(lanes)
    np.testing.assert_allclose(found, [np.nan, 0.25, 1.0], rtol=1e-6)


def test_a_start_at_the_root_is_no_slow_approach():
    solution = layer(lambda y, a: y**3 - a).solve(jnp.array(2.0), jnp.array(8.0))
    assert solution.stats["simple"]


# Solvers that do not look themselves: the linear solve of the derivative does.
TOL = {"rtol": 1e-8, "atol": 1e-8}
UNAWARE = {
    "root, Levenberg-Marquardt": (eqi.Root, optx.LevenbergMarquardt(**TOL)),
    "root, Dogleg": (eqi.Root, optx.Dogleg(**TOL)),
    "root, Broyden": (eqi.Root, eqi.Broyden()),
    "root, SciPy": (eqi.Root, eqi.ScipyRoot()),
    "root, Krylov": (eqi.Root, eqi.AutoRootFinder(krylov_above=0)),
    "fixed point": (eqi.FixedPoint, None),
    "fixed point, Anderson": (eqi.FixedPoint, eqi.Anderson()),
    "minimum": (eqi.Minimum, None),
    "minimum, BFGS": (eqi.Minimum, optx.BFGS(**TOL)),
    "minimum, FIRE": (eqi.Minimum, eqi.FIRE(**TOL)),
    "minimum, SciPy": (eqi.Minimum, eqi.ScipyMinimize()),
    "least squares": (eqi.LeastSquares, None),
}
# The others are left to the slow session.
QUICK = (
    *("root, Levenberg-Marquardt", "root, Broyden", "minimum, BFGS"),
    *("fixed point", "minimum", "least squares"),
)


def stated(kind, fn):
    """The equation `fn(y, a) = 0` for the condition `kind`."""
    if kind is eqi.FixedPoint:
        return kind(lambda y, a: y - 0.2 * fn(y, a))
    if kind is eqi.Minimum:  # of the integral of `fn`, by a rule that is exact for it
        nodes, weights = np.polynomial.legendre.leggauss(4)
        along = lambda y, a: sum(
            w / 2 * jnp.sum(y * fn(y * (x + 1) / 2, a))
            for x, w in zip(nodes, weights, strict=True)
        )
        return kind(along)
    return kind(fn)


def attached(name, fn, y0):
    kind, solver = UNAWARE[name]
    layer = eqi.ImplicitFunction(stated(kind, fn), solver, throw=False, max_steps=4000)
    return lambda a: jnp.ravel(layer(jnp.asarray(y0), a))[0]


@pytest.mark.parametrize("shape", [(), pytest.param((4,), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in UNAWARE
    ],
)
def test_solvers_that_do_not_look(name, shape):
    turning = UNAWARE[name][0] is not eqi.Minimum
    fn = (lambda y, a: y**2 - a) if turning else (lambda y, a: y**3 - a * y)
    solve = attached(name, fn, np.full(shape, 1.7))
    value_and_slope = jax.value_and_grad(solve)
    at, along = (jnp.array(0.0),), (jnp.array(1.0),)
    assert np.isnan([value_and_slope(*at)[1], jax.jvp(solve, at, along)[1]]).all()
    found = np.abs(value_and_slope(jnp.array(0.36)))  # at either of two minima
    np.testing.assert_allclose(found, [0.6, 0.5 / 0.6], rtol=1e-4)


def some_slow(quick, slow):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def assert_bends(solve):
    """No slope at zero; the right one beside it, on either side."""
    slope = jax.jit(lambda a: (jax.grad(solve)(a), jax.jvp(solve, (a,), (1.0,))[1]))
    assert np.isnan(slope(0.0)).all()
    np.testing.assert_allclose(np.abs(slope(0.36)), 0.5 / 0.6, rtol=1e-4)


# Up to 32 unknowns the default linear solver eliminates; it iterates for more.
@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize(
    "name",
    some_slow(
        ["root, Broyden", "root, Krylov", "fixed point"],
        [
            *("root, Levenberg-Marquardt", "root, Dogleg", "root, SciPy"),
            "fixed point, Anderson",
        ],
    ),
)
def test_one_direction_of_several_bends(name, n):
    fn = coupled(lambda y, a: (y - 1) ** 2 - a)
    assert_bends(attached(name, fn, np.full(n, 2.0)))


def test_banded_systems_bend():
    """Solved by elimination, with Jacobians that are never formed."""
    before = lambda y: jnp.concatenate([y[:1], y[:-1]])
    fn = lambda y, a: (y - 1) ** 2 - a + 0.1 * (y - before(y)) * (y - 1)
    y0 = jnp.full(40, 2.0)
    jacobian = jax.linearize(lambda y: fn(y, 0.36), y0)[1]
    struct = jax.eval_shape(lambda: y0)
    assert narrow(lx.FunctionLinearOperator(jacobian, struct)) is not None
    assert_bends(attached("root, Krylov", fn, y0))


@pytest.mark.parametrize("linear_solver", [eqi.HybridKrylov(), eqi.Neumann()])
def test_iterations_make_the_step_themselves(linear_solver):
    fn = coupled(lambda y, a: (y - 1) ** 2 - a)
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda y, a: y - 0.2 * fn(y, a)),
        eqi.Anderson(),
        eqi.ImplicitAdjoint(linear_solver),
        throw=False,
    )
    assert_bends(lambda a: layer(jnp.full(6, 2.0), a)[0])


def test_an_approximate_gradient_is_no_judge():
    """Of Jacobian-free backpropagation, which solves no system, nothing is asked.

    Its step to the root would be off by more than a quarter, as near a multiple one.
    """
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda y, a: jnp.cos(y) * a),
        optx.FixedPointIteration(rtol=1e-5, atol=1e-5),
        eqi.ImplicitAdjoint(eqi.Neumann(1)),
    )
    y = layer(jnp.array(1.0), jnp.array(1.0))
    slope = jax.grad(lambda a: layer(jnp.array(1.0), a))(jnp.array(1.0))
    np.testing.assert_allclose(slope, np.cos(y), rtol=1e-12)


def soft(y, a):
    """An objective whose first unknown is at `sqrt(a)`, flatter the smaller that is."""
    others = y[1:]
    coupling = jnp.sum(jnp.cos(others + jnp.roll(others, 1)))
    return (
        y[0] ** 4 / 4 - a * y[0] ** 2 / 2 + jnp.sum((others - 1) ** 2) + coupling / 10
    )


@pytest.mark.parametrize(
    "name",
    some_slow(["minimum", "minimum, BFGS"], ["minimum, FIRE", "minimum, SciPy"]),
)
def test_one_direction_of_a_large_minimum_bends(name):
    solver = UNAWARE[name][1]
    layer = eqi.ImplicitFunction(eqi.Minimum(soft), solver, throw=False, max_steps=4000)
    assert_bends(lambda a: layer(jnp.full(40, 1.7), a)[0])


def test_plain_iteration_that_stops_early_at_a_double_root():
    solver = optx.FixedPointIteration(rtol=1e-5, atol=1e-5)
    condition = eqi.FixedPoint(lambda y, a: y - (y**2 - a))
    solve = eqi.ImplicitFunction(condition, solver, throw=False)
    slope = jax.jit(jax.grad(lambda a: solve(jnp.array(0.2), a)))
    found = solve.solve(jnp.array(0.2), jnp.array(0.0))
    assert found.result == eqi.RESULTS.successful
    assert np.isnan(slope(0.0))
    np.testing.assert_allclose(slope(0.36), 0.5 / 0.6, rtol=1e-3)


def test_a_residual_of_rounding_bends_nothing():
    """Newton's step from a minimum in single precision is rounding, but one step."""
    n, draw = 6, np.random.default_rng(0)
    shape = 300, 20, n
    data = draw.normal(size=shape), draw.choice([-1.0, 1.0], size=shape[:2])
    x, labels, weights = (
        jnp.asarray(a, jnp.float32) for a in (*data, draw.normal(size=(300, n)))
    )

    def objective(y, args):
        x, labels, weights = args
        loss = jnp.sum(jnp.logaddexp(0, -labels * (x @ y)))
        return loss + jnp.sum(jnp.exp(weights) * y**2) / 2

    solve = eqi.ImplicitFunction(eqi.Minimum(objective), throw=False)
    total = lambda args: jnp.sum(solve(jnp.zeros(n, jnp.float32), args))
    gradients = jax.jit(jax.vmap(jax.grad(total)))((x, labels, weights))
    assert np.isfinite(gradients[2]).all()


# Those whose Jacobian is singular at the root.
SINGULAR = {"Powell singular", "sample 19"}


@pytest.mark.slow
@pytest.mark.parametrize("system", STANDARD_SYSTEMS, ids=lambda system: system.name)
def test_standard_systems_are_simple_but_for_those_known_not_to_be(system):
    solution = optx.root_find(
        system.fn,
        eqi.AutoRootFinder(),
        jnp.asarray(system.start),
        max_steps=512,
        throw=False,
    )
    assert solution.result == optx.RESULTS.successful
    assert solution.stats["simple"] == (system.name not in SINGULAR)


def bent(fn, y, symmetric):
    y = jnp.asarray(y)
    solved = lambda b: jnp.linalg.solve(jax.jacfwd(fn)(y), b)
    return bool(bends(fn, solved, y, fn(y), symmetric=symmetric, in_loop=False))


def test_curvature_is_asked_where_a_direction_may_be_flat():
    # A stiff direction off by 1e-8, and one that is weak because it bends: as weak as
    # what the stiff one leaves of the residual would make a flat direction.
    fn = lambda y: jnp.stack([100 * (y[0] - 1), 4 * y[1] ** 3])
    assert bent(fn, [1 + 1e-8, 3e-4], symmetric=True)
    # Beside a stiff one that is farther off it weighs nothing, so it may be flat.
    assert not bent(fn, [1 + 1e-7, 3e-4], symmetric=True)
    assert bent(fn, [1 + 1e-7, 3e-4], symmetric=False)


def test_only_a_loss_of_curvature_is_a_bend_along_an_answer():
    y, x = jnp.asarray([1.0]), jnp.asarray([2.0])
    for fn, is_bend in ((jnp.tanh, False), (lambda y: y**3, True)):
        vector = jax.jvp(fn, (y,), (x,))[1]  # so that it is the answer
        assert bool(bends_along(fn, y, fn(y), vector, x)) == is_bend


class Telling(eqi.Anderson):
    """Says in a number of its own that it has converged, and no more."""

    def postprocess(self, *args, **kwargs):
        y, aux, stats = super().postprocess(*args, **kwargs)
        kept = {"result": stats["result"], "converged": jnp.asarray(True)}
        return y, aux, kept


def test_statistics_of_any_name_excuse_no_solver():
    condition = eqi.FixedPoint(lambda y, a: a * jnp.tanh(y))
    solve = eqi.ImplicitFunction(condition, Telling(), throw=False)
    start, a = jnp.full(3, 0.5), jnp.ones(3)
    solution = solve.solve(start, a)
    assert solution.stats["converged"]
    assert bool(solution.result == eqi.RESULTS.successful)
    slope = jax.grad(lambda a: jnp.sum(solve(start, a)))(a)
    assert jnp.isnan(slope).all()
