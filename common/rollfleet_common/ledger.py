"""The books of a run, read at one instant per partition, and the conservation law over them.

- Places (waiting, delayed, in flight, ready, handed out, trained) are counted in the structures
  that hold the prompts; totals (submitted, committed, dropped, dead) by the scripts that move them.
  No term is computed from the others, so the law can fail, and then says that something was lost.
- All counts are in samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollfleet_common.keys import PartitionKeys, route_names
from rollfleet_common.scripts import reads
from rollfleet_common.text import decoded, state_int

__all__ = ["Books", "read_books"]


@dataclass(slots=True)
class Books:
    """Where every submitted sample is."""

    submitted: int = 0
    #: On a prompts stream, unread.
    waiting: int = 0
    #: Parked until its next attempt.
    delayed: int = 0
    #: Leased to a worker.
    in_flight: int = 0
    #: Delivered, not yet read by the trainer.
    ready: int = 0
    #: Read by the trainer, not yet trained, committed or dropped.
    handed_out: int = 0
    #: Trained on, not yet committed.
    trained: int = 0
    committed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dead: int = 0
    #: Training samples that hold credit: submitted and not yet trained, dropped or dead.
    outstanding: int = 0
    #: Tombstones not yet taken in by the trainer, and letters among the dead.
    tombstones: int = 0
    dead_letters: int = 0
    #: Samples waiting, by route.
    waiting_by_route: dict[str, int] = field(default_factory=dict)
    #: Every counter as read, by name.
    counters: dict[str, int] = field(default_factory=dict)
    #: XLEN and XPENDING as read, by key.
    raw: dict[str, int] = field(default_factory=dict)

    @property
    def balance(self) -> int:
        """Samples that the books cannot place: 0, or something was lost (> 0) or doubled (< 0)."""
        placed = self.waiting + self.delayed + self.in_flight + self.ready + self.handed_out
        ended = self.trained + self.committed + sum(self.dropped.values()) + self.dead
        return self.submitted - placed - ended

    def __add__(self, other: "Books") -> "Books":
        total = Books()
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                merged = dict(mine)
                for key, value in theirs.items():
                    merged[key] = merged.get(key, 0) + value
                setattr(total, name, merged)
            else:
                setattr(total, name, mine + theirs)
        return total


async def read_books(client: Any, partitions: Sequence[PartitionKeys]) -> Books:
    """The books of a run: the sum over its partitions.

    Raises:
        CodecError: A counter is no number; the message names it.
    """
    total = Books()
    for keys in partitions:
        total += await _read_partition(client, keys)
    return total


async def _read_partition(client: Any, k: PartitionKeys) -> Books:
    routes = route_names(await client.smembers(k.routes))
    counts = await reads.ledger(client, k, routes=routes)
    counters = {
        decoded(name): state_int(k.ledger, decoded(name), count)
        for name, count in counts.counters.items()
    }
    books = Books(
        submitted=counters.get("submitted:train", 0) + counters.get("submitted:eval", 0),
        ready=counts.rollouts - counts.read,
        handed_out=counts.read - counts.trained,
        trained=counts.trained,
        committed=counters.get("committed", 0),
        dropped={k[8:]: v for k, v in counters.items() if k.startswith("dropped:")},
        dead=counters.get("dead", 0),
        outstanding=counters.get("submitted:train", 0) - counters.get("settled:train", 0),
        tombstones=counts.tombstones,
        dead_letters=counts.dead,
        counters=counters,
        raw={f"XLEN {k.rollouts}": counts.rollouts, f"XPENDING {k.rollouts}": counts.read},
    )
    for route, here in counts.routes.items():
        books.waiting += here.length - here.pending
        books.in_flight += here.pending
        books.delayed += here.delayed
        books.waiting_by_route[route] = here.length - here.pending
        books.raw[f"XLEN {k.prompts(route)}"] = here.length
        books.raw[f"XPENDING {k.prompts(route)}"] = here.pending
        books.raw[f"ZCARD {k.delayed(route)}"] = here.delayed
    return books
