"""A snapshot on the terminal: the path of the prompts, who works, who is read, and why it waits.

- Shows what the snapshot holds and computes nothing but sums of what stands side by side.
"""

from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rollfleet_console.status.explain import ago
from rollfleet_console.status.servers import render_servers
from rollfleet_console.status.views import Route, Snapshot, WorkerCard

__all__ = ["render"]

#: Workers that are shown one by one; a larger fleet is summed up.
SHOWN_WORKERS = 24
_STATE_STYLE = {"claiming": "green", "paused": "yellow", "draining": "yellow"}


def render(s: Snapshot, *, why_first: bool = False) -> RenderableType:
    """All of it, for a terminal of 80 columns or more.

    Args:
        s: What is shown.
        why_first: Put the reasons above the tables, where a screen of few lines cuts nothing off;
            else they come last, next to the prompt.
    """
    parts: list[RenderableType] = [_head(s), "", _path(s), ""]
    if why_first:
        parts += [*_why(s), ""]
    if s.routes:
        parts += [_routes(s.routes), ""]
    if s.workers:
        parts += [_workers(s.workers), ""]
    if s.servers:
        parts += [render_servers(s.servers), ""]
    return Group(*parts, *(() if why_first else _why(s)))


def _head(s: Snapshot) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("run", f"[bold]{escape(s.run)}[/]")
    if s.policy is None or s.shape is None:
        table.add_row("policy", "no trainer has opened this run")
        return table
    weights = f", weights {escape(s.policy.weights)}" if s.policy.weights else ""
    table.add_row("policy", f"version {s.policy.version}, epoch {s.policy.epoch}{weights}")
    table.add_row(
        "trainer",
        f"[green]{escape(s.trainer)}[/], lease for another {ago(s.trainer_left_s)}"
        if s.trainer
        else f"[red]nobody holds the run[/], the last was {escape(s.last_trainer) or '?'}",
    )
    shape = s.shape
    table.add_row(
        "shape",
        f"{shape.samples_per_version:,} samples a version, staleness up to {shape.max_staleness}, "
        f"pipeline depth {shape.pipeline_depth}"
        + (f", {shape.partitions} partitions" if shape.partitions > 1 else ""),
    )
    table.add_row("outstanding", f"{s.books.outstanding:,} of {s.limit:,} samples")
    return table


def _path(s: Snapshot) -> RenderableType:
    """Where every submitted sample is, in the order in which it gets there."""
    b = s.books
    dropped = sum(b.dropped.values())
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    places = {
        "submitted": b.submitted,
        "waiting": b.waiting,
        "delayed": b.delayed,
        "in\nflight": b.in_flight,
        "ready": b.ready,
        "handed\nout": b.handed_out,
        "trained": b.trained,
        "committed": b.committed,
        "dropped": dropped,
        "dead": b.dead,
    }
    bad = {"dropped": "yellow", "dead": "red"}
    for name in places:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    table.add_row(
        *(Text(f"{n:,}", style=bad.get(name, "bold") if n else "dim") for name, n in places.items())
    )
    notes = []
    if dropped:
        notes.append("dropped: " + _tally(b.dropped))
    if buried := {k[5:]: n for k, n in b.counters.items() if k.startswith("dead:")}:
        notes.append("dead: " + _tally(buried))
    if retried := {k[8:]: n for k, n in b.counters.items() if k.startswith("retried:")}:
        notes.append("retried: " + _tally(retried))
    return Group(table, *(Text(note, style="dim") for note in notes))


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items(), key=lambda x: -x[1]))


def _routes(routes: tuple[Route, ...]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("route", overflow="fold")
    for name in ("workers", "waiting", "oldest", "in flight", "oldest", "delayed", "next in"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in routes:
        served = "red" if not r.served_by and (r.waiting or r.delayed) else ""
        table.add_row(
            escape(r.name),
            Text(str(r.served_by), style=served),
            f"{r.waiting:,}",
            _ago(r.oldest_waiting_s),
            f"{r.in_flight:,}",
            _ago(r.oldest_pending_s),
            f"{r.delayed:,}",
            _ago(r.next_due_s),
        )
    return table


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else ago(seconds)


def _workers(workers: tuple[WorkerCard, ...]) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("worker", overflow="fold")
    for name in ("state", "busy", "leases", "version", "delivered", "failed", "seen"):
        right = "left" if name == "state" else "right"
        table.add_column(name, justify=right, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("release", no_wrap=True)
    table.add_column("servers", no_wrap=True)
    # The lost first: in a large fleet they would else be among those that are not shown.
    for w in sorted(workers, key=lambda w: (not w.lost, w.id))[:SHOWN_WORKERS]:
        table.add_row(
            escape(w.id),
            Text(w.state, style=_STATE_STYLE.get(w.state, "red")),
            f"{w.busy}/{w.slots}",
            f"{w.pending:,}",
            str(w.policy_version) if w.policy_version >= 0 else "-",
            f"{w.delivered:,}",
            Text(f"{w.failed:,}", style="yellow" if w.failed else ""),
            ago(w.seen_s),
            Text(f"{w.version} ({w.schemas})"),
            _servers(w),
        )
    rest = workers[SHOWN_WORKERS:]
    live = [w for w in workers if not w.lost]
    busy, slots = sum(w.busy for w in live), sum(w.slots for w in live)
    more = f"{len(rest)} more not shown; " if rest else ""
    states = _tally(Counter(w.state for w in workers))
    summed = f"{more}{len(workers)} in all: {states}; {busy:,} of {slots:,} slots busy"
    return Group(table, Text(summed, style="dim"))


def _servers(w: WorkerCard) -> Text:
    up = sum(server.up for server in w.servers)
    if not w.servers:
        return Text("-", style="dim")
    return Text(f"{up}/{len(w.servers)} up", style="" if up == len(w.servers) else "yellow")


def _why(s: Snapshot) -> Iterator[RenderableType]:
    if not s.reasons:
        yield Text("Nothing waits longer than it must.", style="green")
        return
    yield Text("Why it waits", style="bold")
    for reason in s.reasons:
        bullet = Table.grid(padding=(0, 1))
        bullet.add_row("-", Text(reason, overflow="fold"))
        yield bullet
