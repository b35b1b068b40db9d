"""Kills a worker with -9 in the middle of its work, and starts another.

- In a thread, while the trainer goes on: a worker that is idle between two steps has nothing to lose.
- The one that holds most leases is killed, as the prompts stream knows them at that moment.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from rollfleet_common.errors import RollfleetError
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect_sync
from rollfleet_console.demo.processes import Processes
from rollfleet_console.demo.report import Kill

__all__ = ["Killer"]

#: A fleet that waits for its trainer holds no leases; after so long, one that holds none is killed.
PATIENCE_S = 3.0
POLL_S = 0.001


class Killer:
    """Kills one worker after one step."""

    def __init__(self, processes: Processes, redis_url: str, run: str) -> None:
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
