"""The main job, ``rollfleet demo``: a fleet on one machine that teaches a small transformer to sort.

- Everything is real: a Redis server, an inference server with real weights, worker daemons, and a
  trainer in this process; all of it is gone when :func:`main` returns or raises.
- The books are read once, after the workers have drained; the report says what they said.
- Exit code 0 means that the books balance, the audit found nothing, and the reward has risen.
- ``ROLLFLEET_*`` variables do not reach the demo: it brings its own settings.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import rollfleet
from rollfleet_common.errors import RollfleetError, SettingsError
from rollfleet_common.logs import configure_logs
from rollfleet_common.redis import connect_sync
from rollfleet_demo.engines import DemoEngine, TinyEngine, VllmDemo
from rollfleet_demo.kill import Killer, ServerKiller
from rollfleet_demo.model import warm_start
from rollfleet_demo.processes import DemoProcesses
from rollfleet_demo.report import DemoOutcome, draw, make_report, problems, write
from rollfleet_demo.screen import Screen
from rollfleet_demo.trainer import DemoTrainer, Step, feed

__all__ = ["Options", "main"]

RUN = "demo"
PROMPTS_A_STEP = 32
GROUP_SIZE = 8
WARM_STEPS = 18
#: Steps over which the reward is averaged to say that it has reached a target.
SMOOTH_STEPS = 10
#: Policies that keep every trained token within max_staleness; the others report its age.
BOUNDED = ("drop", "mask")
#: Of the examples of the warm start, so that they are not the prompts of the training.
WARM_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Options:
    """What the command can be told."""

    steps: int = 300
    seed: int = 0
    #: Where the report goes; in `out` if not given.
    report: Path | None = None
    #: Kill a worker with -9 after this step, and start another.
    kill_worker_at: int | None = None
    max_staleness: int = 2
    #: One of the trainer's staleness policies.
    policy: str = "drop"
    workers: int = 2
    out: Path = Path("demo-out")
    #: End once the mean reward of 10 steps has reached this.
    target: float | None = None
    #: Leave logs and weights behind.
    keep: bool = False
    #: "tiny": a server of our own; "vllm": the real one.
    engine: str = "tiny"
    #: The ``vllm`` command, where the engine is that.
    vllm: Path | None = None
    servers: int = 1
    #: Kill an inference server with -9 after this step, and register another.
    kill_server_at: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("tiny", "vllm"):
            raise SettingsError(f"engine {self.engine!r} is none of tiny, vllm")
        if self.kill_server_at is not None:
            if not 1 <= self.kill_server_at <= self.steps:
                raise SettingsError(
                    f"kill_server_at is {self.kill_server_at}; the steps are 1 to {self.steps}"
                )
            if self.servers < 2:
                raise SettingsError(
                    "kill_server_at needs at least 2 servers, or nothing goes on until there is "
                    "another: add --servers 2"
                )
        if self.kill_worker_at is not None and not 1 <= self.kill_worker_at <= self.steps:
            raise SettingsError(
                f"kill_worker_at is {self.kill_worker_at}; the steps are 1 to {self.steps}"
            )
        if min(self.steps, self.workers, self.servers) < 1 or self.max_staleness < 0:
            raise SettingsError(
                f"steps ({self.steps}), servers ({self.servers}) and workers ({self.workers}) must "
                f"be at least 1, and max_staleness ({self.max_staleness}) at least 0"
            )

    def make_engine(self, folder: Path) -> DemoEngine:
        """The engine that was chosen, with its files in `folder`.

        Raises:
            RollfleetError: There is no vLLM where it should be.
        """
        if self.engine == "vllm":
            return VllmDemo(folder, self.seed, self.vllm)
        return TinyEngine(folder, self.seed)


def main(given: Mapping[str, Any]) -> int:
    """Run the demo with these :class:`Options`; returns the exit code.

    Raises:
        RollfleetError: A part of it did not start, or failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after everything was torn down.
    """
    options = Options(**given)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.out.absolute()))
    screen = Screen(options.steps)
    clean = False
    try:
        with _alone(folder), screen:
            report = make_report(_run(options, folder, screen))
        path = options.report or options.out / "report.json"
        write(report, path)
        draw(report, options.out / "learning.png")
        wrong = problems(report)
        screen.summary(report, wrong, [path, options.out / "learning.png"])
        clean = not wrong
    except KeyboardInterrupt:
        clean = True  # nothing went wrong, so there is nothing to look for
        raise
    finally:
        if options.keep or not clean:
            screen.say(f"logs and weights: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if clean else 1


def _run(options: Options, folder: Path, screen: Screen) -> DemoOutcome:
    """Build the fleet, train, drain; returns what there is to report."""
    began = time.monotonic()
    # One thread each for the trainer and the server: two cores are enough for the whole fleet.
    torch.set_num_threads(1)
    engine = options.make_engine(folder)
    screen.say(f"warm start: {WARM_STEPS} steps of imitation, so that there is a reward to find")
    warm_start(engine.policy, WARM_STEPS, seed=WARM_SEED + options.seed)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "trained.jsonl").open("w", encoding="utf-8"))
        trainer = DemoTrainer(engine.policy, engine.write, log)
        processes = DemoProcesses(folder, engine)
        stack.callback(processes.stop)
        screen.say(f"starting Redis, inference servers ({options.engine}) and workers")
        processes.start_servers(options.servers, trainer.save(), trainer.version)
        fleet = stack.enter_context(
            rollfleet.connect(
                "embedded://",
                run=RUN,
                version=trainer.version,
                samples_per_version=PROMPTS_A_STEP * GROUP_SIZE,
                group_size=GROUP_SIZE,
                max_staleness=options.max_staleness,
                policy=options.policy,
                servers=processes.server_urls,
                starve_s=engine.starve_s,
            )
        )
        # Ahead of the fleet's end: workers whose Redis is gone would wait for it.
        stack.callback(processes.stop)
        processes.start_workers(options.workers, fleet.redis_url, RUN)
        loop = _Loop(options, fleet, processes, screen, trainer)
        loop.run()
        screen.say("draining the workers")
        processes.drain_workers()
        books = fleet.books()
        screen.books(books)
        log.flush()
        processes.count_tokens()
        screen.say("holding what was trained on against what the servers made")
        found = engine.audit(folder / "trained.jsonl")
        return DemoOutcome(
            seed=options.seed,
            workers=options.workers,
            staleness_bound=options.max_staleness,
            policy=options.policy,
            bounded=options.policy in BOUNDED,
            steps=loop.steps,
            books=books,
            audit=found,
            kills=loop.killer.kills,
            exit_codes=dict(processes.exit_codes),
            redis=_redis_name(fleet.redis_url),
            seconds_total=time.monotonic() - began,
            wanted_steps=options.steps if options.target is None else None,
            engine=options.engine,
            server_kills=loop.server_killer.kills,
            server_tokens=dict(processes.server_tokens),
        )


class _Loop:
    """What happens around the training steps."""

    def __init__(
        self,
        options: Options,
        fleet: rollfleet.Fleet,
        processes: DemoProcesses,
        screen: Screen,
        trainer: DemoTrainer,
    ) -> None:
        self.options = options
        self.fleet = fleet
        self.processes = processes
        self.screen = screen
        self.trainer = trainer
        self.killer = Killer(processes, fleet.redis_url, RUN)
        self.server_killer = ServerKiller(processes, fleet.redis_url, RUN)
        self.steps: list[Step] = []
        self._recent: deque[float] = deque(maxlen=SMOOTH_STEPS)

    def run(self) -> None:
        """Feed and train.

        Raises:
            RollfleetError: A process has ended, or no batch came.
        """
        stopped = threading.Event()
        self.fleet.feed(feed(self.options.seed, stopped))
        try:
            self.trainer.train(self.fleet, self.options.steps, self._after)
            self.killer.join()
            self.server_killer.join()
        except RollfleetError:
            self.processes.check()  # what has ended is the better reason
            raise
        finally:
            stopped.set()

    def _after(self, step: Step) -> bool:
        """After every step; False to end here."""
        self.steps.append(step)
        self._recent.append(step.reward)
        self.processes.check()
        if step.number == self.options.kill_worker_at:
            self.killer.kill_after(step.number)
            self.screen.say(f"step {step.number}: killing a worker with -9, and starting another")
        if step.number == self.options.kill_server_at:
            # The newest weights: those of the step before may be gone by the time they are read.
            version = self.trainer.version
            self.server_killer.kill_after(step.number, self.trainer.newest, version)
            self.screen.say(f"step {step.number}: killing a server with -9, and adding another")
        self.screen.step(step, self.fleet.books)
        target = self.options.target
        reached = target is not None and sum(self._recent) / SMOOTH_STEPS >= target
        return not reached


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The demo's own settings, logs and signals; all is put back at the end."""
    env = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("ROLLFLEET_")}
    threads = torch.get_num_threads()
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if main_thread else None
    with (folder / "trainer.log").open("a", encoding="utf-8") as log:
        undo_logs = configure_logs("info", "json", log)
        try:
            yield
        finally:
            undo_logs()
            torch.set_num_threads(threads)
            os.environ.update(env)
            if main_thread:
                signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _redis_name(url: str) -> str:
    """Name and version of the server, as it says itself."""
    client = connect_sync(url, role="demo")
    try:
        info: Any = client.info("server")
    finally:
        client.close()
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info.get('redis_version', '?'))}"
