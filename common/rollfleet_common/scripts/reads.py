"""Scripts that only read: each looks at one partition, or one key, at one instant."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rollfleet_common.keys import PartitionKeys
from rollfleet_common.scripts.script import chunks, load, room

__all__ = [
    "PartitionCounts",
    "RouteCounts",
    "RouteView",
    "Told",
    "ledger",
    "route",
    "there",
    "told",
]

_LEDGER, _ROUTE, _THERE, _TOLD = map(load, ("ledger", "route", "there", "told"))

#: Entries or fields that one call of `there` looks for: each may hold a megabyte, which Redis copies, and
#: does nothing else meanwhile.
THERE_CHUNK = 50


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """How many prompts of one route are where."""

    #: On the stream, read or not; and leased.
    length: int
    pending: int
    delayed: int


@dataclass(slots=True)
class PartitionCounts:
    """How many samples of one partition are where, and its counters."""

    #: As Redis holds them, by name.
    counters: dict[bytes, bytes]
    #: On the stream of rollouts, read or not; and read.
    rollouts: int
    read: int
    tombstones: int
    trained: int
    dead: int
    routes: dict[str, RouteCounts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RouteView:
    """One route of one partition."""

    length: int
    pending: int
    delayed: int
    #: The oldest entry that is leased, and the oldest that is unread; empty: there is none.
    oldest_pending: bytes
    oldest_unread: bytes
    #: When the first delayed prompt is due, in Unix ms; None: none waits.
    due_ms: float | None
    #: Leases by consumer.
    holders: dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Told:
    """What the tap of a partition told."""

    entries: list[tuple[bytes, dict[bytes, bytes]]]
    #: Entries that were ever added, and that are there.
    added: int
    length: int


async def ledger(client: Any, k: PartitionKeys, *, routes: Sequence[str]) -> PartitionCounts:
    """The books of one partition at one instant.

    Routes that do not fit in one call (about 1,900 do) are read a moment after the rest.
    """
    size = room(fixed=6, each=2)
    keys = [k.ledger, k.rollouts, k.tombstones, k.trained, k.dead, k.fence]
    counts: PartitionCounts | None = None
    for some in [routes[:size], *chunks(routes[size:], size)]:
        names = [name for route in some for name in (k.prompts(route), k.delayed(route))]
        reply = await _LEDGER(client, keys + names, [])
        if counts is None:
            counters, *sizes = reply[:6]
            counts = PartitionCounts(_pairs(counters), *sizes)
        for at, name in enumerate(some):
            counts.routes[name] = RouteCounts(*reply[7 + 3 * at : 10 + 3 * at])
    assert counts is not None  # noqa: S101 - the first row is always asked for
    return counts


async def route(client: Any, k: PartitionKeys, *, route: str) -> RouteView:
    """One route of a partition at one instant."""
    length, pending, held, unread, delayed, due, holders = await _ROUTE(
        client, [k.prompts(route), k.delayed(route)], []
    )
    leases = {name: int(count) for name, count in _pairs(holders).items()}
    due_ms = float(due) if due else None
    return RouteView(int(length), int(pending), int(delayed), held, unread, due_ms, leases)


async def there(
    client: Any, *, key: str, kind: Literal["stream", "hash"], things: Sequence[str]
) -> list[bool]:
    """Whether entries are on a stream, or fields in a hash, without sending what they hold."""
    found: list[bool] = []
    for some in chunks(things, THERE_CHUNK):
        found += map(bool, await _THERE(client, [key], [kind, *some]))
    return found


async def told(client: Any, k: PartitionKeys, *, after: str, at_most: int) -> Told:
    """What the tap told after an entry, and how much it ever did."""
    rows, added, length = await _TOLD(client, [k.tapped], [after, at_most])
    return Told([(entry, _pairs(flat)) for entry, flat in rows], int(added), int(length))


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
