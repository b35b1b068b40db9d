"""Looking at a server while it has requests of ours: how loaded it is, and whether it works at all.

- One look a second while it is busy, and fewer where looking takes long: however many workers share a
  server, each spends one part in fifty of its time on looks.
- A server hangs when it has requests of ours and nothing that it counts has moved for `stall_s`. One
  that counts nothing hangs when, after as long without an answer, its health route is silent, too.
- A paused server and one that is being refitted stand still on purpose.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from rollfleet_common.errors import EngineUnavailableError, EpisodeError
from rollfleet_engines.signals import Load, Monitor
from rollfleet_worker.pool.members import PooledServer
from rollfleet_worker.pool.server_states import IN, ServerState

__all__ = ["Watching", "watch"]

#: A look may take one part in so many of a worker's time.
PART = 50
MAX_PAUSE_S = 15.0


@dataclass(frozen=True, slots=True)
class Watching:
    """How a pool looks at its servers.

    `probe` says why a server is not ready; `grown` is told that a limit may have changed, and
    `stalled` that a server hangs.
    """

    poll_s: float
    #: 0.0: never.
    stall_s: float
    probe: Callable[[PooledServer], Awaitable[str]]
    grown: Callable[[], None]
    stalled: Callable[[PooledServer, EngineUnavailableError], None]


async def watch(member: PooledServer, how: Watching) -> None:
    """Look at `member` until it has nothing of ours to do."""
    pause_s = how.poll_s
    while True:
        await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))
        if not member.in_flight:
            member.watcher = None
            return
        began_s = time.monotonic()
        load = await _look(member)
        if load is not None:
            if load.progress != member.progress:
                member.progress = load.progress
                member.moved_s = time.monotonic()
            if member.state in IN:
                member.limiter.observe(load, member.in_flight, time.monotonic())
                how.grown()
        await _judge(member, how)
        pause_s = min(max(how.poll_s, PART * (time.monotonic() - began_s)), MAX_PAUSE_S)


async def _look(member: PooledServer) -> Load | None:
    if member.monitor is None:
        return None
    try:
        return await member.monitor.load()
    except EpisodeError:
        return None


async def _judge(member: PooledServer, how: Watching) -> None:
    """Put `member` out if it hangs."""
    if member.state is ServerState.REFITTING:
        member.moved_s = time.monotonic()
    still_s = time.monotonic() - member.moved_s
    if not how.stall_s or not member.in_flight or still_s <= how.stall_s:
        return
    monitor = member.monitor
    counts = monitor is not None and monitor.offered and bool(member.progress)
    if monitor is not None and await _paused(monitor):
        member.last_error = f"paused, with {member.in_flight} requests of ours"
        member.moved_s = time.monotonic()
    elif counts or await how.probe(member):
        what = "nothing that it counts has moved" if counts else "no answer, and not ready either,"
        error = EngineUnavailableError(
            f"{member.name} hangs: {what} for {still_s:.0f} s with {member.in_flight} requests of "
            "ours in flight"
        )
        how.stalled(member, error)
    else:
        member.moved_s = time.monotonic()


async def _paused(monitor: Monitor) -> bool:
    with suppress(EpisodeError):
        return await monitor.paused()
    return False
