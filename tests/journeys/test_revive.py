"""A Redis that forgot: all of the run, a few of its groups, or the last version."""

from collections import Counter
from typing import Any

import msgpack
import pytest
import redis
from fixtures.fleet_processes import Processes
from fixtures.rig import delivery_of
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.redis import connect
from rollfleet_common.streams import Delivered, Streams

SHAPE: dict[str, Any] = {
    "samples_per_version": 8,
    "group_size": 4,
    "max_staleness": 2,
    "starve_s": 30.0,
    "lease_s": 1.0,
}


def train(fleet: rollfleet.Fleet, seen: Counter[tuple[str, int]], steps: int | None = None) -> None:
    for batch in fleet.batches(steps):
        seen.update((r.header.group, r.header.index) for r in batch.rollouts)


def test_a_flushed_run_is_opened_anew_and_nothing_that_was_out_is_lost(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "flush")
    seen: Counter[tuple[str, int]] = Counter()
    with rollfleet.connect(redis_url, run="flush", **SHAPE) as fleet:
        fleet.feed({"token_ids": [1, 2, 3]} for _ in range(30))
        train(fleet, seen, steps=4)
        with redis.Redis.from_url(redis_url) as raw:
            raw.flushall()
        train(fleet, seen)
        assert seen == {(f"p{g}", i): 1 for g in range(30) for i in range(4)}
        assert fleet.books().balance == 0
        assert fleet.aio.epoch == 2


@pytest.mark.leaves_keys("no worker takes the prompts")
def test_another_trainer_is_not_mistaken_for_a_flush(redis_url: str) -> None:
    with (
        rollfleet.connect(redis_url, run="two", **SHAPE) as first,
        rollfleet.connect(redis_url, run="two", take_over=True, **SHAPE) as second,
    ):
        with pytest.raises(rollfleet.SupersededError, match="another trainer"):
            first.submit([1, 2, 3])
        second.submit([1, 2, 3])
        assert second.books().submitted == 4


@pytest.mark.leaves_keys("no worker takes the prompts")
def test_groups_of_the_last_second_are_sent_again_after_an_outage(redis_url: str) -> None:
    """As after an AOF that lost its tail: the entries, the record and the counters are gone."""
    with rollfleet.connect(redis_url, run="tail", **SHAPE) as fleet:
        kept = fleet.submit([1, 2, 3])
        with redis.Redis.from_url(redis_url) as raw:
            saved = {
                key: raw.dump(key) for key in raw.keys("rf:{tail/0}*") + raw.keys("rf:{tail}:b*")
            }
            lost = fleet.submit([1, 2, 3])
            fleet.publish(7)
            pipe = raw.pipeline(transaction=True)
            for key in raw.keys("rf:{tail/0}*"):
                pipe.delete(key)
            for key, value in saved.items():
                pipe.restore(key, 0, value, replace=True)
            pipe.execute()
            assert fleet.books().submitted == 4
            fleet.aio.line.suspect = True  # what any failed call leaves behind

            def back() -> bool:
                books = fleet.books()
                return (books.submitted, books.waiting, books.balance) == (8, 8, 0)

            wait_until(back, "the lost group is submitted again")
            assert raw.exists(f"rf:{{tail/0}}:group:{kept}", f"rf:{{tail/0}}:group:{lost}") == 2
            assert raw.hget("rf:{tail}:board", "version") == b"7"


@pytest.mark.leaves_keys("no worker takes the prompts")
def test_an_outage_that_lost_nothing_sends_nothing_again(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="calm", **SHAPE) as fleet:
        fleet.submit([1, 2, 3])
        fleet.aio.line.suspect = True
        wait_until(lambda: not fleet.aio.line.suspect, "the trainer looked")
        wait_until(lambda: not fleet.aio.reviver._lock.locked(), "the look is over")
        assert fleet.books().submitted == 4


async def test_a_header_of_another_release_is_counted_and_its_group_closes(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolling deploy: what a worker of another wire version brought is dropped, not lost."""
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="mixed", **SHAPE)
    client = connect(redis_url, role="test")
    streams = Streams(client, PartitionKeys("mixed", 0))
    async with client, rollfleet.AsyncFleet(settings) as fleet:
        await fleet.submit({"token_ids": [1], "n": 2})
        await streams.make_groups(["default"])
        claims, _ = await streams.claim(client, "w", ["default"], 2, None)
        deliveries = [delivery_of(claim) for claim in claims]
        with monkeypatch.context() as release_99:
            # The reader of this release cannot tell what release 99 wrote.
            release_99.setattr(
                "rollfleet_common.scripts.worker.encode_header", lambda _: msgpack.packb([99, "?"])
            )
            assert await streams.deliver("w", deliveries[:1]) == [Delivered.YES]
        assert await streams.deliver("w", deliveries[1:]) == [Delivered.YES]

        async def over() -> bool:
            books = await fleet.books()
            return books.dropped == {"undecodable": 1, "torn": 1}

        await wait_until_async(over, "both are dropped")
        books = await fleet.books()
        assert (books.balance, books.outstanding, books.counters.get("garbage", 0)) == (0, 0, 0)
        assert [key async for key in client.scan_iter("rf:{mixed/0}:payload:*")] == []
