"""A run in whose streams somebody else writes: the run goes on, and says so."""

import asyncio
from typing import Any

import pytest
from fixtures.fleet_processes import Processes
from fixtures.servers import MakeServer
from support import wait_until

import rollfleet
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect, connect_sync
from rollfleet_console.doctor.streams import mend

SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 2, "starve_s": 40.0}
LAST = "18446744073709551615-18446744073709551615"
PART = RunKeys("foreign").partition(0)
#: Entries whose plain fields are almost ours.
ROLLOUTS: list[dict[bytes, bytes]] = [
    {b"h": b"\xc1", b"g": b"x", b"i": b"0", b"n": b"1", b"k": b"train", b"p": b"\xff"},
    {b"h": b"\xc1", b"g": b"\xff", b"i": b"0", b"n": b"1", b"k": b"train", b"p": b"p"},
    {b"h": b"\xc1", b"g": b"p0", b"i": b"9" * 4000, b"n": b"9" * 4000, b"k": b"eval", b"p": b"p"},
    {b"h": b"\xc1", b"g": b"p1", b"i": b"0", b"n": b"1", b"k": b"train", b"p": b"1-1:x"},
    {b"\xff": b"\xff"},
]
TOMBSTONES: list[dict[bytes, bytes]] = [
    {
        b"g": b"\xff",
        b"i": b"0",
        b"n": b"1",
        b"k": b"train",
        b"t": b"",
        b"r": b"",
        b"e": b"",
        b"p": b"0",
    },
    {
        b"g": b"x",
        b"i": b"0",
        b"n": b"9" * 99,
        b"k": b"\xff",
        b"t": b"",
        b"r": b"",
        b"e": b"",
        b"p": b"0",
    },
    {b"x": b"y"},
]
PROMPTS: list[dict[bytes, bytes]] = [
    {
        b"g": b"\xff",
        b"i": b"1_0",
        b"a": b"-1",
        b"k": b"\xff",
        b"n": b"nan",
        b"d": b"\xc1",
        b"e": b"[",
    },
    {b"x": b"y"},
]


async def mended(url: str) -> list[tuple[str, int]]:
    async with connect(url, role="test") as client:
        return await mend(client, "foreign")


def plant(client: Any) -> int:
    for stream, entries in (
        (PART.rollouts, ROLLOUTS),
        (PART.tombstones, TOMBSTONES),
        (PART.prompts("default"), PROMPTS),
    ):
        for entry in entries:
            client.xadd(stream, entry)
    return len(ROLLOUTS) + len(TOMBSTONES) + len(PROMPTS)


@pytest.mark.leaves_keys("the garbage is kept as dead letters", "rf:*")
def test_a_run_goes_on_and_so_does_the_next_trainer(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "foreign", "Slow")
    planted = 0
    with connect_sync(redis_url, role="test") as client:
        for prompts in (4, 8):
            with rollfleet.connect(redis_url, run="foreign", max_staleness=4, **SHAPE) as fleet:
                planted += plant(client)
                fleet.feed({"token_ids": [1], "answer": 1.0} for _ in range(prompts))
                seen = [group.name for batch in fleet.batches() for group in batch.groups]
                assert len(seen) == 4
                wait_until(
                    lambda wanted=planted: fleet.books().counters.get("garbage") == wanted,  # type: ignore[misc]
                    "all of it was put aside and counted",
                )
                books = fleet.books()
                assert (books.balance, books.outstanding, books.committed) == (0, 0, 2 * prompts)
            planted += plant(client)  # the next trainer finds it when it opens the run
    assert worker.stop() == 0


@pytest.mark.leaves_keys("of a run that was not committed", "rf:*")
def test_a_stream_of_no_more_ids_is_said_and_waited_out(
    make_server: MakeServer, processes: Processes
) -> None:
    """Honest prompts are charged nothing: they are delivered once an operator has seen to it."""
    url = make_server().url
    with (
        connect_sync(url, role="test") as client,
        rollfleet.connect(url, run="foreign", max_staleness=4, **SHAPE) as fleet,
    ):
        client.xadd(PART.rollouts, {"x": "y"}, id=LAST)
        worker = processes.worker(url, "foreign", "Slow", lease_s=1)
        fleet.feed({"token_ids": [1], "answer": 1.0} for _ in range(4))
        said = worker.event("redis is away")
        assert "rollfleet doctor" in said["error"]
        wait_until(lambda: fleet.books().counters.get("garbage") == 1, "the entry was put aside")
        assert all(client.pttl(key) > 0 for key in client.scan_iter(match="*payload*"))
        assert asyncio.run(mended(url)) == [(PART.rollouts, 0)]
        batch = fleet.next_batch()
        assert batch is not None
        books = fleet.books()
        assert not {
            name: n for name, n in books.counters.items() if "dead" in name or "retr" in name
        }
        assert books.balance == 0
