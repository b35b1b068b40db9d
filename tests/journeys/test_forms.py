"""A batch that could not be collated gives up its offending groups; no trainer is served them again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fixtures.by_hand import ByHand, by_hand, members
from fixtures.rig import delivery_of

import rollfleet

RUN = "forms"


async def deliver(hand: ByHand, count: int = 1, **sample: Any) -> list[str]:
    """Groups of four rollouts of eight tokens, each with `sample`."""
    names = [await hand.fleet.submit({"token_ids": [1]}) for _ in range(count)]
    claims = [claim for claim in await hand.claim() if claim.prompt.group in names]
    await hand.deliver([delivery_of(c, epoch=hand.fleet.epoch, **sample) for c in claims])
    return names


@asynccontextmanager
async def next_trainer(hand: ByHand, url: str, **settings: Any) -> AsyncIterator[ByHand]:
    """The trainer that takes the run from `hand`."""
    shape: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "starve_s": 20.0}
    await hand.fleet.close()
    loaded = rollfleet.TrainerSettings(redis_url=url, run=RUN, **{**shape, **settings})
    async with rollfleet.AsyncFleet(loaded) as fleet:
        yield ByHand(fleet, hand.client)


def x(*shape: int, dtype: str = "<f4") -> dict[str, Any]:
    return {"arrays": {"x": np.zeros(shape, dtype)}}


async def test_arrays_without_values_are_collated_on_this_trainer_and_the_next(
    redis_url: str,
) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await deliver(hand, 2, **x(8, 0))
        batch = await hand.next()
        assert batch.tensors.arrays["x"].shape == (8, 8, 0)
        async with next_trainer(hand, redis_url) as after:
            again = await after.next()
            assert members(again) == members(batch)
            assert again.tensors.arrays["x"].shape == (8, 8, 0)
            micros = again.micro_batches(16)
            assert {micro.tensors.arrays["x"].shape for micro in micros} == {(16, 0)}
            await after.fleet.commit(again)


async def test_the_first_group_fixes_the_form_for_every_later_trainer(redis_url: str) -> None:
    async with by_hand(redis_url, RUN) as hand:
        first = await deliver(hand, 2, **x(8))
        batch = await hand.next()
        assert {group for group, _ in members(batch)} == set(first)
        await hand.fleet.commit(batch)
        await deliver(hand, 1, **x(8, dtype="<f8"))
        good = await deliver(hand, 2, **x(8))
        batch = await hand.next()
        assert {group for group, _ in members(batch)} == set(good)
        assert (await hand.balanced()).dropped == {"form": 4}
        async with next_trainer(hand, redis_url) as after:
            await deliver(after, 1, **x(8, 2))
            assert members(await after.next()) == members(batch)
            good = await deliver(after, 2, **x(8))
            batch = await after.next()
            assert {group for group, _ in members(batch)} == set(good)
            assert (await after.balanced()).dropped == {"form": 8}
            # A run that Redis lost gets it back with the next version.
            await after.client.hdel(after.fleet.keys.board, "form")
            await after.fleet.publish()
            assert b'"token"' in await after.client.hget(after.fleet.keys.board, "form")


async def test_where_nothing_may_be_missing_a_batch_is_of_one_set_of_names(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, collate={"missing": "error"}) as hand:
        first = await deliver(hand, 1, metrics={"a": 1.0})
        await deliver(hand, 1)
        await deliver(hand, 1, metrics={"a": 1.0, "b": 1.0})
        first += await deliver(hand, 1, metrics={"a": 2.0})
        batch = await hand.next()
        assert {group for group, _ in members(batch)} == set(first)
        assert set(batch.tensors.metrics) == {"a"}
        assert (await hand.balanced()).dropped == {"form": 8}


async def test_a_batch_has_no_more_names_than_it_may(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, max_names=5) as hand:
        await deliver(hand, 1, metrics=dict.fromkeys("abc", 1.0))
        await deliver(hand, 1, metrics=dict.fromkeys("defg", 1.0))
        await deliver(hand, 1, metrics=dict.fromkeys("ad", 1.0))
        batch = await hand.next()
        assert set(batch.tensors.metrics) == set("abcd")
        assert (await hand.balanced()).dropped == {"form": 4}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 9}, "corrupt"),
        ({"samples": 2}, "corrupt"),
        ({"trained_tokens": 3}, "corrupt"),
        ({"trained_tokens": 0}, "corrupt"),
        ({"reward": 0.5}, "corrupt"),
        ({"payload_bytes": 1}, "corrupt"),
        ({"payload_bytes": 1 << 40}, "corrupt"),
        ({"max_version": 1}, "future"),
        ({"tokens": -7}, "undecodable"),
        ({"tokens": 2**64 - 1}, "undecodable"),
        ({"samples": 0}, "undecodable"),
        ({"reward": float("nan")}, "undecodable"),
        ({"reward": 1e39}, "undecodable"),
    ],
)
async def test_a_header_that_lies_costs_its_group_alone(
    redis_url: str, changes: dict[str, Any], reason: str
) -> None:
    async with by_hand(redis_url, RUN) as hand:
        bad = await hand.fleet.submit({"token_ids": [1]})
        (first, *others) = [
            delivery_of(claim, epoch=hand.fleet.epoch)
            for claim in await hand.claim()
            if claim.prompt.group == bad
        ]
        liar = replace(first, header=replace(first.header, **changes))
        await hand.streams.deliver("w", [liar, *others])
        good = await hand.groups(2)
        batch = await hand.next()
        assert {group for group, _ in members(batch)} == set(good)
        dropped = (await hand.balanced()).dropped
        assert sum(dropped.values()) == 4, dropped
        assert reason in dropped, dropped
        assert batch.stats["rollfleet/reward_mean"] == 1.0


async def test_a_rollout_that_is_too_large_costs_its_group_alone(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, max_sample_tokens=9, max_rollout_spans=8) as hand:
        await deliver(hand, 1, tokens=10)
        good = await deliver(hand, 2, tokens=9)
        batch = await hand.next()
        assert {group for group, _ in members(batch)} == set(good)
        assert (await hand.balanced()).dropped == {"oversize": 4}


async def test_a_batch_of_too_much_padding_says_so(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, max_batch_bytes=2048) as hand:
        await deliver(hand, 2, tokens=16)
        batch = await hand.next()
        with pytest.raises(rollfleet.OversizeError, match="over the cap of 2,048"):
            batch.tensors  # noqa: B018 - made when asked for
        assert [micro.tensors.rows for micro in batch.micro_batches(32)] == [2] * 4
