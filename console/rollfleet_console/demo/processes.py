"""The demo's other processes: one inference server, and workers as anyone would start them.

- None of them outlives this process, however it ends; each writes to a log of its own.
- Ctrl-C in the terminal does not reach them: they are ended in order by whoever started them.
- Workers are real daemons: the command ``rollfleet worker`` with flags, and nothing else.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rollfleet_common.child import GuardedChild
from rollfleet_common.errors import RollfleetError
from rollfleet_console.demo.task import ANSWER_TOKENS

__all__ = ["LEASE_S", "SLOTS", "Processes"]

#: Episodes at once in one worker. They only wait for HTTP, and the server fits 256 in one pass.
SLOTS = 192
#: Short, so that a killed worker's prompts are taken over while one watches.
LEASE_S = 3.0
DRAIN_S = 10.0
START_TIMEOUT_S = 60.0
POLL_S = 0.02
#: A right answer ends itself; a little more than its length lets a wrong one be seen to run on.
MAX_TOKENS = ANSWER_TOKENS + 1


@dataclass(slots=True)
class Processes:
    """What the demo starts and ends. Logs go to `folder`."""

    folder: Path
    server_url: str = ""
    #: Workers that should be alive, by name.
    workers: dict[str, GuardedChild] = field(default_factory=dict)
    #: How workers ended: 0 is a drained one, -9 a killed one.
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    _started: int = 0
    _server: GuardedChild | None = None
    _worker_command: list[str] = field(default_factory=list)

    @property
    def token_log(self) -> Path:
        """Where the server writes what really made each token."""
        return self.folder / "tokens.jsonl"

    def start_server(self, weights: Path, version: int, seed: int) -> None:
        """Start the inference server, and wait until it serves.

        Raises:
            RollfleetError: It did not; the message has the end of its log.
        """
        log = self.folder / "server.log"
        command = ["-m", "rollfleet_console.demo.server", "--weights", str(weights)]
        command += ["--version", str(version), "--seed", str(seed), "--port", "0"]
        command += ["--token-log", str(self.token_log), "--threads", "1"]
        self._server = GuardedChild([sys.executable, *command], log=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.server_url:
            if not self._server.alive() or time.monotonic() > deadline:
                raise RollfleetError(f"the inference server did not start{_tail(log)}")
            for line in log.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    self.server_url = str(json.loads(line)["url"])
            time.sleep(POLL_S)

    def start_workers(self, count: int, redis_url: str, run: str) -> None:
        """Start `count` workers for a run; they are at work a second later."""
        self._worker_command = [
            *(sys.executable, "-m", "rollfleet_console", "worker"),
            *("--redis-url", redis_url, "--run", run),
            *("--workflow", "rollfleet_console.demo.workflow:Sort"),
            *("--server", self.server_url, "--slots", str(SLOTS), "--max-tokens", str(MAX_TOKENS)),
            # The verifier compares nine ids: less work than sending them to another process.
            *("--reward-processes", "0"),
            *("--lease-s", str(LEASE_S), "--drain-s", str(DRAIN_S)),
            # A line for every version that a worker learns of would be most of its log.
            *("--log-format", "json", "--log-level", "warning"),
        ]
        for _ in range(count):
            self.start_worker()

    def start_worker(self) -> str:
        """Start one more worker; returns its name."""
        self._started += 1
        name = f"worker-{self._started}"
        command = [*self._worker_command, "--name", name]
        self.workers[name] = GuardedChild(command, log=self.folder / f"{name}.log")
        return name

    def kill_worker(self, name: str) -> None:
        """Kill a worker with -9."""
        # Taken off the list first: whoever checks it meanwhile must not take this for an accident.
        worker = self.workers.pop(name)
        worker.end(signal.SIGKILL)
        self.exit_codes[name] = worker.returncode

    def check(self) -> None:
        """Notice what ended by itself.

        Raises:
            RollfleetError: A process did; the message has the end of its log.
        """
        if self._server is not None and not self._server.alive():
            tail = _tail(self.folder / "server.log")
            raise RollfleetError(f"the inference server ended: {self._server.returncode}{tail}")
        for name, worker in list(self.workers.items()):
            if not worker.alive():
                tail = _tail(self.folder / f"{name}.log")
                raise RollfleetError(f"{name} ended by itself: {worker.returncode}{tail}")

    def drain_workers(self) -> None:
        """SIGTERM: workers finish what they have, hand back the rest, and end. Idempotent."""
        for worker in self.workers.values():
            if worker.alive() and worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)
        # Both bounds of their own, and a little: they always end by themselves.
        deadline = time.monotonic() + DRAIN_S + 10.0
        while self.workers:
            name = next(iter(self.workers))
            worker = self.workers[name]
            if worker.alive() and time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            worker.end(signal.SIGKILL)
            self.exit_codes[name] = worker.returncode
            del self.workers[name]

    def stop(self) -> None:
        """End everything at once; what workers hold is left to its lease. Idempotent."""
        for worker in self.workers.values():
            worker.end(signal.SIGKILL)
        self.workers.clear()
        if self._server is not None:
            self._server.end(signal.SIGTERM)


def _tail(log: Path, lines: int = 8) -> str:
    """The end of a log, for an error message."""
    with contextlib.suppress(OSError):
        if text := log.read_text(errors="replace").strip().splitlines()[-lines:]:
            return f"; {log.name} ends with:\n" + "\n".join(text)
    return f"; {log.name} is empty"
