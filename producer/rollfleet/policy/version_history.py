"""What the versions of older epochs are worth to a trainer that went back to a checkpoint.

- A trainer that resumed at version r lost the weights of every version above r. What they made is
  as far from r as they were: version v counts as ``r - (v - r)``. It is never mistaken for fresh.
- After several rollbacks the deepest one since counts: there the two histories parted.
- Nothing is changed for rollouts whose weights the trainer's history still holds.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rollfleet_common.messages import NO_VERSION, Header, Rollout, Sample, VersionSpans
from rollfleet_common.staleness import replayed

__all__ = ["VersionHistory"]


class VersionHistory:
    """Where versions of any epoch stand in the history of the newest one.

    Args:
        rollbacks: (epoch, version it began at) of every epoch, in any order.
    """

    def __init__(self, rollbacks: Sequence[tuple[int, int]] = ()) -> None:
        self.rollbacks = tuple(rollbacks)

    def parted(self, epoch: int) -> int | None:
        """The newest version of `epoch` that the trainer's history holds; None: all of them."""
        return min((at for began, at in self.rollbacks if began > epoch), default=None)

    def version(self, version: int, epoch: int) -> int:
        """What `version` of `epoch` counts as.

        It may be below 0, for weights further away than the first ones were; it is one further
        still there, so that nothing that a policy made looks like :data:`NO_VERSION`.
        """
        at = self.parted(epoch)
        if at is None or version <= at:
            return version
        moved = replayed(version, 0, ((1, at),))
        return moved if moved >= 0 else moved - 1

    def lost(self, header: Header) -> bool:
        """Whether weights that no longer exist had a part in it: ``on_rollback = "drop"``."""
        at = self.parted(header.epoch)
        return at is not None and header.max_version > at

    def span(self, header: Header) -> tuple[int, int]:
        """(oldest, newest) that a header admits; the payload may hold less, never more.

        The oldest is what a rollout is judged by. The newest is an upper bound, so that a header
        drops nothing that its payload would save.
        """
        at = self.parted(header.epoch)
        low, high = header.min_version, header.max_version
        if at is None or high <= at:
            return low, high
        ends = self.version(low, header.epoch), self.version(high, header.epoch)
        # The count rises up to the fork and falls after it: its least value is at an end.
        return min(ends), at if low <= at else max(ends)

    def redate(self, rollout: Rollout) -> Rollout:
        """The rollout with all versions as they count, token by token; itself if none changes."""
        header = rollout.header
        if not self.lost(header):
            return rollout
        samples = tuple(self._redate(sample, header.epoch) for sample in rollout.samples)
        oldest = [s.versions.oldest(s.loss_mask) for s in samples]
        made = [v for s in samples for v in s.versions.versions.tolist() if v != NO_VERSION]
        header = replace(
            header,
            min_version=min((v for v in oldest if v != NO_VERSION), default=NO_VERSION),
            max_version=max(made, default=NO_VERSION),
        )
        return Rollout(header, samples)

    def _redate(self, sample: Sample, epoch: int) -> Sample:
        spans = sample.versions
        lengths: list[int] = np.diff(np.append(spans.starts, len(sample.token_ids))).tolist()
        versions = [self.version(v, epoch) for v in spans.versions.tolist()]
        return replace(sample, versions=VersionSpans.of(list(zip(lengths, versions, strict=True))))
