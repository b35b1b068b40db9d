"""The benchmarks run and say what they promise to say; how fast is not for a test to judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.path", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)  # noqa: PLW1510


@pytest.mark.slow
def test_the_path_is_measured_and_reported() -> None:
    done = run("--json", "--n", "200", "--rounds", "1", "--pings", "3", "--aof", "everysec")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["sides"]) == {
        *(f"floor, batches of {batch}" for batch in (16, 64, 256)),
        "rollfleet",
    }
    for side in report["sides"].values():
        rate, latency = side["tasks_per_s"], side["latency_ms"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert 0 < latency["p50"] <= latency["p95"]
        assert len(side["rounds"]) == 1
    assert report["ratio"] > 0
    assert report["latency_ratio"] > 0
    assert report["best_floor"].startswith("floor")
    assert "everysec" in report["server"]
    assert report["settings"]["slots"] == 64
    assert report["machine"]["cores"] > 0


def test_a_single_turn_sample_costs_less_than_eight_and_a_half_bytes_a_token() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import json, benchmarks.path as p; print(json.dumps(p.wire()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    wire = json.loads(done.stdout)
    assert wire["tokens"] == 2048
    assert 8 <= wire["bytes_per_token"] < 8.5


def test_half_groups_are_refused() -> None:
    done = run("--n", "4", "--group-size", "8")
    assert done.returncode == 2
    assert "whole groups" in done.stderr
