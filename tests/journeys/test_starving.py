"""A trainer that gets no batch says why: stalls are planted, with real workers where one takes part."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.by_hand import by_hand
from fixtures.fake_vllm import FakeVllm
from fixtures.fleet_processes import Processes
from fixtures.ranks import ThreadWorker
from fixtures.rig import INFRA, delivery_of
from fixtures.servers import MakeServer
from support import wait_until_async

import rollfleet
from rollfleet.state import causes
from rollfleet_common.codec import encode_samples
from rollfleet_common.errors import FailureKind
from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.messages import Claim
from rollfleet_common.redis import connect
from rollfleet_common.streams import Delivery

pytestmark = pytest.mark.leaves_keys("dead letters, and prompts that wait for ever")

SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "starve_s": 30.0}


@asynccontextmanager
async def trainer(url: str, run: str, **settings: Any) -> AsyncIterator[rollfleet.AsyncFleet]:
    shape = rollfleet.TrainerSettings(redis_url=url, run=run, **{**SHAPE, **settings})
    async with rollfleet.AsyncFleet(shape) as fleet:
        yield fleet


async def starved(
    fleet: rollfleet.AsyncFleet, code: str, when: Callable[[str], bool] = lambda _: True
) -> str:
    """Wait until the cause is found; what the error then says."""

    async def found() -> bool:
        return any(c.code == code and when(str(c)) for c in await fleet.causes())

    try:
        await wait_until_async(found, f"cause {code}", 40)
    except AssertionError as exc:
        raise AssertionError(f"{exc}: {await fleet.causes()}") from None
    with pytest.raises(rollfleet.StarvedError) as raised:
        await fleet.next_batch(timeout_s=0.2)
    return str(raised.value)


def stuck(fleet: rollfleet.AsyncFleet) -> None:
    fleet.feed([{"token_ids": [1, 2], "answer": 1.0} for _ in range(4)])


async def test_no_server_answers(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "dead", "Served", server="http://127.0.0.1:9")
    async with trainer(redis_url, "dead") as fleet:
        stuck(fleet)
        said = await starved(fleet, "no-server", lambda text: "127.0.0.1:9" in text)
    assert "no inference server answers" in said
    assert "start or repair the servers" in said


async def test_servers_refuse_the_key(redis_url: str, processes: Processes) -> None:
    async with (
        FakeVllm(api_key="right", lists_models=False) as fake,
        trainer(redis_url, "locked") as fleet,
    ):
        processes.worker(
            redis_url, "locked", "Served", server=fake.url, attempts_infra=2, attempts_data=2
        )
        stuck(fleet)

        async def told() -> bool:
            return "401" in await fleet.reason()

        await wait_until_async(told, "the refusal is told", 40)


async def test_paused_by_this_trainer(redis_url: str) -> None:
    async with trainer(redis_url, "paused") as fleet:
        stuck(fleet)
        await fleet.pause(600)
        said = await starved(fleet, "paused")
    assert "this trainer has paused claiming for another" in said
    assert "pause(0)" in said


async def test_episodes_that_hang(
    redis_url: str, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causes, "LONG_S", 0.2)
    processes.worker(redis_url, "hangs", "Gated")
    async with trainer(redis_url, "hangs") as fleet:
        fleet.feed([{"token_ids": [1], "gate": str(tmp_path / "never")}])

        async def busy() -> None:
            for name in await fleet._client.hkeys(fleet.keys.workers):
                card = json.loads(await fleet._client.hget(fleet.keys.workers, name))
                card |= {"busy": 4}  # it is written every 10 s only
                await fleet._client.hset(fleet.keys.workers, name, json.dumps(card))

        async def leased() -> bool:
            return (await fleet.books()).in_flight == 4

        await wait_until_async(leased, "they are leased", 30)
        await busy()
        said = await starved(fleet, "episodes-hang")
    assert "workflows or reward functions" in said


async def test_a_full_redis(make_server: MakeServer) -> None:
    url = make_server(tcp=True).url
    async with trainer(url, "full") as fleet, connect(url, role="test") as admin:
        stuck(fleet)
        await wait_until_async(lambda: fleet.submitter.sent == 4, "all are out")
        await admin.config_set("maxmemory", "1mb")
        said = await starved(fleet, "redis-full")
        await admin.config_set("maxmemory", "0")
    assert "Redis is full" in said
    assert "raise maxmemory" in said


async def fails(client: Any, fleet: rollfleet.AsyncFleet, stop: asyncio.Event, only: int) -> None:
    """A worker whose samples of this index die (-1: all), and whose others are delivered."""
    streams = fleet.streams[0]
    await streams.make_groups(["default"])
    leases = Leases(client, streams.keys, "w")
    failure = AttemptFailure(FailureKind.DATA, "prompt of 9,000 tokens is too long", "w")
    while not stop.is_set():
        claims, _ = await streams.claim(client, "w", ["default"], 100, None)
        for claim in claims:
            if only in (-1, claim.index):
                await leases.fail(claim, failure, None)
            else:
                await streams.deliver("w", [delivery_of(claim, epoch=fleet.epoch)])
        await asyncio.sleep(0.01)


@asynccontextmanager
async def failing(url: str, run: str, only: int, **settings: Any) -> AsyncIterator[Any]:
    async with trainer(url, run, **settings) as fleet, connect(url, role="test") as client:
        stop = asyncio.Event()
        worker = asyncio.create_task(fails(client, fleet, stop, only))
        yield fleet
        stop.set()
        await worker


async def test_a_feed_that_only_dies_is_stopped(redis_url: str) -> None:
    deaths: dict[str, Any] = {"breaker_deaths": 24, "breaker_prompts": 5}
    async with failing(redis_url, "dies", -1, **deaths) as fleet:
        fleet.feed({"token_ids": [1]} for _ in range(10**6))
        with pytest.raises(rollfleet.FailingError, match="died in a row") as raised:
            await fleet.next_batch()
        assert "9,000 tokens is too long" in str(raised.value)
        assert "min_group_size" in str(raised.value)
        assert (await fleet.books()).submitted < 200


async def test_a_feed_whose_rollouts_cannot_be_used_is_stopped(redis_url: str) -> None:
    def spoil(_: Claim, made: Delivery) -> Delivery:
        return replace(made, payload=encode_samples([]))

    async with trainer(redis_url, "spoilt", breaker_deaths=6, breaker_prompts=5) as fleet:
        with ThreadWorker(redis_url, "spoilt", spoil):
            fleet.feed({"token_ids": [1]} for _ in range(10**6))
            with pytest.raises(rollfleet.FailingError, match=r"dropped because .* `corrupt`"):
                await fleet.next_batch()
        assert (await fleet.books()).submitted < 400


async def test_a_feed_whose_groups_are_all_torn_is_stopped(redis_url: str) -> None:
    deaths: dict[str, Any] = {"breaker_deaths": 6, "breaker_prompts": 5}
    async with failing(redis_url, "torn", 3, **deaths) as fleet:
        fleet.feed({"token_ids": [1]} for _ in range(10**6))
        with pytest.raises(rollfleet.FailingError, match="groups in a row were torn") as raised:
            await fleet.next_batch()
        assert "min_group_size" in str(raised.value)
        assert "9,000 tokens is too long" in str(raised.value)


async def test_every_group_torn_is_a_cause(redis_url: str) -> None:
    async with failing(redis_url, "torn", 0, breaker_deaths=0) as fleet:
        fleet.feed({"token_ids": [1]} for _ in range(10**6))
        said = await starved(fleet, "torn")
    assert "9,000 tokens is too long" in said
    assert "min_group_size" in said
    assert "torn)" in said or "torn," in said


async def test_a_feed_that_ends_without_a_batch_is_an_error(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with failing(redis_url, "none", -1) as fleet:
        stuck(fleet)
        with pytest.raises(rollfleet.FailingError, match="without one batch") as raised:
            assert [batch async for batch in fleet.batches()] == []
        assert "9,000 tokens is too long" in str(raised.value)
        assert "nothing was submitted" not in str(raised.value)
        assert f"{(await fleet.books()).dead} died" in str(raised.value)
        assert [r for r in caplog.records if r.levelno == logging.ERROR]


async def test_what_was_submitted_by_hand_and_died_was_submitted(redis_url: str) -> None:
    async with failing(redis_url, "hand", -1) as fleet:
        await fleet.submit({"token_ids": [1]})
        said = await starved(fleet, "nothing-left")
    assert "all 4 submitted samples are settled (0 trained, " in said
    assert "9,000 tokens is too long" in said
    assert "nothing was submitted" not in said


async def test_rejections_are_counted(redis_url: str) -> None:
    async with by_hand(redis_url, "rejects", should_accept=lambda _: False) as hand:
        await hand.groups(2)
        with pytest.raises(rollfleet.StarvedError, match=r"8 were dropped \(8 rejected\)"):
            await hand.fleet.next_batch(timeout_s=2)


async def test_a_source_that_is_silent(redis_url: str) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def source() -> Any:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        yield {"token_ids": [1]}

    async with trainer(redis_url, "silent") as fleet:
        fleet.feed(source())
        said = await starved(fleet, "source-silent")
        gate.set()
    assert "the source of prompts yields none" in said


async def test_batches_that_are_never_trained(redis_url: str) -> None:
    async with by_hand(redis_url, "hoard", max_staleness=0) as hand:
        await hand.groups(2)
        await hand.next()
        assert "call trained() or commit()" in await starved(hand.fleet, "not-trained")


async def test_evaluate_tells_what_failed(redis_url: str) -> None:
    async with failing(redis_url, "evals", 1) as fleet:
        done = await fleet.evaluate([{"token_ids": [1]}, {"token_ids": [2]}], timeout_s=20)
    assert [len(rollouts) for rollouts in done] == [3, 3]
    assert (len(done.failures), done.failed) == (2, 2)
    ((failure,), _) = done.failures
    assert (failure.index, failure.reason) == (1, "dead")
    assert "9,000 tokens is too long" in failure.detail


# ---- servers that are ahead ----------------------------------------------------------------------


async def card(fleet: rollfleet.AsyncFleet, *versions: int | None) -> None:
    """A worker that says of its servers that they serve these versions."""
    servers = [
        {"name": f"http://s{i}", "state": "serving", "version": v} for i, v in enumerate(versions)
    ]
    text = {"id": "w", "state": "claiming", "seen_ms": int(time.time() * 1000), "servers": servers}
    await fleet._client.hset(fleet.keys.workers, "w", json.dumps(text | {"routes": ["default"]}))


async def test_servers_of_a_later_version_stop_the_feed(redis_url: str) -> None:
    async with trainer(redis_url, "later", lease_s=1) as fleet:
        await card(fleet, 3, 4)
        stuck(fleet)
        with pytest.raises(rollfleet.FailingError, match="serve version 3, the trainer is at 0"):
            await fleet.next_batch()
        await fleet._client.delete(fleet.keys.workers)


@pytest.mark.parametrize("versions", [(3, 0), (3, None), (), (0,)])
async def test_one_server_that_may_be_right_is_enough(redis_url: str, versions: Any) -> None:
    async with trainer(redis_url, "mixed", lease_s=1) as fleet:
        await card(fleet, *versions)
        await fleet.watch.versions()
        assert fleet.watch.future is None
        await fleet._client.delete(fleet.keys.workers)


async def test_a_trainer_that_moves_weights_itself_is_warned(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def move(_: int, __: str) -> None:
        pass

    async with trainer(redis_url, "moves", lease_s=1) as fleet:
        await fleet.publish(1, transfer=move)
        await card(fleet, 3)
        await wait_until_async(lambda: "serve version 3" in caplog.text, "the warning", 20)
        fleet._background.check()
        assert "future" in [cause.code for cause in await fleet.causes()]
        await fleet._client.delete(fleet.keys.workers)


# ---- dead letters --------------------------------------------------------------------------------


async def test_dead_letters_are_capped_and_the_cut_is_counted(redis_url: str) -> None:
    async with by_hand(redis_url, "cap", dead_letters=100, breaker_deaths=0) as hand:
        keys = hand.streams.keys
        leases = Leases(hand.client, keys, "w")
        for _ in range(50):
            for _ in range(8):
                await hand.fleet.submit({"token_ids": [1], "n": 1})
            for claim in await hand.claim():
                await leases.fail(claim, INFRA, None)
        books = await hand.balanced()
        kept = await hand.client.xlen(keys.dead)
        assert 100 <= kept <= 250
        assert (books.dead, books.counters["letters:cut"]) == (400, 400 - kept)


async def test_old_dead_letters_go(redis_url: str) -> None:
    async with by_hand(redis_url, "age", dead_letters=0, dead_letters_s=60) as hand:
        dead = hand.streams.keys.dead
        long_ago = int((time.time() - 3600) * 1000)
        for number in range(200):
            await hand.client.xadd(dead, {"why": "data"}, id=f"{long_ago}-{number}")
        await hand.fleet.submit({"token_ids": [1], "n": 1})
        (claim,) = await hand.claim()
        await Leases(hand.client, hand.streams.keys, "w").fail(claim, INFRA, None)
        assert await hand.client.xlen(dead) < 110
        assert (await hand.balanced()).counters["letters:cut"] >= 90


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0], ids=["ahead", "behind"])
async def test_causes_are_told_by_the_clock_of_redis(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + ahead_s)
    async with trainer(redis_url, "clock") as fleet, connect(redis_url, role="test") as client:
        seconds, _ = await client.time()
        card = {"state": "serving", "seen_ms": seconds * 1000, "slots": 1, "routes": ["default"]}
        await client.hset(fleet.keys.workers, "w", json.dumps(card))
        await fleet.pause(600)
        stuck(fleet)
        await wait_until_async(lambda: bool(fleet.submitter.sent), "prompts are submitted", 10)
        found = await fleet._evidence()
        assert found.workers is not None
        assert not any(worker.lost for worker in found.workers)
        assert 590 < found.paused_s <= 600


async def test_text_that_nests_too_deeply_stops_no_trainer(redis_url: str) -> None:
    deep = b"[" * 100_000
    async with by_hand(redis_url, "deep", lease_s=1.0, samples_per_version=4) as hand:
        await hand.client.hset(hand.fleet.keys.workers, "w", deep)
        stone = {
            "g": "x",
            "i": "0",
            "n": "1",
            "k": "train",
            "t": "",
            "r": "dead",
            "e": deep,
            "p": "-1",
        }
        await hand.client.xadd(hand.streams.keys.tombstones, stone)  # type: ignore[arg-type]
        await asyncio.sleep(1.5)  # several looks
        await hand.groups(1)
        assert await hand.fleet.next_batch() is not None
        assert "worker" in await hand.fleet.reason()
