"""Kills a worker or an inference server with -9 in the middle of its work, and starts another.

- In a thread, while the trainer goes on: a worker that is idle between two steps has nothing to lose.
- The worker that holds most leases is killed, as the prompts stream knows them at that moment.
- A server's replacement is registered while the run goes on, as ``rollfleet server add`` does it:
  neither workers nor trainer were told of it before.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollfleet_common.errors import RollfleetError
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect, connect_sync
from rollfleet_common.servers import RegisteredServer, Servers
from rollfleet_demo.processes import DemoProcesses
from rollfleet_demo.report import Kill, ServerKill

__all__ = ["Killer", "ServerKiller"]

#: A fleet that waits for its trainer holds no leases; after so long, one that holds none is killed.
PATIENCE_S = 3.0
POLL_S = 0.001


class Killer:
    """Kills one worker after one step."""

    def __init__(self, processes: DemoProcesses, redis_url: str, run: str) -> None:
        self.processes = processes
        self.redis_url = redis_url
        self.stream = RunKeys(run).partition(0).prompts("default")
        self.kills: list[Kill] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def kill_after(self, step: int) -> None:
        """Kill a worker as soon as one is at work."""
        self._thread = threading.Thread(target=self._run, args=[step], name="killer", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it is done.

        Raises:
            RollfleetError: It could not be done.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise RollfleetError(f"could not kill a worker: {self._error!r}") from self._error

    def _run(self, step: int) -> None:
        try:
            name, leases = self._busiest()
            self.processes.kill_worker(name)
            self.kills.append(Kill(step, name, self.processes.start_worker(), leases))
        except Exception as exc:  # noqa: BLE001  # told to whoever joins
            self._error = exc

    def _busiest(self) -> tuple[str, int]:
        client = connect_sync(self.redis_url, role="killer")
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                held = self._held(client)
                name = max(held, key=lambda one: held[one])
                if held[name] or time.monotonic() > deadline:
                    return name, held[name]
                time.sleep(POLL_S)
        finally:
            client.close()

    def _held(self, client: Any) -> Mapping[str, int]:
        """Leases by worker; a consumer is named after its worker, its process and its start."""
        held = dict.fromkeys(self.processes.workers, 0)
        for consumer in client.xpending(self.stream, "workers")["consumers"]:
            name = consumer["name"].decode().rsplit("-", 2)[0]
            if name in held:
                held[name] += int(consumer["pending"])
        return held


class ServerKiller:
    """Kills one inference server after one step, and brings another."""

    def __init__(self, processes: DemoProcesses, redis_url: str, run: str) -> None:
        self.processes = processes
        self.redis_url = redis_url
        self.keys = RunKeys(run)
        self.kills: list[ServerKill] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def kill_after(self, step: int, weights: Path, version: int) -> None:
        """Kill a server now, and start one of these weights."""
        self._thread = threading.Thread(
            target=self._run, args=[step, weights, version], name="server-killer", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until the new server serves.

        Raises:
            RollfleetError: It does not.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise RollfleetError(f"no server took the place: {self._error}") from self._error

    def _run(self, step: int, weights: Path, version: int) -> None:
        try:
            killed, _ = self.processes.kill_server()
            began = time.monotonic()
            name = self.processes.launch_server(weights, version)
            server = self.processes.servers[name]
            self.processes.engine.wait(server, version)
            asyncio.run(self._register(server.url))
            self.kills.append(ServerKill(step, killed, name, time.monotonic() - began))
        except Exception as exc:  # noqa: BLE001  # told to whoever joins
            self._error = exc

    async def _register(self, url: str) -> None:
        client = connect(self.redis_url, role="killer")
        try:
            await Servers(client, self.keys).add(RegisteredServer(url))
        finally:
            await client.aclose()
