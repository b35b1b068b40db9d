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

import structlog
from redis.exceptions import ResponseError

from rollfleet_common.errors import FailureKind
from rollfleet_common.leases import Failure, Leases
from rollfleet_common.messages import Claim
from rollfleet_common.redis import is_transient
from rollfleet_common.streams import Garbage, Streams
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings
from rollfleet_worker.slots import Slots

__all__ = ["Claimer"]

log = structlog.get_logger("rollfleet.worker")

#: One blocking read; the longest that a stop has to wait for it.
BLOCK_MS = 500
#: Pause after Redis could not be reached, at most (full jitter).
AWAY_S = 1.0


class Claimer:
    """Claims for one partition.

    `spawn(claim)` begins an episode and owns one slot from then on; `refuse(claim, failure)` ends a
    lease without one; `gate()` returns once this worker may claim; `owns(entry)` tells whether an
    entry is alive here already.
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
        refuse: Callable[[Claim, Failure], None],
        owns: Callable[[str], bool],
        on_wait: Callable[[Exception, float], None],
    ) -> None:
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
        self._grouped = False
        self._next_reclaim = 0.0

    async def run(self, stopping: asyncio.Event) -> None:
        """Claim until `stopping` is set."""
        while not stopping.is_set():
            await self.gate()
            if stopping.is_set():
                return
            # Several streams are read with COUNT 1 each, one stream with all that is free.
            width = len(self.routes)
            taken = await self.slots.take(width, self.slots.total if width == 1 else width)
            used = 0
            try:
                used = await self._fill(taken, stopping)
            except Exception as exc:  # noqa: BLE001 - what is not transient is raised again
                if not self._lost_groups(exc):
                    await self._away(exc)
            finally:
                self.slots.give(taken - used)

    async def _fill(self, free: int, stopping: asyncio.Event) -> int:
        """Claim into `free` slots; returns how many were used."""
        if not self._grouped:
            await self.streams.make_groups(self.routes)
            self._grouped = True
        used = await self._reclaim(free) if time.monotonic() >= self._next_reclaim else 0
        if used == free or stopping.is_set():
            return used
        width = len(self.routes)
        random.shuffle(self.routes)  # no route is always read first
        count = free - used if width == 1 else 1
        used += await self._read(count, BLOCK_MS if not used else None)
        if width > 1 and used and (more := self.slots.try_take(self.slots.total)):
            # Work is there: top up without waiting.
            got = await self._read(max(more // width, 1), None) if more >= width else 0
            self.slots.give(more - got)
        return used

    async def _read(self, count: int, block_ms: int | None) -> int:
        claims, garbage = await self.streams.claim(
            self.reader, self.leases.worker, self.routes, count, block_ms
        )
        for entry in garbage:
            await self._bury(entry)
        now_ms = time.time() * 1000
        for claim in claims:
            self.metrics.claimed.labels(claim.prompt.route).inc()
            self.metrics.queue_s.observe(max(now_ms - claim.queued_ms, 0) / 1000)
            self.spawn(claim)
        return len(claims)

    async def _reclaim(self, free: int) -> int:
        lease_ms = int(self.settings.lease_s * 1000)
        self._next_reclaim = time.monotonic() + self.settings.lease_s / 3 * random.uniform(0.5, 1.5)
        used = 0
        for route in self.routes:
            if used >= free:
                break
            taken = await self.leases.reclaim(self.streams, route, lease_ms, free - used)
            for claim, deliveries, owner in taken:
                if isinstance(claim, Garbage):
                    await self._bury(claim)
                elif self.owns(claim.entry):
                    continue  # our own renewal was late; it runs here
                elif deliveries > self.settings.attempts_poison:
                    detail = f"its worker died {deliveries - 1} times, last {owner}"
                    self.refuse(claim, Failure(FailureKind.POISON, detail, self.leases.worker))
                else:
                    log.info(
                        "lease taken over",
                        group=claim.prompt.group,
                        index=claim.index,
                        deliveries=deliveries,
                        owner=owner,
                    )
                    self.metrics.reclaimed.inc()
                    self.spawn(claim)
                    used += 1
        return used

    async def _bury(self, garbage: Garbage) -> None:
        log.error("garbage on the prompts stream", entry=garbage.entry, why=garbage.why)
        self.metrics.garbage.inc()
        await self.leases.bury(garbage)

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
            raise exc
        wait_s = random.uniform(0, AWAY_S)
        self.on_wait(exc, wait_s)
        await asyncio.sleep(wait_s)
