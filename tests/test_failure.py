"""A failed solve says cause, then remedy, in the first line, however it is compiled."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

NEWTON = optx.Newton(rtol=1e-8, atol=1e-8)
GUESS = jnp.array(1.0)


def layer(fn=lambda y, a: y**2 - a, solver=None, **kwargs):
    return eqi.ImplicitFunction(eqi.Root(fn), solver, **kwargs)


def sqrt(a):
    return layer()(GUESS, a)


# There is no root for a < 0.
NO_ROOT = (
    "The solver stopped at a local minimum of the residual norm that is not a root"
)
REMEDY = "Start from another `y0`, or check that a root exists for these parameters."

EAGER = {
    "value": lambda: sqrt(jnp.array(-1.0)),
    "solution": lambda: layer().solve(GUESS, jnp.array(-1.0)).value,
    "grad": lambda: jax.grad(sqrt)(-1.0),
    "jvp": lambda: jax.jvp(sqrt, (-1.0,), (1.0,)),
    "hessian": lambda: jax.hessian(sqrt)(-1.0),
    "vmap": lambda: jax.vmap(sqrt)(jnp.array([4.0, -1.0])),
    "vmap of grad": lambda: jax.vmap(jax.grad(sqrt))(jnp.array([4.0, -1.0])),
    "grad of vmap": lambda: jax.grad(lambda a: jax.vmap(sqrt)(a).sum())(
        jnp.array([4.0, -1.0])
    ),
    "function": lambda: eqi.root_find(lambda y, a: y**2 - a, GUESS, jnp.array(-1.0)),
}
COMPILED = {
    "value": lambda jit: jit(sqrt)(jnp.array(-1.0)),
    "grad": lambda jit: jit(jax.grad(sqrt))(jnp.array(-1.0)),
    "vmap": lambda jit: jit(jax.vmap(sqrt))(jnp.array([4.0, -1.0])),
    "scan": lambda jit: jit(lambda a: jax.lax.map(sqrt, a))(jnp.array([4.0, -1.0])),
}


def first_line(error):
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("call", EAGER.values(), ids=EAGER)
def test_outside_of_jit_the_first_line_is_cause_and_remedy(call):
    with pytest.raises(eqi.SolveError) as error:
        call()
    assert first_line(error).startswith(NO_ROOT)
    assert first_line(error).endswith(REMEDY)


@pytest.mark.parametrize("call", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("jit", [eqx.filter_jit, jax.jit], ids=["filter_jit", "jit"])
def test_inside_jit_it_is_the_same_with_solve_errors(call, jit, caplog):
    caplog.set_level("CRITICAL", logger="jax")  # JAX logs what a callback raises
    with pytest.raises(eqi.SolveError) as error, eqi.solve_errors():
        jax.block_until_ready(call(jit))
    assert first_line(error).startswith(NO_ROOT)
    assert first_line(error).endswith(REMEDY)


@pytest.mark.parametrize(
    ("jit", "kind"),
    [(eqx.filter_jit, eqx.EquinoxRuntimeError), (jax.jit, jax.errors.JaxRuntimeError)],
    ids=["filter_jit", "jit"],
)
def test_inside_jit_the_compilers_exception_has_the_sentence_on_one_line(
    jit, kind, caplog
):
    caplog.set_level("CRITICAL", logger="jax")
    with pytest.raises(kind) as error:
        jax.block_until_ready(jit(sqrt)(jnp.array(-1.0)))
    (line,) = [line for line in str(error.value).splitlines() if NO_ROOT in line]
    assert line.endswith(REMEDY)
    assert isinstance(error.value, RuntimeError)


def test_one_type_catches_it_outside_of_jit_and_under_filter_jit():
    for call in (sqrt, eqx.filter_jit(sqrt)):
        with pytest.raises(eqx.EquinoxRuntimeError):
            call(jnp.array(-1.0))


def test_solve_errors_decorates_and_lets_other_errors_pass():
    @eqi.solve_errors()
    def fails():
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind") as error:
        fails()
    assert type(error.value) is RuntimeError

    @eqi.solve_errors()
    def solves(a):
        return jax.jit(sqrt)(a)

    np.testing.assert_allclose(solves(4.0), 2.0, rtol=1e-8)


def diverging(y, a):
    return 2.0 * y + a


# Each failure, and what its one line must name: the cause, then the remedy.
CAUSES = {
    "out of steps": (
        lambda: layer(lambda y, _: y**2 + 1, NEWTON, max_steps=3)(0.7),
        "maximum number of steps.*increase `max_steps`",
    ),
    "not finite": (
        lambda: layer(lambda y, _: jnp.sqrt(y - 3.0), NEWTON)(jnp.array(3.5)),
        "not finite.*another `y0`",
    ),
    "not finite at the guess": (
        lambda: layer(lambda y, _: jnp.sqrt(y - 3.0))(GUESS),
        "not finite.*at the initial guess.*`y0` inside",
    ),
    "diverging": (
        lambda: eqi.fixed_point(
            diverging, GUESS, 1.0, solver=optx.FixedPointIteration(1e-8, 1e-8)
        ),
        "diverged|maximum number of steps|not finite",
    ),
    "residual": (
        lambda: layer(solver=lambda y0, a: y0, residual_tol=1e-3)(GUESS, 4.0),
        "exceeds `residual_tol`.*Tighten",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_every_failure_says_cause_then_remedy_in_one_line(case):
    call, words = CAUSES[case]
    with pytest.raises(eqi.SolveError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_messages_that_had_no_remedy_have_one():
    names = ["nonlinear_divergence", "nonfinite", "singular", "nonfinite_input"]
    for name in names:
        message = eqi.RESULTS[getattr(eqi.RESULTS, name)]
        assert len(message.split(". ")) == 2, message
    ours, theirs = eqi.RESULTS.nonfinite, optx.RESULTS.nonfinite
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)  # the number is the same


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(eqi.SolveError("Cause. Remedy.")))
    assert type(error) is eqi.SolveError
    assert str(error) == "Cause. Remedy."


EMPTY = {
    "eager": lambda fn: fn,
    "jit": jax.jit,
    "filter_jit": eqx.filter_jit,
}


@pytest.mark.parametrize("jit", EMPTY.values(), ids=EMPTY)
def test_empty_batch_raises_nothing(jit):
    none = jnp.zeros(0)
    assert jit(jax.vmap(sqrt))(none).shape == (0,)
    assert jit(jax.vmap(jax.grad(sqrt)))(none).shape == (0,)
    assert jit(jax.grad(lambda a: jax.vmap(sqrt)(a).sum()))(none).shape == (0,)


def test_good_lanes_of_a_throwing_batch_are_differentiated():
    a = jnp.array([1.0, 4.0, 9.0])
    for jit in EMPTY.values():
        slopes = jit(jax.vmap(jax.grad(sqrt)))(a)
        np.testing.assert_allclose(slopes, 0.5 / jnp.sqrt(a), rtol=1e-8)
