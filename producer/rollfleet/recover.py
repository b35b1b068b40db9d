"""What a trainer finds when it opens a run that had one before: batches half-way to commitment.

- The plan of a batch at run level is the commit point; partitions are rolled forward from it, by
  this trainer or the next, any number of times.
- A batch that was handed out or trained but not committed is owed again, in its old order: whoever
  commits only at checkpoints gets back exactly what was trained since the last one.
"""

import re
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from rollfleet.groups import Group
from rollfleet_common.board import Board
from rollfleet_common.errors import CodecError
from rollfleet_common.messages import NO_VERSION, Kind
from rollfleet_common.streams import Streams
from rollfleet_common.text import printable

__all__ = ["Plan", "recover"]

_STATES = ("handed", "trained", "committed")
_ENTRY = re.compile(r"[0-9]{1,20}-[0-9]{1,20}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rollouts a batch holds, and how far it got."""

    number: int
    #: "handed", "trained" or "committed".
    state: str
    #: (partition, entry, kind, payload suffix) of each rollout.
    rollouts: tuple[tuple[int, str, Kind, str], ...]
    #: (partition, name) of each group.
    groups: tuple[tuple[int, str], ...]
    #: (partition, entry) of each tombstone that goes with them.
    tombstones: tuple[tuple[int, str], ...]
    #: The trainer's version when it was handed over.
    version: int = NO_VERSION

    @classmethod
    def of(cls, number: int, state: str, groups: Sequence[Group], version: int) -> "Plan":
        """The plan of a batch of `groups`, handed over at `version`."""
        return cls(
            number=number,
            state=state,
            rollouts=tuple(
                (g.partition, m.entry, m.header.kind, m.header.payload)
                for g in groups
                for m in g.members.values()
            ),
            groups=tuple((g.partition, g.name) for g in groups),
            tombstones=tuple(
                (g.partition, e) for g in groups for e, _ in g.tombstones.values() if e
            ),
            version=version,
        )

    def dumps(self) -> bytes:
        """As it stands in Redis."""
        plan = [1, self.state, self.rollouts, self.groups, self.tombstones, self.version]
        return cast(bytes, msgpack.packb(plan))

    @classmethod
    def loads(cls, number: int, packed: bytes) -> "Plan":
        """The inverse of :meth:`dumps`.

        Raises:
            CodecError: It is no plan of ours.
        """
        try:
            _, state, rollouts, groups, tombstones, version = msgpack.unpackb(packed)
            plan = cls(
                number=number,
                state=state,
                rollouts=tuple((p, e, Kind(k), s) for p, e, k, s in rollouts),
                groups=tuple((p, g) for p, g in groups),
                tombstones=tuple((p, e) for p, e in tombstones),
                version=int(version),
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as exc:
            raise CodecError(f"plan of batch {number}: {printable(str(exc))}") from exc
        entries = [*(e for _, e, _, _ in plan.rollouts), *(e for _, e in plan.tombstones)]
        names = [*(s for _, _, _, s in plan.rollouts), *(g for _, g in plan.groups)]
        where = [row[0] for row in (*plan.rollouts, *plan.groups, *plan.tombstones)]
        if (
            state not in _STATES
            or not all(isinstance(e, str) and _ENTRY.fullmatch(e) for e in entries)
            or not all(isinstance(name, str) for name in names)
            or not all(type(p) is int and p >= 0 for p in where)
        ):
            raise CodecError(
                f"plan of batch {number} names what is no state, entry, partition or group of ours"
            )
        return plan

    async def settle(self, verb: str, token: str, streams: Sequence[Streams]) -> None:
        """Carry `verb` (train, commit) out in every partition; repeats change nothing."""
        closing = verb == "commit"
        said = f"commit:{self.number}:{self.version}" if closing else verb
        for partition, here in enumerate(streams):
            rollouts = [(e, k, s) for p, e, k, s in self.rollouts if p == partition]
            groups = [g for p, g in self.groups if p == partition] if closing else []
            tombstones = [e for p, e in self.tombstones if p == partition] if closing else []
            if rollouts or groups:
                await here.settle(token, said, rollouts, groups, tombstones)


async def recover(
    board: Board,
    token: str,
    streams: Sequence[Streams],
    last_trained: int,
    replay: MutableMapping[str, int],
    beyond: Collection[int] = (),
) -> None:
    """Finish or undo every plan that stands; may be repeated if it fails half-way.

    Args:
        board: Of the run.
        token: The trainer's.
        streams: Of every partition, in order.
        last_trained: Number of the last batch in the trainer's checkpoint: it and all before it
            are committed. 0: the trainer has no checkpoint, or committed all it holds.
        replay: Takes the batch by group name, of the groups that are owed again. A repeat adds to
            it: what an earlier try forgot in Redis is nowhere else.
        beyond: Numbers of later batches that are in the checkpoint as well.
    """
    for number, packed in (await board.plans()).items():
        plan = Plan.loads(number, packed)
        committed = plan.state == "committed" or number <= last_trained or number in beyond
        if committed:
            await plan.settle("commit", token, streams)
        else:
            for partition, here in enumerate(streams):
                owed: list[Any] = [(e, k) for p, e, k, _ in plan.rollouts if p == partition]
                await here.untrain(token, owed)
            replay.update({name: number for _, name in plan.groups})
        await board.plan(token, number, None, committed=committed)
