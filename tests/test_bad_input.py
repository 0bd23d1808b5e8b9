"""Input that cannot be right is refused while tracing, by name, shape and dtype."""

import functools
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import eqximplicit as eqi

NEWTON = optx.Newton(rtol=1e-8, atol=1e-8)
GUESS = {"bond": jnp.zeros(2), "angle": jnp.zeros(())}


def root(fn, y0=GUESS, solver=NEWTON, **kwargs):
    layer = eqi.ImplicitFunction(eqi.Root(fn), solver, **kwargs)
    return jax.eval_shape(lambda: layer(y0))  # refused without running anything


def fixed_point(fn, y0=GUESS):
    layer = eqi.ImplicitFunction(eqi.FixedPoint(fn), NEWTON)
    return jax.eval_shape(lambda: layer(y0))


def identity(y0, args):
    return y0


WRONG_RESIDUALS = {
    "too few equations": (
        lambda y, _: {"bond": y["bond"][:1], "angle": y["angle"]},
        r"\['bond'\]` is float64\[1\].*\['bond'\]` is float64\[2\]",
    ),
    "too many leaves": (
        lambda y, _: (y["angle"], y["bond"], y["angle"]),
        r"3 leaves and the state has 2.*`out\[2\]`.*float64\[\]",
    ),
    "too few leaves": (
        lambda y, _: (y["angle"],),
        r"1 leaves and the state has 2.*`y0\['bond'\]`.*float64\[2\]",
    ),
    "same number in another shape": (
        lambda y, _: {"bond": y["bond"][None], "angle": y["angle"]},
        r"float64\[1, 2\].*float64\[2\]",
    ),
    "leaves in another order": (
        lambda y, _: [y["bond"], y["angle"]],
        r"`out\[0\]` is float64\[2\].*`y0\['angle'\]` is float64\[\]",
    ),
    "complex residual of a real state": (
        lambda y, _: {"bond": jax.lax.complex(*[y["bond"]] * 2), "angle": y["angle"]},
        r"complex128\[2\].*\['bond'\]`.*float64\[2\]",
    ),
    "text": (
        lambda y, _: {"bond": "stretched", "angle": y["angle"]},
        "str 'stretched'",
    ),
    "integers": (
        lambda y, _: {"bond": jnp.array([1, 2]), "angle": y["angle"]},
        r"int64\[2\] at `out\['bond'\]`, opposite .* `y0\['bond'\]`.*float64\[2\]",
    ),
    "number": (
        lambda y, _: {"bond": y["bond"], "angle": 0},
        r"int64\[\] at `out\['angle'\]`, opposite .* `y0\['angle'\]`.*float64\[\]",
    ),
    "truth values": (
        lambda y, _: {"bond": y["bond"] > 0, "angle": y["angle"]},
        r"bool\[2\] at `out\['bond'\]`.*float64\[2\].*Return real or complex numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG_RESIDUALS)
@pytest.mark.parametrize("solver", [NEWTON, identity], ids=["optimistix", "callable"])
def test_residual_that_does_not_match_the_state_is_refused(case, solver):
    fn, message = WRONG_RESIDUALS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        root(fn, solver=solver)


@pytest.mark.parametrize("case", WRONG_RESIDUALS)
def test_residual_that_does_not_match_is_refused_by_the_rule_too(case):
    fn, message = WRONG_RESIDUALS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        eqi.implicit_solution(eqi.Root(fn), GUESS)


def test_wrong_residual_is_refused_inside_optimistix_too():
    with pytest.raises(ValueError, match=r"(?s)float64\[1\].*float64\[2\]"):
        optx.root_find(
            lambda y, _: y[:1],
            NEWTON,
            jnp.zeros(2),
            adjoint=eqi.ImplicitAdjoint(),
        )


def test_image_with_another_structure_than_the_state_is_refused():
    with pytest.raises(ValueError, match=r"(?s)structure of the state.*\(\*, \*\)"):
        fixed_point(lambda y, _: (y["angle"], y["bond"]))


def test_image_with_another_dtype_than_the_state_is_refused():
    def single(y, _):
        return {"bond": y["bond"].astype(jnp.float32), "angle": y["angle"]}

    with pytest.raises(ValueError, match=r"(?s)\['bond'\]`.*float64.*float32"):
        fixed_point(single)


@pytest.mark.parametrize(
    "objective",
    [lambda y, _: y, lambda y, _: (y[0],), lambda y, _: jax.lax.complex(y[0], y[1])],
    ids=["vector", "tuple", "complex"],
)
def test_objective_that_is_no_real_scalar_is_refused(objective):
    layer = eqi.ImplicitFunction(eqi.Minimum(objective))
    with pytest.raises(ValueError, match="objective must be a real scalar"):
        layer(jnp.ones(2))


def test_least_squares_without_residuals_is_refused():
    layer = eqi.ImplicitFunction(eqi.LeastSquares(lambda y, _: ()))
    with pytest.raises(ValueError, match="no residuals"):
        layer(jnp.ones(2))


@pytest.mark.parametrize("y0", [(), {}, {"a": None}, jnp.zeros((0, 3))], ids=str)
def test_empty_state_is_refused(y0):
    with pytest.raises(ValueError, match="empty"):
        root(lambda y, _: y, y0=y0)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", r"str 'text' at `y0\['bond'\]\[1\]`"),
        (True, r"bool True at `y0\['bond'\]\[1\]`"),
        (jnp.array([True, False]), r"bool\[2\] at `y0\['bond'\]\[1\]`"),
        (jnp.tanh, r"at `y0\['bond'\]\[1\]`"),
        (jax.random.key(0), r"key<fry>\[\] at `y0\['bond'\]\[1\]`"),
        (np.array(["a"]), r"str32\[1\] at `y0\['bond'\]\[1\]`.* array of numbers"),
        (np.array([None, 1.0]), r"object\[2\] at `y0\['bond'\]\[1\]`"),
    ],
    ids=[
        *("text", "bool", "boolean array", "function", "random key", "array of text"),
        "array of objects",
    ],
)
def test_leaf_of_the_state_that_is_no_number_is_refused_by_name(leaf, message):
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, _: y), NEWTON)
    with pytest.raises(ValueError, match=message):
        layer({"bond": (1.0, leaf)})
    with pytest.raises(ValueError, match=message):
        eqi.implicit_solution(layer.condition, {"bond": (1.0, leaf)})


def test_integer_guess_is_promoted_as_optimistix_does():
    value = eqi.ImplicitFunction(eqi.Root(lambda y, _: y**2 - 4), NEWTON)(
        {"a": jnp.array(3)}["a"]
    )
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, 2.0, rtol=1e-7)


@pytest.mark.parametrize(
    "solver", [3, "newton", object()], ids=["int", "str", "object"]
)
def test_solver_that_is_not_callable_is_refused(solver):
    with pytest.raises(TypeError, match="`solver` must be .* callable"):
        eqi.ImplicitFunction(eqi.Root(lambda y, _: y), solver)


def test_solution_of_another_shape_than_the_guess_is_refused():
    with pytest.raises(
        ValueError, match=r"(?s)solver's solution.*float64\[3\].*float64\[2\]"
    ):
        root(lambda y, _: y, y0=jnp.zeros(2), solver=lambda y0, _: jnp.zeros(3))


def test_solver_that_returns_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        root(lambda y, _: y, y0=jnp.zeros(2), solver=lambda y0, _: None)


def test_solver_that_returns_the_report_of_scipy_is_refused_with_a_remedy():
    report = scipy.optimize.OptimizeResult(x=np.zeros(2), success=True)
    with pytest.raises(
        ValueError, match=r"an object of type OptimizeResult at `out`.* its `x`"
    ):
        root(lambda y, _: y, jnp.zeros(2), lambda y0, args: report)


def test_missing_aux_of_a_callable_solver_is_refused():
    with pytest.raises(
        ValueError, match=r"`has_aux=True` needs a solver.*`\(y, aux\)`"
    ):
        root(lambda y, _: y, solver=identity, has_aux=True)


def test_missing_aux_of_a_function_is_refused():
    with pytest.raises(
        ValueError, match=r"`has_aux=True` needs a function.*`\(out, aux\)`"
    ):
        root(lambda y, _: y, has_aux=True)


def test_undeclared_aux_of_a_function_is_refused():
    with pytest.raises(ValueError, match=r"float64\[2\].*Pass `has_aux=True`"):
        root(lambda y, _: (y, {"count": jnp.array(1.0)}))


def test_undeclared_aux_of_a_callable_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver.*float64\[2\].*`has_aux=True`"):
        root(lambda y, _: y, solver=lambda y0, _: (y0, {"count": jnp.array(1.0)}))


class Static(eqx.Module):
    matrix: object = eqx.field(static=True)

    def __call__(self, y, args):
        return self.matrix @ y


class Nested(eqx.Module):
    layers: list[Static]

    def __call__(self, y, args):
        return self.layers[0](y, args)


def static():
    # Equinox warns; a warning does not stop a training run with a wrong gradient.
    with pytest.warns(UserWarning, match="set as static"):
        return Static(np.eye(2))


def test_static_field_of_the_function_that_holds_an_array_is_refused():
    with pytest.raises(ValueError, match=r"`condition\.fn\.matrix`.*float64\[2, 2\]"):
        eqi.ImplicitFunction(eqi.Root(static()))


@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (lambda module: module.__call__, r"condition\.fn\.__self__\.matrix"),
        (lambda module: functools.partial(module), r"condition\.fn\.func\.matrix"),
        (
            lambda module: functools.partial(lambda module, y, a: y, module),
            r"condition\.fn\.args\[0\]\.matrix",
        ),
        (lambda module: lambda y, args: module(y, args), r"module\.matrix"),
        (lambda module: [lambda y, args: y, module.__call__], None),
        (
            lambda module: lambda y, args: (lambda: module(y, args))(),
            r"module\.matrix",
        ),
    ],
    ids=["method", "partial", "argument", "closure", "list", "nested function"],
)
def test_static_field_is_found_in_what_a_function_captured(hide, name):
    fn = hide(static())
    if name is None:
        fns, name = fn, r"fns\[1\]\.__self__\.matrix"
        fn = lambda y, args: fns[1](y, args)
    with pytest.raises(ValueError, match=rf"`{name}`.*float64\[2, 2\]"):
        eqi.ImplicitFunction(eqi.Root(fn))


def test_function_that_captured_itself_is_no_static_array():
    def fn(y, args):
        return y if args is None else fn(y, None)

    eqi.ImplicitFunction(eqi.Root(fn))


def test_nested_static_field_that_holds_an_array_is_refused():
    with pytest.raises(ValueError, match=r"`condition\.fn\.layers\[0\]\.matrix`"):
        eqi.ImplicitFunction(eqi.Root(Nested([static()])))


def test_static_field_of_the_solver_that_holds_an_array_is_refused():
    with pytest.raises(ValueError, match=r"`solver\.matrix`.*float64\[2, 2\]"):
        eqi.ImplicitFunction(eqi.Root(lambda y, _: y), static())


def test_static_field_of_an_argument_that_holds_an_array_is_refused():
    layer = eqi.ImplicitFunction(eqi.Root(lambda y, a: a.matrix @ y), NEWTON)
    with pytest.raises(ValueError, match=r"`args\.matrix`.*float64\[2, 2\]"):
        layer(jnp.ones(2), static())


def test_missing_guess_is_refused():
    with pytest.raises(ValueError, match="No initial guess"):
        eqi.ImplicitFunction(eqi.Root(lambda y, _: y), NEWTON)()


@pytest.mark.parametrize(
    ("condition", "solver", "remedy"),
    [
        (
            eqi.Root(lambda y, _: y),
            optx.FixedPointIteration(rtol=1e-8, atol=1e-8),
            "`FixedPointIteration` cannot solve a `Root`.*state a `FixedPoint`",
        ),
        (
            eqi.Minimum(lambda y, _: jnp.sum(y**2)),
            NEWTON,
            "`Newton` cannot solve a `Minimum`.*Use a minimiser",
        ),
        (
            eqi.Minimum(lambda y, _: jnp.sum(y**2)),
            optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8),
            "`LevenbergMarquardt` cannot solve a `Minimum`.*state `LeastSquares`",
        ),
        (
            eqi.LeastSquares(lambda y, _: y),
            NEWTON,
            "`Newton` cannot solve a `LeastSquares`.*Use a minimiser",
        ),
    ],
    ids=["root", "minimum by root finder", "minimum by least squares", "least squares"],
)
def test_solver_of_the_wrong_kind_is_refused_with_a_remedy(condition, solver, remedy):
    layer = eqi.ImplicitFunction(condition, solver)
    with pytest.raises(TypeError, match=remedy):
        layer(jnp.ones(2))


@pytest.mark.parametrize(
    "solver",
    [NEWTON, *(kind(1e-8, 1e-8) for kind in (optx.LevenbergMarquardt, optx.BFGS))],
    ids=["root finder", "least squares", "minimiser"],
)
def test_solver_of_another_kind_solves_a_fixed_point_as_in_optimistix(solver):
    layer = eqi.ImplicitFunction(eqi.FixedPoint(lambda y, _: jnp.cos(y)), solver)
    np.testing.assert_allclose(layer(jnp.array(0.5)), 0.7390851332151607, atol=1e-6)


@pytest.mark.parametrize("kind", [eqi.Anderson, eqi.AutoFixedPoint, eqi.Broyden])
def test_window_that_the_steps_can_never_fill_is_refused_when_the_layer_is_made(kind):
    condition = eqi.FixedPoint(lambda y, _: jnp.cos(y))
    with pytest.raises(ValueError, match=r"window=7\).*larger than `max_steps=6`"):
        eqi.ImplicitFunction(condition, kind(window=7), max_steps=6)
    eqi.ImplicitFunction(condition, kind(window=7), max_steps=7)
    eqi.ImplicitFunction(condition, kind(), max_steps=1)  # nobody chose that window


@pytest.mark.parametrize("residual_tol", [-1.0, float("nan")])
def test_residual_tolerance_that_nothing_meets_is_refused(residual_tol):
    with pytest.raises(ValueError, match="`residual_tol` must be >= 0"):
        eqi.ImplicitFunction(eqi.Root(lambda y, _: y), residual_tol=residual_tol)


@pytest.mark.parametrize("of", ["tangent", "cotangent"])
def test_vector_of_another_shape_is_refused_by_the_name_of_its_leaf(of):
    fn = lambda y, a: {"bond": y["bond"] - a["load"][0]}
    y, a = {"bond": jnp.zeros(2)}, {"load": [jnp.zeros(2)]}
    if of == "tangent":
        call = lambda: eqi.root_jvp(fn, y, a, {"load": [jnp.zeros(3)]})
        message = r"The leaf `\['load'\]\[0\]` of the tangent `t_args` is float64\[3\]"
    else:
        call = lambda: eqi.root_vjp(fn, y, a, {"bond": jnp.zeros(3)})
        message = r"The leaf `\['bond'\]` of the cotangent `ct_y` is float64\[3\]"
    with pytest.raises(ValueError, match=message):
        call()


def test_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="`max_steps` must be >= 0"):
        eqi.ImplicitFunction(eqi.Root(lambda y, _: y), max_steps=-1)


# In a process of its own: here, the run-time type checker would be the first to refuse.
WRONG_KINDS = """
import eqximplicit as eqi
import optimistix as optx

fn = lambda y, a: y**3 + y - a
layer = lambda *args, **kwargs: eqi.ImplicitFunction(eqi.Root(fn), *args, **kwargs)
for make in (
    lambda: eqi.ImplicitFunction(fn),
    lambda: layer(adjoint=optx.ImplicitAdjoint()),
    lambda: layer(adjoint=eqi.DirectLU()),
    lambda: layer(adjoint=eqi.ImplicitAdjoint),
    lambda: eqi.ImplicitAdjoint(eqi.DirectLU),
    lambda: eqi.ImplicitAdjoint(optx.Newton(1e-8, 1e-8)),
    lambda: layer(optx.Newton),
    lambda: layer(max_steps=2.5),
    lambda: layer(max_steps=True),
    lambda: eqi.Root(3),
    lambda: eqi.Minimum(optx.Newton),
):
    try:
        make()
    except (TypeError, ValueError) as error:
        print(error)
"""


def test_object_of_another_kind_is_refused_when_the_layer_is_made():
    run = subprocess.run(
        [sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True, check=True
    )
    expected = (
        r"`condition` must be what is solved, .* type `builtins.function`",
        "`adjoint` must be `eqi.ImplicitAdjoint.* type `optimistix.ImplicitAdjoint`",
        "`adjoint` must be `eqi.ImplicitAdjoint.* type `eqximplicit.DirectLU`",
        r"`adjoint` is the class `ImplicitAdjoint`.*instance, `ImplicitAdjoint\(...\)`",
        r"`linear_solver` is the class `DirectLU`. Pass an instance, `DirectLU\(...\)`",
        r"`linear_solver` must be a lineax solver.* type `optimistix.Newton`",
        r"`solver` is the class `Newton`. Pass an instance, `Newton\(...\)`",
        r"`max_steps` must be >= 0 and an integer, or `None` .* got 2.5",
        r"`max_steps` must be >= 0 and an integer, or `None` .* got True",
        r"`fn` must be a function `fn\(y, args\)`; got int 3. Pass the function itself",
        r"`fn` is the class `Newton`. Pass an instance",
    )
    for message, pattern in zip(run.stdout.splitlines(), expected, strict=True):
        assert re.search(pattern, message), message


@pytest.mark.parametrize(
    "solver", [eqi.AutoMinimiser(), eqi.AutoLeastSquares()], ids=str
)
@pytest.mark.parametrize(
    "condition",
    [eqi.Root(lambda y, a: y**2 - a), eqi.FixedPoint(lambda y, a: (y + a / y) / 2)],
    ids=["root", "fixed point"],
)
def test_default_minimisers_solve_square_systems_too(condition, solver):
    y = eqi.ImplicitFunction(condition, solver)(jnp.array(1.0), 2.0)
    np.testing.assert_allclose(y, np.sqrt(2.0), rtol=1e-7)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_static_array_is_refused_wherever_it_is():
    fn, y = Static(np.eye(2)), jnp.ones(2)
    with pytest.raises(ValueError, match="static field `fn.matrix`"):
        eqi.implicit_solution(eqi.Root(fn), y)
    with pytest.raises(ValueError, match="static field `args.matrix`"):
        eqi.implicit_solution(eqi.Root(lambda y, args: args(y, None)), y, fn)
    with pytest.raises(ValueError, match="static field `fn.matrix`"):
        eqi.root_vjp(fn, y, None, y)
    with pytest.raises(ValueError, match=r"static field `y0\[1\].matrix`"):
        eqi.root_find(lambda y, _: (y[0], None), (jnp.ones(2), fn))


BAD_SETTINGS = [
    (lambda: eqi.AutoMinimiser(rtol=np.inf), "rtol"),
    (lambda: eqi.Anderson(1e-8, 1e-8, mixing=np.nan), "mixing"),
    (lambda: eqi.Neumann(5, alpha=0.0), "alpha"),
    (lambda: eqi.Neumann(5, damping=np.nan), "damping"),
]


@pytest.mark.parametrize(
    ("make", "name"), BAD_SETTINGS, ids=[n for _, n in BAD_SETTINGS]
)
def test_setting_that_is_no_such_number_is_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize(
    ("solver", "tag"),
    [
        (lx.CG(1e-8, 1e-8), "lx.positive_semidefinite_tag"),
        (lx.Cholesky(), "lx.positive_semidefinite_tag"),
        (lx.Diagonal(), "lx.diagonal_tag"),
        (lx.Tridiagonal(), "lx.tridiagonal_tag"),
        (lx.Triangular(), "lx.lower_triangular_tag"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_linear_solver_names_the_tag_that_it_needs(solver, tag):
    condition = eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 2))
    adjoint = eqi.ImplicitAdjoint(linear_solver=solver)
    layer = eqi.ImplicitFunction(condition, lambda y0, a: a, adjoint)
    with pytest.raises(ValueError, match=f"pass `tags={tag}` to the condition"):
        jax.grad(lambda a: layer(a, a).sum())(jnp.ones(4))


def test_unreachable_tolerances_are_warned_about():
    operator = lx.MatrixLinearOperator(jnp.eye(3))
    for kind in (eqi.HybridKrylov, eqi.Neumann, eqi.NormalCG):
        solver = kind(rtol=1e-30)
        with pytest.warns(UserWarning, match="resolution.*Loosen `rtol`"):
            lx.linear_solve(operator, jnp.ones(3), solver, throw=False)
