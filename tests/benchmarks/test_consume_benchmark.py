"""The benchmark of waiting runs and says what it promises to; how long is not for a test to judge."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.consume", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)  # noqa: PLW1510


def test_waits_are_measured_with_and_without() -> None:
    done = run(
        *["--json", "--shape", "16x512", "--rounds", "1", "--steps", "2", "--compute-ms", "20"]
    )
    assert done.returncode == 0, done.stderr
    sides = json.loads(done.stdout)["shapes"]["16 x 512"]
    assert set(sides) == {"0", "1"}
    for side in sides.values():
        assert 0 < side["wait_ms"] <= side["worst_ms"]
        assert side["payload_bytes"] > 16 * 512 * 8
        assert 16 * 100 < side["header_bytes"] < 16 * 400
    assert sides["0"]["payload_bytes"] == sides["1"]["payload_bytes"], "nothing is read twice"


def test_half_groups_are_refused() -> None:
    done = run("--shape", "12x512")
    assert done.returncode == 2
    assert "whole groups of 8" in done.stderr
