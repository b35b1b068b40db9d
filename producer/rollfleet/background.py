"""What runs beside a trainer: tasks whose first failure is kept, and told to whoever calls next."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rollfleet_common.errors import RollfleetError
from rollfleet_common.forks import Home
from rollfleet_common.logs import get_logger
from rollfleet_common.tasks import cancel_all

__all__ = ["Background"]

log = get_logger("rollfleet.trainer")


class Background:
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
