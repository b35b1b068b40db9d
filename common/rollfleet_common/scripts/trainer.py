"""Scripts of the trainer in one partition: each checks its token, and what it does may be repeated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rollfleet_common.errors import SupersededError
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Kind, Prompt
from rollfleet_common.scripts.script import chunks, load, room

__all__ = [
    "Mended",
    "Submission",
    "Submitted",
    "adopt",
    "advance",
    "cancel",
    "mend",
    "open_",
    "settle",
    "submit",
    "untrain",
]

_ADOPT, _ADVANCE, _CANCEL, _MEND = map(load, ("adopt", "advance", "cancel", "mend"))
_OPEN, _SETTLE, _SUBMIT, _UNTRAIN = map(load, ("open", "settle", "submit", "untrain"))

#: Rollouts, groups and tombstones that one call settles; a call is short, so that it holds up nobody.
SETTLE_CHUNK = 500
#: Groups whose records a call looks at that marks rollouts as trained.
TRAIN_GROUPS = 2_000
#: Entries that one call of `adopt` looks at.
ADOPT_CHUNK = 500
#: Members of a group that one call of `mend` looks at.
MEND_CHUNK = 1_000


class Submitted(IntEnum):
    """Outcome of submitting one group."""

    YES = 1
    #: The submission id was seen before; nothing was done.
    KNOWN = 0
    #: Over the limit; nothing was done.
    FULL = -1


@dataclass(frozen=True, slots=True)
class Submission:
    """A group to submit, once."""

    #: Unique in the run; submitting it again does nothing.
    id: str
    prompt: Prompt
    #: Whether the feed's cursor knows it by its position; otherwise it is known by its id.
    fed: bool = True


class Mended(IntEnum):
    """What `mend` found of one member of a group, and did."""

    #: It is where its group says.
    WELL = 0
    AGAIN = 1
    CLOSED = 2
    #: As AGAIN and CLOSED, of one that was delivered and whose header is gone.
    HEADLESS_AGAIN = 3
    HEADLESS_CLOSED = 4


async def open_(
    client: Any,
    k: PartitionKeys,
    *,
    token: str,
    epoch: int,
    version: int,
    min_useful: int,
    dead_max: int,
    dead_age_ms: int,
) -> int:
    """Fence the partition for one trainer; returns the position of its last fed prompt.

    Raises:
        SupersededError: A younger trainer has opened it.
    """
    args = [token, epoch, version, min_useful, dead_max, dead_age_ms]
    opened, *cursor = await _OPEN(client, [k.fence, k.rollouts, k.tombstones], args)
    _fenced(k, opened != 0)
    return int(cursor[0])


async def advance(
    client: Any, k: PartitionKeys, *, token: str, version: int, min_useful: int
) -> None:
    """Write the trainer's version, and the oldest that is still useful."""
    _fenced(k, await _ADVANCE(client, [k.fence], [token, version, min_useful]) != 0)


async def submit(
    client: Any,
    k: PartitionKeys,
    *,
    token: str,
    limit: int,
    groups: Sequence[tuple[Submission, bytes]],
) -> tuple[list[Submitted], int]:
    """Put whole groups on the stream, in order; returns the state of each, and the outstanding samples.

    Args:
        client: Of Redis.
        k: The partition, where all groups live.
        token: The trainer's.
        limit: Training samples that may be outstanding in this partition; -1 for no limit.
        groups: What to submit, each with its encoded prompt.
    """
    states: list[Submitted] = []
    outstanding = 0
    for some in [*chunks(groups, room(fixed=6, each=10))] or [()]:
        keys: list[str] = [k.fence, k.ledger, k.marks, k.routes]
        args: list[Any] = [token, limit]
        for group, body in some:
            p = group.prompt
            keys += (k.prompts(p.route), k.group(p.group))
            args += (group.id, p.position if group.fed else -1, p.group, p.n, p.kind.value)
            args += (p.route, body, p.deadline_ms)
        reply = await _SUBMIT(client, keys, args)
        _fenced(k, reply[0] != -2)
        states += map(Submitted, reply[:-1])
        outstanding = int(reply[-1])
        if states[-1:] == [Submitted.FULL]:
            # No group may overtake one that did not fit.
            states += [Submitted.FULL] * (len(groups) - len(states))
            break
    return states, outstanding


async def cancel(
    client: Any, k: PartitionKeys, *, token: str, prompt: Prompt, reason: str, at_most: int
) -> int:
    """Settle members of a group that were not delivered yet; returns how many."""
    p = prompt
    keys = [k.fence, k.ledger, k.tombstones, k.group(p.group), k.prompts(p.route)]
    keys += [k.delayed(p.route), k.parked(p.route)]
    args = [token, p.group, reason, p.task, p.position, at_most]
    settled = int(await _CANCEL(client, keys, args))
    _fenced(k, settled != -2)
    return settled


async def settle(
    client: Any,
    k: PartitionKeys,
    *,
    token: str,
    verb: str,
    rollouts: Sequence[tuple[str, Kind, str]],
    groups: Sequence[str] = (),
    tombstones: Sequence[str] = (),
) -> int:
    """Give a verdict on rollouts, (entry, kind, payload suffix) each; returns how many changed state.

    Args:
        client: Of Redis.
        k: The partition.
        token: The trainer's.
        verb: ``train``, ``commit[:<which batch>]`` or ``drop:<reason>``.
        rollouts: What is judged.
        groups: Names of the groups of the rollouts; all verbs but ``train`` close them: their records
            go.
        tombstones: Entries of tombstones that go with them.
    """
    changed = 0
    for at in range(0, max(len(rollouts), len(groups), len(tombstones), 1), SETTLE_CHUNK):
        end = at + SETTLE_CHUNK
        r, g, t = rollouts[at:end], groups[at:end], tombstones[at:end]
        if verb == "train":
            g = groups[:TRAIN_GROUPS]  # they are only looked at
        keys = [k.fence, k.ledger, k.rollouts, k.tombstones, k.trained, k.tap, k.tapped]
        keys += [k.payload(suffix) for _, _, suffix in r] + [k.group(group) for group in g]
        args = [token, verb, len(r), len(g), len(t)]
        args += [entry for entry, _, _ in r] + [kind.value for _, kind, _ in r] + list(t)
        done = int(await _SETTLE(client, keys, args))
        _fenced(k, done != -2)
        changed += done
    return changed


async def untrain(
    client: Any, k: PartitionKeys, *, token: str, rollouts: Sequence[tuple[str, Kind]]
) -> int:
    """Owe rollouts, (entry, kind) each, to the trainer again; returns how many changed state."""
    changed = 0
    for some in chunks(rollouts, SETTLE_CHUNK):
        args: list[Any] = [token]
        for entry, kind in some:
            args += (entry, kind.value)
        done = int(await _UNTRAIN(client, [k.fence, k.ledger, k.trained], args))
        _fenced(k, done != -2)
        changed += done
    return changed


async def adopt(
    client: Any, k: PartitionKeys, *, token: str, consumer: str, stream: str
) -> list[str]:
    """Own all that is unsettled on one of the trainer's streams, whoever read it; returns the entries."""
    entries: list[str] = []
    last = "0-0"
    while True:
        reply = await _ADOPT(client, [k.fence, stream], [token, consumer, last, ADOPT_CHUNK])
        _fenced(k, reply[0] != -2)
        entries += [entry.decode() for entry in reply[1:]]
        if len(reply) <= ADOPT_CHUNK:
            return entries
        last = reply[0].decode()


async def mend(
    client: Any,
    k: PartitionKeys,
    *,
    token: str,
    group: str,
    route: str,
    body: bytes,
    task: str,
    position: int,
    holds: Mapping[int, str],
) -> list[Mended]:
    """Submit again, or close, the members of one group that are in no place any more.

    Args:
        client: Of Redis.
        k: The partition, where the group lives.
        token: The trainer's.
        group: Its name.
        route: Of its prompt.
        body: Its encoded prompt; empty: not known, so what has no entry left is closed.
        task: Of its prompt.
        position: Of its prompt.
        holds: Entries of rollouts that the trainer holds, by member.

    Returns:
        The state of each member; none if there is no record of the group.
    """
    keys = [k.fence, k.ledger, k.tombstones, k.group(group), k.prompts(route)]
    keys += [k.delayed(route), k.parked(route), k.rollouts]
    states: list[Mended] = []
    while True:
        first = len(states)
        args: list[Any] = [token, group, body, task, position, first, MEND_CHUNK]
        for index in range(first, first + MEND_CHUNK) if holds else ():
            if index in holds:
                args += (index, holds[index])
        n, *some = await _MEND(client, keys, args)
        _fenced(k, n != -2)
        states += map(Mended, some)
        if len(states) >= n or not some:
            return states


def _fenced(k: PartitionKeys, held: bool) -> None:
    if not held:
        raise SupersededError.of(k.run)
