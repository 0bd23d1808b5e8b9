"""Value and gradient by pytest-benchmark, checked first; `report.py` prints ratios.

Run `nox -s benchmarks`.
"""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import timing
from workloads import WORKLOADS

SMALL = ("pair", "tanh10", "tanh100", "imaml_cg", "imaml_neumann")
READY = {key: WORKLOADS[key]() for key in SMALL}
PAIRS = [(key, name) for key in SMALL for name in READY[key].gradients]


@pytest.mark.parametrize(("key", "name"), PAIRS)
def test_gradient(benchmark, key, name):
    workload = READY[key]
    run = jax.jit(workload.gradients[name])
    found = timing.derivative_of(run(workload.theta))
    assert timing.relative_error(found, workload.reference) <= workload.rtol
    benchmark.group = workload.title
    benchmark(lambda: jax.block_until_ready(run(workload.theta)))
