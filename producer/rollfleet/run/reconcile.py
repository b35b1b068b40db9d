"""Samples that are in no place any more are submitted again, or closed: their groups would hang.

- A stream that was deleted or trimmed takes prompts with it; XGROUP DELCONSUMER of a busy worker
  leaves prompts that are delivered to nobody; a deleted rollout's group waits for it for ever.
- One fenced script (``mend.lua``) decides for each group, by what is in Redis at that moment. Whatever
  has a lease, or waits to be read, is left alone; a late deliver of what was sent again gets GONE.
- Prompts that this trainer did not submit are closed as `vanished`, unless their entry is still there.
"""

from collections.abc import Mapping, Sequence

from redis.exceptions import ResponseError

from rollfleet.consume.reader import RolloutReader
from rollfleet.line import Line
from rollfleet_common.codec import encode_prompt
from rollfleet_common.keys import partition_of
from rollfleet_common.leases import quarantine
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Prompt
from rollfleet_common.scripts.trainer import mend
from rollfleet_common.streams import Garbage, Streams

__all__ = ["Reconciler"]

log = get_logger("rollfleet.trainer")


class Reconciler:
    """Reconciles the places of one run's samples with its group records.

    `out` holds the prompts of groups that are out.
    """

    def __init__(
        self,
        *,
        token: str,
        streams: Sequence[Streams],
        consumer: RolloutReader,
        out: Mapping[str, Prompt],
        max_prompt_bytes: int,
        line: Line,
    ) -> None:
        self.token = token
        self.streams = streams
        self.consumer = consumer
        self.out = out
        self.max_prompt_bytes = max_prompt_bytes
        self.line = line

    async def suspects(self) -> frozenset[str]:
        """Oldest entries of the prompts streams that were delivered and that nobody leases.

        It may be the life of a run: what two looks agree on is worth :meth:`mend`.
        """
        found: set[str] = set()
        for here in self.streams:
            for raw in await here.client.smembers(here.keys.routes):
                stream = here.keys.prompts(raw.decode("utf-8", "replace"))
                oldest = await here.client.xrange(stream, count=1)
                if not oldest:
                    continue
                entry = oldest[0][0].decode()
                try:
                    groups = await here.client.xinfo_groups(stream)
                    leased = await here.client.xpending_range(stream, "workers", entry, entry, 1)
                except ResponseError as exc:
                    if "NOGROUP" in str(exc) or "no such key" in str(exc):
                        continue
                    raise
                last = next(
                    (g["last-delivered-id"] for g in groups if g["name"] == b"workers"), b""
                )
                if not leased and last and _numbers(entry) <= _numbers(last.decode()):
                    found.add(f"{stream} {entry}")
        return frozenset(found)

    async def mend(self, *, strangers: bool) -> tuple[int, int]:
        """Submit again what vanished; returns (submitted again, closed), in samples.

        Args:
            strangers: Look for groups of earlier trainers as well, which takes a SCAN.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        again = closed = 0
        for partition, here in enumerate(self.streams):
            known = [
                p
                for p in self.out.values()
                if partition_of(p.group, len(self.streams)) == partition
            ]
            for prompt in known:
                if prompt.group in self.out:  # it may have closed meanwhile
                    sent, ended = await self._group(partition, prompt.group, prompt)
                    again, closed = again + sent, closed + ended
            if strangers:
                for name in await self._names(here):
                    if not (name in self.out or self.consumer.settles(name)):
                        sent, ended = await self._group(partition, name, None)
                        again, closed = again + sent, closed + ended
        if again or closed:
            log.error("samples had vanished", submitted_again=again, closed=closed)
        return again, closed

    async def _names(self, here: Streams) -> list[str]:
        prefix = here.keys.group("")
        found = here.client.scan_iter(match=f"{prefix}*", count=1000)
        return [raw.decode("utf-8", "replace").removeprefix(prefix) async for raw in found]

    async def _group(self, partition: int, name: str, prompt: Prompt | None) -> tuple[int, int]:
        """Mend one group; returns how many members were submitted again, and how many closed."""
        here, k = self.streams[partition], self.streams[partition].keys
        if prompt is not None:
            route, body = prompt.route, encode_prompt(prompt, self.max_prompt_bytes)
            task, position = prompt.task, prompt.position
        else:
            raw = await here.client.hget(k.group(name), "route")
            if raw is None:
                return 0, 0
            route, body, task, position = raw.decode("utf-8", "replace"), b"", "?", -1
        holds = self.consumer.holds(name)
        life = self.consumer.life
        # Repeated after a lost reply, it finds nothing amiss: members it took back come again then.
        states = await self.line(
            lambda: mend(
                here.client,
                k,
                token=self.token,
                group=name,
                route=route,
                body=body,
                task=task,
                position=position,
                holds=holds,
            ),
            f"mend group {name}",
        )
        again = [i for i, state in enumerate(states) if state in (1, 3)]
        gone = [i for i, state in enumerate(states) if state in (3, 4)]
        if life == self.consumer.life and gone:
            self.consumer.take_back(name, gone)
        return len(again), sum(state in (2, 4) for state in states)

    async def strays(self) -> int:
        """Put aside rollouts of groups that nobody submitted; returns how many.

        Only where the books hold more than was submitted: a group without a record then came from
        no script of ours.
        """
        moved = 0
        for group in list(self.consumer.groups.open.values()):
            here = self.streams[group.partition]
            if group.name in self.out or await here.client.exists(here.keys.group(group.name)):
                continue
            why = f"nobody submitted its group {group.name!r}"
            for member in group.members.values():
                garbage = Garbage(member.entry, why, {})
                await self.line(
                    lambda here=here, garbage=garbage: quarantine(  # type: ignore[misc]
                        here.client, here.keys, here.keys.rollouts, "trainer", garbage
                    ),
                    f"quarantine {member.entry}",
                )
                moved += 1
            if self.consumer.groups.open.get(group.name) is group:
                del self.consumer.groups.open[group.name]
                self.consumer.forget(group)
        if moved:
            log.error("rollouts that nobody asked for were put aside", rollouts=moved)
            self.consumer.news.set()
        return moved


def _numbers(entry: str) -> tuple[int, int]:
    millis, _, seq = entry.partition("-")
    return int(millis), int(seq or 0)
