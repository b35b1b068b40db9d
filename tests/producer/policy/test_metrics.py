"""The meter shows who pays for freshness: by task, length and age, in numbers and in words."""

import math
from collections import deque
from typing import Any

import numpy as np
import pytest
from fixtures.rollouts import make_group, make_header, make_rollout, make_sample
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.policy.metrics import KEPT_TASKS, OTHER, BiasMeter, _p95, effective_sample_size
from rollfleet.policy.policies import Mask
from rollfleet.records import Group
from rollfleet_common.messages import Rollout

P = "rollfleet/bias/"


class Clock:
    """Unix time that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def group(
    *versions: list[int],
    task: str = "math",
    rewards: tuple[float, ...] = (),
    entry: str = "1000000-0",
    n: int | None = None,
    **changes: Any,
) -> Group:
    rollouts: list[Rollout] = []
    for index, row in enumerate(versions):
        sample = make_sample(row, reward=rewards[index] if rewards else 1.0)
        header = make_header([sample], index=index, n=len(versions), task=task, **changes)
        rollouts.append(Rollout(header, (sample,)))
    return make_group(*rollouts, n=n, task=task, entry=entry)


def numbers(meter: BiasMeter) -> dict[str, float]:
    return {key.removeprefix(P): value for key, value in meter.as_dict().items()}


def test_staleness_is_per_sample_and_weighted_by_trained_tokens() -> None:
    meter = BiasMeter()
    meter.kept(group([3] * 9, [5]), 5)  # 9 tokens 2 behind, 1 token fresh
    found = numbers(meter)
    assert found["staleness/sample_mean"] == 1
    assert found["staleness/token_mean"] == pytest.approx(9 * 2 / 10)
    assert found["staleness/max"] == 2


def test_a_masked_sample_counts_as_what_was_trained_on() -> None:
    meter, rollouts = BiasMeter(), [make_rollout([1, 4, 5])]
    refined = Mask(2).refine(rollouts, 5)
    assert not isinstance(refined, str)
    meter.kept(make_group(*rollouts), 5, [rollout.header for rollout in refined])
    assert numbers(meter)["staleness/max"] == 1


def test_drops_are_counted_by_reason_task_length_and_age() -> None:
    meter = BiasMeter()
    meter.dropped(group([1], [4], task="code", tokens=1500), "stale", 5)
    meter.dropped(group([1], task="code", tokens=1500), "stale", 5)
    meter.dropped(group([5], tokens=10), "rejected", 5)
    meter.dropped(group([0], tokens=256), "stale", 99)
    found = numbers(meter)
    assert found["dropped/stale/code/1024-2047/age_4"] == 2
    assert found["dropped/stale/code/1024-2047/age_1"] == 1
    assert found["dropped/rejected/math/0-255/age_0"] == 1
    assert found["dropped/stale/math/256-511/age_16"] == 1
    assert found["dropped/share"] == 1


def test_dropped_against_kept() -> None:
    meter = BiasMeter()
    meter.kept(group([5], [5], rewards=(0.0, 0.5), tokens=100), 5)
    meter.dropped(group([1], rewards=(1.0,), tokens=900), "stale", 5)
    found = numbers(meter)
    assert (found["kept/reward_mean"], found["dropped/reward_mean"]) == (0.25, 1.0)
    assert (found["kept/tokens_mean"], found["dropped/tokens_mean"]) == (100, 900)
    assert found["dropped/share"] == pytest.approx(1 / 3)
    assert found["task/math/dropped_share"] == pytest.approx(1 / 3)


def test_a_groups_wait_is_from_its_first_delivery() -> None:
    clock = Clock()
    meter = BiasMeter(clock=clock)
    clock.now_s = 1004.0
    meter.kept(group([5], entry="1000000-0", queue_ms=3000), 5)
    meter.kept(group([5], entry="2000000-0"), 5)  # dated by a clock ahead of ours
    meter.kept(group([5], entry="?"), 5)
    found = numbers(meter)
    assert found["kept/waited_s_mean"] == pytest.approx(4 / 3)
    assert found["kept/queue_s_mean"] == 1


def test_effective_samples_are_those_that_carry_a_signal() -> None:
    meter = BiasMeter()
    meter.kept(group([5], [5], rewards=(0.0, 1.0)), 5)
    meter.kept(group([5], [5], rewards=(1.0, 1.0)), 5)
    found = numbers(meter)
    assert found["effective/samples"] == pytest.approx(2)
    assert found["effective/share"] == pytest.approx(0.5)
    assert found["effective/informative_share"] == 0.5


@given(st.lists(st.floats(0, 1e300), max_size=30))
def test_kish_is_between_one_and_all(weights: list[float]) -> None:
    size = effective_sample_size(weights)
    if not any(weights):
        assert size == 0
    else:
        assert 1 - 1e-9 <= size <= len(weights) + 1e-9


def test_kish_by_hand() -> None:
    assert effective_sample_size([2, 2, 2]) == pytest.approx(3)
    assert effective_sample_size([1, 0, 0]) == pytest.approx(1)
    assert effective_sample_size([3, 1]) == pytest.approx(16 / 10)


# ---- words ---------------------------------------------------------------------------------------


def test_a_task_that_outlasts_the_bound_is_told_in_words() -> None:
    clock = Clock()
    meter = BiasMeter(clock=clock)
    for version in range(10):  # a version every 10 s
        meter.kept(group([version], [version], task="short", generate_ms=5000), version)
        meter.dropped(
            group([version], task="proofs", generate_ms=40_000, reward_ms=2000), "stale", version
        )
        clock.now_s += 10
    assert meter.version_ms == 10_000
    [sentence] = meter.warnings(2)
    assert sentence == (
        "task proofs: p95 duration 4.2 versions, bound 2: use mask or segment-wise, or raise "
        "max_staleness"
    )
    assert meter.warnings(5) == []
    found = numbers(meter)
    assert found["version_s"] == 10
    assert found["task/proofs/duration_versions_p95"] == pytest.approx(4.2)
    assert found["task/short/starved_versions"] == 0
    assert found["task/proofs/starved_versions"] == 9


def test_nothing_is_said_of_durations_before_the_pace_is_known() -> None:
    meter = BiasMeter(clock=Clock())
    for _ in range(20):
        meter.kept(group([1], generate_ms=10**9), 1)
    assert meter.version_ms is None
    assert meter.durations("math") == []
    assert meter.warnings(0) == []


def test_a_starved_task_is_told_in_words_even_if_workers_gave_all_of_it_up() -> None:
    meter = BiasMeter(clock=Clock())
    meter.kept(group([1], task="proofs"), 1)
    for version in range(2, 12):
        # Refused at delivery: these never came, so there is no header to go by.
        meter.dropped(group(n=4, task="proofs"), "dead", version)
    assert meter.warnings(2) == [
        "task proofs: starved for 10 versions: its last 40 samples were all given up (40 stale)"
    ]
    assert numbers(meter)["lost/stale/proofs"] == 40
    meter.kept(group([11], task="proofs"), 11)
    assert meter.warnings(2) == []


def test_a_bias_by_length_is_told_in_words() -> None:
    meter = BiasMeter(clock=Clock())
    for _ in range(8):
        meter.kept(group([5], tokens=100), 5)
        meter.dropped(group([1], tokens=400), "stale", 5)
    [sentence] = meter.warnings(2)
    assert sentence.startswith("task math: samples dropped as stale have 400 tokens, kept ones 100")
    assert "biased towards short answers" in sentence


# ---- bounds --------------------------------------------------------------------------------------


def test_an_empty_meter_has_nothing_to_say() -> None:
    assert BiasMeter().as_dict() == {}
    assert BiasMeter().warnings(2) == []


def test_keys_and_memory_are_bounded() -> None:
    clock = Clock()
    meter = BiasMeter(window=64, clock=clock)
    for i in range(400):
        clock.now_s += 1
        meter.kept(group([i], task=f"t{i}"), i)
        meter.dropped(group([i], task=f"t{i}"), "stale", i)
    found = numbers(meter)
    assert found["kept/samples"] + found["dropped/samples"] == 64
    assert len({key.split("/")[1] for key in found if key.startswith("task/")}) == 21
    assert found["dropped/stale/other/0-255/age_0"] == 380
    assert meter.version_ms == 1000


def test_a_clock_that_goes_back_stops_only_what_needs_it() -> None:
    clock = Clock()
    meter = BiasMeter(clock=clock)
    meter.kept(group([1]), 1)
    clock.now_s -= 500
    meter.kept(group([2]), 2)
    assert meter.version_ms is None
    assert numbers(meter)["kept/waited_s_mean"] >= 0


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(["a", "b"]),
            st.lists(st.integers(0, 9), max_size=3),
            st.integers(0, 12),
            st.floats(-1e6, 1e6),
        ),
        max_size=20,
    )
)
def test_numbers_are_finite_and_samples_are_counted_once(events: list[Any]) -> None:
    meter, samples = BiasMeter(clock=Clock()), 0
    for keep, task, versions, version, reward in events:
        made = group(*[[v] for v in versions], task=task, rewards=(reward,) * len(versions), n=3)
        if keep:
            meter.kept(made, version)
        else:
            meter.dropped(made, "stale", version)
        samples += len(versions)
    found = numbers(meter)
    assert all(math.isfinite(value) for value in found.values())
    assert found.get("kept/samples", 0) + found.get("dropped/samples", 0) == samples
    counted = sum(v for key, v in found.items() if "/age_" in key)
    assert counted == found.get("dropped/samples", 0)
    assert sum(v for key, v in found.items() if key.startswith("lost/")) == (
        3 * len(events) - samples
    )
    meter.warnings(2)


def test_a_snapshot_is_not_changed_by_what_comes_after() -> None:
    meter = BiasMeter()
    meter.kept(group([1], [1]), 1)
    before = meter.as_dict()
    twin = meter.snapshot()
    meter.dropped(group([1], [1]), "stale", 5)
    assert twin.as_dict() == before != meter.as_dict()


# ---- what is asked of it in the trainer's loop ---------------------------------------------------


class Counted(deque):  # type: ignore[type-arg]
    """Counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()


def test_a_look_for_warnings_costs_the_same_whatever_the_labels() -> None:
    meter = BiasMeter(window=256, clock=Clock())
    for i in range(2000):
        meter.dropped(group([1], task=f"t{i}", n=2), "stale", 5)
    for kept in (meter._met, meter._in_a_row, {task for _, task, *_ in meter.drops}):
        assert len(kept) <= KEPT_TASKS + 1
    assert {task for _, task in meter.lost} == {f"t{i}" for i in range(KEPT_TASKS)} | {OTHER}
    meter._fates = fates = Counted(meter._fates)
    [sentence] = meter.warnings(2)
    assert sentence.startswith("task other: starved for")
    assert fates.walks == 1


def test_what_a_resumed_trainer_finds_ready_says_nothing_of_the_pace() -> None:
    clock = Clock()
    meter = BiasMeter(clock=clock)
    for version in range(20):  # consumed at once: all of it was there before
        meter.kept(group([version], entry="999000-0", generate_ms=5000), version)
        clock.now_s += 0.01
    assert meter.version_ms is None
    assert meter.warnings(2) == []
    for version in range(20, 40):
        entry = f"{int(clock.now_s * 1000)}-0"
        meter.kept(group([version], entry=entry, generate_ms=5000), version)
        assert (meter.version_ms is None) == (version < 27)
        clock.now_s += 5
    assert meter.version_ms == pytest.approx(5000)
    assert meter.warnings(2) == []


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_a_percentile_is_numpys(values: list[int]) -> None:
    assert _p95(list(values)) == pytest.approx(float(np.quantile(values, 0.95)))
