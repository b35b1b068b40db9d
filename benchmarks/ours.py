"""The same work through rollfleet as it is shipped: nothing is stubbed, turned off or shortened.

- The worker is ``rollfleet worker`` in a process of its own, with leases that are renewed,
  validation, metrics, and 64 slots; the trainer's library runs in this process.
- Every batch is loaded, decoded, validated, handed over and committed.
- Pacing is set so wide that it never is what is measured, and no version is published meanwhile.
"""

import asyncio
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from benchmarks.floor import WINDOW
from benchmarks.workflow import BYTES_PER_TOKEN
from rollfleet import AsyncFleet, TrainerSettings

__all__ = ["Ours"]

SLOTS = 64
TIMEOUT_S = 120.0
_END = object()


class Ours:
    """Trainer and worker of one run.

    Args:
        url: Redis.
        group_size: Samples of one prompt; they share its 2 KB.
        batch: Samples of one batch.
        prompt_bytes: Of token ids.
        result_bytes: Of token ids and log-probabilities.
    """

    def __init__(
        self, url: str, *, group_size: int, batch: int, prompt_bytes: int, result_bytes: int
    ) -> None:
        self._url = url
        self._n, self._batch = group_size, batch
        self._item = {
            "token_ids": np.arange(prompt_bytes // 4, dtype=np.int32),
            "tokens": result_bytes // BYTES_PER_TOKEN,
        }
        #: How many prompts the next round feeds.
        self._rounds: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def __aenter__(self) -> Self:
        settings = TrainerSettings.load(
            redis_url=self._url,
            run="benchmark",
            samples_per_version=WINDOW // 2,
            batch_size=self._batch,
            group_size=self._n,
            max_staleness=1,
            starve_s=TIMEOUT_S,
            fresh=True,
        )
        self.fleet = await AsyncFleet(settings).open()
        self.fleet.feed(self._source())
        self.process = self._start()
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rollfleet_console", "worker", "--run", "benchmark"]
        command += ["--redis-url", self._url, "--slots", str(SLOTS), "--log-level", "warning"]
        return subprocess.Popen(
            [*command, "--workflow", "benchmarks.workflow:Empty", "--health-port", "0"]
        )

    async def __aexit__(self, *exc: object) -> None:
        self._rounds.put(_END)
        self.process.terminate()
        code = await asyncio.to_thread(self.process.wait)
        books = await self.fleet.books()
        await self.fleet.close()
        if exc[0] is None and (code or books.balance or books.dead or books.dropped):
            raise RuntimeError(f"the run does not balance (worker ended with {code}): {books}")

    async def round(self, n: int) -> float:
        """Push `n` tasks, a multiple of the group size, through; returns seconds."""
        began = time.perf_counter()
        self._rounds.put(n // self._n)
        left = n
        while left > 0:
            batch = await self.fleet.next_batch(min(left, self._batch))
            if batch is None:
                raise RuntimeError("the feed ended")
            left -= len(batch)
            await self.fleet.commit(batch)
        return time.perf_counter() - began

    async def one(self) -> float:
        """Push one task through; returns the seconds until its batch is in hand."""
        began = time.perf_counter()
        await self.fleet.submit({**self._item, "n": 1})
        batch = await self.fleet.next_batch(1)
        took = time.perf_counter() - began
        await self.fleet.commit(batch)
        return took

    def _source(self) -> Iterator[Any]:
        """Prompts for one round after the other; blocks, in the feeder's thread, in between."""
        while (prompts := self._rounds.get()) is not _END:
            for _ in range(prompts):
                yield self._item
