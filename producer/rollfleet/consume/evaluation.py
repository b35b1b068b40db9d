"""What an evaluation came to: rollouts by item, and which samples failed and why."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rollfleet.records import Group
from rollfleet.submit.breaker import failure_text
from rollfleet_common.messages import Rollout

__all__ = ["EvalFailure", "Evaluation", "failures_of"]


@dataclass(frozen=True, slots=True)
class EvalFailure:
    """A sample that never came."""

    #: Which sample of the item, from 0.
    index: int
    #: ``dead``, or why it was given up.
    reason: str
    #: The last failure, in words.
    detail: str


class Evaluation(list[list[Rollout]]):
    """The rollouts of each item, in order: a list of lists.

    `failures` has as many entries: of each item, the samples that are missing from its list.
    """

    def __init__(
        self, rollouts: Iterable[list[Rollout]], failures: Sequence[list[EvalFailure]]
    ) -> None:
        super().__init__(rollouts)
        self.failures = list(failures)

    @property
    def failed(self) -> int:
        """How many samples failed, over all items."""
        return sum(map(len, self.failures))


def failures_of(group: Group) -> list[EvalFailure]:
    """The samples of a group that never came."""
    return [
        EvalFailure(index, tombstone.reason, failure_text(tombstone))
        for index, (_, tombstone) in sorted(group.tombstones.items())
        if index not in group.members
    ]
