"""A live worker, a process of its own, whose servers come, drain, go, lose their weights and heal."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fixtures import fake_vllm
from fixtures.fake_control import ControlledVllm
from fixtures.fleet_processes import Process, Processes
from support import wait_until_async
from typer.testing import CliRunner

import rollfleet
from rollfleet_common.servers import Servers, ServerWeights, WeightState
from rollfleet_console.cli import app

SHAPE: dict[str, Any] = {
    "samples_per_version": 64,
    "group_size": 2,
    "max_staleness": 4,
    "starve_s": 30.0,
}


class Live:
    """One run with a worker that was started without a server."""

    def __init__(self, url: str, worker: Process, fleet: rollfleet.AsyncFleet) -> None:
        self.url = url
        self.worker = worker
        self.fleet = fleet
        self.registry = Servers(fleet._client, fleet.keys)
        self.rows = 0

    async def cli(self, *args: str) -> str:
        env = {"ROLLFLEET_REDIS_URL": self.url, "ROLLFLEET_RUN": "live", "COLUMNS": "200"}
        done = await asyncio.to_thread(CliRunner().invoke, app, ["server", *args], env=env)
        assert done.exit_code == 0, done.output
        return done.output

    async def page(self) -> str:
        return (await asyncio.to_thread(self.worker.page, "/readyz"))[1].strip()

    async def until(self, server: ControlledVllm, *states: str) -> None:
        """Until the worker's log says so."""

        def there() -> bool:
            moves = self.worker.events("server moved", server=server.url)
            return bool(moves) and moves[-1]["state"] in states

        await wait_until_async(there, f"{server.url} to be {states}", 30.0)

    async def rollouts(self, groups: int = 2) -> list[Any]:
        for _ in range(groups):
            await self.fleet.submit({"token_ids": [1, 2]})
        batch = await self.fleet.next_batch(2 * groups)
        assert batch is not None
        await self.fleet.commit(batch)
        return list(batch.rollouts)

    async def servers_of(self, groups: int = 2) -> set[str]:
        return {rollout.header.server for rollout in await self.rollouts(groups)}

    async def tell(self, *rows: ServerWeights) -> None:
        await self.registry.tell(self.fleet.token, rows)

    def row(self, server: ControlledVllm, version: int, **fields: Any) -> ServerWeights:
        self.rows += 1
        fields = {"epoch": self.fleet.epoch, "at_ms": self.rows, **fields}
        return ServerWeights(server.url, WeightState.SERVING, version, **fields)


@pytest.fixture
async def live(redis_url: str, processes: Processes) -> AsyncIterator[Live]:
    # A debug log, because a refit is none of an operator's business.
    worker = processes.worker(redis_url, "live", "Served", max_tokens=3, log_level="debug")
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="live", **SHAPE)
    async with rollfleet.AsyncFleet(settings, version=0) as fleet:
        yield Live(redis_url, worker, fleet)
    assert worker.stop() == 0


async def test_servers_are_added_drained_and_removed_while_a_worker_runs(live: Live) -> None:
    async def reads(text: str) -> bool:
        return await live.page() == text

    await wait_until_async(lambda: reads("no-server"), "it to say what it waits for", 30.0)
    async with ControlledVllm(version="0") as one, ControlledVllm(version="0") as two:
        assert "added" in await live.cli("add", one.url, "--engine", "vllm")
        await wait_until_async(lambda: reads("ok"), "it to claim", 30.0)
        assert await live.servers_of() == {one.url}
        assert "added" in await live.cli("add", two.url + "/v1/")
        await live.until(two, "serving")

        # What runs on a server that drains ends there; nothing new is sent to it.
        one.script.extend([fake_vllm.hang] * 8)
        for _ in range(12):
            await live.fleet.submit({"token_ids": [1, 2]})
        await asyncio.wait_for(one.hanging.wait(), 30.0)
        await live.cli("drain", one.url)
        await live.until(one, "draining")
        held = len(one.seen)
        assert await live.servers_of() == {two.url}
        assert len(one.seen) == held
        one.go_on.set()
        batch = await live.fleet.next_batch(24)
        assert batch is not None
        await live.fleet.commit(batch)
        assert one.url in {rollout.header.server for rollout in batch.rollouts}

        await live.cli("undrain", one.url)
        await live.until(one, "serving")
        await live.cli("remove", one.url)
        await live.until(one, "removed")
        assert await live.servers_of() == {two.url}

        async def listed() -> dict[str, Any]:
            return {row["name"]: row for row in json.loads(await live.cli("list", "--json"))}

        async def only_two() -> bool:
            rows = await listed()
            return list(rows) == [two.url] and rows[two.url]["states"] == {"serving": 1}

        await wait_until_async(only_two, "the card to show it", 30.0)
        row = (await listed())[two.url]
        assert (row["registered"], row["limit"], row["seen_versions"]) == (True, 256, [0])
        assert two.url in await live.cli("list")
        await live.cli("remove", two.url)
        await wait_until_async(lambda: reads("no-server"), "it to wait again", 30.0)
        books = await live.fleet.books()
        assert (books.balance, books.dead, books.outstanding) == (0, 0, 0)


async def test_a_server_serves_what_the_trainer_says_or_not_at_all(live: Live) -> None:
    async with ControlledVllm(version="0") as one, ControlledVllm(version="0") as two:
        for fake in (one, two):
            await live.cli("add", fake.url)
            await live.until(fake, "serving")
        stale = ServerWeights(two.url, WeightState.STALE, 0, why="HTTP 500", at_ms=1)
        await live.tell(live.row(one, 0), stale)
        await live.until(two, "stale")
        assert await live.servers_of(4) == {one.url}

        # It restarts with the weights of its command line, and says so in every answer.
        await one.restart()
        await live.tell(live.row(two, 0))
        await live.until(two, "trial", "serving")
        for rollout in await live.rollouts(8):
            assert rollout.header.server == two.url
            assert set(rollout.samples[0].versions.versions.tolist()) == {-1, 0}
        await live.until(one, "stale")
        event = live.worker.event("a server holds other weights than it should")
        assert (event["server"], event["serves"], event["found"]) == (one.url, 0, -1)
        assert event["group"]
        assert live.worker.metric("rollfleet_version_disagreements_total") >= 1
        assert live.worker.metric(f'rollfleet_server_up{{server="{one.url}"}}') == 0

        # The trainer heals it.
        one.version = "0"
        await live.tell(live.row(one, 0))
        await live.until(one, "trial", "serving")
        await live.cli("drain", two.url)
        await live.until(two, "draining")
        assert await live.servers_of(4) == {one.url}
        books = await live.fleet.books()
        assert (books.balance, books.dead) == (0, 0)


async def test_a_worker_that_drains_still_follows_its_servers(live: Live) -> None:
    async with ControlledVllm(version="0") as fake:
        await live.cli("add", fake.url)
        await live.until(fake, "serving")
        until_ms = int((time.time() + 60) * 1000)
        await live.tell(ServerWeights(fake.url, WeightState.REFITTING, 0, until_ms=until_ms))
        await live.until(fake, "refitting")
        for _ in range(2):
            await live.fleet.submit({"token_ids": [1, 2]})
        busy = "rollfleet_slots_busy"
        await wait_until_async(
            lambda: asyncio.to_thread(lambda: live.worker.metric(busy) == 4), "calls to wait", 30.0
        )
        live.worker.signal(signal.SIGTERM)
        live.worker.event("draining", episodes=4)
        # The refit ends while the worker drains.
        await live.tell(live.row(fake, 0))
        batch = await live.fleet.next_batch(4)
        assert batch is not None
        await live.fleet.commit(batch)
        assert {rollout.header.attempt for rollout in batch.rollouts} == {1}
        assert await asyncio.to_thread(live.worker.wait) == 0
        assert not live.worker.events("handed back")


async def test_sampling_that_a_prompt_brings_reaches_the_server(live: Live) -> None:
    async with ControlledVllm(version="0") as fake:
        await live.cli("add", fake.url)
        await live.until(fake, "serving")
        sampling = {"max_tokens": 2, "stop_token_ids": [7, 9]}
        await live.fleet.submit({"token_ids": [1, 2], "sampling": sampling})
        batch = await live.fleet.next_batch(2)
        assert batch is not None
        await live.fleet.commit(batch)
        assert {rollout.header.attempt for rollout in batch.rollouts} == {1}
        asked = [seen.body["sampling_params"] for seen in fake.seen]
        assert sum(one["n"] for one in asked) == 2
        for one in asked:
            assert (one["max_tokens"], one["stop_token_ids"]) == (2, [7, 9])


async def test_a_server_that_was_left_paused_by_a_dead_trainer_goes_on(live: Live) -> None:
    async with ControlledVllm(version="0") as fake:
        await live.cli("add", fake.url)
        await live.until(fake, "serving")
        fake.paused = True
        state = WeightState.REFITTING
        await live.tell(ServerWeights(fake.url, state, 0, until_ms=1, at_ms=1))
        await live.until(fake, "stale")
        await wait_until_async(lambda: not fake.paused, "the pause to end", 30.0)
        live.worker.event("resumed a server that was left paused", server=fake.url)
