"""Batches that are prepared while the trainer computes: what is gained, and that nothing is risked."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fixtures.by_hand import ByHand, by_hand, members, spanning
from fixtures.rig import delivery_of
from support import wait_until_async

import rollfleet
from rollfleet.policy.policies import BasePolicy, Mask
from rollfleet.tensors.collate import collate
from rollfleet_common.errors import PolicyError, StarvedError
from rollfleet_common.messages import Rollout


def groups_of(batch: rollfleet.Batch) -> list[str]:
    return [group.name for group in batch.groups]


async def refuse(names: Sequence[str]) -> list[bytes | None]:
    raise AssertionError(f"{len(names)} payloads fetched while the trainer waited")


# ---- what is gained ----------------------------------------------------------------------------


async def test_the_next_batch_is_there_before_it_is_asked_for(redis_url: str) -> None:
    async with by_hand(redis_url, "ahead", samples_per_version=16, batch_size=8) as hand:
        await hand.groups(4)
        first = await hand.next()
        assert first.tensors.rows == 8
        await hand.prepared(2)
        await hand.made()
        ready = (await hand.balanced()).counters
        hand.fleet.streams[0].fetch = refuse  # type: ignore[method-assign]
        second = await hand.next()
        assert (first.stats["rollfleet/prefetched"], second.stats["rollfleet/prefetched"]) == (0, 1)
        assert second.ahead is not None
        assert second.ahead.done()
        ahead = second.ahead.result().batch
        assert second.tensors is ahead
        assert second.ahead is None, "kept once"
        again = collate(second.rollouts)
        assert torch.equal(ahead.input_ids, again.input_ids)
        assert ahead.headers == again.headers
        assert not set(members(first)) & set(members(second))
        assert ready == (await hand.balanced()).counters, "handing out moves nothing in the books"


async def test_groups_are_loaded_as_they_come(redis_url: str) -> None:
    """Also those of a batch that is not whole yet."""
    async with by_hand(redis_url, "trickle", samples_per_version=16, batch_size=8) as hand:
        await hand.groups(2)
        await hand.next()
        (name,) = await hand.groups(1)
        payloads = hand.fleet.payloads
        ready = hand.fleet.consumer.ready
        await wait_until_async(lambda: payloads.holds(ready[name]), "half a batch is loaded")
        assert hand.fleet.gather.ahead.groups == [], "and nothing is cut of it"
        del hand.fetched[:]
        await hand.groups(1)
        await hand.next()
        assert len(hand.fetched) == 4


async def test_as_many_batches_as_were_asked_for_and_no_more(redis_url: str) -> None:
    async with by_hand(redis_url, "deep", samples_per_version=32, batch_size=8, prefetch=2) as hand:
        await hand.groups(8)
        await hand.next()
        await hand.prepared(4)
        assert len(hand.fetched) == 3 * 8
        first, second = (await hand.next(), await hand.next())
        assert first.stats["rollfleet/prefetched"] == second.stats["rollfleet/prefetched"] == 1


async def test_none_if_none_is_wanted(redis_url: str) -> None:
    async with by_hand(redis_url, "off", samples_per_version=16, batch_size=8, prefetch=0) as hand:
        await hand.groups(4)
        await hand.next()
        assert not [t for t in asyncio.all_tasks() if t.get_name() == "rollfleet-prefetch"]
        batch = await hand.next()
        assert batch.stats["rollfleet/prefetched"] == 0
        assert len(hand.fetched) == 16


async def test_a_batch_of_another_size_takes_what_fits(redis_url: str) -> None:
    async with by_hand(redis_url, "sizes", samples_per_version=16, batch_size=8) as hand:
        await hand.groups(5)
        await hand.next()
        await hand.prepared(2)
        batch = await hand.next(4)
        assert (len(batch), batch.stats["rollfleet/prefetched"]) == (4, 1)
        batch = await hand.next(8)
        assert (len(batch), batch.stats["rollfleet/prefetched"]) == (8, 0.5)


async def test_a_smaller_last_batch_is_prepared_too(redis_url: str) -> None:
    async with by_hand(redis_url, "last", samples_per_version=32, batch_size=8) as hand:
        hand.fleet.feed([{"token_ids": [1]}] * 3)
        await wait_until_async(lambda: hand.fleet.submitter.fed, "all is submitted")
        await hand.deliver([delivery_of(claim) for claim in await hand.claim()])
        first = await hand.next()
        assert first.tensors.rows == 8
        await hand.fleet.commit(first)
        hand.fleet.consumer.news.set()
        await hand.made()
        last = await hand.next()
        assert (len(last), last.stats["rollfleet/prefetched"]) == (4, 1)
        assert last.tensors.rows == 4
        await hand.fleet.commit(last)
        assert await hand.fleet.next_batch(timeout_s=10) is None
        assert (await hand.balanced()).outstanding == 0


# ---- fresh at hand-over ------------------------------------------------------------------------


async def test_what_became_stale_while_prepared_is_not_trained_on(redis_url: str) -> None:
    async with by_hand(
        redis_url, "stale", samples_per_version=16, batch_size=8, max_staleness=0
    ) as hand:
        await hand.groups(4)
        first = await hand.next()
        assert first.tensors.rows == 8
        await hand.prepared(2)
        await hand.made()
        await hand.fleet.commit(first)
        await hand.fleet.publish()
        fresh = await hand.groups(2)
        await hand.prepared(fresh)
        assert hand.fleet.payloads.samples == 8, "what will not be handed over is let go of"
        second = await hand.next()
        assert groups_of(second) == fresh
        assert (second.version, second.staleness) == (1, [0] * 8)
        assert second.tensors.versions.max() == 1
        assert (await hand.balanced()).dropped == {"stale": 8}


async def test_what_is_left_of_a_stale_batch_is_not_loaded_again(redis_url: str) -> None:
    async with by_hand(
        redis_url, "half", samples_per_version=32, batch_size=8, max_staleness=1, version=1
    ) as hand:
        await hand.groups(2)
        await hand.next()
        (old,) = await hand.groups(1, version=0)
        (young,) = await hand.groups(1, version=1)
        await hand.prepared(2)
        del hand.fetched[:]
        await hand.fleet.publish()
        (new,) = await hand.groups(1)
        batch = await hand.next()
        assert groups_of(batch) == [young, new]
        assert len(hand.fetched) == 4
        assert batch.tensors.headers == tuple(r.header for r in batch.rollouts)
        assert (await hand.balanced()).dropped == {"stale": 4}
        assert old not in hand.fleet.consumer.ready


async def test_what_will_be_stale_when_its_turn_comes_is_not_prepared(redis_url: str) -> None:
    """A publish is due before the next batch: by then it would be too old, and loaded for nothing."""
    async with by_hand(redis_url, "due", max_staleness=1, version=1) as hand:
        await hand.groups(2)
        first = await hand.next()
        del hand.fetched[:]
        (old,) = await hand.groups(1, version=0)
        (young,) = await hand.groups(1)
        payloads, ready = hand.fleet.payloads, hand.fleet.consumer.ready
        await wait_until_async(lambda: payloads.holds(ready[young]), "what will be fresh is loaded")
        await hand.fleet.commit(first)
        await hand.fleet.publish()
        (new,) = await hand.groups(1)
        assert groups_of(await hand.next()) == [young, new]
        assert len(hand.fetched) == 8
        assert old not in ready
        assert (await hand.balanced()).dropped == {"stale": 4}


async def test_a_late_group_goes_first_if_it_would_be_lost_otherwise(redis_url: str) -> None:
    async with by_hand(
        redis_url, "late", samples_per_version=64, batch_size=8, max_staleness=2, version=2
    ) as hand:
        await hand.groups(2)
        await hand.next()
        cut = await hand.groups(2)
        await hand.prepared(2)
        (older,) = await hand.groups(1, version=1)
        assert groups_of(await hand.next()) == cut, "a batch goes as it was cut"
        (next_one,) = await hand.groups(1)
        await hand.prepared(2)
        (last_turn,) = await hand.groups(1, version=0)
        assert groups_of(await hand.next()) == [last_turn, older]
        await hand.groups(1)
        assert groups_of(await hand.next())[0] == next_one


async def test_a_mask_is_cut_at_the_version_of_the_hand_over(redis_url: str) -> None:
    asked: list[int] = []

    class Watched(Mask):
        def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
            asked.append(current)
            return super().refine(rollouts, current)

    policy = Watched(1, min_share=0.25)
    shape: dict[str, Any] = {
        "samples_per_version": 32,
        "batch_size": 8,
        "max_staleness": 1,
        "version": 1,
    }
    async with by_hand(redis_url, "mask", policy=policy, **shape) as hand:
        await hand.groups(2)
        first = await hand.next()
        assert first.tensors.loss_mask.sum() == 8 * 4
        for _ in range(2):
            await hand.fleet.submit({"token_ids": [1]})
        await hand.deliver([spanning(c, [(2, 0), (3, 1)]) for c in await hand.claim()])
        await hand.prepared(2)
        assert asked == [1, 1], "only what was handed over"
        await hand.fleet.publish()
        second = await hand.next()
        assert asked == [1, 1, 2, 2]
        assert second.stats["rollfleet/prefetched"] == 1
        kept = second.tensors.versions[second.tensors.loss_mask]
        assert kept.tolist() == [1] * (8 * 3), "version 0 is two behind"


def test_which_policies_refine_by_version() -> None:
    class Own(BasePolicy):
        def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
            return rollouts

    class Said(Own):
        refines_by_version = False

    found = {
        name: rollfleet.AsyncFleet(
            rollfleet.TrainerSettings(policy=name)  # type: ignore[arg-type]
        ).policy.by_version
        for name in ("drop", "mask", "wait", "standard", "segment", "segment-recomputed")
    }
    assert found == {
        "drop": False,
        "mask": True,
        "wait": False,
        "standard": False,
        "segment": True,
        "segment-recomputed": True,
    }
    settings = rollfleet.TrainerSettings()
    assert rollfleet.AsyncFleet(settings, policy=Own()).policy.by_version
    assert not rollfleet.AsyncFleet(settings, policy=Said()).policy.by_version


# ---- asked once --------------------------------------------------------------------------------


async def test_should_accept_is_asked_once_and_rejects_are_replaced_ahead(redis_url: str) -> None:
    asked: Counter[str] = Counter()

    def accept(rollouts: Sequence[Rollout]) -> bool:
        name = rollouts[0].header.group
        asked[name] += 1
        return name not in rejected

    rejected: set[str] = set()
    async with by_hand(
        redis_url, "once", should_accept=accept, samples_per_version=64, batch_size=8
    ) as hand:
        names = await hand.groups(6)
        rejected.add(names[2])
        assert groups_of(await hand.next()) == names[:2]
        await wait_until_async(lambda: asked[names[4]], "a reject is replaced")
        await hand.fleet.publish()
        assert groups_of(await hand.next()) == names[3:5]
        await hand.groups(1)
        await hand.next()
        assert set(asked.values()) == {1}
        assert (await hand.balanced()).dropped == {"rejected": 4}


@pytest.mark.parametrize("by_version", [False, True])
async def test_a_batch_that_is_chosen_again_asks_nobody_twice(
    redis_url: str, by_version: bool
) -> None:
    """Without prefetch, too: a version is published while payloads are loaded."""
    asked: Counter[str] = Counter()
    refined: Counter[str] = Counter()

    class Same(BasePolicy):
        refines_by_version = by_version

        def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
            refined[rollouts[0].header.group] += 1
            return list(rollouts)

    def accept(rollouts: Sequence[Rollout]) -> bool:
        asked[rollouts[0].header.group] += 1
        if len(asked) == 2:
            hand.fleet._tenure.version += 1  # as a publish in another task would
        return True

    async with by_hand(redis_url, "twice", policy=Same(), should_accept=accept, prefetch=0) as hand:
        await hand.groups(2)
        assert (await hand.next()).version == 1
        assert set(asked.values()) == {1}
        assert set(refined.values()) == ({2} if by_version else {1})
        assert len(hand.fetched) == 8


# ---- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lost", "corrupt"])
async def test_a_payload_that_is_no_use_closes_its_group(redis_url: str, how: str) -> None:
    async with by_hand(redis_url, how, samples_per_version=32, batch_size=8) as hand:
        names = await hand.groups(3)
        bad: list[str] = []
        group = hand.fleet.consumer.ready[names[2]]
        key = hand.streams.keys.payload(group.members[1].header.payload)
        if how == "lost":
            await hand.client.delete(key)
        else:
            await hand.client.set(key, b"\x00garbage")
        bad += [group.name]
        await hand.next()
        await wait_until_async(lambda: names[2] not in hand.fleet.consumer.ready, "it is dropped")
        good = await hand.groups(2)
        assert groups_of(await hand.next()) == good
        assert (await hand.balanced()).dropped == {how: 4}


async def test_a_payload_that_goes_while_prepared_is_not_missed(redis_url: str) -> None:
    async with by_hand(redis_url, "gone", samples_per_version=16, batch_size=8) as hand:
        await hand.groups(4)
        await hand.next()
        await hand.prepared(2)
        for group in hand.fleet.gather.ahead.groups:
            for member in group.members.values():
                await hand.client.delete(hand.streams.keys.payload(member.header.payload))
        batch = await hand.next()
        assert len(batch) == 8
        await hand.fleet.commit(batch)
        assert (await hand.balanced()).dropped == {}


@pytest.mark.parametrize("when", ["prepared", "planned"])
async def test_a_redis_that_lost_the_run_takes_what_was_prepared(redis_url: str, when: str) -> None:
    async with by_hand(
        redis_url, f"flush-{when}", samples_per_version=16, batch_size=8, lease_s=1.0
    ) as hand:
        names = await hand.groups(4)
        seen = Counter(members(await hand.next()))
        await hand.prepared(2)
        if when == "prepared":
            await hand.client.flushall()
        else:
            plan = hand.fleet.board.plan

            async def lose(*args: Any, **more: Any) -> None:
                hand.fleet.board.plan = plan  # type: ignore[method-assign]
                await hand.client.flushall()
                await plan(*args, **more)

            hand.fleet.board.plan = lose  # type: ignore[method-assign]
        task = asyncio.create_task(hand.next())
        claims = []

        async def claimed() -> bool:
            claims.extend(await hand.claim())
            return len(claims) == 8

        await wait_until_async(claimed, "what was out is submitted again")
        assert {claim.prompt.group for claim in claims} == set(names[2:])
        await hand.deliver([delivery_of(c, epoch=hand.fleet.epoch) for c in claims])
        batch = await task
        seen.update(members(batch))
        assert seen == {(name, i): 1 for name in names for i in range(4)}
        assert batch.number == 2
        sent = [m.header.payload for g in batch.groups for _, m in sorted(g.members.items())]
        assert [r.header.payload for r in batch.rollouts] == sent, "of the second life"
        await hand.fleet.commit(batch)
        await hand.balanced()


async def test_a_call_that_gives_up_leaves_everything_ready(redis_url: str) -> None:
    async with by_hand(redis_url, "patience", samples_per_version=32, batch_size=8) as hand:
        await hand.groups(2)
        await hand.next()
        (one,) = await hand.groups(1)
        with pytest.raises(StarvedError, match="8 samples"):
            await hand.fleet.next_batch(timeout_s=0.05)
        task = asyncio.create_task(hand.next())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (other,) = await hand.groups(1)
        assert groups_of(await hand.next()) == [one, other]


async def test_what_fails_ahead_is_tried_again_when_asked_for(redis_url: str) -> None:
    async with by_hand(redis_url, "again", samples_per_version=32, batch_size=8) as hand:
        await hand.groups(2)
        failed = asyncio.Event()
        fetch = hand.fleet.streams[0].fetch

        async def fail(names: Sequence[str]) -> list[bytes | None]:
            hand.fleet.streams[0].fetch = fetch  # type: ignore[method-assign]
            failed.set()
            raise ValueError("a defect")

        await hand.next()
        hand.fleet.streams[0].fetch = fail  # type: ignore[method-assign]
        await hand.groups(2)
        await asyncio.wait_for(failed.wait(), 10)
        assert len(await hand.next()) == 8
        await hand.groups(2)
        await hand.prepared(2)


async def test_a_policy_that_fails_ahead_fails_the_next_call(redis_url: str) -> None:
    class Moody(BasePolicy):
        refines_by_version = False
        sick = False

        def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
            if self.sick:
                raise KeyError("task")
            return rollouts

    policy = Moody()
    async with by_hand(
        redis_url, "moody", policy=policy, samples_per_version=32, batch_size=8
    ) as hand:
        await hand.groups(2)
        await hand.next()
        policy.sick = True
        await hand.groups(2)
        await wait_until_async(lambda: hand.fleet.gather.ahead._want == 0, "it gave up")
        with pytest.raises(PolicyError, match="Moody"):
            await hand.next()
        policy.sick = False
        assert len(await hand.next()) == 8


async def test_tensors_that_fail_ahead_fail_where_they_are_asked_for(redis_url: str) -> None:
    options: dict[str, Any] = {}
    async with by_hand(
        redis_url, "tensors", collate=options, samples_per_version=16, batch_size=8
    ) as hand:
        await hand.groups(4)
        first = await hand.next()
        assert first.tensors.rows == 8
        hand.fleet.commits.collate = {"pad_multiple": 0}
        await hand.made()
        second = await hand.next()
        with pytest.raises(ValueError, match="pad_multiple"):
            _ = second.tensors
        second.collate = {}
        assert second.tensors.rows == 8, "and the batch is not lost"


# ---- beside others -----------------------------------------------------------------------------


async def test_batches_by_name_and_evaluations_leave_what_is_prepared(redis_url: str) -> None:
    async with by_hand(redis_url, "beside", samples_per_version=32, batch_size=8) as hand:
        await hand.groups(2)
        await hand.next()
        prepared = await hand.groups(2)
        await hand.prepared(2)

        async def work(samples: int) -> None:
            claims = []

            async def claimed() -> bool:
                claims.extend(await hand.claim())
                return len(claims) == samples

            await wait_until_async(claimed, f"{samples} samples are claimed")
            await hand.streams.deliver("w", [delivery_of(claim) for claim in claims])

        named, _ = await asyncio.gather(
            hand.fleet.batch_of([{"token_ids": [7]}], timeout_s=10), work(4)
        )
        assert len(named) == 4
        assert not set(groups_of(named)) & set(prepared)
        asked, _ = await asyncio.gather(
            hand.fleet.evaluate([{"token_ids": [8]}], timeout_s=10), work(4)
        )
        assert [len(rollouts) for rollouts in asked] == [4]
        hand.fleet.streams[0].fetch = refuse  # type: ignore[method-assign]
        assert groups_of(await hand.next()) == prepared


async def test_preparing_gives_no_credit(redis_url: str) -> None:
    """What is trained frees room at the next publish, or when the trainer asks for more."""
    async with by_hand(redis_url, "credit", max_staleness=1) as hand:
        await hand.groups(4)
        await hand.fleet.commit(await hand.next())
        await hand.prepared(2)
        assert hand.fleet.pacer.room == 0
        await hand.fleet.publish()
        assert hand.fleet.pacer.room == 8


async def test_a_closed_fleet_leaves_no_task_and_no_thread(redis_url: str) -> None:
    async with by_hand(redis_url, "closed", samples_per_version=16, batch_size=8) as hand:
        await hand.groups(4)
        first = await hand.next()
        assert first.tensors.rows == 8
        await hand.made()
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("rollfleet-")]
    threads = [t for t in threading.enumerate() if t.name.startswith("rollfleet-load")]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# ---- at random ---------------------------------------------------------------------------------


class Chance:
    """A run of random steps, whose batches must be fresh, whole and never seen before."""

    def __init__(self, hand: ByHand, dice: random.Random) -> None:
        self.hand, self.dice = hand, dice
        self.seen: set[tuple[str, int]] = set()
        self.handed: list[rollfleet.Batch] = []
        self.made = 0

    async def step(self) -> None:
        steps = (self.arrive, self.arrive, self.arrive, self.publish, self.spoil, self.train)
        await self.dice.choice((*steps, self.train, self.pause, self.settle))()

    async def arrive(self) -> None:
        fleet = self.hand.fleet
        if fleet.pacer.room >= 4:
            back = self.dice.choice([0, 0, 1])  # what is older, a worker may not deliver
            await self.hand.groups(1, version=max(fleet.version - back, 0))
            self.made += 1

    async def publish(self) -> None:
        await self.hand.fleet.publish()

    async def pause(self) -> None:
        await asyncio.sleep(self.dice.random() * 0.05)

    async def spoil(self) -> None:
        """Lose or break a payload of something that is ready."""
        ready = list(self.hand.fleet.consumer.ready.values())
        if not ready or self.dice.random() < 0.5:
            return
        member = self.dice.choice(list(self.dice.choice(ready).members.values()))
        key = self.hand.streams.keys.payload(member.header.payload)
        if self.dice.random() < 0.5:
            await self.hand.client.delete(key)
        else:
            await self.hand.client.set(key, b"\xc1")

    async def train(self) -> None:
        samples = self.dice.choice([None, None, None, 4, 12])
        limit_s = self.dice.choice([0.001, 0.02, 0.2])
        try:
            batch = await self.hand.fleet.next_batch(samples, timeout_s=limit_s)
        except StarvedError:
            return
        assert batch is not None
        assert max(batch.staleness) <= 1
        assert len(batch) == (samples or 8)
        assert not self.seen & set(members(batch)), "trained on twice"
        self.seen |= set(members(batch))
        if self.dice.random() < 0.7:
            assert batch.tensors.headers == tuple(r.header for r in batch.rollouts)
            assert batch.tensors.rows == len(batch)
        self.handed.append(batch)

    async def settle(self) -> None:
        if self.handed:
            await self.hand.fleet.commit(self.handed.pop(0))


@pytest.mark.parametrize(("seed", "depth"), [(1, 1), (2, 1), (3, 2), (4, 3)])
async def test_whatever_happens_batches_are_fresh_and_the_books_balance(
    redis_url: str, seed: int, depth: int
) -> None:
    async with by_hand(
        redis_url,
        f"chance-{seed}",
        samples_per_version=24,
        batch_size=8,
        max_staleness=1,
        prefetch=depth,
    ) as hand:
        chance = Chance(hand, random.Random(seed))
        steps = 0
        # How many calls find a batch in time depends on the machine: go on until enough have.
        while steps < 120 or len(chance.seen) <= 40:
            await chance.step()
            steps += 1
            assert hand.fleet.payloads.samples <= (depth + 1) * 12, "what is loaded is bounded"
        for batch in chance.handed:
            await hand.fleet.commit(batch)

        async def all_read() -> bool:
            """Whether the trainer holds all that it has read from Redis: the last reply may be on its way."""
            books = await hand.balanced()
            assert books.committed == len(chance.seen)
            left = sum(len(g.members) for g in hand.fleet.consumer.ready.values())
            return books.committed + sum(books.dropped.values()) + left == 4 * chance.made

        await wait_until_async(all_read, "every sample is committed, dropped or ready")
