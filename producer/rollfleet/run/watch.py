"""What a trainer looks at now and then: does anything vanish, fail in a row, or come from the future?

- It also gathers the evidence for why no batch comes (:mod:`rollfleet.state.causes`): bounded reads, and one
  that Redis refuses is named instead of raised.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from rollfleet.line import Line
from rollfleet.run.reconcile import Reconciler
from rollfleet.state.causes import CardServer, Evidence, WorkerSeen, future
from rollfleet.submit.breaker import Breaker, failure_text
from rollfleet_common.errors import BrokerSetupError, FailingError
from rollfleet_common.keys import PartitionKeys, RunKeys
from rollfleet_common.ledger import Books
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Kind, Tombstone
from rollfleet_common.streams import Streams
from rollfleet_common.text import parse_json

__all__ = ["Watch", "newest_failure", "read_workers", "served_by_all"]

log = get_logger("rollfleet.trainer")

#: Leases that every server must have served a later version for.
FUTURE_LEASES = 2


class Watch:
    """Watches over one trainer's run.

    `version()` is the trainer's; `moving()` says whether weights are being moved at this moment.
    """

    def __init__(
        self,
        *,
        client: Any,
        keys: RunKeys,
        streams: Sequence[Streams],
        lease_s: float,
        books: Callable[[], Awaitable[Books]],
        reconciler: Reconciler,
        breaker: Breaker,
        line: Line,
        version: Callable[[], int],
        moving: Callable[[], bool],
    ) -> None:
        self.client = client
        self.keys = keys
        self.streams = streams
        self.lease_s = lease_s
        self.books = books
        self.reconciler = reconciler
        self.breaker = breaker
        self.line = line
        self.version = version
        self.moving = moving
        #: The trainer moves weights by itself: a server's version is its own affair.
        self.by_itself = False
        #: When the books stopped to balance, if they do not.
        self._unbalanced_at: float | None = None
        self._mended_at = float("-inf")
        self._suspects: frozenset[str] = frozenset()
        self.unheld = False
        #: What all servers serve, if it is later than the trainer's version, and since when.
        self.future: int | None = None
        self._future_at = 0.0
        self._warned = False

    @property
    def unbalanced_s(self) -> float:
        """Seconds since the books stopped to balance; 0.0 if they do."""
        return 0.0 if self._unbalanced_at is None else time.monotonic() - self._unbalanced_at

    @property
    def _now_s(self) -> float:
        """Of Redis's clock: what workers and entries tell was told by it."""
        return self.line.clock.now_ms() / 1000

    async def run(self) -> None:
        """Look until cancelled.

        Raises:
            FailingError: What is fed can only fail.
            SupersededError: Another trainer has opened the run.
        """
        while True:
            await asyncio.sleep(self.lease_s / 3)
            await self._allowed("look for samples that vanished", self.places)
            await self._allowed("read the workers' cards", self.versions)

    async def _allowed(self, what: str, look: Callable[[], Awaitable[None]]) -> None:
        """Await `look()`; that the ACL forbids it is told once and no failure."""
        try:
            await self.line(look, what)
        except (ResponseError, BrokerSetupError) as exc:
            if not self._warned:
                log.warning("the trainer's rights are too few", what=what, error=str(exc))
            self._warned = True

    async def places(self) -> None:
        """Reconcile what is in no place, once that lasted for a lease."""
        books = await self.books()
        now = time.monotonic()
        if not books.balance:
            self._unbalanced_at = None
        elif self._unbalanced_at is None:
            self._unbalanced_at = now
        suspects = await self.reconciler.suspects()
        self.unheld, self._suspects = bool(suspects & self._suspects), suspects
        lost = self.unbalanced_s > self.lease_s and books.balance
        if not (lost or self.unheld) or now < self._mended_at + self.lease_s:
            return
        self._mended_at = now
        if lost and books.balance < 0:
            await self.reconciler.strays()
        else:
            again, closed = await self.reconciler.mend(strangers=False)
            if not (again or closed):
                await self.reconciler.mend(strangers=True)

    async def versions(self) -> None:
        """Stop if every server has served a later version than the trainer's for two leases.

        Raises:
            FailingError: Everything that they make is dropped, for ever.
        """
        served = served_by_all(await read_workers(self.client, self.keys, self._now_s))
        now, version = time.monotonic(), self.version()
        if served is None or served <= version or self.moving():
            self.future = None
            return
        if self.future is None:
            self._future_at = now
        self.future = served
        if now < self._future_at + FUTURE_LEASES * self.lease_s:
            return
        said = str(future(served, version))
        if not self.by_itself:
            raise FailingError(f"the feed was stopped: {said}")
        log.warning(said)
        self._future_at = now

    async def evidence(self, found: Evidence) -> Evidence:
        """Add to `found` what only Redis knows."""
        found.unbalanced_s, found.unheld, found.future = self.unbalanced_s, self.unheld, self.future
        found.deaths_in_a_row, found.torn_in_a_row = self.breaker.deaths, self.breaker.torn
        found.newest = self.breaker.newest
        unread: list[str] = []
        found.workers = None
        for what, read in (
            ("the workers' cards", self._workers),
            ("the memory of Redis", self._memory),
            ("the pause", self._pause),
            ("the routes", self._routes),
            ("the newest failure", self._newest),
        ):
            try:
                await read(found)
            except ResponseError as exc:
                unread.append(f"{what} could not be read ({exc})")
        found.unread = unread
        return found

    async def _workers(self, found: Evidence) -> None:
        found.workers = await read_workers(self.client, self.keys, self._now_s)
        if found.future is None:
            served = served_by_all(found.workers)
            later = served is not None and served > found.version and not self.moving()
            found.future = served if later else None

    async def _memory(self, found: Evidence) -> None:
        info = await self.client.info("memory")
        found.used_bytes = int(info.get("used_memory", 0))
        found.max_bytes = int(info.get("maxmemory", 0))

    async def _pause(self, found: Evidence) -> None:
        until = (await self.client.hmget(self.keys.board, ["paused_until_ms"]))[0]
        found.paused_s = max(0.0, int(until or 0) / 1000 - self._now_s)

    async def _routes(self, found: Evidence) -> None:
        """Which routes wait, and since when the oldest sample is in flight."""
        found.routes = {route: n for route, n in found.books.waiting_by_route.items() if n > 0}
        for here in self.streams:
            for route in found.books.waiting_by_route:
                try:
                    pending = await self.client.xpending(here.keys.prompts(route), "workers")
                except ResponseError as exc:
                    if "NOGROUP" in str(exc) or "no such key" in str(exc):
                        continue
                    raise
                if pending["pending"]:
                    sent_s = int(pending["min"].partition(b"-")[0]) / 1000
                    found.oldest_flight_s = max(found.oldest_flight_s, self._now_s - sent_s)

    async def _newest(self, found: Evidence) -> None:
        """Of the newest dead letter, if the trainer has not heard of one itself."""
        found.newest = found.newest or await newest_failure(
            self.client, [here.keys for here in self.streams]
        )


async def newest_failure(client: Any, partitions: Sequence[PartitionKeys]) -> str:
    """What ended the newest dead letter, in words; "" if there is none. One entry a partition is read."""
    newest, said = (0, 0), ""
    for keys in partitions:
        for raw, fields in await client.xrevrange(keys.dead, count=1):
            millis, _, seq = raw.decode().partition("-")
            if (at := (int(millis), int(seq))) > newest:
                history = fields.get(b"e", b"").decode("utf-8", "replace")
                newest, said = at, _failure(history)
    return said


def served_by_all(workers: Sequence[WorkerSeen]) -> int | None:
    """The least version that any serving server says it serves; None if one does not say."""
    serving = [
        server
        for worker in workers
        if not worker.lost
        for server in worker.servers
        if server.state == "serving"
    ]
    versions = [server.version for server in serving if server.version is not None]
    return min(versions) if versions and len(versions) == len(serving) else None


async def read_workers(client: Any, keys: RunKeys, now_s: float) -> list[WorkerSeen]:
    """Cards of the workers, at this time of Redis's clock; one that cannot be read counts as no worker."""
    found: list[WorkerSeen] = []
    for raw_id, text in (await client.hgetall(keys.workers)).items():
        try:
            card = parse_json(text)
            servers = tuple(
                CardServer(
                    name=str(s.get("name", "?")),
                    state=str(s.get("state", "?")),
                    in_flight=int(s.get("in_flight") or 0),
                    version=None if s.get("version") is None else int(s["version"]),
                    why=str(s.get("why") or s.get("error") or "")[:300],
                )
                for s in card.get("servers", ())
            )
            found.append(
                WorkerSeen(
                    id=raw_id.decode("utf-8", "replace"),
                    state=str(card.get("state", "?")),
                    seen_s=max(0.0, now_s - int(card.get("seen_ms", 0)) / 1000),
                    slots=int(card.get("slots", 0)),
                    busy=int(card.get("busy", 0)),
                    routes=tuple(map(str, card.get("routes", ()))),
                    servers=servers,
                )
            )
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue
    return found


def _failure(history: str) -> str:
    last = history.rpartition("\n")[2]
    return failure_text(Tombstone("", 0, 1, Kind.TRAIN, "", "dead", last))
