"""Work that is carried to its end, although whoever began it may stop waiting for it.

- A wait that times out or is cancelled leaves nothing half done: it only leaves.
- What fails is raised where it is waited for, and kept for :meth:`Owned.check` besides.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from rollfleet_common.tasks import cancel_all

__all__ = ["Owned"]


class Owned:
    """The work of one owner, who calls :meth:`check` now and then, and :meth:`close` at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def __call__(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, which goes on if this wait is cancelled."""
        task = asyncio.create_task(work, name=self.name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def idle(self) -> None:
        """Wait until none of it is under way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def check(self) -> None:
        """Raise what failed first, if anything did."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Cancel what is not done, and wait for it. Idempotent."""
        await cancel_all(self._tasks)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._error = self._error or task.exception()
