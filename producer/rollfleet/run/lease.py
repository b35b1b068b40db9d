"""One trainer's hold on a run: its token, its epoch, and the version that it says the policy is at.

- The token stands in every partition before anything is read there; a trainer that was frozen past
  its lease is told so by the first step that carries an old one.
- Versions go out by one door: the board first, then the partitions, whose copy only saves work.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rollfleet.line import Line
from rollfleet.run.open_run import REACH_S, claim, shape
from rollfleet.settings import TrainerSettings
from rollfleet_common.board import Board
from rollfleet_common.errors import SupersededError
from rollfleet_common.messages import NO_VERSION
from rollfleet_common.redis import retry
from rollfleet_common.streams import Streams
from rollfleet_common.tasks import cancel_all

__all__ = ["TrainerLease"]

T = TypeVar("T")


class TrainerLease:
    """The hold of one trainer.

    `horizon(version)` is the oldest version that is of use at `version`; `refits()` says whether
    this trainer gives weights to registered servers.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        token: str,
        board: Board,
        streams: Sequence[Streams],
        line: Line,
        horizon: Callable[[int], int],
        refits: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.token = token
        self.board = board
        self.streams = streams
        self.line = line
        self.horizon = horizon
        self.refits = refits
        #: Whether the lease was ever taken.
        self.claimed = False
        self.epoch = 0
        self.version = NO_VERSION
        #: Where the weights of `version` are, as it was published.
        self.weights = ""
        #: The form of the run's named arrays; see :mod:`rollfleet.tensors.forms`.
        self.form = ""

    async def claim(self) -> int:
        """Take the lease, and shut the last trainer out; returns the last batch committed.

        Raises:
            SettingsError: Another trainer holds the run.
            BrokerError: Redis is away, or refuses us.
        """
        s = self.settings
        # It may be repeated: the token is ours.
        last = await retry(
            lambda: claim(self.board, self.token, s),
            what="take the run",
            deadline_s=REACH_S,
            url=s.redis_url,
        )
        self.claimed = True
        return last

    async def while_held(self, work: Awaitable[T]) -> T:
        """Await `work` while the lease is renewed.

        Raises:
            SupersededError: Another trainer has taken the run meanwhile.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self.settings.lease_s / 3)
                await self._renew()
            return task.result()
        finally:
            await cancel_all([task])

    async def take(self, version: int) -> None:
        """Take the run that was claimed in a new epoch, at `version` (NO_VERSION: wherever it is).

        Raises:
            SupersededError: Another trainer has taken it meanwhile.
            BrokerError: Redis is away, or refuses us.
        """
        s = self.settings
        before = await retry(
            self.board.read, what="read the board", deadline_s=REACH_S, url=s.redis_url
        )
        seized = await retry(
            lambda: self.board.seize(
                self.token,
                int(s.lease_s * 1000),
                self.token,
                shape(s),
                version=version,
                take_over=False,
            ),
            what="take the run",
            deadline_s=REACH_S,
            url=s.redis_url,
        )
        if not seized.ok:
            raise SupersededError.of(s.run)
        self.epoch, self.version = seized.epoch, seized.version
        if before is not None and before[0].version == self.version:
            self.weights = before[0].weights

    async def fence(self) -> list[int]:
        """Put the token into every partition; returns the position of the last prompt fed to each.

        Raises:
            SupersededError: A younger trainer has opened the run.
        """
        useful = self.horizon(self.version)
        return [
            await streams.open(
                self.token, self.epoch, self.version, useful, keep=self.settings.kept_letters
            )
            for streams in self.streams
        ]

    async def retake(self) -> bool:
        """Take a run that Redis lost, in a new epoch; False if another trainer was faster."""
        s = self.settings
        seized = await retry(
            lambda: self.board.seize(
                self.token,
                int(s.lease_s * 1000),
                self.token,
                shape(s),
                version=self.version,
                take_over=False,
                above=self.epoch,
            ),
            what="open the run anew",
            deadline_s=None,
        )
        if seized.ok:
            self.epoch = seized.epoch
            await retry(self.fence, what="fence the partitions anew", deadline_s=None)
        return seized.ok

    async def keep(self, reconcile: Callable[[], Awaitable[None]]) -> None:
        """Keep the lease until cancelled; after an outage, `reconcile` what Redis may have lost.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            await self._renew()
            if self.line.suspect:
                self.line.suspect = False
                await self.line(reconcile, "look for what an outage lost")

    async def _renew(self) -> None:
        await self.line(
            lambda: self.board.hold(self.token, int(self.settings.lease_s * 1000)),
            "renew the trainer's lease",
        )

    async def announce(self) -> None:
        """Put the version on the board and into the fences.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        useful = self.horizon(self.version)
        await self.say(
            f"publish version {self.version}",
            version=self.version,
            weights=self.weights,
            published_ms=int(self.line.clock.now_ms()),
            min_useful=useful,
            refits=int(self.refits()),
            **({"form": self.form} if self.form else {}),
        )
        for streams in self.streams:
            await self.line(
                lambda streams=streams: streams.advance(self.token, self.version, useful),  # type: ignore[misc]
                f"advance to version {self.version}",
            )

    async def say(self, what: str, **fields: int | str) -> None:
        """Write `fields` on the board; `what` names it in logs.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await self.line(lambda: self.board.publish(self.token, fields), what)

    async def fix(self, form: str) -> None:
        """Keep the form of the run's named arrays for the next trainer.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        if form != self.form:
            self.form = form
            await self.say("fix the form of arrays", form=form)

    async def release(self) -> None:
        """Let go of the run at once, if it was ever taken."""
        if self.claimed:
            await self.board.release(self.token)
