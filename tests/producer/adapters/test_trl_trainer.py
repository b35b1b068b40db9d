"""TRL's own AsyncGRPOTrainer on a fleet, on a CPU: examples/trl_grpo.py, killed and resumed.

Runs where TRL is installed (`make trl`). TRL wants a GPU in two places, which fixtures/trl_cpu.py
stands in for; the trainer, loss, loader, callbacks and checkpoints are TRL's.
"""

import importlib.metadata
import re
from pathlib import Path

import pytest
from fixtures.fleet_processes import Process, Processes
from support import wait_until

ROOT = Path(__file__).parents[3]
EXAMPLE = str(ROOT / "examples" / "trl_grpo.py")
FIXTURES = ROOT / "tests" / "fixtures"
#: Not tests/: TRL takes its folder `vllm` for an installed vLLM.
ENV = {
    "PYTHONPATH": str(ROOT / "examples"),
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "ROLLFLEET_LEASE_S": "2",
}
STEP = 64
PATIENCE_S = 120.0


def _installed() -> bool:
    try:
        return bool(importlib.metadata.version("trl"))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not _installed(), reason="TRL is not installed: make trl"),
    pytest.mark.leaves_keys("TRL reads ahead, and is stopped there", "rf:*"),
]


def whole(folder: Path) -> list[Path]:
    """Checkpoints with a state of ours, oldest first."""
    found = [path.parent for path in folder.glob("checkpoint-*/rollfleet.pt")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def numbers(trainer: Process, name: str) -> list[float]:
    """What TRL logged under this name, step by step."""
    return [float(each) for each in re.findall(rf"'{name}': '?([-\d.e]+)'?", trainer.text)]


def test_trl_trains_on_a_fleet_and_a_crash_costs_and_repeats_nothing(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    tiny, out = tmp_path / "tiny", tmp_path / "out"
    make = processes.start(EXAMPLE, "--make-model", str(tiny), name="make", env=ENV)
    assert make.wait(PATIENCE_S) == 0
    server = processes.start(
        str(FIXTURES / "hf_server.py"),
        "--weights",
        str(tiny),
        "--version=0",
        name="server",
        env=ENV,
    )

    def served() -> list[str]:
        assert server.popen.poll() is None, server.text
        return re.findall(r'"url": "([^"]+)"', server.text)

    url = wait_until(served, "the server to serve", PATIENCE_S)[0]
    flags = {
        "redis-url": redis_url,
        "run": "trl",
        "server": url,
        "workflow": "trl_grpo:PartlySorted",
        "stop-token-id": 1,
        "max-tokens": 12,
        "health-port": 0,
    }
    worker = [f"--{name}={value}" for name, value in flags.items()]
    processes.start("-m", "rollfleet_console", "worker", *worker, name="worker", env=ENV)

    def trainer(steps: int, *more: str) -> Process:
        settings = {
            "model": tiny,
            "redis-url": redis_url,
            "server": url,
            "weights": tmp_path / "weights",
            "output": out,
            "steps": steps,
            "save-steps": 5,
        }
        given = [f"--{name}={value}" for name, value in settings.items()]
        program = str(FIXTURES / "trl_cpu.py")
        return processes.start(program, EXAMPLE, *given, *more, name="trainer", env=ENV)

    first = trainer(1000)

    def beyond_a_checkpoint() -> bool:
        assert first.popen.poll() is None, first.text[-3000:]
        steps = len(numbers(first, "grad_norm"))
        return bool(whole(out)) and steps >= 8 and steps % 5 >= 2

    wait_until(beyond_a_checkpoint, "steps after a checkpoint", PATIENCE_S)
    first.kill()
    last = whole(out)[-1]
    done = int(last.name.rpartition("-")[2])
    second = trainer(done + 5, "--resume", str(last))
    assert second.wait(PATIENCE_S) == 0, second.text[-3000:]

    # The trainer computes the log-probabilities that the server reported: same weights, same version.
    assert numbers(first, "ratio")[0] == pytest.approx(1.0, abs=1e-3)
    assert max(numbers(first, "sample/staleness_max")) <= 3
    assert "dropped_stale" not in first.text + second.text
    # All that the last checkpoint holds, and nothing else, is committed: each sample once.
    books = second.text[second.text.rindex("Books(") :]
    assert f"committed={(done + 5) * STEP}," in books
    assert "trained=0," in books
