"""Accept a group or drop it, with a reason: the sweep that guarantees what is trained on.

- Verdicts are per group, on headers only, at the moment the batch is handed over.
- A policy is a function of (group, trainer's version); a new one is a class with `judge`.
"""

from typing import Protocol

from rollfleet.groups import Group
from rollfleet_common.staleness import staleness

__all__ = ["DropStale", "Policy"]


class Policy(Protocol):
    """Decides whether a group may be trained on."""

    def judge(self, group: Group, current: int) -> str | None:
        """None to accept, or the reason to drop: a short word that the ledger counts by."""
        ...


class DropStale:
    """Drop a group if any of its samples is more than `max_staleness` versions behind.

    Args:
        max_staleness: Versions that the oldest trained token may be behind.
        min_group_size: Accept a torn group of at least so many samples; None: whole groups only.
    """

    def __init__(self, max_staleness: int, min_group_size: int | None = None) -> None:
        self.max_staleness = max_staleness
        self.min_group_size = min_group_size

    def judge(self, group: Group, current: int) -> str | None:
        """``torn``, ``stale`` or ``future`` (made by weights that this trainer has not made)."""
        least = group.n if self.min_group_size is None else min(self.min_group_size, group.n)
        if len(group.members) < least:
            return "torn"
        if staleness(current, group.oldest) > self.max_staleness:
            return "stale"
        if staleness(current, group.newest) < 0:
            return "future"
        return None
