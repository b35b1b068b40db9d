"""The DataLoader example is killed with -9, goes on from its checkpoint, and its books are exact."""

import re
from pathlib import Path

import pytest
from fixtures.fleet_processes import Process, Processes
from support import wait_until

from rollfleet_demo.model import TinyPolicy, save

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "dataloader.py")
SAMPLES = 32
STEPS = 12
PATIENCE_S = 60.0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves_keys("the feed is ahead of the last step", "rf:*"),
]


def steps(trainer: Process) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d+): reward", trainer.text)]


def test_killed_and_started_again(redis_url: str, processes: Processes, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    save(TinyPolicy(seed=0), weights / "v0.safetensors", 0)  # as the example makes it
    arguments = ["--version=0", f"--weights={weights}/v0.safetensors"]
    server = processes.start("-m", "rollfleet_demo.server", *arguments, name="server")
    url = wait_until(
        lambda: re.findall(r'"url": "([^"]+)"', server.text), "the server to serve", PATIENCE_S
    )[0]
    processes.worker(redis_url, "sort", "rollfleet_demo.workflow:Sort", server=url, stop_token_id=1)

    def trainer(count: int) -> Process:
        flags = {
            "redis-url": redis_url,
            "server": url,
            "weights": weights,
            "samples": SAMPLES,
            "warm-start-steps": 0,
            "checkpoint-every": 3,
            "steps": count,
        }
        given = [f"--{name}={value}" for name, value in flags.items()]
        # A short lease: the second need not wait long for the first's to run out.
        return processes.start(EXAMPLE, *given, name="trainer", env={"ROLLFLEET_LEASE_S": "2"})

    first = trainer(1000)
    wait_until(
        lambda: len(steps(first)) >= 5 and steps(first)[-1] % 3 == 2,
        "two steps after a checkpoint",
        PATIENCE_S,
    )
    first.kill()
    resumed_from = 3 * ((steps(first)[-1] - 1) // 3)
    second = trainer(resumed_from + STEPS)
    assert second.wait(PATIENCE_S) == 0, second.text
    assert steps(second) == list(range(resumed_from + 1, resumed_from + STEPS + 1))
    assert f"committed={(resumed_from + STEPS) * SAMPLES}," in second.text
    assert "resuming the feed" in second.text
    assert "read from its beginning" not in second.text
