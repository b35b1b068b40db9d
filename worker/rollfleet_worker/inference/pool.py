"""Many inference servers as one engine: sticky, capped, and without those that are failing.

A server's state moves only along these arrows:

    SERVING --failure--> SUSPECT --backoff over, ready()--> TRIAL --success, or trial_s--> SERVING
                            ^                                 |
                            +------------failure--------------+

- Members of a group reach the server that holds their prefix (rendezvous hashing on the affinity
  key), unless it is full or out; then the least loaded one.
- No server ever has more completions in flight than `per_server_cap`, and one on TRIAL fewer, so
  that a recovered server is not met by the whole crowd that waited for it.
- A failing server is out for a backoff with full jitter that doubles until a call succeeds there:
  a server whose health route is fine while its generations fail does not flap.
- Waiting is first come, first served, and woken by events; nothing polls.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Protocol

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineUnavailableError,
    SettingsError,
)
from rollfleet_common.messages import NO_VERSION
from rollfleet_worker.inference.engine import Engine, Generation, Request
from rollfleet_worker.inference.http import OverloadedError

__all__ = ["EnginePool", "NamedEngine", "ServerState", "ServerStatus"]


class NamedEngine(Engine, Protocol):
    """An engine that says which server it is, and what it serves."""

    @property
    def name(self) -> str:
        """Unique in a pool."""
        ...

    @property
    def version(self) -> int:
        """Version that the server was last seen to serve; NO_VERSION if unknown."""
        ...


class ServerState(StrEnum):
    """Where a server stands; the module's docstring draws the moves."""

    SERVING = "serving"
    SUSPECT = "suspect"
    TRIAL = "trial"


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What a pool knows of one server."""

    name: str
    state: ServerState
    #: Completions in flight.
    in_flight: int
    #: The last failure, in one line; "" if there was none.
    last_error: str
    #: Version that it was last seen to serve; NO_VERSION if unknown.
    version: int = NO_VERSION


@dataclass(slots=True, eq=False)
class _Member:
    engine: NamedEngine
    digest: bytes
    state: ServerState = ServerState.SERVING
    in_flight: int = 0
    last_error: str = ""
    #: Ejections since the last success: the exponent of the backoff.
    failures: int = 0
    #: Unusable answers in a row.
    unusable: int = 0
    #: Grows with every ejection, so that calls begun before it cannot eject a recovered server.
    life: int = 0
    revival: "asyncio.Task[None] | None" = None
    promotion: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Waiter:
    affinity: str
    units: int
    avoid: _Member | None
    turn: "asyncio.Future[_Member]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class EnginePool:
    """Engines behind one engine.

    Args:
        engines: The servers; their names must differ. Closed with the pool.
        per_server_cap: Completions in flight on one server; a call with n counts n.
        tries: How many times one call is made, each on the best server at hand.
        wait_s: How long a call waits while every server is out, before it fails.
        backoff_s: Mean of twice the first pause of a failing server; doubles per failure.
        max_backoff_s: The longest pause.
        probe_s: How long a ready() may take.
        trial_s: How long a recovered server is on trial if no call succeeds earlier.
        unusable_limit: How many unusable answers in a row put a server out.
        seed: Of the jitter, for tests.

    Raises:
        SettingsError: No engine, equal names, or a setting that makes no sense.
    """

    def __init__(
        self,
        engines: Sequence[NamedEngine],
        per_server_cap: int = 256,
        *,
        tries: int = 3,
        wait_s: float = 30.0,
        backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        probe_s: float = 5.0,
        trial_s: float = 5.0,
        unusable_limit: int = 3,
        seed: int | None = None,
    ) -> None:
        names = [engine.name for engine in engines]
        if not names or len(set(names)) < len(names):
            raise SettingsError(f"a pool needs servers with different names, got {names}")
        if per_server_cap < 1 or tries < 1 or unusable_limit < 1:
            raise SettingsError("per_server_cap, tries and unusable_limit must be at least 1")
        if not 0.0 < backoff_s <= max_backoff_s:
            raise SettingsError(f"backoff_s {backoff_s} must be within 0 .. {max_backoff_s}")
        self._members = [
            _Member(engine, blake2b(engine.name.encode(), digest_size=16).digest())
            for engine in engines
        ]
        self._cap = per_server_cap
        self._tries = tries
        self._wait_s = wait_s
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._probe_s = probe_s
        self._trial_s = trial_s
        self._unusable_limit = unusable_limit
        self._random = random.Random(seed)
        self._waiters: deque[_Waiter] = deque()
        #: Since when every server is out, on the monotonic clock; None while one is not.
        self._out_since_s: float | None = None
        self._closed = False

    def states(self) -> list[ServerStatus]:
        """How every server stands, in the order given."""
        return [
            ServerStatus(m.engine.name, m.state, m.in_flight, m.last_error, m.engine.version)
            for m in self._members
        ]

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` completions on one server, and on another one if that fails; see `Engine`.

        Raises:
            EngineUnavailableError: `tries` servers failed, or none came back within `wait_s`.
            EngineProtocolError: A server answered something unusable; not tried again here.
            EngineRefusedError: A server refused the request itself; not tried again.
        """
        units = min(n, self._cap)
        failed: _Member | None = None
        for left in reversed(range(self._tries)):
            member = await self._acquire(request.affinity, units, failed)
            life = member.life
            try:
                made = await member.engine.generate(request, n)
            except EngineUnavailableError as exc:
                self._eject(member, life, exc)
                if not left:
                    raise
                failed = member
            except EngineProtocolError as exc:
                member.unusable += 1
                member.last_error = str(exc)
                if member.unusable >= self._unusable_limit:
                    self._eject(member, life, exc)
                raise
            else:
                self._succeed(member, life)
                return made
            finally:
                self._release(member, units)
        raise AssertionError("unreachable: the last try returns or raises")

    async def ready(self) -> bool:
        """Whether at least one server answers now."""
        probes = [asyncio.ensure_future(self._probe(member)) for member in self._members]
        try:
            for probe in asyncio.as_completed(probes):
                if not await probe:
                    return True
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        return False

    async def close(self) -> None:
        """Stop probing, fail those who wait, and close every engine. Idempotent."""
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(EngineUnavailableError("the server pool was closed"))
        revivals = [member.revival for member in self._members if member.revival is not None]
        for member in self._members:
            if member.promotion is not None:
                member.promotion.cancel()
        for task in revivals:
            task.cancel()
        await asyncio.gather(*revivals, return_exceptions=True)
        for member in self._members:
            await member.engine.close()

    # Who gets which server.

    async def _acquire(self, affinity: str, units: int, avoid: _Member | None) -> _Member:
        if self._closed:
            raise EngineUnavailableError("the server pool is closed")
        member = None if self._waiters else self._pick(affinity, units, avoid)
        if member is not None:
            member.in_flight += units
            return member
        waiter = _Waiter(affinity, units, avoid)
        self._waiters.append(waiter)
        try:
            return await self._wait(waiter)
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled() and not waiter.turn.exception():
                self._release(waiter.turn.result(), units)
            elif not waiter.turn.done():
                with suppress(ValueError):
                    self._waiters.remove(waiter)
                # It may have stood before others that fit.
                self._serve_waiters()
            raise

    async def _wait(self, waiter: _Waiter) -> _Member:
        began_s = time.monotonic()
        while not waiter.turn.done():
            await asyncio.wait({waiter.turn}, timeout=self._patience_s(began_s))
            if not waiter.turn.done() and self._patience_s(began_s) <= 0.0:
                raise EngineUnavailableError(self._why_none())
        return waiter.turn.result()

    def _patience_s(self, began_s: float) -> float:
        """How much longer to wait; while any server is in, waiting is mere backpressure."""
        if self._out_since_s is None:
            return max(self._wait_s, 0.001)
        return max(self._out_since_s, began_s) + self._wait_s - time.monotonic()

    def _pick(self, affinity: str, units: int, avoid: _Member | None) -> _Member | None:
        """The best server with room for `units` now."""
        free = [m for m in self._members if self._limit(m) >= m.in_flight + units]
        if avoid is not None and len(free) > 1:
            free = [m for m in free if m is not avoid]
        if not free:
            return None
        rest = [m for m in self._members if m is not avoid or len(self._members) == 1]
        favourite = max(rest, key=lambda m: _weight(m, affinity))
        if favourite in free:
            return favourite
        return max(free, key=lambda m: (-m.in_flight, _weight(m, affinity)))

    def _limit(self, member: _Member) -> int:
        if member.state is ServerState.SUSPECT:
            return 0
        if member.state is ServerState.TRIAL:
            # A call larger than the trial's share may go when nothing else is in flight.
            return max(self._cap // 8, 1) if member.in_flight else self._cap
        return self._cap

    def _release(self, member: _Member, units: int) -> None:
        member.in_flight -= units
        self._serve_waiters()

    def _serve_waiters(self) -> None:
        """Give free places to those who wait, in their order."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.turn.done():
                member = self._pick(waiter.affinity, waiter.units, waiter.avoid)
                if member is None:
                    return
                member.in_flight += waiter.units
                waiter.turn.set_result(member)
            self._waiters.popleft()

    def _why_none(self) -> str:
        said = "; ".join(f"{m.engine.name}: {m.last_error or m.state}" for m in self._members)
        return f"no inference server was available for {self._wait_s:g} s ({said})"

    # How servers go out and come back.

    def _succeed(self, member: _Member, life: int) -> None:
        if life == member.life:
            member.failures = member.unusable = 0
            self._promote(member)

    def _eject(self, member: _Member, life: int, error: Exception) -> None:
        member.last_error = str(error)
        if life != member.life or member.state is ServerState.SUSPECT or self._closed:
            return
        member.life += 1
        member.failures += 1
        member.unusable = 0
        self._enter(member, ServerState.SUSPECT)
        asked_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        member.revival = asyncio.create_task(self._revive(member, asked_s))

    def _enter(self, member: _Member, state: ServerState) -> None:
        member.state = state
        if member.promotion is not None:
            member.promotion.cancel()
            member.promotion = None
        if any(m.state is not ServerState.SUSPECT for m in self._members):
            self._out_since_s = None
        elif self._out_since_s is None:
            self._out_since_s = time.monotonic()

    async def _revive(self, member: _Member, asked_s: float) -> None:
        """Wait, probe, and let `member` in again; over and over."""
        while True:
            ceiling_s = min(self._backoff_s * 2.0 ** min(member.failures, 30), self._max_backoff_s)
            pause_s = self._random.uniform(0.0, ceiling_s)
            await asyncio.sleep(max(pause_s, min(asked_s, self._max_backoff_s)))
            asked_s = 0.0
            said = await self._probe(member)
            if not said:
                break
            member.last_error = member.last_error or said
            member.failures += 1
        member.revival = None
        self._enter(member, ServerState.TRIAL)
        loop = asyncio.get_running_loop()
        member.promotion = loop.call_later(self._trial_s, self._promote, member)
        self._serve_waiters()

    def _promote(self, member: _Member) -> None:
        if member.state is ServerState.TRIAL:
            self._enter(member, ServerState.SERVING)
            self._serve_waiters()

    async def _probe(self, member: _Member) -> str:
        """Why `member` is not ready; "" if it is."""
        try:
            async with asyncio.timeout(self._probe_s):
                return "" if await member.engine.ready() else "not ready"
        except Exception as exc:  # noqa: BLE001 a probe that fails in any way is a no
            return f"not ready ({type(exc).__name__}: {exc})"


def _weight(member: _Member, affinity: str) -> bytes:
    """Rendezvous hashing: the server with the highest weight is the key's favourite.

    Thaler and Ravishankar, 1998. When a server goes, only its own keys move.
    """
    return blake2b(affinity.encode(), key=member.digest, digest_size=8).digest()
