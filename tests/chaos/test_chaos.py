"""A short storm on a whole fleet, and two rows of the fault matrix, as part of the suite."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chaos import driver, faults, table
from chaos.oracle import as_json
from chaos.rows import Result, Row, play

pytestmark = pytest.mark.slow


def test_a_storm_of_twenty_seconds_breaks_no_promise(tmp_path: Path) -> None:
    out = tmp_path / "storm.json"
    report = driver.run(seconds=20, seed=20, workers=3, out=out)
    assert report["ok"], [v for v in report["verdicts"] if v["ok"] is False]
    assert report["ended"]
    assert sum(report["injected"].values()) >= 10
    assert (report["lost"], report["duplicated"], report["stale"], report["torn"]) == (0, 0, 0, 0)
    assert out.exists()


@pytest.mark.parametrize("name", ["worker killed, mid-rollout", "trainer superseded"])
def test_a_row_of_the_matrix(name: str) -> None:
    result = play(faults.ROWS[name])
    assert result.result == "pass", result.why


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    row = Row("a fault", "what was done", lambda _: None)
    played = [Result(row, "pass", recovery_s=1.25), Result(row, "fail", why="a | b")]
    table.write(page, [result.as_json() for result in played])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| a fault | what was done |  | pass | 1.2 s |" in text
    assert "fail (a / b)" in text
    assert as_json([]) == []
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        table.write(page, [])
