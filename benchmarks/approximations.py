"""How far approximate gradients are off a reference: cosine and relative error."""

from typing import Any

import jax
import numpy as np
import timing
from common import Workload
from workloads import WORKLOADS

import eqximplicit as eqi

SOLVERS: dict[str, dict[str, Any]] = {
    "deq": {
        "JFB, `Neumann(1)`": eqi.Neumann(1),
        "phantom, `Neumann(5, damping=0.5)`": eqi.Neumann(5, damping=0.5),
        "`Neumann(2)`": eqi.Neumann(2),
        "`Neumann(5)`": eqi.Neumann(5),
        "`Neumann(10)`": eqi.Neumann(10),
        "`NormalCG(5)`": eqi.NormalCG(5),
    },
    "logistic": {
        "one step, `Neumann(1)`": eqi.Neumann(1),
        "phantom, `Neumann(20, damping=0.5)`": eqi.Neumann(20, damping=0.5),
        "`Neumann(5)`": eqi.Neumann(5),
        "`Neumann(20)`": eqi.Neumann(20),
        "`Neumann(100)`": eqi.Neumann(100),
        "`NormalCG(5)`": eqi.NormalCG(5),
        "`Nystrom(10, rho=0.05)`": eqi.Nystrom(10, rho=0.05),
        "`Nystrom(100, rho=0.05)`": eqi.Nystrom(100, rho=0.05),
        "`Nystrom(400, rho=0.05)`": eqi.Nystrom(400, rho=0.05),
    },
}


def flat(tree: Any) -> np.ndarray:
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def rows(workload: Workload, solvers: dict[str, Any]) -> list[str]:
    assert workload.approximated is not None
    truth, lines = flat(workload.reference), []
    for name, solver in solvers.items():
        found = flat(jax.jit(workload.approximated(solver))(workload.theta))
        cosine = found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)
        error = timing.relative_error(found, truth)
        lines.append(f"| {workload.title} | {name} | {cosine:.4f} | {error:.1e} |")
    return lines


def table() -> str:
    """The last row of each problem is the default."""
    lines = [
        "| workload | linear solver | cosine | relative error |",
        "|---|---|---|---|",
    ]
    for key, solvers in SOLVERS.items():
        default = {"default": eqi.AutoLinearSolver()}
        lines += rows(WORKLOADS[key](), solvers | default)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
