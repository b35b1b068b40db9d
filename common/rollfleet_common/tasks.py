"""Ending background tasks for certain, and calling what a user gave, plain or async.

- Up to Python 3.11, a cancellation that meets `asyncio.wait_for` in the moment its future is done is
  lost (CPython issue 86296), and redis-py sends every command through it: one `cancel` may pass
  unnoticed, and a loop that waits out errors would go on for ever.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["call", "cancel_all", "is_async"]

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


def is_async(function: Callable[..., object]) -> bool:
    """Whether calling `function` makes a coroutine."""
    method = getattr(function, "__call__", None)  # noqa: B004 - of an object with an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)


async def call(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns. A plain function is called in a thread, and does not hold up the loop.

    An awaitable that a plain function returns is awaited.
    """
    made = function(*args) if is_async(function) else await asyncio.to_thread(function, *args)
    return await made if inspect.isawaitable(made) else made
