"""The reward pool: runs user reward functions outside the event loop, in processes it can kill.

- A function that is too slow, dies or returns no finite number is a typed error, never a reward
  of zero.
- The clock of a deadline starts when a process starts the function. Queueing for a free process is
  not held against it; the episode's own deadline bounds that.
- A job that is cancelled or too slow has its process killed; the pool goes on with a fresh one, and
  jobs beside it notice nothing.

AReaL's ``AsyncRewardWrapper`` shows what happens otherwise (its issue 548): queueing counted as
running, a timeout became reward 0, and the slow process kept its place.
"""

import asyncio
import inspect
import math
import pickle
import time
from collections.abc import Awaitable, Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from pebble import ProcessExpired

from rollfleet_common.errors import (
    EpisodeCancelledError,
    EpisodeTimeoutError,
    InfraError,
    RewardError,
)
from rollfleet_worker.rewards.outcome import Reward, RewardFailure, RewardValue, read
from rollfleet_worker.rewards.processes import RewardProcesses

__all__ = ["Reward", "RewardPool", "RewardValue"]

#: Seconds past its deadline after which a job shows that the pool itself is stuck: a process may
#: have to start first, and to import.
_GRACE_S = 60.0


class RewardPool:
    """Runs reward functions. Belongs to one event loop; processes start with the first job.

    Args:
        processes: How many functions run at once; 0 means `inline`.
        timeout_s: Seconds that a function may run.
        max_tasks_per_process: Replace a process after that many jobs, against leaks; 0 for never.
        inline: Run plain functions in the event loop itself, for verifiers that take microseconds.
            Nothing can kill them there: one that hangs, hangs the worker.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        processes: int,
        timeout_s: float,
        max_tasks_per_process: int = 0,
        *,
        inline: bool = False,
    ) -> None:
        if processes < 0 or max_tasks_per_process < 0:
            raise ValueError(
                f"processes={processes} and max_tasks_per_process={max_tasks_per_process} "
                "must not be negative"
            )
        self._timeout_s = _positive(timeout_s)
        self._inline = inline or processes == 0
        self._count = processes
        self._max_tasks = max_tasks_per_process
        # Jobs queue here and not in pebble, where cancelling a job that has not started yet would
        # cost the process that comes to it.
        self._free = asyncio.Semaphore(max(1, processes))
        self._modules: list[str] = []
        self._processes: RewardProcesses | None = None
        self._ending: set[asyncio.Future[None]] = set()
        self._closed = False

    async def score(
        self,
        fn: Callable[..., RewardValue | Awaitable[RewardValue]],
        *args: Any,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Reward:
        """Run ``fn(*args, **kwargs)`` and read its reward.

        A plain function runs in a process and must be importable there: defined at the top level of
        a module. An async function runs in this event loop under the same deadline. It returns a
        number, ``(number, {name: number})``, or a mapping with the key "reward". The module of `fn`
        is imported before the clock starts, except by processes that were there before its first
        use. Cancelling this call kills the job.

        Args:
            fn: The reward function.
            args: Passed on, pickled.
            timeout_s: Seconds that it may run, instead of the pool's.
            kwargs: Passed on, pickled.

        Raises:
            EpisodeTimeoutError: It ran longer (its process was killed), or raised TimeoutError.
            RewardError: It raised, its process died, its result is no finite number, or it cannot
                be sent to a process.
            RollfleetError: Any other one of ours that it raised.
            InfraError: Processes cannot be started here, or do not answer.
            EpisodeCancelledError: The pool is closed.
        """
        limit_s = self._timeout_s if timeout_s is None else _positive(timeout_s)
        what = f"reward function {_name(fn)}"
        self._check_open(what)
        if self._inline or _is_async(fn):
            return await _score_here(partial(fn, *args, **kwargs), limit_s, what)
        job = _pickled(fn, args, kwargs, what)
        self._remember_module(fn)
        async with self._free:
            return await self._score_in_process(job, limit_s, what)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Kill what runs, refuse what waits (EpisodeCancelledError), end all processes.

        Args:
            timeout_s: Seconds until it returns, whether or not the processes are gone by then.
        """
        self._closed = True
        if self._processes is not None:
            self._discard(self._processes)
        if self._ending:
            await asyncio.wait(self._ending, timeout=timeout_s)

    async def _score_in_process(self, job: bytes, limit_s: float, what: str) -> Reward:
        broken: Exception | None = None
        for _ in range(2):  # a pool that broke is replaced; the job was hardly the reason
            self._check_open(what)
            processes = self._processes = self._processes or self._start()
            try:
                answer = await self._attempt(processes, job, limit_s)
            except BrokenProcessPool as exc:
                self._discard(processes)
                broken = exc
            except ProcessExpired as exc:
                raise RewardError(
                    f"{what} ended its process with exit code {exc.exitcode}"
                    " (negative: killed by that signal; -9 is often a lack of memory)"
                ) from exc
            except TimeoutError as exc:
                raise EpisodeTimeoutError(
                    f"{what} did not return within {limit_s} s of its start; its process was killed"
                ) from exc
            else:
                if isinstance(answer, RewardFailure):
                    raise answer.named(what)
                return answer
        self._check_open(what)
        raise InfraError(
            f"{what}: reward processes do not work here ({broken}). Does the main script guard its "
            "start with `if __name__ == '__main__':`? Each process imports it"
        ) from broken

    async def _attempt(
        self, processes: RewardProcesses, job: bytes, limit_s: float
    ) -> Reward | RewardFailure:
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        net = asyncio.timeout(limit_s + _GRACE_S)
        try:
            async with net:
                return await processes.run(job, limit_s)
        except TimeoutError as exc:
            if net.expired():
                raise BrokenProcessPool(f"no answer {_GRACE_S} s past the deadline") from exc
            raise
        except asyncio.CancelledError as exc:
            if processes.over and task and task.cancelling() == cancels:
                # Not us, the whole pool was ended: closed, or broken by what a neighbour saw.
                raise BrokenProcessPool("the pool was ended") from exc
            raise

    def _start(self) -> RewardProcesses:
        started = RewardProcesses(self._count, self._max_tasks, self._modules)
        self._ending.add(started.ended)
        started.ended.add_done_callback(self._ending.discard)
        return started

    def _discard(self, processes: RewardProcesses) -> None:
        processes.end()
        if self._processes is processes:
            self._processes = None

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise EpisodeCancelledError(f"{what}: the reward pool is closed")

    def _remember_module(self, fn: Callable[..., Any]) -> None:
        fn = _bare(fn)
        module = getattr(fn, "__module__", None) or type(fn).__module__
        if module != "__main__" and module not in self._modules:
            self._modules.append(module)


async def _score_here(call: Callable[[], Any], limit_s: float, what: str) -> Reward:
    """In this event loop: async functions, and plain ones of an inline pool."""
    deadline = asyncio.timeout(limit_s)
    began = time.perf_counter()
    try:
        async with deadline:
            result = call()
            if inspect.isawaitable(result):
                result = await result
        seconds = time.perf_counter() - began
        if deadline.expired():
            raise TimeoutError("it went on after it was cancelled")  # noqa: TRY301
        value, components = read(result)
    except (Exception, SystemExit) as exc:
        if deadline.expired():
            raise EpisodeTimeoutError(f"{what} did not return within {limit_s} s") from exc
        raise RewardFailure.of(exc).named(what, exc) from exc
    return Reward(value, components, seconds)


def _pickled(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> bytes:
    try:
        pickle.dumps(fn)
    except Exception as exc:  # pickle raises what it likes
        raise RewardError(
            f"{what} cannot be sent to a process ({exc}): define it at the top level of a module "
            "that workers can import, or run it in the event loop (--reward-processes 0)"
        ) from exc
    try:
        return pickle.dumps((fn, args, kwargs), pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        raise RewardError(
            f"the arguments of {what} cannot be sent to a process ({exc}): pass plain data"
        ) from exc


def _bare(fn: Any) -> Any:
    while isinstance(fn, partial):
        fn = fn.func
    return fn


def _is_async(fn: Any) -> bool:
    fn = _bare(fn)
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def _name(fn: Any) -> str:
    fn = _bare(fn)
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__ or 'builtins'}.{named.__qualname__}"


def _positive(timeout_s: float) -> float:
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
    return timeout_s
