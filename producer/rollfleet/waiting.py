"""Waiting with a bound and a reason, and news that any number of waiters hear.

- A wait ends in a StarvedError that says what was waited for and why it did not come, whatever the
  wait hung in.
- Nobody misses news, and nobody takes them from another: each waiter knows what it has heard.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from redis.exceptions import RedisError

from rollfleet_common.errors import BrokerError, StarvedError
from rollfleet_common.logs import get_logger
from rollfleet_common.redis import translate

__all__ = ["BoundedWait", "News"]

log = get_logger("rollfleet.trainer")

#: How often a trainer that waits says why.
SAY_S = 30.0
#: How long the reason of a wait is waited for.
REASON_S = 1.0


class News:
    """Something happened that those who wait should look at. For one event loop."""

    def __init__(self) -> None:
        #: How often that was so: read it before looking, and wait for more than it.
        self.count = 0
        self._next = asyncio.Event()

    def set(self) -> None:
        """Wake all who wait."""
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self, seen: int) -> None:
        """Return as soon as there were more than `seen`."""
        while self.count <= seen:
            await self._next.wait()


class BoundedWait:
    """A bound on a wait, whatever it hangs in, that knows what was waited for."""

    def __init__(self, what: str, limit_s: float, reason: Callable[[], Awaitable[str]]) -> None:
        self.what = what
        self.limit_s = limit_s
        self.reason = reason
        self.began = time.monotonic()
        self._say_at = self.began + SAY_S
        self._timeout = asyncio.timeout(limit_s)
        self._late = TimeoutError()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        late = exc is self._late
        try:
            await self._timeout.__aexit__(kind, exc, tb)
        except TimeoutError:
            late = True
        if late:
            raise StarvedError(
                f"{self.what} did not come within {self.limit_s:g} s: {await self._why()}"
            ) from None

    async def say(self) -> None:
        """Now and then, log what is waited for."""
        if self._timeout.expired():
            raise self._late  # its cancellation was lost on the way (rollfleet_common.tasks)
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_S
            why = await self._why()
            log.warning("waiting", for_s=round(now - self.began), what=self.what, why=why)

    async def _why(self) -> str:
        """The reason, or why that could not be had: a wait neither hangs in it nor fails by it."""
        try:
            async with asyncio.timeout(REASON_S):
                return await self.reason()
        except TimeoutError:
            return "Redis does not answer"
        except (RedisError, OSError, BrokerError) as exc:
            return str(translate(exc))
