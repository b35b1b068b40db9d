"""Scripts of a worker in one partition: each that gives a prompt away checks whose lease it is.

The trainer calls :func:`quarantine` too, on its own streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from redis.exceptions import NoScriptError

from rollfleet_common.codec import encode_header
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Header
from rollfleet_common.scripts.script import chunks, load, room

__all__ = [
    "Delivered",
    "Delivery",
    "Ended",
    "HandedBack",
    "Taken",
    "deliver",
    "due",
    "fail",
    "handback",
    "promote",
    "quarantine",
    "reap",
    "reclaim",
    "renew",
]

_DELIVER, _DUE, _FAIL, _HANDBACK = map(load, ("deliver", "due", "fail", "handback"))
_PROMOTE, _QUARANTINE, _REAP = map(load, ("promote", "quarantine", "reap"))
_RECLAIM, _RENEW = map(load, ("reclaim", "renew"))

#: How long a payload outlives a delivery that never came: it is persisted when its header is
#: written, and expires by itself if its worker lost the lease.
PAYLOAD_TTL_MS = 600_000
#: Leases, or delayed prompts, that one call moves.
LEASE_CHUNK = 1_000


class Delivered(IntEnum):
    """Outcome of one delivery."""

    YES = 1
    #: There is no such lease: delivered before (a lost reply), or cancelled.
    GONE = 0
    #: Another worker holds the lease now.
    STOLEN = -1
    #: The payload is not in Redis; the lease is still ours.
    NO_PAYLOAD = -2
    #: Too old to be trained on; closed with a tombstone.
    STALE = -3


@dataclass(frozen=True, slots=True)
class Delivery:
    """A finished episode: its header and the encoded payload."""

    header: Header
    payload: bytes


class Ended(IntEnum):
    """Outcome of ending a lease in failure."""

    #: The prompt waits for its next attempt.
    DELAYED = 1
    #: It has no next attempt.
    CLOSED = 2
    GONE = 0
    STOLEN = -1


class HandedBack(IntEnum):
    """Outcome of giving a lease back."""

    YES = 1
    GONE = 0
    #: The entry is of another group than the caller said; the lease is still ours.
    OTHER_GROUP = -1


class Taken(NamedTuple):
    """A lease that was taken over."""

    entry: str
    #: How often the prompt was delivered, this time included.
    deliveries: int
    fields: dict[bytes, bytes]
    #: The consumer that held it.
    owner: bytes


async def deliver(
    client: Any, k: PartitionKeys, *, consumer: str, items: Sequence[Delivery]
) -> list[Delivered]:
    """Publish rollouts and take their prompts off, in one round trip.

    Payloads do not pass through Lua: they are set ahead with a TTL, and the script persists
    those whose lease is still held. NX keeps a repeated call from putting the TTL back.
    """
    pipe = client.pipeline(transaction=False)
    calls: list[tuple[list[str], list[Any]]] = []
    for some in chunks(items, room(fixed=7, each=13)):
        keys: list[str] = [k.fence, k.ledger, k.rollouts, k.tombstones, k.tap, k.tapped]
        args: list[Any] = [consumer]
        for item in some:
            h = item.header
            payload = k.payload(h.payload)
            pipe.set(payload, item.payload, px=PAYLOAD_TTL_MS, nx=True)
            keys += (k.prompts(h.route), k.group(h.group), payload)
            args += (h.entry, h.index, h.kind.value, h.epoch, h.min_version, encode_header(h))
            args += (h.group, h.n, h.task, h.position)
        calls.append((keys, args))
    for keys, args in calls:
        _DELIVER.queue(pipe, keys, args)
    replies = await pipe.execute(raise_on_error=False)
    stored = len(items)
    for reply in replies[:stored]:
        if isinstance(reply, Exception):
            raise reply
    states: list[Delivered] = []
    for (keys, args), reply in zip(calls, replies[stored:], strict=True):
        if isinstance(reply, NoScriptError):
            reply = await _DELIVER(client, keys, args)  # noqa: PLW2901 - the same, sent again
        if isinstance(reply, Exception):
            raise reply
        states += map(Delivered, reply)
    return states


async def renew(
    client: Any, k: PartitionKeys, *, route: str, consumer: str, entries: Sequence[str]
) -> list[str]:
    """Renew leases of a route; returns the entries that are no longer `consumer`'s."""
    keys = [k.prompts(route)]
    lost: list[str] = []
    for some in chunks(entries, LEASE_CHUNK):
        lost += [entry.decode() for entry in await _RENEW(client, keys, [consumer, *some])]
    return lost


async def reclaim(
    client: Any,
    k: PartitionKeys,
    *,
    route: str,
    consumer: str,
    lease_ms: int,
    at_most: int,
    suspect_from: int,
    suspect_until: int,
    suspects: int,
) -> tuple[int, list[Taken]]:
    """Take over leases that were not renewed for `lease_ms`.

    Args:
        client: Of Redis.
        k: The partition.
        route: Of the prompts.
        consumer: Who takes them.
        lease_ms: Silence that ends a lease.
        at_most: Leases to take.
        suspect_from: Deliveries that make a suspect.
        suspect_until: Deliveries that end a prompt: it is no suspect any more.
        suspects: Suspects to take, at most.

    Returns:
        Suspects that were passed over, and what was taken.
    """
    args = [consumer, lease_ms, at_most, suspect_from, suspect_until, suspects]
    passed, *rows = await _RECLAIM(client, [k.prompts(route)], args)
    return int(passed), [
        Taken(
            entry.decode(),
            int(deliveries),
            dict(zip(flat[::2], flat[1::2], strict=True)),
            owner,
        )
        for entry, deliveries, flat, owner in rows
    ]


async def fail(
    client: Any,
    k: PartitionKeys,
    *,
    route: str,
    group: str,
    consumer: str,
    entry: str,
    delay_ms: int,
    record: str,
    task: str,
    position: int,
    kind: str,
) -> Ended:
    """End a lease without a rollout.

    Args:
        client: Of Redis.
        k: The partition.
        route: Of the prompt.
        group: Of the prompt.
        consumer: Whose lease it is.
        entry: Of the prompt.
        delay_ms: Until the next attempt; -1: no attempts left; -2: too stale to be tried again.
        record: Of this failure, one line of JSON.
        task: Of the prompt.
        position: Of the prompt.
        kind: Of the failure.
    """
    keys = [k.prompts(route), k.delayed(route), k.parked(route), k.dead, k.tombstones, k.ledger]
    keys += [k.group(group), k.fence]
    args = [consumer, entry, delay_ms, record, task, position, kind]
    return Ended(await _FAIL(client, keys, args))


async def due(
    client: Any, k: PartitionKeys, *, route: str, at_most: int
) -> tuple[list[bytes], int]:
    """Delayed prompts that are due, and ms until the next one is (0: some are; -1: none waits)."""
    wait_ms, *members = await _DUE(client, [k.delayed(route)], [at_most])
    return members, int(wait_ms)


async def promote(
    client: Any, k: PartitionKeys, *, route: str, members: Sequence[bytes]
) -> tuple[int, int]:
    """Put `members` that :func:`due` named back on the stream, if they still are due.

    Returns:
        How many were, and ms until the next one is (-1: none waits).
    """
    groups = k.group("").encode()
    promoted, wait_ms = 0, -1
    for some in chunks(members, LEASE_CHUNK):
        keys = [k.prompts(route), k.delayed(route), k.parked(route)]
        done, wait_ms = await _PROMOTE(
            client, [*keys, *(groups + _group_of(member) for member in some)], some
        )
        promoted += int(done)
    return promoted, int(wait_ms)


def _group_of(member: bytes) -> bytes:
    """The group that ``<group>:<index>`` names; none if it is no such name."""
    group, _, index = member.rpartition(b":")
    return group if index.isdigit() else b""


async def handback(
    client: Any,
    k: PartitionKeys,
    *,
    route: str,
    consumer: str,
    leases: Sequence[tuple[str, str]],
) -> list[HandedBack]:
    """Give leases, (entry, group) each, back untouched, claimable at once; returns the state of each."""
    states: list[HandedBack] = []
    for some in chunks(leases, LEASE_CHUNK):
        keys = [k.prompts(route), *(k.group(group) for _, group in some)]
        args = [consumer, *(entry for entry, _ in some)]
        states += map(HandedBack, await _HANDBACK(client, keys, args))
    return states


async def quarantine(
    client: Any, k: PartitionKeys, *, stream: str, group: str, entry: str, why: str
) -> bool:
    """Move an unreadable entry to the dead letters, off `stream` and its consumer `group`.

    Returns:
        Whether it was there.
    """
    keys = [stream, k.dead, k.ledger, k.fence]
    return bool(int(await _QUARANTINE(client, keys, [group, entry, why])))


async def reap(client: Any, k: PartitionKeys, *, route: str, idle_ms: int) -> int:
    """Forget consumers that hold nothing and were idle for `idle_ms`; returns how many."""
    return int(await _REAP(client, [k.prompts(route)], [idle_ms]))
