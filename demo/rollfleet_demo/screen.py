"""The demo's terminal: a live picture where there is a terminal, and plain lines where there is none.

- Shows what it is told and computes nothing but sums and means of it.
- Looks at the books only when it draws, a few times a second.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rollfleet import Books
from rollfleet_demo.trainer import Step

__all__ = ["Screen"]

#: Seconds between two pictures: more would take time from the trainer, which shares its core.
DRAW_S = 0.3
#: Steps between two lines where there is no terminal.
LINE_STEPS = 20
#: Steps that speeds and ages are taken over.
WINDOW = 20
CHART_ROWS = 6
CHART_COLUMNS = 60
_EIGHTHS = " ▁▂▃▄▅▆▇█"


class Screen:
    """What the demo says while it runs; a context manager, and its end leaves the last picture."""

    def __init__(self, wanted: int, console: Console | None = None) -> None:
        self.wanted = wanted
        self.console = console or Console(highlight=False)
        self.steps: list[Step] = []
        self._books = Books()
        self._notes: list[str] = []
        self._drawn_s = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._notes.clear()
            self._draw()
            self._live.stop()
            self._live = None

    def say(self, what: str) -> None:
        """One line that tells what happens now."""
        if self._live is None:
            self.console.print(Text(what))
        else:
            self._notes = [*self._notes[-1:], what]
            self._draw()

    def books(self, books: Books) -> None:
        """Take in the books."""
        self._books = books

    def step(self, step: Step, books: Callable[[], Books]) -> None:
        """Take in a step; `books` is called if there is something to show."""
        if not self.steps:
            self._notes.clear()  # what was said of the start is over
        self.steps.append(step)
        last = step.number == self.wanted
        if self._live is None:
            if step.number % LINE_STEPS == 0 or step.number == 1 or last:
                self._books = books()
                self.console.print(Text(self._line()), soft_wrap=True)
        elif last or time.monotonic() - self._drawn_s >= DRAW_S:
            self._books = books()
            self._draw()

    def summary(
        self, report: Mapping[str, Any], wrong: Sequence[str], files: Sequence[Path]
    ) -> None:
        """The end: what came out, what is wrong, where the files are."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in _summary(report):
            table.add_row(name, value)
        self.console.print()
        self.console.print(table)
        self.console.print()
        for problem in wrong:
            self.console.print(Text(f"wrong: {problem}", style="red"))
        if not wrong:
            good = "Nothing lost, nothing trained on twice, nothing too stale, and it has learned."
            self.console.print(Text(good, style="green"))
        self.console.print(Text("see " + ", ".join(map(str, files)), style="dim"), soft_wrap=True)

    # ---- plain lines -------------------------------------------------------------------------

    def _line(self) -> str:
        step, window = self.steps[-1], self.steps[-WINDOW:]
        samples, tokens = self._speed()
        ages = _shares(window)
        behind = " ".join(f"{age}:{share:.0%}" for age, share in ages.items())
        drops = _tally(self._books.dropped)
        return (
            f"step {step.number:>4}/{self.wanted}  {step.at_s:6.1f} s  reward {_reward(window):.3f}"
            f"  version {step.version + 1}  {samples:,.0f} samples/s  {tokens:,.0f} tokens/s"
            f"  staleness {behind}  dropped {drops}"
        )

    # ---- the picture -------------------------------------------------------------------------

    def _draw(self) -> None:
        if self._live is not None:
            self._drawn_s = time.monotonic()
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        notes = [Text(f"  {note}", style="yellow") for note in self._notes]
        if not self.steps:
            return Group(_title(), *notes)
        return Group(_title(), "", self._curve(), "", self._numbers(), "", *notes)

    def _curve(self) -> RenderableType:
        rewards = [step.reward for step in self.steps]
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", justify="right", width=9)
        table.add_column(no_wrap=True)
        rows = chart(rewards, self.wanted)
        for at, row in enumerate(rows):
            label = "reward 1" if at == 0 else "0" if at == len(rows) - 1 else ""
            table.add_row(label, Text(row, style="cyan"))
        return table

    def _numbers(self) -> RenderableType:
        step, window = self.steps[-1], self.steps[-WINDOW:]
        samples, tokens = self._speed()
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", justify="right", width=9)
        table.add_column()
        bar = Table.grid(padding=(0, 1))
        count = f"{step.number:,} of {self.wanted:,}, {step.at_s:.0f} s"
        bar.add_row(ProgressBar(total=self.wanted, completed=step.number, width=30), count)
        table.add_row("step", bar)
        first = self.steps[:5]
        table.add_row("reward", f"[bold]{_reward(window):.3f}[/], at first {_reward(first):.3f}")
        table.add_row(
            "policy", f"version {step.version + 1}, trained on {step.rows} of {step.samples} rows"
        )
        wait, train, publish = (
            1000 * sum(getattr(s, f"{part}_s") for s in window) / len(window)
            for part in ("wait", "train", "publish")
        )
        table.add_row("speed", f"{samples:,.0f} samples/s, {tokens:,.0f} tokens/s")
        table.add_row(
            "a step", f"waits {wait:.0f} ms, trains {train:.0f} ms, publishes {publish:.0f} ms"
        )
        table.add_row("staleness", _bars(_shares(window)))
        books = self._books
        dropped = sum(books.dropped.values())
        table.add_row("dropped", Text(_tally(books.dropped), style="yellow" if dropped else ""))
        table.add_row("books", _books(books))
        return table

    def _speed(self) -> tuple[float, float]:
        """Samples and trained tokens a second, over the last steps."""
        window = self.steps[-WINDOW - 1 :]
        if len(window) < 2:
            return 0.0, 0.0
        seconds = max(window[-1].at_s - window[0].at_s, 1e-9)
        counted = window[1:]
        samples = sum(s.samples for s in counted) / seconds
        return samples, sum(s.tokens for s in counted) / seconds


def chart(
    values: Sequence[float], wanted: int, rows: int = CHART_ROWS, columns: int = CHART_COLUMNS
) -> list[str]:
    """`values` between 0 and 1 as lines of block characters, from the top; `wanted` fill the width."""
    wide = min(columns, wanted)
    heights = []
    for column in range(wide):
        part = values[column * wanted // wide : (column + 1) * wanted // wide]
        if not part:
            break
        heights.append(round(sum(part) / len(part) * rows * 8))
    lines = []
    for row in reversed(range(rows)):
        fills = [min(max(height - 8 * row, 0), 8) for height in heights]
        # The floor is always drawn, so that a reward of zero is seen to be one.
        least = 1 if row == 0 else 0
        lines.append("".join(_EIGHTHS[max(fill, least)] for fill in fills))
    return lines


def _title() -> Text:
    title = Text("rollfleet demo", style="bold")
    title.append("  a transformer learns to sort eight digits, ", style="dim")
    title.append("83920174=01234789|", style="cyan")
    return title


def _reward(steps: Sequence[Step]) -> float:
    return sum(step.reward for step in steps) / max(len(steps), 1)


def _shares(steps: Sequence[Step]) -> dict[int, float]:
    """Share of samples by versions behind."""
    counts: Counter[int] = Counter()
    for step in steps:
        counts.update(step.staleness)
    total = sum(counts.values()) or 1
    return {age: counts[age] / total for age in sorted(counts)}


def _bars(shares: Mapping[int, float]) -> Text:
    text = Text()
    for age, share in shares.items():
        text.append(f"{age} ", style="dim")
        text.append("█" * round(share * 20) or "▏", style="cyan")
        text.append(f" {share:.0%}   ")
    return text


def _tally(counts: Mapping[str, int]) -> str:
    some = [(name, n) for name, n in counts.items() if n]
    return ", ".join(f"{n:,} {name}" for name, n in sorted(some, key=lambda x: -x[1])) or "none"


def _books(books: Books) -> Text:
    """The conservation law, with the places that hold something."""
    places = {
        "committed": books.committed,
        "dropped": sum(books.dropped.values()),
        "dead": books.dead,
        "trained": books.trained,
        "handed out": books.handed_out,
        "ready": books.ready,
        "in flight": books.in_flight,
        "delayed": books.delayed,
        "waiting": books.waiting,
    }
    text = Text(f"{books.submitted:,} submitted = ")
    text.append(" + ".join(f"{n:,} {name}" for name, n in places.items() if n) or "0")
    if books.balance:
        text.append(f", {books.balance:+,} unaccounted for", style="bold red")
    return text


def _summary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    samples, seconds = report["samples_trained"], report["seconds"]
    trained = f"{report['steps']:,} steps, {samples:,} samples, {report['tokens']:,} tokens"
    shares = ", ".join(f"{n / samples:.1%} {age}" for age, n in report["staleness"].items())
    twice, nowhere = report["duplicates_trained"], report["fabricated_trained"]
    mislabelled = report["mislabelled_tokens"]
    rows = [
        ("reward", f"{report['reward_first']:.3f} -> [bold]{report['reward_last']:.3f}[/]"),
        ("trained", trained),
        ("speed", f"{seconds:.1f} s, {samples / seconds:,.0f} samples/s"),
        (
            "staleness",
            f"at most {report['max_staleness_trained']} (bound {report['staleness_bound']}): "
            + shares,
        ),
        (
            "audit",
            f"{twice} trained twice, {nowhere} from nowhere, {mislabelled} tokens mislabelled",
        ),
        ("submitted", f"{report['submitted']:,}, of these {report['committed']:,} committed"),
        ("dropped", f"{_tally(report['dropped'])}; {report['dead']} dead"),
    ]
    for kill in report["kills"]:
        held = f"with {kill['leases']} prompts in its hands"
        rows.append(("killed", f"{kill['killed']} after step {kill['step']}, {held}"))
    return rows
