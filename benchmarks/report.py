"""Everyone on every workload: Markdown tables, geometric means and a plot.

    python benchmarks/report.py                    # all, about ten minutes of one core
    python benchmarks/report.py --quick            # fewer rounds, about five
    python benchmarks/report.py --only deq pair    # some of them
    python benchmarks/report.py --page docs        # writes docs/benchmarks.md and .png
    python benchmarks/report.py --platform gpu     # on a GPU, in wall time

A contestant whose derivative is off by more than its workload allows is not timed.
"""

import argparse
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import one_core

import jax  # isort: skip  (on the core that the line before has chosen)
import approximations
import memory
import timing
from common import (
    BY_HAND,
    MATCHED,
    MATCHED_LU,
    NAMED,
    OURS,
    OWN,
    OWN_LU,
    SAME,
    SAME_LU,
    SOLVER,
    SOLVER_LU,
    Workload,
)
from timing import FirstCall
from workloads import WORKLOADS

OF_OURS = (OURS, NAMED, MATCHED)
LIBRARIES = (*OF_OURS, "optimistix", "jaxopt", "unrolled")
FIRST_LIMIT = 1.3
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}  # host solvers stay on the CPU
RULE_LIMITS = (1.1, 1.2)  # of the gradient and the first call
MEAN_LIMITS = {"gradient": 1.05, "first call": 1.2}


class Row(NamedTuple):
    """One contestant on one workload; seconds, NaN for what was not measured."""

    error: float
    gradient: float
    forward: float
    first: FirstCall | None


class Ratios(NamedTuple):
    """What one library needs relative to the best code by hand."""

    gradient: float
    forward: float
    first: float


def measure(workload: Workload, quick: bool) -> dict[str, Row]:
    """Checks everyone, then times those who are right."""
    args = (workload.theta,)
    errors = timing.errors(workload.gradients, *args, workload.reference)
    right = {n: f for n, f in workload.gradients.items() if errors[n] <= workload.rtol}
    seconds, rounds = (1.5, 1) if quick else (6.0, 3)
    gradient = timing.run_times(right, args, seconds=seconds)
    solves = {n: f for n, f in workload.solves.items() if n in right}
    forward = timing.run_times(solves, args, seconds=seconds / 2) if solves else {}
    first = timing.first_calls(right, args, rounds)
    return {
        name: Row(
            error,
            gradient.get(name, math.nan),
            forward.get(name, math.nan),
            first.get(name),
        )
        for name, error in errors.items()
    }


def best_of(rows: dict[str, Row], library: str) -> Row | None:
    """The quickest gradient among the variants of a library."""
    exact = library in OF_OURS
    if library == NAMED and NAMED not in rows:
        library = MATCHED  # there that names no linear solver
    if library == MATCHED and MATCHED not in rows:
        library = OURS  # there it has the algorithm of the code by hand already
    found = [
        row
        for name, row in rows.items()
        if row.first is not None
        and (name == library if exact else name.startswith(library))
    ]
    return min(found, key=lambda row: row.gradient, default=None)


def first_of(row: Row) -> float:
    return math.nan if row.first is None else row.first.seconds


def ratios(rows: dict[str, Row], row: Row) -> Ratios:
    hand = best_of(rows, BY_HAND)
    assert hand is not None, "the code by hand is wrong"
    return Ratios(
        row.gradient / hand.gradient,
        row.forward / hand.forward,
        first_of(row) / first_of(hand),
    )


def scaled(value: float, unit: float) -> str:
    return "" if math.isnan(value) else f"{value / unit:.3g}"


def ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def table(workload: Workload, rows: dict[str, Row]) -> str:
    """Run times in microseconds, first calls in milliseconds."""
    columns = (
        "contestant",
        "gradient [us]",
        "ratio",
        "forward [us]",
        "ratio",
        "first call [ms]",
        "ratio",
        "trace + lower + compile",
        "temporary [KiB]",
        "error",
    )
    lines = [
        f"### {workload.title}\n",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1].gradient):
        if row.first is None:
            lines.append(f"| {name}" + " |" * 9 + f" {row.error:.0e}, not timed |")
            continue
        found, first = ratios(rows, row), row.first
        phases = (first.trace, first.lower, first.compile)
        cells = (
            name,
            scaled(row.gradient, 1e-6),
            ratio(found.gradient),
            scaled(row.forward, 1e-6),
            ratio(found.forward),
            scaled(first.seconds, 1e-3),
            ratio(found.first),
            " + ".join(f"{1e3 * phase:.0f}" for phase in phases),
            f"{first.temp_bytes / 1024:.4g}",
            f"{row.error:.0e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


Results = dict[str, tuple[Workload, dict[str, Row]]]


def library_ratios(results: Results, library: str) -> dict[str, Ratios]:
    found = {}
    for key, (_, rows) in results.items():
        row = best_of(rows, library)
        if row is not None:
            found[key] = ratios(rows, row)
    return found


def means(results: Results) -> str:
    """Geometric means of the ratios to the code by hand."""
    lines = [
        "| library | workloads | gradient | forward | first call |",
        "|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        found = library_ratios(results, library).values()
        cells = []
        for part in ("gradient", "forward", "first"):
            values = [getattr(r, part) for r in found]
            values = [v for v in values if not math.isnan(v)]
            cells.append(ratio(timing.geometric_mean(values)) if values else "")
        lines.append(f"| {library} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(value: float, limit: float) -> str:
    return f"{value:.2f} " + ("(reached)" if value <= limit else "(**missed**)")


def targets(results: Results) -> str:
    """What is aimed at, and whether it is reached."""
    lines = [
        "| workload | gradient: limit | by default | named | matched "
        "| first call: limit | by default | named | matched | quickest other library |",
        "|---" * 10 + "|",
    ]
    for workload, rows in results.values():
        cells: dict[str, tuple[str, str]] = {}
        for library in OF_OURS:
            row = best_of(rows, library)
            if row is None:
                cells[library] = ("", "")
                continue
            found = ratios(rows, row)
            cells[library] = (
                verdict(found.gradient, workload.limit),
                verdict(found.first, FIRST_LIMIT),
            )
        peers = [best_of(rows, name) for name in ("optimistix", "jaxopt")]
        others = [ratios(rows, peer).gradient for peer in peers if peer is not None]
        gradients, firsts = zip(*(cells[name] for name in OF_OURS), strict=True)
        columns = (
            workload.title,
            str(workload.limit),
            *gradients,
            str(FIRST_LIMIT),
            *firsts,
            ratio(min(others, default=math.nan)),
        )
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def against_rule(results: Results) -> str:
    """What the rule costs, apart from the forward loop and the linear solver."""
    lines = [
        "| workload | layer | rule | gradient: limit | layer / rule "
        "| first call: limit | layer / rule |",
        "|---" * 7 + "|",
    ]
    layers = OWN, OWN_LU, MATCHED, MATCHED_LU, MATCHED, MATCHED_LU
    rules = SAME, SAME_LU, SOLVER, SOLVER_LU, SAME, SAME_LU
    for name, by_hand in zip(layers, rules, strict=True):
        for workload, rows in results.values():
            if name not in rows or by_hand not in rows:
                continue
            ours, rule = rows[name], rows[by_hand]
            found = ours.gradient / rule.gradient, first_of(ours) / first_of(rule)
            cells = [
                f" {limit} | {verdict(value, limit)} |"
                for value, limit in zip(found, RULE_LIMITS, strict=True)
            ]
            who = f"| {workload.title} | {name} | {by_hand} |"
            lines.append(who + "".join(cells))
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        model = info.split("model name\t: ")[1].splitlines()[0]
    except (OSError, IndexError):
        model = platform.processor()
    packages = ("jax", "equinox", "lineax", "optimistix", "jaxopt", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{platform.machine()}, {model}, {one_core.CORES} cores of which one is used; "
        f"{jax.devices()[0].device_kind}; "
        f"Python {platform.python_version()}, {versions}."
    )


def plot(results: Results, path: Path) -> None:
    """Bars of the gradient's and the first call's ratio, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(10, 7), layout="constrained")
    keys = list(results)
    for axis, part in zip(axes, ("gradient", "first"), strict=True):
        for i, library in enumerate(LIBRARIES):
            found = library_ratios(results, library)
            places = [
                j + (i - 2.5) * 0.14 for j, key in enumerate(keys) if key in found
            ]
            heights = [getattr(found[key], part) for key in keys if key in found]
            axis.bar(places, heights, width=0.13, bottom=0, label=library)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(keys)), keys, rotation=20)
        what = "value and gradient" if part == "gradient" else "first call"
        axis.set_ylabel(f"{what}\n(ratio to code by hand)")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(LIBRARIES),
        fontsize="small",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


QUICK = (
    "A `--quick` run: each first call was measured once, which is good to about 20 %."
)
FULL = "Each first call is the median of three."

INTRODUCTION = """\
# Benchmarks

Everything here is written by one script. In a clone, with the group `benchmarks` and
the extra `all` installed:

```sh
python benchmarks/report.py --page docs
```

Contestants of a workload run in turns, in one process with one thread on one core, so
that JAX dispatches synchronously (`benchmarks/one_core.py` says why); times are medians
of CPU time. A *ratio* is to the best code by hand: a `custom_vjp`
that an expert writes for that one problem. *Gradient* is value and gradient (or the
whole Jacobian), *forward* the solution alone, *first call* trace, lowering and
compilation of the gradient. Each contestant's derivative is first compared with a NumPy
program in float64; all are asked for the same tolerances, none of them raises
(`throw=False`). `eqximplicit` has the default solvers; `eqximplicit, named` a plain
forward solver by name, as every contestant of another library, and the default linear
solver; `eqximplicit, matched` is given the algorithm of the code by hand (in iMAML all
three are one; the pair, the roots and implicit Euler have no `named` beside `matched`).
Where jaxopt has no solver
for a problem (small roots, iMAML), its `custom_root` is around the solver by hand.

The problems are in `benchmarks/workloads.py` and `benchmarks/bilevel.py`. Further
scripts: `sparse.py` (2-D diffusion, too), `linear_solvers.py`, `root_finders.py`,
`fixed_points.py`."""

RULE = f"""\
## Against a rule by hand with the same linear solver

`{SAME}` is a `custom_vjp` around the loop by hand whose backward pass calls
`lx.linear_solve` with the linear solver of `matched`; `{SAME_LU}` does so with that
of lineax. The layers `{OWN}` and `{OWN_LU}` have
the same loop for a solver and the same linear solver, so that only the rule is another:
it is NaN where the derivative is not to be trusted, so it measures what the linear
solver answers, and whether elimination has met a singular matrix, none of which the
rule by hand looks at.
`{MATCHED}` and `{MATCHED_LU}` have a solver of optimistix, whose claim to have
converged is held against the value. They are beside rules by hand around
`optx.fixed_point` with that solver, and, in the last rows, around the loop by hand."""

FIRST_CALL = """\
## Paying less for the first call

What the defaults compile beside the plain method is what they fall back on where that
fails, and what tells a derivative that is not to be trusted. Three ways to wait less:

- *Name a solver*, as `named` does: then there is nothing to fall back on in the forward
  solve; or a linear solver as well, as `matched` does.
- *JAX's persistent cache* keeps compiled programs for the next process:
  `JAX_COMPILATION_CACHE_DIR=~/.cache/jax` and
  `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`. The first two workloads below, by
  default, then take 0.6 s and 0.5 s instead of 2.0 s and 2.6 s (one run).
- *Another way to make kernels.* A third of the time goes into XLA's newer way to make
  kernels for a CPU. One function is compiled without it by
  `jax.jit(fn, compiler_options={"xla_cpu_use_fusion_emitters": False})`, a whole
  process by `XLA_FLAGS=--xla_cpu_use_fusion_emitters=false`. The pair, matched, then
  took 0.15 s instead of 0.31 s, the `tanh` of 100 numbers by default 2.3 s instead of
  3.1 s, and the run time was about the same (one run). This is an option of XLA (jaxlib
  0.10.2), not of JAX; none of the figures here is measured with it.

A small loop of a layer is one kernel by itself (`eqximplicit/_one_kernel.py`), as long
as it is free of products of matrices, sorting, scattering and calls of libraries."""


class Extras(NamedTuple):
    """Tables beside those of the workloads."""

    effort: str
    memory: str
    approximations: str


def page(results: Results, extras: Extras) -> str:
    tables = "\n\n".join(table(*result) for result in results.values())
    limits = ", ".join(f"{name} {value}" for name, value in MEAN_LIMITS.items())
    parts = (
        INTRODUCTION,
        f"Measured on: {machine()} {extras.effort}",
        "## What is aimed at\n\n" + targets(results),
        RULE + "\n\n" + against_rule(results),
        f"## Geometric means\n\nAimed at: {limits}.\n\n" + means(results),
        "![Ratios to code by hand](benchmarks.png)",
        FIRST_CALL,
        "## Memory against the number of steps\n\n" + extras.memory,
        "## Approximate gradients\n\n"
        "Direction and size of the error of what the literature uses instead of the "
        "exact inverse, at the same solution.\n\n" + extras.approximations,
        "## Every workload\n\n" + tables,
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--page", type=Path, metavar="FOLDER", default=Path("outputs"))
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    options = parser.parse_args()
    jax.config.update("jax_platforms", PLATFORMS[options.platform])
    if options.platform == "gpu":
        timing.clock = time.perf_counter
    options.page.mkdir(parents=True, exist_ok=True)
    effort = QUICK if options.quick else FULL
    extras = Extras(effort, memory.table(), approximations.table())
    results = Results()
    for key in options.only:
        workload = WORKLOADS[key]()
        results[key] = workload, measure(workload, options.quick)
        print(table(*results[key]) + "\n", flush=True)
        # After each workload, so that a run which is cut short leaves a page.
        (options.page / "benchmarks.md").write_text(page(results, extras))
    plot(results, options.page / "benchmarks.png")
    print(means(results) + "\n\n" + targets(results), *extras, sep="\n\n")


if __name__ == "__main__":
    main()
