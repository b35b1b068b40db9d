"""Background tasks end, also where a cancellation is lost on the way."""

import asyncio

from rollfleet_common.tasks import cancel_all


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await cancel_all([task])
    assert task.cancelled()
    assert lost == 3


async def test_what_has_ended_already_is_left_alone() -> None:
    async def fails() -> None:
        raise ValueError("no")

    async def ends() -> int:
        return 1

    tasks = [asyncio.create_task(fails()), asyncio.create_task(ends())]
    await asyncio.wait(tasks)
    await cancel_all(tasks)
    await cancel_all([])
    assert tasks[1].result() == 1
