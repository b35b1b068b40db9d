"""What may be trained on: the policies that accept a group, refine it, or drop it with a reason.

- Verdicts are per group, on headers only, at the moment the batch is handed over: the guarantee.
  Only what survives is fetched; then a policy may refine it, token by token.
- No policy judges an evaluation. None trains on a torn group unless it was given a
  `min_group_size`. Those that go by age accept no token of unknown origin.
- A new policy is a class of :class:`BasePolicy` with what differs; any order goes with any policy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from rollfleet.policy.orders import OldestFirst, Order
from rollfleet.records import Group
from rollfleet_common.errors import SettingsError
from rollfleet_common.messages import NO_VERSION, Bool, Header, Kind, Rollout, Sample
from rollfleet_common.staleness import min_useful, staleness

__all__ = [
    "BasePolicy",
    "DropStale",
    "Mask",
    "Policy",
    "SegmentWise",
    "StandardPPO",
    "Wait",
    "segment_stale",
]


class Policy(Protocol):
    """Decides what may be trained on, and in which order."""

    def judge(self, group: Group, current: int) -> str | None:
        """None to accept, or the reason to drop: a short word that the ledger counts by.

        ``future`` (made by weights that this trainer has not made) is kept until hand-over.
        """
        ...

    def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
        """The decoded rollouts of one group, by index, as they are to be trained on.

        The same rollouts in the same order, changed or not; or the reason to drop the group.
        """
        ...

    def horizon(self, current: int) -> int:
        """The least version that a rollout's OLDEST trained token may have to be of any use.

        Workers cancel and refuse by it, to save work. -1: no rollout is hopeless for its age.
        """
        ...

    def order(self, group: Group, current: int) -> tuple[float, ...]:
        """Sort key of an accepted group: smallest first."""
        ...


class BasePolicy:
    """Accepts every whole group of known weights, oldest first; override what differs.

    Args:
        min_group_size: Accept a torn group of at least so many samples; None: whole groups only.
        order: In which order groups go into batches; by default :class:`OldestFirst`.
    """

    def __init__(self, min_group_size: int | None = None, order: Order | None = None) -> None:
        if min_group_size is not None and min_group_size < 1:
            raise SettingsError(f"min_group_size is {min_group_size}; it must be at least 1")
        self.min_group_size = min_group_size
        self._order = order or OldestFirst()

    def judge(self, group: Group, current: int) -> str | None:
        """``torn``, what :meth:`verdict` says, or ``future``; None for evaluations."""
        if group.kind is Kind.EVAL:
            return None
        if len(group.members) < self.least(group):
            return "torn"
        reason = self.verdict(group, current)
        if reason is None and staleness(current, group.newest) < 0:
            return "future"
        return reason

    def verdict(self, group: Group, current: int) -> str | None:
        """The policy's own reason to drop a group of enough members; None to accept it."""
        return None

    def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
        """The rollouts as they are."""
        return rollouts

    def horizon(self, current: int) -> int:
        """Nothing is hopeless."""
        return NO_VERSION

    def order(self, group: Group, current: int) -> tuple[float, ...]:
        """As the policy's order says."""
        return self._order(group, current)

    def least(self, group: Group) -> int:
        """Members without which a group is torn."""
        return max(_least(group.need, self.min_group_size), 1)


class StandardPPO(BasePolicy):
    """Never drops for age: plain PPO, as good as its clip is at the staleness that pacing leaves."""

    def judge(self, group: Group, current: int) -> str | None:
        """``torn`` or None: versions are not looked at."""
        reason = super().judge(group, current)
        return None if reason == "future" else reason


class _Bounded(BasePolicy):
    """A policy with a bound.

    Args:
        max_staleness: Versions that a trained token may be behind.
        min_group_size: As in :class:`BasePolicy`.
        order: As in :class:`BasePolicy`.
    """

    def __init__(
        self, max_staleness: int, min_group_size: int | None = None, order: Order | None = None
    ) -> None:
        super().__init__(min_group_size, order)
        if max_staleness < 0:
            raise SettingsError(f"max_staleness is {max_staleness}; it must be at least 0")
        self.max_staleness = max_staleness


class DropStale(_Bounded):
    """Drop a group if any of its samples is more than `max_staleness` versions behind."""

    def verdict(self, group: Group, current: int) -> str | None:
        """``stale`` or ``unversioned``."""
        if staleness(current, group.oldest) > self.max_staleness:
            return "stale"
        return _unversioned(group)

    def horizon(self, current: int) -> int:
        """The oldest version within the bound."""
        return min_useful(current, self.max_staleness)


class Wait(_Bounded):
    """Drop nothing for age; hold a batch back while what it leaves behind could miss its turn.

    The bound is kept by waiting instead of dropping: a prompt's tokens are no older than the
    version at which it was submitted, so each sample has a last version to be trained at, and a
    batch is handed over only if the batches after it can still serve everything in time
    (:meth:`must_wait`). Slow prompts are trained on as often as quick ones; the slowest sets the
    pace. Servers that lag behind the board are not caught: the batch's staleness shows them.

    The order is :class:`OldestFirst`, earliest last turn first: in any other, the wait could be for
    what is here already, and have no end.
    """

    def __init__(self, max_staleness: int, min_group_size: int | None = None) -> None:
        super().__init__(max_staleness, min_group_size)

    def must_wait(
        self,
        submitted: Iterable[int],
        current: int,
        *,
        left: Iterable[int] = (),
        per_version: int,
        spare: int = 0,
    ) -> bool:
        """Whether the batch at hand must wait for samples that are still to come.

        Never for ever: while `pipeline_depth` is at most `max_staleness` the batch of all that is
        oldest may always go, and without samples to come nothing is waited for.

        Args:
            submitted: Version at submission of every sample that has neither come nor died.
            current: The trainer's version.
            left: Oldest trained version of every ready sample that the batch leaves behind.
            per_version: Samples that one version is trained on.
            spare: Samples that will be trained at `current` after this batch; 0 if it is the last.
        """
        coming = list(submitted)
        if not coming:
            return False
        turns = sorted(version + self.max_staleness for version in (*coming, *left))
        # What has missed its turn is not saved by waiting.
        turns = [turn for turn in turns if turn >= current]
        return any(
            place >= spare + (turn - current) * per_version for place, turn in enumerate(turns)
        )


class Mask(_Bounded):
    """Keep samples and mask their stale tokens out of the loss, by version spans.

    A long answer that began too long ago still teaches its end, and its reward still counts in its
    group's baseline. A sample of which less than `min_share` is left drops its group as ``masked``
    (``stale`` if its header says so already); with a `min_group_size`, that many such samples must
    be left, and the others stay in for their reward, all masked.

    Args:
        max_staleness: Versions that a trained token may be behind.
        min_group_size: As in :class:`BasePolicy`.
        order: As in :class:`BasePolicy`.
        min_share: Of a rollout's trained tokens, over 0 and up to 1.
    """

    def __init__(
        self,
        max_staleness: int,
        min_group_size: int | None = None,
        order: Order | None = None,
        *,
        min_share: float = 0.5,
    ) -> None:
        super().__init__(max_staleness, min_group_size, order)
        if not 0 < min_share <= 1:
            raise SettingsError(f"min_share is {min_share}; it must be over 0 and up to 1")
        self.min_share = min_share

    def verdict(self, group: Group, current: int) -> str | None:
        """``stale`` if masking cannot leave enough, ``unversioned``.

        A header's newest version is an upper bound: what it condemns, no mask can save.
        """
        members = group.members.values()
        useful = sum(staleness(current, m.newest) <= self.max_staleness for m in members)
        return "stale" if useful < self.least(group) else _unversioned(group)

    def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
        """Rollouts whose trained tokens are all within the bound, or ``masked``."""
        masked = [self._mask(rollout, current - self.max_staleness) for rollout in rollouts]
        needed = _least(len(rollouts), self.min_group_size)
        return "masked" if sum(enough for _, enough in masked) < needed else [r for r, _ in masked]

    def _mask(self, rollout: Rollout, floor: int) -> tuple[Rollout, bool]:
        """The rollout without tokens below version `floor`, and whether enough of it is left."""
        masks = [_within(sample, floor) for sample in rollout.samples]
        had = sum(int(sample.loss_mask.sum()) for sample in rollout.samples)
        left = sum(int(mask.sum()) for mask in masks)
        enough = left > 0 and left >= self.min_share * had
        if left == had:
            return rollout, enough
        if not enough:
            masks, left = [np.zeros_like(mask) for mask in masks], 0
        samples = tuple(
            replace(sample, loss_mask=mask)
            for sample, mask in zip(rollout.samples, masks, strict=True)
        )
        oldest = [s.versions.oldest(s.loss_mask) for s in samples if s.loss_mask.any()]
        header = replace(
            rollout.header, min_version=min(oldest, default=NO_VERSION), trained_tokens=left
        )
        return Rollout(header, samples), enough


class SegmentWise(_Bounded):
    """Segment-wise decoupled PPO: judge by the tail, or by the head where it was recomputed.

    A sample is as old as its newest token (the tail; at most 1 version behind) while its proximal
    log-probabilities are those of the weights that sampled it, and as old as its oldest (the head;
    at most `max_staleness`) once they were recomputed. Every sample of a group is judged. The rule
    is of a branch of AReaL (zhshgmail/AReaL, feature/segment-wise-ppo-v3).

    Args:
        max_staleness: Versions that the head may be behind.
        min_group_size: As in :class:`BasePolicy`.
        order: As in :class:`BasePolicy`.
        recomputed: True if the trainer recomputes every batch
            (:func:`rollfleet.tensors.proximal.proximal_logprobs`), False if none; or the version at which a
            rollout was recomputed, None for one that was not.
    """

    def __init__(
        self,
        max_staleness: int,
        min_group_size: int | None = None,
        order: Order | None = None,
        *,
        recomputed: bool | Callable[[Header], int | None] = False,
    ) -> None:
        super().__init__(max_staleness, min_group_size, order)
        self.recomputed = recomputed

    def verdict(self, group: Group, current: int) -> str | None:
        """``stale`` or ``unversioned``."""
        for member in group.members.values():
            header = member.header
            span = member.oldest, member.newest
            if segment_stale(*span, current, self._at(header, current), self.max_staleness):
                return "stale"
        return _unversioned(group)

    def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
        """``stale`` by trained tokens: a header's newest version may be of one that is not."""
        for rollout in rollouts:
            at = self._at(rollout.header, current)
            for sample in rollout.samples:
                made = sample.versions.expand(len(sample.token_ids))[sample.loss_mask]
                if not len(made):
                    continue
                if NO_VERSION in made:
                    return "unversioned"
                span = int(made.min()), int(made.max())
                if segment_stale(*span, current, at, self.max_staleness):
                    return "stale"
        return rollouts

    def horizon(self, current: int) -> int:
        """The oldest version within the bound if all is recomputed; else no head is hopeless."""
        return min_useful(current, self.max_staleness) if self.recomputed is True else NO_VERSION

    def _at(self, header: Header, current: int) -> int | None:
        if callable(self.recomputed):
            return self.recomputed(header)
        return current if self.recomputed else None


def segment_stale(
    oldest: int, newest: int, current: int, recomputed: int | None, max_staleness: int
) -> bool:
    """Whether a sample of trained versions `oldest` to `newest` is too old at `current`.

    Args:
        oldest: Of its trained tokens.
        newest: Of its trained tokens.
        current: The trainer's version.
        recomputed: Version at which its proximal log-probabilities were recomputed (0 is one);
            None or negative if they were not.
        max_staleness: Versions that the head of a recomputed sample may be behind.
    """
    if recomputed is None or recomputed < 0:
        return staleness(current, newest) > 1
    return staleness(current, oldest) > max_staleness


def _least(n: int, min_group_size: int | None) -> int:
    return n if min_group_size is None else min(min_group_size, n)


def _unversioned(group: Group) -> str | None:
    """``unversioned`` if a server told no version of what is trained on."""
    for member in group.members.values():
        # A version counted anew after a rollback may be negative, too: the raw header knows.
        if member.oldest < 0 and member.header.min_version < 0:
            return "unversioned"
    return None


def _within(sample: Sample, floor: int) -> Bool:
    """bool[T]: the trained tokens of version `floor` and newer."""
    spans = sample.versions
    fresh = (spans.versions >= floor) & (spans.versions != NO_VERSION)
    lengths = np.diff(np.append(spans.starts, len(sample.token_ids)))
    kept: Bool = sample.loss_mask & np.repeat(fresh, lengths)
    return kept
