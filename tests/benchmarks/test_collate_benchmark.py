"""The benchmark of collation runs and says what it promises to; how fast is not for a test to judge."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_way_is_measured_and_every_division() -> None:
    said = ["--json", "--tokens", "256", "--rows", "8", "--rounds", "1", "--draws", "1", "--ragged"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.collate", *said],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    report = json.loads(done.stdout)
    assert [(each["tokens"], each["ragged"]) for each in report["collate"]] == [
        (256, False),
        (256, True),
    ]
    for each in report["collate"]:
        ways = each["ways"]
        assert {"floor", "from bytes", "decoded", "floor (packed)", "msgpack lists"} <= set(ways)
        assert ways["floor"]["of_floor"] == ways["floor (packed)"]["of_floor"] == 1.0
        assert all(way["gb_per_s"] > 0 for way in ways.values())
    assert {row["ranks"] for row in report["balance"]} == {8, 64}
    for row in report["balance"]:
        assert 1.0 <= row["imbalance"] <= row["in_order"]
        assert row["micro_batches"] >= row["at_least"]
