"""Which groups are past their deadline, found without a look at those that are not."""

import heapq
from collections.abc import Iterable, Mapping

from rollfleet_common.messages import Prompt

__all__ = ["Deadlines"]

#: How many deadlines of groups that are no longer out may be remembered.
KEEP = 1000


class Deadlines:
    """The deadlines of the groups that are `out`.

    A group that is past its deadline is named again at every look until it is out no more: what a
    revival sends again is cancelled again.
    """

    def __init__(self, out: Mapping[str, Prompt]) -> None:
        self._out = out
        self._due: list[tuple[int, str]] = []

    def add(self, prompts: Iterable[Prompt]) -> None:
        """These are out from here on."""
        for prompt in prompts:
            if prompt.deadline_ms > 0:
                heapq.heappush(self._due, (prompt.deadline_ms, prompt.group))
        if len(self._due) > 2 * len(self._out) + KEEP:
            self._due = [(p.deadline_ms, p.group) for p in self._out.values() if p.deadline_ms > 0]
            heapq.heapify(self._due)

    def late(self, now_ms: float) -> list[str]:
        """Groups that are out and past their deadline, the longest first."""
        late: list[tuple[int, str]] = []
        while self._due and self._due[0][0] < now_ms:
            deadline, group = heapq.heappop(self._due)
            prompt = self._out.get(group)
            if prompt is not None and prompt.deadline_ms == deadline:
                late.append((deadline, group))
        for each in late:
            heapq.heappush(self._due, each)
        return [group for _, group in late]
