"""Does the suite notice a wrong sign or a missing transpose in the rule?

Each mutant is one change of the source, made in a copy, on which the tests that must
notice it are run. The script fails if a mutant survives, if a snippet is not found
exactly once, or if the tests do not pass on the unchanged copy.

    python tests/mutations.py [part of a mutant's name ...]
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

FIRST = "tests/test_rule.py -k closed_form_forwards"
TRANSPOSE = "tests/test_rule.py -k 'transpose_of_forward or closed_form_forwards'"
SECOND = "tests/test_rule.py -k 'all_four_orders'"
SINGULAR = "tests/test_rule.py -k 'singular_lane or untrusted or run_out'"
ZERO = "tests/test_rule.py -k 'zero_right_hand_side or untrusted'"
BATCH = "tests/test_rule.py -k 'batch or lane or vmap'"
FACTORS = "tests/test_linear_solvers.py -k 'transpose'"
CLAIM = "tests/test_claim.py -k 'hardly_moves or only_the_lane'"
SMALL = "tests/test_small_cotangents.py"
MINIMUM = "tests/test_rule.py -k 'parameters_in_the_condition or closed_form_forwards'"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `eqximplicit/<file>`; `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "sign of the right-hand side",
        "_implicit.py",
        "jtu.tree_map(jax.lax.neg, t_residual)",
        "t_residual",
        FIRST,
    ),
    Mutant(
        "value in place of its tangent",
        "_primitives.py",
        "(moved,), (list(t_moving),))[1]",
        "(moved,), (list(t_moving),))[0]",
        SECOND,
    ),
    Mutant(
        "a sum without what moves of it",
        "_linearise.py",
        "        return list(map(_Linear, moved))",
        "        return [_ZERO]",
        FIRST,
    ),
    Mutant(
        "an equation without what moves of it",
        "_linearise.py",
        "return list(map(_Linear, push(moved)))",
        "return [_ZERO] * len(eqn.outvars)",
        "tests/test_linearise.py",
    ),
    Mutant(
        "a multiple root is a simple one",
        "_linear.py",
        "return trusted_if(rule, lax.bitwise_not(bent)), None",
        "return rule, None",
        "tests/test_multiple_roots.py -k 'do_not_look'",
    ),
    Mutant(
        "a large minimum has no weak direction",
        "_linear.py",
        "return rule, bend",
        "return rule, None",
        "tests/test_multiple_roots.py -k 'large_minimum'",
    ),
    Mutant(
        "arguments at rest",
        "_implicit.py",
        "flatten(as_arrays((hoisted, args)))",
        "flatten(as_arrays((hoisted, stop_gradient(args))))",
        FIRST,
    ),
    Mutant(
        "condition at rest",
        "_implicit.py",
        "flatten(as_arrays((hoisted, args)))",
        "flatten(as_arrays((stop_gradient(hoisted), args)))",
        MINIMUM,
    ),
    Mutant(
        "solution at rest in derivatives of the rule",
        "_primitives.py",
        "    y = _attach_p.bind(*primals, sizes=sizes, tangent=tangent)\n    _,",
        "    y = list(primals[: sizes[0]])\n    _,",
        SECOND,
    ),
    Mutant(
        "sign of the drift of the matrix",
        "_primitives.py",
        "t_b = [a - b for a, b in zip(t_b, drift, strict=True)]",
        "t_b = [a + b for a, b in zip(t_b, drift, strict=True)]",
        SECOND,
    ),
    Mutant(
        "matrix without a derivative",
        "_primitives.py",
        "    if any(moving):  # - Ȧ x",
        "    if False:  # - Ȧ x",
        SECOND,
    ),
    Mutant(
        "drift of the matrix in place of that of its transpose",
        "_primitives.py",
        "        return transpose(vector)[0]",
        "        return self.apply(coefficients, vector)",
        SECOND,
    ),
    Mutant(
        "no transpose in reverse",
        "_primitives.py",
        "linear_solve(factors, coefficients, cts, system.flip())",
        "linear_solve(factors, coefficients, cts, system)",
        TRANSPOSE,
    ),
    Mutant(
        "transpose in forward",
        "_primitives.py",
        "self.solve_transposed if self.transposed else self.solve",
        "self.solve if self.transposed else self.solve_transposed",
        TRANSPOSE,
    ),
    Mutant(
        "transpose in a batch",
        "_primitives.py",
        "solve=_mapped(axis, system.solve, f_dims, zeros),",
        "solve=_mapped(axis, system.solve_transposed, f_dims, zeros),",
        BATCH,
    ),
    Mutant(
        "saddle turned round",
        "_linear.py",
        "~is_saddle(y, value, mv)",
        "is_saddle(y, value, mv)",
        CLAIM,
    ),
    Mutant(
        "claim not asked",
        "_linear_rule.py",
        "    for wrong in signs:",
        "    for wrong in ():",
        CLAIM,
    ),
    Mutant(
        "state not transposed for a cotangent",
        "_linear_rule.py",
        "state, options = rule.solver.transpose(state, rule.options)",
        "options = rule.options",
        TRANSPOSE,
    ),
    Mutant(
        "untrusted solution differentiated",
        "_linear_rule.py",
        "lax.bitwise_and(lax.bitwise_and(found.good, found.asked), rule.trusted)",
        "lax.bitwise_and(found.good, found.asked)",
        SINGULAR,
    ),
    Mutant(
        "failed linear solve believed",
        "_linear_rule.py",
        "lax.bitwise_and(lax.bitwise_and(found.good, found.asked), rule.trusted)",
        "lax.bitwise_and(found.asked, rule.trusted)",
        SINGULAR,
    ),
    Mutant(
        "zero in place of NaN",
        "_linear_rule.py",
        "for value in (jnp.nan, 0))",
        "for value in (0, 0))",
        SINGULAR,
    ),
    Mutant(
        "NaN where nobody asks",
        "_linear.py",
        "return solution(rule, asked, found, found.asked, signs)",
        "return solution(rule, asked, found, jnp.asarray(True), signs)",
        ZERO,
    ),
    Mutant(
        "answer left in the units of the question",
        "_linear_rule.py",
        "asked.as_asked(found.x)",
        "found.x",
        SMALL,
    ),
    Mutant(
        "guess left in the units of the caller",
        "linear_solvers/_measured.py",
        "{key: scale(unit, options[key]) for key in _STARTS if key in options}",
        "{key: options[key] for key in _STARTS if key in options}",
        SMALL,
    ),
    Mutant(
        "transposed factors used as they are",
        "linear_solvers/direct_lu.py",
        "transposed=not state.transposed",
        "transposed=state.transposed",
        FACTORS,
    ),
    Mutant(
        "transposed inverse used as it is",
        "linear_solvers/_small.py",
        "transposed(self.inverse)",
        "self.inverse",
        TRANSPOSE,
    ),
    Mutant(
        "columns of a layer from its rows",
        "linear_solvers/_columns.py",
        "pair[:: -1 if side else 1]",
        "pair[:: 1 if side else -1]",
        "tests/test_columns.py -k 'layer'",
    ),
    Mutant(
        "slice of a diagonal that stays where it was",
        "linear_solvers/_bands.py",
        "k + first",
        "k",
        "tests/test_columns.py -k 'differences'",
    ),
    Mutant(
        "padding that moves a diagonal the wrong way",
        "linear_solvers/_bands.py",
        "k - before",
        "k + before",
        "tests/test_columns.py -k 'stencil'",
    ),
    Mutant(
        "what is taken from a diagonal is added",
        "linear_solvers/_bands.py",
        "lax.neg(entries) if sub else entries",
        "entries",
        "tests/test_columns.py -k 'stencil'",
    ),
    Mutant(
        "preconditioner of normal equations without its transpose",
        "linear_solvers/normal_cg.py",
        "preconditioner.mv(transposed.mv(r))",
        "preconditioner.mv(preconditioner.mv(r))",
        "tests/test_measured_solvers.py -k 'preconditioner'",
    ),
    Mutant(
        "leaves of which the last does not count",
        "_reduce_leaves.py",
        "for x in leaves]\n    return reduced(lax.concatenate",
        "for x in leaves[:-1]]\n    return reduced(lax.concatenate",
        "tests/test_reduce.py -k 'leaves'",
    ),
    Mutant(
        "precision of the state alone",
        "linear_solvers/_rounding.py",
        "return max(epsilon(struct), coarsest(program.jaxpr, _of_fast_products()))",
        "return epsilon(struct)",
        "tests/test_float32.py -k 'measured_no_better'",
    ),
    Mutant(
        "blocks without refinement",
        "linear_solvers/_sparse_plans.py",
        "_REFINEMENTS = 2",
        "_REFINEMENTS = 0",
        "tests/test_sparse.py -k 'blocks_lose_no_digits'",
    ),
    Mutant(
        "blocks believed row by row",
        "linear_solvers/_sparse_plans.py",
        "return jnp.where(sound, x, jnp.nan), peaks(x)",
        "return x, peaks(x)",
        "tests/test_sparse.py -k 'blocks_lose_no_digits'",
    ),
]


def copied(place: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("eqximplicit", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def passes(place: Path, tests: str) -> bool:
    """Whether the tests pass in the copy. Anything but pass or fail is an error."""
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    run = subprocess.run(
        command,
        shell=True,
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, 1):
        raise SystemExit(f"{command}\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return run.returncode == 0


def mutated(mutant: Mutant, place: Path) -> str:
    """The source with the change, which must fit exactly one place of it."""
    text = (place / "eqximplicit" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: `{mutant.old}` occurs {text.count(mutant.old)} times "
            f"in {mutant.file}, not once. Update `tests/mutations.py`."
        )
    return text.replace(mutant.old, mutant.new)


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass although the source is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        place = copied(Path(folder))
        text = mutated(mutant, place)
        (place / "eqximplicit" / mutant.file).write_text(text)
        return passes(place, mutant.tests)


def chosen(parts: list[str]) -> list[Mutant]:
    """The mutants whose name has one of the parts; all of them without any."""
    return [m for m in MUTANTS if not parts or any(part in m.name for part in parts)]


def main() -> None:
    """Runs the mutants and says what became of each."""
    mutants, survivors = chosen(sys.argv[1:]), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        place = copied(Path(folder))
        for tests in dict.fromkeys(m.tests for m in mutants):
            if not passes(place, tests):
                raise SystemExit(f"`{tests}` fails without any mutant.")
    for mutant in mutants:
        survived = survives(mutant)
        survivors += [mutant.name] * survived
        print(f"{'SURVIVED' if survived else 'killed':9}{mutant.name}", flush=True)
    if survivors:
        raise SystemExit(f"The tests did not notice: {', '.join(survivors)}.")


if __name__ == "__main__":
    main()
