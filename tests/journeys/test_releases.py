"""Two releases in one run: rolling upgrades work, and what cannot work says so and harms nothing.

Release 0.1.0 is the real one: its wheel lies in tests/data.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fixtures.fleet_processes import Process, Processes
from support import wait_until

import rollfleet
from rollfleet import aio
from rollfleet_common import schemas
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect_sync
from rollfleet_common.schemas import RELEASE

WHEEL = Path(__file__).parent.parent / "data" / "rollfleet-0.1.0-py3-none-any.whl"
SHAPE: dict[str, Any] = {
    "samples_per_version": 32,
    "group_size": 4,
    "max_staleness": 4,
    "starve_s": 60.0,
}

#: Written against release 0.1.0 alone.
OLD_WORKFLOW = """
import numpy as np
from rollfleet_common.messages import Sample, VersionSpans

class Echo:
    async def run(self, prompt, context):
        ids = np.asarray([*prompt.token_ids, 9], np.int32)
        mask = np.zeros(len(ids), np.bool_)
        mask[-1] = True
        lp = np.where(mask, -0.5, 0.0).astype(np.float32)
        spans = VersionSpans.of([(len(ids) - 1, -1), (1, context.version)])
        return Sample(ids, mask, lp, spans, 1.0)
"""
OLD_TRAINER = """
import json, sys
import rollfleet
from importlib.metadata import version
url, run, prompts, shape = json.loads(sys.argv[1])
with rollfleet.connect(url, run=run, **shape) as fleet:
    print(json.dumps({"event": "opened", "release": version("rollfleet")}), flush=True)
    fleet.feed([{"token_ids": [1]} for _ in range(prompts)])
    done = 0
    for batch in fleet.batches():
        done += len(batch.rollouts)
        fleet.publish()
    books = fleet.books()
    print(json.dumps({"event": "done", "samples": done, "balance": books.balance}), flush=True)
"""


class Old:
    """Processes of release 0.1.0."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self.processes = processes
        with zipfile.ZipFile(WHEEL) as wheel:
            wheel.extractall(folder / "old")
        (folder / "mine" / "old_flows").mkdir(parents=True)
        (folder / "mine" / "old_flows" / "workflow.py").write_text(OLD_WORKFLOW)
        self.env = {"PYTHONPATH": f"{folder / 'old'}:{folder / 'mine'}"}

    def worker(self, url: str, run: str) -> Process:
        worker = self.processes.worker(url, run, "old_flows.workflow:Echo", env=self.env)
        worker.event("claiming")
        return worker

    def trainer(self, url: str, run: str, prompts: int) -> Process:
        plan = json.dumps([url, run, prompts, SHAPE])
        return self.processes.start("-c", OLD_TRAINER, plan, name="trainer", env=self.env)


@pytest.fixture
def old(processes: Processes, tmp_path: Path) -> Old:
    return Old(processes, tmp_path)


def cards(url: str, run: str) -> list[dict[str, Any]]:
    with connect_sync(url, role="test") as client:
        raw: dict[bytes, bytes] = client.hgetall(RunKeys(run).workers)  # type: ignore[assignment]
    return [json.loads(card) for card in raw.values()]


def warnings(url: str, run: str) -> list[str]:
    with connect_sync(url, role="test") as client:
        return json.loads(client.hget(RunKeys(run).board, "warnings") or b"[]")  # type: ignore[no-any-return, arg-type]


def refused(worker: Process) -> dict[str, Any]:
    said = worker.event("this release cannot work for the trainer of the run")
    assert worker.wait() == 2, worker.text
    assert "Traceback" not in worker.text
    assert not worker.events("garbage on the prompts stream")
    return said


def test_a_later_schema_of_prompts_is_out_of_reach_of_release_0_1_0(
    redis_url: str, processes: Processes, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "PROMPT", 2)
    monkeypatch.setattr(aio, "CARDS_S", 0.2)
    with rollfleet.connect(redis_url, run="mixed", **SHAPE) as fleet:
        stranger = old.worker(redis_url, "mixed")
        wait_until(lambda: cards(redis_url, "mixed"), "its card", 30)
        assert [card["version"] for card in cards(redis_url, "mixed")] == ["0.1.0"]
        said = "the trainer has prompt schema 2, the worker 1: upgrade the worker (release 0.1.0)"
        wait_until(lambda: said in str(warnings(redis_url, "mixed")), "a warning", 30)
        good = processes.worker(
            redis_url, "mixed", "Actor", altered={"schemas": {"PROMPT": 2}}, retry_max_s=0.3
        )
        # Also what waits for another attempt is none of the stranger's business.
        prompts: list[dict[str, Any]] = [{"token_ids": [1], "answer": 1.0} for _ in range(12)]
        prompts += [{"token_ids": [2], "act": "raise", "fails": 1} for _ in range(4)]
        fleet.feed(prompts)
        workers: set[str] = set()
        for batch in fleet.batches():
            workers |= {rollout.header.worker for rollout in batch.rollouts}
            fleet.publish()
        (mine,) = (card for card in cards(redis_url, "mixed") if card["version"] != "0.1.0")
        assert workers == {mine["id"]}
        assert mine["schemas"]["prompt"] == [2, 2]
        books = fleet.books()
        assert (books.balance, books.committed, books.dead) == (0, 64, 0)
        assert books.counters["retried:data"] == 16
        assert "garbage" not in books.counters
        (theirs,) = (card for card in cards(redis_url, "mixed") if card["version"] == "0.1.0")
        assert (theirs["delivered"], theirs["failed"]) == (0, 0)
    assert not stranger.events("garbage on the prompts stream")
    assert stranger.stop() == 0
    assert good.stop() == 0


def test_a_rolling_upgrade_of_the_workers(redis_url: str, processes: Processes, old: Old) -> None:
    with rollfleet.connect(redis_url, run="roll", **SHAPE) as fleet:
        first = old.worker(redis_url, "roll")
        fleet.feed([{"token_ids": [1]} for _ in range(8)])
        workers = [{r.header.worker for r in batch.rollouts} for batch in fleet.batches()]
        second = processes.worker(redis_url, "roll")
        second.event("claiming")
        assert first.stop() == 0
        fleet.feed([{"token_ids": [1]} for _ in range(16)])
        workers += [{r.header.worker for r in batch.rollouts} for batch in fleet.batches()]
        assert len(set().union(*workers)) == 2
        books = fleet.books()
        assert (books.balance, books.committed) == (0, 64)
    assert second.stop() == 0


def test_a_trainer_of_release_0_1_0_has_workers_of_this_one(
    redis_url: str, processes: Processes, old: Old
) -> None:
    trainer = old.trainer(redis_url, "first", 16)
    assert trainer.event("opened")["release"] == "0.1.0"
    worker = processes.worker(redis_url, "first")
    done = trainer.event("done")
    assert (done["samples"], done["balance"]) == (64, 0)
    assert trainer.wait() == 0
    assert worker.stop() == 0


def test_a_worker_that_cannot_work_for_the_trainer_refuses_to_start(
    redis_url: str, processes: Processes
) -> None:
    with rollfleet.connect(redis_url, run="refuse", **SHAPE):
        newer = processes.worker(redis_url, "refuse", altered={"schemas": {"PROMPT": 3}})
        why = refused(newer)["why"]
        assert "the trainer has prompt schema 1, the worker 3: upgrade the trainer" in why
        newer = processes.worker(redis_url, "refuse", altered={"schemas": {"PAYLOAD": 2}})
        assert "the trainer has payload schema 1, the worker 2" in refused(newer)["why"]
        assert cards(redis_url, "refuse") == []
    trainer = processes.trainer(
        redis_url, "later", altered={"schemas": {"HEADER": 2}}, feed=1, settings={"starve_s": 60.0}
    )
    trainer.event("opened")
    said = refused(processes.worker(redis_url, "later"))
    assert "the trainer has header schema 2, the worker 1: upgrade the worker" in said["why"]
    assert (said["release"], said["trainer_release"]) == (RELEASE, RELEASE)
    good = processes.worker(redis_url, "later", altered={"schemas": {"HEADER": 2}})
    trainer.event("done")
    assert good.stop() == 0


@pytest.mark.parametrize("kind", ["PROMPT", "HEADER"])
def test_a_trainer_of_another_schema_opens_while_a_worker_runs(
    redis_url: str,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    run = f"turn-{kind}"
    held = {"token_ids": [5], "act": "gate", "gate": str(gate), "trace": str(trace), "n": 1}
    with rollfleet.connect(redis_url, run=run, **SHAPE) as fleet:
        worker = processes.worker(redis_url, run, "Actor")
        fleet.submit(held)
        wait_until(lambda: trace.exists() and trace.read_text(), "an episode at the gate", 30)
        if kind == "PROMPT":
            # Prompts that nobody would run are a reason not to open.
            monkeypatch.setattr(schemas, kind, 2)
            left = r"1 of schema 1; this release writes schema 2"
            with pytest.raises(rollfleet.SettingsError, match=left):
                rollfleet.connect(redis_url, run=run, take_over=True, **SHAPE)
            assert worker.popen.poll() is None
            fresh = True
        else:
            monkeypatch.setattr(schemas, kind, 2)
            fresh = False
        with rollfleet.connect(redis_url, run=run, take_over=True, fresh=fresh, **SHAPE) as second:
            why = worker.event("this release cannot work for the trainer of the run")["why"]
            assert f"the trainer has {kind.lower()} schema 2, the worker 1" in why
            gate.touch()
            refused(worker)
            books = second.books()
            assert (books.balance, books.in_flight, books.ready) == (0, 0, 0)
            if kind == "HEADER":
                # It went back untouched, and nothing came that this trainer cannot read.
                assert (books.waiting, books.counters.get("garbage", 0)) == (1, 0)
                good = processes.worker(redis_url, run, "Actor", altered={"schemas": {kind: 2}})
                batch = second.next_batch(1)
                assert batch is not None
                second.commit(batch)
                assert good.stop() == 0
