"""The demo's other processes: inference servers, and workers as anyone would start them.

- None of them outlives this process, however it ends; each writes to a log of its own.
- Ctrl-C in the terminal does not reach them: they are ended in order by whoever started them.
- Workers are real daemons: the command ``rollfleet worker`` with flags, and nothing else.
"""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rollfleet_common.child import GuardedChild
from rollfleet_common.errors import RollfleetError
from rollfleet_demo.engines import DemoEngine, ServerProcess, made_tokens, tail
from rollfleet_demo.task import ANSWER_TOKENS

__all__ = ["LEASE_S", "SLOTS", "DemoProcesses"]

#: Episodes at once in one worker. They only wait for HTTP, and the server fits 256 in one pass.
SLOTS = 192
#: Short, so that a killed worker's prompts are taken over while one watches.
LEASE_S = 3.0
DRAIN_S = 10.0
POLL_S = 0.02
#: A right answer ends itself; a little more than its length lets a wrong one be seen to run on.
MAX_TOKENS = ANSWER_TOKENS + 1


@dataclass(slots=True)
class DemoProcesses:
    """What the demo starts and ends. Logs go to `folder`."""

    folder: Path
    engine: DemoEngine
    #: Servers that should be alive, by name.
    servers: dict[str, ServerProcess] = field(default_factory=dict)
    #: What servers have made, by name: tokens as their own metrics count them, -1 if killed.
    server_tokens: dict[str, int] = field(default_factory=dict)
    #: Workers that should be alive, by name.
    workers: dict[str, GuardedChild] = field(default_factory=dict)
    #: How workers ended: 0 is a drained one, -9 a killed one.
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    _started: int = 0
    _servers_started: int = 0
    _ended: bool = False
    _worker_command: list[str] = field(default_factory=list)

    @property
    def server_urls(self) -> list[str]:
        """Where the living servers serve."""
        return [server.url for server in self.servers.values()]

    def start_servers(self, count: int, weights: Path, version: int) -> None:
        """Start `count` inference servers side by side, and wait until all of them serve.

        Raises:
            RollfleetError: One did not; the message has the end of its log.
        """
        names = [self.launch_server(weights, version) for _ in range(count)]
        for name in names:
            self.engine.wait(self.servers[name], version)

    def launch_server(self, weights: Path, version: int) -> str:
        """Start one more server, without waiting for it; returns its name."""
        self._servers_started += 1
        name = f"server-{self._servers_started}"
        server = self.engine.start(name, weights, version)
        self.servers[name] = server
        if self._ended:
            server.end(signal.SIGKILL)
        return name

    def kill_server(self) -> tuple[str, str]:
        """Kill the oldest server with -9; returns its name and where it served."""
        name = next(iter(self.servers))
        # Taken off the list first: whoever checks it meanwhile must not take this for an accident.
        server = self.servers.pop(name)
        server.end(signal.SIGKILL)
        self.server_tokens[name] = -1
        return name, server.url

    def count_tokens(self) -> None:
        """Ask the living servers what they have made."""
        for name, server in self.servers.items():
            if (tokens := made_tokens(server.url)) is not None:
                self.server_tokens[name] = tokens

    def start_workers(self, count: int, redis_url: str, run: str) -> None:
        """Start `count` workers for a run; they are at work a second later."""
        self._worker_command = [
            *(sys.executable, "-m", "rollfleet_console", "worker"),
            *("--redis-url", redis_url, "--run", run),
            *("--workflow", "rollfleet_demo.workflow:Sort"),
            *(part for url in self.server_urls for part in ("--server", url)),
            *("--slots", str(SLOTS), "--max-tokens", str(MAX_TOKENS)),
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
        for name, server in list(self.servers.items()):
            if not server.alive():
                raise RollfleetError(f"{name} ended: {server.returncode}{tail(server.log)}")
        for name, worker in list(self.workers.items()):
            if not worker.alive():
                said = tail(self.folder / f"{name}.log")
                raise RollfleetError(f"{name} ended by itself: {worker.returncode}{said}")

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
        # A server that is just being started must not be forgotten.
        self._ended = True
        for server in list(self.servers.values()):
            server.end(signal.SIGTERM)
