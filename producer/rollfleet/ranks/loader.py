"""The thread in which a rank loads its share of the next batch while the trainer computes.

- One plan at a time: a new one takes the place of the one before.
- Every wait for it is bounded. What failed is loaded again when it is asked for again.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from rollfleet.ranks.protocol import Vote
from rollfleet.ranks.share import Loaded, Reader
from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import RankError, StarvedError
from rollfleet_common.redis import connect
from rollfleet_common.tasks import cancel_all

__all__ = ["Loader"]

T = TypeVar("T")


class Loader:
    """Loads one share at a time in a thread of its own, while the trainer computes."""

    def __init__(
        self, settings: TrainerSettings, reader: Callable[[Any], Reader], rank: int
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="rollfleet-share", daemon=True
        )
        self._thread.start()
        self._client = connect(settings.redis_url, role=f"share-{settings.run}-{rank}")
        self._reader = reader(self._client)
        self._coming: Future[Loaded] | None = None
        #: The plan at hand, "" if there is none.
        self.plan = ""

    def begin(self, plan: str, version: int) -> "Future[Loaded]":
        """Begin to load our share of `plan`; the one before it is given up."""
        if self._coming is not None:
            self._coming.cancel()
        self.plan = plan
        self._coming = self._run(self._reader.load(plan, version))
        return self._coming

    def vote(self, version: int, until: float) -> Vote:
        """What is to be said of the share at hand, at this version; nothing if there is none.

        Raises:
            StarvedError: It did not come in time.
            RollfleetError, ValueError: It cannot be loaded.
        """
        if not self.plan:
            return Vote()
        coming = self._coming or self.begin(self.plan, version)
        try:
            loaded = self._wait(coming, until)
            self._wait(self._run(self._reader.refine(loaded, version)), until)
        except Exception:
            coming.cancel()
            self._coming = None  # whoever asks again has it loaded again
            raise
        return loaded.vote()

    def agree(self, form: str) -> None:
        """Hold shares against the form that all ranks agreed to."""
        if form:
            # Before whatever is asked of the loop after this.
            self._loop.call_soon_threadsafe(self._reader.forms.replace, form)

    def take(self) -> Loaded:
        """The share at hand, which leaves in a batch."""
        if self._coming is None:
            raise RankError("the ranks agreed to a plan that this one does not have")
        loaded = self._coming.result()
        self._coming = None
        self.plan = ""
        self._reader.done()
        return loaded

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, future: "Future[T]", until: float) -> T:
        try:
            return future.result(max(until - time.monotonic(), 0.0))
        except TimeoutError as exc:
            if future.done():
                raise
            future.cancel()
            raise StarvedError("the payloads of a batch did not come in time") from exc

    async def _end(self) -> None:
        # All of them: what was begun for an earlier plan may not have noticed that it was given up,
        # and a task that its loop leaves behind is complained about when it is collected.
        await cancel_all(asyncio.all_tasks() - {asyncio.current_task()})
        await self._client.aclose()

    def close(self) -> None:
        """Give up what is coming, and let go of Redis."""
        with suppress(TimeoutError):
            self._run(self._end()).result(5)
        self._reader.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()
