"""Every job of the project: `nox --list` shows them, CI runs nothing else."""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")

# Test processes share the cores, so each of them computes on one.
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


def group(name: str) -> list[str]:
    """The requirements of one dependency group of `pyproject.toml`."""
    return nox.project.dependency_groups(PROJECT, name)


def examples() -> list[Path]:
    """The examples, in reading order."""
    return sorted(Path("examples").glob("[0-9]*.py"))


def pytest(session: nox.Session, *args: str, empty_is_fine: bool = False) -> None:
    """Run pytest on two processes; files stay whole, so each compiles once."""
    session.run(
        *("pytest", "-n", "2", "--dist", "loadfile", *args, *session.posargs),
        env=ONE_THREAD,
        success_codes=[0, 5] if empty_is_fine else [0],
    )


@nox.session
def demo(session: nox.Session) -> None:
    """The first example: solve, differentiate, train, save a picture."""
    session.install("-e", ".[examples]")
    session.run("python", "examples/01_two_equations.py", env={"MPLBACKEND": "Agg"})


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, with the newest released dependencies."""
    session.install("-e", ".[all]", *group("tests"))
    pytest(session, "-m", "not slow")


@nox.session
def tests_slow(session: nox.Session) -> None:
    """The tests marked `slow`."""
    session.install("-e", ".[all,examples]", *group("tests"))
    pytest(session, "-m", "slow", empty_is_fine=True)


@nox.session
def mutations(session: nox.Session) -> None:
    """Wrong signs and missing transposes in the rule, each of which a test notices."""
    session.install("-e", ".[all]", *group("tests"))
    session.run("python", "tests/mutations.py", *session.posargs, env=ONE_THREAD)


@nox.session
def tests_lowest(session: nox.Session) -> None:
    """The tests, with the oldest dependencies that `pyproject.toml` allows."""
    lowest = str(Path(session.create_tmp()).resolve() / "lowest.txt")
    session.install("uv")
    session.run(
        *("uv", "pip", "compile", "pyproject.toml", "--quiet"),
        *("--resolution", "lowest-direct", "--output-file", lowest),
    )
    session.install("-e", ".[all]", *group("tests"), "--constraint", lowest)
    pytest(session, "-m", "not slow")


@nox.session
def tests_pre(session: nox.Session) -> None:
    """The tests, with pre-releases of the dependencies."""
    session.install("--pre", "--upgrade", "-e", ".[all]", *group("tests"))
    pytest(session, "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and formatting."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Strict types inside, and complete types for whoever imports the package."""
    session.install("-e", ".[all]", *group("tests"), *group("typecheck"))
    session.run("pyright")
    session.run("pyright", "--verifytypes", "eqximplicit", "--ignoreexternal")


@nox.session(name="examples")
def run_examples(session: nox.Session) -> None:
    """Every example as a script; each ends in assertions."""
    session.install("-e", ".[all,examples]")
    for example in examples():
        session.run("python", str(example), env={"MPLBACKEND": "Agg"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, where any warning is an error."""
    session.install("-e", ".[all,examples]", *group("docs"))
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=quiet)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Timings beside the neighbours', in one process, without type checks."""
    session.install("-e", ".[all]", *group("benchmarks"))
    options = ("-o", "addopts=--strict-markers", "-o", "python_files=bench_*.py")
    session.run("pytest", "benchmarks", *options, *session.posargs)
