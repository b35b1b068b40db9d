"""The task runner keeps every promise of its docstring, on uvloop and on plain asyncio."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollfleet_common import runner as runner_module
from rollfleet_common.errors import (
    RunnerError,
    RunnerStoppedError,
    RunnerTimeoutError,
    TaskQueueFullError,
)
from rollfleet_common.runner import Sizes, TaskOutcome, TaskRunner

#: Seconds: a bound for what must happen at once, generous for a loaded machine.
SOON = 20.0


@pytest.fixture(params=["uvloop", "asyncio"], autouse=True)
def loop_kind(request, monkeypatch):
    if request.param == "asyncio":
        monkeypatch.setattr(runner_module, "_new_loop", asyncio.new_event_loop)
    return request.param


class Gate:
    """Tasks that a test holds and lets go one by one, from outside the loop."""

    def __init__(self) -> None:
        self.entered: dict[Any, threading.Event] = {}
        self._doors: dict[Any, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._lock = threading.Lock()

    def seen(self, key: Any) -> threading.Event:
        with self._lock:
            return self.entered.setdefault(key, threading.Event())

    async def __call__(self, key: Any) -> Any:
        door = asyncio.Event()
        self._doors[key] = (asyncio.get_running_loop(), door)
        self.seen(key).set()
        await door.wait()
        return key

    def open(self, *keys: Any) -> None:
        for key in keys:
            assert self.seen(key).wait(SOON), f"task {key} never started"
            loop, door = self._doors[key]
            loop.call_soon_threadsafe(door.set)


async def echo(value: Any = None) -> Any:
    return value


async def fail(error: BaseException) -> Any:
    raise error


async def for_ever() -> None:
    await asyncio.Event().wait()


def values(outcomes: list[TaskOutcome[Any]]) -> list[Any]:
    return [outcome.result() for outcome in outcomes]


def until(true: Callable[[], Any]) -> None:
    """Look until it is so: for what no event tells."""
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.001)


def flush(runner: TaskRunner[Any]) -> None:
    """Wait until the loop has done what it was told so far."""
    assert runner.healthy(SOON)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def runner() -> Iterator[TaskRunner[Any]]:
    with TaskRunner[Any](4, max_waiting=16) as made:
        yield made


# ---- outcomes ----------------------------------------------------------------------------------


def test_a_value_comes_back_with_its_id_and_times(runner):
    before = time.monotonic()
    task_id = runner.submit(echo, 7)
    (outcome,) = runner.wait(1, SOON)
    assert (outcome.task_id, outcome.value, outcome.error) == (task_id, 7, None)
    assert outcome.ok
    assert not outcome.cancelled
    assert before <= outcome.submitted_s <= outcome.started_s <= outcome.finished_s
    assert outcome.finished_s <= time.monotonic()


def test_keyword_arguments_even_named_fn_reach_the_task(runner):
    async def named(*, fn: int, self: int) -> tuple[int, int]:
        return fn, self

    runner.submit(named, fn=1, self=2)
    assert values(runner.wait(1, SOON)) == [(1, 2)]


def test_a_task_that_returns_none_is_told_apart_from_one_that_raised(runner):
    runner.submit(echo, None)
    runner.submit(fail, ValueError("mine"))
    none, failed = runner.wait(2, SOON)
    assert none.ok
    assert none.value is None
    assert not failed.ok
    assert isinstance(failed.error, ValueError)
    with pytest.raises(ValueError, match="mine"):
        failed.result()


def raises_when_called() -> Awaitable[None]:
    raise LookupError("no coroutine for you")


@pytest.mark.parametrize(
    ("fn", "error", "match"),
    [
        (raises_when_called, LookupError, "no coroutine"),
        (lambda: 3, TypeError, "returned int, nothing to await"),
        (echo.__code__, TypeError, "not callable"),
    ],
)
def test_a_function_that_is_no_coroutine_function_harms_nobody(runner, gate, fn, error, match):
    runner.submit(gate, "neighbour")
    runner.submit(fn)
    (bad,) = runner.wait(1, SOON)
    assert isinstance(bad.error, error)
    assert match in str(bad.error)
    gate.open("neighbour")
    assert values(runner.wait(1, SOON)) == ["neighbour"]


def test_any_awaitable_will_do(runner):
    def future() -> asyncio.Future[int]:
        made: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        made.get_loop().call_soon(made.set_result, 5)
        return made

    runner.submit(future)
    assert values(runner.wait(1, SOON)) == [5]


def test_a_task_that_cancels_itself_is_a_cancelled_outcome(runner):
    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        await asyncio.sleep(0)

    runner.submit(cancels_itself)
    (outcome,) = runner.wait(1, SOON)
    assert outcome.cancelled
    assert not outcome.ok


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_a_base_exception_is_an_outcome_and_the_loop_lives(runner, gate, error):
    runner.submit(gate, "neighbour")
    runner.submit(fail, error("from a task"))
    (bad,) = runner.wait(1, SOON)
    assert isinstance(bad.error, error)
    gate.open("neighbour")
    assert values(runner.wait(1, SOON)) == ["neighbour"]
    assert runner.healthy(SOON)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_base_exception_of_a_task_made_by_a_task_does_not_end_the_loop(
    runner, gate, error, caplog
):
    async def breeds() -> None:
        await asyncio.create_task(fail(error("from a grandchild")))

    runner.submit(gate, "neighbour")
    runner.submit(breeds)
    (bad,) = runner.wait(1, SOON)
    assert isinstance(bad.error, error)
    gate.open("neighbour")
    assert values(runner.wait(1, SOON)) == ["neighbour"]
    assert runner.healthy(SOON)
    until(lambda: "the runner goes on" in caplog.text)  # uvloop raises a few callbacks later


def test_a_task_that_stops_the_loop_does_not_end_it(runner):
    async def vandal() -> None:
        asyncio.get_running_loop().stop()

    runner.submit(vandal)
    runner.wait(1, SOON)
    runner.submit(echo, 1)
    assert values(runner.wait(1, SOON)) == [1]


def test_a_loop_that_dies_is_told_to_everyone_and_nothing_is_lost(gate, caplog):
    runner = TaskRunner[Any](2).start()
    runner.submit(gate, "running")
    runner.submit(echo, "done")
    assert gate.seen("running").wait(SOON)
    until(lambda: runner.sizes().done >= 1)
    engine = runner._engine
    assert engine

    class BrokenLoop:
        """Stands in for a loop whose own machinery fails."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def run_forever(self) -> None:
            raise OSError("epoll is gone")

    real, engine.loop = engine.loop, BrokenLoop()  # pyright: ignore[reportAttributeAccessIssue]
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(runner.wait, 3)
        until(lambda: runner._wanted)
        real.call_soon_threadsafe(real.stop)
        assert isinstance(waiter.exception(SOON), RunnerStoppedError)
    assert "the runner's loop died" in caplog.text
    assert not runner.healthy(0)
    with pytest.raises(RunnerStoppedError, match="its loop died") as caught:
        runner.submit(echo)
    assert isinstance(caught.value.__cause__, OSError)
    lost, done = runner.wait(2, 0)
    assert lost.cancelled
    assert "epoll is gone" in str(lost.error)
    assert done.result() == "done"
    assert runner.stop()
    with runner.start():
        runner.submit(echo, "again")
        assert values(runner.wait(1, SOON)) == ["again"]


# ---- bounds ------------------------------------------------------------------------------------


def test_never_more_than_max_concurrency_run(gate):
    with TaskRunner[Any](3, max_waiting=10) as runner:
        for key in range(8):
            runner.submit(gate, key)
        for key in range(3):
            assert gate.seen(key).wait(SOON)
        flush(runner)
        assert runner.sizes() == Sizes(waiting=5, running=3, done=0, submitted=8, collected=0)
        assert not gate.seen(3).is_set()
        gate.open(1)
        assert gate.seen(3).wait(SOON)
        flush(runner)
        assert not gate.seen(4).is_set()
        gate.open(0, *range(2, 8))
        assert len(runner.wait(8, SOON)) == 8


def test_a_full_input_queue_is_an_error_with_the_sizes_and_takes_nothing(gate):
    with TaskRunner[Any](1, max_waiting=2) as runner:
        for key in range(3):
            runner.submit(gate, key)
        with pytest.raises(
            TaskQueueFullError,
            match=r"1 tasks submitted, room for 0: 2 of max_waiting=2 wait, 1 of "
            r"max_concurrency=1 run, 0 of max_done=3",
        ):
            runner.submit(gate, 3)
        assert runner.sizes().submitted == 3
        gate.open(0)
        runner.wait(1, SOON)
        runner.submit(gate, 3)
        gate.open(1, 2, 3)
        assert values(runner.wait(3, SOON)) == [1, 2, 3]


def test_a_batch_is_taken_whole_or_not_at_all(gate):
    with TaskRunner[Any](1, max_waiting=2) as runner:
        runner.submit(gate, "first")
        with pytest.raises(TaskQueueFullError, match="3 tasks submitted, room for 2"):
            runner.submit_batch([(echo, (i,), {}) for i in range(3)])
        with pytest.raises(ValueError, match="unpack"):
            runner.submit_batch([(echo, (1,), {}), (echo, (2,))])  # type: ignore[list-item]
        assert runner.sizes().submitted == 1
        assert runner.submit_batch([]) == []
        ids = runner.submit_batch([(echo, (1,), {}), (echo, (), {"value": 2})])
        gate.open("first")
        outcomes = runner.wait(3, SOON)
        assert [o.task_id for o in outcomes[1:]] == ids
        assert values(outcomes) == ["first", 1, 2]


def test_free_slots_count_as_room_whatever_the_loop_has_got_round_to(gate):
    blocked, go = threading.Event(), threading.Event()

    async def blocks() -> None:
        blocked.set()
        go.wait(SOON)

    with TaskRunner[Any](4, max_waiting=1) as runner:
        runner.submit(blocks)
        assert blocked.wait(SOON)
        for i in range(4):
            runner.submit(echo, i)
        with pytest.raises(TaskQueueFullError):
            runner.submit(echo, 4)
        go.set()
        assert len(runner.wait(5, SOON)) == 5


def test_a_full_output_queue_holds_back_starts_and_loses_nothing(gate):
    with TaskRunner[Any](2, max_waiting=10, max_done=3) as runner:
        for key in range(7):
            runner.submit(gate, key)
        gate.open(0, 1)
        assert gate.seen(2).wait(SOON)
        gate.open(2)
        until(lambda: runner.sizes().done >= 3)
        assert runner.sizes() == Sizes(waiting=4, running=0, done=3, submitted=7, collected=0)
        assert not gate.seen(3).is_set()
        assert values(runner.wait(1, SOON)) == [0]
        assert gate.seen(3).wait(SOON)
        flush(runner)
        assert not gate.seen(4).is_set()
        gate.open(3)
        assert values(runner.wait(3, SOON)) == [1, 2, 3]
        gate.open(4, 5, 6)
        assert values(runner.wait(3, SOON)) == [4, 5, 6]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_concurrency": 0}, "must be >= 1"),
        ({"max_concurrency": 1, "max_waiting": 0}, "must be >= 1"),
        ({"max_concurrency": 5, "max_done": 3}, "2 slots could never be used"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        TaskRunner(**kwargs)


# ---- wait --------------------------------------------------------------------------------------


def test_outcomes_come_oldest_first_by_start(runner, gate):
    for key in range(4):
        runner.submit(gate, key)
    for key in (3, 1, 2):
        gate.open(key)
    until(lambda: runner.sizes().done >= 3)
    assert values(runner.wait(2, SOON)) == [1, 2]
    gate.open(0)
    assert values(runner.wait(2, SOON)) == [0, 3]


def test_the_shuffle_is_seeded_and_only_of_what_is_handed_out():
    def orders(seed: int | None) -> list[list[int]]:
        with TaskRunner[Any](32, shuffle_seed=seed) as runner:
            runner.submit_batch([(echo, (i,), {}) for i in range(32)])
            until(lambda: runner.sizes().done >= 32)
            return [values(runner.wait(16, SOON)) for _ in range(2)]

    plain, first, again, other = orders(None), orders(1), orders(1), orders(2)
    assert plain == [list(range(16)), list(range(16, 32))]
    assert first == again
    assert first not in (plain, other)
    assert [sorted(part) for part in first] == plain


def test_a_timed_out_wait_keeps_what_came(runner, gate):
    runner.submit(echo, 1)
    runner.submit(gate, 2)
    until(lambda: runner.sizes().done >= 1)
    with pytest.raises(RunnerTimeoutError, match=r"1 of 2 outcomes after 0\.01 s, all kept"):
        runner.wait(2, 0.01)
    gate.open(2)
    assert values(runner.wait(2, SOON)) == [1, 2]


def test_timeout_zero_means_now(runner, gate):
    runner.submit(gate, 1)
    began = time.monotonic()
    with pytest.raises(RunnerTimeoutError):
        runner.wait(1, 0)
    assert time.monotonic() - began < SOON
    gate.open(1)
    until(lambda: runner.sizes().done >= 1)
    assert values(runner.wait(1, 0)) == [1]


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_that_is_not_positive_is_refused(runner, count):
    with pytest.raises(ValueError, match="must be positive"):
        runner.wait(count)


def test_a_count_that_can_never_be_served_is_refused_with_the_arithmetic():
    with (
        TaskRunner[Any](2, max_waiting=9, max_done=4) as runner,
        pytest.raises(ValueError, match="count=5 > max_done=4"),
    ):
        runner.wait(5)


def test_an_infinite_timeout_is_a_timeout(runner, gate):
    runner.submit(gate, 1)
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(runner.wait, 1, float("inf"))
        gate.open(1)
        assert values(waiter.result(SOON)) == [1]


def test_a_task_may_submit_but_not_wait_or_stop(runner):
    async def inside() -> list[Any]:
        runner.submit(echo, "nested")
        errors: list[Any] = [runner.healthy()]
        for call in (lambda: runner.wait(9), runner.stop):
            try:
                call()
            except RunnerError as exc:
                errors.append(str(exc))
        return errors

    runner.submit(inside)
    outcomes = runner.wait(2, SOON)
    healthy, wait_error, stop_error = outcomes[0].result()
    assert healthy
    assert "would block the loop" in wait_error
    assert "stop it from outside" in stop_error
    assert outcomes[1].result() == "nested"


def test_many_threads_wait_at_once_and_each_outcome_reaches_exactly_one(gate):
    with (
        TaskRunner[Any](8, max_waiting=400) as runner,
        ThreadPoolExecutor(8) as pool,
    ):
        waiters = [pool.submit(runner.wait, 1 + i % 3, SOON) for i in range(120)]
        runner.submit_batch([(echo, (i,), {}) for i in range(240)])
        got = [v for waiter in waiters for v in values(waiter.result(SOON))]
        assert sorted(got) == list(range(240))
        assert runner.sizes() == Sizes(0, 0, 0, 240, 240)


# ---- pause -------------------------------------------------------------------------------------


def test_a_pause_starts_nothing_and_still_delivers(runner, gate):
    runner.submit(gate, "running")
    assert gate.seen("running").wait(SOON)
    runner.pause()
    assert runner.paused
    runner.submit(gate, "later")
    gate.open("running")
    assert values(runner.wait(1, SOON)) == ["running"]
    flush(runner)
    assert not gate.seen("later").is_set()
    with pytest.raises(RunnerTimeoutError, match="paused"):
        runner.wait(1, 0)
    runner.resume()
    gate.open("later")
    assert values(runner.wait(1, SOON)) == ["later"]


def test_a_paused_runner_gives_no_room_for_slots_it_will_not_use():
    with TaskRunner[Any](4, max_waiting=2) as runner:
        runner.pause()
        runner.submit_batch([(echo, (i,), {}) for i in range(2)])
        with pytest.raises(TaskQueueFullError, match="paused"):
            runner.submit(echo)
        runner.resume()
        assert values(runner.wait(2, SOON)) == [0, 1]


# ---- start and stop ----------------------------------------------------------------------------


def test_before_start_and_after_stop_calls_say_so():
    runner = TaskRunner[Any](1)
    for call in (lambda: runner.submit(echo), lambda: runner.wait(1)):
        with pytest.raises(RunnerStoppedError, match="is stopped"):
            call()
    assert runner.stop()
    with runner:
        pass
    assert runner.stop()
    assert not runner.healthy(0)
    with pytest.raises(RunnerStoppedError):
        runner.submit(echo)


def test_stop_gives_every_task_an_outcome(gate):
    runner = TaskRunner[Any](2, max_waiting=4)
    runner.start()
    first = runner.submit(gate, "done")
    gate.open("done")
    until(lambda: runner.sizes().done >= 1)
    running = [runner.submit(gate, i) for i in range(2)]
    for key in range(2):
        assert gate.seen(key).wait(SOON)
    queued = [runner.submit(gate, f"queued {i}") for i in range(3)]
    assert runner.stop(SOON)
    outcomes = runner.wait(6, 0)
    assert [o.task_id for o in outcomes] == [first, *running, *queued]
    assert [o.cancelled for o in outcomes] == [False] + [True] * 5
    assert all(o.started_s is not None for o in outcomes[:3])
    assert all(o.started_s is None for o in outcomes[3:])
    assert "never started" in str(outcomes[-1].error)
    with pytest.raises(RunnerStoppedError, match="have 0 of 1 outcomes"):
        runner.wait(1)


def test_a_task_may_answer_its_cancellation_with_a_value(runner, gate):
    async def saves_its_work() -> str:
        try:
            await gate("in")
        except asyncio.CancelledError:
            return "partial"
        return "whole"

    runner.submit(saves_its_work)
    assert gate.seen("in").wait(SOON)
    assert runner.stop(SOON)
    assert values(runner.wait(1, 0)) == ["partial"]


def test_a_stop_right_after_a_submit_loses_nothing():
    for _ in range(50):
        runner = TaskRunner[Any](8).start()
        ids = runner.submit_batch([(for_ever, (), {})] * 10)
        assert runner.stop(SOON)
        outcomes = runner.wait(10, 0)
        assert [o.task_id for o in outcomes] == ids
        assert all(o.cancelled for o in outcomes)


def test_a_runner_starts_again_and_what_was_not_collected_is_still_there(gate):
    runner = TaskRunner[Any](1)
    with runner:
        runner.submit(echo, 1)
        runner.pause()
        until(lambda: runner.sizes().done >= 1)
    with runner:
        assert runner.start() is runner
        assert not runner.paused
        runner.submit(echo, 2)
        assert values(runner.wait(2, SOON)) == [1, 2]


def test_stop_wakes_waiters(runner, gate):
    runner.submit(gate, 1)
    with ThreadPoolExecutor(2) as pool:
        waiters = [pool.submit(runner.wait, 2 + i) for i in range(2)]
        until(lambda: len(runner._wanted) == 2)
        assert runner.stop(SOON)
        for waiter in waiters:
            assert isinstance(waiter.exception(SOON), RunnerStoppedError)
    assert runner.wait(1, 0)[0].cancelled


def test_stop_serves_a_waiter_that_the_cancelled_outcomes_satisfy(runner, gate):
    runner.submit(gate, 1)
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(runner.wait, 1)
        until(lambda: runner._wanted)
        runner.stop(SOON)
        assert waiter.result(SOON)[0].cancelled


def test_many_threads_may_stop_at_once(runner, gate):
    runner.submit(gate, 1)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: runner.stop(SOON), range(8)))


def test_stop_is_bounded_when_a_task_blocks_the_loop(caplog):
    blocked, go = threading.Event(), threading.Event()

    async def blocks() -> str:
        blocked.set()
        go.wait(SOON)
        return "too late"

    runner = TaskRunner[Any](1).start()
    runner.submit(blocks)
    runner.submit(echo)
    assert blocked.wait(SOON)
    assert not runner.healthy(0.01)
    engine = runner._engine
    assert engine
    began = time.monotonic()
    assert not runner.stop(0.05)
    assert time.monotonic() - began < 5
    assert "did not heed" in caplog.text
    stuck, queued = runner.wait(2, 0)
    assert stuck.cancelled
    assert "did not end within 0.05 s" in str(stuck.error)
    assert queued.started_s is None
    with runner.start():  # a new loop, beside the one that is stuck
        runner.submit(echo, "new")
        assert values(runner.wait(1, SOON)) == ["new"]
        go.set()
        engine.thread.join(SOON)
        assert not engine.thread.is_alive()
        assert runner.sizes() == Sizes(0, 0, 0, 3, 3)  # the late outcome was told already


def test_stop_is_bounded_when_a_task_ignores_cancellation():
    entered, done = threading.Event(), threading.Event()

    async def stubborn() -> None:
        entered.set()
        try:
            while not done.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.001)
        finally:
            done.set()

    runner = TaskRunner[Any](1).start()
    runner.submit(stubborn)
    assert entered.wait(SOON)
    began = time.monotonic()
    assert not runner.stop(0.05)
    assert time.monotonic() - began < 5
    (outcome,) = runner.wait(1, 0)
    assert outcome.cancelled
    done.set()


def test_stop_ends_what_tasks_left_behind(runner):
    ended = threading.Event()

    async def straggler() -> None:
        try:
            await for_ever()
        finally:
            ended.set()

    strong: list[Any] = []

    async def breeds() -> None:
        strong.append(asyncio.create_task(straggler()))
        await asyncio.sleep(0)

    runner.submit(breeds)
    runner.wait(1, SOON)
    assert runner.stop(SOON)
    assert ended.is_set()


def test_an_interrupted_stop_leaves_a_runner_that_starts_again(runner, gate, monkeypatch):
    runner.submit(gate, 1)
    assert gate.seen(1).wait(SOON)
    engine = runner._engine

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.stop(SOON)
    engine.thread.join(SOON)
    assert runner.wait(1, 0)[0].cancelled
    with runner:
        runner.submit(echo, 2)
        assert values(runner.wait(1, SOON)) == [2]


# ---- speed and stress --------------------------------------------------------------------------


def test_a_round_trip_takes_well_under_a_millisecond(runner):
    def once() -> float:
        began = time.perf_counter()
        runner.submit(echo)
        runner.wait(1, SOON)
        return time.perf_counter() - began

    assert sorted(once() for _ in range(300))[150] < 1e-3


def test_an_idle_runner_does_not_wake_up(runner, monkeypatch):
    runner.submit(for_ever)
    flush(runner)
    wakes = []
    monkeypatch.setattr(runner, "_launch", wakes.append)
    before = time.thread_time_ns()
    clock = time.pthread_getcpuclockid(runner._engine.thread.ident)
    used = time.clock_gettime_ns(clock)
    threading.Event().wait(0.3)
    assert time.clock_gettime_ns(clock) - used < 5_000_000
    assert time.thread_time_ns() - before < 50_000_000
    assert not wakes


@settings(max_examples=25, deadline=None)
@given(
    concurrency=st.integers(1, 8),
    waiting=st.integers(1, 8),
    spare=st.integers(0, 8),
    producers=st.integers(1, 4),
    consumers=st.integers(1, 4),
    per_producer=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
)
def test_under_any_load_each_task_has_exactly_one_outcome(
    concurrency, waiting, spare, producers, consumers, per_producer, seed
):
    total = producers * per_producer
    peak = running = 0
    runner = TaskRunner[Any](
        concurrency, max_waiting=waiting, max_done=concurrency + spare, shuffle_seed=seed
    )

    async def work(key: int) -> int:
        nonlocal peak, running
        running += 1
        peak = max(peak, running)
        for _ in range(key % 4):
            await asyncio.sleep(0)
        running -= 1
        if key % 7 == 3:
            raise ValueError(key)
        return key

    def produce(which: int) -> dict[int, int]:
        ids = {}
        for i in range(per_producer):
            key = which * per_producer + i
            while True:
                try:
                    ids[runner.submit(work, key)] = key
                    break
                except TaskQueueFullError:
                    time.sleep(0.0002)
        return ids

    collected: list[TaskOutcome[Any]] = []
    lock = threading.Lock()

    def consume(which: int) -> None:
        dice = random.Random(seed + which)
        while True:
            count = dice.randint(1, min(3, runner.max_done))
            try:
                got = runner.wait(count, dice.choice([0, 0.001, 0.01]))
            except RunnerTimeoutError:
                got = []
            with lock:
                collected.extend(got)
                if len(collected) >= total - 2:
                    return
            sizes = runner.sizes()
            assert sizes.running <= concurrency
            assert sizes.running + sizes.done <= runner.max_done
            assert sizes.submitted == (sizes.waiting + sizes.running + sizes.done + sizes.collected)

    def pester() -> None:
        while len(collected) < total - 2:
            runner.pause()
            time.sleep(0.0002)
            runner.resume()
            time.sleep(0.001)

    with runner, ThreadPoolExecutor(producers + consumers + 1) as pool:
        made = [pool.submit(produce, i) for i in range(producers)]
        jobs = [pool.submit(consume, i) for i in range(consumers)]
        jobs.append(pool.submit(pester))
        keys: dict[int, int] = {}
        for future in made:
            keys.update(future.result(SOON))
        for job in jobs:
            job.result(SOON)
        while len(collected) < total:
            collected.extend(runner.wait(1, SOON))
    assert peak <= concurrency
    assert sorted(o.task_id for o in collected) == list(range(total))
    for outcome in collected:
        key = keys[outcome.task_id]
        assert outcome.ok == (key % 7 != 3)
        assert outcome.ok is (outcome.value == key)


def test_stops_and_starts_amid_submitting_threads_conserve_every_task():
    runner = TaskRunner[Any](4, max_waiting=8, max_done=64)
    taken: list[int] = []
    outcomes: list[TaskOutcome[Any]] = []
    over = threading.Event()

    async def work(ticks: int) -> None:
        for _ in range(ticks):
            await asyncio.sleep(0)

    def attempt(fn: Callable[[], Any]) -> Any:
        try:
            return fn()
        except RunnerError:
            return None

    def produce() -> list[int]:
        mine: list[int] = []
        while not over.is_set():
            task_id = attempt(lambda: runner.submit(work, len(mine) % 50))
            if task_id is None:
                time.sleep(0.0002)
            else:
                mine.append(task_id)
        return mine

    def consume() -> list[TaskOutcome[Any]]:
        mine: list[TaskOutcome[Any]] = []
        while not over.is_set():
            got = attempt(lambda: runner.wait(2, 0.01))
            mine.extend(got or [])
            if got is None:
                time.sleep(0.0002)
        return mine

    with ThreadPoolExecutor(4) as pool:
        producers = [pool.submit(produce) for _ in range(2)]
        consumers = [pool.submit(consume) for _ in range(2)]
        try:
            for _ in range(40):
                runner.start()
                time.sleep(0.003)
                assert runner.stop(SOON)
        finally:
            over.set()
        for producer in producers:
            taken.extend(producer.result(SOON))
        for consumer in consumers:
            outcomes.extend(consumer.result(SOON))
    sizes = runner.sizes()
    if sizes.done:
        outcomes.extend(runner.wait(sizes.done, 0))
    assert sizes.waiting == sizes.running == 0
    assert sorted(o.task_id for o in outcomes) == sorted(taken)
    assert len(taken) > 40


@pytest.fixture(autouse=True)
def quiet_asyncio(monkeypatch):
    """The debris of tasks that were abandoned on purpose is logged by asyncio, not by us."""
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)
