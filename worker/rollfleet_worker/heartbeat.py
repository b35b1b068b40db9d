"""The heartbeat: leases renewed, delayed prompts promoted, this worker's card kept on the board.

- Leases are renewed five times a lease, all of a route in one call, through the drain and through
  every reconnect: a single missed beat never costs a lease.
- The renewal is also the cancel channel: a lease that is no longer ours (stolen, or cancelled by
  the trainer) is a reason to stop its episode.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollfleet_common.clock import Clock
from rollfleet_common.keys import RunKeys
from rollfleet_common.leases import Leases
from rollfleet_common.logs import get_logger
from rollfleet_common.redis import is_transient
from rollfleet_common.text import json_int, parse_json
from rollfleet_worker.metrics import Metrics

__all__ = ["Heartbeat"]

log = get_logger("rollfleet.worker")

BEATS_PER_LEASE = 5
#: Seconds between two looks at the delayed prompts when none is due sooner.
PROMOTE_S = 1.0
#: Seconds between two writings of the card.
CARD_S = 5.0
#: The registry of a run that nobody touches any more goes away.
REGISTRY_TTL_S = 86_400
#: A consumer that holds nothing and was idle for so long is forgotten, and so is its card.
GONE_S = 3600.0


class Heartbeat:
    """All that a worker does on a clock.

    `active()` gives (partition, route, entries) of all leases; `lost(partition, route, entry)` is
    told of each that is no longer ours; `card()` describes the worker.
    """

    def __init__(
        self,
        *,
        client: Any,
        keys: RunKeys,
        leases: Sequence[Leases],
        routes: Sequence[str],
        lease_s: float,
        metrics: Metrics,
        active: Callable[[], Mapping[tuple[int, str], Sequence[str]]],
        lost: Callable[[int, str, str], None],
        card: Callable[[], Mapping[str, Any]],
        on_wait: Callable[[Exception, float], None],
        clock: Clock,
    ) -> None:
        self.clock = clock
        self.client = client
        self.keys = keys
        self.leases = leases
        self.routes = routes
        self.lease_s = lease_s
        self.metrics = metrics
        self.active = active
        self.lost = lost
        self.card = card
        self.on_wait = on_wait

    async def renew(self) -> None:
        """Renew leases until cancelled."""
        beat_s = self.lease_s / BEATS_PER_LEASE
        while True:
            await asyncio.sleep(beat_s)
            await self._try(self._renew_once)

    async def promote(self) -> None:
        """Put delayed prompts back when they are due, until cancelled."""
        while True:
            wait_s = await self._try(self._promote_once) or PROMOTE_S
            # Jitter, so that a hundred workers do not ask in step.
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))

    async def show(self) -> None:
        """Keep the card up to date, and the registry free of the long gone, until cancelled."""
        swept = time.monotonic()
        while True:
            await self._try(self.show_once)
            if time.monotonic() - swept > 60:
                swept = time.monotonic()
                await self._try(self._sweep)
            await asyncio.sleep(CARD_S * random.uniform(0.8, 1.2))

    async def show_once(self) -> None:
        """Write the card now."""
        card = self.card()
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.hset(self.keys.workers, card["id"], json.dumps(card))
            pipe.expire(self.keys.workers, REGISTRY_TTL_S)
            await pipe.execute()

    async def take_down(self, worker: str) -> None:
        """Remove the card: this worker has drained."""
        await self.client.hdel(self.keys.workers, worker)

    async def _renew_once(self) -> None:
        for (partition, route), entries in self.active().items():
            for entry in await self.leases[partition].renew(route, entries):
                self.metrics.lost.inc()
                self.lost(partition, route, entry)

    async def _promote_once(self) -> float:
        soonest = PROMOTE_S
        for leases in self.leases:
            for route in self.routes:
                _, wait_ms = await leases.promote(route)
                if wait_ms >= 0:
                    soonest = min(soonest, max(wait_ms / 1000, 0.02))
        return soonest

    async def _sweep(self) -> None:
        for leases in self.leases:
            for route in self.routes:
                await leases.reap(route, int(GONE_S * 1000))
        cards = await self.client.hgetall(self.keys.workers)
        long_ago = self.clock.now_ms() - GONE_S * 1000
        if gone := [w for w, card in cards.items() if _seen_ms(card) < long_ago]:
            await self.client.hdel(self.keys.workers, *gone)

    async def _try(self, step: Callable[[], Any]) -> Any:
        """One step; a Redis that is away is noted and waited out by the next beat."""
        try:
            return await step()
        except Exception as exc:
            if not is_transient(exc):
                log.exception("a beat failed", step=step.__name__)
            self.on_wait(exc, 0.0)
            return None


def _seen_ms(card: bytes) -> float:
    """When a card was written; one that cannot be read is as good as gone."""
    try:
        return float(json_int(parse_json(card)["seen_ms"]))
    except (ValueError, KeyError, TypeError):
        return 0.0
