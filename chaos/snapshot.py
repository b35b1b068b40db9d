"""Everything that stands in Redis when a run is over, read key by key as docs/wire.md writes them.

- Shares no code with the product: names and encodings are written out by hand.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import msgpack
import redis
import redis.exceptions

__all__ = ["Snapshot", "take"]

#: Suffixes of keys that live as long as their run.
PERMANENT = frozenset(
    {"board", "fence", "ledger", "marks", "news", "routes", "dead", "servers", "weights"}
)
#: Streams that stay, and must be empty.
STREAMS = ("prompts", "rollouts", "tombstones")

Member = tuple[str, int]


@dataclass(slots=True)
class Snapshot:
    """One run, one moment. Members are (group, index)."""

    ledger: dict[str, int] = field(default_factory=dict)
    #: Members by where they are: waiting, pending, delayed, ready, handed, dead.
    places: dict[str, list[Member]] = field(default_factory=dict)
    #: Samples in each place of the conservation law, counted off the structures.
    counts: dict[str, int] = field(default_factory=dict)
    #: Keys that should not be there any more, and how much they hold.
    leftovers: list[str] = field(default_factory=list)

    @property
    def balance(self) -> int:
        """Submitted less all the places a sample can be in: 0, or something was lost or made."""
        submitted = sum(v for k, v in self.ledger.items() if k.startswith("submitted:"))
        ended = sum(v for k, v in self.ledger.items() if k.startswith("dropped:"))
        ended += self.ledger.get("committed", 0) + self.ledger.get("dead", 0)
        return submitted - ended - sum(self.counts.values())

    def everywhere(self) -> set[Member]:
        """All members that still are in Redis."""
        return {member for members in self.places.values() for member in members}


def take(client: redis.Redis, run: str) -> Snapshot:
    """Read the run (one partition)."""
    shot = Snapshot()
    prefix = f"rf:{{{run}/0}}:"
    raw: Any = client.hgetall(f"{prefix}ledger")
    shot.ledger = {name.decode(): int(value) for name, value in raw.items()}
    keys: list[bytes] = []
    for pattern in (f"rf:{{{run}}}:*", f"rf:{{{run}/*"):
        keys += list(client.scan_iter(match=pattern, count=1000))
    for key in sorted(keys):
        name = key.decode()
        suffix = name.partition("}:")[2]
        head = suffix.partition(":")[0]
        if head in STREAMS:
            _stream(client, shot, name, head)
        elif head == "delayed":
            members: Any = client.zrange(name, 0, -1)
            shot.places.setdefault("delayed", []).extend(map(_member, members))
            _count(shot, "delayed", len(members))
        elif head == "trained":
            _count(shot, "handed", 0)  # they are pending on the rollouts stream as well
        if head == "dead":
            rows: Any = client.xrange(name)
            shot.places["dead"] = [
                (f[b"g"].decode(), int(f[b"i"])) for _, f in rows if b"g" in f and b"i" in f
            ]
        if head in STREAMS:
            if size := client.xlen(name):
                shot.leftovers.append(f"{suffix}: {size} entries")
        elif head not in PERMANENT and client.ttl(name) == -1:
            shot.leftovers.append(f"{suffix}: no TTL")
    return shot


def _stream(client: redis.Redis, shot: Snapshot, name: str, head: str) -> None:
    rows: Any = client.xrange(name)
    group = "workers" if head == "prompts" else "trainer"
    pending = 0
    with contextlib.suppress(redis.exceptions.ResponseError):  # no group was made yet
        summary: Any = client.xpending(name, group)
        pending = summary["pending"]
    if head == "prompts":
        shot.places["prompts"] = [(f[b"g"].decode(), int(f[b"i"])) for _, f in rows]
        _count(shot, "waiting", len(rows) - pending)
        _count(shot, "in flight", pending)
    elif head == "rollouts":
        headers = [msgpack.unpackb(f[b"h"]) for _, f in rows]
        shot.places["rollouts"] = [(h[1], h[2]) for h in headers]
        _count(shot, "ready", len(rows) - pending)
        _count(shot, "handed", pending)


def _count(shot: Snapshot, place: str, number: int) -> None:
    shot.counts[place] = shot.counts.get(place, 0) + number


def _member(raw: bytes) -> Member:
    group, _, index = raw.decode().rpartition(":")
    return group, int(index)
