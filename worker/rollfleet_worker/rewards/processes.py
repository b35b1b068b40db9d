"""Processes that run reward functions and can be killed: one pebble pool and its keeper thread.

- Spawned, never forked from a program with threads and a running loop.
- A process sits in a session of its own and takes no SIGINT and SIGTERM: a Ctrl-C for the daemon
  does not reach a reward that its drain still waits for.
- It ends with us. Idle, it sees its pipe close; on Linux a busy one gets SIGKILL from the kernel.
- Killing it kills what the reward function started as well.
- Only bytes and plain values cross the boundary: an exception that cannot be unpickled, or a
  module that cannot be imported there, would take down pebble's threads or processes.
"""

import asyncio
import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from pebble import ProcessFuture, ProcessPool

from rollfleet_common.forks import Home
from rollfleet_worker.rewards.outcome import Reward, RewardFailure, read

__all__ = ["RewardProcesses"]

#: From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


class _Process(SpawnProcess):
    """pebble stops a process by SIGTERM, then 3 s later SIGKILL, and holds up the pool meanwhile."""

    def terminate(self) -> None:
        if self.pid is not None and self.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.kill()  # it may not have come to have a group of its own


class _Context(SpawnContext):
    Process = _Process


def _set_up(parent: int, modules: Sequence[str]) -> None:
    """First thing in a process."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        # A handler and not SIG_IGN, which programs that the function starts would inherit.
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    for name in modules:
        # Before any clock runs. What cannot be imported is told by the job that needs it.
        with contextlib.suppress(Exception, SystemExit):
            import_module(name)


def _work(job: bytes) -> Reward | RewardFailure:
    """One job, in a process."""
    try:
        function, args, kwargs = pickle.loads(job)  # noqa: S301 - our own parent pickled it
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - began
        value, components = read(result)
    except BaseException as exc:  # noqa: BLE001 - sys.exit in a reward function is a failure too
        return RewardFailure.of(exc)
    return Reward(value, components, seconds)


class RewardProcesses:
    """One pebble pool, from its first process to its last.

    A daemon thread starts it and stops it: both take their time (some 15 ms a process), and the
    parent-death signal comes when the *thread* that started a process ends.

    Args:
        count: Processes.
        max_tasks: Jobs after which a process is replaced; 0 for never.
        modules: Imported by each process as it starts; read anew for each, so it may grow.
    """

    def __init__(self, count: int, max_tasks: int, modules: Sequence[str]) -> None:
        self._home = Home("this pool of reward processes", "Make a RewardPool in the child")
        self._pool = ProcessPool(
            max_workers=count,
            max_tasks=max_tasks,
            initializer=_set_up,
            initargs=(os.getpid(), modules),
            context=_Context(),
        )
        self._loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self._running: set[ProcessFuture[Reward | RewardFailure]] = set()
        #: Why it did not start; None once it has.
        self.started: asyncio.Future[BaseException | None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._keep, name="reward-processes", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether :meth:`end` was called."""
        return self._over.is_set()

    def end(self) -> None:
        """Kill all processes, soon; what runs or waits is cancelled."""
        if self._home.left:
            return  # a forked child: the processes are the parent's
        self._over.set()
        for future in tuple(self._running):
            future.cancel()  # type: ignore[no-untyped-call]  # pebble's own

    async def run(self, job: bytes, timeout_s: float) -> Reward | RewardFailure:
        """Run one pickled ``(function, args, kwargs)``; cancelling this kills its process.

        Raises:
            TimeoutError: It ran longer than `timeout_s` and was killed, up to 0.2 s late.
            pebble.ProcessExpired: Its process died.
            BrokenProcessPool: The pool as a whole is of no more use; the job may be tried again.
            asyncio.CancelledError: Also when :meth:`end` was called.
        """
        self._home.check()
        error = await asyncio.shield(self.started)
        if error is not None:
            raise BrokenProcessPool(f"no start: {error.__cause__ or error!r}") from error
        try:
            future = self._pool.schedule(_work, (job,), timeout=timeout_s)
        except RuntimeError as exc:
            raise BrokenProcessPool(str(exc)) from exc
        self._running.add(future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._running.discard(future)

    def _keep(self) -> None:
        error: BaseException | None = None
        try:
            _ = self._pool.active  # starts it
        except Exception as exc:  # noqa: BLE001 - told to all who wait
            error = exc
        self._tell(self.started, error)
        self._over.wait()
        self._pool.stop()  # type: ignore[no-untyped-call]  # pebble's own
        with contextlib.suppress(Exception):  # a pool that is broken already
            self._pool.join()
        self._tell(self.ended, None)

    def _tell(self, future: asyncio.Future[Any], value: object) -> None:
        def tell() -> None:
            if not future.done():
                future.set_result(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(tell)
