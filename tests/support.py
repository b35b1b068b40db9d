"""Waiting for what another process or task will do, instead of sleeping and hoping."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

__all__ = ["wait_until", "wait_until_async"]

T = TypeVar("T")

POLL_S = 0.01


def wait_until(predicate: Callable[[], T], description: str, timeout_s: float = 10.0) -> T:
    """The first true value of `predicate()`, asked every 10 ms.

    Raises:
        AssertionError: It was not true within `timeout_s`; names `description` and the last value.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline, _late(description, timeout_s, value)
        time.sleep(POLL_S)
    return value


async def wait_until_async(
    predicate: Callable[[], T | Awaitable[T]], description: str, timeout_s: float = 10.0
) -> T:
    """The same for a running event loop; `predicate` may be a plain or an async function.

    Raises:
        AssertionError: It was not true within `timeout_s`; names `description` and the last value.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        value = cast("T", await answer if inspect.isawaitable(answer) else answer)
        if value:
            return value
        assert time.monotonic() < deadline, _late(description, timeout_s, value)
        await asyncio.sleep(POLL_S)


def _late(description: str, timeout_s: float, value: object) -> str:
    return f"waited {timeout_s:g} s in vain for: {description} (last value: {value!r})"
