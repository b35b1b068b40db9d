"""The task runner: async functions on a background thread, bounded, and nothing lost.

It knows neither Redis nor RL and may be used alone; docs/runner.md is its user page. It succeeds
AReaL's ``AsyncTaskRunner`` and keeps its idea (oldest results first, seeded shuffle on demand).

- Every task that was accepted becomes exactly one :class:`TaskOutcome`: a value, or an exception.
  ``submitted == waiting + running + done + collected``, at every moment, across stop and start.
- At most `max_concurrency` tasks run. A full input queue is an error at once, never a wait; a full
  output queue is back-pressure (nothing new starts), never death.
- Nothing polls: a submit wakes the loop, a finished task wakes a waiter that it can serve.
- No task can kill the loop: not by raising when called, not by SystemExit, not by ``loop.stop()``.
- Every state change happens under one lock; the loop's thread only launches and cancels.
"""

import asyncio
import inspect
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast

from rollfleet_common.errors import (
    RunnerError,
    RunnerStoppedError,
    RunnerTimeoutError,
    TaskQueueFullError,
)
from rollfleet_common.forks import Home

_new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
try:
    import uvloop

    _new_loop = uvloop.new_event_loop
except ImportError:  # pragma: no cover - Windows, or an interpreter that uvloop does not know
    pass

__all__ = ["Sizes", "TaskOutcome", "TaskRunner"]

T = TypeVar("T")
P = ParamSpec("P")

_log = logging.getLogger("rollfleet.runner")


@dataclass(frozen=True, slots=True)
class TaskOutcome(Generic[T]):
    """How one task ended. A task that returned None has ``ok`` and no error."""

    task_id: int
    #: What the task returned; None if it failed.
    value: T | None
    #: What it raised; asyncio.CancelledError if it was cancelled; None if it returned.
    error: BaseException | None
    #: time.monotonic() in seconds when the task was accepted, first ran (None: never), and ended.
    submitted_s: float
    started_s: float | None
    finished_s: float

    @property
    def ok(self) -> bool:
        """Whether the task returned."""
        return self.error is None

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled, by itself or by :meth:`TaskRunner.stop`."""
        return isinstance(self.error, asyncio.CancelledError)

    def result(self) -> T:
        """The value; raises what the task raised."""
        if self.error is not None:
            raise self.error
        return cast("T", self.value)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where all tasks ever accepted are now, in tasks."""

    waiting: int
    running: int
    #: Finished and not yet collected by `wait`.
    done: int
    submitted: int
    collected: int


@dataclass(slots=True, eq=False)
class _Job:
    id: int
    fn: Callable[..., Awaitable[Any]]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    submitted_s: float
    started_s: float | None = None
    #: Position in the order of starts; never-started jobs come after all started ones.
    order: int = -1


@dataclass(slots=True, eq=False)
class _Engine:
    """One incarnation of the loop: `start` makes one, `stop` ends it, a blocked one is left."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread = field(init=False)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    launch: deque[_Job] = field(default_factory=deque)
    #: Set by `stop`: time.monotonic() by which the thread has to be gone.
    deadline: float | None = None

    def call(self, fn: Callable[[], object]) -> None:
        """Run `fn` on the loop soon; a loop that is closed already has nothing left to do."""
        try:
            self.loop.call_soon_threadsafe(fn)
        except RuntimeError:
            _log.debug("the loop closed before it could be called")

    def cancel_all(self) -> None:
        for task in tuple(self.tasks):
            task.cancel()


class TaskRunner(Generic[T]):
    """Runs async functions on one background event loop (uvloop where there is one).

    All methods may be called from any thread, by many at once; use it as a context manager, or
    call :meth:`start` and :meth:`stop`. Restartable: outcomes not collected survive.

    Args:
        max_concurrency: Tasks that run at once.
        max_waiting: Tasks that may wait for a free slot; one more is TaskQueueFullError.
        max_done: Bound on finished-and-uncollected plus running tasks: when it is reached nothing
            new starts until :meth:`wait` makes room. None: ``max_concurrency + max_waiting``.
        shuffle_seed: Shuffle each list that `wait` hands out, reproducibly; None keeps
            oldest-first. Which outcomes are handed out is not changed by it.
        name: Name of the thread.

    Raises:
        ValueError: A bound below 1, or `max_done` below `max_concurrency` (slots that could never
            be used).
    """

    def __init__(
        self,
        max_concurrency: int,
        *,
        max_waiting: int = 1024,
        max_done: int | None = None,
        shuffle_seed: int | None = None,
        name: str = "task-runner",
    ) -> None:
        if max_concurrency < 1 or max_waiting < 1:
            raise ValueError(
                f"max_concurrency={max_concurrency} and max_waiting={max_waiting} must be >= 1"
            )
        self.max_concurrency = max_concurrency
        self.max_waiting = max_waiting
        self.max_done = max_concurrency + max_waiting if max_done is None else max_done
        if self.max_done < max_concurrency:
            raise ValueError(
                f"max_done={max_done} < max_concurrency={max_concurrency}: "
                f"{max_concurrency - self.max_done} slots could never be used"
            )
        self._home = Home(f"the task runner {name!r}", "Make and start a runner in the child")
        self._name = name
        self._random = None if shuffle_seed is None else random.Random(shuffle_seed)
        self._changed = threading.Condition(threading.Lock())
        self._engine: _Engine | None = None
        self._crash: BaseException | None = None
        self._paused = False
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._done: list[tuple[int, TaskOutcome[T]]] = []
        #: Counts that threads in `wait` are waiting for.
        self._wanted: list[int] = []
        self._submitted = self._collected = self._orders = 0

    def start(self) -> Self:
        """Start the loop's thread, not paused. Does nothing if it runs."""
        self._home.check()
        with self._changed:
            if self._engine is None:
                self._crash, self._paused = None, False
                engine = self._engine = _Engine(_new_loop())
                engine.thread = threading.Thread(
                    target=self._main, args=(engine,), name=self._name, daemon=True
                )
                engine.thread.start()
        return self

    def stop(self, timeout: float = 10.0) -> bool:
        """Cancel what runs and end the thread; every accepted task has an outcome afterwards.

        Tasks that never started come back as cancelled outcomes. What has ended, before or now,
        stays for :meth:`wait`; threads that wait for more than that get RunnerStoppedError.

        Args:
            timeout: Seconds until tasks that ignore their cancellation, or block the loop, are
                given up: they get a cancelled outcome and their (daemon) thread is left behind.

        Returns:
            Whether everything ended in time.

        Raises:
            RunnerError: Called by a task of this runner, which would wait for itself.
        """
        if self._home.left:
            return True  # a forked child: the thread is the parent's
        deadline = time.monotonic() + timeout
        with self._changed:
            engine = self._engine
            if engine is None:
                return True
            if threading.current_thread() is engine.thread:
                raise RunnerError(
                    "stop() was called by a task of this runner; stop it from outside"
                )
            if engine.deadline is not None:  # another thread is stopping it
                return self._changed.wait_for(lambda: self._engine is not engine, timeout)
            engine.deadline = deadline
            self._drop_unstarted(engine)
        try:
            engine.call(engine.cancel_all)
            with self._changed:
                self._changed.wait_for(lambda: not self._running, max(0.0, timeout))
            engine.call(engine.loop.stop)
            engine.thread.join(max(0.1, deadline - time.monotonic()))
        finally:  # also when Ctrl-C cuts the wait short
            with self._changed:
                given_up = list(self._running.values())
                for job in given_up:
                    why = f"task {job.id} did not end within {timeout} s of its cancellation"
                    self._settle(job, error=asyncio.CancelledError(why))
                self._engine = None
                self._changed.notify_all()
        if given_up or engine.thread.is_alive():
            ids = [job.id for job in given_up]
            _log.warning("stopped, but tasks %s did not heed their cancellation in time", ids)
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Queue ``fn(*args, **kwargs)``, to be called and awaited on the loop. Never blocks.

        Returns:
            The task's id, unique in this runner.

        Raises:
            TaskQueueFullError: `max_waiting` tasks wait already.
            RunnerStoppedError: Not started, stopped, or the loop died (its cause says of what).
        """
        return self.submit_batch([(fn, args, kwargs)])[0]

    def submit_batch(
        self,
        calls: Iterable[tuple[Callable[..., Awaitable[T]], Sequence[Any], Mapping[str, Any]]],
    ) -> list[int]:
        """Queue many ``(fn, args, kwargs)``, all of them or none; ids and errors as in `submit`."""
        self._home.check()  # ahead of the lock, which a thread may have held when we were forked
        now = time.monotonic()
        jobs = [_Job(-1, fn, args, kwargs, now) for fn, args, kwargs in calls]
        with self._changed:
            engine = self._engine
            if engine is None or engine.deadline is not None:
                raise self._stopped_error("cannot submit") from self._crash
            room = self.max_waiting - len(self._waiting) + self._slots()
            if len(jobs) > room:
                raise TaskQueueFullError(
                    f"{len(jobs)} tasks submitted, room for {room}: {len(self._waiting)} of "
                    f"max_waiting={self.max_waiting} wait, {len(self._running)} of "
                    f"max_concurrency={self.max_concurrency} run, {len(self._done)} of "
                    f"max_done={self.max_done} are done and not collected"
                    + (" (paused)" if self._paused else "")
                )
            for job in jobs:
                job.id = self._submitted
                self._submitted += 1
            self._waiting.extend(jobs)
            self._admit()
        return [job.id for job in jobs]

    def wait(self, count: int, timeout: float | None = None) -> list[TaskOutcome[T]]:
        """Take `count` outcomes, those of the tasks that started first among the finished ones.

        Several threads may wait at once; each is served as soon as there is enough for it.

        Args:
            count: How many.
            timeout: Seconds; None waits for ever, 0 takes what is there now or raises.

        Raises:
            ValueError: `count` is not positive, or over `max_done`: it could never be served.
            RunnerTimeoutError: Fewer came in time; those that did are kept for the next call.
            RunnerStoppedError: Fewer are there, and the runner is stopped: no more will come.
            RunnerError: Called by a task of this runner, which would wait for itself.
        """
        if count <= 0:
            raise ValueError(f"count={count} must be positive")
        self._home.check()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._wanted.append(count)
            try:
                while len(self._done) < count:
                    self._changed.wait(self._patience(count, timeout, deadline))
            finally:
                self._wanted.remove(count)
            taken = [heappop(self._done)[1] for _ in range(count)]
            self._collected += count
            self._admit()
            if self._random is not None:
                self._random.shuffle(taken)
        return taken

    def _patience(self, count: int, timeout: float | None, deadline: float | None) -> float | None:
        """Seconds that `wait` may still sleep; raises if waiting makes no sense (lock held)."""
        have = f"{len(self._done)} of {count} outcomes"
        if self._engine is None:
            raise self._stopped_error(f"have {have}, and no more will come") from self._crash
        if count > self.max_done:
            raise ValueError(f"count={count} > max_done={self.max_done}: could never be served")
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise RunnerTimeoutError(
                f"{have} after {timeout} s, all kept ({len(self._running)} tasks run, "
                f"{len(self._waiting)} wait{', paused' if self._paused else ''})"
            )
        if threading.current_thread() is self._engine.thread:
            raise RunnerError("wait() was called by a task of this runner: it would block the loop")
        return None if left is None else min(left, threading.TIMEOUT_MAX)

    def pause(self) -> None:
        """Start nothing new. What runs goes on, and its outcomes are delivered."""
        self._home.check()
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Start tasks again."""
        self._home.check()
        with self._changed:
            self._paused = False
            self._admit()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` holds."""
        return self._paused

    def sizes(self) -> Sizes:
        """A consistent snapshot of all counts."""
        self._home.check()
        with self._changed:
            waiting, running, done = len(self._waiting), len(self._running), len(self._done)
            return Sizes(waiting, running, done, self._submitted, self._collected)

    def healthy(self, timeout: float = 1.0) -> bool:
        """Whether the loop answers within `timeout` seconds: False if stopped, dead or blocked."""
        engine = self._engine
        if self._home.left or engine is None or engine.deadline is not None:
            return False
        if threading.current_thread() is engine.thread:
            return True
        answered = threading.Event()
        engine.call(answered.set)
        return answered.wait(timeout)

    # ---- under the lock -------------------------------------------------------------------------

    def _slots(self) -> int:
        """How many more tasks may start now."""
        if self._paused or self._engine is None or self._engine.deadline is not None:
            return 0
        busy = len(self._running)
        return max(0, min(self.max_concurrency - busy, self.max_done - busy - len(self._done)))

    def _admit(self) -> None:
        """Move tasks from waiting to running as far as the bounds allow, and wake the loop."""
        engine, slots = self._engine, min(self._slots(), len(self._waiting))
        if engine is None or not slots:
            return
        asleep = not engine.launch
        for _ in range(slots):
            job = self._waiting.popleft()
            self._order(job)
            self._running[job.id] = job
            engine.launch.append(job)
        if asleep:
            engine.call(lambda: self._launch(engine))

    def _order(self, job: _Job) -> None:
        job.order = self._orders
        self._orders += 1

    def _settle(
        self, job: _Job, value: T | None = None, error: BaseException | None = None
    ) -> None:
        """Turn a running job into its outcome."""
        del self._running[job.id]
        now = time.monotonic()
        outcome = TaskOutcome(job.id, value, error, job.submitted_s, job.started_s, now)
        heappush(self._done, (job.order, outcome))

    def _drop_unstarted(self, engine: _Engine) -> None:
        for job in self._waiting:
            self._order(job)
            self._running[job.id] = job
        for job in (*engine.launch, *self._waiting):
            why = f"task {job.id} never started: the runner was stopped"
            self._settle(job, error=asyncio.CancelledError(why))
        engine.launch.clear()
        self._waiting.clear()

    def _stopped_error(self, what: str) -> RunnerStoppedError:
        state = "its loop died" if self._crash else "it is stopped"
        return RunnerStoppedError(f"{what}: the runner is not running ({state}); call start()")

    # ---- on the loop's thread -------------------------------------------------------------------

    def _launch(self, engine: _Engine) -> None:
        with self._changed:
            jobs = tuple(engine.launch)
            engine.launch.clear()
        for job in jobs:
            task = engine.loop.create_task(self._run(job), name=f"{self._name}-{job.id}")
            engine.tasks.add(task)
            task.add_done_callback(partial(self._ended, engine, job))

    async def _run(self, job: _Job) -> None:
        job.started_s = time.monotonic()
        try:
            awaitable = job.fn(*job.args, **job.kwargs)
            if not inspect.isawaitable(awaitable):
                raise TypeError(  # noqa: TRY301 - it is an outcome like any other
                    f"{job.fn!r} returned {type(awaitable).__name__}, nothing to await: "
                    "submit an async function"
                )
            value = await awaitable
        except BaseException as exc:  # noqa: BLE001 - asyncio lets SystemExit end the whole loop
            self._finish(job, error=exc)
        else:
            self._finish(job, value)

    def _ended(self, engine: _Engine, job: _Job, task: asyncio.Task[None]) -> None:
        engine.tasks.discard(task)
        # A task that is cancelled before its first step never entered _run's try.
        if task.cancelled():
            self._finish(job, error=asyncio.CancelledError(f"task {job.id} was cancelled"))

    def _finish(
        self, job: _Job, value: T | None = None, error: BaseException | None = None
    ) -> None:
        with self._changed:
            if job.id not in self._running:
                return  # given up by stop(), which has told its outcome
            self._settle(job, value, error)
            self._admit()
            stopping = self._engine is not None and self._engine.deadline is not None
            if stopping or (self._wanted and len(self._done) >= min(self._wanted)):
                self._changed.notify_all()

    def _main(self, engine: _Engine) -> None:
        """The thread: run until `stop` says so, whatever tasks throw at the loop."""
        try:
            while engine.deadline is None:
                try:
                    engine.loop.run_forever()
                except (KeyboardInterrupt, SystemExit) as exc:
                    # Raised by a task that a task made; the loop itself is sound.
                    _log.warning("a task raised %r; the runner goes on", exc)
            engine.loop.run_until_complete(self._farewell(engine.deadline))
        except BaseException as exc:  # noqa: BLE001 - told to every caller
            self._died(engine, exc)
        finally:
            engine.loop.close()

    async def _farewell(self, deadline: float) -> None:
        """End what tasks have started and never awaited."""
        leftover = asyncio.all_tasks() - {asyncio.current_task()}
        for task in leftover:
            task.cancel()
        left = max(0.0, deadline - time.monotonic())
        if leftover:
            await asyncio.wait(leftover, timeout=left)
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await asyncio.get_running_loop().shutdown_asyncgens()

    def _died(self, engine: _Engine, exc: BaseException) -> None:
        _log.error("the runner's loop died", exc_info=exc)
        with self._changed:
            if self._engine is not engine or engine.deadline is not None:
                return  # stop() is at it
            engine.deadline = time.monotonic()
            self._drop_unstarted(engine)
            for job in list(self._running.values()):
                self._settle(job, error=asyncio.CancelledError(f"the loop died: {exc!r}"))
            self._crash, self._engine = exc, None
            self._changed.notify_all()
