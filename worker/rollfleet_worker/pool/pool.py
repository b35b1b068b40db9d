"""Many inference servers as one engine: added and removed at run time, capped, and without the bad ones.

- Which servers there are: those it was made with, and those that are registered; `server_states.py` draws
  how each of them moves, `routing.py` says who gets which, `breaker.py` how they go out and come back.
- A request carries the version that the fleet last refitted its server to (`Request.serves`); a server
  that turns out to hold older weights is out until the trainer writes of it again.
- A call that fails goes to another server, a few times; one on a server that hangs, too.
- How much a server gets follows its own signals, between a floor and `per_server_cap`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rollfleet_common.clock import Clock
from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    SettingsError,
    StaleServerError,
)
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.servers import RegisteredServer, ServerWeights, server_name
from rollfleet_engines.interface import (
    Generation,
    NamedEngine,
    Request,
    Sampling,
    TextAnswer,
)
from rollfleet_engines.signals import Monitor
from rollfleet_worker.pool.breaker import Breaker, BreakerSettings
from rollfleet_worker.pool.eligibility import Eligibility, eligibility_of, router_stand
from rollfleet_worker.pool.limiter import Limiter
from rollfleet_worker.pool.members import PooledServer, ServerStatus
from rollfleet_worker.pool.routing import Router, Wanted
from rollfleet_worker.pool.server_states import COMING, Event, ServerState
from rollfleet_worker.pool.watch import Watching, watch

__all__ = ["EnginePool", "NamedEngine", "ServerState", "ServerStatus"]

log = get_logger("rollfleet.worker")

T = TypeVar("T")


class EnginePool:
    """Engines behind one engine.

    Args:
        engines: The servers that stay; their names must differ. Closed with the pool.
        per_server_cap: Completions in flight on one server at most; a call with n counts n.
        make: Makes the client of a registered server from its URL and engine; None: only
            `engines`.
        monitor: Makes the side door of a server from its name; None: servers are not watched, and
            limits stay at the cap.
        adaptive: Whether limits follow what servers say of themselves.
        lump: Completions that one call asks for, at most: no limit is below it.
        stall_s: After so long without progress a server hangs; 0.0: never.
        poll_s: Between two looks at a busy server.
        tries: How many times one call is made, each on the best server at hand.
        wait_s: How long a call waits while every server is out, before it fails.
        unusable_limit: How many unusable answers in a row put a server out.
        patience: Of probes, pauses and trials.
        disagreed: Told of every server that was found to hold other weights than it should.
        clock: What rows of weights are dated by.
        seed: Of the jitter, for tests.

    Raises:
        SettingsError: No engine, equal names, or a setting that makes no sense.
    """

    def __init__(
        self,
        engines: Sequence[NamedEngine],
        per_server_cap: int = 256,
        *,
        make: Callable[[str, str], NamedEngine] | None = None,
        monitor: Callable[[str], Monitor] | None = None,
        adaptive: bool = True,
        lump: int = 1,
        stall_s: float = 60.0,
        poll_s: float = 1.0,
        tries: int = 3,
        wait_s: float = 30.0,
        unusable_limit: int = 3,
        patience: BreakerSettings | None = None,
        disagreed: Callable[[], None] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        patience = patience or BreakerSettings()
        self._clock = clock or Clock()
        names = [engine.name for engine in engines]
        if not (names or make) or len(set(names)) < len(names):
            raise SettingsError(f"a pool needs servers with different names, got {names}")
        if min(per_server_cap, lump, tries, unusable_limit) < 1:
            raise SettingsError("per_server_cap, lump, tries and unusable_limit must be at least 1")
        if not 0.0 < patience.backoff_s <= patience.max_backoff_s:
            raise SettingsError(
                f"backoff_s {patience.backoff_s} must be within 0 .. {patience.max_backoff_s}"
            )
        self._cap = per_server_cap
        self._make = make
        self._monitor = monitor
        self._adaptive = adaptive
        self._lump = lump
        self._tries = tries
        self._unusable_limit = unusable_limit
        self._disagreed = disagreed
        self._members: dict[str, PooledServer] = {}
        #: Removed, and not idle yet.
        self._leaving: set[PooledServer] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._weights: Mapping[str, ServerWeights] = {}
        self._policy = PolicyVersion(NO_VERSION, 0)
        self._read_ms: float | None = None
        self._router = Router(self._members, wait_s, self._bury)
        self._breaker = Breaker(patience, self._router.changed, self._left, seed)
        self._watching = Watching(
            poll_s, stall_s, self._breaker.probe, self._router.serve, self._stalled
        )
        #: Whether anybody ever asked for a generation: then to have no server is a want.
        self.asked = False
        for engine in engines:
            self._add(engine)
        self._router.changed()

    # ---- which servers -----------------------------------------------------------------------

    def states(self) -> list[ServerStatus]:
        """How every server stands, in the order in which they came."""
        return [member.status() for member in self._members.values()]

    @property
    def version(self) -> int:
        """The board's version, as it was last told."""
        return self._policy.version

    @property
    def merges(self) -> bool:
        """Whether completions of one prompt are worth asking for in one request.

        Not where a server would be asked for them one by one: then each stands for itself, and is
        tried again on its own.
        """
        return all(getattr(m.engine, "merges", True) for m in self._members.values())

    @property
    def out(self) -> bool:
        """Whether no server is in, or will be in a moment."""
        return not any(m.state in COMING for m in self._members.values())

    def apply(
        self,
        servers: Mapping[str, RegisteredServer],
        weights: Mapping[str, ServerWeights],
        policy: PolicyVersion,
        read_ms: float | None = None,
    ) -> None:
        """Take in the registry, what the trainer wrote of weights, and the board; idempotent.

        `read_ms` says when they were asked for, in Unix milliseconds by Redis's clock; None: now.
        """
        self._weights = {server_name(url): row for url, row in weights.items()}
        self._policy = policy
        self._read_ms = self._clock.now_ms() if read_ms is None else read_ms
        for name, server in servers.items():
            self._register(name, server)
        for name, member in list(self._members.items()):
            if name not in servers and not member.static:
                self._breaker.move(member, Event.REMOVE)
            elif name not in servers or not servers[name].draining:
                self._breaker.move(member, Event.UNDRAIN)
            else:
                self._breaker.move(member, Event.DRAIN)
        for name, member in self._members.items():
            member.behind = servers[name].behind if name in servers else ()
        for member in list(self._members.values()):
            self._restand(member)

    def _register(self, name: str, server: RegisteredServer) -> None:
        member = self._members.get(name)
        if member is not None and not member.static and member.kind != server.engine:
            self._breaker.move(member, Event.REMOVE)
            member = None
        if member is None and self._make is not None and not self._breaker.closed:
            try:
                self._add(self._make(server.url, server.engine), static=False, kind=server.engine)
            except SettingsError as exc:
                log.warning("a registered server cannot be used", server=name, error=str(exc))

    def _add(self, engine: NamedEngine, *, static: bool = True, kind: str = "auto") -> None:
        monitor = None if self._monitor is None else self._monitor(engine.name)
        limiter = Limiter(self._cap, lump=self._lump, adaptive=self._adaptive)
        self._members[engine.name] = PooledServer(engine, limiter, monitor, static, kind)

    def _left(self, member: PooledServer) -> None:
        """A server was removed: it goes when it is idle, and may hang until then."""
        del self._members[member.name]
        member.timers(watched=True)
        self._leaving.add(member)
        self._bury(member)

    def _bury(self, member: PooledServer) -> None:
        if member in self._leaving and not member.in_flight:
            self._leaving.discard(member)
            member.timers()
            task = asyncio.create_task(_close(member))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # ---- what they may serve -----------------------------------------------------------------

    def _restand(self, member: PooledServer) -> None:
        """Judge `member` by the newest that is known."""
        if member.recheck is not None:
            member.recheck.cancel()
            member.recheck = None
        now_ms = self._clock.now_ms()
        # A server that was just registered waits for its first weights, also if it is the first.
        gated = bool(self._weights) or (self._policy.refits and not member.static)
        # Redis lost the rows, the trainer writes them again: who was out stays out until then.
        lost = not self._weights and self._policy.refits and member.stand.event is not Event.CURRENT

        def judged(name: str) -> Eligibility:
            return eligibility_of(
                member.stand.row if lost else self._weights.get(name),
                gated=gated or lost,
                policy=self._policy,
                now_ms=now_ms,
                read_ms=self._read_ms,
                belied=member.belied,
                belied_by=member.belied_by,
            )

        if member.behind and not lost:
            stand = router_stand({url: judged(url) for url in member.behind})
        else:
            stand = judged(member.name)
        member.stand = stand
        if stand.event is Event.REFIT and stand.row is not None:
            # The follower may be cut off from Redis when the refit's time is over.
            left_s = max(stand.row.until_ms - now_ms, 0.0) / 1000 + 0.001
            loop = asyncio.get_running_loop()
            member.recheck = loop.call_later(left_s, self._restand, member)
        self._breaker.restand(member)

    def _belie(
        self, member: PooledServer, row: ServerWeights | None, life: int, error: StaleServerError
    ) -> None:
        """`member` does not hold the weights that `row` says."""
        if self._disagreed is not None:
            self._disagreed()
        if row is None or member.behind:
            # Which of those behind a router it was, only the trainer can find out.
            self._breaker.eject(member, life, error)
        elif row == self._weights.get(member.name):
            member.belied, member.belied_by = row, str(error)
            member.last_error = str(error)
            self._restand(member)

    # ---- calls -------------------------------------------------------------------------------

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` completions on one server, and on another one if that fails; see `Engine`.

        Raises:
            EngineUnavailableError: `tries` servers failed, or none came back within `wait_s`.
            EngineProtocolError: A server answered something unusable; not tried again here.
            EngineRefusedError: A server refused the request itself; not tried again.
        """

        async def ask(member: PooledServer) -> Sequence[Generation]:
            serves, model = member.stand.serves, member.stand.model
            if (serves, model) == (request.serves, request.model):
                return await member.engine.generate(request, n)
            mine = replace(request, serves=serves, model=model)
            return await member.engine.generate(mine, n)

        return await self._served(
            request.affinity, min(n, self._cap), ask, not_before=request.not_before
        )

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        affinity: str = "",
    ) -> TextAnswer:
        """What a server's model says next; chosen, gated and tried again like a generation.

        Raises:
            EngineUnavailableError, EngineProtocolError, EngineRefusedError: As `generate`; refused,
                too, by a server whose client has no text face.
        """

        async def ask(member: PooledServer) -> TextAnswer:
            chat = getattr(member.engine, "chat", None)
            if chat is None:
                raise EngineRefusedError(f"the client of {member.name} has no chat")
            answer: TextAnswer = await chat(messages, sampling)
            return answer

        return await self._served(affinity, 1, ask)

    async def _served(
        self,
        affinity: str,
        units: int,
        ask: Callable[[PooledServer], Awaitable[T]],
        *,
        not_before: int = NO_VERSION,
    ) -> T:
        failed: PooledServer | None = None
        for left in reversed(range(self._tries)):
            member = await self._acquire(Wanted(affinity, units, failed, not_before))
            life, row = member.life, member.stand.row
            try:
                made = await self._call(member, ask)
            except StaleServerError as exc:
                log.warning(
                    "a server holds other weights than it should",
                    server=member.name,
                    serves=exc.serves,
                    found=exc.found,
                    group=affinity,
                )
                self._belie(member, row, life, exc)
                if not left:
                    raise
                failed = member
            except EngineUnavailableError as exc:
                self._breaker.eject(member, life, exc)
                if not left:
                    raise
                failed = member
            except EngineRefusedError as exc:
                exc.server = member.name
                raise
            except EngineProtocolError as exc:
                member.unusable += 1
                member.last_error = str(exc)
                if member.unusable >= self._unusable_limit:
                    self._breaker.eject(member, life, exc)
                raise
            else:
                self._breaker.succeed(member, life)
                return made
            finally:
                self._router.release(member, units)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _acquire(self, wanted: Wanted) -> PooledServer:
        if self._breaker.closed:
            raise EngineUnavailableError("the server pool is closed")
        if not self.asked:
            # Nobody may ever tell of a registry: then the first call begins it.
            self.asked = True
            for member in self._members.values():
                self._breaker.restand(member)
        member = await self._router.acquire(wanted)
        if member.watcher is None and member.monitor is not None:
            member.watcher = asyncio.create_task(watch(member, self._watching))
        return member

    async def _call(self, member: PooledServer, ask: Callable[[PooledServer], Awaitable[T]]) -> T:
        """One try; ended from outside if the server hangs."""
        deadline = asyncio.timeout(None)
        try:
            async with deadline:
                member.calls.add(deadline)
                try:
                    return await ask(member)
                finally:
                    member.calls.discard(deadline)
        except TimeoutError as exc:
            if not deadline.expired():
                raise
            raise EngineUnavailableError(member.last_error) from exc

    def _stalled(self, member: PooledServer, error: EngineUnavailableError) -> None:
        """Put a server out that hangs, and send what it holds elsewhere."""
        log.warning("a server hangs", server=member.name, error=str(error))
        member.hung = True
        self._breaker.eject(member, member.life, error)
        now_s = asyncio.get_running_loop().time()
        for deadline in tuple(member.calls):
            if not deadline.expired():
                deadline.reschedule(now_s)

    # ---- its own life ------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Whether at least one server answers now."""
        probes = [asyncio.ensure_future(self._breaker.probe(m)) for m in self._members.values()]
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
        """Stop looking, fail those who wait, and close every engine. Idempotent."""
        self._breaker.closed = True
        self._router.close(EngineUnavailableError("the server pool was closed"))
        members = [*self._members.values(), *self._leaving]
        self._leaving.clear()
        ending = [task for member in members for task in member.timers()]
        await asyncio.gather(*ending, *self._closing, return_exceptions=True)
        for member in members:
            await _close(member)


async def _close(member: PooledServer) -> None:
    await member.engine.close()
    if member.monitor is not None:
        await member.monitor.close()
