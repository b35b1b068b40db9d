"""What one rank fetches of a batch: its own headers and payloads, read from Redis by itself.

- The leader writes the share of every rank under a key of its own; the collective carries only the
  plan's name. A rank reads no header and no payload that is another's.
- A share is fetched, decoded, checked and collated in a thread while the trainer computes. What the
  policy says at the version of hand-over is asked again then, from what came.
- Nothing is decided here: what cannot be used is said, and the leader drops it.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import msgpack
import numpy as np

from rollfleet.consume.payloads import Accept, Payloads
from rollfleet.line import Line
from rollfleet.policy.checked import CheckedPolicy
from rollfleet.policy.version_history import VersionHistory
from rollfleet.ranks.protocol import SHARE, Revised, ShareTotals, Vote
from rollfleet.records import Group, Member
from rollfleet.tensors.forms import Forms
from rollfleet_common.codec import decode_header, encode_header
from rollfleet_common.errors import CodecError
from rollfleet_common.keys import RunKeys
from rollfleet_common.limits import Limits
from rollfleet_common.messages import NO_VERSION, Header, Rollout
from rollfleet_common.streams import Streams

if TYPE_CHECKING:
    from rollfleet.tensors.device import PreparedTensors

__all__ = ["Loaded", "Reader", "Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """The rollouts of one rank, in order, and how they go into micro-batches."""

    #: (partition, header) of each.
    rollouts: tuple[tuple[int, Header], ...]
    #: Positions in `rollouts`, a tuple for each micro-batch; () is one without rollouts.
    micro: tuple[tuple[int, ...], ...]

    def dumps(self) -> bytes:
        """As it stands in Redis."""
        rows = [(partition, encode_header(header)) for partition, header in self.rollouts]
        return cast(bytes, msgpack.packb((rows, self.micro)))

    @classmethod
    def loads(cls, packed: bytes, what: str) -> "Share":
        """The inverse of :meth:`dumps`.

        Raises:
            CodecError: It is no share of ours.
        """
        try:
            rows, micro = cast("list[Any]", msgpack.unpackb(packed))
            return cls(
                tuple((partition, decode_header(header)) for partition, header in rows),
                tuple(tuple(positions) for positions in micro),
            )
        except (ValueError, TypeError) as exc:
            raise CodecError(f"{what}: {exc}") from exc

    def groups(self, history: VersionHistory) -> list[Group]:
        """Its groups, in order; of a group that is shared with other ranks, our members."""
        groups: dict[str, Group] = {}
        for partition, header in self.rollouts:
            h = header
            group = groups.setdefault(
                h.group, Group(h.group, h.n, h.kind, h.task, partition, len(groups))
            )
            group.members[h.index] = Member("", h, *history.span(h))
        return list(groups.values())


@dataclass(slots=True)
class Loaded:
    """A share that was fetched, as far as it could be."""

    plan: str
    share: Share
    groups: list[Group]
    header_bytes: int
    payload_bytes: int
    #: The version at which it was refined last, and what came of it, by group.
    version: int = NO_VERSION
    refined: dict[str, list[Rollout]] = field(default_factory=dict)
    #: Why it cannot be trained on, by group.
    bad: dict[str, str] = field(default_factory=dict)
    #: Tensors of its rollouts, in order; None if they were not asked for or there are none.
    made: "Future[PreparedTensors] | None" = None
    #: What the rank knew of the form of named arrays when it was refined last.
    form: str = ""
    revision: int = -1

    @property
    def rollouts(self) -> list[Rollout]:
        """As they are to be trained on, in the order of the share."""
        return [r for group in self.groups for r in self.refined.get(group.name, ())]

    def vote(self) -> Vote:
        """What is to be said of it, without a failure."""
        if self.bad:
            return Vote(self.version, tuple(self.bad.items()), form=self.form)
        rollouts = self.rollouts
        before = [header for _, header in self.share.rollouts]
        headers = [rollout.header for rollout in rollouts]
        revised = [
            Revised(h.group, h.index, h.min_version, h.trained_tokens)
            for old, h in zip(before, headers, strict=True)
            if h is not old and h != old
        ]
        tally = _tally(rollouts, self.version)
        return Vote(self.version, (), None, tally, tuple(revised), form=self.form)


class Reader:
    """Reads the shares of one rank, in one event loop, as a trainer of one rank reads its batches.

    Args:
        client: Of the run's Redis.
        keys: Of the run.
        partitions: How many it has.
        rank: Which rank this is.
        policy: The same as the leader's.
        accept: As of :func:`rollfleet.connect`; told whole groups only.
        history: Of the versions of older epochs.
        collate: Options of :func:`rollfleet.collate`, and `device`; None: no tensors are made.
        limits: Caps on one rollout.
        forms: Of the run's named arrays, the same on every rank.
    """

    def __init__(
        self,
        client: Any,
        keys: RunKeys,
        partitions: int,
        *,
        rank: int,
        policy: CheckedPolicy,
        accept: Accept | None,
        history: VersionHistory,
        collate: Mapping[str, Any] | None,
        limits: Limits,
        forms: Forms,
    ) -> None:
        self.client = client
        self.keys = keys
        self.rank = rank
        self.history = history
        self.collate = collate
        self.forms = forms
        self.line = Line(_never)
        self._bad: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, "rollfleet-decode")
        #: The groups of the last share: a new cut has most of them.
        self._groups: dict[str, Group] = {}
        self.payloads = Payloads(
            [Streams(client, keys.partition(p)) for p in range(partitions)],
            accept,
            self._note,
            lambda: 0,
            self.line,
            policy,
            history,
            self._thread,
            limits,
            forms,
            _leaders,
        )

    async def load(self, plan: str, version: int) -> Loaded:
        """Fetch our share of `plan`, and refine it at `version`.

        Groups that came with the share before, of a plan that was cut anew, are not fetched again.

        Raises:
            CodecError: The share is none of ours.
            ValueError: It cannot be collated.
        """
        key = self.keys.share(plan, self.rank)
        packed = await self.line(lambda: self.client.get(key), f"read the share {plan}")
        if packed is None:  # Redis lost it, or it has outlived its lifetime
            return Loaded(plan, Share((), ()), [], 0, 0, version, bad={SHARE: "lost"})
        share = Share.loads(packed, f"the share of rank {self.rank} of plan {plan}")
        groups = [self._known(group) for group in share.groups(self.history)]
        self._groups = {group.name: group for group in groups}
        self.payloads.keep_only(groups)
        lacking = sum(
            member.header.payload_bytes
            for piece in self.payloads.missing(groups)
            for group in piece
            for member in group.members.values()
        )
        loaded = Loaded(plan, share, groups, len(packed), lacking)
        await self.refine(loaded, version)
        # Ours alone, and read: the lifetime of the key is for those that nobody reads.
        await self.line(lambda: self.client.unlink(key), f"free the share {plan}")
        return loaded

    async def refine(self, loaded: Loaded, version: int) -> None:
        """Ask the policy at `version`; what it changes is collated again.

        Raises:
            ValueError: It cannot be collated.
        """
        if loaded.version == version and loaded.revision == self.forms.revision:
            return
        before, self._bad = loaded.rollouts, loaded.bad
        good = [group for group in loaded.groups if group.name not in loaded.bad]
        loaded.refined = await self.payloads.load(good, version)
        loaded.version = version
        loaded.form, loaded.revision = self.forms.dumps(), self.forms.revision
        after = loaded.rollouts
        if not after or len(before) != len(after) or not all(map(is_, before, after)):
            # Of a share that will be cut anew nothing is made.
            loaded.made = None if loaded.bad or not after else self._make(after)

    def done(self) -> None:
        """The last share has left in a batch."""
        self.payloads.release(self._groups.values())
        self._groups = {}

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(wait=False)

    async def _note(self, groups: Sequence[Group], reason: str) -> None:
        """In place of dropping, which is the leader's."""
        self._bad.update({group.name: reason for group in groups})

    def _known(self, group: Group) -> Group:
        """The same group as it came with the share before, if it has the same members."""
        before = self._groups.get(group.name)
        same = before is not None and before.members == group.members
        return before if same and before is not None else group

    def _make(self, rollouts: Sequence[Rollout]) -> "Future[PreparedTensors] | None":
        """Their tensors, made now: what is wrong with them is to be known before the vote."""
        if self.collate is None:
            return None
        from rollfleet.tensors.device import make  # noqa: PLC0415 - torch is optional

        made: Future[PreparedTensors] = Future()
        made.set_result(make(rollouts, self.collate))
        return made


def _tally(rollouts: Sequence[Rollout], version: int) -> ShareTotals:
    headers = [rollout.header for rollout in rollouts]
    behind = [0 if h.min_version == NO_VERSION else version - h.min_version for h in headers]
    trained = [[int(np.count_nonzero(s.loss_mask)) for s in r.samples] for r in rollouts]
    return ShareTotals(
        samples=len(headers),
        tokens=sum(h.tokens for h in headers),
        trained_tokens=sum(map(sum, trained)),
        trained_rows=sum(row > 0 for rows in trained for row in rows),
        trained_samples=sum(map(any, trained)),
        rewards=float(sum(h.reward for h in headers)),
        behind=sum(behind),
        most_behind=max(behind, default=0),
    )


async def _leaders(_: str) -> None:
    """What is agreed to is kept by the leader."""


async def _never() -> bool:
    """Reviving a run is the leader's."""
    return False
