"""What a plain training loop holds: :class:`Fleet`, the synchronous twin of :class:`AsyncFleet`.

- An event loop in a thread of its own reads, feeds and keeps the lease while the trainer computes.
- Everything a method can raise, it raises in the thread that called it.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from rollfleet.aio import AsyncFleet
from rollfleet.batch import Batch
from rollfleet.consume.evaluation import Evaluation
from rollfleet.submit.resumable import Epochs
from rollfleet_common.errors import RollfleetError, StarvedError
from rollfleet_common.forks import Home
from rollfleet_common.ledger import Books

__all__ = ["Fleet"]

T = TypeVar("T")


class Fleet:
    """A run, held by this trainer. Made by :func:`rollfleet.connect`; a context manager."""

    def __init__(self, make: Callable[[], AsyncFleet], server: Any = None) -> None:
        self._server = server
        self._home = Home("this fleet", "Call rollfleet.connect() in the child")
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="rollfleet", daemon=True
        )
        self._thread.start()
        self._closed = False
        self._auto: Batch | None = None

        async def opened() -> AsyncFleet:
            return await make().open()

        try:
            self.aio = self._call(opened())
        except BaseException:
            self._end()
            raise

    @property
    def redis_url(self) -> str:
        """Where workers find this run; of use with ``embedded://``."""
        return self.aio.settings.redis_url

    @property
    def version(self) -> int:
        """The version last published."""
        return self.aio.version

    def feed(self, source: Iterable[Any]) -> None:
        """Submit the prompts of an iterable in the background; see :meth:`AsyncFleet.feed`."""

        async def feed() -> None:
            self.aio.feed(source)

        self._call(feed())

    def submit(self, item: Any) -> str:
        """Submit one prompt now; returns its group's name; see :meth:`AsyncFleet.submit`."""
        return self._call(self.aio.submit(item))

    def next_batch(
        self, samples: int | None = None, *, timeout_s: float | None = None
    ) -> Batch | None:
        """The next batch; see :meth:`AsyncFleet.next_batch`."""
        return self._call(self.aio.next_batch(samples, timeout_s=timeout_s))

    def batches(self, steps: int | None = None, *, commit: str = "step") -> Iterator[Batch]:
        """Batches for a loop; see :meth:`AsyncFleet.batches`."""
        settle = self.aio.settler(commit)
        done = 0
        while steps is None or done < steps:
            batch = self.next_batch()
            if batch is None:
                self._call(self.aio.fed_something())
                return
            yield batch
            self._call(_await(settle(batch)))
            done += 1

    def evaluate(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Evaluation:
        """Run prompts as evaluation; see :meth:`AsyncFleet.evaluate`."""
        return self._call(self.aio.evaluate(items, timeout_s=timeout_s))

    def trained(self, batch: Batch) -> None:
        """The batch was trained on; see :meth:`AsyncFleet.trained`."""
        self._call(self.aio.trained(batch))

    def commit(self, batch: Batch | None = None) -> None:
        """Free a batch, or all trained ones; see :meth:`AsyncFleet.commit`."""
        self._call(self.aio.commit(batch))

    def publish(
        self,
        version: int | None = None,
        weights: str = "",
        *,
        transfer: Callable[[int, str], object] | None = None,
        load: Callable[[int, Sequence[str]], object] | None = None,
    ) -> int:
        """Announce a new version of the policy; returns it. See :meth:`AsyncFleet.publish`.

        Args:
            version: Its number. Default: one more than the last.
            weights: Path or other reference under which the servers can read the weights.
            transfer: Called as ``transfer(version, weights)`` to move the weights yourself; no server
                is touched.
            load: Called as ``load(version, urls)`` while the servers at `urls` are paused, for a
                broadcast.

        Raises:
            RefitError: Fewer servers took the weights than `refit_quorum` asks for.
            SettingsError: The version is below the last.
            SupersededError: Another trainer has opened the run.
        """
        return self._call(self.aio.publish(version, weights, transfer=transfer, load=load))

    @property
    def in_use(self) -> frozenset[int]:
        """Versions whose weights must be kept; see :attr:`AsyncFleet.in_use`."""
        return self.aio.in_use

    def pause(self, seconds: float) -> None:
        """Ask workers to claim nothing for a while; see :meth:`AsyncFleet.pause`."""
        self._call(self.aio.pause(seconds))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; see :meth:`AsyncFleet.state_dict`."""

        async def state() -> dict[str, Any]:
            return self.aio.state_dict()

        return self._call(state())

    def books(self) -> Books:
        """The ledger of the run, as it is in Redis now."""
        return self._call(self.aio.books())

    # ---- the verbs of AReaL's WorkflowExecutor ------------------------------------------------

    def wait(self, count: int, timeout: float | None = None) -> Batch:
        """Wait for `count` groups, as AReaL's ``wait``; what was waited for before is committed.

        Raises:
            StarvedError: They did not come within `timeout` seconds; none of them is lost.
            ValueError: `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"count is {count}; wait for at least one group")
        if self._auto is not None:
            self.commit(self._auto)
            self._auto = None
        batch = self.next_batch(count * self.aio.settings.group_size, timeout_s=timeout)
        if batch is None:
            raise StarvedError("the feed has ended and nothing is left")
        self._auto = batch
        return batch

    def rollout_batch(self, items: Sequence[Any], timeout: float | None = None) -> Batch:
        """Submit `items` and wait for as many groups, as AReaL's ``rollout_batch``.

        A group that is given up is submitted again, so that rejects cannot make it hang.
        """
        if not items:
            raise ValueError("rollout_batch needs at least one prompt")
        return self._call(self._rollout_batch(list(items), timeout))

    async def _rollout_batch(self, items: list[Any], timeout_s: float | None) -> Batch:
        if self._auto is not None:
            await self.aio.commit(self._auto)
            self._auto = None
        self._auto = await self.aio.batch_of(items, timeout_s=timeout_s)
        return self._auto

    def prepare_batch(self, source: Iterable[Any], timeout: float | None = None) -> Batch:
        """The next batch while `source` feeds in the background, as AReaL's ``prepare_batch``.

        A source that can be iterated again (a list, a DataLoader) is, for ever, as theirs is.
        """
        if not self.aio.feeding:
            self.feed(Epochs(source))
        return self.wait(self.aio.settings.batch // self.aio.settings.group_size, timeout)

    # ---- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the run; prompts and rollouts stay for the next trainer. Idempotent.

        In a forked child it does nothing: the run is the parent's.
        """
        if self._closed or self._home.left:
            return
        try:
            self._call(self.aio.close())
        finally:
            self._end()
            if self._server is not None:
                self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._home.left:
            coroutine.close()
            self._home.check()
        if self._closed:
            coroutine.close()
            raise RollfleetError("the fleet is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
