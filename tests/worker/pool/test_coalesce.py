"""Which calls travel together, and that they share nothing but the journey."""

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
from support import wait_until_async

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    SettingsError,
)
from rollfleet_common.messages import VersionSpans
from rollfleet_engines.http import OverloadedError
from rollfleet_engines.interface import Generation, Request, Sampling
from rollfleet_worker.pool.coalesce import CoalescingEngine


def request_of(affinity="a", tokens=(1, 2), version=0, **sampling):
    return Request(
        np.array(tokens, np.int32), Sampling(**{"max_tokens": 4, **sampling}), affinity, version
    )


class Server:
    """Numbers its completions, and notes how many were asked for at once."""

    def __init__(self):
        self.asked = []
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.short = 0
        self.cancelled = asyncio.Event()
        self.closed = 0

    async def generate(self, request, n=1):
        first = sum(self.asked)
        self.asked.append(n)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        return [
            Generation(
                np.array([first + i], np.int32),
                np.zeros(1, np.float32),
                VersionSpans.constant(0),
                "stop",
                "s",
            )
            for i in range(n - self.short)
        ]

    async def ready(self):
        return True

    async def close(self):
        self.closed += 1


@pytest.fixture
def server():
    return Server()


def ids(made):
    return [int(one.token_ids[0]) for one in made]


async def test_equal_calls_of_one_tick_travel_as_one_and_share_nothing(server):
    engine = CoalescingEngine(server)
    made = await asyncio.gather(*(engine.generate(request_of()) for _ in range(8)))
    assert server.asked == [8]
    assert sorted(itertools.chain.from_iterable(map(ids, made))) == list(range(8))


async def test_calls_for_several_get_their_several(server):
    engine = CoalescingEngine(server)
    made = await asyncio.gather(*(engine.generate(request_of(), n) for n in (1, 3, 2)))
    assert server.asked == [6]
    assert [ids(one) for one in made] == [[0], [1, 2, 3], [4, 5]]


async def test_further_fields_are_compared_by_value(server):
    engine = CoalescingEngine(server)
    first = request_of(extra={"a": 1, "b": [2]})
    second = request_of(extra={"b": [2], "a": 1})
    await asyncio.gather(engine.generate(first), engine.generate(second))
    assert server.asked == [2]


@pytest.mark.parametrize(
    "other",
    [
        request_of(affinity="b"),
        request_of(tokens=(1, 3)),
        request_of(version=1),
        request_of(max_tokens=5),
        request_of(temperature=0.5),
        request_of(top_p=0.5),
        request_of(top_k=5),
        request_of(min_p=0.5),
        request_of(stop_token_ids=(1,)),
        request_of(extra={"a": 1}),
    ],
)
async def test_calls_that_differ_in_anything_do_not(server, other):
    engine = CoalescingEngine(server)
    await asyncio.gather(engine.generate(request_of()), engine.generate(other))
    assert server.asked == [1, 1]


@pytest.mark.parametrize(
    "request_", [request_of(seed=1), request_of(extra={"seed": 1}), request_of(extra={"x": {1}})]
)
async def test_seeded_or_unreadable_sampling_travels_alone(server, request_):
    engine = CoalescingEngine(server)
    await asyncio.gather(engine.generate(request_), engine.generate(request_))
    assert server.asked == [1, 1]


async def test_later_ticks_travel_later_unless_there_is_a_window(server):
    async def twice(engine):
        first = asyncio.create_task(engine.generate(request_of()))
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.gather(first, engine.generate(request_of()))

    await twice(CoalescingEngine(server))
    assert server.asked == [1, 1]
    await twice(CoalescingEngine(server, window_s=0.05))
    assert server.asked == [1, 1, 2]


async def test_no_merged_call_is_larger_than_allowed(server):
    engine = CoalescingEngine(server, max_merge=4)
    made = await asyncio.gather(*(engine.generate(request_of(), n) for n in (1, 1, 1, 1, 3, 2, 9)))
    assert sorted(server.asked) == [2, 3, 4, 9]
    assert sorted(itertools.chain.from_iterable(map(ids, made))) == list(range(18))


async def test_one_caller_that_is_cancelled_harms_nobody(server):
    server.gate = asyncio.Event()
    engine = CoalescingEngine(server)
    first, second = (asyncio.create_task(engine.generate(request_of())) for _ in range(2))
    await wait_until_async(lambda: server.asked, "the call to be under way")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    server.gate.set()
    assert ids(await second) == [1]
    assert not server.cancelled.is_set()


async def test_a_caller_cancelled_before_departure_is_not_asked_for(server):
    engine = CoalescingEngine(server)
    first, second = (asyncio.create_task(engine.generate(request_of())) for _ in range(2))
    # Both join the batch in this tick, which leaves at the end of the next one.
    asyncio.get_running_loop().call_soon(first.cancel)
    assert ids(await second) == [0]
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    assert server.asked == [1]


async def test_when_all_are_cancelled_the_call_ends(server):
    server.gate = asyncio.Event()
    engine = CoalescingEngine(server)
    tasks = [asyncio.create_task(engine.generate(request_of())) for _ in range(2)]
    await wait_until_async(lambda: server.asked, "the call to be under way")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(server.cancelled.wait(), 5)
    await engine.close()


@pytest.mark.parametrize(
    "error",
    [
        EngineUnavailableError("down"),
        EngineRefusedError("too long"),
        OverloadedError("busy", 3.0),
        ValueError("a bug"),
    ],
)
async def test_a_failure_reaches_every_caller_as_what_it_was(server, error):
    server.error = error
    engine = CoalescingEngine(server)
    caught = await asyncio.gather(
        *(engine.generate(request_of()) for _ in range(3)), return_exceptions=True
    )
    assert [(type(one), str(one)) for one in caught] == [(type(error), str(error))] * 3
    assert len({id(one) for one in caught}) == 3
    assert all(isinstance(one, Exception) and one.__cause__ is error for one in caught)
    assert getattr(caught[0], "retry_after_s", 3.0) == 3.0


async def test_an_error_that_cannot_be_copied_is_shared(server):
    class OddError(Exception):
        def __init__(self, *, reason):
            super().__init__("odd", reason)

    server.error = OddError(reason="x")
    engine = CoalescingEngine(server)
    caught = await asyncio.gather(
        *(engine.generate(request_of()) for _ in range(2)), return_exceptions=True
    )
    assert caught == [server.error] * 2


async def test_too_few_completions_are_nobodys(server):
    server.short = 1
    engine = CoalescingEngine(server)
    caught = await asyncio.gather(
        *(engine.generate(request_of()) for _ in range(2)), return_exceptions=True
    )
    assert {type(one) for one in caught} == {EngineProtocolError}


async def test_closing_fails_who_waits_and_who_travels(server):
    server.gate = asyncio.Event()
    engine = CoalescingEngine(server, window_s=0.5)
    waiting = asyncio.create_task(engine.generate(request_of()))
    travelling = asyncio.create_task(CoalescingEngine.generate(engine, request_of(affinity="b")))
    await wait_until_async(lambda: len(engine._waiting) == 2, "both to wait")
    (key,) = (key for key, batch in engine._waiting.items() if batch.request.affinity == "b")
    engine._send(key, engine._waiting[key])
    await wait_until_async(lambda: server.asked, "the call to be under way")
    await engine.close()
    for task in (waiting, travelling):
        with pytest.raises(EngineUnavailableError, match="closed"):
            await task
    with pytest.raises(EngineUnavailableError, match="closed"):
        await engine.generate(request_of())
    assert server.closed == 1


async def test_everything_else_passes_through(server):
    engine = CoalescingEngine(server)
    assert await engine.ready()
    assert len(await engine.generate(replace(request_of(), affinity="z"), 16)) == 16


@pytest.mark.parametrize("settings", [{"max_merge": 0}, {"window_s": -1.0}, {"window_s": 9.0}])
async def test_settings_that_make_no_sense(server, settings):
    with pytest.raises(SettingsError):
        CoalescingEngine(server, **settings)
