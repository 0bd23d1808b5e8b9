"""Sharded states: what is sent between devices, and that nothing else changes.

Eight simulated devices need a process of their own; it runs all cases once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import _sharded_program as program  # its cases by name; nothing runs
import pytest

HERE = Path(__file__).parent
# Relative to the largest entry; the solves run to 1e-12, the reference is exact.
GRADIENT_TOL = 1e-10
# What a solver may send at a time: scalars, inner products with its stored vectors (at
# most 20), none of it as large as one device's part of the state (272 entries).
MOST_ENTRIES = 64
REPLICATED_PARAMETERS = [
    name
    for name in program.CASES
    if "with a matrix" not in name and "sharded parameters" not in name
]


@pytest.fixture(scope="module")
def report():
    run = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "_sharded_program.py")],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", program.CASES)
def test_gradients_are_those_of_the_unsharded_problem(report, name):
    case = report["cases"][name]
    assert case["value_error"] < GRADIENT_TOL
    assert max(case["errors"]) < GRADIENT_TOL


@pytest.mark.parametrize("name", REPLICATED_PARAMETERS)
def test_nothing_is_gathered(report, name):
    kinds = {c["kind"] for c in report["cases"][name]["collectives"]}
    assert kinds == {"all-reduce"}


@pytest.mark.parametrize("name", REPLICATED_PARAMETERS)
def test_an_iteration_sends_scalars(report, name):
    for loop in report["cases"][name]["loops"]:
        assert loop["bytes"] <= 8 * 2 * MOST_ENTRIES


def test_sharded_parameters_are_gathered_by_the_cell_and_the_state_is_not(report):
    case = report["cases"]["jit, rows, sharded parameters, Picard, NormalCG"]
    gathered = [c for c in case["collectives"] if c["kind"] != "all-reduce"]
    matrix = f"f64[{program.FEATURES},{program.FEATURES}]"
    assert gathered
    assert {(c["kind"], c["shape"]) for c in gathered} == {("all-gather", matrix)}
    assert all(c["op"].endswith("dot_general") for c in gathered)


def test_a_matrix_product_over_sharded_features_is_all_that_sends_the_state(report):
    case = report["cases"]["jit, features with a matrix, Broyden, HybridKrylov"]
    large = [c for c in case["collectives"] if c["entries"] > MOST_ENTRIES]
    assert large
    assert all(c["op"].endswith("dot_general") for c in large)


def test_a_direct_solver_gathers_and_is_seen_to(report):
    n = program.BATCH * program.FEATURES
    shapes = [c["shape"] for c in report["direct"]["collectives"]]
    assert f"f64[{n},{n}]" in shapes


def test_the_default_has_no_direct_solver_over_several_devices(report):
    case = report["with_fallback"]
    assert {c["kind"] for c in case["collectives"]} == {"all-reduce"}
    assert case["custom_calls"] == []
    assert max(case["errors"]) < GRADIENT_TOL


def test_a_program_knows_whether_its_data_is_on_one_device(report):
    expected = {"one": 1, "several": 0, "mapped": 1, "mapped in part": 0}
    assert report["placements"] == expected


def test_bands_are_eliminated_on_one_device_and_never_gathered(report):
    alone, sharded = report["chain"]["1"], report["chain"]["8"]
    assert any("gtsv" in call for call in alone["custom_calls"])
    assert sharded["custom_calls"] == []
    # The function itself asks for the neighbours of what a device has.
    kinds = {c["kind"] for c in sharded["collectives"]}
    assert kinds == {"all-reduce", "collective-permute"}
    assert max(c["entries"] for c in sharded["collectives"]) <= MOST_ENTRIES
    for case in (alone, sharded):
        assert max(case["errors"]) < 1e-5  # the tolerance of the default is 1e-7


def test_few_entries_are_added_up_where_they_are(report):
    # On one device that is done one by one, or in two stages (`_reduce.py`).
    for case in report["short_chain"].values():
        kinds = {c["kind"] for c in case["collectives"]}
        assert kinds == {"all-reduce", "collective-permute"}
        assert max(c["entries"] for c in case["collectives"]) <= MOST_ENTRIES
        assert max(case["errors"]) < 1e-5


def test_shard_map_sends_the_loss_and_the_gradient_of_the_parameters_only(report):
    (name,) = [name for name in program.CASES if name.startswith("shard_map")]
    case = report["cases"][name]
    assert [loop["kinds"] for loop in case["loops"]] == [{}] * len(case["loops"])
    assert {c["kind"] for c in case["collectives"]} == {"all-reduce"}
    weights, scalars = program.FEATURES**2, 2  # the loss, and its own cotangent
    assert sum(c["entries"] for c in case["collectives"]) <= weights + scalars


def test_an_iteration_sends_as_much_on_eight_devices_as_on_two(report):
    eight = report["cases"]["jit, rows, Anderson, HybridKrylov"]
    assert report["two_devices"]["loops"] == eight["loops"]
    assert sum(loop["bytes"] for loop in eight["loops"]) > 0


def test_independent_lanes_do_not_wait_for_each_other(report):
    waiting = report["waiting"]
    steps = waiting["steps"]
    assert waiting["collectives"] == {}
    assert steps == waiting["alone"]
    assert len(set(steps)) == 8
    # Evaluated once more for the residual; counted on the devices themselves.
    assert waiting["evaluations"] == [n + 1 for n in steps]
    assert waiting["together"] == max(steps)


def test_closed_forms_of_small_states_are_right_inside_shard_map(report):
    assert len(report["small_states"]) == 2
    assert max(report["small_states"]) < 1e-12


def test_default_minima_and_their_gradients_are_right_inside_shard_map(report):
    assert len(report["extrema"]) == 4
    assert max(report["extrema"]) < 1e-6  # the solves run to 1e-8


def test_the_check_of_varying_values_refuses_a_layer_while_tracing(report):
    # What `docs/scale_out.md` explains. Once this fails, `check_vma` may stay on.
    assert "manual axis types do not match" in report["checked_mapping"]


@pytest.mark.parametrize("name", program.CASES)
def test_without_throw_the_host_is_not_called(report, name):
    calls = report["cases"][name]["custom_calls"]
    assert all(call.startswith("lapack_") for call in calls)


def test_throwing_is_one_host_call_and_not_throwing_none(report):
    calls = report["host_calls"]
    assert calls["False"] == []
    assert [("callback" in call) for call in calls["True"]] == [True]
