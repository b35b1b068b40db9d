"""The demo on a real vLLM, as a user starts it: short, and judged by its own report."""

import json
import subprocess
import sys

from fixtures.fleet_processes import clean_environment
from fixtures.real_vllm import BIN, needs_model

from rollfleet_demo.judge import TOLERANCE

pytestmark = needs_model

STEPS = 6


def test_the_demo_trains_on_a_real_server_and_no_label_is_wrong(tmp_path):
    command = [sys.executable, "-m", "rollfleet_console", "demo", "--engine", "vllm"]
    command += ["--vllm", BIN, "--steps", str(STEPS), "--workers", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=390
    )
    report = tmp_path / "report.json"
    assert report.exists(), done.stdout + done.stderr
    said = json.loads(report.read_text())
    # Whether the reward has risen in so few steps is luck; everything else is not.
    assert said["steps"] == STEPS
    assert said["engine"] == "vllm"
    assert said["samples_trained"] == STEPS * 256
    assert said["duplicates_trained"] == said["mislabelled_tokens"] == said["wrong_rewards"] == 0
    assert said["max_staleness_trained"] <= said["staleness_bound"]
    assert 0 < said["largest_gap"] < TOLERANCE
    assert said["told_apart"] > 0.5
    assert said["server_tokens"]["server-1"] >= said["tokens"]
    assert set(said["worker_exit_codes"].values()) == {0}
