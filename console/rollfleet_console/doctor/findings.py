"""What the doctor found: how bad, what, where, and what to do about it.

- Every finding that is not `ok` names a remedy: a sentence that somebody can act on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["Finding", "Report", "Severity", "render"]


class Severity(IntEnum):
    """How bad it is; the worst of a report decides the exit code."""

    OK = 0
    #: Good to know; nothing to do.
    INFO = 1
    #: Something waits, or will go wrong some day.
    WARNING = 2
    #: A promise is broken, or about to be.
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    severity: Severity
    #: Which check: "books", "groups", "server", ...
    check: str
    what: str
    #: Keys, groups, workers: the first few, and how many more.
    where: str = ""
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """In types that JSON knows."""
        return {
            "severity": self.severity.name.lower(),
            "check": self.check,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one examination, in the order of the checks."""

    run: str
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding."""
        return max((f.severity for f in self.findings), default=Severity.OK)

    @property
    def exit_code(self) -> int:
        """0: nothing to do; 1: warnings; 2: errors."""
        return max(0, self.worst - Severity.INFO)

    def of(self, check: str) -> list[Finding]:
        """The findings of one check that are not `ok`."""
        return [f for f in self.findings if f.check == check and f.severity > Severity.OK]

    def to_json(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {
            "run": self.run,
            "severity": self.worst.name.lower(),
            "findings": [finding.to_json() for finding in self.findings],
        }


_STYLE = {
    Severity.OK: ("ok", "green"),
    Severity.INFO: ("info", "cyan"),
    Severity.WARNING: ("warning", "bold yellow"),
    Severity.ERROR: ("ERROR", "bold red"),
}


def render(report: Report) -> RenderableType:
    """For a terminal of 80 columns or more: all that is well first, what is worst last."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for f in sorted(report.findings, key=lambda f: f.severity):
        word, style = _STYLE[f.severity]
        table.add_row(Text(word, style=style), f.check, _told(f))
    return Group(table, "", _summary(report))


def _told(f: Finding) -> Text:
    text = Text(f.what, style="dim" if f.severity is Severity.OK else "")
    if f.where:
        text.append(f"\nat: {f.where}", style="dim")
    if f.fix:
        text.append("\ndo: ", style="bold")
        text.append(f.fix)
    return text


def _summary(report: Report) -> Text:
    counts = [
        (sum(f.severity is severity for f in report.findings), word)
        for severity, word in ((Severity.ERROR, "error"), (Severity.WARNING, "warning"))
    ]
    said = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts if n)
    _, style = _STYLE[report.worst]
    return Text(f"Run {report.run}: {said or 'all is well'}.", style=style)


def some(names: Iterable[str], at_most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    every = list(names)
    shown = ", ".join(every[:at_most])
    return f"{shown} and {len(every) - at_most:,} more" if len(every) > at_most else shown
