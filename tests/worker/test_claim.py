"""Claiming against a real server: pauses, and what the dead left."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fixtures.rig import Rig, delivery_of, prompt_of
from support import wait_until_async

from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.messages import Claim
from rollfleet_common.redis import connect
from rollfleet_worker.claim import TURN_MS, Claimer
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
        self.refused: list[tuple[Claim, AttemptFailure]] = []
        self.alive: set[str] = set()
        #: Whether episodes end, and those that began.
        self.ends = False
        self.episodes: list[asyncio.Task[None]] = []
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
        if self.ends:
            self.episodes.append(asyncio.create_task(self._episode(claim)))

    async def _episode(self, claim: Claim) -> None:
        """One that has its rollout at once."""
        await self.rig.streams.deliver(self.name, [delivery_of(claim)])
        self.alive.discard(claim.entry)
        self.slots.give()

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


# ---- what the dead left ------------------------------------------------------------------------


async def leave(rig: Rig, samples: int, *, deliveries: int, skip: int = 0) -> None:
    """The first unread `samples` are leases of a dead worker, delivered so often."""
    key = rig.part.prompts("default")
    rows = await rig.client.xreadgroup("workers", "dead", {key: ">"}, count=samples)
    entries = [entry for entry, _ in rows[0][1]]
    assert len(entries) == samples
    for at in range(0, samples, 1000):
        await rig.client.xclaim(
            *(key, "workers", "dead", 0, entries[at : at + 1000]),
            idle=3_600_000,
            retrycount=deliveries,
            justid=True,
        )


async def test_suspects_do_not_hide_thousands_of_leases_behind_them(rig: Rig) -> None:
    await rig.submit(*(prompt_of(f"g{i}", 500) for i in range(40)))
    await leave(rig, 3000, deliveries=2)
    await leave(rig, 17_000, deliveries=1)
    workers = [rig.leases(f"w{i}") for i in range(4)]
    taken, rounds = 0, 0
    while taken < 17_000:
        rounds += 1
        before = taken
        for leases in workers:
            # Each runs a suspect already.
            rows = await leases.reclaim(rig.streams, "default", 30_000, 256, poison=3, suspects=0)
            assert all(deliveries == 2 for _, deliveries, _ in rows)
            assert len(rows) == 256 or taken + len(rows) == 17_000 or not rows
            taken += len(rows)
        assert taken > before, f"round {rounds} found nothing, {17_000 - taken} are left"
    assert rounds == -(-17_000 // (4 * 256))
    assert await workers[0].reclaim(rig.streams, "default", 30_000, 1, poison=3, suspects=0) == []
    assert workers[0].passed_over == 3000


async def test_the_next_suspect_is_taken_when_the_last_one_has_ended(
    rig: Rig, worker: Callable[..., Worker]
) -> None:
    """Not when a timer says so: 128 of them, left by a worker that died, would take a minute."""
    suspects = 128
    await rig.submit(prompt_of("g", suspects))
    await leave(rig, suspects, deliveries=2)
    two = [worker(f"w{i}", lease_s=600) for i in range(2)]
    waits_ms: list[int] = []
    claim = rig.streams.claim

    async def counted(*args: Any) -> Any:
        waits_ms.append(args[4] or 0)
        return await claim(*args)

    rig.streams.claim = counted  # type: ignore[method-assign]  # pyright: ignore[reportAttributeAccessIssue]
    for one in two:
        one.ends = True
    tasks = [asyncio.create_task(one.claimer.run(one.stopping)) for one in two]
    done = lambda: sum(len(one.begun) for one in two) == suspects  # noqa: E731
    await wait_until_async(done, "all of them to be run", 60.0)
    # Two short waits for each, at most; a whole block would be ten times that.
    assert sum(waits_ms) <= 2 * suspects * TURN_MS
    for one, task in zip(two, tasks, strict=True):
        await one.stop(task)
        await asyncio.gather(*one.episodes)
    assert (await rig.books()).in_flight == 0
