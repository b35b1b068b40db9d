"""A worker that does nothing says why, in a real process and its log."""

import asyncio
from collections.abc import Hashable
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.fake_control import ControlledVllm
from fixtures.fleet_processes import Process, Processes
from fixtures.rig import Rig
from fixtures.servers import MakeServer
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.redis import connect_sync
from rollfleet_worker import idle
from rollfleet_worker.idle import Idle, similar_runs

SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 2, "max_staleness": 4}
#: Says its causes at once, and again soon.
SOON: dict[str, Any] = {
    "set": {"rollfleet_worker.idle.SAY_S": [0.3, 1.0, 600.0], "rollfleet_worker.idle.LOOK_S": 0.1}
}


def said(worker: Process, state: str, event: str = "cannot work") -> str:
    why: str = worker.event(event, state=state)["why"]
    return why


def test_a_run_that_nobody_opened_and_what_it_may_have_been_meant_for(
    redis_url: str, processes: Processes
) -> None:
    with rollfleet.connect(redis_url, run="sort", **SHAPE):
        worker = processes.worker(redis_url, "srot", altered=SOON)
        why = "no trainer has opened run 'srot'; runs in this Redis with similar names: sort"
        assert said(worker, "no-run") == why
        worker.event("cannot work", count=2)
        stranger = processes.worker(redis_url, "zzzzzzzzzzzz", altered=SOON)
        assert said(stranger, "no-run").endswith("; runs in this Redis: sort")
    assert worker.stop() == 0
    assert stranger.stop() == 0
    assert len(worker.events("cannot work")) == 2  # and no third for minutes


def test_servers_that_do_not_answer(redis_url: str, processes: Processes) -> None:
    with rollfleet.connect(redis_url, run="dead", **SHAPE):
        server = "http://127.0.0.1:9"
        worker = processes.worker(redis_url, "dead", "Served", server=server, altered=SOON)
        why = said(worker, "no-server")
        assert why.startswith(f"no server answers: {server}: ")
        assert "Connect" in why
        none = processes.worker(redis_url, "dead", "Served", altered=SOON)
        assert "no inference server is known" in said(none, "no-server")
    assert worker.stop() == 0
    assert none.stop() == 0


async def test_a_server_that_holds_no_weights(redis_url: str, processes: Processes) -> None:
    from rollfleet_common.servers import ServerWeights, WeightState  # noqa: PLC0415

    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="stale", **SHAPE)
    async with ControlledVllm(version="0") as fake, rollfleet.AsyncFleet(settings) as fleet:
        row = ServerWeights(fake.url, WeightState.STALE, 0, why="its disk is full")
        await fleet.refits.servers.tell(fleet.token, [row])
        worker = processes.worker(redis_url, "stale", "Served", server=fake.url, altered=SOON)
        event = await asyncio.to_thread(worker.event, "cannot work", state="no-server")
        assert event["why"] == f"no server can be used: {fake.url}: its disk is full"
    assert await asyncio.to_thread(worker.stop) == 0


def test_a_pause_and_a_feed_that_is_empty(redis_url: str, processes: Processes) -> None:
    with rollfleet.connect(redis_url, run="idle", **SHAPE) as fleet:
        worker = processes.worker(redis_url, "idle", altered=SOON)
        # The trainer is at work: nothing that an operator must know at once.
        event = worker.event("nothing to do", state="no-prompts")
        assert event["level"] == "info"
        assert event["why"].startswith("no prompts on route default of run 'idle'; trainer ")
        assert event["why"].endswith(" s ago")
        fleet.pause(600)
        why = said(worker, "paused")
        assert why.startswith("paused for another ")
        assert 500 < int(why.split()[3]) <= 600
        fleet.pause(0)
    with connect_sync(redis_url, role="test") as client:
        client.hset("rf:{idle}:board", "seen_ms", 1000)
    other = processes.worker(redis_url, "idle", altered=SOON)
    event = other.event("nothing to do", state="no-prompts")
    assert event["level"] == "warning"
    assert worker.stop() == 0
    assert other.stop() == 0


def test_a_redis_that_is_away_or_full(make_server: MakeServer, processes: Processes) -> None:
    server = make_server(tcp=True, extra=["--maxmemory-policy", "noeviction"])
    with rollfleet.connect(server.url, run="full", **SHAPE) as fleet:
        worker = processes.worker(server.url, "full", altered=SOON)
        worker.event("claiming")
        with connect_sync(server.url, role="test") as client:
            client.config_set("maxmemory", 1)
            why = said(worker, "redis-full")
            assert why.startswith("Redis is full: ")
            assert "maxmemory" in why
            client.config_set("maxmemory", 0)
        fleet.submit({"token_ids": [1]})
        batch = fleet.next_batch(2)
        assert batch is not None
        fleet.commit(batch)
    server.kill()
    why = said(worker, "no-redis")
    assert why.startswith("Redis does not answer: ")
    server.restart()
    wait_until(lambda: worker.page("/readyz")[1] != "no-redis\n", "Redis to be back", 30.0)
    assert worker.stop() == 0


async def test_it_is_said_seldom_and_anew_when_something_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idle, "LOOK_S", 0.001)
    monkeypatch.setattr(idle, "SAY_S", (10.0, 60.0, 300.0))
    now_s = 0.0
    cause: tuple[str, Hashable] = ("paused", None)

    async def explain(word: str) -> tuple[str, bool]:
        if word == "broken":
            raise RuntimeError("no details")
        return f"because {word}", True

    monkeypatch.setattr(idle, "time", SimpleNamespace(monotonic=lambda: now_s))
    looked = 0

    def look() -> tuple[str, Hashable]:
        nonlocal looked
        looked += 1
        return cause

    async def pass_time(to_s: float) -> None:
        nonlocal now_s
        now_s = to_s
        seen = looked
        await wait_until_async(lambda: looked > seen + 2, "it to look")

    caplog.set_level("INFO", "rollfleet.worker")
    task = asyncio.create_task(Idle(look, explain).run())
    times: list[float] = []
    for at_s in range(0, 1300, 5):
        before = len(caplog.records)
        await pass_time(at_s)
        times += [at_s] * (len(caplog.records) - before)
    assert times == [10, 60, 300, 600, 900, 1200]
    cause = ("", None)
    await pass_time(2000.0)
    assert len(caplog.records) == 6
    for word in ("broken", "no-prompts"):
        cause = (word, 1)
        await pass_time(now_s + 1)
        await pass_time(now_s + 11)
    task.cancel()
    broken, nothing = caplog.records[6:]
    assert (broken.event, nothing.event) == ("cannot work", "nothing to do")
    assert "broken (the details cannot be read: no details)" in broken.fields["why"]


async def test_only_names_of_runs_are_named(rig: Rig) -> None:
    assert await similar_runs(rig.client, "rgi") == "runs in this Redis with similar names: rig"
    for odd in (b"rf:{\x1b[2J}:board", b"rf:{a b}:board", b"rf:{x/0}:board"):
        await rig.client.set(odd, 1, ex=60)
    assert await similar_runs(rig.client, "rgi") == "runs in this Redis with similar names: rig"
