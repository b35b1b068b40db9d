"""Prompts and rollouts that vanish under a run are submitted again, or closed; nothing doubles."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fixtures.by_hand import ByHand, by_hand
from fixtures.rig import delivery_of
from support import wait_until_async

import rollfleet
from rollfleet_common.ledger import read_books
from rollfleet_common.streams import Delivered

pytestmark = pytest.mark.leaves_keys("dead letters", "rf:*:dead")


@asynccontextmanager
async def running(redis_url: str, run: str, **settings: Any) -> AsyncIterator[ByHand]:
    async with by_hand(redis_url, run, lease_s=1, **settings) as hand:
        yield hand


async def again(hand: ByHand, samples: int) -> list[Any]:
    """Claims of as many samples, once they are there."""
    claims: list[Any] = []

    async def come() -> bool:
        claims.extend(await hand.claim())
        return len(claims) >= samples

    await wait_until_async(come, f"{samples} samples are there again", 20)
    assert len(claims) == samples
    return claims


async def trained(hand: ByHand, samples: int) -> None:
    """A batch of all comes, once, and the books close."""
    batch = await hand.next(samples)
    assert len({(r.header.group, r.header.index) for r in batch.rollouts}) == samples
    await hand.fleet.commit(batch)
    books = await hand.balanced()
    assert (books.committed, books.outstanding, books.submitted) == (samples, 0, samples)


async def test_prompts_of_a_deleted_consumer_run_again_and_its_late_rollouts_are_refused(
    redis_url: str,
) -> None:
    async with running(redis_url, "delconsumer") as hand:
        await hand.fleet.submit({"token_ids": [1], "n": 4})
        old = await hand.claim()
        stream = hand.streams.keys.prompts("default")
        await hand.client.xgroup_delconsumer(stream, "workers", "w")
        new = await again(hand, 4)
        assert {c.entry for c in new}.isdisjoint(c.entry for c in old)
        said = await hand.streams.deliver("w", [delivery_of(c, nonce="late") for c in old])
        assert said == [Delivered.GONE] * 4
        await hand.deliver([delivery_of(c) for c in new])
        said = await hand.streams.deliver("w", [delivery_of(c, nonce="later") for c in old])
        assert said == [Delivered.GONE] * 4
        await trained(hand, 4)


async def test_a_worker_that_delivers_on_while_its_consumer_is_deleted_doubles_nothing(
    redis_url: str,
) -> None:
    async with running(redis_url, "race") as hand:
        names = [await hand.fleet.submit({"token_ids": [1], "n": 4}) for _ in range(4)]
        claims = await hand.claim()
        stream = hand.streams.keys.prompts("default")
        stop, busy = asyncio.Event(), set(names)

        async def work() -> None:
            left = claims
            while not stop.is_set():
                for claim in left:
                    await hand.streams.deliver("w", [delivery_of(claim)])
                    if claim.index == 1:
                        await hand.client.xgroup_delconsumer(stream, "workers", "w")
                left = await hand.claim()
                await asyncio.sleep(0.05)

        worker = asyncio.create_task(work())
        batch = await hand.next(8)
        await hand.fleet.commit(batch)
        second = await hand.next(8)
        await hand.fleet.commit(second)
        stop.set()
        await worker
        assert {r.header.group for r in [*batch.rollouts, *second.rollouts]} == busy
        books = await hand.balanced()
        assert (books.committed, books.submitted, books.outstanding) == (16, 16, 0)


@pytest.mark.parametrize("how", ["xdel", "xtrim", "del", "delayed"])
async def test_deleted_prompts_are_submitted_again(redis_url: str, how: str) -> None:
    async with running(redis_url, f"gone-{how}") as hand:
        await hand.fleet.submit({"token_ids": [1], "n": 4})
        stream, client = hand.streams.keys.prompts("default"), hand.client
        if how == "xdel":
            await client.xdel(stream, (await client.xrange(stream))[2][0])
        elif how == "xtrim":
            await client.xtrim(stream, maxlen=1, approximate=False)
        elif how == "del":
            await client.delete(stream)
        else:
            entry = (await client.xrange(stream))[0][0]
            await client.xdel(stream, entry)
            (name,) = hand.fleet._out
            await client.hset(hand.streams.keys.group(name), "0", "d")
        claims = await again(hand, 4)
        assert sorted(c.index for c in claims) == [0, 1, 2, 3]
        await hand.deliver([delivery_of(c) for c in claims])
        await trained(hand, 4)


@pytest.mark.parametrize("members", [2, 4])
async def test_rollouts_whose_header_vanished_are_made_again(redis_url: str, members: int) -> None:
    """Of a group that is open, and of one that is ready."""
    async with running(redis_url, f"header-{members}") as hand:
        name = await hand.fleet.submit({"token_ids": [1], "n": 4})
        claims = await hand.claim()
        await hand.streams.deliver("w", [delivery_of(c) for c in claims[:members]])
        consumer = hand.fleet.consumer

        def arrived() -> bool:
            group = consumer.groups.open.get(name) or consumer.ready.get(name)
            return group is not None and len(group.members) == members

        await wait_until_async(arrived, "they arrived")
        rollouts = hand.streams.keys.rollouts
        rows = await hand.client.xrange(rollouts)
        lost = [entry for entry, _ in rows[:2]]
        await hand.client.xack(rollouts, "trainer", *lost)
        await hand.client.xdel(rollouts, *lost)
        fresh = await again(hand, 2)
        assert sorted(c.index for c in fresh) == [0, 1]
        rest = [delivery_of(c) for c in claims[members:]]
        await hand.deliver([*(delivery_of(c, nonce="again") for c in fresh), *rest])
        await trained(hand, 4)


async def test_a_deleted_rollouts_stream_is_read_again_when_it_is_back(redis_url: str) -> None:
    async with running(redis_url, "no-stream") as hand:
        await hand.fleet.submit({"token_ids": [1], "n": 4})
        claims = await hand.claim()
        await hand.client.delete(hand.streams.keys.rollouts)
        await hand.deliver([delivery_of(c) for c in claims])
        await trained(hand, 4)


async def test_what_an_earlier_trainer_submitted_is_closed(redis_url: str) -> None:
    settings = rollfleet.TrainerSettings(
        redis_url=redis_url, run="earlier", samples_per_version=8, group_size=4, lease_s=1
    )
    async with rollfleet.AsyncFleet(settings) as first:
        await first.submit({"token_ids": [1], "n": 4})
    async with running(redis_url, "earlier") as hand:
        stream = hand.streams.keys.prompts("default")
        await hand.client.xtrim(stream, maxlen=0, approximate=False)

        async def closed() -> bool:
            books = await hand.fleet.books()
            return books.dropped == {"vanished": 4} and books.outstanding == 0

        await wait_until_async(closed, "the group closes", 20)
        await hand.balanced()
        assert not hand.fleet.consumer.groups.open
        group = hand.streams.keys.group("p0")
        await wait_until_async(lambda: _gone(hand.client, group), "its record is freed")


async def _gone(client: Any, key: str) -> bool:
    return not await client.exists(key)


async def test_a_forged_header_keeps_no_feed_from_ending(redis_url: str) -> None:
    async with running(redis_url, "forged") as hand:
        hand.fleet.feed([{"token_ids": [1], "n": 4}])
        claims: list[Any] = await again(hand, 4)
        forged = delivery_of(claims[0])
        header = replace(forged.header, group="nobodys", n=2, index=0)
        from rollfleet_common.codec import encode_header  # noqa: PLC0415

        await hand.client.xadd(hand.streams.keys.rollouts, {"h": encode_header(header)})
        await hand.deliver([delivery_of(c) for c in claims])
        batch = await hand.next()
        await hand.fleet.commit(batch)
        assert await hand.fleet.next_batch(timeout_s=10) is None

        async def balanced() -> bool:
            books = await read_books(hand.client, [hand.streams.keys])
            return books.balance == 0 and books.counters.get("garbage") == 1

        await wait_until_async(balanced, "the stray is put aside", 20)


async def test_it_is_said_while_it_lasts(redis_url: str) -> None:
    async with by_hand(redis_url, "said", lease_s=1) as hand:
        await hand.fleet.submit({"token_ids": [1], "n": 4})
        watch = hand.fleet.watch

        async def nothing(**_: Any) -> tuple[int, int]:
            return 0, 0

        watch.reconciler.mend = nothing  # type: ignore[method-assign]
        await hand.client.xtrim(hand.streams.keys.prompts("default"), maxlen=1, approximate=False)

        async def told() -> bool:
            return "unbalanced" in [cause.code for cause in await hand.fleet.causes()]

        await wait_until_async(told, "the cause is told", 20)
        assert "3 samples are in no place" in await hand.fleet.reason()


async def test_a_rollout_that_the_trainer_holds_counts_whatever_the_record_says(
    redis_url: str,
) -> None:
    async with running(redis_url, "held") as hand:
        name = await hand.fleet.submit({"token_ids": [1], "n": 4})
        await hand.fleet.submit({"token_ids": [1], "n": 4})
        claims = await hand.claim()
        first, second = claims[:4], claims[4:]
        await hand.deliver([delivery_of(c) for c in first])
        await hand.client.hset(hand.streams.keys.group(name), "0", "r1-1")
        assert await hand.fleet.watch.reconciler.mend(strangers=True) == (0, 0)
        await hand.deliver([delivery_of(c) for c in second])
        await trained(hand, 8)
