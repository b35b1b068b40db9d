"""The servers of a run get a version: which they are, in which order, and what is written of them.

- Servers are those of the setting `servers` and those registered while the run goes on; none that
  drains.
- A server's row is written before it is touched, with the time by which it must be over, and again
  the moment it serves: workers use each as soon as it is ready.
- The board names the new version when the first server holds it and before it generates with it, so
  that no token is of a version that nobody knows. One that fails is out, and the others go on.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from rollfleet.line import Line
from rollfleet.settings import TrainerSettings
from rollfleet.weight_sync.update import (
    GRACE_S,
    Announce,
    Load,
    Meeting,
    Once,
    Refit,
    UpdateOutcome,
)
from rollfleet_common.errors import RefitError
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION
from rollfleet_common.servers import (
    RegisteredServer,
    Servers,
    ServerWeights,
    WeightState,
    server_name,
)
from rollfleet_common.tasks import cancel_all
from rollfleet_engines.control import Drivers, PauseMode, RefitDriver, Weights

__all__ = ["Refits"]

log = get_logger("rollfleet.trainer")

#: Weights that broke so many servers, and that none took, are given to no further wave.
BROKEN = 2


class Refits:
    """The refits of one trainer.

    Args:
        settings: Of the trainer.
        servers: The registry of the run.
        token: Of the trainer.
        epoch: The trainer's epoch now.
        line: To Redis.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        servers: Servers,
        token: str,
        epoch: Callable[[], int],
        line: Line,
    ) -> None:
        self.settings = settings
        self.servers = servers
        self.token = token
        self.epoch = epoch
        self.line = line
        secret = settings.api_key
        self.drivers = Drivers(None if secret is None else secret.get_secret_value())
        #: What every server should serve; None while that is the business of others.
        self.current: Weights | None = None
        #: What was last written of each server.
        self.rows: dict[str, ServerWeights] = {}
        #: Whether a version is being published: the healer keeps its hands off.
        self.busy = False
        self.healing: dict[str, asyncio.Task[None]] = {}
        #: Servers that are being resumed, also when the task that refitted them is gone.
        self.resuming: dict[str, asyncio.Task[str]] = {}
        self._turn = asyncio.Lock()

    async def open(self, weights: Weights) -> None:
        """Go on with what an earlier trainer did: servers that it refitted are ours to heal.

        Args:
            weights: Of the version that the run is at; without a path, nothing can be healed until
                the next publish.
        """
        _, self.rows = await self.look()
        if self.rows and weights.path:
            self.current = weights

    # ---- which servers -----------------------------------------------------------------------

    async def look(self) -> tuple[dict[str, RegisteredServer], dict[str, ServerWeights]]:
        """The servers of the run, also those that drain, and their rows in Redis, by URL.

        A router is not among them, but the servers behind it are.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        registered, rows = await self.line(self.servers.read, "read the registered servers")
        static = {server_name(url): RegisteredServer(url) for url in self.settings.servers}
        known = static | registered
        for url, router in registered.items():
            if router.behind:
                del known[url]
        behind = (one for router in registered.values() for one in router.behind)
        return {one: RegisteredServer(one) for one in behind} | known, rows

    # ---- rows --------------------------------------------------------------------------------

    async def tell(self, rows: Iterable[ServerWeights]) -> None:
        """Write rows, dated now and of this epoch.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        undated = list(rows)

        async def write() -> None:
            # Of the try that succeeds: Redis may be away for longer than a refit lasts.
            now_ms = int(self.line.clock.now_ms())
            until = now_ms + int((self.settings.refit_s + GRACE_S) * 1000)
            dated = [
                replace(
                    row,
                    at_ms=now_ms,
                    epoch=self.epoch(),
                    until_ms=until if row.state is WeightState.REFITTING else 0,
                )
                for row in undated
            ]
            self.rows |= {row.url: row for row in dated}
            await self.servers.tell(self.token, dated)

        await self.line(write, "write what servers hold")

    async def begin(self, urls: Iterable[str]) -> None:
        """Write that `urls` are refitted from now on, and by when that must be over.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        refitting = WeightState.REFITTING
        await self.tell(ServerWeights(url, refitting, self.serves(url)) for url in urls)

    async def check(self) -> None:
        """Return if the run is still ours.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await self.line(lambda: self.servers.check(self.token), "look who holds the run")

    async def forget(self, urls: Iterable[str]) -> None:
        """Drop the rows of `urls`.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        gone = list(urls)
        for url in gone:
            self.rows.pop(url, None)
        await self.line(lambda: self.servers.forget(self.token, gone), "forget servers")

    def serves(self, url: str) -> int:
        """The version that `url` was last known to serve."""
        row = self.rows.get(url)
        return NO_VERSION if row is None else row.version

    def versions(self) -> frozenset[int]:
        """Versions that servers hold or are to hold."""
        held = {row.version for row in self.rows.values()}
        return frozenset(held if self.current is None else held | {self.current.version})

    @property
    def moving(self) -> bool:
        """Whether weights are being moved at this moment."""
        return self._turn.locked()

    def trouble(self) -> str:
        """Which servers are out and why, in words; "" if none is."""
        out = [row for row in self.rows.values() if row.state is WeightState.STALE]
        if not out:
            return ""
        why = f"{out[0].url}: {out[0].why}"
        return f"{len(out)} of {len(self.rows)} inference servers hold no current weights ({why})"

    # ---- a version ---------------------------------------------------------------------------

    async def publish(self, weights: Weights, announce: Announce, load: Load | None = None) -> None:
        """Refit all servers to `weights`, a few at a time if so set.

        Args:
            weights: What they serve then.
            announce: Puts the version on the board; awaited once, also if there are no servers.
            load: Moves the weights to paused servers, in place of their reading a path.

        Raises:
            RefitError: No server took them, and nothing was announced; or fewer did than
                `refit_quorum` asks for.
            SupersededError: Another trainer has opened the run.
        """

        async def announced() -> None:
            # Before the board says so: a publish that is interrupted is finished by the healer.
            self.current = weights
            await announce()

        async with self._alone():
            await self._publish(weights, Once(announced), load)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Nobody else is at the servers, and nobody comes."""
        async with self._turn:
            self.busy = True
            try:
                await self._still()
                yield
            finally:
                self.busy = False

    async def _still(self) -> None:
        """End what is being healed, and wait until all that it paused goes on."""
        await cancel_all(self.healing.values())
        if self.resuming:
            # A heal that is cancelled twice does not wait for them.
            await asyncio.wait(self.resuming.values(), timeout=GRACE_S)

    async def _publish(self, weights: Weights, announce: Once, load: Load | None) -> None:
        known, before = await self.look()
        self.rows = dict(before)
        targets = [server for server in known.values() if not server.draining]
        at_once = self.settings.refit_at_once or len(targets) or 1
        outcomes: list[UpdateOutcome] = []
        try:
            for at in range(0, len(targets), at_once):
                wave = targets[at : at + at_once]
                outcomes += await self._wave(wave, weights, announce, load)
                broken = sum(outcome.touched for outcome in outcomes)
                if not announce.begun and broken >= BROKEN:
                    break
            if not announce.begun and targets:
                await self._give_back(outcomes, before)
                left = len(targets) - len(outcomes)
                alone = f"; {left} were left alone" if left else ""
                raise _failed(weights, outcomes, f"it was not announced{alone}")
            await announce.end()
        finally:
            announce.close()
        await self._outdated(url for url, server in known.items() if server.draining)
        took = sum(not outcome.why for outcome in outcomes)
        if took < min(max(math.ceil(self.settings.refit_quorum * len(targets)), 1), len(targets)):
            raise _failed(weights, outcomes, "it is announced, and the others are tried again")

    async def _wave(
        self, wave: list[RegisteredServer], weights: Weights, announce: Once, load: Load | None
    ) -> list[UpdateOutcome]:
        """Refit `wave` together."""
        urls = [server_name(server.url) for server in wave]
        meeting = None if load is None else Meeting(load, weights.version, urls)
        await self.begin(urls)
        try:
            ended = await asyncio.gather(
                *(self.refit(server, weights, announce.soon, meeting) for server in wave),
                return_exceptions=True,
            )
        finally:
            if meeting is not None:
                meeting.close()
        # Only when all have ended: none may be left paused by a trainer that was superseded.
        for end in ended:
            if isinstance(end, BaseException):
                raise end
        return [end for end in ended if isinstance(end, UpdateOutcome)]

    async def refit(
        self,
        server: RegisteredServer,
        weights: Weights,
        ready: Announce,
        meeting: Meeting | None = None,
    ) -> UpdateOutcome:
        """Refit one server, whose row says so already; the row says how it went.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        mode = PauseMode(self.settings.refit_mode)

        async def load(driver: RefitDriver) -> None:
            if meeting is None:
                await driver.load(weights)
            elif driver.holds(mode):
                await meeting.come(driver.url)
                await driver.tag(weights.version)
            else:
                raise RefitError(f'its engine cannot be held with refit_mode = "{mode}"')

        def leave(url: str) -> None:
            if meeting is not None:
                meeting.leave(url)

        try:
            driver = await self.drivers.find(server)
        except RefitError as exc:
            url = server_name(server.url)
            leave(url)
            outcome = UpdateOutcome(url, str(exc), touched=False)
        else:
            limit_s = self.settings.refit_s
            once = Refit(weights.version, mode, limit_s, self.check, load, ready, leave)
            outcome = await once.run(driver, self.resuming)
        await self._settle(outcome, weights)
        return outcome

    async def _settle(self, outcome: UpdateOutcome, weights: Weights) -> None:
        url = outcome.url
        if outcome.why:
            self.drivers.forget(url)
            log.warning("server not refitted", server=url, version=weights.version, why=outcome.why)
            row = ServerWeights(url, WeightState.STALE, self.serves(url), why=outcome.why)
        else:
            row = ServerWeights(url, WeightState.SERVING, weights.version, model=weights.adapter)
        await self.tell([row])

    async def _give_back(
        self, outcomes: list[UpdateOutcome], before: dict[str, ServerWeights]
    ) -> None:
        """Nothing was published: who was not touched serves what it served."""
        same = [outcome.url for outcome in outcomes if not outcome.touched]
        await self.forget(url for url in same if url not in before)
        rows = [before[url] for url in same if url in before]
        await self.tell(row for row in rows if row.state is not WeightState.REFITTING)

    async def _outdated(self, draining: Iterable[str]) -> None:
        """Servers that drain keep their weights: if they come back, they are refitted first."""
        rows = [self.rows[url] for url in draining if url in self.rows]
        why = "it was draining when a version was published"
        await self.tell(replace(row, state=WeightState.STALE, why=why) for row in rows)

    # ---- letting go --------------------------------------------------------------------------

    async def hands_off(self, transfer: Callable[[], Awaitable[None]]) -> None:
        """The trainer moves weights itself from here on: nothing is known of any server.

        Args:
            transfer: Moves them, while nothing is healed. If it fails, all stays as it was.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        async with self._alone():
            await transfer()
            self.current = None
            if self.rows:
                await self.forget(list(self.rows))

    async def close(self) -> None:
        """End what is under way; servers that are paused are resumed first. Idempotent."""
        await self._still()
        await self.drivers.close()


def _failed(weights: Weights, outcomes: list[UpdateOutcome], and_now: str) -> RefitError:
    failed = [f"{outcome.url}: {outcome.why}" for outcome in outcomes if outcome.why]
    where = f" from {weights.path}" if weights.path else ""
    return RefitError(
        f"version {weights.version}{where}: {len(failed)} of {len(outcomes)} inference servers did "
        f"not take it, {and_now}: {'; '.join(failed)}"
    )
