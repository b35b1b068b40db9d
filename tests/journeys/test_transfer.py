"""`publish(transfer=...)` and `load=`: plain and async functions, and what they may do wrong."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fixtures.by_hand import by_hand

import rollfleet

Calls = list[tuple[int, str]]


def plain(calls: Calls) -> Callable[[int, str], Any]:
    def move(version: int, weights: str) -> str:
        calls.append((version, weights))
        return "ignored"

    return move


def asynchronous(calls: Calls) -> Callable[[int, str], Any]:
    async def move(version: int, weights: str) -> None:
        calls.append((version, weights))

    return move


def returning(calls: Calls) -> Callable[[int, str], Any]:
    move = asynchronous(calls)
    return lambda version, weights: [move(version, weights)][0]


class Mover:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    async def __call__(self, version: int, weights: str) -> None:
        self.calls.append((version, weights))


@pytest.mark.leaves_keys("a run that was opened")
@pytest.mark.parametrize("kind", [plain, asynchronous, returning, Mover])
def test_a_transfer_may_be_plain_or_async(kind: Any, redis_url: str) -> None:
    calls: Calls = []
    with rollfleet.connect(redis_url, run="transfer", fresh=True) as fleet:
        assert fleet.publish(weights="w", transfer=kind(calls)) == 1
        assert (calls, fleet.version) == ([(1, "w")], 1)


async def test_a_plain_transfer_does_not_hold_up_the_loop(redis_url: str) -> None:
    async with by_hand(redis_url, "transfer") as hand:
        threads: list[threading.Thread] = []
        await hand.fleet.publish(transfer=lambda *_: threads.append(threading.current_thread()))
        assert threads[0] is not threading.current_thread()


@pytest.mark.leaves_keys("a run that was opened")
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_transfer_that_raises_announces_nothing(kind: str, redis_url: str) -> None:
    def fail(version: int, weights: str) -> None:
        raise RuntimeError("NCCL is unhappy")

    async def fail_async(version: int, weights: str) -> None:
        fail(version, weights)

    with rollfleet.connect(redis_url, run="transfer", fresh=True) as fleet:
        with pytest.raises(RuntimeError, match="NCCL"):
            fleet.publish(transfer=fail if kind == "plain" else fail_async)
        assert fleet.version == 0
        assert fleet.publish() == 1


@pytest.mark.leaves_keys("a run that was opened")
@pytest.mark.parametrize("name", ["transfer", "load"])
def test_what_is_no_function_is_refused_at_once(name: str, redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="transfer", fresh=True) as fleet:
        with pytest.raises(rollfleet.SettingsError, match=f"{name} is str"):
            fleet.publish(weights="w", **{name: "broadcast"})
        assert fleet.version == 0


def test_an_async_should_accept_is_refused(redis_url: str) -> None:
    async def accept(_: Any) -> bool:
        return False

    with pytest.raises(rollfleet.SettingsError, match="plain function"):
        rollfleet.connect(redis_url, run="transfer", should_accept=accept)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
