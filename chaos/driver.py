"""A seeded storm: random faults on a whole fleet for a while, then calm, drain and judgement.

- Kinds of faults are dealt from a shuffled deck, so that each comes equally often.
- At most one fault of Redis at a time; faults of processes overlap as they like.
- Bounded in time: the storm by its seconds, the calm after it by a deadline.
"""

import heapq
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis.exceptions

from chaos import oracle
from chaos.harness import Stage
from chaos.processes import Worker, catches

__all__ = ["Storm", "run"]

#: Mean seconds between two faults.
EVERY_S = 0.7
#: The storm begins when so many samples were trained on.
WARM = 64
#: How long the calm may last before the run counts as stuck.
CALM_S = 60.0


class Storm:
    """Injects faults into a stage until its time is up."""

    def __init__(self, stage: Stage, seed: int, workers: int) -> None:
        self.stage = stage
        self.dice = random.Random(seed)
        self.wanted = workers
        self.most = workers * 2
        self.injected: Counter[str] = Counter()
        self._deck: list[str] = []
        #: (when, serial, undo)
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._redis_busy = False

    def blow(self, seconds: float) -> None:
        """Inject for `seconds`; everything that was broken is mended at the end."""
        ends = time.monotonic() + seconds
        next_at = time.monotonic()
        while (now := time.monotonic()) < ends:
            self._mend(now)
            self.stage.tend()
            self._keep_up()
            if now >= next_at:
                self._inject()
                next_at = now + self.dice.expovariate(1 / EVERY_S)
            time.sleep(0.02)
        self._mend(float("inf"))

    def _inject(self) -> None:
        if not self._deck:
            self._deck = sorted(FAULTS)
            self.dice.shuffle(self._deck)
        kind = self._deck.pop()
        if FAULTS[kind](self):
            self.injected[kind] += 1
        else:
            self._deck.insert(0, kind)  # later, when it can be done

    def _mend(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._serial, undo))

    def _keep_up(self) -> None:
        """What a deployment does: the wanted number of workers, and one trainer."""
        living = [w for w in self.stage.workers if w.alive and not w.doomed]
        for _ in range(self.wanted - len(living)):
            self.stage.add_worker(direct=self.dice.random() < 0.5)
        if self.stage.trainer is None:
            self.stage.start_trainer()

    def _redis_back(self, back: Callable[[], None]) -> Callable[[], None]:
        def undo() -> None:
            back()
            self._redis_busy = False

        self._redis_busy = True
        return undo

    # ---- the faults: each returns whether it was done ------------------------------------------

    def worker_kill(self) -> bool:
        """SIGKILL of a worker."""
        if not self.stage.fleet:
            return False
        self.stage.kill_worker(self._busy())
        return True

    def _busy(self) -> Worker:
        """A worker that holds leases, if there is one: its death is the one that matters."""
        try:
            holders = self.stage.observer.leases("")
        except (redis.exceptions.RedisError, OSError):
            holders = {}
        fleet = self.stage.fleet
        busy = [w for w in fleet if any(name.startswith(w.prefix) for name in holders)]
        return self.dice.choice(busy or fleet)

    def worker_stop(self) -> bool:
        """SIGSTOP of a worker past its lease, then SIGCONT: a zombie."""
        if len(self.stage.fleet) < 2:
            return False
        worker = self._busy()
        self.stage.freeze_worker(worker)
        self._after(
            self.stage.o.lease_s + self.dice.uniform(0.5, 2.0),
            lambda: self.stage.thaw_worker(worker),
        )
        return True

    def worker_term(self) -> bool:
        """SIGTERM of a worker."""
        if not self.stage.fleet:
            return False
        self.stage.term_worker(self.dice.choice(self.stage.fleet))
        return True

    def scale(self) -> bool:
        """Up to twice the workers, or down to half of them."""
        up = self.wanted < self.most
        self.wanted = self.most if up else max(self.most // 4, 1)
        for worker in self.stage.fleet[self.wanted :]:
            self.stage.term_worker(worker)
        return True

    def redis_kill(self) -> bool:
        """SIGKILL of Redis, and a restart after 0.2 to 3 s."""
        if self._redis_busy:
            return False
        self.stage.kill_redis()
        self._after(self.dice.uniform(0.2, 3.0), self._redis_back(self.stage.restart_redis))
        return True

    def redis_stop(self) -> bool:
        """SIGSTOP of Redis for 0.5 to 7 s: also past the socket timeout."""
        if self._redis_busy:
            return False
        self.stage.freeze_redis()
        self._after(self.dice.choice((0.5, 1.0, 2.0, 7.0)), self._redis_back(self.stage.thaw_redis))
        return True

    def trainer_kill(self) -> bool:
        """SIGKILL of the trainer; the next one resumes from the last checkpoint."""
        if self.stage.trainer is None:
            return False
        self.stage.kill_trainer()
        return True

    def version_bump(self) -> bool:
        """A version that comes out of turn."""
        trainer = self.stage.trainer
        # Before it has set its handler, SIGUSR1 would kill it.
        if (
            trainer is None
            or trainer.poll() is not None
            or not catches(trainer.pid, signal.SIGUSR1)
        ):
            return False
        trainer.send_signal(signal.SIGUSR1)
        return True

    def client_kill(self) -> bool:
        """Every connection is closed by the server."""
        return self._command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def script_flush(self) -> bool:
        """The server forgets all scripts."""
        return self._command("SCRIPT", "FLUSH")

    def _command(self, *words: str) -> bool:
        if self._redis_busy:
            return False
        self.stage.disturb()
        try:
            with self.stage.redis() as client:
                client.execute_command(*words)
        except (redis.exceptions.RedisError, OSError):
            return False
        return True

    def connections_cut(self) -> bool:
        """Every connection through the proxies is reset."""
        self.stage.disturb()
        for proxy in (self.stage.worker_proxy, self.stage.trainer_proxy):
            proxy.cut()
        return True

    def replies_lost(self) -> bool:
        """For 0.3 s, commands take effect and their replies do not come."""
        word = self.dice.choice((b"", b"EVALSHA", b"XREADGROUP"))
        proxy = self.dice.choice((self.stage.worker_proxy, self.stage.trainer_proxy))
        self.stage.disturb()
        proxy.drop_replies(word)
        self._after(0.3, proxy.resume)
        return True


FAULTS: dict[str, Callable[[Storm], bool]] = {
    "worker kill -9": Storm.worker_kill,
    "worker SIGSTOP past its lease": Storm.worker_stop,
    "worker SIGTERM": Storm.worker_term,
    "scale up or down": Storm.scale,
    "redis kill -9": Storm.redis_kill,
    "redis SIGSTOP": Storm.redis_stop,
    "trainer kill -9": Storm.trainer_kill,
    "version bump": Storm.version_bump,
    "CLIENT KILL": Storm.client_kill,
    "SCRIPT FLUSH": Storm.script_flush,
    "connections cut": Storm.connections_cut,
    "replies lost": Storm.replies_lost,
}


def run(
    *,
    seconds: float,
    seed: int,
    workers: int = 4,
    aof: str = "always",
    out: Path | None = None,
    keep: Path | None = None,
    mutant: str = "",
) -> dict[str, Any]:
    """Blow for `seconds`, judge, write `out`; returns the report."""
    began = time.monotonic()
    shape = {
        "spv": 64,
        "env": {"CHAOS_MEAN_S": "0.5"},
    }  # enough that workers are busy when they die
    with Stage(aof=aof, workers=workers, proxied=True, mutant=mutant, **shape) as stage:
        stage.warm(WARM)
        storm = Storm(stage, seed, workers)
        before = stage.trained()
        storm.blow(seconds)
        per_s = (stage.trained() - before) / seconds
        ended = stage.quiesce(CALM_S)
        verdicts = stage.judge()
        report = _report(stage, storm, verdicts, per_s)
        report |= {"seed": seed, "seconds": seconds, "aof": aof, "ended": ended}
        report["wall_s"] = round(time.monotonic() - began, 1)
        if keep is not None and not report["ok"]:
            _keep(stage.dir, keep)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _report(
    stage: Stage, storm: Storm, verdicts: list[oracle.Verdict], per_s: float
) -> dict[str, Any]:
    measured = {k: v for verdict in verdicts for k, v in verdict.measured.items()}
    return {
        "ok": all(verdict.ok is not False for verdict in verdicts),
        "injected": dict(sorted(storm.injected.items())),
        "verdicts": oracle.as_json(verdicts),
        "lost": measured.get("lost", 0),
        "lost by fsync contract": measured.get("lost by fsync contract", 0),
        "duplicated": measured.get("duplicated", 0) + measured.get("trained twice", 0),
        "torn": measured.get("torn", 0),
        "stale": measured.get("stale", 0),
        "recovery p50 s": measured.get("p50 s"),
        "recovery max s": measured.get("max s"),
        "lease s": stage.o.lease_s,
        "trained": measured.get("trained", 0),
        "samples/s": round(per_s, 1),
        "trainer lives": stage.trainer_lives,
        "trainer exits": stage.trainer_codes,
        "exits nobody asked for": stage.seen.exits,
    }


def _keep(directory: Path, keep: Path) -> None:
    """Copy the logs of a run that failed."""
    keep.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.jsonl", "*.out", "*.err"):
        for path in directory.glob(pattern):
            (keep / path.name).write_bytes(path.read_bytes())
