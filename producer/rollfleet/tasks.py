"""Tasks that outlive the call that started them.

- :class:`OwnedTasks`: work that is finished even if its caller stops waiting.
- :class:`BackgroundTasks`: tasks that run beside the trainer; the first failure is kept and
  raised by the next call.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rollfleet_common.errors import RollfleetError
from rollfleet_common.forks import Home
from rollfleet_common.logs import get_logger
from rollfleet_common.tasks import cancel_all

__all__ = ["BackgroundTasks", "OwnedTasks"]

log = get_logger("rollfleet.trainer")


class OwnedTasks:
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


class BackgroundTasks:
    """The tasks of one fleet; `wake()` has those who wait look at what failed."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.home = Home("this trainer's fleet", "Open a fleet of its own in the child")
        self._tasks: list[asyncio.Task[None]] = []
        self._lives: list[Coroutine[Any, Any, None]] = []
        self._error: RollfleetError | None = None

    def spawn(self, life: Coroutine[Any, Any, None], name: str) -> None:
        """Run `life` until it ends, fails, or :meth:`close`."""
        task = asyncio.create_task(self._guarded(life, name), name=f"rollfleet-{name}")
        self._tasks.append(task)
        self._lives.append(life)

    def check(self) -> None:
        """Raise what failed first, if anything did.

        Raises:
            RollfleetError: The failure; what is none of ours is named, and is its cause.
            ForkedError: This is a forked child of the process that opened the fleet.
        """
        self.home.check()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Cancel all tasks, and wait for them. Idempotent."""
        await cancel_all(self._tasks)
        self._tasks.clear()
        for life in self._lives:
            life.close()  # one that never began would be complained about when it is collected
        self._lives.clear()

    async def _guarded(self, life: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await life
        except asyncio.CancelledError:
            raise
        except RollfleetError as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - told to whoever calls next
            error = RollfleetError(f"{name} failed in the background: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            self._fail(error)

    def _fail(self, error: RollfleetError) -> None:
        log.error("the fleet failed", error=str(error))
        self._error = self._error or error
        self._wake()
