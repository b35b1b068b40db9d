"""Batches from hand-over to commit: each state is first written to the batch's plan, at run level.

- The plan is the commit point. Partitions are rolled forward from it, by this trainer or, if it
  dies in between, by the next one (:mod:`rollfleet.run.recover`).
- A batch has the version at which its plan stands written: if another one was published while it
  was being written, the plan is withdrawn, and the batch is chosen again.
- Credit returns once per sample, when it is trained, however often the step is repeated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollfleet.batch import Batch
from rollfleet.consume.reader import RolloutReader
from rollfleet.line import Line
from rollfleet.records import Group, Plan
from rollfleet.state.capacity import Pacer
from rollfleet.tasks import OwnedTasks
from rollfleet_common.board import Board
from rollfleet_common.errors import RollfleetError
from rollfleet_common.messages import NO_VERSION, Rollout
from rollfleet_common.streams import Streams

__all__ = ["Settler"]


class Settler:
    """The batches of one trainer that are not committed yet."""

    def __init__(
        self,
        *,
        board: Board,
        token: str,
        streams: Sequence[Streams],
        consumer: RolloutReader,
        pacer: Pacer,
        line: Line,
        version: Callable[[], int],
        number: int,
        collate: Mapping[str, Any],
        lost: int = 0,
    ) -> None:
        self.board = board
        self.token = token
        self.streams = streams
        self.consumer = consumer
        self.pacer = pacer
        self.line = line
        self.version = version
        #: Number of the last batch that was handed over.
        self.number = self.first = number
        self.collate = collate
        #: Batches that were committed after the checkpoint that was resumed: no model has them.
        self.lost = lost
        self.open: list[Batch] = []
        #: The version that was handed over last, and how many samples it got so far.
        self.given = (NO_VERSION, 0)
        #: Writes of plans: one at a time, each carried to its end.
        self._writes = OwnedTasks("rollfleet-plan")

    async def close(self) -> None:
        """Give up a write that is under way; the token of the next trainer shuts it out."""
        await self._writes.close()

    async def hand_over(
        self,
        groups: Sequence[Group],
        rollouts: Mapping[str, list[Rollout]],
        version: int,
        waited_s: float,
    ) -> Batch | None:
        """Plan a batch of `groups`, judged fresh at `version`, and make it.

        None if they must be chosen and judged again; see :meth:`write`.
        """
        number = await self.write(groups, version)
        if not number:
            return None
        self.consumer.hand(groups)
        return self.opened(number, groups, rollouts, version, waited_s)

    async def write(self, groups: Sequence[Group], version: int) -> int:
        """Write that the next batch is of `groups`; returns its number, which :meth:`opened` takes.

        0 if another version was published meanwhile, or Redis lost the run: what was written is
        withdrawn, and the groups must be chosen and judged again. A call that is cancelled here
        leaves its number, and so its plan, to the next one: a plan of a batch that nobody got
        would let a later checkpoint commit what was never trained.

        Args:
            groups: Ready, and judged fresh at `version`.
            version: The trainer's when they were judged.
        """
        number = self.number + 1
        await self._plan(number, Plan.of(number, "handed", groups, version).dumps())
        ready = self.consumer.ready
        if self.version() != version or any(ready.get(g.name) is not g for g in groups):
            await self.withdraw(number)
            return 0
        return number

    async def withdraw(self, number: int) -> None:
        """Forget what was written of a batch that nobody got; the next one has its number."""
        await self._plan(number, None)

    def opened(
        self,
        number: int,
        groups: Sequence[Group],
        rollouts: Mapping[str, Sequence[Rollout]],
        version: int,
        waited_s: float,
    ) -> Batch:
        """The batch of what was written as `number`; from here on it is handed over."""
        self.number = number
        self.consumer.breaker.handed()
        for group in groups:
            headers = [rollout.header for rollout in rollouts[group.name]]
            self.consumer.meter.kept(group, version, headers)
        batch = Batch(
            number=self.number,
            version=version,
            rollouts=[rollout for group in groups for rollout in rollouts[group.name]],
            counted={},
            bias=self.consumer.meter.snapshot(),
            groups=list(groups),
            collate=self.collate,
        )
        self.given = version, len(batch) + (self.given[1] if self.given[0] == version else 0)
        batch.counted = self._counted(batch, waited_s)
        self.open.append(batch)
        return batch

    async def advance(self, batch: Batch, state: str) -> None:
        """Move a batch to ``trained`` or ``committed``. Idempotent.

        Raises:
            RollfleetError: It was not handed out by this trainer, or committed already.
            SupersededError: Another trainer has opened the run.
        """
        if batch not in self.open:
            raise RollfleetError(f"batch {batch.number} is not open in this trainer")
        plan = Plan.of(batch.number, state, batch.groups, batch.version)
        await self._plan(batch.number, plan.dumps(), committed=state == "committed")
        verb = "train" if state == "trained" else "commit"
        await self.line(
            lambda: plan.settle(verb, self.token, self.streams), f"{verb} batch {batch.number}"
        )
        if batch.state == "handed":
            self.pacer.settled(len(batch), hold=True)
            self.consumer.remember((g.name, i) for g in batch.groups for i in g.members)
        batch.state = state
        if state == "committed":
            self.open.remove(batch)
            for group in batch.groups:
                self.consumer.forget(group)
            await self._plan(batch.number, None)

    def done(self, number: int) -> bool:
        """Whether this trainer has committed a batch of this number, or knew it committed."""
        return number <= self.number and all(batch.number != number for batch in self.open)

    @property
    def handed(self) -> int:
        """Samples handed out and not yet trained."""
        return sum(len(batch) for batch in self.open if batch.state == "handed")

    @property
    def last_trained(self) -> int:
        """Number of the last batch that was trained; all before it were, too."""
        handed = [batch.number for batch in self.open if batch.state == "handed"]
        return min(handed) - 1 if handed else self.number

    @property
    def beyond(self) -> list[int]:
        """Numbers above :attr:`last_trained` that were trained, or committed, all the same."""
        last = self.last_trained
        handed = {batch.number for batch in self.open if batch.state == "handed"}
        return [number for number in range(last + 1, self.number + 1) if number not in handed]

    def _counted(self, batch: Batch, waited_s: float) -> dict[str, float]:
        headers = [rollout.header for rollout in batch.rollouts]
        stale = batch.staleness
        drops, self.consumer.drops = self.consumer.drops, {}
        return {
            "rollfleet/wait_s": waited_s,
            "rollfleet/samples": len(headers),
            "rollfleet/tokens": sum(h.tokens for h in headers),
            "rollfleet/reward_mean": sum(h.reward for h in headers) / len(headers),
            "rollfleet/staleness_mean": sum(stale) / len(stale),
            "rollfleet/staleness_max": max(stale),
            "rollfleet/outstanding": self.pacer.outstanding,
            "rollfleet/lost_batches": self.lost,
            "rollfleet/ready": sum(len(g.members) for g in self.consumer.ready.values()),
            **{f"rollfleet/dropped/{reason}": count for reason, count in drops.items()},
        }

    async def _plan(self, number: int, plan: bytes | None, *, committed: bool = False) -> None:
        """Write the plan of a batch, or forget it; to the end, though the caller be cancelled.

        A write that was left to itself could reach Redis after the next one, and undo that.
        """
        await self._writes.idle()
        await self._writes(self._put(number, plan, committed))

    async def _put(self, number: int, plan: bytes | None, committed: bool) -> None:
        await self.line(
            lambda: self.board.plan(self.token, number, plan, committed=committed),
            f"plan batch {number}",
        )
