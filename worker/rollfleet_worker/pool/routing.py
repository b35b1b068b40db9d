"""Who gets which server, and in which order those who wait get one.

- Members of a group reach the server that holds their prefix (rendezvous hashing on the affinity
  key), unless it is full or out; then the least loaded one. What goes on from tokens of some
  version rather goes to a server that has it.
- No server ever has more completions in flight than its limit.
- Waiting is first come, first served, and woken by events; nothing polls.
- While a server is in, or the trainer is at it, waiting is mere backpressure and has no end of its own.
"""

import asyncio
import itertools
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from rollfleet_common.errors import EngineUnavailableError
from rollfleet_common.messages import NO_VERSION
from rollfleet_worker.pool.members import PooledServer
from rollfleet_worker.pool.server_states import COMING, IN

__all__ = ["Router", "Wanted"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call wants of a server."""

    #: Calls of one key rather go to one server.
    affinity: str
    #: Completions at once.
    units: int
    #: The server that has just failed it; any other one is better.
    avoid: PooledServer | None = None
    #: Rather a server that was refitted to at least this version.
    not_before: int = NO_VERSION


@dataclass(slots=True, eq=False)
class _Waiter:
    wanted: Wanted
    #: Its place in the order of those who wait.
    number: int
    turn: "asyncio.Future[PooledServer]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Router:
    """Places on the servers of a pool.

    Args:
        members: The servers, by name; the pool adds and removes.
        wait_s: How long a call waits while every server is out, before it fails.
        released: Told of every server of which places were given back.
    """

    def __init__(
        self,
        members: Mapping[str, PooledServer],
        wait_s: float,
        released: Callable[[PooledServer], None],
    ) -> None:
        self._members = members
        self._wait_s = wait_s
        self._released = released
        self._numbers = itertools.count()
        self._waiters: deque[_Waiter] = deque()
        #: Since when every server is out, on the monotonic clock; None while one is not.
        self._out_since_s: float | None = None

    async def acquire(self, wanted: Wanted) -> PooledServer:
        """Take places on one server; waits for its turn.

        Raises:
            EngineUnavailableError: Every server was out for `wait_s`; says which and why.
        """
        member = None if self._waiters else self._pick(wanted)
        if member is not None:
            _take(member, wanted.units)
            return member
        began_s, number = time.monotonic(), next(self._numbers)
        while True:
            waiter = _Waiter(wanted, number)
            insort(self._waiters, waiter, key=lambda one: one.number)
            if member is not None:
                self.release(member, wanted.units)
            member = await self._turn(waiter, began_s)
            if member.state in IN:
                return member
            # It went out between the turn and now: back to the same place in the queue.

    async def _turn(self, waiter: _Waiter, began_s: float) -> PooledServer:
        """Wait for the turn of `waiter`; it gives its place back if it is cancelled then."""
        wanted = waiter.wanted
        try:
            return await self._wait(waiter, began_s)
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled() and not waiter.turn.exception():
                self.release(waiter.turn.result(), wanted.units)
            elif not waiter.turn.done():
                with suppress(ValueError):
                    self._waiters.remove(waiter)
                # It may have stood before others that fit.
                self.serve()
            raise

    def release(self, member: PooledServer, units: int) -> None:
        """Give `units` places back."""
        member.in_flight -= units
        self._released(member)
        self.serve()

    def serve(self) -> None:
        """Give free places to those who wait, in their order."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.turn.done():
                member = self._pick(waiter.wanted)
                if member is None:
                    return
                _take(member, waiter.wanted.units)
                waiter.turn.set_result(member)
            self._waiters.popleft()

    def changed(self) -> None:
        """Servers went in or out."""
        if any(m.state in COMING for m in self._members.values()):
            self._out_since_s = None
        elif self._out_since_s is None:
            self._out_since_s = time.monotonic()
        self.serve()

    def close(self, error: Exception) -> None:
        """Fail those who wait."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(error)

    async def _wait(self, waiter: _Waiter, began_s: float) -> PooledServer:
        while not waiter.turn.done():
            await asyncio.wait({waiter.turn}, timeout=self._patience_s(began_s))
            if not waiter.turn.done() and self._patience_s(began_s) <= 0.0:
                raise EngineUnavailableError(self._why_none())
        return waiter.turn.result()

    def _patience_s(self, began_s: float) -> float:
        """How much longer to wait."""
        if self._out_since_s is None:
            return max(self._wait_s, 0.001)
        return max(self._out_since_s, began_s) + self._wait_s - time.monotonic()

    def _pick(self, wanted: Wanted) -> PooledServer | None:
        """The best server with room now."""
        affinity, avoid = wanted.affinity, wanted.avoid
        free = [m for m in self._members.values() if m.has_room(wanted.units)]
        if avoid is not None and len(free) > 1:
            free = [m for m in free if m is not avoid]
        if not free:
            return None
        # Rather, not only: an older server makes true tokens, too, and waiting helps nobody.
        free = [m for m in free if m.stand.serves >= wanted.not_before] or free
        alone = len(self._members) == 1
        rest = [m for m in self._members.values() if m is not avoid or alone]
        favourite = max(rest, key=lambda m: m.weight(affinity))
        if favourite in free:
            return favourite
        return max(free, key=lambda m: (-m.in_flight, m.weight(affinity)))

    def _why_none(self) -> str:
        if not self._members:
            return (
                f"this worker had no inference server for {self._wait_s:g} s: start it with "
                "--server URL, or register one with `rollfleet server add URL`"
            )
        said = "; ".join(f"{m.name}: {m.why() or m.state}" for m in self._members.values())
        return f"no inference server was available for {self._wait_s:g} s ({said})"


def _take(member: PooledServer, units: int) -> None:
    if not member.in_flight:
        # Idle until now: doing nothing was no sign of hanging.
        member.moved_s = time.monotonic()
    member.in_flight += units
