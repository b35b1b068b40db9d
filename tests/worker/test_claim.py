"""Claiming against a real server: pauses, and what the dead left."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fixtures.rig import Rig, prompt_of
from support import wait_until_async

from rollfleet_common.leases import Failure, Leases
from rollfleet_common.messages import Claim
from rollfleet_common.redis import connect
from rollfleet_worker.claim import Claimer
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings
from rollfleet_worker.slots import Slots


class Worker:
    """A claimer whose episodes are lists."""

    def __init__(self, rig: Rig, url: str, name: str, slots: int, **settings: Any) -> None:
        self.rig = rig
        self.name = name
        self.paused = False
        self.begun: list[Claim] = []
        self.refused: list[tuple[Claim, Failure]] = []
        self.alive: set[str] = set()
        self.stopping = asyncio.Event()
        self.slots = Slots(slots)
        self.leases = Leases(rig.client, rig.part, name)
        self.reader = connect(url, role=name, blocking=True)
        self.claimer = Claimer(
            streams=rig.streams,
            leases=self.leases,
            reader=self.reader,
            routes=["default"],
            slots=self.slots,
            settings=WorkerSettings.load(workflows={"default": "a:B"}, **settings),
            metrics=Metrics(),
            gate=self._gate,
            spawn=self._spawn,
            refuse=lambda claim, failure: self.refused.append((claim, failure)),
            owns=lambda claim: claim.entry in self.alive,
            on_wait=lambda *_: None,
            alone=True,
            paused=lambda: self.paused,
        )

    async def _gate(self) -> None:
        await wait_until_async(lambda: not self.paused or self.stopping.is_set(), "the gate", 60.0)

    def _spawn(self, claim: Claim) -> None:
        self.begun.append(claim)
        self.alive.add(claim.entry)

    async def stop(self, task: "asyncio.Task[None]") -> None:
        self.stopping.set()
        self.slots.close()
        await asyncio.wait_for(task, 30)


@pytest.fixture
async def worker(rig: Rig, redis_url: str) -> AsyncIterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(name: str, slots: int = 4, **settings: Any) -> Worker:
        made.append(Worker(rig, redis_url, name, slots, **settings))
        return made[-1]

    yield make
    for each in made:
        await each.reader.aclose()


async def blocked(rig: Rig) -> bool:
    info = await rig.client.info("clients")
    return int(info["blocked_clients"]) > 0


async def test_what_a_blocked_read_brings_in_a_pause_goes_back_untouched(
    rig: Rig, worker: Callable[..., Worker]
) -> None:
    one = worker("w1")
    task = asyncio.create_task(one.claimer.run(one.stopping))
    await wait_until_async(lambda: blocked(rig), "its read to block")
    one.paused = True
    await rig.submit(prompt_of("g", 3))

    async def back() -> bool:
        books = await rig.books()
        return books.waiting == 3 and not await blocked(rig) and one.slots.free == 4

    await wait_until_async(back, "the prompts to wait again")
    assert not one.begun
    # Its attempts and deliveries were not counted.
    rows = await rig.client.xinfo_consumers(rig.part.prompts("default"), "workers")
    assert [row["pending"] for row in rows if row["name"] == b"w1"] == [0]
    one.paused = False
    await wait_until_async(lambda: len(one.begun) == 3, "them to be run after all")
    assert [claim.attempt for claim in one.begun] == [1, 1, 1]
    key = rig.part.prompts("default")
    counted = await rig.client.xpending_range(key, "workers", "-", "+", 10)
    assert [row["times_delivered"] for row in counted] == [1, 1, 1]
    await one.stop(task)
