"""How a trainer talks to Redis: what may be repeated is repeated until it is answered.

- A Redis that is away is waited for, and the log says so and for how long.
- A Redis that lost the run (flushed, or restarted without its data) is not mistaken for another
  trainer: the run is revived, and the call made again.
"""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rollfleet_common.clock import Clock
from rollfleet_common.errors import SupersededError
from rollfleet_common.logs import get_logger
from rollfleet_common.redis import retry

__all__ = ["Line"]

T = TypeVar("T")

log = get_logger("rollfleet.trainer")

#: How often the log says that Redis is away.
SAY_S = 30.0


class Line:
    """One trainer's line to Redis.

    `revive` is asked when a step is refused as superseded: True if the run had been lost, and is
    there again.
    """

    def __init__(self, revive: Callable[[], Awaitable[bool]]) -> None:
        self.revive = revive
        #: Of the Redis at its other end.
        self.clock = Clock()
        self.away_since: float | None = None
        #: What it said last while it was away.
        self.error = ""
        #: Whether Redis was away since this was last cleared: it may have lost its last second.
        self.suspect = False
        self._say_at = 0.0

    async def __call__(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """Await `call()`, for idempotent calls only, until it is answered.

        Raises:
            SupersededError: Another trainer has opened the run.
            BrokerSetupError: Redis refuses us.
        """
        while True:
            try:
                answer = await retry(call, what=what, deadline_s=None, on_wait=self.on_wait)
            except SupersededError:
                if not await self.revive():
                    raise
            else:
                self.away_since = None
                return answer

    def on_wait(self, exc: Exception, wait_s: float) -> None:
        """Redis did not answer."""
        now = time.monotonic()
        self.suspect = True
        self.clock.doubt()
        self.error = str(exc)
        if self.away_since is None:
            self.away_since = self._say_at = now
        if now >= self._say_at:
            self._say_at = now + SAY_S
            log.warning("redis is away", for_s=round(now - self.away_since), error=str(exc))
