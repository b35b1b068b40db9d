"""The TRL adapter without TRL: its seam as recorded from trl 1.16.0, a real fleet behind it.

TRL's own trainer runs in test_trl_trainer.py, where it is installed.
"""

import importlib.metadata
import queue
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.fleet_processes import Processes
from fixtures.servers import MakeServer
from safetensors.torch import load_file
from support import wait_until

import rollfleet
from rollfleet.adapters.trl import TrlBridge, fleet_settings, load_state
from rollfleet.adapters.trl_seam import PROTOCOLS, PROVEN
from rollfleet.adapters.trl_watch import Watcher
from rollfleet.submit.resumable import Epochs

PROMPTS = [{"token_ids": [1, 2, 3], "answer": float(i)} for i in range(3)]


# ---- the seam, as recorded -----------------------------------------------------------------------


@dataclass(slots=True)
class RolloutSample:
    prompt: Any
    completion: Any
    input_ids: Any
    completion_mask: Any
    old_log_probs: Any
    advantage: float
    model_version: int
    group_id: int
    metrics: dict[str, float]
    enqueued_at: float | None = None


class RolloutWorkerProtocol:
    rollout_buffer: Any
    metrics_queue: Any

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None: ...


class WeightTransferProtocol:
    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Any) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


Modules = tuple[ModuleType, ModuleType]


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Modules:
    """A TRL of these shapes."""
    made: list[ModuleType] = []
    for name in ("async_grpo_trainer", "async_rollout_worker"):
        full = f"trl.experimental.async_grpo.{name}"
        made.append(ModuleType(full))
        monkeypatch.setitem(sys.modules, full, made[-1])
    for name in ("trl", "trl.experimental", "trl.experimental.async_grpo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: PROVEN)
    trainer, worker = made
    for protocol in (RolloutWorkerProtocol, WeightTransferProtocol):
        setattr(trainer, protocol.__name__, protocol)
    vars(worker)["RolloutSample"] = RolloutSample
    return trainer, worker


def config(**changes: Any) -> Any:
    """What is read of an AsyncGRPOConfig."""
    fields: dict[str, Any] = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "weight_sync_steps": 1,
        "max_staleness": 3,
        "token_budget": 0,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "world_size": 1,
        "output_dir": "",
    }
    return SimpleNamespace(**{**fields, **changes})


Connect = Callable[..., tuple[rollfleet.Fleet, TrlBridge, Watcher]]


@pytest.fixture
def connect(redis_url: str, trl: Modules, processes: Processes) -> Iterator[Connect]:
    """A fleet with one worker, and a bridge that is being watched and has its first version."""
    opened: list[rollfleet.Fleet] = []

    def make(
        run: str, args: Any, prompts: Any = None, state: Any = None, **options: Any
    ) -> tuple[rollfleet.Fleet, TrlBridge, Watcher]:
        shape: dict[str, Any] = fleet_settings(args) | options.pop("shape", {})
        fleet = rollfleet.connect(redis_url, run=run, state=state, **shape)
        opened.append(fleet)
        bridge = TrlBridge(fleet, args, Epochs(PROMPTS) if prompts is None else prompts, **options)
        watcher = Watcher(bridge)
        watcher.on_train_begin(args, None, None)
        bridge.update_model_version(1)
        bridge.start()
        return fleet, bridge, watcher

    yield make
    for fleet in opened:
        fleet.close()


def take(bridge: TrlBridge, rows: int, timeout: float = 20.0) -> list[RolloutSample]:
    return [bridge.get(timeout=timeout) for _ in range(rows)]


pytestmark = pytest.mark.leaves_keys("TRL reads ahead, and is stopped there", "rf:*")


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_are_whole_groups_in_trls_terms(connect: Connect, processes: Processes) -> None:
    fleet, bridge, _ = connect("rows", config())
    processes.worker(fleet.redis_url, "rows")
    rows = take(bridge, 8)
    assert [row.group_id for row in rows] == [1] * 4 + [2] * 4
    for row in rows:
        assert row.input_ids.tolist() == [1, 2, 3, 100, 101, 102, 103]
        assert row.completion_mask.tolist() == [0] * 3 + [1] * 4
        assert row.old_log_probs.tolist() == [0.0] * 3 + [-0.5] * 4
        assert (row.input_ids.dtype, row.completion_mask.dtype) == (np.int64, np.int64)
        assert row.old_log_probs.dtype == np.float32
        assert row.model_version == 1  # TRL's number of the version that it began with
        assert row.enqueued_at is not None
        assert (row.advantage, row.metrics["reward_std"]) == (0.0, 0.0)
    assert bridge.metrics_queue.get_nowait()["rollfleet/staleness_max"] == 0


def test_advantages_are_of_the_group(connect: Connect, processes: Processes) -> None:
    def ranks(rewards: Any) -> Any:
        return np.arange(len(rewards)) + rewards

    fleet, bridge, _ = connect("advantages", config(), advantages=ranks)
    processes.worker(fleet.redis_url, "advantages")
    for row, rank in zip(take(bridge, 4), range(4), strict=True):
        assert row.advantage == row.metrics["reward"] + rank


def test_versions_are_counted_as_trl_counts_them(connect: Connect, processes: Processes) -> None:
    args = config()
    fleet, bridge, watcher = connect("versions", args)
    worker = processes.worker(fleet.redis_url, "versions")
    take(bridge, 8)
    watcher.on_step_end(args, None, None)
    bridge.update_model_version(2)
    assert fleet.version == 2
    worker.event("following", version=2)
    ages = set()
    for _ in range(4):  # what was made before is one version old now, and then comes what is not
        ages |= {2 - row.model_version for row in take(bridge, 8)}
        watcher.on_step_end(args, None, None)
    assert ages == {0, 1}


def test_a_row_that_trl_would_drop_is_kept_from_it(connect: Connect, processes: Processes) -> None:
    args = config(max_staleness=1)
    fleet, bridge, _ = connect("late", args)
    processes.worker(fleet.redis_url, "late")
    take(bridge, 3)  # TRL holds three of a group, and publishes twice before it takes the fourth
    bridge.update_model_version(2)
    bridge.update_model_version(3)
    row = bridge.get(timeout=20.0)
    assert (row.group_id, row.model_version) == (2, 3)
    told = [bridge.metrics_queue.get_nowait() for _ in range(bridge.metrics_queue.qsize())]
    assert {"rollfleet/late_rows_total": 1.0} in told
    bridge.trained(3)
    assert fleet.books().committed == 4


# ---- what was trained ----------------------------------------------------------------------------


def test_a_group_is_committed_when_trl_has_trained_all_of_it(
    connect: Connect, processes: Processes
) -> None:
    args = config()
    fleet, bridge, watcher = connect("step", args)
    processes.worker(fleet.redis_url, "step")
    take(bridge, 12)  # a step of two micro-batches of four, and one read ahead
    assert fleet.books().committed == 0
    watcher.on_step_end(args, None, None)
    assert fleet.books().committed == 8
    bridge.trained(2)
    assert fleet.books().committed == 8
    bridge.trained(2)
    assert fleet.books().committed == 12


def test_with_a_token_budget_trls_log_says_how_many(connect: Connect, processes: Processes) -> None:
    args = config(token_budget=64)
    fleet, bridge, watcher = connect("tokens", args)
    processes.worker(fleet.redis_url, "tokens")
    take(bridge, 8)
    watcher.on_step_end(args, None, None)
    watcher.on_log(args, None, None, {"train_runtime": 1.0})
    assert fleet.books().committed == 0
    watcher.on_log(args, None, None, {"batch/samples_per_step": 5.0000001})
    assert fleet.books().committed == 4
    args.token_budget = 6  # a row has seven: TRL would drop it
    with pytest.raises(queue.Empty):
        bridge.get(timeout=0.5)


def test_a_checkpoint_frees_what_it_holds_and_a_crash_gets_the_rest_again(
    connect: Connect, processes: Processes, tmp_path: Path
) -> None:
    args = config(output_dir=str(tmp_path))
    (tmp_path / "checkpoint-1").mkdir()
    fleet, bridge, watcher = connect("checkpoint", args, commit="checkpoint")
    processes.worker(fleet.redis_url, "checkpoint")
    take(bridge, 8)
    ahead = [row.metrics["reward"] for row in take(bridge, 4)]
    watcher.on_step_end(args, None, None)
    assert fleet.books().committed == 0
    watcher.on_save(args, SimpleNamespace(global_step=1), None)
    assert fleet.books().committed == 8
    take(bridge, 4)
    watcher.on_step_end(args, None, None)  # trained, and forgotten by the crash
    fleet.close()
    state = load_state(tmp_path / "checkpoint-1")
    assert state["batch"] == 2
    assert 2 in state["open"]  # TRL held it: if Redis were lost, it would be fed again
    fleet, bridge, watcher = connect("checkpoint", args, state=state, commit="checkpoint")
    assert [row.metrics["reward"] for row in take(bridge, 4)] == ahead
    assert fleet.books().committed == 8
    with pytest.raises(rollfleet.SettingsError, match=r"checkpoint-2.rollfleet.pt does not exist"):
        load_state(tmp_path / "checkpoint-2")


def test_without_the_callback_it_does_not_start(redis_url: str, trl: Modules) -> None:
    args = config()
    with rollfleet.connect(redis_url, run="unwatched", **fleet_settings(args)) as fleet:
        bridge = TrlBridge(fleet, args, PROMPTS)
        with pytest.raises(rollfleet.SettingsError, match=r"callbacks=\[.*callback\(bridge\)\]"):
            bridge.start()


# ---- waiting -------------------------------------------------------------------------------------


def test_nothing_to_take_is_empty_and_then_ill(connect: Connect) -> None:
    _, bridge, _ = connect("idle", config())
    with pytest.raises(queue.Empty):
        bridge.get(timeout=0.1)
    with pytest.raises(queue.Empty):
        bridge.get(block=False)
    bridge.check_health(60.0)
    with pytest.raises(rollfleet.StarvedError, match=r"nothing to train on for .* no worker has"):
        bridge.check_health(0.0)


def test_a_redis_that_is_away_is_an_empty_queue(
    make_server: MakeServer, trl: Modules, processes: Processes
) -> None:
    """Longer than TRL asks: it asks again, and says by its own clock when that is too long."""
    server, args = make_server(appendonly="always"), config()
    with rollfleet.connect(server.url, run="away", **fleet_settings(args)) as fleet:
        bridge = TrlBridge(fleet, args, Epochs(PROMPTS))
        Watcher(bridge).on_train_begin(args, None, None)
        bridge.update_model_version(1)
        bridge.start()
        processes.worker(server.url, "away")
        take(bridge, 4)
        server.kill()
        with pytest.raises(queue.Empty):
            take(bridge, 100, timeout=0.3)
        with pytest.raises(rollfleet.StarvedError, match="Redis"):
            bridge.check_health(0.0)
        server.restart()
        assert len(take(bridge, 4)) == 4


def test_a_source_that_ends_is_an_error(connect: Connect, processes: Processes) -> None:
    fleet, bridge, watcher = connect("ends", config(), PROMPTS[:1])
    processes.worker(fleet.redis_url, "ends")
    take(bridge, 4)
    watcher.on_step_end(config(), None, None)
    with pytest.raises(rollfleet.RollfleetError, match="ended after 1 groups, and TRL wants more"):
        bridge.get(timeout=20.0)
    bridge.stop()


def test_a_step_that_cannot_fit_is_refused_with_the_arithmetic(
    connect: Connect, processes: Processes
) -> None:
    args = config(max_staleness=0)
    fleet, bridge, _ = connect("full", args, shape={"samples_per_version": 8})
    processes.worker(fleet.redis_url, "full")
    take(bridge, 8)
    with pytest.raises(rollfleet.SettingsError, match=r"TRL holds 8 rows .* \(0 \+ 1\) x 8 = 8"):
        wait_until(lambda: bridge.get(timeout=0.5), "the refusal")


# ---- weights -------------------------------------------------------------------------------------


def test_weights_are_saved_whole_and_old_ones_go(
    redis_url: str, trl: Modules, tmp_path: Path
) -> None:
    args = config()
    with rollfleet.connect(redis_url, run="weights", **fleet_settings(args)) as fleet:
        bridge = TrlBridge(fleet, args, PROMPTS, weights=tmp_path / "w", keep=2)
        bridge.init_weight_transfer()
        for version in range(1, 5):
            bridge.pause()
            bridge.send_weights(iter([("head.weight", torch.full((2, 2), float(version)))]))
            bridge.resume()
            bridge.update_model_version(version)
            assert fleet.version == version
        bridge.destroy()
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
        assert left == [f"w/v000000{version}/model.safetensors" for version in (3, 4)]
        tensors = load_file(tmp_path / left[1])
        assert tensors["head.weight"].tolist() == [[4.0, 4.0]] * 2
        with pytest.raises(rollfleet.SettingsError, match="give it weights="):
            TrlBridge(fleet, args, PROMPTS).init_weight_transfer()


# ---- what does not fit ---------------------------------------------------------------------------


def test_settings_that_agree_leave_room_for_what_trl_holds() -> None:
    assert fleet_settings(config()) == {
        "group_size": 4,
        "batch_size": 4,
        "samples_per_version": 8,
        "max_staleness": 2,
    }
    tight = fleet_settings(config(max_staleness=0, gradient_accumulation_steps=1), processes=2)
    assert (tight["max_staleness"], tight["samples_per_version"]) == (0, 8 + 8 + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 8}, "num_generations = 8 .* group_size = 4"),
        ({"max_staleness": 1}, "max_staleness = 1 .* below the fleet's 2"),
        ({"token_budget": None, "logging_steps": 10}, "set logging_steps=1, or token_budget=0"),
        ({"token_budget": 99, "logging_strategy": "epoch"}, "set logging_steps=1"),
    ],
)
def test_settings_that_disagree_are_refused(
    redis_url: str, trl: Modules, changes: Any, message: str
) -> None:
    with (
        rollfleet.connect(redis_url, run="disagree", **fleet_settings(config())) as fleet,
        pytest.raises(rollfleet.SettingsError, match=message),
    ):
        TrlBridge(fleet, config(**changes), PROMPTS)


def _refused(redis_url: str) -> str:
    args = config()
    with (
        rollfleet.connect(redis_url, run="seam", **fleet_settings(args)) as fleet,
        pytest.raises(rollfleet.SettingsError) as refused,
    ):
        TrlBridge(fleet, args, PROMPTS)
    return str(refused.value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_trl_without_a_protocol_is_refused(redis_url: str, trl: Modules, name: str) -> None:
    delattr(trl[0], name)
    said = _refused(redis_url)
    assert f"another seam than trl {PROVEN}" in said
    assert f"no {name}" in said


def test_a_trl_that_wants_more_is_refused(redis_url: str, trl: Modules) -> None:
    class More(WeightTransferProtocol):
        def drain(self) -> None: ...

    @dataclass
    class Row(RolloutSample):
        tenant: str = ""

    @dataclass
    class Other:
        input_ids: Any
        weight: float

    vars(trl[0])["WeightTransferProtocol"] = More
    vars(trl[1])["RolloutSample"] = Row  # a field with a default may stay away
    assert _refused(redis_url).endswith(
        ": WeightTransferProtocol.drain, which this adapter does not have"
    )
    vars(trl[1])["RolloutSample"] = Other
    said = _refused(redis_url)
    assert "no RolloutSample.advantage" in said
    assert "RolloutSample.weight, which it must be given" in said


def test_without_trl_it_says_what_to_install(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError("trl")

    monkeypatch.setattr(importlib.metadata, "version", none)
    said = _refused(redis_url)
    assert "install 'rollfleet[trl]'" in said
    assert PROVEN in said
