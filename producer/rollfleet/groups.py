"""n samples of one prompt, until they are all here or given up: so that a group always closes.

- A tombstone counts as an arrival. A group is closed when every index has arrived, either way.
- The same index twice is a duplicate (a Redis that lost its last second can hand one out again);
  the first stays.
- Headers only: nothing here touches a payload.
"""

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
    #: Stream entry and tombstone by index.
    tombstones: dict[int, tuple[str, Tombstone]] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """Whether every sample has come or been given up."""
        return len(self.members) + len(self.tombstones) >= self.n

    @property
    def whole(self) -> bool:
        """Whether every sample has come."""
        return len(self.members) >= self.n

    @property
    def oldest(self) -> int:
        """The oldest trained version of any sample: what the group is judged by."""
        return min(member.oldest for member in self.members.values())

    @property
    def newest(self) -> int:
        """The newest version of any token."""
        return max(member.header.max_version for member in self.members.values())

    @property
    def reasons(self) -> list[str]:
        """Why samples are missing."""
        return [tombstone.reason for _, tombstone in self.tombstones.values()]


class Groups:
    """The groups of one run that are not closed yet."""

    def __init__(self) -> None:
        self.open: dict[str, Group] = {}
        self._seq = 0

    def arrive(self, partition: int, member: Member) -> tuple[Group | None, bool]:
        """A rollout came: the group if that closed it, and whether the rollout is a duplicate."""
        h = member.header
        group = self._group(h.group, h.n, h.kind, h.task, partition)
        if h.index in group.members or not 0 <= h.index < group.n:
            return None, True
        # A rollout after a tombstone (Redis lost the tombstone's cause) still is a whole sample.
        group.members[h.index] = member
        group.tombstones.pop(h.index, None)
        return self._close(group), False

    def bury(self, partition: int, entry: str, tombstone: Tombstone) -> Group | None:
        """A sample will never come: the group if that closed it."""
        t = tombstone
        group = self._group(t.group, t.n, t.kind, t.task, partition)
        group.tombstones.setdefault(t.index, (entry, t))
        if t.index in group.members:
            del group.tombstones[t.index]
        return self._close(group)

    def _group(self, name: str, n: int, kind: Kind, task: str, partition: int) -> Group:
        group = self.open.get(name)
        if group is None:
            self._seq += 1
            group = self.open[name] = Group(name, n, kind, task, partition, self._seq)
        return group

    def _close(self, group: Group) -> Group | None:
        if not group.closed:
            return None
        del self.open[group.name]
        return group
