"""The simulator: by hand where it can be, by law where it cannot, and by what was published."""

import json
import random
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from rollfleet.consume.reader import RolloutReader
from rollfleet.policy.policies import DropStale
from rollfleet.records import Group, Member
from rollfleet_common.errors import SettingsError, StarvedError
from rollfleet_common.messages import Kind, Tombstone
from rollfleet_console.cli import app
from rollfleet_console.simulate.charts import draw, need_matplotlib
from rollfleet_console.simulate.clock import Clock
from rollfleet_console.simulate.lengths import Lognormal, Recorded
from rollfleet_console.simulate.result import Meter
from rollfleet_console.simulate.run import compare, lengths_of, simulate
from rollfleet_console.simulate.scenario import REFERENCE, Scenario
from rollfleet_console.simulate.shelf import Shelf
from rollfleet_console.simulate.sweep import ETAS, sweep
from rollfleet_console.simulate.trainer import SimulatedTrainer
from rollfleet_console.simulate.workers import Place

#: Every rollout takes 10 s; nothing fails; an update takes no time.
EVEN = Scenario(
    slots=16,
    samples_per_version=32,
    group_size=4,
    max_staleness=0,
    median_s=10.0,
    sigma=0.0,
    train_s=5.0,
    update_s=0.0,
    failure_rate=0.0,
    versions=20,
)
SMALL = Scenario(slots=24, samples_per_version=32, group_size=4, versions=25)
TINY = Scenario(samples_per_version=16, group_size=2, versions=3, warm_up=2)


# ---- by hand -------------------------------------------------------------------------------------


def test_synchronous_training_is_what_is_computed_by_hand() -> None:
    result = simulate(replace(EVEN, update_s=1.0))
    period_s = 2 * 10 + 5 + 1  # 32 samples on 16 slots are two waves; then train, then update
    assert result.steps_per_h == pytest.approx(3600 / period_s)
    assert result.samples_per_h == pytest.approx(32 * 3600 / period_s)
    assert result.slots_generating == pytest.approx(20 / period_s)
    assert result.trainer_idle == pytest.approx(20 / period_s)
    assert result.tokens_per_s == pytest.approx(32 * 10 * EVEN.tokens_per_s / period_s)
    assert result.staleness_shares == {0: 1.0}
    assert (result.dropped, result.dead, result.trained, result.length_bias) == (0, 0, 1, 1)


def test_two_versions_ahead_keep_every_slot_busy() -> None:
    result = simulate(replace(EVEN, max_staleness=2))
    assert result.slots_busy == pytest.approx(1)
    assert result.slots_generating == pytest.approx(1)
    assert result.slots_useful == pytest.approx(1)
    assert result.steps_per_h == pytest.approx(3600 / 20)  # two waves, and training beside them
    assert result.trainer_idle == pytest.approx(1 - 5 / 20)


def test_a_pause_holds_slots_that_do_not_generate() -> None:
    paused = simulate(replace(EVEN, max_staleness=2, update_s=2.0, pause=True))
    assert paused.slots_busy == pytest.approx(1)
    assert paused.slots_generating == pytest.approx(20 / 22)
    assert simulate(
        replace(EVEN, max_staleness=2, update_s=2.0, pause=False)
    ).slots_generating == pytest.approx(1)


@pytest.mark.parametrize("eta", [1, 2, 3])
def test_where_the_trainer_is_the_bottleneck_all_ages_to_the_bound(eta: int) -> None:
    result = simulate(replace(EVEN, max_staleness=eta, slots=1000, train_s=50.0))
    assert result.steps_per_h == pytest.approx(3600 / 50)
    assert result.trainer_idle == pytest.approx(0)
    assert result.staleness_shares == {eta: 1.0}


def test_tokens_are_of_the_versions_in_force_while_they_were_made() -> None:
    # 16 slots, 2 waves a version of 20 s, handed over the moment the second wave ends; the first
    # version after the start is trained on from 0 to 5 s of the wave that is running.
    result = simulate(replace(EVEN, max_staleness=2))
    oldest = result.staleness_mean
    assert oldest == pytest.approx(0.5)  # the first wave began 5 s before the publish
    assert result.staleness_of_tokens == pytest.approx(0.25)  # half of whose tokens came after it


# ---- by law --------------------------------------------------------------------------------------


class Auditor(Meter):
    """Checks the books at every event that it is told of."""

    def audit(self) -> None:
        assert self.trainer is not None
        books = self.trainer.take_stock()
        assert min(asdict(books)[k] for k in ("waiting", "delayed", "in_flight", "handed_out")) >= 0
        limit = (self.scenario.depth + 1) * self.scenario.samples_per_version
        assert books.outstanding <= limit
        assert books.in_flight <= self.scenario.slots

    def published(self, version: int) -> None:
        super().published(version)
        self.audit()
        assert self.trainer is not None
        books = self.trainer.take_stock()
        assert books.balance == 0
        # Every credit returned exactly once: what holds credit is what is somewhere.
        held = books.waiting + books.delayed + books.in_flight + books.handed_out
        assert books.outstanding == held


def audited(scenario: Scenario) -> SimulatedTrainer:
    clock = Clock()
    meter = Auditor(clock, scenario)
    meter.trainer = SimulatedTrainer(clock, scenario, lengths_of(scenario), meter)
    meter.trainer.start()
    clock.run()
    assert clock.stopped
    return meter.trainer


def any_scenario(seed: int) -> Scenario:
    r = random.Random(seed)
    eta = r.choice([0, 1, 2, 5])
    return replace(
        SMALL,
        seed=seed,
        max_staleness=eta,
        pipeline_depth=(depth := r.randint(0, eta)),
        # Torn groups, and those that gave a surplus back, leave credit for less than a group: at
        # depth 0 that could be all there is.
        min_group_size=r.choice([None, 1, 3]) if depth else None,
        oversample=r.choice([0, 0, 2]) if depth else 0,
        slots=r.choice([3, 16, 100]),
        sigma=r.choice([0.3, 1.0, 2.0]),
        group_correlation=r.choice([0.0, 0.5, 1.0]),
        failure_rate=r.choice([0.0, 0.05, 0.4]),
        attempts=r.choice([1, 3]),
        early_cancel=r.random() < 0.7,
        pause=r.random() < 0.5,
        update_s=r.choice([0.0, 3.0]),
        train_s=r.choice([0.0, 5.0, 60.0]),
        max_tokens=r.choice([None, 2000]),
    )


@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_lost_and_nothing_over_the_bound_is_trained_on(seed: int) -> None:
    scenario = any_scenario(seed)
    audited(scenario)
    result = simulate(scenario)
    assert result.over_bound == 0
    assert result.staleness_max <= scenario.max_staleness
    assert result.slots_useful <= result.slots_generating <= result.slots_busy <= 1 + 1e-9
    ends = result.trained + result.dropped + result.dead
    assert ends == pytest.approx(1)
    assert sum(result.dropped_by.values()) == pytest.approx(result.dropped)


def test_a_seed_decides_a_run() -> None:
    assert simulate(SMALL) == simulate(SMALL)
    assert simulate(SMALL) != simulate(replace(SMALL, seed=1))


def test_one_seed_is_one_data_set_in_every_scenario() -> None:
    firsts = []
    for eta in (0, 2):
        scenario = replace(SMALL, max_staleness=eta)
        groups = lengths_of(scenario).groups(scenario.group_size, scenario.seed)
        firsts.append([next(groups) for _ in range(5)])
    assert firsts[0] == firsts[1]


def test_early_cancel_saves_tokens() -> None:
    hard = replace(SMALL, max_staleness=1, sigma=1.5, versions=80)
    without = simulate(replace(hard, early_cancel=False))
    cancelled = simulate(hard)
    assert "cancel" not in without.dropped_by
    assert cancelled.tokens_dropped < without.tokens_dropped
    assert cancelled.samples_per_h > without.samples_per_h


def test_the_first_of_a_group_are_taken_and_the_surplus_is_cancelled() -> None:
    plain = simulate(replace(SMALL, failure_rate=0.0))
    spared = simulate(replace(SMALL, failure_rate=0.0, oversample=2))
    assert spared.dropped_by["surplus"] > 0.2  # of 6 launched, 2 are not needed
    assert spared.length_bias < plain.length_bias
    assert spared.over_bound == 0


def test_a_cancelled_sample_frees_its_slot_and_counts_the_tokens_it_made() -> None:
    clock = Clock()
    scenario = replace(EVEN, update_s=2.0)
    meter = Meter(clock, scenario)
    trainer = meter.trainer = SimulatedTrainer(clock, scenario, lengths_of(scenario), meter)
    made: list[float] = []
    workers = trainer.workers

    def cancel(_: object) -> None:
        made.append(workers.cancel(next(iter(workers.running))))

    trainer.start()
    clock.at(4.0, cancel)
    clock.at(5.0, lambda _: workers.pause(2.0))
    clock.at(6.0, cancel)
    clock.at(7.0, lambda _: workers.resume())
    clock.at(8.0, cancel)
    clock.at(8.0, lambda _: clock.stop())
    clock.run()
    assert made == pytest.approx([4 * 50, 5 * 50, 6 * 50])
    assert len(workers.running) == 16 - 1  # the first was replaced at the resume; two were not
    assert all(work.place is Place.RUNNING for work in workers.running)


def test_a_fleet_whose_samples_all_die_is_said_to_starve() -> None:
    with pytest.raises(StarvedError, match="no batch of 32 samples within 900 simulated seconds"):
        simulate(replace(SMALL, failure_rate=0.99, attempts=1, starve_s=900.0))


def test_a_fleet_in_which_nothing_can_happen_says_where_its_samples_are() -> None:
    # Torn groups are accepted, so 31 samples may be ready, and there is no room for a group of 4.
    stuck = replace(SMALL, seed=3, max_staleness=0, min_group_size=1, failure_rate=0.4, attempts=1)
    with pytest.raises(StarvedError, match=r"room for [123] more and groups are of 4"):
        simulate(replace(stuck, early_cancel=False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": 0}, "slots is 0; it must be above 0"),
        ({"train_s": -1.0}, "train_s is -1.0; it must be at least 0"),
        ({"group_correlation": 2.0}, "it is from 0 to 1"),
        ({"failure_rate": 1.0}, "it is from 0 to below 1"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"oversample": -1}, "oversample is -1; it must be at least 0"),
        ({"min_group_size": 5}, "it is from 1 to group_size = 4"),
        ({"pipeline_depth": 3}, "is more than max_staleness = 2"),
        ({"group_size": 5}, "is no multiple of group_size = 5"),
    ],
)
def test_what_can_not_be_simulated_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        simulate(replace(SMALL, **change))


# ---- held to the fleet's own code, and to what was published -------------------------------------


def group(name: str, n: int, *versions: int, torn: str = "") -> Group:
    g = Group(name, n, Kind.TRAIN, "default", 0, seq=int(name))
    for i, version in enumerate(versions):
        header: Any = SimpleNamespace(min_version=version, max_version=version)
        g.members[i] = Member("", header, version, version)
    if torn:
        t = Tombstone(name, n - 1, n, Kind.TRAIN, "default", torn, "")
        g.tombstones[n - 1] = ("", t)
    return g


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_chosen_as_the_consumer_chooses_them(seed: int) -> None:
    r = random.Random(seed)
    consumer: Any = object.__new__(RolloutReader)
    shelf = Shelf(DropStale(5))
    shelf.ready = {
        str(i): group(str(i), 2, r.randint(0, 4), r.randint(0, 4)) for i in r.sample(range(50), 30)
    }
    consumer.ready, consumer.reserved, consumer.replay = shelf.ready, set(), {}
    consumer.policy, consumer.version = shelf.policy, lambda: 5
    for want in (0, 1, 10, 25, 1000):
        assert shelf.choose(want, 5) == RolloutReader.choose(consumer, want)


def test_groups_are_judged_as_the_consumer_judges_them() -> None:
    shelf = Shelf(DropStale(2))
    assert shelf.judge(group("1", 2, 3, 4), 5) is None
    assert shelf.judge(group("2", 2, 2, 4), 5) == "stale"
    assert shelf.judge(group("3", 2, 4, torn="dead"), 5) == "torn"
    assert shelf.judge(group("4", 2, 4, torn="stale"), 5) == "stale"
    assert shelf.judge(group("5", 2, torn="dead"), 5) == "dead"
    assert shelf.judge(group("6", 2, 6, 6), 5) is None  # the future may come
    assert [*shelf.ready] == ["1", "6"]
    fresh, dropped = shelf.sweep(shelf.choose(10, 6), 6)
    assert [g.name for g in fresh] == ["6"]
    assert [(g.name, why) for g, why in dropped] == [("1", "stale")]
    assert [*shelf.ready] == ["6"]


@pytest.mark.parametrize(("eta", "sigma", "over"), [(2, 0.5, 0.213), (2, 1.0, 0.226)])
def test_admission_alone_goes_over_the_bound_as_an_independent_simulation_found(
    eta: int, sigma: float, over: float
) -> None:
    result = simulate(
        replace(
            REFERENCE,
            slots=512,
            samples_per_version=64,
            group_size=1,
            max_staleness=eta,
            sigma=sigma,
            update_s=0.0,
            failure_rate=0.0,
            pacing_only=True,
            versions=150,
            warm_up=10,
        )
    )
    assert result.over_bound == pytest.approx(over, abs=0.025)
    assert result.dropped == 0


def test_the_reference_meets_its_goals() -> None:
    comparison = compare(replace(REFERENCE, versions=10, warm_up=5))
    assert comparison.result.slots_generating >= 0.97
    assert comparison.speedup >= 2
    assert comparison.result.over_bound == 0


# ---- lengths -------------------------------------------------------------------------------------


def test_lognormal_lengths_have_their_median_and_their_budget() -> None:
    groups = Lognormal(30.0, 1.0, 50.0, max_tokens=4000).groups(4, seed=3)
    rows = [one for _ in range(2000) for one in next(groups)]
    durations = sorted(d for d, _ in rows)
    assert durations[len(durations) // 2] == pytest.approx(30, rel=0.05)
    assert durations[-1] == 80
    assert all(tokens == pytest.approx(50 * d) for d, tokens in rows)


def test_samples_of_a_group_may_be_alike() -> None:
    groups = Lognormal(30.0, 1.0, 50.0, correlation=1.0).groups(4, seed=3)
    assert all(len({round(d, 6) for d, _ in next(groups)}) == 1 for _ in range(20))


def test_recorded_lengths_are_drawn_by_group(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    rows: deque[dict[str, Any]] = deque()
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        rows += [{"group": name, "duration_s": seconds, "tokens": 7} for _ in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    drawn = [next(Recorded(path, 50.0).groups(4, seed=seed)) for seed in range(20)]
    assert {tuple({d for d, _ in g}) for g in drawn} == {(1.0,), (2.0,)}
    assert {tokens for g in drawn for _, tokens in g} == {7.0}
    path.write_text('{"duration_s": 3}\n')
    assert next(Recorded(path, 50.0).groups(2, seed=0)) == [(3.0, 150.0)] * 2
    assert simulate(SMALL, Recorded(path, 50.0)).trained_length == 150


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no lengths"),
        ('{"duration_s": 1}\nnonsense', 'line 2: want {"duration_s": seconds}'),
        ("[1, 2]", "line 1: want"),
        ('{"duration_s": 0}', "line 1: duration_s must be above 0"),
        ('{"duration_s": NaN}', "line 1: duration_s must be above 0"),
    ],
)
def test_a_bad_recording_is_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(text)
    with pytest.raises(SettingsError, match=said):
        Recorded(path, 50.0)
    with pytest.raises(SettingsError, match="the lengths cannot be read"):
        Recorded(tmp_path / "none", 50.0)


# ---- the command ---------------------------------------------------------------------------------

FAST = ["--samples-per-version", "32", "--slots", "16", "--versions", "5"]


def rollfleet(*args: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *args], env={"COLUMNS": "80"})


def test_the_command_prints_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "to" / "report.json"
    done = rollfleet(*FAST, "--max-staleness", "1", "--json", "--report", str(path))
    assert done.exit_code == 0, done.output
    tree = json.loads(done.stdout)
    assert tree == json.loads(path.read_text())
    assert tree["scenario"]["pipeline_depth"] == 1
    assert tree["scenario"]["slots"] == 16
    assert tree["result"]["over_bound"] == 0
    assert tree["speedup"] == pytest.approx(
        tree["result"]["samples_per_h"] / tree["synchronous"]["samples_per_h"]
    )


def test_the_command_tells_people(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"duration_s": 3}\n{"duration_s": 30}\n')
    done = rollfleet(*FAST, "--lengths", str(path))
    assert done.exit_code == 0, done.output
    for words in ("trained samples per hour", "over the bound of 2: 0.00%", "longest tenth"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--pipeline-depth", "9"], "pipeline_depth = 9 is more than max_staleness = 2"),
        (["--sweep"], "--sweep needs --out"),
        (["--sweep", "--out", "x", "--lengths", "y"], "does not go with --lengths"),
    ],
)
def test_the_command_refuses_in_one_line(args: list[str], said: str) -> None:
    done = rollfleet(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith("rollfleet: ")
    assert said in done.stderr


def test_the_sweep_fills_the_table_and_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seen: list[tuple[int, int]] = []
    swept = sweep(TINY, lambda done, of: seen.append((done, of)))
    assert len(swept["table"]) == len(ETAS) * 3 * 2 * 4
    assert seen[0] == (0, seen[-1][1])
    assert seen[-1] == (seen[-1][1], seen[-1][1])
    assert swept["goals"][0]["met"]
    assert json.loads(json.dumps(swept))["reference"]["samples_per_version"] == 16
    pictures = draw(swept, tmp_path / "img")
    assert [p.name for p in pictures] == [
        "simulate-throughput.png",
        "simulate-shape.png",
        "simulate-cost.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_the_sweep_says_when_a_run_starves(tmp_path: Path) -> None:
    swept = sweep(replace(TINY, failure_rate=0.99, attempts=1, starve_s=200.0))
    assert all("no batch of 16" in row["starved"] for row in swept["table"])
    assert [goal["met"] for goal in swept["goals"]] == [False, False]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match=r'pip install "rollfleet\[demo\]"'):
        need_matplotlib()
