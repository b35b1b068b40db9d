"""n samples of one prompt, until they are all here or given up: so that a group always closes.

- A tombstone counts as an arrival. A group is closed when every index has arrived, either way.
- The same index twice is a duplicate (a Redis that lost its last second can hand one out again);
  the first stays.
- Headers only: nothing here touches a payload.
"""

from collections.abc import Callable

from rollfleet.records import Group, Member
from rollfleet_common.messages import Kind, Tombstone

__all__ = ["Groups"]


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

    def add_tombstone(self, partition: int, entry: str, tombstone: Tombstone) -> Group | None:
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
