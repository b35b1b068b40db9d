"""Real vLLM servers on this machine, from an installation in an environment of its own.

- Each is the command ``vllm serve`` on a free port of 127.0.0.1, with the routes that a refit and
  per-token versions need; nothing of it is imported here.
- It ends with us however we end, and its engine process with it, which vLLM 0.32 leaves behind
  when its API server is killed; its output is in a log.
- Two cores are enough: one OpenMP thread, bound to no core, and no compilation.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from rollfleet_common.child import GuardedChild
from rollfleet_common.errors import RollfleetError

__all__ = ["VllmServer", "find_vllm"]

#: A loaded machine imports PyTorch and vLLM slowly.
START_TIMEOUT_S = 300.0
POLL_S = 0.1
PROBE_S = 2.0
#: Whatever is set for another vLLM must not reach these; their own is set here.
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
#: Waits until the pipe closes, which it does when we end, and kills that group.
_WATCHDOG = 'IFS= read -r _; kill -9 "-$1"'


def find_vllm(given: Path | None) -> Path:
    """The ``vllm`` command: the one that was given, or that of `make vllm`.

    Raises:
        RollfleetError: It is not there; the message says how to get one.
    """
    path = given or Path(".vllm-venv/bin/vllm")
    if not os.access(path, os.X_OK):
        raise RollfleetError(
            f"there is no vLLM at {path}: run `make vllm` in a checkout, which installs one into "
            f".vllm-venv, and start this from there; or name your own with --vllm /path/to/bin/vllm"
        )
    return path.absolute()


@dataclass(slots=True)
class VllmServer:
    """One server, started as this is made; it serves once :meth:`wait` has returned.

    Raises:
        RollfleetError: It could not be started.
    """

    executable: Path
    #: Folder of a checkpoint.
    model: Path
    log: Path
    max_model_tokens: int = 16384
    max_sequences: int = 64
    name: str = "tiny"
    seed: int = 0
    port: int = 0
    #: False: the checkpoint has none, and everybody speaks in token ids.
    tokenizer: bool = True
    _child: GuardedChild = field(init=False)
    _watchdog: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        env = shutil.which("env")
        if env is None:
            raise RollfleetError("there is no `env` command on this machine's PATH")
        self.port = self.port or _free_port()
        settings = [f"{name}={value}" for name, value in _SETTINGS.items()]
        self._child = GuardedChild(
            [
                *(env, "-u", "PYTHONPATH", *settings),
                *(str(self.executable), "serve", str(self.model)),
                *("--served-model-name", self.name, "--host", "127.0.0.1"),
                *("--port", str(self.port), "--seed", str(self.seed)),
                *("--max-model-len", str(self.max_model_tokens), "--dtype", "float32"),
                *("--max-num-seqs", str(self.max_sequences)),
                *("--enforce-eager", "--enable-scale-out", "--disable-uvicorn-access-log"),
                *(() if self.tokenizer else ("--skip-tokenizer-init",)),
            ],
            log=self.log,
        )
        self._watchdog = subprocess.Popen(  # noqa: S603  # a constant and a number
            ["/bin/sh", "-c", _WATCHDOG, "sh", str(self._child.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._child.returncode

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._child.alive()

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> "VllmServer":
        """Until it serves; returns itself.

        Raises:
            RollfleetError: It ended, or was not there in time; the message has its log's end.
        """
        deadline = time.monotonic() + timeout_s
        while not self.serves():
            if not self.alive() or time.monotonic() > deadline:
                how = f"ended with {self.returncode}" if not self.alive() else "did not answer"
                tail = self.log.read_text(errors="replace").strip().splitlines()[-12:]
                raise RollfleetError(
                    f"vLLM on port {self.port} {how} within {timeout_s:g} s; {self.log} ends "
                    f"with:\n" + "\n".join(tail)
                )
            time.sleep(POLL_S)
        return self

    def serves(self) -> bool:
        """Whether it answers now."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=PROBE_S) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it and its engine process. Idempotent."""
        if self._watchdog.returncode is not None:
            return
        self._child.end(how)
        if self._child.pid is not None:
            # The session is its own, so nobody else is in this group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        # Killed, not let go: the number that it watches may be another group's by now.
        self._watchdog.kill()
        self._watchdog.communicate()

    def kill(self) -> None:
        """End it as a crash would."""
        self.end(signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
