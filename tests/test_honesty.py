"""No silent wrong derivative: right, an error naming the cause, NaN, or a status."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from honesty_cases import CASES

import eqximplicit as eqi

# Solution.value_or

# y² = a has no root for a < 0.
SQRT = eqi.ImplicitFunction(eqi.Root(lambda y, a: y**2 - a), throw=False)
LANES = jnp.array([4.0, -1.0, 9.0])
DEFAULTS = jnp.array([10.0, 20.0, 30.0])


def sqrt_or(a, default):
    return SQRT.solve(jnp.array(1.0), a).value_or(3 * default)


def test_failed_lane_takes_the_default_and_its_derivative():
    values = jax.jit(jax.vmap(sqrt_or))(LANES, DEFAULTS)
    np.testing.assert_allclose(values, [2.0, 60.0, 3.0], rtol=1e-8)
    forward = jax.jit(jax.vmap(jax.jacfwd(sqrt_or, argnums=(0, 1))))(LANES, DEFAULTS)
    reverse = jax.jit(jax.vmap(jax.grad(sqrt_or, argnums=(0, 1))))(LANES, DEFAULTS)
    for by_a, by_default in (forward, reverse):
        np.testing.assert_allclose(by_a, [1 / 4, 0.0, 1 / 6], rtol=1e-8)
        np.testing.assert_allclose(by_default, [0.0, 3.0, 0.0], rtol=1e-12)


def test_default_may_be_chosen_after_the_batch_of_solves():
    def total(lanes):
        solutions = jax.vmap(lambda a: SQRT.solve(jnp.ones(2), a * jnp.ones(2)))(lanes)
        return jnp.sum(solutions.value_or(7.0))

    value, gradient = jax.jit(jax.value_and_grad(total))(LANES)
    np.testing.assert_allclose(value, 2 * (2.0 + 7.0 + 3.0), rtol=1e-8)
    np.testing.assert_allclose(gradient, [1 / 2, 0.0, 1 / 3], rtol=1e-8)


@pytest.mark.parametrize(
    "default",
    [(1.0,), jnp.ones(2), 1j, "a"],
    ids=["structure", "shape", "complex", "text"],
)
def test_default_that_does_not_fit_the_value_is_refused(default):
    root = SQRT.solve(jnp.array(1.0), jnp.array(4.0))
    with pytest.raises(ValueError, match=r"`value_or` (has structure|is )"):
        root.value_or(default)


# The table.

ANSWERABLE = [name for name, case in CASES.items() if case.slope is not None]
# Multiple roots and single precision have that many digits.
RELATIVE = 1e-3


def judged(case, slope):
    if np.isnan(slope):
        return "NaN"
    if case.slope is None:
        return f"WRONG: {slope}"
    ends = case.slope if isinstance(case.slope, tuple) else (case.slope,)
    if case.only_ends:
        good = any(abs(slope - end) <= RELATIVE * abs(end) for end in ends)
    else:
        slack = RELATIVE * max(map(abs, ends))
        good = min(ends) - slack <= slope <= max(ends) + slack
    return "right" if good else f"WRONG: {slope}"


def forward_and_reverse(fn, a):
    return jax.jvp(fn, (a,), (jnp.ones_like(a),))[1], jax.grad(fn)(a)


def refusal(case, error):
    cause = case.refused is not None and case.refused in str(error)
    return "error" if cause else f"WRONG: {error}"


@functools.cache
def outcomes(name):
    """What forward and reverse mode answer, eager and jitted."""
    case, found = CASES[name], []
    for transform in (lambda fn: fn, jax.jit):
        both = transform(functools.partial(forward_and_reverse, case.fn))
        try:
            slopes = both(jnp.asarray(case.at))
        except (ValueError, TypeError) as error:
            found.append(refusal(case, error))
        else:
            found += [judged(case, float(slope)) for slope in slopes]
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_derivative_is_silently_wrong(name):
    assert not any(outcome.startswith("WRONG") for outcome in outcomes(name))


@pytest.mark.slow
def test_most_answerable_cases_are_answered():
    right = [name for name in ANSWERABLE if set(outcomes(name)) == {"right"}]
    assert len(right) >= 30, right
