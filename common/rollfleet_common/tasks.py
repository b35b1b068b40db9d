"""Ending background tasks for certain.

- Up to Python 3.11, a cancellation that meets `asyncio.wait_for` in the moment its future is done is
  lost (CPython issue 86296), and redis-py sends every command through it: one `cancel` may pass
  unnoticed, and a loop that waits out errors would go on for ever.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["cancel_all"]

#: Between two cancellations of a task that goes on.
AGAIN_S = 0.2


async def cancel_all(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel `tasks` until the last of them has ended; what they raised is not looked at."""
    every = list(tasks)
    left = {task for task in every if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    for task in every:
        if not task.cancelled():
            task.exception()  # seen: nothing complains when it is collected
