"""2. claim: leases are taken only into free slots, and taken over from the dead.

- Slots are taken before the read that fills them, so nothing is prefetched: a prompt that waits is
  on the stream, where any other worker can take it.
- A blocking read is never cancelled (leases would be granted to a reply that nobody reads); to
  stop is to wait out one short block.
- Leases that nobody renews are taken over in the same loop, so an idle worker that holds all its
  slots for a read still has them for the prompts of the dead.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError

from rollfleet_common.clock import Clock
from rollfleet_common.errors import FailureKind
from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Claim
from rollfleet_common.redis import is_transient, retry, translate
from rollfleet_common.streams import Garbage, Streams
from rollfleet_common.text import printable
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings
from rollfleet_worker.slots import Slots

__all__ = ["Claimer"]

log = get_logger("rollfleet.worker")

#: One blocking read; the longest that a stop has to wait for it.
BLOCK_MS = 500
#: The same where not all streams can be read at once, or a suspect runs that others wait for.
TURN_MS = 50
#: Pause after Redis could not be reached, at most (full jitter).
AWAY_S = 1.0


class Claimer:
    """Claims for one partition.

    `spawn(claim)` begins an episode and owns one slot from then on; `refuse(claim, failure)` ends a
    lease without one; `gate()` returns once this worker may claim; `owns(claim)` tells whether it
    is alive here already; `paused()` whether the trainer asked for nothing new meanwhile.
    """

    def __init__(
        self,
        *,
        streams: Streams,
        leases: Leases,
        reader: Any,
        routes: Sequence[str],
        slots: Slots,
        settings: WorkerSettings,
        metrics: Metrics,
        gate: Callable[[], Awaitable[None]],
        spawn: Callable[[Claim], None],
        refuse: Callable[[Claim, AttemptFailure], None],
        owns: Callable[[Claim], bool],
        on_wait: Callable[[Exception, float], None],
        alone: bool,
        clock: Clock | None = None,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self.paused = paused
        self.clock = clock or Clock()
        self.streams = streams
        self.leases = leases
        self.reader = reader
        self.routes = list(routes)
        self.slots = slots
        self.settings = settings
        self.metrics = metrics
        self.gate = gate
        self.spawn = spawn
        self.refuse = refuse
        self.owns = owns
        self.on_wait = on_wait
        #: Whether this claimer reads one stream, and is the only one of its worker.
        self.alone = alone
        #: Slots taken that no episode has yet.
        self._spare = 0
        #: The last prompt taken that may be what killed its workers.
        self._suspect: Claim | None = None
        #: Whether others of the kind wait for its end.
        self._queue = False
        self._grouped = False
        self._next_reclaim = 0.0

    async def run(self, stopping: asyncio.Event) -> None:
        """Claim until `stopping` is set."""
        while not stopping.is_set():
            await self.gate()
            if stopping.is_set():
                return
            # Who reads the only stream there is blocks with all free slots. Of several streams and
            # partitions each blocks with one slot, and tops up when it has found work: slots that
            # wait at an empty stream are missing at a full one.
            most = self.slots.total if self.alone else len(self.routes)
            self._spare = await self.slots.take(1, most)
            try:
                await self._fill(stopping)
            except Exception as exc:  # noqa: BLE001 - what is not transient is raised again
                if not self._lost_groups(exc):
                    await self._away(exc)
            finally:
                self.slots.give(self._spare)
                self._spare = 0

    async def _fill(self, stopping: asyncio.Event) -> None:
        """Claim into the spare slots; what is spawned has its own from then on."""
        if not self._grouped:
            await self.streams.make_groups(self.routes)
            self._grouped = True
        had = self._spare
        if time.monotonic() >= self._next_reclaim or (self._queue and not self._suspected()):
            await self._reclaim()
            if not self._spare:
                # There may be more of the dead's, and these go ahead of what is fresh.
                self._next_reclaim = 0.0
        if not self._spare or stopping.is_set():
            return
        random.shuffle(self.routes)  # no route is always read first
        wait_ms = TURN_MS if self._queue else BLOCK_MS
        found = await self._look(wait_ms if self._spare == had else None)
        if found and not self.alone and not stopping.is_set():
            # Work is there: top up without waiting.
            self._spare += self.slots.try_take(self.slots.total)
            if self._spare:
                await self._read(found[: self._spare], None)

    async def _look(self, block_ms: int | None) -> list[str]:
        """Read all routes, and wait for the first prompt if there is none; the routes with work."""
        if len(self.routes) <= self._spare:
            return await self._read(self.routes, block_ms)
        # COUNT is per stream: with fewer slots than streams, these are read in turns.
        left = self.routes
        while left:
            part, left = left[: self._spare], left[self._spare :]
            if found := await self._read(part, None):
                return found
        if block_ms is None:
            return []
        return await self._read(self.routes[: self._spare], TURN_MS)

    async def _read(self, routes: Sequence[str], block_ms: int | None) -> list[str]:
        claims, garbage = await self.streams.claim(
            self.reader, self.leases.worker, routes, self._spare // len(routes), block_ms
        )
        if claims and self.paused():
            # The read was blocked when the pause began.
            await self._hand_back(claims)
            claims = []
        now_ms = self.clock.now_ms()
        for claim in claims:
            self.metrics.claimed.labels(claim.prompt.route).inc()
            self.metrics.queue_s.observe(max(now_ms - claim.queued_ms, 0) / 1000)
            self._begin(claim)
        for entry in garbage:
            await self._bury(entry)
        return list({claim.prompt.route for claim in claims})

    async def _hand_back(self, claims: Sequence[Claim]) -> None:
        """Give back what was just claimed, as if it never had been."""
        for route in {claim.prompt.route for claim in claims}:
            held = [(c.entry, c.prompt.group) for c in claims if c.prompt.route == route]
            # May be repeated: what is back already is no longer ours.
            await retry(
                lambda route=route, held=held: self.leases.hand_back(route, held),  # type: ignore[misc]
                what=f"hand back {len(held)} leases",
                deadline_s=None,
                on_wait=self.on_wait,
            )

    def _begin(self, claim: Claim) -> None:
        """The slot is the episode's from here on, whatever fails after it."""
        self._spare -= 1
        self.spawn(claim)

    async def _reclaim(self) -> None:
        lease_ms = int(self.settings.lease_s * 1000)
        self._next_reclaim = time.monotonic() + self.settings.lease_s / 3 * random.uniform(0.5, 1.5)
        poison = self.settings.attempts_poison
        garbage: list[Garbage] = []
        queue = False
        for route in self.routes:
            if not self._spare:
                break
            taken = await self.leases.reclaim(
                self.streams,
                route,
                lease_ms,
                self._spare,
                poison=poison,
                suspects=0 if self._suspected() else 1,
            )
            queue = queue or self.leases.passed_over > 0
            for claim, deliveries, owner in taken:
                if isinstance(claim, Garbage):
                    garbage.append(claim)
                elif self.owns(claim):
                    continue  # our own renewal was late; it runs here
                elif deliveries > poison:
                    detail = f"its worker died {deliveries - 1} times, last {owner}"
                    self.refuse(
                        claim, AttemptFailure(FailureKind.POISON, detail, self.leases.worker)
                    )
                else:
                    log.info(
                        "lease taken over",
                        group=claim.prompt.group,
                        index=claim.index,
                        deliveries=deliveries,
                        owner=owner,
                    )
                    self.metrics.reclaimed.inc()
                    if deliveries == poison:
                        self._suspect = claim
                    self._begin(claim)
        # The next one is taken when this one ends, whatever the clock says.
        self._queue = queue
        for entry in garbage:
            await self._bury(entry)

    def _suspected(self) -> bool:
        return self._suspect is not None and self.owns(self._suspect)

    async def _bury(self, garbage: Garbage) -> None:
        log.error("garbage on the prompts stream", entry=garbage.entry, why=printable(garbage.why))
        self.metrics.garbage.inc()
        await self.leases.quarantine(garbage)

    def _lost_groups(self, exc: Exception) -> bool:
        """Whether the streams were lost under us (flushed, failed over): make the groups anew."""
        text = str(exc)
        if isinstance(exc, ResponseError) and ("NOGROUP" in text or "UNBLOCKED" in text):
            log.warning("consumer groups are gone, making them anew", error=text)
            self._grouped = False
            return True
        return False

    async def _away(self, exc: Exception) -> None:
        if not is_transient(exc):
            raise translate(exc) if isinstance(exc, RedisError) else exc
        wait_s = random.uniform(0, AWAY_S)
        self.on_wait(exc, wait_s)
        await asyncio.sleep(wait_s)
