"""Processes of a stage, and how one waits for them."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.observe import Drain

__all__ = ["Worker", "catches", "free_port", "until"]


@dataclass(eq=False)
class Worker:
    """One worker process."""

    name: str
    process: "subprocess.Popen[bytes]"
    port: int
    drain: Drain | None = None
    stopped_at: float | None = None
    #: Whether its end is wanted.
    doomed: bool = False

    @property
    def prefix(self) -> str:
        """What its consumer name begins with."""
        return f"{self.name}-{self.process.pid}-"

    @property
    def up(self) -> bool:
        """Whether it has come so far as to heed SIGTERM."""
        return catches(self.process.pid, signal.SIGTERM)

    @property
    def alive(self) -> bool:
        """Whether it runs (or is stopped by a signal)."""
        return self.process.poll() is None


def until(
    what: Callable[[], Any], timeout_s: float, tend: Callable[[], None], description: str
) -> None:
    """Wait, tending meanwhile.

    Raises:
        TimeoutError: It did not come true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {description}")
        tend()
        time.sleep(0.05)


def catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has set a handler for a signal (Linux; elsewhere it is taken for granted)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = next((line.split()[1] for line in status if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
