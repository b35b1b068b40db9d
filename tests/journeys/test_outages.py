"""A Redis that is away, frozen or emptied in the middle of a trainer's step: nothing stays behind."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fixtures.by_hand import ByHand, by_hand
from fixtures.rig import delivery_of
from fixtures.servers import MakeServer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError
from support import wait_until_async

from rollfleet import AsyncFleet
from rollfleet.policy.policies import BasePolicy
from rollfleet.records import Group
from rollfleet.waiting import BoundedWait
from rollfleet_common.board import Board
from rollfleet_common.errors import BrokerSetupError, InvalidPromptError, StarvedError
from rollfleet_common.messages import Kind
from rollfleet_common.streams import Streams


class Unwanted(BasePolicy):
    """Drops groups by name, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def verdict(self, group: Group, current: int) -> str | None:
        return self.reasons.get(group.name)


class Gate:
    """Holds the settling in one partition back until it is opened."""

    def __init__(self, streams: Streams, fail: Exception | None = None) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        settle: Callable[..., Any] = streams.settle

        async def held(*args: Any) -> int:
            self.reached.set()
            await self.opened.wait()
            if fail is not None:
                raise fail
            return await settle(*args)

        streams.settle = held  # type: ignore[method-assign]


async def starved(hand: ByHand) -> None:
    with pytest.raises(StarvedError):
        await hand.fleet.next_batch(timeout_s=0.2)


# ---- a wait that ends while groups are dropped -------------------------------------------------


async def test_a_wait_that_ends_while_groups_are_dropped_drops_them_all(redis_url: str) -> None:
    """In two partitions: the wait ends in the settling of the first."""
    policy = Unwanted()
    async with by_hand(
        redis_url, "leave", policy=policy, samples_per_version=64, batch_size=64, partitions=2
    ) as hand:
        fleet = hand.fleet
        names = [await fleet.submit({"token_ids": [1], "n": 4}) for _ in range(16)]
        for here in fleet.streams:
            await here.make_groups(["default"])
            claims, _ = await here.claim(hand.client, "w", ["default"], 100, None)
            assert claims, "of 16 names some are in either partition"
            await here.deliver("w", [delivery_of(c, epoch=fleet.epoch) for c in claims])
        await wait_until_async(lambda: len(fleet.consumer.ready) == 16, "all groups are ready")
        policy.reasons = dict.fromkeys(names, "ugly")
        gates = [Gate(here) for here in fleet.streams]
        await starved(hand)
        assert any(gate.reached.is_set() for gate in gates)
        for gate in gates:
            gate.opened.set()

        async def dropped() -> bool:
            return (await fleet.books()).dropped == {"ugly": 64}

        await wait_until_async(dropped, "all groups are dropped")
        assert (await hand.balanced()).outstanding == 0
        assert not any(fleet.consumer._held)


async def test_a_wait_that_ends_while_redis_is_away_leaks_no_credit(
    make_server: MakeServer,
) -> None:
    server = make_server(appendonly="always")
    settings: dict[str, Any] = {"max_staleness": 0, "pipeline_depth": 0, "lease_s": 3.0}
    async with by_hand(server.url, "away", **settings) as hand:
        await hand.groups(2)
        await hand.fleet.publish()
        server.kill()
        await starved(hand)
        server.restart()
        assert await asyncio.wait_for(hand.fleet.submit({"token_ids": [1], "n": 8}), 20)
        assert (await hand.fleet.books()).dropped == {"stale": 8}


async def test_what_fails_after_its_wait_has_ended_is_told_to_the_next_call(redis_url: str) -> None:
    policy = Unwanted()
    async with by_hand(redis_url, "told", policy=policy) as hand:
        policy.reasons = dict.fromkeys(await hand.groups(1), "ugly")
        gate = Gate(hand.fleet.streams[0], NoPermissionError("no permissions"))
        await starved(hand)
        gate.opened.set()
        with pytest.raises(BrokerSetupError, match="drop:ugly"):
            await hand.next()


async def test_a_fleet_that_closes_leaves_no_drop_behind(redis_url: str) -> None:
    policy = Unwanted()
    async with by_hand(redis_url, "shut", policy=policy) as hand:
        policy.reasons = dict.fromkeys(await hand.groups(1), "ugly")
        Gate(hand.fleet.streams[0])
        await starved(hand)
        assert [t for t in asyncio.all_tasks() if t.get_name() == "rollfleet-drop"]
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("rollfleet-")]


# ---- why a wait has ended ----------------------------------------------------------------------


async def test_a_wait_that_ends_while_redis_is_frozen_says_so(make_server: MakeServer) -> None:
    server = make_server()
    async with by_hand(server.url, "frozen") as hand:
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, os.kill, server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StarvedError, match=r"8 samples did not come .* Redis does not"):
                await hand.fleet.next_batch(timeout_s=0.5)
        finally:
            os.kill(server.pid, signal.SIGCONT)


async def test_a_wait_goes_on_though_its_reason_cannot_be_told() -> None:
    async def refused() -> str:
        raise ConnectionRefusedError("nobody listens")

    async with BoundedWait("a batch", 30.0, refused) as patience:
        patience._say_at = 0.0
        await patience.say()
    with pytest.raises(StarvedError, match=r"a batch did not come .* nobody listens"):
        async with BoundedWait("a batch", 0.0, refused):
            await asyncio.Event().wait()


# ---- a run that is lost during a verdict -------------------------------------------------------


async def test_a_run_lost_during_a_verdict_leaves_no_ghost(redis_url: str) -> None:
    """Two groups close in one read; while the first is dropped, Redis loses the run."""
    policy = Unwanted()
    async with by_hand(redis_url, "ghost", policy=policy, samples_per_version=16) as hand:
        fleet, streams = hand.fleet, hand.fleet.streams[0]
        bad, good = [await fleet.submit({"token_ids": [1], "n": 4}) for _ in range(2)]
        policy.reasons = {bad: "ugly"}
        claims = await hand.claim()
        settle: Callable[..., Any] = streams.settle

        async def flushed(*args: Any) -> int:
            streams.settle = settle  # type: ignore[method-assign]
            await hand.client.flushall()
            return await settle(*args)

        streams.settle = flushed  # type: ignore[method-assign]
        # One script call each, so that one read brings both.
        await hand.streams.deliver("w", [delivery_of(c, epoch=fleet.epoch) for c in claims])
        again = []

        async def claimed() -> bool:
            again.extend(c for c in await hand.claim() if c.prompt.group == good)
            return len(again) == 4

        await wait_until_async(claimed, "the good group is sent again")
        assert fleet.consumer.life == 1
        await hand.deliver([delivery_of(c, epoch=fleet.epoch, nonce="again") for c in again])
        batch = await fleet.next_batch(4, timeout_s=10)
        assert batch is not None
        assert {r.header.group for r in batch.rollouts} == {good}
        await fleet.commit(batch)
        assert (await hand.balanced()).dropped == {}


async def test_a_run_lost_during_a_sweep_leaves_no_ghost(redis_url: str) -> None:
    """What a sweep had found fresh is of a life that is over when its drops are done."""
    policy = Unwanted()
    async with by_hand(redis_url, "swept", policy=policy, samples_per_version=16) as hand:
        fleet, streams = hand.fleet, hand.fleet.streams[0]
        bad, dull, good = await hand.groups(3)
        policy.reasons = {bad: "ugly", dull: "dull"}
        settle: Callable[..., Any] = streams.settle

        async def flushed(*args: Any) -> int:
            streams.settle = settle  # type: ignore[method-assign]
            await hand.client.flushall()
            return await settle(*args)

        streams.settle = flushed  # type: ignore[method-assign]
        groups = [fleet.consumer.ready[name] for name in (good, bad, dull)]
        assert await fleet.consumer.sweep(groups) == []
        # Of the second reason nothing was settled: it is out again, and may be wanted now.
        assert set(fleet.submitter.out) == {dull, good}
        assert await hand.client.exists(*map(fleet.keys.partition(0).group, (dull, good))) == 2
        assert Kind.TRAIN in {claim.prompt.kind for claim in await hand.claim()}


async def test_a_group_of_a_run_that_was_lost_is_not_dropped_in_the_next_one(
    redis_url: str,
) -> None:
    """Its name is a prompt that was submitted again: nothing of it may be settled or forgotten."""
    async with by_hand(redis_url, "dropped-late", samples_per_version=16) as hand:
        fleet = hand.fleet
        (name,) = await hand.groups(1)
        old = fleet.consumer.ready[name]
        await hand.client.flushall()
        assert await fleet.line.revive()
        await fleet.consumer.drop([old], "lost")
        assert set(fleet.submitter.out) == {name}
        assert len(await hand.claim()) == 4
        assert (await hand.balanced()).dropped == {}


# ---- an opening that is interrupted ------------------------------------------------------------


class Named(BasePolicy):
    """Takes groups in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def order(self, group: Group, current: int) -> tuple[float, ...]:
        return int(group.name != self.first), group.seq


@asynccontextmanager
async def half_done(url: str, run: str) -> AsyncIterator[tuple[AsyncFleet, list[str]]]:
    """The heir, not open yet, of a trainer that was handed two batches of a group each."""
    policy = Named()
    async with by_hand(url, run, policy=policy, samples_per_version=16, batch_size=4) as hand:
        one, other = await hand.groups(2)
        policy.first = other  # which came last
        names = [(await hand.next()).rollouts[0].header.group for _ in range(2)]
        assert names == [other, one]
        settings = hand.fleet.settings.model_copy(update={"take_over": True})
        policy.first = ""
        yield AsyncFleet(settings, policy=policy), names


async def test_what_is_owed_keeps_its_order_if_an_opening_is_repeated(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Board.plan
    failed = []

    async def away(self: Board, token: str, batch: int, packed: bytes | None, **said: bool) -> None:
        if batch == 2 and not failed:
            failed.append(batch)
            raise RedisConnectionError("reset")
        await plan(self, token, batch, packed, **said)

    async with half_done(redis_url, "twice") as (heir, names):
        monkeypatch.setattr(Board, "plan", away)
        async with heir:
            assert failed
            for name in names:
                batch = await heir.next_batch(timeout_s=10)
                assert batch is not None
                assert batch.rollouts[0].header.group == name
                await heir.commit(batch)


async def test_what_is_owed_is_waited_for_before_a_batch_is_cut(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consume, opened = Streams.consume, asyncio.Event()

    async def held(self: Streams, *args: Any, **since: Any) -> Any:
        if since.get("since", ("0-0", "0-0")) != ("0-0", "0-0"):
            await opened.wait()
        return await consume(self, *args, **since)

    async with half_done(redis_url, "pieces") as (heir, names):
        monkeypatch.setattr("rollfleet.consume.reader.COUNT", 4)
        monkeypatch.setattr(Streams, "consume", held)
        async with heir:
            await wait_until_async(lambda: list(heir.consumer.ready) == names[1:], "half is here")
            with pytest.raises(StarvedError):
                await heir.next_batch(timeout_s=0.2)
            opened.set()
            for name in names:
                batch = await heir.next_batch(timeout_s=10)
                assert batch is not None
                assert batch.rollouts[0].header.group == name
                await heir.commit(batch)


# ---- what is no prompt for a batch -------------------------------------------------------------


async def test_an_evaluation_in_a_feed_is_refused_wherever_it_stands(redis_url: str) -> None:
    async with by_hand(redis_url, "mixed", samples_per_version=16) as hand:
        hand.fleet.feed([{"token_ids": [1]}, {"token_ids": [1], "kind": "eval"}])
        with pytest.raises(InvalidPromptError, match=r"p1 is an evaluation; use evaluate\(\)"):
            await hand.next()
        assert Kind.EVAL not in {claim.prompt.kind for claim in await hand.claim()}
