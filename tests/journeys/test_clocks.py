"""Hosts whose wall clocks are an hour off: pauses, refits, deadlines and cards go by Redis's clock."""

import json
import time
from typing import Any

import pytest
from fixtures.fake_control import ControlledVllm
from fixtures.fleet_processes import Process, Processes
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect_sync
from rollfleet_common.servers import Servers, ServerWeights, WeightState

HOUR_S = 3600.0
SHAPE: dict[str, Any] = {
    "samples_per_version": 32,
    "group_size": 2,
    "max_staleness": 4,
    "starve_s": 40.0,
}
both_ways = pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S], ids=["ahead", "behind"])


def ready(worker: Process, text: str) -> None:
    wait_until(lambda: worker.page("/readyz")[1].strip() == text, f"it to say {text}", 30.0)


def redis_ms(url: str) -> int:
    with connect_sync(url, role="test") as client:
        seconds, micros = client.time()  # type: ignore[misc]
    return int(seconds) * 1000 + int(micros) // 1000


def take(fleet: rollfleet.Fleet, samples: int) -> list[Any]:
    batch = fleet.next_batch(samples)
    assert batch is not None
    fleet.commit(batch)
    return list(batch.rollouts)


def set_trainer_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + ahead_s)


@both_ways
def test_a_pause_is_kept_and_ends(redis_url: str, processes: Processes, ahead_s: float) -> None:
    with rollfleet.connect(redis_url, run="pause", **SHAPE) as fleet:
        worker = processes.worker(redis_url, "pause", altered={"ahead_s": ahead_s})
        ready(worker, "ok")
        fleet.pause(600)
        ready(worker, "paused")
        fleet.pause(0)
        ready(worker, "ok")
        # One that ends by itself.
        fleet.pause(1)
        ready(worker, "paused")
        ready(worker, "ok")
        fleet.submit({"token_ids": [1]})
        for rollout in take(fleet, 2):
            assert 0 <= rollout.header.queue_ms < 60_000
        with connect_sync(redis_url, role="test") as client:
            (card,) = client.hvals(RunKeys("pause").workers)  # type: ignore[misc]
        shown = json.loads(card)
        assert abs(shown["seen_ms"] - redis_ms(redis_url)) < 60_000
        assert abs(shown["started_ms"] - redis_ms(redis_url)) < 120_000
    assert worker.stop() == 0


@both_ways
def test_a_trainer_whose_clock_is_off_pauses_for_as_long_as_it_says(
    redis_url: str, processes: Processes, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    set_trainer_clock(monkeypatch, ahead_s)
    with rollfleet.connect(redis_url, run="off", **SHAPE) as fleet:
        worker = processes.worker(redis_url, "off")
        ready(worker, "ok")
        fleet.pause(600)
        ready(worker, "paused")
        fleet.pause(1)
        ready(worker, "ok")
        fleet.submit({"token_ids": [1]})
        take(fleet, 2)
    assert worker.stop() == 0


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
@both_ways
def test_a_deadline_goes_over_to_a_trainer_on_another_host(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    with monkeypatch.context() as there:
        set_trainer_clock(there, ahead_s)
        with rollfleet.connect(redis_url, run="late", **SHAPE) as fleet:
            soon = int(time.time() * 1000) + 300
            fleet.submit({"token_ids": [1], "deadline_ms": soon})
            wait_until(
                lambda: fleet.books().dropped.get("deadline") == 2, "the deadline to pass", 30.0
            )
            group = fleet.submit({"token_ids": [1], "deadline_ms": soon + 600_000})
            assert fleet.books().dropped == {"deadline": 2}
            with connect_sync(redis_url, role="test") as client:
                record = RunKeys("late").partition(0).group(group)
                on_wire = int(client.hget(record, "deadline") or 0)  # type: ignore[arg-type]
            assert abs(on_wire - redis_ms(redis_url) - 600_000) < 60_000
    # The clock of this host is right, and the prompt has minutes left.
    with rollfleet.connect(redis_url, run="late", **SHAPE) as fleet:
        fleet.submit({"token_ids": [2], "deadline_ms": int(time.time() * 1000) + 100})
        wait_until(lambda: fleet.books().dropped.get("deadline") == 4, "the next to pass", 30.0)
        assert fleet.books().waiting == 2


@both_ways
async def test_a_server_in_the_middle_of_its_refit_is_left_alone(
    redis_url: str, processes: Processes, ahead_s: float
) -> None:
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="refit", **SHAPE)
    async with ControlledVllm(version="0") as fake, rollfleet.AsyncFleet(settings) as fleet:
        worker = processes.worker(
            redis_url, "refit", "Served", server=fake.url, altered={"ahead_s": ahead_s}
        )

        async def until(*states: str) -> None:
            def there() -> bool:
                moves = worker.events("server moved", server=fake.url)
                return bool(moves) and moves[-1]["state"] in states

            await wait_until_async(there, f"{fake.url} to be {states}", 30.0)

        registry = Servers(fleet._client, fleet.keys)

        async def refitting(ms: float) -> None:
            until_ms = int(fleet.line.clock.now_ms() + ms)
            row = ServerWeights(
                fake.url, WeightState.REFITTING, 0, until_ms=until_ms, at_ms=until_ms
            )
            await registry.tell(fleet.token, [row])

        await fleet.submit({"token_ids": [1]})
        batch = await fleet.next_batch(2)
        assert batch is not None
        await fleet.commit(batch)
        fake.paused = True
        await refitting(600_000)
        await until("refitting")
        assert fake.paused
        assert not worker.events("resumed a server that was left paused")
        # One whose time is over is resumed, whatever the worker's own clock says.
        await refitting(300)
        await until("stale")
        await wait_until_async(lambda: not fake.paused, "the pause to end", 30.0)
    assert worker.stop() == 0
