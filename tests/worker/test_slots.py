"""Slots are handed out in order, and one that is taken is somebody's, whatever fails after it."""

import asyncio
from typing import Any

from support import wait_until_async

from rollfleet_common.messages import Claim
from rollfleet_worker.claim import Claimer
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings
from rollfleet_worker.slots import Slots


async def test_takes_what_is_free_and_no_more() -> None:
    slots = Slots(4)
    assert await slots.take(1, 3) == 3
    assert (slots.free, slots.busy) == (1, 3)
    assert slots.try_take(5) == 1
    assert slots.try_take(5) == 0
    slots.give(4)
    assert await slots.take(9, 9) == 4  # at most all there are


async def test_who_gave_back_does_not_overtake_who_waits() -> None:
    slots = Slots(2)
    turns: list[str] = []

    async def taker(name: str) -> None:
        for _ in range(3):
            taken = await slots.take(1, 2)
            turns.append(name)
            await asyncio.sleep(0)
            slots.give(taken)

    async with asyncio.timeout(10):
        await asyncio.gather(*(taker(name) for name in "abc"))
    assert turns == list("abc" * 3)


async def test_closed_slots_wake_all_who_wait() -> None:
    slots = Slots(1)
    assert await slots.take(1, 1) == 1
    waiting = [asyncio.create_task(slots.take(1, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    slots.close()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*waiting) == [0, 0, 0]
    assert await slots.take(1, 1) == 0


async def test_a_read_that_fails_gives_back_no_slot_of_an_episode() -> None:
    """Leases are taken over, then the connection goes: their episodes keep their slots."""
    slots = Slots(4)
    stopping = asyncio.Event()
    begun: list[Any] = []
    claim = Claim(
        prompt=None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # not looked at
        index=0,
        attempt=1,
        entry="1-1",
        partition=0,
        queued_ms=0,
    )

    class Names:
        group, route = "g", "default"

    object.__setattr__(claim, "prompt", Names())

    class Gone:
        worker = "w"
        calls = passed_over = 0

        async def make_groups(self, routes: Any) -> None:
            pass

        async def reclaim(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return [(claim, 2, "old")] * 2 if self.calls == 1 else []

        async def claim(self, *args: Any) -> Any:
            raise ConnectionError("cut")

    gone: Any = Gone()

    async def gate() -> None:
        pass

    claimer = Claimer(
        streams=gone,
        leases=gone,
        reader=None,
        routes=["default"],
        slots=slots,
        settings=WorkerSettings.load(workflows={"default": "a:B"}),
        metrics=Metrics(),
        gate=gate,
        spawn=begun.append,
        refuse=lambda *_: None,
        owns=lambda _: False,
        on_wait=lambda *_: stopping.set(),
        alone=True,
    )
    running = asyncio.create_task(claimer.run(stopping))
    await wait_until_async(running.done, "the claimer to stop", 30.0)
    assert len(begun) == 2
    assert slots.free == 2
