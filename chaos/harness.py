"""The stage: a real server, real worker processes and a trainer, which can be broken one by one.

- Every process that is started is ended by its own pid when the stage closes, whatever happened.
- What the stage does to Redis and to processes it notes as evidence, so that the judge knows what
  had to be survived.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.fixtures.tcp_proxy import TcpProxy

from chaos import oracle
from chaos.case import Case
from chaos.observe import Drain, Evidence, Observer, Outage, connect
from chaos.processes import Worker, free_port, until
from chaos.snapshot import take
from rollfleet_common.embedded import EmbeddedServer

__all__ = ["RUN", "Options", "Stage"]

ROOT = Path(__file__).resolve().parent.parent
RUN = "chaos"
#: A trainer that ends by an error is started again, at most so often in a row.
TRAINER_LIVES = 200


@dataclass
class Options:
    """The shape of a stage."""

    aof: str = "always"
    lease_s: float = 2.0
    drain_s: float = 5.0
    slots: int = 16
    workers: int = 4
    spv: int = 32
    group_size: int = 4
    max_staleness: int = 2
    workflow: str = "chaos.workflows:Random"
    mutant: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    worker_flags: Sequence[str] = ()
    trainer_flags: Sequence[str] = ()
    server: Mapping[str, Any] = field(default_factory=dict)
    #: Things of the scene's own that live as long as the stage, by name.
    props: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    #: Whether workers and trainer connect through proxies that can lose and cut.
    proxied: bool = False


class Stage:
    """A fleet to break. A context manager; `o` says its shape."""

    def __init__(self, **options: Any) -> None:
        self.o = Options(**options)
        self.workers: list[Worker] = []
        self.trainer: subprocess.Popen[bytes] | None = None
        self.trainer_lives = 0
        self.trainer_codes: list[int] = []
        self._made = 0
        self._closing = contextlib.ExitStack()
        self._evidence: Evidence | None = None

    # ---- life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for process in [w.process for w in self.workers] + [self.trainer]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(10)
        self._closing.close()

    def _open(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)
        self.dir = Path(self._closing.enter_context(directory))
        self.server = EmbeddedServer(
            self.dir / "redis",
            appendonly=self.o.aof,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            tcp=True,
            **self.o.server,
        )
        self._closing.enter_context(self.server)
        self.url = self.worker_url = self.trainer_url = self.server.url
        if self.o.proxied:
            self.worker_proxy = self._closing.enter_context(TcpProxy(self.server.url))
            self.trainer_proxy = self._closing.enter_context(TcpProxy(self.server.url))
            self.worker_url, self.trainer_url = self.worker_proxy.url, self.trainer_proxy.url
        self.props = {name: self.stack(make()) for name, make in self.o.props.items()}
        self.observer = Observer(self.url, RUN)
        self._closing.callback(self.evidence)
        for _ in range(self.o.workers):
            self.add_worker()
        self.start_trainer()

    def evidence(self) -> Evidence:
        """Stop observing; what was seen."""
        if self._evidence is None:
            self._evidence = self.observer.stop()
        return self._evidence

    @property
    def seen(self) -> Evidence:
        """What was seen so far."""
        return self.observer.seen

    # ---- processes ---------------------------------------------------------------------------

    def _start(self, *arguments: str, out: Path) -> "subprocess.Popen[bytes]":
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CHAOS_MUTANT": self.o.mutant,
            "CHAOS_DIR": str(self.dir),
            **self.o.env,
        }
        with out.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "chaos", *arguments],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def add_worker(self, *flags: str, url: str = "", direct: bool = False) -> Worker:
        """Start one worker more; `direct` goes around the proxy."""
        self._made += 1
        name, port = f"w{self._made}", free_port()
        o = self.o
        process = self._start(
            *("worker", "--redis-url", url or (self.url if direct else self.worker_url)),
            *("--run", RUN, "--name", name, "--workflow", o.workflow),
            *("--slots", str(o.slots), "--lease-s", str(o.lease_s), "--drain-s", str(o.drain_s)),
            *("--health-port", str(port), "--reward-processes", "0"),
            *("--retry-base-s", "0.2", "--retry-max-s", "2", "--attempts-data", "3"),
            *("--attempts-poison", "50", *o.worker_flags, *flags),
            out=self.dir / f"{name}.out",
        )
        worker = Worker(name, process, port)
        self.workers.append(worker)
        self.observer.watch_health(name, port, lambda: worker.alive)
        return worker

    def start_trainer(self, *flags: str) -> None:
        """Start the trainer; it resumes from its last checkpoint."""
        self.trainer_lives += 1
        self.trainer = self._trainer(*flags)

    def _trainer(self, *flags: str) -> "subprocess.Popen[bytes]":
        o = self.o
        return self._start(
            *("trainer", "--url", self.trainer_url, "--run", RUN, "--dir", str(self.dir)),
            *("--spv", str(o.spv), "--group-size", str(o.group_size)),
            *("--max-staleness", str(o.max_staleness), *o.trainer_flags, *flags),
            out=self.dir / "trainer.err",
        )

    @property
    def fleet(self) -> list[Worker]:
        """Workers that are up, not frozen, and were not told to end."""
        calm = (w for w in self.workers if not w.doomed and w.stopped_at is None)
        return [w for w in calm if w.alive and w.up]

    def tend(self) -> None:
        """What an orchestrator does: note and replace what ended without being asked."""
        for worker in [w for w in self.workers if not w.alive]:
            self._note_end(worker)
            if not worker.doomed:
                self.seen.exits.append((worker.name, worker.process.returncode))
                self.add_worker()
        if self.trainer is not None and (code := self.trainer.poll()):
            self.trainer_codes.append(code)
            if self.trainer_lives < TRAINER_LIVES:
                self.start_trainer()

    def _note_end(self, worker: Worker) -> None:
        if worker.drain is not None and worker.drain.code is None:
            worker.drain.code = worker.process.returncode
            worker.drain.took_s = time.time() - worker.drain.t
        self.workers.remove(worker)

    # ---- faults ------------------------------------------------------------------------------

    def kill_worker(self, worker: Worker) -> None:
        """SIGKILL; its leases are followed until they are somebody else's."""
        worker.doomed = True
        worker.process.kill()
        worker.process.wait(10)
        self.observer.died(worker.prefix, time.time())
        self.workers.remove(worker)

    def freeze_worker(self, worker: Worker) -> None:
        """SIGSTOP."""
        worker.stopped_at = time.time()
        worker.process.send_signal(signal.SIGSTOP)

    def thaw_worker(self, worker: Worker) -> None:
        """SIGCONT."""
        if worker.stopped_at is not None:
            worker.process.send_signal(signal.SIGCONT)
            self.seen.frozen.append((worker.name, worker.stopped_at, time.time()))
            worker.stopped_at = None

    def term_worker(self, worker: Worker) -> None:
        """SIGTERM; `tend` notes how it ends."""
        worker.doomed = True
        worker.drain = Drain(time.time(), worker.name, self.o.drain_s)
        self.seen.drains.append(worker.drain)
        worker.process.terminate()

    def kill_redis(self) -> None:
        """SIGKILL the server."""
        self.seen.outages.append(Outage("down", time.time()))
        self.server.kill()

    def restart_redis(self) -> None:
        """Bring the server back with what it has on disk."""
        self.server.restart()
        self.seen.outages[-1].ended = time.time()
        if self.o.aof == "everysec":
            # Written out, unless an fsync was under way: then up to 2 s are held back.
            began = self.seen.outages[-1].began
            self.seen.excused.append((began - 2.0, began))

    def freeze_redis(self) -> None:
        """SIGSTOP the server."""
        assert self.server.pid is not None
        self.seen.outages.append(Outage("frozen", time.time()))
        os.kill(self.server.pid, signal.SIGSTOP)

    def thaw_redis(self) -> None:
        """SIGCONT the server."""
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGCONT)
        self.seen.outages[-1].ended = time.time()

    def kill_trainer(self) -> None:
        """SIGKILL the trainer."""
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.kill()
            self.trainer.wait(10)
        self.trainer = None

    def stack(self, context: "contextlib.AbstractContextManager[Any]") -> Any:
        """Enter something that ends with the stage."""
        return self._closing.enter_context(context)

    def moved(self, url: str) -> None:
        """Redis is at another address from now on; the proxies lead there."""
        self.seen.outages[-1].ended = time.time()
        self.url = self.observer.url = url
        self.observer.moved()
        for proxy in (self.worker_proxy, self.trainer_proxy):
            proxy._target = urlsplit(url)  # noqa: SLF001 - an address that follows
            proxy.cut()

    def disturb(self) -> None:
        """Note that connections are being harmed at this moment."""
        self.seen.disturbed.append(time.time())

    def redis(self) -> Any:
        """A plain client, straight to the server."""
        return connect(self.url)

    # ---- the end -----------------------------------------------------------------------------

    def trained(self) -> int:
        """Samples handed to the trainer so far."""
        log = self.dir / "trainer.jsonl"
        return log.read_text().count('"digest"') if log.exists() else 0

    def warm(self, samples: int = 64, timeout_s: float = 30.0) -> None:
        """Wait until the fleet runs: so many samples were handed over."""
        want = self.trained() + samples
        until(lambda: self.trained() >= want, timeout_s, self.tend, f"{samples} samples more")

    def quiesce(self, timeout_s: float = 40.0) -> bool:
        """End the feed, train what is left, drain the workers; whether all of it was done."""
        (self.dir / "stop").touch()
        for worker in self.workers:
            self.thaw_worker(worker)
        try:
            until(self._trained_out, timeout_s, self.tend, "the trainer to end")
            done = True
        except TimeoutError:
            done = False
        for worker in list(self.workers):
            if not worker.doomed:
                with contextlib.suppress(TimeoutError):
                    until(lambda w=worker: w.up, 5.0, lambda: None, "a worker to be up")  # type: ignore[misc]
                self.term_worker(worker)
        with contextlib.suppress(TimeoutError):
            until(lambda: not self.workers, self.o.drain_s + 12.0, self.tend, "the drains")
            return done
        return False

    def _trained_out(self) -> bool:
        return self.trainer is not None and self.trainer.poll() == 0

    def judge(self) -> list[oracle.Verdict]:
        """Ask the oracle."""
        seen = self.evidence()
        with self.redis() as client:
            shot = take(client, RUN)
        case = Case.read(
            self.dir,
            shot,
            seen,
            lease_s=self.o.lease_s,
            max_staleness=self.o.max_staleness,
            limit=(self.o.max_staleness + 1) * self.o.spv,
        )
        return oracle.judge(case)

    def settle(self, timeout_s: float = 40.0) -> list[oracle.Verdict]:
        """`quiesce` and `judge`."""
        self.quiesce(timeout_s)
        return self.judge()
