"""The next batches, made ready while the trainer computes: chosen, loaded, collated, on their way.

- Nothing of it is in the books: what was prepared stays ready, and is judged when it is handed
  over like everything else. A call that is cancelled, a closed fleet or a crash loses only work.
- It begins at the first hand-over, stays `depth` batches ahead, and never submits or gives credit.
- Groups are taken that are likely to be fresh at the version at which they will be handed over.
- What fails here is left to the next call for a batch, which meets it again and raises it.
- Under a policy that refines by version, batches are prepared up to decoding.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

from rollfleet.batch import Batch
from rollfleet.consume.payloads import Payloads
from rollfleet.consume.reader import RolloutReader
from rollfleet.consume.settler import Settler
from rollfleet.records import Group
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Rollout

if TYPE_CHECKING:
    from rollfleet.tensors.device import PreparedTensors

__all__ = ["Prefetcher"]

log = get_logger("rollfleet.trainer")

#: Arrivals of so many seconds are looked at together.
MOMENT_S = 0.02

#: ``last(groups, want, besides)``: whether these are all that is left for a batch of `want`.
Last = Callable[[Sequence[Group], int, Collection[str]], bool]


@dataclass(slots=True, eq=False)
class _Cut:
    """A batch to be."""

    groups: list[Group]
    #: Its tensors, once they are being made.
    made: "Future[PreparedTensors] | None" = None


class Prefetcher:
    """Prepares batches for one trainer.

    `turn` is held by whoever chooses or loads; `per_version` samples are trained between two
    publishes; tensors are made in `thread`, once the trainer has asked a batch for its own.
    """

    def __init__(
        self,
        *,
        depth: int,
        per_version: int,
        payloads: Payloads,
        consumer: RolloutReader,
        commits: Settler,
        version: Callable[[], int],
        last: Last,
        turn: asyncio.Lock,
        thread: Executor,
    ) -> None:
        self.depth = depth
        self.per_version = per_version
        self.payloads = payloads
        self.consumer = consumer
        self.commits = commits
        self.version = version
        self.last = last
        self.turn = turn
        self.thread = thread
        #: Batches that are cut, next one first.
        self._cuts: list[_Cut] = []
        #: Samples of a batch, as the trainer last asked; 0 before it did, and after a failure.
        self._want = 0
        self._handed: Callable[[], Batch | None] = lambda: None
        #: Whether a batch was handed over since the last look.
        self._begin = False
        #: Whether the trainer asks its batches for tensors.
        self._asked = False

    async def run(self) -> None:
        """Prepare batches until cancelled."""
        while True:
            seen = self.consumer.news.count
            if self._want and await self._try():
                continue
            await self.consumer.news.wait(seen)
            if not self._begin:
                await asyncio.sleep(MOMENT_S)
            self._begin = False

    def choose(self, want: int) -> list[Group]:
        """The groups of the next batch, in the policy's order; fewer if there are not so many.

        A batch that was prepared goes as it was cut, though others have come that the order puts
        before some of it; unless one of them would miss its last turn by that.
        """
        chosen = self.consumer.choose(want)
        if not self._cuts or self.consumer.policy.waits:
            return chosen
        groups = self._cuts[0].groups
        if want != self._want or not self._whole(groups) or not self._ready(groups):
            return chosen
        ours = {group.name for group in groups}
        late = [group for group in chosen if group.name not in ours]
        return chosen if any(map(self._last_turn, late)) else groups

    def handed(self, batch: Batch, want: int) -> None:
        """A batch of `want` samples was handed over: give it its tensors, and go on."""
        for cut in self._cuts:
            if _same(cut.groups, batch.groups):
                batch.ahead = cut.made
        taken = {id(group) for group in batch.groups}
        # The cuts of another size are of no use; what they hold is chosen again.
        left = self._cuts if want == self._want else []
        self._cuts = [c for c in left if not taken & {id(group) for group in c.groups}]
        self._look()
        self._begin = True
        self._handed, self._want = ref(batch), want if self.depth else 0
        self.consumer.news.set()

    @property
    def groups(self) -> list[Group]:
        """Of all batches that are prepared."""
        return [group for cut in self._cuts for group in cut.groups]

    async def _try(self) -> bool:
        """Work on what is next; whether there may be more to do."""
        try:
            async with self.turn:
                return await self._step()
        except Exception as exc:  # noqa: BLE001 - met again, and raised, by the next call
            log.warning(
                "could not prefetch; the next batch is loaded when asked for", error=str(exc)
            )
            self._want, self._cuts = 0, []
            return False

    async def _step(self) -> bool:
        """One bounded piece of work; whether there may be more."""
        wanted = self._plan()
        self.payloads.keep_only(wanted)
        for piece in self.payloads.missing(wanted):
            await self.payloads.hold(piece)
            return True
        if self.consumer.policy.by_version:
            return False
        for cut in self._cuts:
            loaded = await self.payloads.load(cut.groups, self.version())
            if len(loaded) < len(cut.groups):
                return True  # others take the place of what was dropped
            self._make(cut, [r for group in cut.groups for r in loaded[group.name]])
        return False

    def _plan(self) -> list[Group]:
        """What is to be loaded: whole batches, and what there is of one more."""
        kept: list[_Cut] = []
        for cut in self._cuts:
            at = self._expected(_samples(kept))
            fresh = self._ready(cut.groups) and all(self._fresh(g, at) for g in cut.groups)
            if not fresh or not self._closed(cut.groups, kept):
                break
            kept.append(cut)
        self._cuts = kept
        while len(self._cuts) < self.depth:
            groups = self._cut()
            if not groups or not self._closed(groups, self._cuts):
                return [*self.groups, *groups]
            self._cuts.append(_Cut(groups))
        return self.groups

    def _cut(self) -> list[Group]:
        """Groups for one more batch."""
        at = self._expected(_samples(self._cuts))
        besides = {group.name for group in self.groups}
        groups: list[Group] = []
        samples = 0
        for group in self.consumer.in_order(besides):
            if samples >= self._want:
                break
            if self._fresh(group, at):
                groups.append(group)
                samples += len(group.members)
        return groups

    def _expected(self, before: int) -> int:
        """The version at which a batch will be handed over, if `before` samples go before it."""
        version = self.version()
        at, given = self.commits.given
        given = before + (given if at == version else 0)
        # Between two batches at most one version is published, if any is when it is due.
        return version + min(given // self.per_version, before // self._want + 1)

    def _fresh(self, group: Group, version: int) -> bool:
        return self.consumer.policy.judge(group, version) is None

    def _last_turn(self, group: Group) -> bool:
        """Whether it would be lost, or out of its place in a replay, if left for the next batch."""
        replayed = group.name in self.consumer.replay
        return replayed or not self._fresh(group, self.version() + 1)

    def _whole(self, groups: Sequence[Group]) -> bool:
        return sum(len(group.members) for group in groups) >= self._want

    def _closed(self, groups: Sequence[Group], before: Sequence[_Cut]) -> bool:
        """Whether they are a batch: whole, or the last of the feed after those `before`."""
        if self._whole(groups):
            return True
        return self.last(groups, self._want, {g.name for cut in before for g in cut.groups})

    def _ready(self, groups: Sequence[Group]) -> bool:
        ready, reserved = self.consumer.ready, self.consumer.reserved
        return all(ready.get(g.name) is g and g.name not in reserved for g in groups)

    def _make(self, cut: _Cut, rollouts: list[Rollout]) -> None:
        """Have the tensors made, if the trainer is one that wants them."""
        self._look()
        if self._asked and cut.made is None:
            cut.made = self.thread.submit(_made, rollouts, self.commits.collate)

    def _look(self) -> None:
        """Look whether the last batch was asked for its tensors."""
        last = self._handed()
        self._asked = self._asked or (last is not None and last.asked)


def _made(rollouts: Sequence[Rollout], options: Mapping[str, Any]) -> "PreparedTensors":
    from rollfleet.tensors.device import make  # noqa: PLC0415 - torch is optional

    return make(rollouts, options)


def _same(one: Sequence[Group], other: Sequence[Group]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _samples(cuts: Sequence[_Cut]) -> int:
    return sum(len(group.members) for cut in cuts for group in cut.groups)
