"""What a diagnosis found: what, where, how bad in numbers, and what to do about it."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

import equinox as eqx

Severity = Literal["error", "warning", "note"]
_WIDTH = 88


class Finding(eqx.Module):
    """One thing that a diagnosis found.

    `print(finding)` shows it in four labelled lines.

    **Attributes:**

    - `severity`: `"error"` (the derivative is wrong or missing), `"warning"` (it may be
        other than you think) or `"note"`.
    - `what`: what is the matter, one sentence.
    - `where`: the leaf, field or quantity that it concerns.
    - `how_bad`: how much, in numbers. Dimensionless.
    - `remedy`: what to do, one sentence.
    """

    severity: Severity = eqx.field(static=True)
    what: str = eqx.field(static=True)
    where: str = eqx.field(static=True)
    how_bad: str = eqx.field(static=True)
    remedy: str = eqx.field(static=True)

    def __str__(self) -> str:
        head = _wrapped(f"{self.severity.upper()}: {self.what}", "  ")
        labelled = {"where": self.where, "how bad": self.how_bad, "to do": self.remedy}
        return "\n".join([head, *_rows(labelled, "    ")])


def serious(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are more than a note."""
    return [found for found in findings if found.severity != "note"]


def titled(name: str, findings: Sequence[Finding]) -> str:
    """The first line of a report: its name and its verdict."""
    counts = {
        severity: sum(found.severity == severity for found in findings)
        for severity in ("error", "warning", "note")
    }
    words = [f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items() if n]
    verdict = "ok" if not serious(findings) else "not ok"
    return f"{name}: {verdict}" + (f" ({', '.join(words)})" if words else "")


def rendered(name: str, rows: dict[str, str], findings: Sequence[Finding]) -> str:
    """A report as text: verdict, one line for each figure, and the findings."""
    order = {"error": 0, "warning": 1, "note": 2}
    ranked = sorted(findings, key=lambda found: order[found.severity])
    return "\n".join([titled(name, findings), *_rows(rows, "  "), *map(str, ranked)])


def number(x: float | None) -> str:
    """A figure with three digits, or a word for none."""
    return "not measured" if x is None else f"{x:.2e}"


def _rows(rows: dict[str, str], indent: str) -> list[str]:
    width = max(map(len, rows)) + 2
    return [_wrapped(text, indent, f"{key:<{width}}") for key, text in rows.items()]


def _wrapped(text: str, indent: str, label: str = "") -> str:
    hanging = indent + " " * max(len(label), 2)
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent + label, subsequent_indent=hanging
    )
