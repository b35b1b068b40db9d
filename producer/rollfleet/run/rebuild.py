"""What a trainer does when Redis forgot: all of the run, or its last second.

- A run that is gone is opened anew, in a new epoch at the trainer's version, and what was out is
  submitted again: the trainer keeps the prompts of every group until the group is closed.
- After an outage every group that is out is looked up; one that Redis does not know was in the
  second that it lost, and is submitted again. A version that it forgot is published again, a batch
  that it forgot to have seen committed is committed again.
- Batches that were handed over are in the trainer's memory, and are neither sent again nor lost.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rollfleet.consume.reader import RolloutReader
from rollfleet.records import Plan
from rollfleet_common.board import Board
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Prompt
from rollfleet_common.redis import retry
from rollfleet_common.streams import Streams, Submission

__all__ = ["Rebuilder"]

log = get_logger("rollfleet.trainer")

AT_ONCE = 100


class Rebuilder:
    """Revives the run of one trainer.

    `out` holds the prompts of groups that are out, oldest first; `reopen()` takes the run anew and
    fences its partitions, and says whether it could; `done(number)`: this trainer committed a batch; `publish()` puts the version on the board;
    `partition(prompt)` says where a group lives.
    """

    def __init__(
        self,
        *,
        token: str,
        board: Board,
        streams: Sequence[Streams],
        consumer: RolloutReader,
        out: Mapping[str, Prompt],
        max_prompt_bytes: int,
        partition: Callable[[Prompt], int],
        reopen: Callable[[], Awaitable[bool]],
        publish: Callable[[], Awaitable[None]],
        version: Callable[[], int],
        done: Callable[[int], bool],
    ) -> None:
        self.token = token
        self.board = board
        self.streams = streams
        self.consumer = consumer
        self.out = out
        self.max_prompt_bytes = max_prompt_bytes
        self.partition = partition
        self.reopen = reopen
        self.publish = publish
        self.version = version
        self.done = done
        self._lock = asyncio.Lock()
        self._lives = 0

    async def revive(self) -> bool:
        """Whether the run is ours, reviving it if it was lost; False: another trainer has it."""
        async with self._lock:
            owners = {await self._owner(self.board.client, self.board.keys.board)}
            owners |= {await self._owner(here.client, here.keys.fence) for here in self.streams}
            if owners - {None, self.token.encode()}:
                return False
            if None not in owners:  # revived while we waited, or only a stream was deleted
                for here in self.streams:
                    await retry(here.make_trainer_groups, what="look for groups", deadline_s=None)
                return True
            if not await self.reopen():
                return False
            self.consumer.reset()
            self._lives += 1
            sent = await self._submit(list(self.out.values()))
            log.error("redis lost the run: opened anew", submitted_again=sent)
            return True

    async def reconcile(self) -> None:
        """After an outage: send again what Redis does not know any more."""
        found = await self.board.read()
        if found is not None and found[0].version < self.version():
            log.warning("redis forgot a version", version=self.version())
            await self.publish()
        for number, packed in (await self.board.plans()).items():
            if self.done(number):
                log.warning("redis forgot that a batch was committed", batch=number)
                await Plan.loads(number, packed).settle("commit", self.token, self.streams)
                await self.board.plan(self.token, number, None, committed=True)
        async with self._lock:
            missing: list[Prompt] = []
            known = self.consumer.knows
            prompts = [prompt for name, prompt in self.out.items() if not known(name)]
            for at in range(0, len(prompts), AT_ONCE):
                missing += await self._missing(prompts[at : at + AT_ONCE])
            if missing:
                self._lives += 1
                sent = await self._submit(missing)
                log.error("redis lost prompts: submitted again", groups=len(missing), samples=sent)

    async def _owner(self, client: Any, key: str) -> bytes | None:
        owner: bytes | None = await retry(
            lambda: client.hget(key, "token"), what="read the fence", deadline_s=None
        )
        return owner

    async def _missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        async def ask() -> list[int]:
            pipe = self.board.client.pipeline(transaction=False)
            for prompt in prompts:
                keys = self.streams[self.partition(prompt)].keys
                pipe.exists(keys.group(prompt.group))
            answer: list[int] = await pipe.execute()
            return answer

        exist = await retry(ask, what="look for groups", deadline_s=None)
        # Asked again, because a group that closed meanwhile is gone from Redis and from `out`.
        pairs = zip(prompts, exist, strict=True)
        return [prompt for prompt, here in pairs if not here and prompt.group in self.out]

    async def _submit(self, prompts: Sequence[Prompt]) -> int:
        """Submit again, past pacing and cursor, each once in this life."""
        for prompt in prompts:
            streams = self.streams[self.partition(prompt)]
            again = Submission(
                f"again-{self._lives}-{self.token}-{prompt.group}", prompt, fed=False
            )
            await retry(
                lambda streams=streams, again=again: streams.submit(  # type: ignore[misc]
                    self.token, -1, [again], self.max_prompt_bytes
                ),
                what=f"submit group {prompt.group} again",
                deadline_s=None,
            )
        return sum(prompt.n for prompt in prompts)
