"""Payloads of the groups that are about to be trained on: fetched, decoded, validated.

- What cannot be used drops its group with a reason (``lost``, ``corrupt``, ``oversize``,
  ``form``, ``rejected``, or what the policy says), and the ledger gets its credit back: never a hang, never a hole in a batch.
- What was loaded is kept until its group is handed over or let go of, so that a batch that is cut
  again loads only what it lacks. Payload bytes are let go of as they are decoded.
- The event loop is never held up by a batch: large pieces are decoded in a thread.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from operator import is_

import numpy as np

from rollfleet.line import Line
from rollfleet.policy.checked import CheckedPolicy
from rollfleet.policy.version_history import VersionHistory
from rollfleet.records import Group
from rollfleet.tensors.forms import Forms
from rollfleet_common.codec import decode_samples
from rollfleet_common.errors import InvalidSampleError, OversizeError, WireError
from rollfleet_common.limits import Limits
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION, Header, Kind, Rollout, Sample
from rollfleet_common.streams import Streams
from rollfleet_common.validate import check_samples

__all__ = ["Accept", "Payloads"]

log = get_logger("rollfleet.trainer")

#: Bytes of payloads asked for in one reply.
FETCH_BYTES = 2 << 20
#: Bytes of payloads from which a thread costs less than it saves.
THREAD_BYTES = 1 << 18

#: Told the rollouts of a group, by index; False drops it.
Accept = Callable[[Sequence[Rollout]], bool]


class Payloads:
    """Loads groups for one trainer, and keeps what it loaded until it is handed over.

    `drop(groups, reason)` is told of those that are no use; `life()` counts how often Redis lost
    the run; what is large is decoded in `thread`; `limits` are caps on one rollout. What
    is loaded has one of the `forms`; `fix(text)` keeps them, when they grew, before anything that
    they were learned from is handed over.
    """

    def __init__(
        self,
        streams: Sequence[Streams],
        accept: Accept | None,
        drop: Callable[[Sequence[Group], str], Awaitable[None]],
        life: Callable[[], int],
        line: Line,
        policy: CheckedPolicy,
        history: VersionHistory,
        thread: Executor,
        limits: Limits,
        forms: Forms,
        fix: Callable[[str], Awaitable[None]],
    ) -> None:
        self.streams = streams
        self.accept = accept
        self.drop = drop
        self.life = life
        self.line = line
        self.policy = policy
        self.history = history
        self.thread = thread
        self.limits = limits
        self.forms = forms
        self.fix = fix
        #: Revision of the forms that was fixed last.
        self._fixed = forms.revision
        self._kept: dict[str, _Kept] = {}

    async def read(self, groups: Sequence[Group]) -> dict[str, list[Rollout]]:
        """Rollouts by group, by index, as they came; without groups that were dropped.

        Nothing is kept: this is for evaluations.
        """
        read: dict[str, list[Rollout]] = {}
        for piece in _pieces(groups):
            read.update((group.name, rollouts) for group, rollouts in await self._read(piece))
        return read

    async def load(self, groups: Sequence[Group], version: int) -> dict[str, list[Rollout]]:
        """Rollouts by group, by index, refined at `version`; without groups that were dropped.

        What is kept is not loaded again. Nothing at all if Redis lost the run meanwhile: the groups
        are sent again.
        """
        life = self.life()
        for piece in self.missing(groups):
            await self.hold(piece)
            if self.life() != life:
                return {}
        loaded: dict[str, list[Rollout]] = {}
        names: set[tuple[str, str]] = set()
        for group in groups:
            if not self.holds(group):
                continue  # dropped
            kept = self._kept[group.name]
            if reason := self._refine(kept, version) or self._fit(kept, names):
                del self._kept[group.name]
                await self.drop([group], reason)
            else:
                loaded[group.name] = kept.refined
        if self.forms.revision != self._fixed:
            revision = self.forms.revision
            await self.fix(self.forms.dumps())
            self._fixed = revision
        return loaded if self.life() == life else {}

    async def hold(self, groups: Sequence[Group]) -> None:
        """Fetch, decode and keep a piece of :meth:`missing`; what is no use is dropped."""
        for group, rollouts in await self._read(groups):
            dated = [self.history.redate(rollout) for rollout in rollouts]
            self._kept[group.name] = _Kept(group, dated)

    async def _read(self, groups: Sequence[Group]) -> list[tuple[Group, list[Rollout]]]:
        """Groups of one partition that are of use, with their rollouts; none if the run was lost."""
        life = self.life()
        payloads = await self._fetch(groups[0].partition, groups)
        if sum(map(_bytes, groups)) < THREAD_BYTES:
            decoded = self._decode_all(groups, payloads)
        else:
            loop = asyncio.get_running_loop()
            decoded = await loop.run_in_executor(self.thread, self._decode_all, groups, payloads)
        good: list[tuple[Group, list[Rollout]]] = []
        for group, (rollouts, reason) in zip(groups, decoded, strict=True):
            if reason == "lost":
                await self.line.revive()
            if self.life() != life:
                return []
            if reason:
                await self.drop([group], reason)
            else:
                good.append((group, rollouts))
        return good if self.life() == life else []

    def missing(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Those of `groups` that are not kept, in pieces that :meth:`hold` takes."""
        return _pieces([group for group in groups if not self.holds(group)])

    def holds(self, group: Group) -> bool:
        """Whether this very group is kept; after a revival, another may have its name."""
        kept = self._kept.get(group.name)
        return kept is not None and kept.group is group

    @property
    def samples(self) -> int:
        """How many are kept."""
        return sum(len(kept.rollouts) for kept in self._kept.values())

    def keep_only(self, groups: Iterable[Group]) -> None:
        """Let go of all but `groups`."""
        self._kept = {g.name: self._kept[g.name] for g in groups if self.holds(g)}

    def release(self, groups: Iterable[Group]) -> None:
        """Let go of `groups`."""
        for group in groups:
            self._kept.pop(group.name, None)

    async def _fetch(self, partition: int, groups: Sequence[Group]) -> dict[str, bytes | None]:
        headers = [member.header for group in groups for member in group.members.values()]
        payloads: dict[str, bytes | None] = {}
        at = 0
        while at < len(headers):
            end, size = at, 0
            while end < len(headers) and (end == at or size < FETCH_BYTES):
                size += headers[end].payload_bytes
                end += 1
            payloads.update(await self._fetch_some(partition, [h.payload for h in headers[at:end]]))
            at = end
        return payloads

    async def _fetch_some(self, partition: int, names: Sequence[str]) -> dict[str, bytes | None]:
        values = await self.line(
            lambda: self.streams[partition].fetch(names), f"fetch {len(names)} payloads"
        )
        return dict(zip(names, values, strict=True))

    def _decode(self, group: Group, payloads: dict[str, bytes | None]) -> tuple[list[Rollout], str]:
        """Rollouts of one group, or why it cannot be used."""
        rollouts: list[Rollout] = []
        for index, member in sorted(group.members.items()):
            header = member.header
            # Taken out: what is decoded next is put where this one was.
            packed = payloads.pop(header.payload, None)
            if packed is None:
                log.error("payload missing", group=group.name, index=index, payload=header.payload)
                return [], "lost"
            try:
                samples = decode_samples(packed, self.limits)
                where = f"group {group.name} #{index} from {header.worker}"
                check_samples(samples, where=where, need_trained=header.kind is Kind.TRAIN)
                _check_header(header, samples, len(packed), where)
            except (WireError, InvalidSampleError) as exc:
                reason = "oversize" if isinstance(exc, OversizeError) else "corrupt"
                log.warning(
                    "payload refused",
                    group=group.name,
                    index=index,
                    reason=reason,
                    error=str(exc),
                )
                return [], reason
            rollouts.append(Rollout(header, samples))
        return rollouts, ""

    def _decode_all(
        self, groups: Sequence[Group], payloads: dict[str, bytes | None]
    ) -> list[tuple[list[Rollout], str]]:
        return [self._decode(group, payloads) for group in groups]

    def _refine(self, kept: "_Kept", version: int) -> str:
        """Make `kept` what is to be trained on at `version`; or why it cannot be.

        Nobody is asked twice about the same: not the policy at the same version, and `accept` not
        unless the policy has changed what it accepted.
        """
        if kept.at == version or (kept.at is not None and not self.policy.by_version):
            return ""
        refined = self.policy.refine(kept.rollouts, version)
        if isinstance(refined, str):
            return refined
        asked = kept.at is not None and all(map(is_, refined, kept.refined))
        if not asked and self.accept is not None and not self.accept(refined):
            return "rejected"
        kept.refined, kept.at, kept.fitted = list(refined), version, -1
        return ""

    def _fit(self, kept: "_Kept", names: set[tuple[str, str]]) -> str:
        """Why `kept` cannot be in a batch with rows that have `names`, which it adds its own to."""
        if kept.fitted != self.forms.revision:
            why, kept.names = self.forms.fit(kept.refined)
            if why:
                log.warning(
                    "group has another form than the run's first",
                    group=kept.group.name,
                    why=why,
                    remedy="make workflows agree; what a run expects is forgotten with fresh=True",
                )
                return "form"
            kept.fitted = self.forms.revision
        if len(names | kept.names) > self.limits.names:
            log.warning(
                "group brings too many names",
                group=kept.group.name,
                names=len(names | kept.names),
                cap=f"{self.limits.names} in one batch (max_names)",
            )
            return "form"
        names |= kept.names
        return ""


@dataclass(slots=True, eq=False)
class _Kept:
    """A group that was loaded."""

    group: Group
    #: As they came, dated in the trainer's history.
    rollouts: list[Rollout]
    #: As they are to be trained on at version `at`.
    refined: list[Rollout] = field(default_factory=list)
    at: int | None = None
    #: Revision of the forms that it was held against; and the names that its rows have.
    fitted: int = -1
    names: frozenset[tuple[str, str]] = frozenset()


def _pieces(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups of one partition each, in order, about :data:`FETCH_BYTES` at a time.

    So that two copies of little exist.
    """
    for partition in dict.fromkeys(group.partition for group in groups):
        piece: list[Group] = []
        size = 0
        for group in groups:
            if group.partition != partition:
                continue
            piece.append(group)
            size += _bytes(group)
            if size >= FETCH_BYTES:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece


def _bytes(group: Group) -> int:
    return sum(member.header.payload_bytes for member in group.members.values())


def _check_header(header: Header, samples: Sequence[Sample], nbytes: int, where: str) -> None:
    """The group was judged by its headers, so these must say what the payload says.

    Asked of headers as they came: what a policy or a rollback makes of them is the trainer's own.

    Raises:
        InvalidSampleError: They do not.
    """
    h = header
    tokens = trained = 0
    ages: list[int] = []
    newest = NO_VERSION
    for s in samples:
        tokens += len(s.token_ids)
        trained += int(np.count_nonzero(s.loss_mask))
        ages.append(s.versions.oldest(s.loss_mask))
        newest = max(newest, s.versions.newest())
    said = h.samples, h.tokens, h.trained_tokens, h.reward, h.payload_bytes
    found = len(samples), tokens, trained, samples[0].reward, nbytes
    if said != found:
        names = "samples", "tokens", "trained tokens", "reward", "bytes"
        name, one, other = next(x for x in zip(names, said, found, strict=True) if x[1] != x[2])
        raise InvalidSampleError(f"{where}: its header says {name} {one}, its payload {other}")
    if h.kind is not Kind.TRAIN:
        return  # an evaluation may train on nothing, and then has no version of its own
    oldest = min(ages)
    if (oldest, newest) != (h.min_version, h.max_version):
        raise InvalidSampleError(
            f"{where}: its header says versions {h.min_version} to {h.max_version}, its "
            f"payload {oldest} to {newest}"
        )
