"""Rows of the fault matrix: what can happen to the trainer."""

import signal
import time

from chaos.harness import Stage
from chaos.processes import catches, until
from chaos.rows import Row, back_s

__all__ = ["ROWS"]


def _between_read_and_commit(stage: Stage) -> float | None:
    for _ in range(3):
        handed, committed = _count(stage, "handed"), _count(stage, "committed")
        until(
            lambda h=handed, c=committed: (
                _count(stage, "handed") > h + 1  # type: ignore[misc]
                and _count(stage, "committed") >= c
            ),
            30.0,
            stage.tend,
            "a batch that is not committed",
        )
        stage.kill_trainer()
        stage.start_trainer()
    return back_s(stage)


def _between_commit_and_reply(stage: Stage) -> float | None:
    took = 0.0
    for _ in range(3):
        saved = _count(stage, "checkpoint")
        until(
            lambda s=saved: _count(stage, "checkpoint") > s,  # type: ignore[misc]
            30.0,
            stage.tend,
            "a checkpoint",
        )
        # The commit is under way, or the next trained is: its reply will not be seen.
        stage.disturb()
        lost = stage.trainer_proxy.replies_lost
        stage.trainer_proxy.drop_replies(b"EVALSHA", cut=False)
        until(
            lambda n=lost: stage.trainer_proxy.replies_lost > n,  # type: ignore[misc]
            10.0,
            stage.tend,
            "a reply to be lost",
        )
        stage.kill_trainer()
        stage.trainer_proxy.resume()
        stage.start_trainer()
        took = max(took, back_s(stage))
    return took


def _superseded(stage: Stage) -> float | None:
    old = stage.trainer
    assert old is not None
    old.send_signal(signal.SIGSTOP)
    try:
        time.sleep(stage_lease_s(stage) + 1.5)
        stage.start_trainer()  # waits for the old one's lease, then opens the run
        took = back_s(stage)
        old.send_signal(signal.SIGCONT)
        old.wait(15)
    finally:
        if old.poll() is None:
            old.kill()
            old.wait(10)
    said = (stage.dir / "trainer.err").read_text()
    assert "SupersededError" in said, f"the old trainer ended with {old.returncode}: {said[-300:]}"
    stage.warm()
    return took


def stage_lease_s(stage: Stage) -> float:
    """The trainer's lease: the default of chaos.trainer."""
    return 1.0


def _mid_submit(stage: Stage) -> float | None:
    for _ in range(6):
        lives = _count(stage, "opened")
        stage.kill_trainer()
        stage.start_trainer()
        until(
            lambda n=lives: _count(stage, "opened") > n,  # type: ignore[misc]
            15.0,
            stage.tend,
            "the trainer to open the run",
        )
        time.sleep(0.03)
    return back_s(stage)


def _rollback(stage: Stage) -> float | None:
    took = 0.0
    for _ in range(3):
        trainer = stage.trainer
        assert trainer is not None
        until(lambda t=trainer: catches(t.pid, signal.SIGUSR1), 10.0, stage.tend, "the trainer")  # type: ignore[misc]
        for _ in range(3):
            trainer.send_signal(signal.SIGUSR1)
            time.sleep(0.15)
        stage.warm(stage.o.spv)
        stage.kill_trainer()  # the next one begins at the version of the last checkpoint
        stage.start_trainer()
        took = max(took, back_s(stage))
    return took


def _count(stage: Stage, ev: str) -> int:
    return (stage.dir / "trainer.jsonl").read_text().count(f'{{"ev": "{ev}"')


ROWS = [
    Row(
        "trainer killed between read and commit",
        "kill -9 with batches handed over and not committed, three times",
        _between_read_and_commit,
    ),
    Row(
        "trainer killed between commit and its reply",
        "replies are withheld from the commit on, then kill -9, three times",
        _between_commit_and_reply,
        {"proxied": True},
    ),
    Row(
        "trainer superseded",
        "SIGSTOP past its lease, a successor opens the run, SIGCONT",
        _superseded,
    ),
    Row("producer killed mid-submit", "kill -9 as soon as it feeds, six times", _mid_submit),
    Row(
        "version bump and rollback mid-flight",
        "versions out of turn, then a resume from an older checkpoint, three times",
        _rollback,
        {"trainer_flags": ("--checkpoint-every", "4")},
    ),
]
