"""Residual histories, progress bars and plots of solves."""

import io
import re
import sys
from contextlib import redirect_stderr

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi

RATE = 0.5
Y0 = jnp.array([1.0, -3.0])
PICARD = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)


def contraction(y, args):
    """Its iteration from `y0` has the residuals `(1 - RATE) RATE**k |y0|` exactly."""
    return args * y


def layer(**changes):
    return eqi.ImplicitFunction(
        eqi.FixedPoint(contraction), PICARD, max_steps=64, **changes
    )


def test_history_is_the_residual_after_each_step():
    solution = layer(monitor=eqi.Monitor(history=40)).solve(Y0, RATE)
    count = int(solution.stats["num_steps"])
    history = np.asarray(solution.stats["residual_history"])
    exact = (1 - RATE) * RATE ** np.arange(1, count + 1) * 3.0
    np.testing.assert_allclose(history[:count], exact, rtol=1e-12)
    assert np.isnan(history[count:]).all()
    assert history[count - 1] == solution.stats["residual_norm"]


def test_of_more_steps_than_entries_the_last_are_kept():
    whole = layer(monitor=eqi.Monitor(history=64)).solve(Y0, RATE).stats
    count = int(whole["num_steps"])
    for size in (1, 5, count):
        part = layer(monitor=eqi.Monitor(history=size)).solve(Y0, RATE).stats
        kept = np.asarray(whole["residual_history"])[count - size : count]
        np.testing.assert_array_equal(part["residual_history"], kept)


def test_newton_converges_quadratically_in_its_history():
    # y**2 = 2 by Newton: the residual after a step is (r / 2y)**2 of that before.
    root = eqi.ImplicitFunction(
        eqi.Root(lambda y, args: y**2 - 2),
        optx.Newton(rtol=1e-12, atol=1e-12),
        monitor=eqi.Monitor(history=8),
    )
    history = np.asarray(root.solve(jnp.array(2.0)).stats["residual_history"])
    y, exact = 2.0, []
    for _ in range(4):
        y = y - (y**2 - 2) / (2 * y)
        exact.append(abs(y**2 - 2))
    np.testing.assert_allclose(history[:4], exact, rtol=1e-4, atol=1e-15)


def test_only_a_monitor_costs_an_evaluation_and_no_history_costs_a_callback():
    def program(**changes):
        solve = eqi.ImplicitFunction(
            eqi.FixedPoint(lambda y, args: jnp.cos(y)), PICARD, throw=False, **changes
        )
        return str(jax.make_jaxpr(solve.__call__)(Y0))

    plain, history = program(), program(monitor=eqi.Monitor(history=4))
    assert plain.count("cos ") == 1
    assert history.count("cos ") == 2
    assert "callback" not in history
    assert "callback" in program(monitor=eqi.Monitor(progress_every=4))


@pytest.mark.parametrize("adjoint", [eqi.ImplicitAdjoint(), eqi.UnrolledAdjoint()])
def test_a_monitor_changes_neither_value_nor_derivative(adjoint):
    def value(rate, **changes):
        shifted = lambda y, args: args * y + 1.0
        solve = eqi.ImplicitFunction(
            eqi.FixedPoint(shifted), PICARD, adjoint, max_steps=64, **changes
        )
        return solve(jnp.array(0.0), rate)

    monitor = eqi.Monitor(history=8, progress_every=5)
    with redirect_stderr(io.StringIO()) as err:
        watched = jax.value_and_grad(lambda r: value(r, monitor=monitor))(RATE)
        jax.effects_barrier()
    np.testing.assert_array_equal(watched, jax.value_and_grad(value)(RATE))
    # One bar: the steps that reverse mode repeats do not open another.
    assert err.getvalue().count("\n") == 1


def test_each_lane_has_its_history():
    rates = jnp.array([0.5, 0.25])
    solve = lambda r: layer(monitor=eqi.Monitor(history=24)).solve(Y0, r).stats
    stats = jax.jit(jax.vmap(solve))(rates)
    for lane, rate in enumerate(rates):
        alone = solve(rate)
        assert stats["num_steps"][lane] == alone["num_steps"]
        np.testing.assert_allclose(
            stats["residual_history"][lane], alone["residual_history"], rtol=1e-12
        )


def bar_of(run) -> str:
    """What a run writes to the standard error."""
    err = io.StringIO()
    with redirect_stderr(err):
        jax.block_until_ready(run())
        jax.effects_barrier()
    return err.getvalue()


def test_progress_bar_moves_at_the_interval_and_ends_at_the_last_step():
    watched = layer(monitor=eqi.Monitor(progress_every=5))
    count = int(layer().solve(Y0, RATE).stats["num_steps"])
    for _ in range(2):  # the second call is compiled already
        text = bar_of(lambda: watched(Y0, RATE))
        assert re.findall(r"(\d+)/64", text)[-1] == str(count)
        assert "residual=" in text
    assert bar_of(lambda: layer()(Y0, RATE)) == ""


def test_progress_bar_is_one_for_all_lanes():
    watched = layer(monitor=eqi.Monitor(progress_every=1))
    rates = jnp.array([0.5, 0.6, 0.7])
    run = jax.jit(jax.vmap(lambda r: watched.solve(Y0, r).stats["num_steps"]))
    steps = run(rates)
    text = bar_of(lambda: run(rates))
    assert re.findall(r"(\d+)/64", text)[-1] == str(int(jnp.max(steps)))
    assert text.count("\n") == 1


def test_plot_shows_the_history():
    solution = layer(monitor=eqi.Monitor(history=64)).solve(Y0, RATE)
    count = int(solution.stats["num_steps"])
    ax = eqi.plot_convergence(solution)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, count + 1))
    np.testing.assert_array_equal(
        line.get_ydata(), solution.stats["residual_history"][:count]
    )
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel()
    assert "dimensionless" in ax.get_ylabel()
    given = plt.figure().add_subplot()
    assert eqi.plot_convergence(solution, given) is given
    plt.close("all")


def test_plot_of_a_batch_numbers_the_last_steps_that_were_kept():
    solve = lambda r: layer(monitor=eqi.Monitor(history=6)).solve(Y0, r)
    solution = jax.vmap(solve)(jnp.array([0.5, 0.25]))
    ax = eqi.plot_convergence(solution)
    last = [line.get_xdata()[-1] for line in ax.lines]
    np.testing.assert_array_equal(last, solution.stats["num_steps"])
    assert all(len(line.get_xdata()) == 6 for line in ax.lines)
    plt.close("all")


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    solution = layer(monitor=eqi.Monitor(history=4)).solve(Y0, RATE)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'"eqximplicit\[progress\]"'):
        eqi.Monitor(progress_every=10)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'"eqximplicit\[plot\]"'):
        eqi.plot_convergence(solution)


def test_bad_monitors_are_refused():
    with pytest.raises(ValueError, match=r"history=\.\.\.\)` must be at least 0"):
        eqi.Monitor(history=-1)
    with pytest.raises(ValueError, match=r"progress_every=\.\.\.\)` must be at least"):
        eqi.Monitor(progress_every=0)
    with pytest.raises(ValueError, match="watches the steps of an optimistix solver"):
        eqi.ImplicitFunction(
            eqi.Root(contraction), lambda y, args: y, monitor=eqi.Monitor(history=4)
        )
    with pytest.raises(ValueError, match="this solution has none"):
        eqi.plot_convergence(layer().solve(Y0, RATE))
