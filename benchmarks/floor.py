"""The floor: the same work through raw redis-py, batched, with nothing promised.

- XADD prompts, XREADGROUP, XADD results and XACK and XDEL in one pipeline, XREADGROUP, XACK and
  XDEL: no leases, no ownership, no validation, no staleness; a crash loses or repeats work.
- uvloop and hiredis on both sides, as in rollfleet; the worker is a process of its own.
- As a module it is that worker: ``python -m benchmarks.floor URL BATCH BYTES``.
"""

import asyncio
import os
import subprocess
import sys
import time
from typing import Any, Self, cast

import msgpack
import uvloop

from rollfleet_common.redis import connect

__all__ = ["Floor"]

PROMPTS, RESULTS, GROUP = "floor:prompts", "floor:results", "readers"
BLOCK_MS = 500
#: Samples that may be outstanding, as on the other side.
WINDOW = 2048


class Floor:
    """Producer and consumer of the floor, and its worker process."""

    def __init__(self, url: str, batch: int, prompt_bytes: int, result_bytes: int) -> None:
        self.batch = batch
        self._url = url
        self._prompt = os.urandom(prompt_bytes)
        self._result_bytes = result_bytes
        self._sent = 0
        self._done = 0
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._client = connect(self._url, role="floor")
        self._reader = connect(self._url, role="floor-reader", blocking=True, block_s=1.0)
        await self._client.delete(PROMPTS, RESULTS)
        for stream in (PROMPTS, RESULTS):
            await self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
        self.process = self._start()
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.floor", self._url]
        return subprocess.Popen([*command, str(self.batch), str(self._result_bytes)])

    async def __aexit__(self, *exc: object) -> None:
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)
        await self._client.delete(PROMPTS, RESULTS)
        await self._client.aclose()
        await self._reader.aclose()

    async def round(self, n: int) -> float:
        """Push `n` tasks through; returns seconds."""
        began = time.perf_counter()
        producer = asyncio.create_task(self._produce(n))
        try:
            await self._consume(n)
            await producer
        finally:
            producer.cancel()
        return time.perf_counter() - began

    async def one(self) -> float:
        """Push one task through; returns the seconds until its result is in hand."""
        began = time.perf_counter()
        await self._produce(1)
        entries = await self._read()
        took = time.perf_counter() - began
        await self._settle(entries)
        return took

    async def _produce(self, n: int) -> None:
        left = n
        while left:
            while self._sent - self._done >= WINDOW:
                self._news.clear()
                await self._news.wait()
            some = min(left, self.batch)
            pipe = self._client.pipeline(transaction=False)
            for _ in range(some):
                self._sent += 1
                pipe.xadd(PROMPTS, {b"d": _pack({"id": self._sent, "p": self._prompt})})
            await pipe.execute()
            left -= some

    async def _consume(self, n: int) -> None:
        left = n
        while left:
            entries = await self._read()
            await self._settle(entries)
            left -= len(entries)

    async def _read(self) -> list[bytes]:
        """Entries that came, their results decoded."""
        reply: Any = None
        while not reply:
            reply = await self._reader.xreadgroup(
                GROUP, "trainer", {RESULTS: ">"}, count=self.batch, block=BLOCK_MS
            )
        entries: list[Any] = reply[0][1]
        for _, fields in entries:
            msgpack.unpackb(fields[b"d"])
        return [entry for entry, _ in entries]

    async def _settle(self, entries: list[bytes]) -> None:
        pipe = self._client.pipeline(transaction=False)
        pipe.xack(RESULTS, GROUP, *entries)
        pipe.xdel(RESULTS, *entries)
        await pipe.execute()
        self._done += len(entries)
        self._news.set()


async def work(url: str, batch: int, result_bytes: int) -> None:
    """The worker: answers every prompt with `result_bytes` bytes, until it is killed."""
    client = connect(url, role="floor-worker")
    reader = connect(url, role="floor-worker-reader", blocking=True, block_s=1.0)
    result = os.urandom(result_bytes)
    while True:
        reply: Any = await reader.xreadgroup(
            GROUP, "worker", {PROMPTS: ">"}, count=batch, block=BLOCK_MS
        )
        if not reply:
            continue
        entries: list[Any] = reply[0][1]
        pipe = client.pipeline(transaction=False)
        for _, fields in entries:
            prompt = msgpack.unpackb(fields[b"d"])
            pipe.xadd(RESULTS, {b"d": _pack({"id": prompt["id"], "r": result})})
        done = [entry for entry, _ in entries]
        pipe.xack(PROMPTS, GROUP, *done)
        pipe.xdel(PROMPTS, *done)
        await pipe.execute()


def _pack(message: dict[str, Any]) -> bytes:
    return cast(bytes, msgpack.packb(message))


if __name__ == "__main__":
    uvloop.run(work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
