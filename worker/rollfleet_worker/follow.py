"""Versions come in here: the board is followed by a blocking read with a poll behind it.

- Whatever is missed by the read (a cut connection, a trimmed entry) the poll catches up with.
- Before a trainer has opened the run there is no board; workers wait for it, and say so.
- A trainer whose messages this release cannot read, or that cannot read ours, is not worked for.
- Which inference servers there are, and what they were refitted to, is read with every look.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from redis.exceptions import ResponseError

from rollfleet_common.board import Board, Shape
from rollfleet_common.clock import Clock
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.redis import is_transient, retry
from rollfleet_common.schemas import Schemas, clash, spoken
from rollfleet_common.servers import RegisteredServer, Servers, ServerWeights

__all__ = ["Follower", "OnServers"]

#: Told the registered servers, what the trainer wrote of weights, the board, and when they were
#: asked for, in Unix milliseconds by Redis's clock; after every look.
OnServers = Callable[
    [Mapping[str, RegisteredServer], Mapping[str, ServerWeights], PolicyVersion, float], None
]

log = get_logger("rollfleet.worker")

#: How long one blocking read waits: also the longest that a lost wake-up goes unnoticed.
BLOCK_MS = 1000
#: Pause after a read that failed, so that one that always fails does not spin.
AGAIN_S = 0.2


class Follower:
    """What this worker knows of the board."""

    def __init__(
        self,
        board: Board,
        reader: Any,
        on_wait: Callable[[Exception, float], None],
        on_answer: Callable[[], None],
        on_change: Callable[[PolicyVersion], None],
        on_servers: OnServers,
        on_clash: Callable[[str, Schemas], None],
        clock: Clock,
    ) -> None:
        self.board = board
        self.servers = Servers(board.client, board.keys)
        self.reader = reader
        self.policy = PolicyVersion(NO_VERSION, 0)
        self.shape: Shape | None = None
        self.opened = asyncio.Event()
        self._on_wait = on_wait
        self._on_answer = on_answer
        self._on_change = on_change
        self._on_servers = on_servers
        self._on_clash = on_clash
        self.clock = clock

    @property
    def paused(self) -> bool:
        """Whether the trainer asked for nothing new; a pause expires by itself."""
        return self.policy.paused_until_ms > self.clock.now_ms()

    async def run(self) -> None:
        """Follow until cancelled: a worker that drains has calls on servers, too."""
        last = "$"
        while True:
            await retry(self._read, what="read the board", deadline_s=None, on_wait=self._on_wait)
            try:
                last = await self.board.wait(self.reader, last, BLOCK_MS)
            except Exception as exc:
                if not is_transient(exc) and not isinstance(exc, ResponseError):
                    raise
                last = "$"  # the stream was lost or trimmed: the poll is the truth
                await asyncio.sleep(AGAIN_S)

    async def _read(self) -> None:
        if self.clock.due:
            await self.clock.measure(self.board.client)
        asked_ms = self.clock.now_ms()
        found = await self.board.read()
        # After the board: a row may be newer than it, and is not taken for one of a lost history.
        servers, weights = await self.servers.read()
        self._on_answer()
        if found is None:
            return
        policy, shape = found
        # At every look: a run that was deleted and opened anew begins at epoch 1 again.
        theirs = await self.board.schemas()
        if why := clash(theirs, spoken()):
            self._on_clash(why, theirs)
            return
        if policy != self.policy:
            log.info(
                "following", version=policy.version, epoch=policy.epoch, weights=policy.weights
            )
        changed = policy != self.policy
        self.policy, self.shape = policy, shape
        self._on_servers(servers, weights, policy, asked_ms)
        if changed:
            self._on_change(policy)
        self.opened.set()
