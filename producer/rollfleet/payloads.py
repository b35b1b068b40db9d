"""Payloads of the groups that are about to be trained on: fetched, decoded, validated.

- What cannot be used drops its group with a reason (``lost``, ``corrupt``, ``rejected``, or what
  the policy says), and the ledger gets its credit back: never a hang, never a hole in a batch.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog

from rollfleet.groups import Group
from rollfleet.guarded import Guarded
from rollfleet.line import Line
from rollfleet.rollback import History
from rollfleet_common.codec import decode_samples
from rollfleet_common.errors import InvalidSampleError, WireError
from rollfleet_common.messages import Header, Kind, Rollout, Sample
from rollfleet_common.streams import Streams
from rollfleet_common.validate import check_samples

__all__ = ["Accept", "Payloads"]

log = structlog.get_logger("rollfleet.trainer")

#: Bytes of payloads asked for in one reply.
FETCH_BYTES = 2 << 20

#: Told the rollouts of a group, by index; False drops it.
Accept = Callable[[Sequence[Rollout]], bool]


class Payloads:
    """Loads groups for one trainer.

    `drop(groups, reason)` is told of those that are no use; `life()` counts how often Redis lost
    the run.
    """

    def __init__(
        self,
        streams: Sequence[Streams],
        accept: Accept | None,
        drop: Callable[[Sequence[Group], str], Awaitable[None]],
        life: Callable[[], int],
        line: Line,
        policy: Guarded,
        history: History,
    ) -> None:
        self.streams = streams
        self.accept = accept
        self.drop = drop
        self.life = life
        self.line = line
        self.policy = policy
        self.history = history

    async def load(self, groups: Sequence[Group], version: int) -> dict[str, list[Rollout]]:
        """Rollouts by group, by index, refined at `version`; without groups that were dropped.

        Nothing at all if Redis lost the run meanwhile: the groups are sent again.
        """
        life = self.life()
        loaded: dict[str, list[Rollout]] = {}
        for partition in {group.partition for group in groups}:
            here = [group for group in groups if group.partition == partition]
            for some in _pieces(here):
                payloads = await self._fetch(partition, some)
                for group in some:
                    rollouts, reason = self._decode(group, payloads)
                    if not reason and group.kind is Kind.TRAIN:
                        rollouts, reason = self._refine(rollouts, version)
                    if reason == "lost":
                        await self.line.revive()
                    if self.life() != life:
                        return {}
                    if reason:
                        await self.drop([group], reason)
                    else:
                        loaded[group.name] = rollouts
        return loaded if self.life() == life else {}

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
                samples = decode_samples(packed)
                where = f"group {group.name} #{index} from {header.worker}"
                check_samples(samples, where=where, need_trained=header.kind is Kind.TRAIN)
                _check_header(header, samples, where)
            except (WireError, InvalidSampleError) as exc:
                log.warning("payload refused", group=group.name, index=index, error=str(exc))
                return [], "corrupt"
            rollouts.append(Rollout(header, samples))
        return rollouts, ""

    def _refine(self, rollouts: list[Rollout], version: int) -> tuple[list[Rollout], str]:
        """As they are to be trained on, or why not."""
        dated = [self.history.redate(rollout) for rollout in rollouts]
        refined = self.policy.refine(dated, version)
        if isinstance(refined, str):
            return [], refined
        if self.accept is not None and not self.accept(refined):
            return [], "rejected"
        return list(refined), ""


def _pieces(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups in order, about :data:`FETCH_BYTES` at a time, so that two copies of little exist."""
    piece: list[Group] = []
    size = 0
    for group in groups:
        piece.append(group)
        size += sum(member.header.payload_bytes for member in group.members.values())
        if size >= FETCH_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _check_header(header: Header, samples: Sequence[Sample], where: str) -> None:
    """The group was judged by its headers, so these must say what the payload says.

    Raises:
        InvalidSampleError: They do not.
    """
    oldest = min((s.versions.oldest(s.loss_mask) for s in samples), default=header.min_version)
    newest = max(s.versions.newest() for s in samples)
    if header.kind is Kind.TRAIN and (oldest, newest) != (header.min_version, header.max_version):
        raise InvalidSampleError(
            f"{where}: its header says versions {header.min_version} to {header.max_version}, its "
            f"payload {oldest} to {newest}"
        )
