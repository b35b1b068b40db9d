"""What differs between the demo's inference servers: the tiny one of our own, and a real vLLM.

- An engine brings a policy that it can serve, writes its weights so that its servers can load them,
  starts servers, and knows the witness that an audit asks.
- The witness is the stronger the less it is ours: see :mod:`rollfleet_demo.audit` for the
  tiny server and :mod:`rollfleet_demo.judge` for vLLM.
"""

import contextlib
import json
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rollfleet_common.child import GuardedChild
from rollfleet_common.errors import RollfleetError
from rollfleet_demo.audit import Audit, GeneratedSample, audit, read_made, read_trained
from rollfleet_demo.judge import judge
from rollfleet_demo.model import CausalPolicy, TinyPolicy, save
from rollfleet_demo.qwen import Checkpoints, QwenPolicy
from rollfleet_demo.vllm_server import VllmServer, find_vllm

__all__ = ["DemoEngine", "ServerProcess", "TinyEngine", "VllmDemo", "made_tokens", "tail"]

#: Weight files of the tiny server that stay: it reads the newest one only.
KEPT_WEIGHTS = 3
START_TIMEOUT_S = 60.0
CONTROL_S = 10.0
POLL_S = 0.02
#: Sequences in one pass: all that the workers have in flight.
SEQUENCES = 256


class ServerProcess(Protocol):
    """One inference server that the demo has started."""

    @property
    def url(self) -> str:
        """Where it serves."""
        ...

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        ...

    @property
    def log(self) -> Path:
        """What it prints."""
        ...

    def alive(self) -> bool:
        """Whether it still runs."""
        ...

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it. Idempotent."""
        ...


class DemoEngine(Protocol):
    """A kind of inference server, and what belongs to it."""

    #: Longest wait for a batch before it is said that something is wrong.
    starve_s: float

    @property
    def policy(self) -> CausalPolicy:
        """What is trained."""
        ...

    def write(self, version: int) -> Path:
        """The policy's weights, as its servers load them."""
        ...

    def start(self, name: str, weights: Path, version: int) -> ServerProcess:
        """A server of these weights, which may not serve yet.

        Raises:
            RollfleetError: It could not be started.
        """
        ...

    def wait(self, server: ServerProcess, version: int) -> None:
        """Until it serves, and tags what it makes with `version`.

        Raises:
            RollfleetError: It ended, or was not there in time.
        """
        ...

    def audit(self, trained: Path) -> Audit:
        """Hold the trainer's log against the engine's witness."""
        ...


# ---- the tiny one ------------------------------------------------------------------------------


@dataclass(slots=True)
class _TinyServer:
    log: Path
    child: GuardedChild
    url: str = ""

    @property
    def returncode(self) -> int | None:
        return self.child.returncode

    def alive(self) -> bool:
        return self.child.alive()

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.child.end(how)


@dataclass(slots=True)
class TinyEngine:
    """The demo's own server; its witness is its log of which weights made each token."""

    folder: Path
    seed: int
    starve_s: float = 30.0
    policy: TinyPolicy = field(init=False)
    _logs: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = TinyPolicy(seed=self.seed)

    def write(self, version: int) -> Path:
        """One file; the oldest goes."""
        path = self._path(version)
        save(self.policy, path, version)
        self._path(version - KEPT_WEIGHTS).unlink(missing_ok=True)
        return path

    def start(self, name: str, weights: Path, version: int) -> ServerProcess:
        """As a process of this Python."""
        log, tokens = self.folder / f"{name}.log", self.folder / f"{name}.tokens.jsonl"
        # Equal seeds would draw the same numbers on every server.
        seed = self.seed + 7919 * len(self._logs)
        self._logs.append(tokens)
        # A file of its own: the trainer may have thrown that one away before it is read.
        own = shutil.copyfile(weights, self.folder / f"{name}.safetensors")
        command = ["-m", "rollfleet_demo.server", "--weights", str(own)]
        command += ["--version", str(version), "--seed", str(seed), "--port", "0"]
        command += ["--token-log", str(tokens), "--threads", "1"]
        return _TinyServer(log, GuardedChild([sys.executable, *command], log=log))

    def wait(self, server: ServerProcess, version: int) -> None:
        """Until it has said where it listens."""
        assert isinstance(server, _TinyServer)  # noqa: S101  # its own make
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.url:
            if not server.alive() or time.monotonic() > deadline:
                raise RollfleetError(f"the inference server did not start{tail(server.log)}")
            for line in server.log.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    server.url = str(json.loads(line)["url"])
            time.sleep(POLL_S)

    def audit(self, trained: Path) -> Audit:
        """By the servers' logs, all together."""
        return audit(read_trained(trained), self._made())

    def _made(self) -> Iterator[GeneratedSample]:
        for log in self._logs:
            if log.exists():
                yield from read_made(log)

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version}.safetensors"


# ---- the real one ------------------------------------------------------------------------------


@dataclass(slots=True)
class VllmDemo:
    """Real vLLM servers; their witness is a forward pass of the weights that a label names."""

    folder: Path
    seed: int
    #: The ``vllm`` command; None: where `make vllm` puts it.
    command: Path | None = None
    #: Real servers refit and generate more slowly than the tiny one.
    starve_s: float = 180.0
    policy: QwenPolicy = field(init=False)
    _files: Checkpoints = field(init=False)
    _started: int = 0

    def __post_init__(self) -> None:
        self.command = find_vllm(self.command)
        self.policy = QwenPolicy(seed=self.seed)
        self._files = Checkpoints(self.policy, self.folder)

    def write(self, version: int) -> Path:
        """A checkpoint's folder; all of them stay."""
        return self._files.write(version)

    def start(self, name: str, weights: Path, version: int) -> ServerProcess:
        """As ``vllm serve``."""
        self._started += 1
        return VllmServer(
            find_vllm(self.command),
            weights,
            self.folder / f"{name}.log",
            max_model_tokens=self.policy.shape.max_tokens,
            max_sequences=SEQUENCES,
            # Equal seeds would draw the same numbers on every server.
            seed=self.seed + 7919 * self._started,
            tokenizer=False,
        )

    def wait(self, server: ServerProcess, version: int) -> None:
        """Until it serves; then it is told what its weights are called."""
        assert isinstance(server, VllmServer)  # noqa: S101  # its own make
        server.wait()
        said = {"new_version": str(version)}
        _post(f"{server.url}/update_weight_version", said)

    def audit(self, trained: Path) -> Audit:
        """By the checkpoints, every token of every row."""
        rows = read_trained(trained)
        return judge(rows, self._files.load, QwenPolicy(self.policy.shape))


# ---- what servers say --------------------------------------------------------------------------


def made_tokens(url: str) -> int | None:
    """Tokens that a server has generated so far, as its metrics say; None if it does not answer."""
    try:
        with _opener().open(f"{url}/metrics", timeout=CONTROL_S) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return None
    name = "vllm:generation_tokens_total"
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(name)))


def tail(log: Path, lines: int = 8) -> str:
    """The end of a log, for an error message."""
    with contextlib.suppress(OSError):
        if text := log.read_text(errors="replace").strip().splitlines()[-lines:]:
            return f"; {log.name} ends with:\n" + "\n".join(text)
    return f"; {log.name} is empty"


def _post(url: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310  # http
    try:
        with _opener().open(request, timeout=CONTROL_S):
            pass
    except OSError as exc:
        raise RollfleetError(f"{url} did not take {body}: {exc}") from exc


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
