"""Servers that hold other weights than they should are found, and refitted while training goes on.

- Every few seconds each server is asked what it serves. Healed are: those that did not take the
  last version, those that were registered or came back since, those that lost their weights in a
  restart, and those that an earlier trainer left half-way.
- A server that merely stands still although nobody refits it is resumed.
- One that fails again and again is tried less and less often; one that cannot be reached costs a
  connection attempt.
- While a version is being published, nothing is healed.
"""

import asyncio
import time

from rollfleet.weight_sync.coordinator import Refits
from rollfleet_common.errors import RefitError
from rollfleet_common.logs import get_logger
from rollfleet_common.servers import RegisteredServer, ServerWeights, WeightState
from rollfleet_engines.control import RefitDriver, Weights

__all__ = ["Repairer"]

log = get_logger("rollfleet.trainer")

#: Longest time between two tries of a server that fails.
SELDOM_S = 60.0


class Repairer:
    """Keeps the servers of `refits` at its current weights."""

    def __init__(self, refits: Refits) -> None:
        self.refits = refits
        self._every_s = refits.settings.heal_s
        #: Per server that failed: how long to wait, and until when.
        self._patience: dict[str, tuple[float, float]] = {}

    async def run(self) -> None:
        """Heal for ever.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        while True:
            await asyncio.sleep(self._every_s)
            for url, task in list(self.refits.healing.items()):
                if task.done():
                    del self.refits.healing[url]
                    if not task.cancelled():
                        task.result()
            if not self.refits.busy and self.refits.current is not None:
                await self.look(self.refits.current)

    async def look(self, current: Weights) -> None:
        """Begin to care for every server that nobody is caring for.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        refits = self.refits
        known, rows = await refits.look()
        if refits.busy or refits.current is not current:
            return  # a publish began meanwhile
        await refits.forget(rows.keys() - known.keys())
        if refits.busy or refits.current is not current:
            return
        for url, server in known.items():
            task = refits.healing.get(url)
            cared_for = url in refits.resuming or (task is not None and not task.done())
            if server.draining or cared_for or self._waits(url):
                continue
            refits.healing[url] = asyncio.create_task(
                self._care(url, server, rows.get(url), current), name=f"rollfleet-heal-{url}"
            )

    async def _care(
        self, url: str, server: RegisteredServer, row: ServerWeights | None, current: Weights
    ) -> None:
        """Look after one server."""
        try:
            driver = await self.refits.drivers.find(server)
            why = await self._ails(driver, row, current)
        except RefitError as exc:
            # Its row stands: workers notice by themselves that it is away, and a server that comes
            # back with other weights is found then.
            self._failed(url, str(exc))
            return
        if not why:
            self._patience.pop(url, None)
        elif not current.path:
            await self._out(url, row, f"{why}; it waits for the next version")
        else:
            await self._heal(url, server, why, current)

    async def _ails(self, driver: RefitDriver, row: ServerWeights | None, current: Weights) -> str:
        """What is wrong with a server, or ""."""
        url = driver.url
        mirrored = self.refits.rows.get(url)
        if row is None and mirrored is not None and _serves(mirrored, current):
            await self.refits.tell([mirrored])  # Redis lost it, the server did not
            row = mirrored
        if row is None:
            return "it is new"
        if not _serves(row, current):
            return row.why or f"it holds version {row.version}"
        said = await driver.says()
        if said is not None and said != str(current.version):
            return f"it reports version {said!r}: was it restarted?"
        if await driver.is_paused():
            await self.refits.check()  # it may be paused by who superseded us
            log.warning("server resumed: nobody refits it", server=url)
            await driver.resume()
        self.refits.rows[url] = row
        return ""

    async def _heal(self, url: str, server: RegisteredServer, why: str, current: Weights) -> None:
        refits = self.refits
        log.info("refitting a server", server=url, version=current.version, why=why)
        await refits.begin([url])
        outcome = await refits.refit(server, current, _nothing)
        if outcome.why:
            self._failed(url, outcome.why)
        else:
            self._patience.pop(url, None)

    async def _out(self, url: str, row: ServerWeights | None, why: str) -> None:
        """Take a server out that cannot be healed now."""
        if row is None or row.state is not WeightState.STALE:
            log.warning("server is out", server=url, why=why)
            stale = ServerWeights(url, WeightState.STALE, self.refits.serves(url), why=why)
            await self.refits.tell([stale])

    def _waits(self, url: str) -> bool:
        return time.monotonic() < self._patience.get(url, (0.0, 0.0))[1]

    def _failed(self, url: str, why: str) -> None:
        before = self._patience.get(url)
        if before is None:
            log.warning("server cannot be looked after", server=url, why=why)
        wait_s = self._every_s if before is None else min(before[0] * 2, SELDOM_S)
        self._patience[url] = wait_s, time.monotonic() + wait_s


def _serves(row: ServerWeights, current: Weights) -> bool:
    return row.state is WeightState.SERVING and row.version == current.version


async def _nothing() -> None:
    """The version is on the board already."""
