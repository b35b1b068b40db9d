"""Generations that outlive their workers and servers, in real processes; the server's log is the proof."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.fake_vllm import FakeVllm
from fixtures.fleet_processes import Process, Processes
from support import wait_until_async

import rollfleet
from rollfleet_common.redis import connect_sync
from rollfleet_worker.partials.codec import decode_partial

RUN = "resume"
PROMPT = [5, 6, 7]
BUDGET, SEGMENT = 16, 4
SHAPE: dict[str, Any] = {
    "samples_per_version": 8,
    "group_size": 1,
    "max_staleness": 4,
    "lease_s": 1.0,
    "starve_s": 40.0,
}


class Stage:
    """One run, one server that answers by script, and workers."""

    def __init__(self, url: str, processes: Processes, server: FakeVllm) -> None:
        self.url = url
        self.processes = processes
        self.server = server
        self.client = connect_sync(url, role="test")

    def fleet(self, version: int = 0, **settings: Any) -> rollfleet.AsyncFleet:
        made = rollfleet.TrainerSettings(redis_url=self.url, run=RUN, **SHAPE, **settings)
        return rollfleet.AsyncFleet(made, version=version)

    def worker(self, *servers: str, park: bool = True, **settings: Any) -> Process:
        given = {"max_tokens": BUDGET, "segment_tokens": SEGMENT, "lease_s": 1}
        return self.processes.worker(
            self.url,
            RUN,
            "Served",
            server=list(servers) or [self.server.url],
            engine="vllm",
            env={"ROLLFLEET_PARK": str(park)},
            **given | settings,
        )

    def begun(self, server: FakeVllm | None = None) -> list[int]:
        """The server's log: how many tokens of the completion every request brought with it."""
        seen = (server or self.server).seen
        for one in seen:
            assert one.body["token_ids"][: len(PROMPT)] == PROMPT
            assert one.body["sampling_params"]["max_tokens"] <= SEGMENT
        return [len(one.body["token_ids"]) - len(PROMPT) for one in seen]

    def parked(self) -> list[int]:
        """Tokens that are parked, by call."""
        keys = sorted(self.client.scan_iter(match=f"rf:{{{RUN}/0}}:progress:*"))
        assert all(self.client.pttl(key) > 0 for key in keys)
        return [len(decode_partial(self.client.get(key)).generation.token_ids) for key in keys]

    async def until_half(self, tokens: int = 8) -> None:
        """Until the server holds the third segment, and what came before it is parked."""
        await asyncio.wait_for(self.server.hanging.wait(), 30)
        await wait_until_async(lambda: self.parked() == [tokens], "the half to be parked")


@pytest.fixture
async def stage(redis_url: str, processes: Processes) -> AsyncIterator[Stage]:
    async with FakeVllm(version="0") as server:
        server.script.extend([fake_vllm.good, fake_vllm.good, fake_vllm.hang])
        stage = Stage(redis_url, processes, server)
        yield stage
        stage.client.close()


async def dying(fake: FakeVllm, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """No answer, ever: when the server is stopped the connection is gone."""
    fake.hanging.set()
    await fake.go_on.wait()
    assert request.transport is not None
    request.transport.abort()
    return await fake_vllm.good(fake, request, body)


async def judged(fleet: rollfleet.AsyncFleet, versions: list[int]) -> None:
    """The one rollout is whole, and every token bears the version that made it."""
    batch = await fleet.next_batch(1)
    assert batch is not None
    (rollout,) = batch.rollouts
    (sample,) = rollout.samples
    assert sample.token_ids.tolist() == PROMPT + [*range(SEGMENT)] * (BUDGET // SEGMENT)
    spans = sample.versions.expand(len(PROMPT) + BUDGET)[len(PROMPT) :]
    assert spans[:: BUDGET // len(versions)].tolist() == versions
    assert (rollout.header.min_version, sample.reward) == (min(versions), float(BUDGET))
    await fleet.commit(batch)
    books = await fleet.books()
    assert (books.balance, books.committed, books.dead) == (0, 1, 0)


async def test_a_killed_workers_tokens_are_not_made_again(stage: Stage) -> None:
    async with stage.fleet() as fleet:
        first = stage.worker()
        await fleet.submit({"token_ids": PROMPT})
        await stage.until_half()
        first.kill()
        await fleet.publish(1)
        stage.server.version = "1"
        second = stage.worker()
        await judged(fleet, [0, 0, 1, 1])
        assert stage.begun() == [0, 4, 8, 8, 12]
        await wait_until_async(lambda: stage.parked() == [], "what was parked to be removed")
        metric = 'rollfleet_resumed_tokens_total{after="parked"}'
        assert await asyncio.to_thread(second.metric, metric) == 8
        assert second.stop() == 0


async def test_a_drained_workers_tokens_are_not_made_again(stage: Stage) -> None:
    async with stage.fleet() as fleet:
        first = stage.worker(drain_s=0)
        await fleet.submit({"token_ids": PROMPT})
        await stage.until_half()
        assert await asyncio.to_thread(first.stop) == 0
        assert first.events("handed back")
        second = stage.worker()
        await judged(fleet, [0])
        assert stage.begun() == [0, 4, 8, 8, 12]
        assert second.stop() == 0


async def test_nothing_is_parked_unless_it_is_asked_for(stage: Stage) -> None:
    async with stage.fleet() as fleet:
        first = stage.worker(park=False)
        await fleet.submit({"token_ids": PROMPT})
        await asyncio.wait_for(stage.server.hanging.wait(), 30)
        assert stage.parked() == []
        first.kill()
        second = stage.worker(park=False)
        await judged(fleet, [0])
        assert stage.begun() == [0, 4, 8, 0, 4, 8, 12]
        assert second.stop() == 0


async def test_a_trainer_that_went_back_gets_nothing_of_the_history_it_left(stage: Stage) -> None:
    async with stage.fleet(version=3) as fleet:
        first = stage.worker()
        await fleet.submit({"token_ids": PROMPT})
        await stage.until_half()
        first.kill()
    stage.server.version = "2"
    async with stage.fleet(version=2, take_over=True) as fleet:
        second = stage.worker()
        await judged(fleet, [2])
        assert stage.begun() == [0, 4, 8, 0, 4, 8, 12]
        assert second.stop() == 0


async def test_a_server_that_dies_takes_one_segment_with_it(stage: Stage) -> None:
    async with stage.fleet() as fleet, FakeVllm(version="0") as spare:
        # Whichever of the two is asked, it dies in the third segment.
        for one in (stage.server, spare):
            one.script.clear()
            one.script.extend([fake_vllm.good, fake_vllm.good, dying])
        worker = stage.worker(stage.server.url, spare.url, park=False)
        await fleet.submit({"token_ids": PROMPT})
        waits = [asyncio.create_task(one.hanging.wait()) for one in (stage.server, spare)]
        await asyncio.wait(waits, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        dead = next(one for one in (stage.server, spare) if one.hanging.is_set())
        other = spare if dead is stage.server else stage.server
        other.script.clear()
        await dead.stop()
        await judged(fleet, [0])
        assert stage.begun(dead) + stage.begun(other) == [0, 4, 8, 8, 12]
        assert worker.stop() == 0
