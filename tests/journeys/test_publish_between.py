"""A version may be published at any moment of a hand-over: no batch is older than the policy allows."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fixtures.by_hand import ByHand, by_hand, members
from fixtures.rig import delivery_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import wait_until_async

import rollfleet
from rollfleet.policy.checked import policy_named
from rollfleet_common.tasks import cancel_all

#: Moments of a hand-over at which a version may be published.
MOMENTS = ("sweep", "load", "plan", "planned")


class Publisher:
    """Publishes at the moments it was told, and sees every batch at the moment it is handed over."""

    def __init__(self, fleet: rollfleet.AsyncFleet, moments: dict[str, list[bool]]) -> None:
        self.fleet = fleet
        self.moments = {moment: list(turns) for moment, turns in moments.items()}
        self.tasks: list[asyncio.Task[int]] = []
        self.seen: list[tuple[int, int]] = []
        self._watch(fleet.consumer, "sweep", "sweep", before=True)
        self._watch(fleet.payloads, "load", "load")
        self._watch(fleet.board, "plan", "plan")
        opened = fleet.commits.opened

        def watched(*args: Any) -> rollfleet.Batch:
            batch = opened(*args)
            self.seen.append((batch.version, fleet.version))
            return batch

        fleet.commits.opened = watched  # type: ignore[method-assign]

    def _watch(self, part: Any, method: str, moment: str, *, before: bool = False) -> None:
        call: Callable[..., Awaitable[Any]] = getattr(part, method)

        async def watched(*args: Any, **more: Any) -> Any:
            if before:
                await self.publish(moment)
                return await call(*args, **more)
            handing = moment != "plan" or (args[2] or b"").find(b"handed") >= 0
            if not handing:
                return await call(*args, **more)
            await self.publish(moment)
            answer = await call(*args, **more)
            if moment == "plan" and self._due("planned"):
                # Not waited for: it goes on beside what the answer sets off.
                self.tasks.append(asyncio.create_task(self.fleet.publish()))
            return answer

        setattr(part, method, watched)

    async def publish(self, moment: str) -> None:
        if self._due(moment):
            await self.fleet.publish()

    def _due(self, moment: str) -> bool:
        turns = self.moments.get(moment)
        return bool(turns) and turns.pop(0)


@asynccontextmanager
async def answering(hand: ByHand) -> AsyncIterator[None]:
    """A worker that answers every prompt with the version of the moment."""

    async def live() -> None:
        while True:
            claims = await hand.claim(8)
            made, epoch = hand.fleet.version, hand.fleet.epoch
            await hand.streams.deliver(
                "w", [delivery_of(c, version=made, epoch=epoch) for c in claims]
            )
            await asyncio.sleep(0.002)

    task = asyncio.create_task(live())
    try:
        yield
    finally:
        await cancel_all([task])


async def held_plan(hand: ByHand) -> tuple[asyncio.Event, asyncio.Event]:
    """The next plan is written when the second event is set; the first is set when it is asked for."""
    asked, go = asyncio.Event(), asyncio.Event()
    plan = hand.fleet.board.plan

    async def held(token: str, number: int, packed: bytes | None, **more: Any) -> None:
        asked.set()
        await go.wait()
        await plan(token, number, packed, **more)

    hand.fleet.board.plan = held  # type: ignore[method-assign]
    return asked, go


async def test_a_version_published_while_the_plan_is_written(redis_url: str) -> None:
    async with by_hand(redis_url, "between", max_staleness=0) as hand:
        await hand.groups(2)
        asked, go = await held_plan(hand)
        coming = asyncio.create_task(hand.fleet.next_batch(timeout_s=20))
        await asked.wait()
        await hand.fleet.publish()
        go.set()
        await wait_until_async(lambda: not hand.fleet.consumer.ready, "what is stale is dropped")
        assert await hand.fleet.board.plans() == {}
        assert not coming.done()
        fresh = await hand.groups(2)
        batch = await coming
        assert batch is not None
        assert (batch.number, batch.version, batch.staleness) == (1, 1, [0] * 8)
        assert {group for group, _ in members(batch)} == set(fresh)
        assert (await hand.balanced()).dropped == {"stale": 8}


async def test_a_batch_of_these_prompts_is_judged_again_too(redis_url: str) -> None:
    async with by_hand(redis_url, "between-of", max_staleness=0) as hand, answering(hand):
        asked, go = await held_plan(hand)
        items = [{"token_ids": [1]}, {"token_ids": [2]}]
        coming = asyncio.create_task(hand.fleet.batch_of(items, timeout_s=20))
        await asked.wait()
        await hand.fleet.publish()
        go.set()
        batch = await coming
        assert (batch.number, batch.version, batch.staleness) == (1, 1, [0] * 8)


async def test_a_plan_write_that_is_cancelled_is_neither_lost_nor_late(redis_url: str) -> None:
    """It has its number to itself until it ended: the next plan is written after it."""
    async with by_hand(redis_url, "between-cancel", max_staleness=0) as hand:
        names = await hand.groups(2)
        asked, go = await held_plan(hand)
        first = asyncio.create_task(hand.fleet.next_batch(timeout_s=20))
        await asked.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        asked.clear()
        second = asyncio.create_task(hand.fleet.next_batch(timeout_s=20))
        with pytest.raises(rollfleet.StarvedError):
            await hand.fleet.next_batch(timeout_s=0.2)
        assert not asked.is_set(), "two plans of one number were on their way at once"
        go.set()
        batch = await second
        assert batch is not None
        assert batch.number == 1
        assert [group for group, _ in members(batch)][::4] == names
        assert list(await hand.fleet.board.plans()) == [1]
        await hand.fleet.commit(batch)
        assert await hand.fleet.board.plans() == {}
        await hand.balanced()


turns = st.lists(st.booleans(), max_size=4)


@pytest.mark.leaves_keys("the feed is longer than the test")
@given(
    policy=st.sampled_from(["drop", "mask", "wait"]),
    bound=st.integers(0, 1),
    replay=st.booleans(),
    moments=st.fixed_dictionaries(dict.fromkeys(MOMENTS, turns)),
)
@settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
async def test_no_moment_lets_a_stale_batch_through(
    redis_url: str, policy: str, bound: int, replay: bool, moments: dict[str, list[bool]]
) -> None:
    async with by_hand(
        redis_url,
        "moments",
        policy=policy_named(policy, bound).policy,
        max_staleness=bound,
        fresh=True,
    ) as hand:
        fleet = hand.fleet
        fleet.feed({"token_ids": [1]} for _ in range(200))
        async with answering(hand):
            if replay:
                await wait_until_async(lambda: len(fleet.consumer.ready) >= 2, "two groups")
                fleet.consumer.replay = dict.fromkeys(reversed(list(fleet.consumer.ready)), 1)
            publisher = Publisher(fleet, moments)
            seen: set[tuple[str, int]] = set()
            for _ in range(3):
                batch = await hand.next()
                assert not seen & set(members(batch))
                seen |= set(members(batch))
                # "wait" drops nothing for age: the trainer that publishes unasked breaks its pace.
                for rollout in batch.rollouts:
                    for sample in rollout.samples:
                        made = sample.versions.expand(len(sample.token_ids))[sample.loss_mask]
                        assert batch.version - int(made.min()) <= bound or policy == "wait"
                assert list(await fleet.board.plans()) == [batch.number]
                await fleet.commit(batch)
                await fleet.publish()
            assert all(made == handed for made, handed in publisher.seen), publisher.seen
            await asyncio.gather(*publisher.tasks)
        await hand.balanced()
