"""What is done of an episode's generations, parked in Redis so that the next attempt goes on from it.

- One string for each call of `Context.generate`, numbered in the order of the calls, written whole
  and with its TTL in one command: there is no state in which it is half there or stays for ever.
- Best effort: a write never holds an episode up and never fails one, and what cannot be read, or
  is not of this very call, is made anew. Leases and books know nothing of any of it.
- What another epoch made, or versions that are of no use any more, is not gone on with.
- An attempt after a data failure is a fresh try: it goes on from nothing that came before it.
- Two workers on one prompt (one lost its lease) overwrite each other with what each made itself:
  either is whole, and says so.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from rollfleet_common.errors import FailureKind, WireError
from rollfleet_common.keys import RunKeys
from rollfleet_common.leases import AttemptFailure
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Claim, Kind, PolicyVersion
from rollfleet_engines.client import all_of
from rollfleet_engines.interface import Generation, Request
from rollfleet_engines.resume import ABORTED
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.partials.codec import Partial, decode_partial, encode_partial, request_digest
from rollfleet_worker.pool.resuming import Resumer

__all__ = ["PartialStore", "Progress"]

log = get_logger("rollfleet.worker")

#: A prompt that nobody took up for so long starts over: by then weights have moved on anyway.
TTL_MS = 3_600_000
#: How long an episode waits for what was parked before it begins without.
_READ_S = 1.0
#: Writes under way at once: the connections are shared with leases and deliveries.
_WRITES = 4
#: Kinds of failure after which the next attempt goes on from what there is.
_GOES_ON = frozenset({FailureKind.INFRA, FailureKind.TIMEOUT})


class PartialStore:
    """What the episodes of one worker have parked, and its ways to Redis.

    Args:
        client: A Redis client of the worker.
        keys: Of the run.
        engine: What makes generations whole.
        metrics: Told of what became of everything that was parked.
        max_bytes: What is larger is not parked.
    """

    def __init__(
        self, client: Any, keys: RunKeys, engine: Resumer, metrics: Metrics, max_bytes: int
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.max_bytes = max_bytes
        self._client = client
        self._keys = keys
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes = asyncio.Semaphore(_WRITES)
        self._asked: dict[int, dict[str, asyncio.Future[bytes | None]]] = {}
        self._failing = False

    def episode(self, claim: Claim, policy: PolicyVersion) -> "Progress":
        """What is parked, and will be, of the episode of `claim`, begun under `policy`."""
        return Progress(self, claim, policy)

    def key(self, claim: Claim, call: int) -> str:
        """Where a call of an episode is parked."""
        keys = self._keys.partition(claim.partition)
        return keys.progress(claim.prompt.group, claim.index, call)

    async def read(self, partition: int, key: str) -> bytes | None:
        """What is parked; None: nothing, or nothing that could be read in time.

        Calls of one tick share a command, and are answered in one tick: siblings that ask for the
        same stay together, and their requests travel as one.
        """
        loop = asyncio.get_running_loop()
        asked = self._asked.get(partition)
        if asked is None:
            asked = self._asked[partition] = {}
            loop.call_soon(self._send, partition)
        if key not in asked:
            asked[key] = loop.create_future()
        return await asyncio.shield(asked[key])

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run `work` beside the episodes; :meth:`flush` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def write(self, key: str, parked: Partial) -> None:
        """Park one call, if Redis will have it."""
        packed = encode_partial(parked)
        if len(packed) > self.max_bytes:
            self.metrics.parked.labels("oversize").inc()
            return
        async with self._lanes:
            if await self._did("write", self._client.set(key, packed, px=TTL_MS)):
                self.metrics.parked.labels("written").inc()

    async def remove(self, keys: Sequence[str]) -> None:
        """Take away what was parked, if Redis can be reached; else its TTL does."""
        async with self._lanes:
            await self._did("remove", self._client.unlink(*keys))

    async def flush(self, timeout_s: float) -> None:
        """Wait for what is on its way to Redis; what is late is let go."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                log.warning("some progress could not be parked in time", calls=len(late))

    def _send(self, partition: int) -> None:
        self.spawn(self._answer(self._asked.pop(partition)))

    async def _answer(self, asked: "dict[str, asyncio.Future[bytes | None]]") -> None:
        found: list[list[bytes | None]] = []

        async def ask() -> None:
            async with asyncio.timeout(_READ_S):
                found.append(await self._client.mget(list(asked)))

        try:
            await self._did("read", ask())
        finally:
            replies = found[0] if found else [None] * len(asked)
            for future, reply in zip(asked.values(), replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    async def _did(self, what: str, call: Any) -> bool:
        """Await a call to Redis; False, and one warning, if it failed."""
        try:
            await call
        except (RedisError, OSError) as exc:  # a TimeoutError is an OSError
            self.metrics.parked.labels("failed").inc()
            if not self._failing:
                log.warning("generations go on without parking", tried=what, error=str(exc))
            self._failing = True
            return False
        self._failing = False
        return True


class Progress:
    """What is parked of one episode: the engine that its workflow talks to."""

    def __init__(self, parking: PartialStore, claim: Claim, policy: PolicyVersion) -> None:
        self._parking = parking
        self._claim = claim
        self._policy = policy
        # As leases.py writes them, see docs/wire.md.
        self._fresh = sum(b'"kind": "data"' in line for line in claim.history.splitlines())
        self._notes: list[_Note] = []

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` completions, from what is parked of them; see :class:`Engine`."""
        # Numbered before anything is waited for: in the order in which they are called.
        return await all_of([self._call(request) for _ in range(n)])

    def settle(self, failure: AttemptFailure | None) -> None:
        """Remove what is parked, unless the next attempt has a use for it."""
        if failure is not None and failure.kind in _GOES_ON:
            return
        for note in self._notes:
            note.newest = None
        if self._notes:
            self._parking.spawn(self._remove())

    async def _remove(self) -> None:
        # A write that is under way would put back what is removed before it.
        writing = [note.task for note in self._notes if note.task is not None]
        await asyncio.gather(*writing, return_exceptions=True)
        await self._parking.remove([note.key for note in self._notes])

    def _call(self, request: Request) -> Coroutine[Any, Any, Generation]:
        key = self._parking.key(self._claim, len(self._notes))
        note = _Note(self._parking, key, request_digest(request, self._fresh), self._policy.epoch)
        self._notes.append(note)
        return self._made(request, note)

    async def _made(self, request: Request, note: "_Note") -> Generation:
        engine, metrics = self._parking.engine, self._parking.metrics
        if note.digest is None:
            return await engine.go_on(request)
        packed = await self._parking.read(self._claim.partition, note.key)
        so_far = self._usable(packed, note, request)
        if packed is not None:
            metrics.parked.labels("passed_over" if so_far is None else "used").inc()
        if so_far is not None:
            metrics.resumed_tokens.labels("parked").inc(len(so_far.token_ids))
            if so_far.finish_reason != ABORTED:
                return so_far
        return await engine.go_on(request, so_far, note.take)

    def _usable(self, packed: bytes | None, note: "_Note", request: Request) -> Generation | None:
        """What to go on from, of what was found."""
        if packed is None:
            return None
        try:
            parked = decode_partial(packed)
        except WireError as exc:
            self._parking.metrics.parked.labels("unreadable").inc()
            log.warning("what was parked is none of ours", key=note.key, error=str(exc))
            return None
        made, policy = parked.generation, self._policy
        oldest = int(made.versions.versions.min())
        train = self._claim.prompt.kind is Kind.TRAIN
        usable = (
            parked.digest == note.digest
            and parked.epoch == policy.epoch
            and len(made.token_ids) <= request.sampling.max_tokens
            and not (train and oldest < policy.min_useful)
        )
        # The digest is of the temperature, too: the same one made it.
        return replace(made, temperature=request.sampling.temperature) if usable else None


class _Note:
    """The newest of one call on its way to Redis: one write at a time, what is older is skipped."""

    def __init__(self, parking: PartialStore, key: str, digest: bytes | None, epoch: int) -> None:
        self.key = key
        self.digest = digest
        self.newest: Generation | None = None
        self.task: asyncio.Task[None] | None = None
        self._epoch = epoch
        self._parking = parking

    def take(self, made: Generation) -> None:
        """Park `made` as soon as may be."""
        self.newest = made
        if self.task is None or self.task.done():
            self.task = self._parking.spawn(self._write())

    async def _write(self) -> None:
        while (made := self.newest) is not None:
            self.newest = None
            if self.digest is not None:
                await self._parking.write(self.key, Partial(self.digest, self._epoch, made))
