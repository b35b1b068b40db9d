"""A trainer that can be killed at any moment: it logs what it does, and resumes from what it logged.

- The log is its memory: a line ``checkpoint`` is the durable truth of what was trained. What was
  handed over after the last such line was lost with the process, and is owed to it again.
- Lines are written with one O_APPEND write each, so a killed writer tears at most its last line.
- SIGUSR1 publishes one version more; a file named ``stop`` ends the feed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chaos import mutants

__all__ = ["main"]

#: How often the monitor looks at how far the feed has come.
WATCH_S = 0.02


class Log:
    """JSON lines, each in one write; `read` skips a line that a kill has torn."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(self._fd, b"\n")

    def write(self, ev: str, **fields: Any) -> None:
        """One event, with the time in Unix seconds and the life (the pid) that it is of."""
        line = {"ev": ev, "t": time.time(), "life": os.getpid(), **fields}
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


class Program:
    """One life of the trainer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.o = options
        self.dir: Path = options.dir
        self.log = Log(self.dir / "trainer.jsonl")
        self.bumps = 0
        self.unsaved: list[int] = []
        self.acked = -1
        self.epoch = -1

    def run(self) -> int:
        """Train until the feed has ended; returns the exit code."""
        # Counted, not done: the handler runs between any two lines of the loop.
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "bumps", self.bumps + 1))
        import rollfleet  # noqa: PLC0415 - after the mutants were planted

        state = self._resume()
        self.log.write("opening", version=-1 if state is None else state["version"])
        fleet = rollfleet.connect(
            self.o.url,
            run=self.o.run,
            state=state,
            samples_per_version=self.o.spv,
            group_size=self.o.group_size,
            max_staleness=self.o.max_staleness,
            lease_s=self.o.lease_s,
            starve_s=self.o.starve_s,
            reserve_bytes=4096,
            take_over=self.o.take_over,
        )
        aio = fleet.aio
        self._opened(fleet)
        threading.Thread(target=self._watch, args=(fleet,), daemon=True).start()
        fleet.feed(self._source())
        while (batch := fleet.next_batch()) is not None:
            if aio.epoch != self.epoch:
                self._opened(fleet)  # Redis came back without the run, and it was opened anew
            self.log.write(
                "handed",
                batch=batch.number,
                epoch=aio.epoch,
                samples=[self._row(rollout) for rollout in batch.rollouts],
            )
            time.sleep(self.o.step_s)
            fleet.trained(batch)
            self.unsaved.append(batch.number)
            self._publish(fleet)
            if len(self.unsaved) >= self.o.checkpoint_every:
                self._save(fleet)
        self._save(fleet)
        self.log.write("ended")
        fleet.close()
        return 0

    def _opened(self, fleet: Any) -> None:
        self.epoch = fleet.aio.epoch
        cursor = fleet.aio.submitter.cursor
        self.log.write("opened", epoch=self.epoch, version=fleet.version, cursor=cursor)

    def _resume(self) -> dict[str, Any] | None:
        life, saved = 0, ""
        for line in read_log(self.dir / "trainer.jsonl"):
            if line["ev"] == "opened":
                life = line["life"]
            elif line["ev"] == "checkpoint" and line["life"] == life:  # none of a zombie
                saved = line["state"]
        if not saved:
            return None
        state: dict[str, Any] = json.loads((self.dir / saved).read_text())
        return state

    def _save(self, fleet: Any) -> None:
        state = fleet.state_dict()
        name = f"state-{os.getpid()}-{state['batch']}.json"
        (self.dir / name).write_text(json.dumps(state))
        self.log.write("checkpoint", state=name, batches=self.unsaved, version=state["version"])
        self.unsaved = []
        fleet.commit()
        self.log.write("committed", batch=state["batch"])

    def _publish(self, fleet: Any) -> None:
        bumps, self.bumps = self.bumps, 0
        for _ in range(1 + bumps):
            self.log.write("publishing", version=fleet.version + 1, epoch=fleet.aio.epoch)
            fleet.publish()
            self.log.write("published", version=fleet.version, epoch=fleet.aio.epoch)

    def _source(self) -> Iterator[Mapping[str, Any]]:
        position = 0
        while not (self.dir / "stop").exists() and position < self.o.prompts:
            yield {"token_ids": [1, position % 50_000, 2], "position": position, "hopeless": True}
            position += 1

    def _watch(self, fleet: Any) -> None:
        """Log how far submissions are acknowledged: the cursor moves after the reply."""
        while True:
            cursor = fleet.aio.submitter.cursor
            if cursor != self.acked:
                self.log.write("acked", upto=cursor, n=self.o.group_size)
                self.acked = cursor
            time.sleep(WATCH_S)

    def _row(self, rollout: Any) -> dict[str, Any]:
        """What the log keeps of a sample: from its payload, not from its header."""
        (sample,) = rollout.samples
        versions = sample.versions.expand(len(sample.token_ids))[sample.loss_mask]
        return {
            "group": rollout.header.group,
            "index": rollout.header.index,
            "n": rollout.header.n,
            "epoch": rollout.header.epoch,
            "oldest": int(versions.min()),
            "newest": int(versions.max()),
            "digest": hashlib.sha256(sample.token_ids.tobytes()).hexdigest()[:12],
            **sample.metrics,
        }


def main(argv: list[str]) -> int:
    """The trainer's program."""
    parser = argparse.ArgumentParser(prog="chaos trainer")
    parser.add_argument("--url", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--spv", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--lease-s", type=float, default=1.0)
    parser.add_argument("--starve-s", type=float, default=120.0)
    parser.add_argument("--prompts", type=int, default=10**9)
    parser.add_argument("--take-over", action="store_true")
    options = parser.parse_args(argv)
    mutants.plant("trainer")
    from rollfleet_common.errors import RollfleetError  # noqa: PLC0415
    from rollfleet_common.logs import configure_logs  # noqa: PLC0415

    # Of every dropped group there is a line at level debug: the judge reads them.
    configure_logs("debug", "json", (options.dir / "trainer.out").open("a", buffering=1))
    program = Program(options)
    try:
        return program.run()
    except RollfleetError as exc:
        program.log.write("error", kind=type(exc).__name__, said=str(exc))
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return 3
