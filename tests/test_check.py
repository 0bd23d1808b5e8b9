"""`check_implicit` finds each mistake that makes a derivative wrong, and says where."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit._reach import reach

A = np.array([[2.0, 1.0], [0.3, 3.0]])
NEWTON = optx.Newton(rtol=1e-10, atol=1e-10)
TWO = jnp.array([0.4, -0.7])


def sinh_root(y, a):
    return jnp.asarray(A) @ jnp.sinh(y) - a


def solve_sinh(y0, a):
    return jnp.arcsinh(jnp.linalg.solve(jnp.asarray(A), a))


def cube_root(y0, a):
    return jnp.cbrt(a)


def checked(condition, solver, y0, args, **kwargs):
    layer = eqi.ImplicitFunction(condition, solver, **kwargs)
    return eqi.check_implicit(layer, y0, args)


def severities(report, words):
    return [found.severity for found in report.findings if words in found.what]


def where(report, words):
    return [found.where for found in report.findings if words in found.what]


@functools.cache
def healthy():
    return checked(eqi.Root(sinh_root), NEWTON, jnp.zeros(2), TWO)


def test_right_derivative_is_ok_and_every_witness_agrees():
    report = healthy()
    assert report.ok, str(report)
    assert report.residual < 1e-10
    assert report.difference_error < 1e-6
    assert report.unrolled_error < 1e-6
    assert report.transposition_error < 1e-12
    y = np.arcsinh(np.linalg.solve(A, np.asarray(TWO)))
    np.testing.assert_allclose(
        report.condition, np.linalg.cond(A @ np.diag(np.cosh(y))), rtol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_one_mode_of_an_unrolled_adjoint_is_held_against_differences(mode):
    adjoint = eqi.UnrolledAdjoint(mode=mode)
    cosine = eqi.FixedPoint(lambda y, a: 0.5 * jnp.cos(y) + a)
    report = checked(cosine, None, jnp.zeros(2), TWO, adjoint=adjoint, max_steps=40)
    assert report.ok, str(report)
    assert report.difference_error < 1e-6
    assert report.transposition_error is None
    (missing,) = {"forward", "reverse"} - {mode}
    assert severities(report, f"no {missing} mode") == ["note"]


def test_a_wrong_derivative_in_reverse_mode_only_is_found():
    @jax.custom_vjp
    def wrong(a):
        return a

    wrong.defvjp(lambda a: (a, None), lambda _, ct: (2 * ct,))
    cosine = eqi.FixedPoint(lambda y, a: 0.5 * jnp.cos(y) + wrong(a))
    adjoint = eqi.UnrolledAdjoint()
    report = checked(cosine, None, jnp.zeros(2), TWO, adjoint=adjoint, max_steps=40)
    assert severities(report, "not that of what the solver computes") == ["error"]


def test_print_shows_the_verdict_and_the_figures():
    text = str(healthy())
    assert text.startswith("Implicit derivative: ok")
    assert "against differences" in text
    assert max(map(len, text.splitlines())) <= 88


@pytest.mark.slow
def test_callable_solver_with_a_pytree_state_and_a_fixed_point_is_ok():
    def solve(y0, a):
        return {"u": a[0] / 0.5, "v": (a[1] + a[0] / 0.5, a[0])}

    def fn(y, a):
        return {"u": 0.5 * y["u"] + a[0], "v": (a[1] + y["u"], a[0])}

    guess = solve(None, (jnp.ones(2), jnp.ones(2)))
    args = (jnp.array([0.3, 0.5]), jnp.array([1.0, -2.0]))
    report = checked(eqi.FixedPoint(fn), solve, guess, args)
    assert report.ok, str(report)
    assert report.unrolled_error is None


def test_complex_non_holomorphic_state_is_ok():
    def fn(y, a):
        return y + 0.3 * jnp.conj(y) - a

    def solve(y0, a):
        return (a - 0.3 * jnp.conj(a)) / (1 - 0.3**2)

    a = jnp.array([1.0 + 2j, -0.5j])
    report = checked(eqi.Root(fn), solve, a, a * 2)
    assert [f for f in report.findings if f.severity == "error"] == [], str(report)
    assert report.difference_error < 1e-8
    assert report.transposition_error < 1e-12


def test_module_is_examined_through_its_own_parameters():
    class Ridge(eqi.AbstractImplicitModule):
        weight: jax.Array

        def objective(self, y, target):
            return jnp.sum((y - target) ** 2) + self.weight * jnp.sum(y**2)

        def solve(self, y0, target):
            return target / (1 + self.weight)

    report = eqi.check_implicit(Ridge(jnp.array(0.5)), jnp.zeros(2), (TWO,))
    assert report.ok, str(report)
    assert report.difference_error < 1e-6


def test_solve_stopped_early_is_found_by_residual_and_by_differences():
    def one_step(y0, a):
        return y0 - (y0**3 - a) / 12

    report = checked(eqi.Root(lambda y, a: y**3 - a), one_step, jnp.array(1.5), 8.0)
    assert severities(report, "not a solution") == ["error"]
    assert severities(report, "not that of what the solver computes") == ["error"]
    # y = 1.5 + 4.625/12, so the residual and the two slopes are known.
    y = 1.5 + 4.625 / 12
    np.testing.assert_allclose(report.residual, abs(y**3 - 8), rtol=1e-12)
    slopes = 1 / (3 * y**2), 1 / 12
    np.testing.assert_allclose(
        report.difference_error, abs(np.subtract(*slopes)) / max(slopes), rtol=1e-6
    )


def test_condition_that_is_slightly_another_equation_is_a_warning():
    report = checked(
        eqi.Root(lambda y, a: y**2 - 1.001 * a), lambda y0, a: jnp.sqrt(a), 1.0, 4.0
    )
    assert severities(report, "a little off") == ["warning"]
    # The slopes are 1.001 / (2 y) and 1 / (2 y).
    np.testing.assert_allclose(report.difference_error, 1e-3 / 1.001, rtol=1e-6)


def test_condition_with_another_sign_than_the_solver_is_found():
    report = checked(eqi.Root(lambda y, a: y**3 + a), cube_root, jnp.array(1.0), 8.0)
    assert severities(report, "not a solution") == ["error"]


def test_solver_that_uses_a_parameter_that_the_condition_lacks_is_found():
    def solve(y0, args):
        return args["a"] * args["scale"]

    fn = lambda y, args: y - 2.0 * args["a"]
    args = {"a": 3.0, "scale": 2.0}
    report = checked(eqi.Root(fn), solve, jnp.array(1.0), args)
    assert where(report, "does not depend on a parameter") == ["`args['scale']`"]
    assert severities(report, "not that of what the solver computes") == ["error"]


class Scaled(eqx.Module):
    used: jax.Array
    frozen: jax.Array
    unused: jax.Array

    def __call__(self, y, args):
        return y - self.used * jax.lax.stop_gradient(self.frozen) * args


def test_unused_and_detached_parameters_are_named_by_path():
    fn = Scaled(*(jnp.array(x) for x in (2.0, 3.0, 5.0)))
    report = checked(eqi.Root(fn), NEWTON, jnp.array(0.5), jnp.array(0.5))
    assert where(report, "does not depend on a parameter") == ["`condition.fn.unused`"]
    assert where(report, "detached from a parameter") == ["`condition.fn.frozen`"]
    assert not report.ok


@pytest.mark.parametrize("solver", [NEWTON, lambda y0, a: 2.0 * a])
def test_detached_array_of_a_closure_is_named_by_its_variable(solver):
    weight, used, mask = jnp.array(2.0), jnp.array([1.0]), jnp.array([1])

    def scaled(a):
        return jax.lax.stop_gradient(weight) * (used * mask.astype(float)).sum() * a

    report = checked(eqi.Root(lambda y, a: y - scaled(a)), solver, jnp.array(1.0), 1.5)
    names = where(report, "detached from a parameter")
    assert names == ["`weight (captured by fn)`"]
    assert where(report, "does not depend on a parameter") == []
    assert not report.ok


def looped(y, args):
    def body(carry, x):
        used, late, dead = carry
        return (used + late + x, args["b"] * y, dead * args["c"]), dead

    start = (args["a"], jnp.zeros_like(y), args["d"])
    return jax.lax.scan(body, start, jnp.ones(3))[0][0]


def looped_while(y, args):
    def body(carry):
        i, used, late, dead = carry
        return i + 1, used + late, args["b"] * y, dead * args["c"]

    start = (0, args["a"], jnp.zeros_like(y), args["d"])
    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)[1]


def branched(y, args):
    yes = lambda a, b, c: (a + b * y, c)
    no = lambda a, b, c: (a, c * args["d"])
    return jax.lax.cond(args["t"] < 5, yes, no, *(args[k] for k in "abc"))[0]


@pytest.mark.parametrize("fn", [looped, looped_while, branched])
def test_parameter_of_a_dead_carry_or_branch_output_is_unused(fn):
    args = {name: jnp.array(1.0) for name in "abcdt"}
    found = reach(lambda args: fn(jnp.array(0.5), args), args)
    tested = fn is branched
    assert found.unused == (["['c']", "['d']"] if tested else [*map(entry, "cdt")])
    assert found.detached == (["['t']"] if tested else [])


def entry(name):
    return f"['{name}']"


def test_test_of_a_loop_is_a_use_without_a_derivative():
    def fn(args):
        body = lambda carry: (carry[0] + args["step"], 0.5 * carry[1])
        loop = jax.lax.while_loop(lambda c: c[0] < args["end"], body, (0.0, args["a"]))
        return loop[1]

    found = reach(fn, {name: jnp.array(1.0) for name in ("a", "end", "step")})
    assert found == ([], ["['end']", "['step']"])


def test_parameter_inside_a_jitted_function_is_followed():
    @jax.jit
    def pair(a, b):
        return 2 * a, 3 * b

    fn = lambda y, args: y - pair(args["a"], args["b"])[0]
    solve = lambda y0, args: 2 * args["a"]
    report = checked(eqi.Root(fn), solve, jnp.array(1.0), {"a": 1.0, "b": 1.0})
    assert where(report, "does not depend on a parameter") == ["`args['b']`"]


def test_unknown_that_no_equation_holds_is_an_error():
    fn = lambda y, a: {"p": y["p"] - a, "q": y["p"] - a}
    solve = lambda y0, a: {"p": a, "q": y0["q"]}
    guess = {"p": jnp.array(1.0), "q": jnp.array(2.0)}
    report = checked(eqi.Root(fn), solve, guess, 1.0)
    assert where(report, "an unknown") == ["`y['q']`"]
    assert severities(report, "singular") == ["error"]
    assert "100% in `y['q']`" in where(report, "singular")[0]
    assert severities(report, "moves with the guess") == ["warning"]


def test_false_tag_and_missing_tag_are_found():
    linear = lambda y, a: jnp.asarray(A) @ y - a
    solve = lambda y0, a: jnp.linalg.solve(jnp.asarray(A), a)
    report = checked(eqi.Root(linear, lx.symmetric_tag), solve, TWO, TWO)
    assert severities(report, "`lx.symmetric_tag` is false") == ["error"]
    symmetric = A @ A.T
    linear = lambda y, a: jnp.asarray(symmetric) @ y - a
    solve = lambda y0, a: jnp.linalg.solve(jnp.asarray(symmetric), a)
    report = checked(eqi.Root(linear), solve, TWO, TWO)
    assert severities(report, "looks symmetric") == ["note"]
    assert report.ok


def test_saddle_is_no_minimum():
    def saddle(y, a):
        return (y[0] - a) ** 2 - (y[1] - a) ** 2

    solve = lambda y0, a: jnp.stack([a, a])
    report = checked(eqi.Minimum(saddle), solve, TWO, 1.0)
    assert severities(report, "no minimum") == ["error"]


def test_saddle_beside_a_stiff_direction_is_no_minimum():
    saddle = lambda y, a: 1e10 * (y[0] - a) ** 2 - (y[1] - a) ** 2
    report = checked(eqi.Minimum(saddle), lambda y0, a: jnp.stack([a, a]), TWO, 1.0)
    assert severities(report, "no minimum") == ["error"]


@pytest.mark.parametrize("shape", [(), (2,)])
def test_maximum_of_least_squares_is_no_minimum(shape):
    report = checked(
        eqi.LeastSquares(lambda y, a: y**2 - a),
        lambda y0, a: 0 * a,
        jnp.zeros(shape),
        jnp.ones(shape),
    )
    assert severities(report, "no minimum") == ["error"]
    assert not report.ok


def test_ill_conditioned_jacobian_is_a_warning_with_its_number():
    scale = jnp.array([1.0, 1e-9])
    report = checked(
        eqi.Root(lambda y, a: scale * (y - a)), lambda y0, a: a, TWO, TWO * 2
    )
    assert severities(report, "ill-conditioned") == ["warning"]
    np.testing.assert_allclose(report.condition, 1e9, rtol=1e-6)


def test_equations_in_different_units_are_neither_singular_nor_symmetric():
    scale = jnp.array([1e8, 1e-6])
    fn = lambda y, a: scale * jnp.stack([y[0] - a, y[1] - a * y[0]])
    solve = lambda y0, a: jnp.stack([a, a**2])
    report = checked(eqi.Root(fn), solve, jnp.ones(2), 2.0)
    assert severities(report, "singular") == []
    assert severities(report, "looks symmetric") == []
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.difference_error < 1e-9


def test_dependent_equations_in_different_units_are_singular():
    scale = jnp.array([1e8, 1e-6])
    fn = lambda y, a: scale * (1e4 * y[0] + y[1] - a)
    report = checked(eqi.Root(fn), lambda y0, a: jnp.stack([0 * a, a]), TWO, 2.0)
    assert severities(report, "singular") == ["error"]
    assert "100% in `y`" in where(report, "singular")[0]


def test_multiple_root_is_a_warning():
    solve = lambda y0, a: a + 1e-6
    report = checked(eqi.Root(lambda y, a: (y - a) ** 2), solve, jnp.array(1.0), 2.0)
    assert severities(report, "multiple root") == ["warning"]


def test_kink_is_an_error():
    fn = lambda y, a: y - jnp.abs(a)
    report = checked(eqi.Root(fn), lambda y0, a: jnp.abs(a), jnp.array(1.0), 0.0)
    assert severities(report, "kink") == ["error"]


def test_few_steps_of_meta_learning_are_found_by_the_guess():
    def few_steps(y0, a):
        for _ in range(3):
            y0 = y0 - 0.1 * (y0 - a)
        return y0

    start = jnp.array([1.0, 2.0])
    layer = eqi.ImplicitFunction(
        eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 2) / 2), few_steps
    )
    report = eqi.check_implicit(layer, start, TWO)
    found = [f for f in report.findings if "moves with the guess" in f.what]
    assert float(found[0].how_bad.split("= ")[1]) == pytest.approx(0.9**3, rel=1e-2)
    assert "UnrolledAdjoint" in found[0].remedy


def test_guess_that_is_a_parameter_is_noted():
    report = checked(eqi.Root(lambda y, a: y - a), lambda y0, a: a, TWO, TWO)
    assert "`y0`" in where(report, "with respect to the guess")[0]
    assert report.ok


def test_failed_solve_is_an_error_with_the_solver_s_own_reason():
    report = checked(eqi.Root(lambda y, a: y**2 + a), None, jnp.array(1.0), 1.0)
    found = [f for f in report.findings if "forward solve failed" in f.what]
    assert "local minimum of the residual norm" in found[0].what
    assert severities(report, "not finite") == ["error"]


def test_tolerance_below_single_precision_is_found():
    def solve(y0, a):
        return jnp.cbrt(a)

    single = jnp.array(8.1, jnp.float32)
    report = checked(
        eqi.Root(lambda y, a: y**3 - a), solve, single, single, residual_tol=1e-12
    )
    assert severities(report, "below what this precision can resolve") == ["warning"]
    assert 1e-7 < report.attainable < 1e-5


def test_inexact_adjoint_is_found_by_differences():
    adjoint = eqi.ImplicitAdjoint(linear_solver=eqi.Neumann(1))
    report = checked(
        eqi.Root(sinh_root), solve_sinh, jnp.zeros(2), TWO, adjoint=adjoint
    )
    found = [f for f in report.findings if "not that of what the" in f.what]
    assert "linear solver of the adjoint is exact" in found[0].remedy


class Hidden(eqx.Module):
    table: object = eqx.field(static=True)


def test_static_array_of_an_argument_is_an_error_and_nothing_is_solved():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = Hidden(np.eye(2))
    report = checked(eqi.Root(lambda y, a: y), lambda y0, a: y0, TWO, hidden)
    (found,) = report.findings
    assert "`args.table` holds an array" in found.what
    assert (found.where, found.how_bad) == ("`args.table`", "float64[2, 2]")
    assert report.residual is None
    assert "not measured" in str(report)


def test_direction_changes_with_the_key():
    layer = eqi.ImplicitFunction(eqi.Root(sinh_root), solve_sinh)
    reports = [
        eqi.check_implicit(layer, jnp.zeros(2), TWO, key=jax.random.key(seed))
        for seed in (1, 1, 2)
    ]
    errors = [report.difference_error for report in reports]
    assert errors[0] == errors[1] != errors[2]


def test_check_inside_a_trace_is_refused():
    layer = eqi.ImplicitFunction(eqi.Root(sinh_root), solve_sinh)
    with pytest.raises(ValueError, match=r"`args` is traced .*outside of `jit`"):
        jax.jit(lambda a: eqi.check_implicit(layer, jnp.zeros(2), a).residual)(TWO)


CLEAN_AT_ZERO = {
    "root": (eqi.Root(lambda y, a: jnp.sinh(y) - a), None),
    "fixed point": (eqi.FixedPoint(lambda y, a: 0.5 * jnp.tanh(y) + a), None),
    "Picard": (
        eqi.FixedPoint(lambda y, a: 0.5 * jnp.sin(y) + a),
        optx.FixedPointIteration(1e-8, 1e-8),
    ),
    "minimum": (eqi.Minimum(lambda y, a: jnp.sum(jnp.log(jnp.cosh(y - a)))), None),
    "least squares": (eqi.LeastSquares(lambda y, a: jnp.sinh(y) - a), None),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("root", "Picard")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CLEAN_AT_ZERO
    ],
)
def test_solution_that_is_zero_is_a_solution(name):
    condition, solver = CLEAN_AT_ZERO[name]
    layer = eqi.ImplicitFunction(condition, solver, throw=False)
    report = eqi.check_implicit(layer, jnp.array([0.3, 0.3, 0.3]), jnp.zeros(3))
    assert report.ok, report
    assert report.tolerance is not None
    assert report.tolerance <= 1e-7


MANY = 600
TARGETS = jnp.linspace(1.0, 2.0, MANY)


def diagonal(special, condition=eqi.Root, tags=frozenset(), count=1):
    """A system of many unknowns, some entries of its diagonal apart."""
    entries = np.linspace(1.0, 2.0, MANY)
    entries[7 : 7 + count] = special
    scale = jnp.asarray(entries)
    if condition is eqi.Minimum:
        fn = lambda y, a: jnp.sum(scale * (y - a) ** 2)
    else:
        fn = lambda y, a: scale * (y - a)
    return checked(condition(fn, tags), lambda y0, a: a, 2 * TARGETS, TARGETS)


@pytest.mark.parametrize(
    ("words", "report"),
    [
        ("no minimum", lambda: diagonal(-1.0, eqi.Minimum)),
        pytest.param(
            "`lx.positive_semidefinite_tag` is false",
            lambda: diagonal(-1.0, tags=lx.positive_semidefinite_tag),
            marks=pytest.mark.slow,
        ),
        pytest.param("is singular", lambda: diagonal(0.0), marks=pytest.mark.slow),
    ],
)
def test_error_in_a_system_too_large_for_a_matrix_is_found(words, report):
    assert severities(report(), words) == ["error"]


@pytest.mark.slow
def test_ill_conditioned_large_system_has_a_bound_and_a_direction():
    report = diagonal(1e-9)
    (found,) = [f for f in report.findings if "ill-conditioned" in f.what]
    assert "at least" in found.how_bad
    np.testing.assert_allclose(report.condition, 2e9, rtol=1e-3)


@pytest.mark.slow
def test_flat_directions_of_a_large_minimum_are_all_found():
    report = diagonal(0.0, eqi.Minimum, count=3)
    (found,) = [f for f in report.findings if "flat directions" in f.what]
    assert found.how_bad.startswith("at least 3 ")
    assert severities(report, "differ") == []


@pytest.mark.slow
def test_healthy_large_system_is_ok_and_says_how_far_it_was_examined():
    report = diagonal(1.5)
    assert report.ok, str(report)
    np.testing.assert_allclose(report.condition, 2.0, rtol=1e-2)
    assert severities(report, "along some directions only") == ["note"]


@pytest.mark.slow
def test_large_system_in_different_units_is_not_singular():
    scale = jnp.where(jnp.arange(MANY) < 300, 1e8, 1e-6)
    fn = lambda y, a: scale * (y - a + 0.3 * jnp.roll(y, 1))
    solve = lambda y0, a: jnp.linalg.solve(
        jnp.eye(MANY) + 0.3 * jnp.roll(jnp.eye(MANY), 1, axis=0), a
    )
    report = checked(eqi.Root(fn), solve, TARGETS, TARGETS)
    assert severities(report, "singular") == []


@pytest.mark.slow
def test_dependent_column_among_many_is_singular():
    matrix = np.random.default_rng(0).standard_normal((MANY, MANY))
    matrix[:, 0] = matrix[:, 1:5].sum(axis=1)
    fn = lambda y, a: jnp.asarray(matrix) @ (y - a)
    report = checked(eqi.Root(fn), lambda y0, a: a, TARGETS, TARGETS)
    assert severities(report, "singular") == ["error"]
