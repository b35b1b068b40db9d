"""The parts of a trainer's side, built on a run that was taken, and wired to each other once."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Self

from rollfleet.consume.batches import BatchSource
from rollfleet.consume.payloads import Accept, Payloads
from rollfleet.consume.reader import RolloutReader
from rollfleet.consume.settler import Settler
from rollfleet.policy.checked import CheckedPolicy
from rollfleet.policy.metrics import BiasMeter
from rollfleet.policy.version_history import VersionHistory
from rollfleet.run.lease import TrainerLease
from rollfleet.run.rebuild import Rebuilder
from rollfleet.run.reconcile import Reconciler
from rollfleet.run.recover import recover
from rollfleet.run.watch import Watch
from rollfleet.settings import TrainerSettings
from rollfleet.state.capacity import Pacer
from rollfleet.submit.breaker import Breaker
from rollfleet.submit.resumable import Mark
from rollfleet.submit.submitter import Submitter
from rollfleet.tensors.forms import Forms
from rollfleet_common.ledger import Books
from rollfleet_common.messages import NO_VERSION, Prompt

__all__ = ["Needs", "Parts"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the parts need of the fleet that they are built for."""

    settings: TrainerSettings
    tenure: TrainerLease
    policy: CheckedPolicy
    meter: BiasMeter
    pacer: Pacer
    #: Clients whose connections may block, one a partition.
    readers: Sequence[Any]
    #: Decodes and collates, so that the loop goes on.
    thread: Executor
    accept: Accept | None
    #: From :meth:`AsyncFleet.state_dict`; empty for a run from its beginning.
    state: Mapping[str, Any]
    #: Options of :func:`rollfleet.collate`.
    collate: Mapping[str, Any]
    #: Raises what failed in the background.
    check: Callable[[], None]
    #: What the fleet is waiting for, in words.
    reason: Callable[[], Awaitable[str]]
    books: Callable[[], Awaitable[Books]]
    #: Puts the version on the board.
    announce: Callable[[], Awaitable[None]]
    #: Whether weights are being moved at this moment.
    moving: Callable[[], bool]
    #: Prompts of the groups that are out, oldest first.
    out: dict[str, Prompt] = field(default_factory=dict)
    #: Batch by group of what an earlier trainer owes; a build that is repeated adds to it.
    owed: dict[str, int] = field(default_factory=dict)
    #: Batches that were committed after the checkpoint, which the settings accept.
    lost: int = 0


class Parts:
    """Who submits, consumes, loads, commits, revives and gathers; made by :meth:`build`."""

    consumer: RolloutReader
    payloads: Payloads
    commits: Settler
    submitter: Submitter
    reviver: Rebuilder
    gather: BatchSource
    watch: Watch

    @classmethod
    async def build(cls, needs: Needs) -> Self:
        """Fence every partition, finish what an earlier trainer left half done, and build the parts.

        Raises:
            SupersededError: Another trainer has opened the run.
            BrokerError: Redis is away, or refuses us.
        """
        tenure = needs.tenure
        cursors = await tenure.fence()
        last = int(needs.state.get("batch", 0))
        beyond = [int(number) for number in needs.state.get("beyond", ())]
        await recover(tenure.board, tenure.token, tenure.streams, last, needs.owed, beyond)
        history = VersionHistory(await tenure.board.rollbacks())
        tenure.form = await tenure.board.form()
        number = max(await tenure.board.last_batch(), last)
        parts = cls()
        parts._wire(needs, history, _feed_from(needs.state, max(cursors)), number)
        parts.consumer.replay = dict(needs.owed)
        parts.consumer.remember((g, i) for g, i in needs.state.get("recent", ()))
        await parts.submitter.look()
        return parts

    def _wire(
        self, needs: Needs, history: VersionHistory, stood: Mapping[str, Any], number: int
    ) -> None:
        s, tenure, line = needs.settings, needs.tenure, needs.tenure.line

        def version() -> int:
            return tenure.version

        def settled(samples: int) -> None:
            needs.pacer.settled(samples)
            self.submitter.credit.set()

        breaker = Breaker(s.breaker_deaths, s.breaker_prompts)
        self.consumer = RolloutReader(
            token=tenure.token,
            streams=tenure.streams,
            readers=needs.readers,
            policy=needs.policy,
            version=version,
            history=history,
            on_rollback=s.on_rollback,
            meter=needs.meter,
            settled=settled,
            surplus=s.surplus,
            least=needs.policy.least,
            out=needs.out,
            line=line,
            breaker=breaker,
        )
        self.payloads = Payloads(
            tenure.streams,
            needs.accept,
            self.consumer.drop,
            lambda: self.consumer.life,
            line,
            needs.policy,
            history,
            needs.thread,
            s.limits,
            Forms(needs.collate.get("missing") == "error", tenure.form),
            tenure.fix,
        )
        self.commits = Settler(
            board=tenure.board,
            token=tenure.token,
            streams=tenure.streams,
            consumer=self.consumer,
            pacer=needs.pacer,
            line=line,
            version=version,
            number=number,
            collate={"max_bytes": s.max_batch_bytes, **needs.collate},
            lost=needs.lost,
        )
        self.submitter = Submitter(
            token=tenure.token,
            prefix=f"m{tenure.epoch}",
            streams=tenure.streams,
            settings=s,
            pacer=needs.pacer,
            books=needs.books,
            check=needs.check,
            line=line,
            version=version,
            out=needs.out,
            **stood,
        )
        self.reviver = Rebuilder(
            token=tenure.token,
            board=tenure.board,
            streams=tenure.streams,
            consumer=self.consumer,
            out=needs.out,
            max_prompt_bytes=s.max_prompt_bytes,
            partition=self.submitter.partition,
            reopen=tenure.retake,
            publish=needs.announce,
            version=version,
            done=self.commits.done,
        )
        self.watch = Watch(
            client=tenure.board.client,
            keys=tenure.board.keys,
            streams=tenure.streams,
            lease_s=s.lease_s,
            books=needs.books,
            reconciler=Reconciler(
                token=tenure.token,
                streams=tenure.streams,
                consumer=self.consumer,
                out=needs.out,
                max_prompt_bytes=s.max_prompt_bytes,
                line=line,
            ),
            breaker=breaker,
            line=line,
            version=version,
            moving=needs.moving,
        )
        self.gather = BatchSource(
            settings=s,
            consumer=self.consumer,
            payloads=self.payloads,
            commits=self.commits,
            submitter=self.submitter,
            pacer=needs.pacer,
            version=version,
            check=needs.check,
            reason=needs.reason,
            thread=needs.thread,
        )


def _feed_from(state: Mapping[str, Any], cursor: int) -> dict[str, Any]:
    """Where the feed goes on: where Redis says, which may be behind the checkpoint.

    A Redis that has nothing of this run has lost it: what was out at the checkpoint is sent again.
    """
    saved = state.get("source")
    stood = None if saved is None else Mark.of(saved)
    if cursor > NO_VERSION:
        return {"cursor": cursor, "again": frozenset(), "stood": stood}
    position = int(state.get("position", 0))
    return {"cursor": position - 1, "again": frozenset(state.get("open", ())), "stood": stood}
