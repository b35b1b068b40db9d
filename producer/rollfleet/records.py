"""Plain records of a run: a rollout in its group, a group, and the plan of a batch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgpack

from rollfleet_common.errors import CodecError
from rollfleet_common.messages import NO_VERSION, Header, Kind, Tombstone
from rollfleet_common.streams import Streams
from rollfleet_common.text import printable

__all__ = ["Group", "Member", "Plan"]


@dataclass(frozen=True, slots=True)
class Member:
    """One rollout of a group."""

    entry: str
    header: Header
    #: Its oldest trained version in the history of the trainer's epoch.
    oldest: int
    #: An upper bound of its newest version, in the same history.
    newest: int


@dataclass(slots=True)
class Group:
    """The samples of one prompt."""

    name: str
    n: int
    kind: Kind
    task: str
    partition: int
    #: Order of first arrival.
    seq: int
    members: dict[int, Member] = field(default_factory=dict)
    #: Stream entry ("" if it has none) and tombstone by index.
    tombstones: dict[int, tuple[str, Tombstone]] = field(default_factory=dict)
    #: Of the n, those that were launched to be cancelled when the others are there.
    surplus: int = 0
    #: How often Redis had lost the run when it was first seen.
    life: int = 0

    @property
    def need(self) -> int:
        """Members that make it whole."""
        return self.n - self.surplus

    @property
    def arrived(self) -> int:
        """Samples that have come or been given up."""
        return len(self.members.keys() | self.tombstones.keys())

    @property
    def closed(self) -> bool:
        """Whether it is whole, or every sample has come or been given up."""
        return self.whole or self.arrived >= self.n

    @property
    def whole(self) -> bool:
        """Whether every sample that is needed has come."""
        return len(self.members) >= self.need

    @property
    def oldest(self) -> int:
        """The oldest trained version of any sample: what the group is judged by."""
        return min([member.oldest for member in self.members.values()])

    @property
    def newest(self) -> int:
        """The newest version of any token."""
        return max(member.newest for member in self.members.values())

    @property
    def reasons(self) -> list[str]:
        """Why samples are missing."""
        return [t.reason for index, (_, t) in self.tombstones.items() if index not in self.members]


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
            groups = [g for p, g in self.groups if p == partition]
            tombstones = [e for p, e in self.tombstones if p == partition] if closing else []
            if rollouts or groups:
                await here.settle(token, said, rollouts, groups, tombstones)
