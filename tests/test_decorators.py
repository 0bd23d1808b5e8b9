"""Decorators give a derivative to a solver that exists already."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from problems import assert_close, FIXED_POINT, ROOT

import eqximplicit as eqi

X = np.array([[1.0, 0.2], [0.5, -1.0], [-0.3, 0.8], [0.9, 0.4]])
Y = np.array([1.0, -0.5, 0.3, 2.0])
DATA = (jnp.array(X), jnp.array(Y))


def ridge_optimality(w, data, l2, *, offset=0.0):
    x, y = data
    return x.T @ (x @ w - y) + l2 * (w - offset)


def ridge_python(w0, data, l2, *, offset=0.0):
    """Ridge regression by NumPy, which JAX cannot trace."""
    del w0
    x, y = (np.asarray(leaf) for leaf in data)
    gram = x.T @ x + float(l2) * np.eye(2)
    return np.linalg.solve(gram, x.T @ y + float(l2) * float(offset))


def ridge_truth(data, l2, offset=0.0):
    x, y = data
    return jnp.linalg.solve(
        x.T @ x + l2 * jnp.eye(2), x.T @ y + l2 * offset * jnp.ones(2)
    )


def total(w):
    return jnp.sum(w**2)


def test_custom_root_takes_several_positional_arguments():
    ridge = eqi.custom_root(ridge_optimality)(ridge_python)
    gradient = jax.grad(lambda data, l2: total(ridge(None, data, l2)), argnums=(0, 1))
    expected = jax.grad(lambda data, l2: total(ridge_truth(data, l2)), argnums=(0, 1))
    assert_close(gradient(DATA, 0.3), expected(DATA, 0.3))


def test_custom_root_takes_keyword_arguments():
    ridge = eqi.custom_root(ridge_optimality)(ridge_python)

    def loss(l2, offset):
        return total(ridge(None, DATA, l2=l2, offset=offset))

    def truth(l2, offset):
        return total(ridge_truth(DATA, l2, offset))

    gradient = jax.grad(loss, argnums=(0, 1))(0.3, 0.7)
    assert_close(gradient, jax.grad(truth, argnums=(0, 1))(0.3, 0.7))


def test_decorated_solver_returns_what_it_returned_and_keeps_its_name():
    @eqi.custom_root(ridge_optimality)
    def ridge(w0, data, l2):
        """Fits."""
        return ridge_python(w0, data, l2)

    assert ridge.__name__ == "ridge"
    assert ridge.__doc__ == "Fits."
    value = ridge(np.zeros(2), DATA, 0.3)
    np.testing.assert_array_equal(value, ridge_python(None, DATA, 0.3))


def test_decorated_solver_works_in_forward_mode_and_to_second_order():
    ridge = eqi.custom_root(ridge_optimality, tags=lx.symmetric_tag)(ridge_python)
    solve, truth = (
        (lambda l2: ridge(None, DATA, l2)),
        (lambda l2: ridge_truth(DATA, l2)),
    )
    assert_close(jax.jacfwd(solve)(0.3), jax.jacfwd(truth)(0.3))
    second = lambda f: jax.grad(jax.grad(lambda l2: total(f(l2))))(0.3)
    assert_close(second(solve), second(truth))


def test_decorated_traceable_solver_works_under_jit_and_vmap():
    @eqi.custom_root(ridge_optimality, linear_solver=lx.LU())
    def ridge(w0, data, l2):
        x, y = data
        step = lambda _, w: w - 0.2 * ridge_optimality(w, data, l2)
        return jax.lax.fori_loop(0, 300, step, w0)

    @jax.jit
    def run(l2s):
        one = lambda l2: total(ridge(jnp.zeros(2), DATA, l2))
        return jax.vmap(jax.grad(one))(l2s)

    l2s = jnp.array([0.1, 0.3, 1.0])
    expected = jax.vmap(jax.grad(lambda l2: total(ridge_truth(DATA, l2))))(l2s)
    assert_close(run(l2s), expected)


def test_auxiliary_output_stays_beside_the_solution():
    @eqi.custom_root(ridge_optimality, has_aux=True)
    def ridge(w0, data, l2):
        return ridge_python(w0, data, l2), {"steps": 3, "note": "direct"}

    def loss(l2):
        w, aux = ridge(None, DATA, l2)
        return total(w), aux

    gradient, aux = jax.grad(loss, has_aux=True)(0.3)
    assert_close(gradient, jax.grad(lambda l2: total(ridge_truth(DATA, l2)))(0.3))
    assert aux == {"steps": 3, "note": "direct"}


def test_optimality_may_take_the_auxiliary_output_of_the_solver():
    def optimality(w, rows, data, l2):
        x, y = data
        x, y = x[rows["kept"]], y[rows["kept"]]
        return x.T @ (x @ w - y) + l2 * w

    @eqi.custom_root(optimality, has_aux=True, takes_aux=True)
    def trimmed(w0, data, l2):
        kept = [i for i in range(4) if float(data[1][i]) < 1.5]  # a list that grows
        rows = {"kept": jnp.array(kept)}
        x, y = (leaf[rows["kept"]] for leaf in data)
        return ridge_python(w0, (x, y), l2), rows

    def truth(data, l2):
        return total(ridge_truth((data[0][:3], data[1][:3]), l2))

    gradient = jax.grad(lambda data, l2: total(trimmed(None, data, l2)[0]), (0, 1))
    assert_close(gradient(DATA, 0.3), jax.grad(truth, (0, 1))(DATA, 0.3))


@pytest.mark.parametrize("argnums", [1, 2, (1, 2)])
def test_argnums_choose_which_arguments_have_a_derivative(argnums):
    ridge = eqi.custom_root(ridge_optimality, argnums=argnums)(ridge_python)
    gradient = jax.grad(lambda data, l2: total(ridge(None, data, l2)), argnums=(0, 1))
    truth = jax.grad(lambda data, l2: total(ridge_truth(data, l2)), argnums=(0, 1))
    chosen = {argnums} if isinstance(argnums, int) else set(argnums)
    expected = [
        leaf if i in chosen else jax.tree.map(jnp.zeros_like, leaf)
        for i, leaf in enumerate(truth(DATA, 0.3), start=1)
    ]
    assert_close(gradient(DATA, 0.3), expected)


@pytest.mark.parametrize("argnums", [0, 3, (1, 5)])
def test_argnums_out_of_range_are_refused(argnums):
    ridge = eqi.custom_root(ridge_optimality, argnums=argnums)(ridge_python)
    with pytest.raises(ValueError, match=r"argnums.*between 1 and 2"):
        ridge(None, DATA, 0.3)


def test_argnums_of_an_argument_passed_by_keyword_are_refused_with_a_remedy():
    ridge = eqi.custom_root(ridge_optimality, argnums=1)(ridge_python)
    with pytest.raises(ValueError, match="this call has 0.*`data, l2` by position"):
        ridge(None, data=DATA, l2=0.3)


def test_argnums_may_be_a_numpy_integer():
    cube = eqi.custom_root(lambda y, a: y**3 - a, argnums=np.int64(1))
    assert_close(
        jax.grad(lambda a: cube(lambda _, a: jnp.cbrt(a))(1.0, a))(8.0), 1 / 12
    )


def test_error_under_jit_names_the_decorated_solver():
    @eqi.custom_root(lambda y, a: y**3 - a)
    def cube_root(y0, a):
        return float(a) ** (1 / 3)

    with pytest.raises(ValueError, match="solver `cube_root` asked for the value"):
        jax.jit(lambda a: cube_root(1.0, a))(8.0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda solve, a: solve(1.0, a), "`a`, float64"),
        (lambda solve, a: solve(1.0, a=a), "`a`, float64"),
        (lambda solve, a: solve(1.0, 8.0, {"w": a}), r"`b\['w'\]`, float64"),
        (lambda solve, a: solve(1.0, 8.0, {"w": 1.0}, a), "`argument 3`, float64"),
        (lambda solve, a: solve(1.0, 8.0, c=a), "`c`, float64"),
    ],
    ids=["position", "keyword", "leaf", "further position", "further keyword"],
)
def test_error_under_jit_names_the_argument_as_the_caller_does(call, name):
    @eqi.custom_root(lambda y, a, b=None, *rest, **settings: y**3 - a)
    def cube_root(y0, a, b=None, *rest, **settings):
        return sum(map(float, jax.tree.leaves((a, b, rest, settings))))

    with pytest.raises(ValueError, match=f"Traced here: {name}"):
        jax.jit(lambda a: call(cube_root, a))(8.0)


def test_auxiliary_output_that_nobody_returns_is_refused():
    decorator = eqi.custom_root(lambda y, aux, a: y - a, takes_aux=True)
    with pytest.raises(ValueError, match=r"Return `\(y, aux\)` from the solver"):
        decorator(lambda y0, a: a)


class WithStaticArray(eqx.Module):
    array: np.ndarray = eqx.field(static=True)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_static_array_in_an_argument_is_refused_by_the_name_of_the_argument():
    solve = eqi.custom_root(lambda y, a: y)(lambda y, a: y)
    with pytest.raises(ValueError, match="The static field `a.array` holds an array"):
        solve(1.0, WithStaticArray(np.ones(2)))


@pytest.mark.parametrize("container", [list, tuple], ids=["list", "tuple"])
def test_custom_fixed_point_of_a_state_with_structure(container):
    def fixed_point_map(state, args):
        image = FIXED_POINT.fn(jnp.append(state[0], state[1]), args)
        return container((image[0], image[1:]))

    @eqi.custom_fixed_point(fixed_point_map)
    def solve(state0, args):
        y = FIXED_POINT.solve(np.append(state0[0], state0[1]), args)
        return container((y[0], y[1:]))

    state0 = container((np.array(0.0), np.zeros(2)))
    loss = lambda args: jnp.sum(solve(state0, args)[1])
    gradient = jax.grad(loss)(FIXED_POINT.args)
    expected = [leaf[1:].sum(0) for leaf in FIXED_POINT.jacobian(FIXED_POINT.args)]
    assert_close(gradient, expected)


def test_guess_of_a_decorated_solver_has_zero_derivative():
    solve = eqi.custom_root(ROOT.fn)(lambda y0, args: ROOT.solution(args) + 0 * y0)
    gradient = jax.grad(lambda y0: jnp.sum(solve(y0, ROOT.args)))(jnp.zeros(3))
    assert_close(gradient, jnp.zeros(3), tol=0)


def test_gradient_flows_to_what_decorated_solver_and_optimality_captured():
    def loss(l2):
        @eqi.custom_root(lambda w, data: ridge_optimality(w, data, l2))
        def ridge(w0, data):
            return ridge_python(w0, data, float(l2))

        return total(ridge(None, DATA))

    assert_close(
        jax.grad(loss)(0.3), jax.grad(lambda l2: total(ridge_truth(DATA, l2)))(0.3)
    )


# --- a bilevel problem ---------------------------------------------------------------


def imaml_problem():
    """A batch for a linear network on four inputs."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 1))
    return jnp.array(x), jnp.array(y)


@pytest.mark.slow
def test_meta_gradient_of_a_proximal_inner_problem():
    # φ*(θ) = argmin mean (x φ_w + φ_b - y)² + ½ |φ - θ|²; a state of two leaves.
    x, y = imaml_problem()
    theta = {"weight": jnp.ones((1, 4)), "bias": jnp.zeros(1)}

    def objective(phi, theta):
        predictions = x @ phi["weight"].T + phi["bias"][None]
        proximal = sum(jnp.sum((phi[k] - theta[k]) ** 2) for k in phi)
        return jnp.mean((predictions - y) ** 2) + proximal / 2

    @jax.jit
    def descend(phi, theta):
        grads = jax.grad(objective)(phi, theta)
        return jax.tree.map(lambda p, g: p - 0.2 * g, phi, grads)

    @eqi.custom_root(jax.jit(jax.grad(objective)))
    def inner(phi, theta):
        for _ in range(200):  # a Python loop
            phi = descend(phi, theta)
        return phi

    def outer(theta):
        phi = inner(theta, theta)
        return jnp.mean(x @ phi["weight"].T + phi["bias"][None])

    gradient = jax.grad(outer)(theta)
    # The problem is quadratic: dφ*/dθ is the inverse Hessian.
    design = np.hstack([np.asarray(x), np.ones((20, 1))])
    hessian = 2 * design.T @ design / 20 + np.eye(5)
    expected = np.linalg.solve(hessian, design.mean(0))
    assert_close(
        (gradient["weight"][0], gradient["bias"]), (expected[:4], expected[4:])
    )


def test_partial_and_bound_method_may_be_decorated():
    partial = functools.partial(ridge_python, offset=0.7)
    optimality = functools.partial(ridge_optimality, offset=0.7)
    ridge = eqi.custom_root(optimality)(partial)
    gradient = jax.grad(lambda l2: total(ridge(None, DATA, l2)))(0.3)
    assert_close(gradient, jax.grad(lambda l2: total(ridge_truth(DATA, l2, 0.7)))(0.3))


# The solver's defaults are the condition's values, whatever that calls them.


def cubic_solver(y0, a, b=2.0, *, tol=1e-14):
    del tol
    y = y0
    for _ in range(60):
        y = y - (y**3 + y * b - a) / (3 * y * y + b)
    return y


def tolerant_cubic_solver(y0, a, tol=1e-14, b=2.0):
    return cubic_solver(y0, a, b, tol=tol)


CUBICS = {
    "same names": lambda y, a, b: y**3 + y * b - a,
    "another default": lambda y, a, b=1.0: y**3 + y * b - a,
    "other names": lambda y, p, q: y**3 + y * q - p,
    "any names": lambda y, a, **others: y**3 + y * others["b"] - a,
    "keyword only": lambda y, a, *, b: y**3 + y * b - a,
}
CALLS = {
    "defaults": lambda solve, a: solve(jnp.array(0.3), a),
    "by name": lambda solve, a: solve(jnp.array(0.3), a, b=2.0),
    "by position": lambda solve, a: solve(jnp.array(0.3), a, 2.0),
    "guess by name": lambda solve, a: solve(y0=jnp.array(0.3), a=a),
}


@pytest.mark.parametrize("optimality", CUBICS.values(), ids=CUBICS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_condition_sees_the_values_that_the_solver_used(optimality, call):
    by_position = call is CALLS["by position"]
    if by_position and optimality in (CUBICS["any names"], CUBICS["keyword only"]):
        optimality = CUBICS["same names"]  # which Python calls by position
    solve = eqi.custom_root(optimality)(cubic_solver)
    slope = jax.grad(lambda a: call(solve, a))(1.0)
    root = cubic_solver(0.3, 1.0)
    np.testing.assert_allclose(slope, 1 / (3 * root**2 + 2), rtol=1e-6)


def test_default_of_the_solver_alone_is_no_argument_of_the_condition():
    for optimality in (CUBICS["same names"], CUBICS["another default"]):
        solve = eqi.custom_root(optimality)(tolerant_cubic_solver)
        slope = jax.grad(lambda a, solve=solve: solve(jnp.array(0.3), a))(1.0)
        root = cubic_solver(0.3, 1.0)
        np.testing.assert_allclose(slope, 1 / (3 * root**2 + 2), rtol=1e-6)


def strict_cubic_solver(y0, a, b=2.0, /):
    return cubic_solver(y0, a, b)


@pytest.mark.parametrize(
    "optimality",
    [
        CUBICS["same names"],
        CUBICS["another default"],
        lambda y, a, b, /: y**3 + y * b - a,
    ],
    ids=["same names", "another default", "positional only"],
)
def test_positional_only_default_reaches_the_condition(optimality):
    for solver in (strict_cubic_solver, cubic_solver):
        solve = eqi.custom_root(optimality)(solver)
        slope = jax.grad(lambda a, solve=solve: solve(jnp.array(0.3), a))(1.0)
        root = cubic_solver(0.3, 1.0)
        np.testing.assert_allclose(slope, 1 / (3 * root**2 + 2), rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda solve, a, tol: solve(1.0, a, tol),
        lambda solve, a, tol: solve(1.0, a, tol=tol),
        lambda solve, a, tol: solve(1.0, a=a, tol=tol),
    ],
    ids=["position", "keyword", "both by keyword"],
)
@pytest.mark.parametrize(
    "decorator",
    [
        eqi.custom_root(lambda y, a: y**3 - a),
        eqi.custom_root(lambda y, p: y**3 - p),
        eqi.custom_fixed_point(lambda y, a: y - (y**3 - a) / 12),
    ],
    ids=["same name", "another name", "fixed point"],
)
def test_argument_for_the_solver_alone_has_zero_derivative(decorator, call):
    solve = decorator(lambda y0, a, tol=1e-8: jnp.cbrt(a) + 0 * tol)
    slopes = jax.grad(lambda a, tol: call(solve, a, tol), (0, 1))(8.0, 1e-3)
    assert_close(slopes, (1 / 12, 0.0))


def test_arguments_go_to_the_parameters_of_their_name_however_they_are_passed():
    optimality = lambda y, b, a: y**3 + y * b - a  # the other way round
    expected = 1 / (3 * cubic_solver(0.3, 1.0) ** 2 + 2)
    calls = [
        (cubic_solver, lambda solve, a: solve(0.3, a, 2.0)),
        (cubic_solver, lambda solve, a: solve(0.3, a=a, b=2.0)),
        (tolerant_cubic_solver, lambda solve, a: solve(0.3, a, 1e-14, 2.0)),
    ]
    for solver, call in calls:
        solve = eqi.custom_root(optimality)(solver)
        slope = jax.grad(lambda a, solve=solve, call=call: call(solve, a))(1.0)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_further_arguments_reach_a_condition_that_takes_any():
    def cube_root(y0, a, *rest, **settings):
        return jnp.cbrt(a * rest[0] * settings["scale"])

    for optimality in (
        lambda y, a, *rest, **settings: y**3 - a * rest[0] * settings["scale"],
        lambda *args, **settings: args[0] ** 3 - args[1] * args[2] * settings["scale"],
    ):
        solve = eqi.custom_root(optimality)(cube_root)
        slope = jax.grad(lambda a, solve=solve: solve(1.0, a, 2.0, scale=0.5))(8.0)
        assert_close(slope, 1 / 12)


def test_condition_that_needs_more_than_the_call_has_is_refused_before_the_solve():
    def unreachable(y0, a):
        raise AssertionError

    solve = eqi.custom_root(lambda y, a, b: y)(unreachable)
    with pytest.raises(TypeError, match="needs `b`, which this call of `unreachable`"):
        solve(1.0, 2.0)


def test_call_without_a_guess_names_it():
    solve = eqi.custom_root(CUBICS["same names"])(cubic_solver)
    with pytest.raises(TypeError, match="Pass `y0` as the first argument"):
        solve()


def test_method_of_a_module_is_decorated_without_a_warning():
    class Cubic(eqx.Module):
        b: jax.Array

        def solve(self, y0, a):
            return cubic_solver(y0, a, self.b)

    def slope(b):
        method = Cubic(b).solve
        optimality = lambda y, a: y**3 + y * b - a
        return eqi.custom_root(optimality)(method)(jnp.array(0.3), 1.0)

    root = cubic_solver(0.3, 1.0)
    expected = -root / (3 * root**2 + 2)
    np.testing.assert_allclose(jax.grad(slope)(jnp.array(2.0)), expected, rtol=1e-6)


@pytest.mark.parametrize("decorator", [eqi.custom_root, eqi.custom_fixed_point])
def test_method_without_its_object_is_refused_with_the_two_ways_out(decorator):
    with pytest.raises(
        TypeError, match=r"first argument is `self` .*module.solve.*AbstractImplicit"
    ):

        class Solver:
            @decorator(lambda y, a: y**3 - a)
            def solve(self, y0, a):
                return jnp.cbrt(a)


@pytest.mark.parametrize("decorator", [eqi.custom_root, eqi.custom_fixed_point])
def test_what_is_no_condition_or_no_linear_solver_is_refused_at_once(decorator):
    with pytest.raises(TypeError, match="is the class `Cubic`. Pass an instance"):
        decorator(Cubic)
    # The run-time type checker may be the one that refuses.
    with pytest.raises((TypeError, TypeCheckError), match="linear_solver"):
        decorator(lambda y, a: y, linear_solver=jnp.linalg.solve)


class Cubic(eqx.Module):
    b: jax.Array

    def __call__(self, y, a):
        return y**3 + y * self.b - a
