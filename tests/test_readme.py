"""The README's example prints what the README says, and its commands are CI's."""

import contextlib
import io
import re
from pathlib import Path

import eqximplicit as eqi

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_example_prints_what_the_readme_shows():
    (code,), (shown,) = blocks("python"), blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert printed.getvalue() == shown


def test_second_command_is_the_one_that_ci_runs():
    demo, tests = (command.strip() for command in blocks("sh"))
    assert demo.replace("-s demo", "-s tests") == tests
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_readme_names_only_what_exists():
    for name in re.findall(r"eqi\.(\w+)", README):
        assert hasattr(eqi, name), name
