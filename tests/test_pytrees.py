"""States and parameters are pytrees of any shape, with leaves of any kind."""

import functools
from collections import namedtuple
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from problems import A, assert_close, EXACT, ROOT

import eqximplicit as eqi

# One part of the state is single precision.
SINGLE = 1e-5
NEWTON = {"rtol": 1e-10, "atol": 1e-10}

Point = namedtuple("Point", ["bond", "angle"])


class Var(eqx.Module):
    value: Any


# Each pair packs a vector of three unknowns into a state, and unpacks it.
CONTAINERS = {
    "list": (lambda v: [v[0], v[1:]], lambda s: jnp.append(s[0], s[1])),
    "tuple": (lambda v: (v[:2], v[2]), lambda s: jnp.append(s[0], s[1])),
    "dict": (
        lambda v: {"b": v[0], "a": v[1:]},
        lambda s: jnp.append(s["b"], s["a"]),
    ),
    "named tuple": (
        lambda v: Point(v[:1], v[1:]),
        lambda s: jnp.append(s.bond, s.angle),
    ),
    "two modules": (
        lambda v: (Var(v[0]), Var(v[1:])),
        lambda s: jnp.append(s[0].value, s[1].value),
    ),
    "nested with None and an empty leaf": (
        lambda v: {"x": [Var(v[0]), None, ()], "y": (v[1:], jnp.zeros((0, 2)))},
        lambda s: jnp.append(s["x"][0].value, s["y"][0]),
    ),
    "matrix": (lambda v: v.reshape(3, 1), lambda s: s[:, 0]),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_state_may_be_any_container(container):
    pack, unpack = CONTAINERS[container]

    def residual(state, args):
        return pack(ROOT.fn(unpack(state), args))

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))

    @jax.jit
    def run(theta):
        def solution(theta):
            return layer(pack(jnp.zeros(3)), (ROOT.args[0], theta))

        t_y = jax.jvp(solution, (theta,), (jnp.ones(2),))[1]
        loss = lambda theta: jnp.sum(unpack(solution(theta)) ** 2)
        return solution(theta), t_y, jax.grad(loss)(theta)

    value, t_y, gradient = run(ROOT.args[1])
    y, jacobian = ROOT.solution(ROOT.args), ROOT.jacobian(ROOT.args)[1]
    assert jtu.tree_structure(value) == jtu.tree_structure(pack(jnp.zeros(3)))
    assert_close(unpack(value), y)
    assert_close(unpack(t_y), jacobian.sum(1))
    assert_close(gradient, 2 * np.asarray(y) @ jacobian)


def test_leaf_whose_equation_does_not_depend_on_the_parameters():
    def residual(y, b):
        return {"free": y["free"] ** 3 + y["free"] - b, "tied": y["tied"] - y["free"]}

    @jax.jit
    def run(b):
        def loss(b):
            y = {"free": jnp.array(1.0), "tied": jnp.array(1.0)}
            y = eqi.implicit_solution(eqi.Root(residual), y, b)
            return y["free"] ** 2 + y["tied"] ** 3

        return jax.jacfwd(loss)(b), jax.grad(loss)(b), jax.vmap(jax.grad(loss))(b[None])

    by_b = (2 + 3) / 4
    assert_close(run(jnp.array(2.0)), (by_b, by_b, np.array([by_b])))


def test_residual_may_use_another_container_with_the_same_leaves():
    def residual(state, args):
        out = ROOT.fn(jnp.append(state["a"], state["b"]), args)
        return [out[0], out[1:]]

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
    y0 = {"a": jnp.array(0.0), "b": jnp.zeros(2)}
    value = layer(y0, ROOT.args)
    assert_close(jnp.append(value["a"], value["b"]), ROOT.solution(ROOT.args))


# --- parameters ---------------------------------------------------------------------


class Kinds(eqx.Module):
    """`y = tanh(scale y) / power + shift[index]`, with parameters of every kind."""

    scale: Any
    shift: jax.Array
    index: jax.Array
    mask: jax.Array
    power: int
    negate: bool
    nothing: None
    empty: jax.Array
    name: str = eqx.field(static=True)
    children: tuple[()] = ()

    def __call__(self, y, args):
        del args
        shift = jnp.where(self.mask, self.shift, 0.0)[self.index]
        image = jnp.tanh(self.scale * y) / self.power + shift + jnp.sum(self.empty)
        return -image if self.negate else image


def kinds(scale):
    return Kinds(
        scale=scale,
        shift=jnp.array([5.0, 0.3, 7.0]),
        index=jnp.array(1),
        mask=jnp.array([False, True, True]),
        power=2,
        negate=False,
        nothing=None,
        empty=jnp.zeros(0),
        name="cell",
    )


def kinds_layer(scale):
    return eqi.ImplicitFunction(eqi.FixedPoint(kinds(scale)), optx.Newton(**NEWTON))


@functools.cache
def kinds_truth():
    y = 0.0
    for _ in range(200):
        y = np.tanh(0.8 * y) / 2 + 0.3
    slope = 1 - np.tanh(0.8 * y) ** 2
    jacobian = 1 - 0.8 * slope / 2
    return y, y * slope / 2 / jacobian, 1 / jacobian


def test_integer_boolean_none_static_and_empty_parameters_pass_through():
    @eqx.filter_jit
    def run(layer):
        return eqx.filter_value_and_grad(lambda layer: layer(jnp.array(0.1)))(layer)

    value, gradient = run(kinds_layer(jnp.array(0.8)))
    y, by_scale, by_shift = kinds_truth()
    params = gradient.params
    assert_close(value, y)
    assert_close(params.scale, by_scale)
    assert_close(params.shift, np.array([0.0, by_shift, 0.0]))
    assert params.empty.shape == (0,)
    assert params.index is None
    assert params.mask is None
    assert params.power is None
    assert params.negate is None
    assert params.name == "cell"


def test_python_float_parameter_has_a_derivative_when_jax_is_asked_for_it():
    layer = kinds_layer(0.8)

    def solution(scale):
        cell = eqx.tree_at(lambda cell: cell.scale, layer.params, scale)
        return layer.with_params(cell)(jnp.array(0.1))

    y, by_scale, _ = kinds_truth()
    assert_close(layer(jnp.array(0.1)), y)
    assert_close(jax.grad(solution)(0.8), by_scale)
    assert_close(jax.jacfwd(solution)(0.8), by_scale)


def test_python_float_parameter_beside_a_moving_array_is_constant():
    def loss(shift):
        cell = eqx.tree_at(lambda cell: cell.shift, kinds(0.8), shift)
        layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), optx.Newton(**NEWTON))
        return layer(jnp.array(0.1))

    _, _, by_shift = kinds_truth()
    gradient = jax.grad(loss)(kinds(0.8).shift)
    assert_close(gradient, np.array([0.0, by_shift, 0.0]))


def test_arguments_may_hold_every_kind_of_leaf():
    def residual(y, args):
        assert args["mode"] == "quick"
        assert args["nothing"] is None
        return y**3 - args["theta"][args["index"]] * args["factor"]

    @eqx.filter_jit
    def run(args):
        layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
        return eqx.filter_value_and_grad(lambda args: layer(jnp.array(1.0), args))(args)

    args = {
        "theta": jnp.array([1.0, 4.0]),
        "index": jnp.array(1),
        "factor": 2,
        "mode": "quick",
        "nothing": None,
        "flag": True,
    }
    value, gradient = run(args)
    assert_close(value, 2.0)
    assert_close(gradient["theta"], np.array([0.0, 2 / 12]))
    assert gradient["index"] is None
    assert gradient["mode"] is None


def test_integer_argument_of_plain_jax_grad_with_allow_int_has_a_float0_cotangent():
    def loss(args):
        layer = eqi.ImplicitFunction(
            eqi.Root(lambda y, a: y**3 - a[0][a[1]]), optx.Newton(**NEWTON)
        )
        return layer(jnp.array(1.0), args)

    by_theta, by_index = jax.grad(loss, allow_int=True)(
        (jnp.array([1.0, 8.0]), jnp.array(1))
    )
    assert_close(by_theta, np.array([0.0, 1 / 12]))
    assert by_index.dtype == jax.dtypes.float0


def test_parameters_of_single_double_and_complex_dtype_beside_each_other():
    def load(args):
        real = args["single"].astype(float) * args["double"]
        return real + jnp.abs(args["complex"]) ** 2

    @jax.jit
    def run(args):
        def solution(args):
            y = jnp.cbrt(load(args))
            return eqi.implicit_solution(
                eqi.Root(lambda y, args: y**3 - load(args)), y, args
            )

        return jax.grad(solution)(args), jax.grad(lambda a: jnp.cbrt(load(a)))(args)

    args = {
        "single": jnp.array(1.5, jnp.float32),
        "double": jnp.array(2.0),
        "complex": jnp.array(1.0 - 2.0j),
    }
    gradient, expected = run(args)
    dtypes = [{k: x.dtype for k, x in tree.items()} for tree in (gradient, args)]
    assert dtypes[0] == dtypes[1]
    assert_close(gradient["single"], expected["single"], tol=SINGLE)
    assert_close(gradient["double"], expected["double"])
    assert_close(gradient["complex"], expected["complex"])


# --- numbers as states --------------------------------------------------------------


@pytest.mark.parametrize(
    "y0",
    [1, 1.0, np.float64(1), np.array(1), jnp.array(1)],
    ids=["int", "float", "NumPy float", "NumPy integer", "JAX integer"],
)
def test_number_as_guess_is_promoted_to_an_array(y0):
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, b: y**3 - b), optx.Newton(**NEWTON))
    value = layer(y0, jnp.array(8.0))
    assert isinstance(value, jax.Array)
    assert value.dtype == jnp.float64
    assert_close(value, 2.0)


# --- dtypes -------------------------------------------------------------------------


def mixed_residual(y, b):
    single, double = y["single"], y["double"]
    coupling = double.astype(jnp.float32)
    return {
        "single": single**3 + single - b.astype(jnp.float32) + 0.5 * coupling,
        "double": double**3 + 2 * double - b * single.astype(jnp.float64),
    }


MIXED = {
    "root": eqi.Root(mixed_residual),
    "least squares": eqi.LeastSquares(mixed_residual),
    "fixed point": eqi.FixedPoint(
        lambda y, b: jax.tree.map(lambda y, f: y - f / 4, y, mixed_residual(y, b))
    ),
    "minimum": eqi.Minimum(
        lambda y, b: sum(r**2 for r in map(jnp.float32, mixed_residual(y, b).values()))
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "root",
        pytest.param("least squares", marks=pytest.mark.slow),
        pytest.param("fixed point", marks=pytest.mark.slow),
        pytest.param("minimum", marks=pytest.mark.slow),
    ],
)
def test_default_solvers_of_float32_beside_float64(name):
    y0 = {"single": jnp.array(0.5, jnp.float32), "double": jnp.array(0.5)}
    layer = eqi.ImplicitFunction(MIXED[name])
    solve = lambda b: layer(y0, b)
    y, slope = jax.jit(lambda b: (solve(b), jax.jacfwd(solve)(b)))(jnp.array(1.3))
    s, d = float(y["single"]), float(y["double"])
    residual = mixed_residual(y, jnp.array(1.3))
    assert_close([residual["single"], residual["double"]], [0.0, 0.0], tol=SINGLE)
    by_y = np.array([[3 * s**2 + 1, 0.5], [-1.3, 3 * d**2 + 2]])
    expected = np.linalg.solve(by_y, [1.0, s])
    assert_close([slope["single"], slope["double"]], list(expected), tol=10 * SINGLE)


@pytest.mark.parametrize("how", ["newton", "attached"])
def test_float32_beside_float64_keeps_its_dtypes_and_its_derivative(how):
    y0 = {"single": jnp.array(0.5, jnp.float32), "double": jnp.array(0.5)}

    @jax.jit
    def run(b):
        if how == "newton":
            tol = {"rtol": SINGLE, "atol": SINGLE}
            layer = eqi.ImplicitFunction(
                eqi.Root(mixed_residual), optx.Newton(**tol), throw=False
            )
            solution = lambda b: layer(y0, b)
        else:
            y = {"single": jnp.array(0.7, jnp.float32), "double": jnp.array(0.4)}
            solution = lambda b: eqi.implicit_solution(eqi.Root(mixed_residual), y, b)
        loss = lambda b: solution(b)["double"] + solution(b)["single"].astype(float)
        return (
            solution(b),
            jax.jvp(solution, (b,), (jnp.ones(()),))[1],
            jax.grad(loss)(b),
        )

    b = jnp.array(1.3)
    value, t_y, gradient = run(b)
    s, d = float(value["single"]), float(value["double"])
    by_y = np.array([[3 * s**2 + 1, 0.5], [-1.3, 3 * d**2 + 2]])
    expected = np.linalg.solve(by_y, [1.0, s])
    for tree in (value, t_y):
        assert tree["single"].dtype == jnp.float32
        assert tree["double"].dtype == jnp.float64
    assert_close([t_y["single"], t_y["double"]], list(expected), tol=SINGLE)
    assert_close(gradient, expected.sum(), tol=SINGLE)


def holomorphic(z, c):
    return z**3 + (1 + 0.5j) * z - c


def conjugating(z, c):
    return z + 0.5 * jnp.conj(z) ** 2 - c


def two_conjugating(z, c):
    coupling = jnp.array([[0.0, 0.4j], [-0.3, 0.0]])
    return z + coupling @ jnp.conj(z) + 0.1 * z**2 * jnp.conj(z) - c


COMPLEX_CASES = {
    "holomorphic": (holomorphic, 0.3 + 0.4j, 0.8 - 0.3j),
    "conjugating": (conjugating, 0.3 + 0.4j, 0.5 - 0.3j),
    "coupled": (two_conjugating, np.array([0.1 + 0.1j, 0.2]), np.array([1 - 1j, 0.4])),
}


def real_newton(fn, z0, c):
    """Newton's method in NumPy on real and imaginary parts, with real Jacobians."""
    z, n = np.atleast_1d(z0).astype(complex), np.size(z0)
    shaped = lambda z: jnp.asarray(z.reshape(np.shape(z0)))

    def f(v):
        out = np.atleast_1d(fn(shaped(v[:n] + 1j * v[n:]), jnp.asarray(c)))
        return np.concatenate([out.real, out.imag])

    v = np.concatenate([z.real, z.imag])
    for _ in range(30):
        # f is analytic in v up to |z|; central differences are good to 1e-10 here.
        steps = 1e-6 * np.eye(2 * n)
        jacobian = np.stack([(f(v + h) - f(v - h)) / 2e-6 for h in steps], axis=1)
        v = v - np.linalg.solve(jacobian, f(v))
    return (v[:n] + 1j * v[n:]).reshape(np.shape(z0)), jacobian


# The truth has a Jacobian by central differences with step 1e-6.
DIFFERENCES = 1e-7


@pytest.mark.parametrize("case", COMPLEX_CASES)
def test_complex_state_is_differentiated_as_a_real_linear_system(case):
    fn, z0, c = COMPLEX_CASES[case]
    z, jacobian = real_newton(fn, z0, c)
    t_c, ct_z = np.full(np.shape(c), 0.7 - 1.1j), np.full(np.shape(c), 0.2 + 0.9j)

    @jax.jit
    def run(c):
        def solution(c):
            return eqi.implicit_solution(eqi.Root(fn), jnp.asarray(z), c)

        t_z = jax.jvp(solution, (c,), (jnp.asarray(t_c),))[1]
        return t_z, jax.vjp(solution, c)[1](jnp.asarray(ct_z))[0]

    t_z, ct_c = run(jnp.asarray(c))
    # ∂F/∂c is minus the identity.
    n = np.size(c)
    parts = np.concatenate([np.atleast_1d(t_c).real, np.atleast_1d(t_c).imag])
    expected = np.linalg.solve(jacobian, parts)
    expected = (expected[:n] + 1j * expected[n:]).reshape(np.shape(c))
    assert_close(t_z, expected, tol=DIFFERENCES)
    # JAX's pairing on complex numbers is Re(ct · t), without conjugation.
    left, right = np.sum(ct_z * expected).real, np.sum(np.asarray(ct_c) * t_c).real
    np.testing.assert_allclose(right, left, rtol=DIFFERENCES)


@pytest.mark.parametrize("case", COMPLEX_CASES)
def test_complex_root_is_found_by_a_layer(case):
    fn, z0, c = COMPLEX_CASES[case]
    layer = eqi.ImplicitFunction(eqi.Root(fn), optx.Newton(**NEWTON))

    @jax.jit
    def run(c):
        loss = lambda c: jnp.sum(jnp.abs(layer(jnp.asarray(z0), c)) ** 2)
        return layer(jnp.asarray(z0), c), jax.grad(loss)(c)

    value, gradient = run(jnp.asarray(c))
    z, jacobian = real_newton(fn, z0, c)
    assert_close(value, z, tol=EXACT)
    # d|z|² = 2 (Re z dRe z + Im z dIm z); JAX's gradient is ∂/∂Re c - i ∂/∂Im c.
    n, flat = np.size(c), np.atleast_1d(z)
    weights = 2 * np.concatenate([flat.real, flat.imag])
    by_c = np.linalg.solve(jacobian.T, weights)
    expected = (by_c[:n] - 1j * by_c[n:]).reshape(np.shape(c))
    assert_close(gradient, expected, tol=DIFFERENCES)


def test_real_parameter_of_a_complex_state_has_a_real_derivative():
    # z² = -b has the root i √b, whose derivative is i / (2 √b).
    def solution(b):
        y = jax.lax.complex(0.0 * b, jnp.sqrt(b))
        return eqi.implicit_solution(eqi.Root(lambda z, b: z**2 + b), y, b)

    b = jnp.array(4.0)
    assert_close(jax.jit(jax.grad(lambda b: jnp.imag(solution(b))))(b), 0.25)
    assert_close(jax.jit(jax.jvp, static_argnums=0)(solution, (b,), (b,))[1], 1.0j)


def test_complex_minimum_of_a_real_objective():
    # With z = p + iq and c = a + ib: (p - a)² + (q - b)² + p² + q² + pq.
    def objective(z, c):
        return jnp.abs(z - c) ** 2 + jnp.abs(z) ** 2 + jnp.imag(z**2) / 2

    hessian = np.array([[4.0, 1.0], [1.0, 4.0]])
    c = jnp.array(1.0 + 2.0j)
    p, q = np.linalg.solve(hessian, [2 * c.real, 2 * c.imag])

    def loss(c):
        y = eqi.implicit_solution(eqi.Minimum(objective), jnp.array(p + 1j * q), c)
        return jnp.real(y) ** 2 + 3 * jnp.imag(y)

    gradient = jax.jit(jax.grad(loss))(c)
    by_a, by_b = 2 * np.linalg.solve(hessian, [2 * p, 3.0])
    assert_close(gradient, by_a - 1j * by_b)


def test_complex_beside_real_leaves_in_one_state():
    def residual(y, args):
        z, x = y
        a, b = args
        return z**2 + x.astype(z.dtype) * jnp.conj(z) - a, x**3 + x + jnp.real(z) - b

    y = (jnp.array(0.6 + 0.3j), jnp.array(0.5))
    args = residual(y, (jnp.array(0.0j), jnp.array(0.0)))  # makes `y` a root

    @jax.jit
    def run(args):
        def solution(args):
            return eqi.implicit_solution(eqi.Root(residual), y, args)

        t_args = (jnp.array(1.0 - 0.5j), jnp.array(0.3))
        return jax.jvp(solution, (args,), (t_args,))[1]

    t_z, t_x = run(args)
    # Real form by hand: z = p + iq, so z² + x z̄ = p² - q² + xp + i(2pq - xq).
    p, q, x = 0.6, 0.3, 0.5
    jacobian = np.array(
        [[2 * p + x, -2 * q, p], [2 * q, 2 * p - x, -q], [1, 0, 3 * x**2 + 1]]
    )
    t_p, t_q, expected_x = np.linalg.solve(jacobian, [1.0, -0.5, 0.3])
    assert_close((t_z, t_x), (t_p + 1j * t_q, expected_x))


def test_state_with_more_dimensions_keeps_its_shape():
    y0 = jnp.zeros((2, 1, 3))
    b = jnp.arange(6.0).reshape(2, 1, 3)

    def residual(y, b):
        return jnp.einsum("ij,abj->abi", A, jnp.sinh(y)) - b

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
    value = layer(y0, b)
    expected = np.arcsinh(np.einsum("ij,abj->abi", np.linalg.inv(A), b))
    assert_close(value, expected)


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        (eqi.Root(lambda y, a: [0.0, y[1] - a]), [1.0, 3.0]),
        (eqi.FixedPoint(lambda y, a: [0.5, a]), [0.5, 3.0]),
        (eqi.LeastSquares(lambda y, a: [0, y[0] - 2, y[1] - a]), [2.0, 3.0]),
        (eqi.Minimum(lambda y, a: 0.5), [1.0, 1.0]),
    ],
    ids=["root", "fixed point", "least squares", "minimum"],
)
def test_function_may_return_python_numbers(condition, value):
    layer = eqi.ImplicitFunction(condition, throw=False)
    found = layer([jnp.array(1.0), jnp.array(1.0)], jnp.array(3.0))
    np.testing.assert_allclose(found, value, rtol=1e-8)


def test_diagnosis_takes_a_function_that_returns_python_numbers():
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda y, a: [0.5, a]), lambda y0, a: [jnp.array(0.5), a]
    )
    report = eqi.check_implicit(layer, [jnp.array(1.0), jnp.array(1.0)], 3.0)
    assert report.ok, str(report)
