import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import wait_until

from rollfleet import Books
from rollfleet_common.errors import SettingsError
from rollfleet_common.logs import get_logger
from rollfleet_demo import job
from rollfleet_demo.audit import Audit, GeneratedSample, Trained, audit, read_made, read_trained
from rollfleet_demo.processes import SLOTS
from rollfleet_demo.report import DemoOutcome, Kill, draw, make_report, problems, write
from rollfleet_demo.screen import Screen, chart
from rollfleet_demo.task import encode
from rollfleet_demo.trainer import Step, feed

PROMPT = tuple(encode("83920174="))
RIGHT = tuple(encode("01234789|"))
WRONG = tuple(encode("01234798|"))
LENGTH = len(RIGHT)


def made(version: int, completion: tuple[int, ...] = RIGHT) -> GeneratedSample:
    return GeneratedSample(PROMPT, completion, (version,) * LENGTH)


def row(index: int, label: int, version: int, completion: tuple[int, ...] = RIGHT) -> Trained:
    return Trained(
        step=version + 1,
        version=version,
        group="p0",
        index=index,
        prompt=PROMPT,
        completion=completion,
        versions=(label,) * LENGTH,
        reward=float(completion == RIGHT),
    )


# ---- the audit -----------------------------------------------------------------------------------


def test_audit_of_a_clean_run_finds_nothing() -> None:
    trained = [row(0, 3, 5), row(1, 4, 5), row(2, 4, 5, WRONG), row(3, 4, 5)]
    lines = [made(4), made(4), made(3), made(4, WRONG)]
    found = audit(trained, lines)
    assert (found.rows, found.tokens_made) == (4, 36)
    assert found.duplicates == found.fabricated == found.mislabelled_tokens == 0
    assert found.wrong_rewards == found.ambiguous == 0
    assert found.max_staleness == found.worst_staleness == 2
    assert found.staleness == {2: 1, 1: 3}
    assert found.by_step == {6: {2: 1, 1: 3}}


def test_audit_catches_the_same_sample_twice() -> None:
    # Made twice, delivered twice, trained twice: lines enough for both.
    found = audit([row(0, 4, 5), row(0, 4, 6)], [made(4), made(4)])
    assert found.duplicates == 1
    assert found.max_staleness == 2


def test_audit_catches_one_completion_trained_under_two_names() -> None:
    found = audit([row(0, 4, 5), row(1, 4, 5)], [made(4)])
    assert (found.duplicates, found.fabricated, found.mislabelled_tokens) == (1, 0, 0)


def test_audit_counts_a_repeated_row_once() -> None:
    assert audit([row(0, 4, 5), row(0, 4, 6)], [made(4)]).duplicates == 1


def test_audit_catches_what_the_server_never_made() -> None:
    found = audit([row(0, 4, 5, WRONG)], [made(4)])
    assert (found.fabricated, found.duplicates) == (1, 0)
    other = replace(row(1, 4, 5), prompt=tuple(encode("83920147=")))
    assert audit([other], [made(4)]).fabricated == 1


def test_audit_believes_the_weights_and_not_the_label() -> None:
    # The fleet says version 4, so one behind; the weights that made it are four behind.
    found = audit([row(0, 4, 5)], [made(1)])
    assert found.max_staleness == 4
    assert found.mislabelled_tokens == LENGTH


def test_audit_counts_mislabelled_tokens_one_by_one_and_ages_by_the_oldest() -> None:
    line = GeneratedSample(PROMPT, RIGHT, (2, 2) + (4,) * (LENGTH - 2))
    found = audit([row(0, 4, 5)], [line])
    assert (found.mislabelled_tokens, found.mixed) == (2, 1)
    assert found.max_staleness == 3
    right = replace(row(0, 4, 5), versions=line.truth)
    assert audit([right], [line]).mislabelled_tokens == 0


def test_a_wrong_label_cannot_take_the_line_of_a_right_one() -> None:
    found = audit([row(0, 4, 5), row(1, 4, 5)], [made(4), made(3)])
    assert found.mislabelled_tokens == LENGTH
    assert found.staleness == {1: 1, 2: 1}


def test_audit_says_what_a_line_too_many_could_mean() -> None:
    # A worker died with the first completion in its hands; the second was delivered.
    found = audit([row(0, 9, 9)], [made(4), made(9)])
    assert (found.max_staleness, found.worst_staleness, found.ambiguous) == (0, 5, 1)
    assert found.mislabelled_tokens == 0
    # One that is too new to have been meant makes nothing worse.
    found = audit([row(0, 4, 5)], [made(4), made(9)])
    assert (found.max_staleness, found.worst_staleness, found.ambiguous) == (1, 1, 0)


def test_audit_checks_rewards_by_the_task() -> None:
    assert audit([replace(row(0, 4, 5), reward=0.0)], [made(4)]).wrong_rewards == 1


def test_audit_of_nothing() -> None:
    assert audit([], []) == Audit()


# ---- the report ----------------------------------------------------------------------------------

KEYS = {
    *("reward_first", "reward_last", "steps", "submitted", "committed", "dropped", "dead"),
    *("waiting", "in_flight", "ready", "delayed", "handed_out", "trained", "duplicates_trained"),
    *("max_staleness_trained", "staleness_bound", "tokens", "seconds", "workers", "raw"),
}


def step(number: int, reward: float) -> Step:
    return Step(
        number=number,
        version=number - 1,
        reward=reward,
        samples=256,
        tokens=2300,
        rows=100,
        loss=0.1,
        staleness={1: 200, 2: 56},
        at_s=number * 0.5,
        wait_s=0.1,
        train_s=0.3,
        publish_s=0.1,
    )


@pytest.fixture
def outcome() -> DemoOutcome:
    books = Books(submitted=7680, committed=5120, handed_out=256, in_flight=2000, waiting=300)
    books.dropped = {"stale": 4}
    return DemoOutcome(
        seed=3,
        workers=2,
        staleness_bound=2,
        policy="drop",
        bounded=True,
        steps=[step(number, number / 20) for number in range(1, 21)],
        books=books,
        audit=audit([row(0, 3, 5)], [made(3)]),
        kills=[Kill(4, "worker-1", "worker-3", 120)],
        exit_codes={"worker-1": -9, "worker-2": 0, "worker-3": 0},
        redis="valkey 9.1.2",
        seconds_total=20.0,
        wanted_steps=20,
    )


def test_report_says_what_books_and_audit_say(outcome: DemoOutcome) -> None:
    report = make_report(outcome)
    assert report.keys() > KEYS
    assert report["reward_first"] == pytest.approx(0.15)
    assert report["reward_last"] == pytest.approx(0.9)
    assert (report["submitted"], report["in_flight"], report["dropped"]) == (
        7680,
        2000,
        {"stale": 4},
    )
    assert (report["max_staleness_trained"], report["duplicates_trained"]) == (2, 0)
    assert report["curve"][5] == {
        "step": 6,
        "version": 5,
        "reward": 0.3,
        "staleness": {"2": 1},
        "seconds": 3.0,
    }
    # The mean of steps 10 to 19 is 14.5 / 20.
    assert report["to_target"] == {
        "reward": 0.7,
        "step": 19,
        "seconds": 9.5,
        "samples": 19 * 256,
    }
    assert problems(report) == []
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"committed": 5119}, "the books do not balance: 7680 submitted, 7679 placed"),
        ({"duplicates_trained": 2}, "2 rows were trained on twice"),
        ({"fabricated_trained": 1}, "1 rows were trained on that the server never made"),
        ({"mislabelled_tokens": 9}, "9 tokens bear a version that did not make them"),
        ({"wrong_rewards": 1}, "1 rewards are not what the task gives"),
        ({"max_staleness_trained": 3}, "trained on a sample 3 versions old, over the bound of 2"),
        ({"steps": 19}, "19 steps of 20 were made"),
        ({"worker_exit_codes": {"worker-2": 1}}, "workers did not end well: {'worker-2': 1}"),
        ({"reward_last": 0.15, "reward_first": 0.15}, "the reward has not risen: 0.150 in"),
    ],
)
def test_report_names_what_is_wrong(
    outcome: DemoOutcome, change: dict[str, Any], said: str
) -> None:
    (problem,) = problems(make_report(outcome) | change)
    assert problem.startswith(said)


def test_report_and_picture_are_written(outcome: DemoOutcome, tmp_path: Path) -> None:
    report = make_report(outcome)
    write(report, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]
    draw(report, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


# ---- the screen ----------------------------------------------------------------------------------


def test_chart_fills_from_the_left_and_keeps_the_floor() -> None:
    assert chart([0.0, 0.5, 1.0], 4, rows=2, columns=4) == ["  █", "▁██"]
    assert chart([1.0, 0.0, 0.5, 0.5], 4, rows=1, columns=2) == ["▄▄"]
    assert chart([], 4, rows=1) == [""]


def test_screen_without_a_terminal_is_plain_lines(outcome: DemoOutcome) -> None:
    out = io.StringIO()
    with Screen(20, Console(file=out, width=80)) as screen:
        screen.say("starting")
        for each in outcome.steps:
            screen.step(each, lambda: outcome.books)
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting"
    assert len(lines) == 3
    assert lines[2] == (
        "step   20/20    10.0 s  reward 0.525  version 20  512 samples/s  4,600 tokens/s"
        "  staleness 1:78% 2:22%  dropped 4 stale"
    )
    assert "\x1b" not in out.getvalue()


def test_screen_on_a_terminal_shows_it_all(outcome: DemoOutcome) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, color_system=None)
    with Screen(20, console) as screen:
        screen.say("starting")
        for each in outcome.steps:
            screen.step(each, lambda: outcome.books)
    last = out.getvalue().rpartition("rollfleet demo")[2]
    for said in ("20 of 20", "0.525", "version 20", "512 samples/s", "1 ████", "78%", "4 stale"):
        assert said in last, said
    assert "7,680 submitted = 5,120 committed + 4 dropped + 256 handed out" in last
    screen.summary(make_report(outcome), ["something"], [Path("r.json")])
    assert "wrong: something" in out.getvalue()
    assert "worker-1 after step 4, with 120 prompts in its hands" in out.getvalue()


# ---- the job -------------------------------------------------------------------------------------


def test_feed_brings_no_prompt_twice_and_ends_when_told() -> None:
    stopped = threading.Event()
    items = feed(0, stopped)
    some = [tuple(item["token_ids"]) for item in islice(items, 500)]
    assert len(set(some)) == 500
    stopped.set()
    assert next(items, None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 5, "kill_worker_at": 6}, "kill_worker_at is 6; the steps are 1 to 5"),
        ({"max_staleness": -1}, r"max_staleness \(-1\) at least 0"),
        ({"workers": 0}, r"workers \(0\) must be at least 1"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        job.main(given)


def demo(out: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "rollfleet_console", "demo", "--out", str(out), *args]


@pytest.mark.slow
def test_a_short_run_with_a_killed_worker_balances(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    args = ("--steps", "6", "--kill-worker-at", "3", "--report", str(path), "--keep")
    # A setting of the user's, which must not reach the demo.
    env = os.environ | {"ROLLFLEET_MAX_STALENESS": "7", "ROLLFLEET_SLOTS": "1"}
    done = subprocess.run(
        demo(tmp_path, *args), capture_output=True, text=True, timeout=100, check=False, env=env
    )
    assert path.exists(), done.stdout + done.stderr
    report = json.loads(path.read_text())
    places = ("waiting", "delayed", "in_flight", "ready", "handed_out", "trained", "committed")
    placed = sum(report[name] for name in places) + sum(report["dropped"].values())
    assert report["submitted"] == placed + report["dead"]
    assert (report["steps"], report["committed"]) == (6, 6 * 256)
    # The run may end before the leases of the killed worker do; the others have drained.
    assert report["in_flight"] <= SLOTS
    assert report["samples_trained"] == 6 * 256
    assert report["duplicates_trained"] == report["fabricated_trained"] == 0
    assert report["mislabelled_tokens"] == report["wrong_rewards"] == 0
    assert 0 <= report["max_staleness_trained"] <= report["staleness_bound"] == 2
    (kill,) = report["kills"]
    assert (kill["step"], kill["started"]) == (3, "worker-3")
    assert kill["leases"] > 0
    codes = {"worker-1": 0, "worker-2": 0, "worker-3": 0} | {kill["killed"]: -9}
    assert report["worker_exit_codes"] == codes
    assert report["raw"]["counters"]["submitted:train"] == report["submitted"]
    # Six steps are too few to be sure that the reward rises; all else must be right.
    wrong = problems(report)
    assert all(problem.startswith("the reward has not risen") for problem in wrong)
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "learning.png").exists()
    _tampered_logs_are_caught(next(tmp_path.glob("run-*")))


def _tampered_logs_are_caught(folder: Path) -> None:
    trained = list(read_trained(folder / "trained.jsonl"))
    lines = list(read_made(folder / "server-1.tokens.jsonl"))
    assert len(lines) >= len(trained)
    old = [replace(line, truth=tuple(v - 3 for v in line.truth)) for line in lines]
    found = audit(trained, old)
    assert found.max_staleness > 2
    assert found.mislabelled_tokens == sum(len(one.completion) for one in trained)
    assert audit([*trained, trained[0]], lines).duplicates == 1
    gone = [line for line in lines if line.prompt != trained[0].prompt]
    assert audit(trained, gone).fabricated >= 1


def children(pid: int) -> set[int]:
    """All processes below `pid`."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    with (
        log.open("w") as out,
        subprocess.Popen(
            demo(tmp_path / "demo", "--steps", "1000"), stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        wait_until(
            lambda: process.poll() is not None or "step    1/1000" in log.read_text(),
            "the first step",
            90,
        )
        assert process.poll() is None, log.read_text()
        below = children(process.pid)
        # Redis, the inference server, two workers.
        assert len(below) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in log.read_text()
    assert not {pid for pid in below if Path(f"/proc/{pid}").exists()}
    assert not list((tmp_path / "demo").iterdir())


def test_what_the_job_changes_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLFLEET_RUN", "mine")
    logger = logging.getLogger("rollfleet")
    before = logger.handlers[:], logger.level, signal.getsignal(signal.SIGTERM)
    with job._alone(tmp_path):
        assert "ROLLFLEET_RUN" not in os.environ
        assert signal.getsignal(signal.SIGTERM) is not before[2]
        get_logger("rollfleet.test").info("a line")
    assert os.environ["ROLLFLEET_RUN"] == "mine"
    assert (logger.handlers, logger.level, signal.getsignal(signal.SIGTERM)) == before
    assert "a line" in (tmp_path / "trainer.log").read_text()
