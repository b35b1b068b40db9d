"""n samples of one prompt, until they are all here or given up: so that a group always closes.

- A tombstone counts as an arrival. A group is closed when every index has arrived, either way.
- The same index twice is a duplicate (a Redis that lost its last second can hand one out again);
  the first stays.
- Headers only: nothing here touches a payload.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from rollfleet_common.messages import Header, Kind, Tombstone

__all__ = ["Group", "Groups", "Member"]


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


class Groups:
    """The groups of one run that are not closed yet."""

    def __init__(
        self,
        surplus: Callable[[int], int] = lambda n: 0,  # noqa: ARG005 - the signature's
        life: int = 0,
    ) -> None:
        self.open: dict[str, Group] = {}
        #: Members of a group of n that were launched to be cancelled when the others are there.
        self.surplus = surplus
        #: How often Redis has lost the run.
        self.life = life
        self._seq = 0

    def arrive(self, partition: int, member: Member) -> tuple[Group | None, bool]:
        """A rollout came: the group if that closed it, and whether the rollout is a duplicate."""
        h = member.header
        if not self._fits(h.group, h.index, h.n):
            return None, True
        group = self._group(h.group, h.n, h.kind, h.task, partition)
        if h.index in group.members:
            return None, True
        # Beside a tombstone (Redis lost what caused it) this still is a whole sample. The tombstone
        # stays, so that it is settled with the group.
        group.members[h.index] = member
        return self._close(group), False

    def bury(self, partition: int, entry: str, tombstone: Tombstone) -> Group | None:
        """A sample will never come: the group if that closed it."""
        t = tombstone
        if not self._fits(t.group, t.index, t.n):
            return None
        group = self._group(t.group, t.n, t.kind, t.task, partition)
        group.tombstones.setdefault(t.index, (entry, t))
        return self._close(group)

    def _fits(self, name: str, index: int, n: int) -> bool:
        """Whether a group has such a member: one that it has not would never let it close."""
        group = self.open.get(name)
        return 0 <= index < (n if group is None else group.n)

    def _group(self, name: str, n: int, kind: Kind, task: str, partition: int) -> Group:
        group = self.open.get(name)
        if group is None:
            self._seq += 1
            group = self.open[name] = Group(name, n, kind, task, partition, self._seq)
            group.surplus = self.surplus(n) if kind is Kind.TRAIN else 0
            group.life = self.life
        return group

    def _close(self, group: Group) -> Group | None:
        if not group.closed:
            return None
        del self.open[group.name]
        return group
