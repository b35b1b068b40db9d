"""The inference servers of a run: what was registered, what the trainer wrote, what workers see.

- Three sources that may disagree, side by side and none corrected by another: that is how a server
  that the trainer believes in and no worker reaches is found.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rollfleet_common.servers import RegisteredServer, ServerWeights, WeightState, server_name
from rollfleet_console.status.views import FleetServer, WorkerCard

__all__ = ["gather", "render_servers"]

#: Servers that are shown one by one.
SHOWN = 32
#: Columns from which a reason stands beside its server.
WIDE = 120


def gather(
    registered: Mapping[str, RegisteredServer],
    weights: Mapping[str, ServerWeights],
    workers: Iterable[WorkerCard],
) -> tuple[FleetServer, ...]:
    """Every server that anybody knows, by name."""
    live = [w for w in workers if not w.lost]
    rows = {server_name(url): row for url, row in weights.items()}
    views = [(view, worker) for worker in live for view in worker.servers]
    names = sorted({*registered, *rows, *(view.name for view, _ in views)})
    routers = {one: server.url for server in registered.values() for one in server.behind}
    found: list[FleetServer] = []
    for name in names:
        mine = [view for view, _ in views if view.name == name]
        server, row = registered.get(name), rows.get(name)
        versions = {view.version for view in mine if view.version is not None and view.version >= 0}
        found.append(
            FleetServer(
                name=name,
                registered=server is not None,
                engine="" if server is None else server.engine,
                draining=server is not None and server.draining,
                weights="" if row is None else row.state.value,
                version=None if row is None or row.version < 0 else row.version,
                why=_why(row, [view.why or view.error for view in mine if not view.up])
                or (f"behind {routers[name]}" if name in routers else ""),
                states=dict(Counter(view.state for view in mine)),
                in_flight=sum(view.in_flight for view in mine),
                limit=sum(view.limit for view in mine),
                seen_versions=tuple(sorted(versions)),
            )
        )
    return tuple(found)


def _why(row: ServerWeights | None, said: list[str]) -> str:
    if row is not None and row.state is WeightState.STALE:
        return row.why
    return next(filter(None, said), "")


def render_servers(servers: tuple[FleetServer, ...]) -> RenderableType:
    """A table; where it is narrow, each reason has a line of its own below it."""
    if not servers:
        return Text("no inference server is known", style="dim")
    return _ByWidth(servers)


class _ByWidth:
    """Servers, laid out for the width at which they are drawn."""

    def __init__(self, servers: tuple[FleetServer, ...]) -> None:
        self.servers = servers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        yield _table(self.servers, why=wide)
        if not wide:
            for s in self.servers[:SHOWN]:
                if s.why:
                    yield Text(f"{s.name}: {s.why}", style="yellow")


def _table(servers: tuple[FleetServer, ...], *, why: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("server", overflow="fold")
    table.add_column("workers see it")
    table.add_column("trainer")
    for name in ("version", "in flight", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    if why:
        table.add_column("why", overflow="fold")
    for s in servers[:SHOWN]:
        bad = not s.draining and bool(s.states) and not s.states.get("serving")
        table.add_row(
            escape(s.name),
            Text(_states(s), style="red" if bad else ""),
            "draining" if s.draining else s.weights or "-",
            _version(s),
            f"{s.in_flight:,}",
            f"{s.limit:,}",
            *([escape(s.why)] if why else []),
        )
    if len(servers) > SHOWN:
        table.add_row(Text(f"{len(servers) - SHOWN} more", style="dim"))
    return table


def _states(s: FleetServer) -> str:
    if not s.states:
        return "nobody does"
    if len(s.states) == 1:
        (state,) = s.states
        return state
    return ", ".join(f"{n} {state}" for state, n in sorted(s.states.items(), key=lambda x: -x[1]))


def _version(s: FleetServer) -> str:
    versions = s.seen_versions or (() if s.version is None else (s.version,))
    if not versions:
        return "-"
    return str(versions[0]) if len(versions) == 1 else f"{versions[0]}-{versions[-1]}"
