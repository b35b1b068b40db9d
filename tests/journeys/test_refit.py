"""A trainer that publishes to servers: killed half-way, resumed, begun anew."""

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest
from fixtures.fake_control import ControlledVllm
from fixtures.rig import Rig
from support import wait_until_async

import rollfleet
from rollfleet_common.errors import RefitError
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect
from rollfleet_common.servers import RegisteredServer, Servers, WeightState

RUN = "refit"
PROGRAM = """
import sys, rollfleet
url, run, server = sys.argv[1:]
fleet = rollfleet.connect(url, run=run, samples_per_version=8, lease_s=1, servers=[server])
fleet.publish(weights="/weights/v1")
"""


def settings(redis_url: str, *fakes: ControlledVllm, **more: Any) -> rollfleet.TrainerSettings:
    shape: dict[str, Any] = {"run": RUN, "samples_per_version": 8, "lease_s": 1, "heal_s": 0.05}
    servers = [fake.url for fake in fakes]
    return rollfleet.TrainerSettings(redis_url=redis_url, servers=servers, **{**shape, **more})


async def row(redis_url: str, fake: ControlledVllm) -> Any:
    client = connect(redis_url, role="test")
    try:
        return (await Servers(client, RunKeys(RUN)).read())[1].get(fake.url)
    finally:
        await client.aclose()


async def test_a_trainer_that_is_killed_half_way_leaves_a_row_that_runs_out(redis_url: str):
    async with ControlledVllm() as fake:
        gate = fake.faults["/collective_rpc"] = asyncio.Event()
        program = [sys.executable, "-c", PROGRAM, redis_url, RUN, fake.url]
        trainer = await asyncio.create_subprocess_exec(*program, stderr=subprocess.DEVNULL)
        try:
            await wait_until_async(lambda: "/collective_rpc" in fake.routes, "the reload", 20)
        finally:
            trainer.send_signal(signal.SIGKILL)
            await trainer.wait()
        left = await row(redis_url, fake)
        assert fake.paused
        assert (left.state, left.version) == (WeightState.REFITTING, -1)
        # What lets workers tell a refit from a corpse.
        assert left.until_ms > left.at_ms
        gate.set()
        fake.faults.clear()
        async with rollfleet.AsyncFleet(settings(redis_url, fake)) as fleet:
            assert fleet.version == 0
            await fleet.publish(0, "/weights/v0")
        assert (fake.paused, fake.version, fake.weights) == (False, "0", "/weights/v0")
        assert (await row(redis_url, fake)).state is WeightState.SERVING


async def test_a_trainer_that_comes_back_heals_with_the_weights_on_the_board(redis_url: str):
    async with ControlledVllm() as fake:
        async with rollfleet.AsyncFleet(settings(redis_url, fake)) as fleet:
            assert await fleet.publish(weights="/weights/v1") == 1
        await fake.restart()
        async with rollfleet.AsyncFleet(settings(redis_url, fake)):
            await wait_until_async(lambda: fake.version == "1", "the healer")
        assert fake.weights == "/weights/v1"


async def test_a_trainer_that_went_back_leaves_servers_to_its_first_publish(redis_url: str):
    async with ControlledVllm() as fake:
        async with rollfleet.AsyncFleet(settings(redis_url, fake)) as fleet:
            await fleet.publish(4, "/weights/v4")
        async with rollfleet.AsyncFleet(settings(redis_url, fake), version=2) as fleet:
            assert fleet.refits.current is None
            # Workers see by itself that this is of weights that no longer exist.
            ahead = await row(redis_url, fake)
            assert (ahead.version > fleet.version, ahead.epoch < fleet.epoch) == (True, True)
            await fleet.publish(2, "/weights/v2")
        assert fake.version == "2"


async def test_a_version_that_nobody_took_is_not_on_the_board(redis_url: str):
    async with ControlledVllm() as fake:
        fake.faults["/collective_rpc"] = 500
        async with rollfleet.AsyncFleet(settings(redis_url, fake)) as fleet:
            with pytest.raises(RefitError, match="it was not announced"):
                await fleet.publish(weights="/typo")
            assert fleet.version == 0
            assert "hold no current weights" in await fleet.reason()
            fake.faults.clear()
            assert await fleet.publish(weights="/weights/v1") == 1
            assert "hold no current weights" not in await fleet.reason()


async def test_a_trainer_that_moves_weights_itself_writes_no_rows(redis_url: str):
    moved: list[tuple[int, str]] = []

    async def transfer(version: int, weights: str) -> None:
        moved.append((version, weights))

    async with ControlledVllm() as fake:
        async with rollfleet.AsyncFleet(settings(redis_url, fake)) as fleet:
            await fleet.publish(weights="/weights/v1")
            assert await row(redis_url, fake) is not None
            await fleet.publish(weights="ring", transfer=transfer)
            assert await row(redis_url, fake) is None
        assert (moved, fake.version) == ([(2, "ring")], "1")


async def test_a_run_begun_anew_keeps_the_servers_of_its_operators(rig: Rig, redis_url: str):
    servers = Servers(rig.client, RunKeys(RUN))
    async with ControlledVllm() as fake:
        await servers.add(RegisteredServer(fake.url, added_ms=1))
        async with rollfleet.AsyncFleet(settings(redis_url)) as fleet:
            await fleet.publish(weights="/weights/v1")
            assert fake.version == "1"
        async with rollfleet.AsyncFleet(settings(redis_url, fresh=True)):
            assert await servers.read() == ({fake.url: RegisteredServer(fake.url, added_ms=1)}, {})
