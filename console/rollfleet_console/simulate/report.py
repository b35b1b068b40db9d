"""A simulated run, or a sweep, on the terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from rollfleet_console.simulate.run import Comparison
from rollfleet_console.simulate.scenario import Scenario
from rollfleet_console.simulate.sweep import Row, select

__all__ = ["render", "render_sweep"]


def render(c: Comparison) -> RenderableType:
    """One run, for a terminal of 80 columns or more."""
    return Group(_rates(c), "", _staleness(c), "", _drops(c))


def _rates(c: Comparison) -> Table:
    s = c.scenario
    table = Table(
        title=f"{s.slots} slots, {s.samples_per_version} samples per version, "
        f"max_staleness {s.max_staleness}, pipeline_depth {s.depth}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for name in ("this fleet", "synchronous", "sync, by turns*"):
        table.add_column(name, justify="right")
    runs = (c.result, c.synchronous, c.colocated)
    table.add_row("trained samples per hour", *(f"{r.samples_per_h:,.0f}" for r in runs))
    table.add_row("versions per hour", *(f"{r.steps_per_h:.1f}" for r in runs))
    table.add_row("this fleet is faster by", "", f"{c.speedup:.2f}x", f"{c.speedup_colocated:.2f}x")
    table.add_row("slots that hold a rollout", *(f"{r.slots_busy:.1%}" for r in runs))
    table.add_row("slots that generate", *(f"{r.slots_generating:.1%}" for r in runs))
    table.add_row("slots whose tokens are trained", *(f"{r.slots_useful:.1%}" for r in runs))
    table.add_row("trainer waits for a batch", *(f"{r.trainer_idle:.1%}" for r in runs))
    table.caption = "* all accelerators generate, then all train; no cost of switching"
    table.caption_justify = "left"
    return table


def _staleness(c: Comparison) -> RenderableType:
    r, bound = c.result, c.scenario.max_staleness
    table = Table.grid(padding=(0, 2))
    for age, share in sorted(r.staleness_shares.items())[:20]:
        bar = "█" * max(round(share * 40), 1)
        style = "red" if age > bound else "cyan"
        table.add_row(f"{age} behind", f"{share:6.1%}", f"[{style}]{bar}[/]")
    mark = "green" if r.over_bound == 0 else "red"
    return Group(
        "[bold]staleness at hand-over, by the oldest token of each sample[/]",
        table,
        f"mean {r.staleness_mean:.2f}, p99 {r.staleness_p99:g}, max {r.staleness_max}; over tokens, "
        f"each by its own version, {r.staleness_of_tokens:.2f}",
        f"[{mark}]over the bound of {bound}: {r.over_bound:.2%}[/]",
    )


def _drops(c: Comparison) -> RenderableType:
    r = c.result
    names = {
        "cancel": "cancelled in flight",
        "surplus": "cancelled as surplus",
        "deliver": "refused at deliver",
        "close": "dropped as the group closed: aged, or siblings of a sample given up",
        "sweep": "dropped by the sweep at hand-over",
    }
    table = Table.grid(padding=(0, 2))
    for guard, words in names.items():
        if guard != "surplus" or c.scenario.oversample:
            table.add_row(f"{r.dropped_by.get(guard, 0):6.2%}", words)
    lines: list[RenderableType] = [
        f"[bold]dropped: {r.dropped:.1%} of samples, {r.tokens_dropped:.1%} of tokens[/]",
        table,
        f"dead: {r.dead:.2%} of samples; tokens lost with failed attempts: {r.tokens_failed:.2%}",
    ]
    if r.dropped_length is not None:
        lines.append(
            f"mean length: trained {r.trained_length:,.0f} tokens, dropped {r.dropped_length:,.0f}; "
            f"what is trained on is {r.length_bias:.0%} as long as the data set"
        )
    lines.append(f"of the longest tenth of the samples {r.longest_trained:.0%} were trained on")
    return Group(*lines)


def render_sweep(swept: dict[str, Any], base: Scenario) -> RenderableType:
    """The reference's rows of the table, and the goals."""
    table = Table(
        title=f"{base.slots} slots, with early cancel",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for name in ("sigma", "staleness", "samples/h", "over sync", "generate", "useful", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("longest 10 %", justify="right")
    for row in select(swept["table"], slots=base.slots, early_cancel=True):
        if row["starved"]:
            table.add_row(f"{row['sigma']}", f"{row['max_staleness']}", "[red]starved[/]")
            continue
        table.add_row(
            f"{row['sigma']}",
            f"{row['max_staleness']}",
            f"{row['samples_per_h']:,.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['slots_generating']:.1%}",
            f"{row['slots_useful']:.1%}",
            f"{row['dropped']:.1%}",
            f"{row['longest_trained']:.0%}",
        )
    return Group(table, "", _goals(swept["goals"]))


def _goals(goals: list[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    for goal in goals:
        mark = "[green]met[/]" if goal["met"] else "[red]missed[/]"
        table.add_row(mark, goal["value"], goal["goal"])
    return table
