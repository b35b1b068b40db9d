"""Closed groups that may be trained on: judged, chosen in order, swept at hand-over.

- The rules of :class:`rollfleet.consume.reader.RolloutReader` without its streams; a test holds the two
  together.
"""

from collections.abc import Iterable

from rollfleet.policy.policies import Policy
from rollfleet.records import Group

__all__ = ["Shelf"]


class Shelf:
    """The ready groups of one trainer."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.ready: dict[str, Group] = {}

    def judge(self, group: Group, current: int) -> str | None:
        """A group closed: None if it was put here, or the reason to drop it."""
        if not group.members:
            return max(group.reasons, key=group.reasons.count)
        reason = self.policy.judge(group, current)
        if reason is None or reason == "future":
            self.ready[group.name] = group  # the future may come: judged again at hand-over
            return None
        return cause(group, reason)

    def choose(self, samples: int, current: int) -> list[Group]:
        """Ready groups, in the policy's order, until they hold `samples`; fewer if there are."""
        chosen: list[Group] = []
        for group in sorted(self.ready.values(), key=lambda g: self.policy.order(g, current)):
            if samples <= 0:
                break
            chosen.append(group)
            samples -= len(group.members)
        return chosen

    def sweep(
        self, groups: Iterable[Group], current: int
    ) -> tuple[list[Group], list[tuple[Group, str]]]:
        """THE guarantee: what may be trained on now, and what is dropped for which reason."""
        fresh: list[Group] = []
        dropped: list[tuple[Group, str]] = []
        for group in groups:
            reason = self.policy.judge(group, current)
            if reason is None:
                fresh.append(group)
            else:
                self.ready.pop(group.name, None)
                dropped.append((group, cause(group, reason)))
        return fresh, dropped


def cause(group: Group, reason: str) -> str:
    """A group that is torn because a member was stale is counted as stale."""
    return "stale" if reason == "torn" and "stale" in group.reasons else reason
