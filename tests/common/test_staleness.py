from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollfleet_common.errors import SettingsError
from rollfleet_common.messages import NO_VERSION
from rollfleet_common.staleness import capacity, check_shape, min_useful, replayed, staleness

versions = st.integers(0, 1000)
bounds = st.integers(0, 20)


@given(versions, versions, bounds)
def test_what_is_useful_is_what_is_within_the_bound(current: int, version: int, bound: int):
    assert (version >= min_useful(current, bound)) == (staleness(current, version) <= bound)


@given(versions, bounds)
def test_what_is_useful_never_gets_older(current: int, bound: int):
    assert min_useful(current, bound) <= min_useful(current + 1, bound) <= current + 1
    assert min_useful(current, bound) >= 0


def test_the_future_is_negative():
    assert staleness(3, 5) == -2
    assert staleness(3, 3) == 0


# ---- capacity ------------------------------------------------------------------------------------


@given(
    eta=st.integers(0, 8),
    batch=st.integers(1, 64),
    steps=st.lists(st.tuples(st.integers(0, 64), st.booleans()), max_size=40),
)
def test_capacity_is_areals_while_every_version_eats_one_batch(
    eta: int, batch: int, steps: list[tuple[int, bool]]
):
    submitted = trained = version = 0
    for wish, train in steps:
        ours = capacity(eta, batch, submitted - trained)
        theirs = (eta + version + 1) * batch - submitted  # accepted + running: never subtracted
        assert ours == theirs
        submitted += max(min(wish, ours), 0)
        if train and submitted - trained >= batch:
            trained += batch
            version += 1


@given(st.integers(0, 8), st.integers(1, 64), st.lists(st.integers(1, 64), max_size=30))
def test_capacity_is_right_after_drops_where_areals_leaks(eta: int, batch: int, drops: list[int]):
    """Whatever is dropped or dies returns its credit, so the pipeline can always be filled anew."""
    submitted = settled = 0
    for drop in drops:
        submitted += capacity(eta, batch, submitted - settled)
        assert submitted - settled == (eta + 1) * batch
        settled += min(drop, submitted - settled)
        assert capacity(eta, batch, submitted - settled) == min(drop, (eta + 1) * batch)


# ---- rollbacks -----------------------------------------------------------------------------------

histories = st.lists(st.tuples(st.integers(1, 9), versions), max_size=5).map(sorted)


@given(versions, st.integers(0, 9), histories)
def test_a_rollback_never_makes_anything_fresher(
    version: int, epoch: int, rollbacks: list[tuple[int, int]]
):
    at = [began_at for began, began_at in rollbacks if began > epoch]
    counted = replayed(version, epoch, rollbacks)
    assert counted <= version
    # Never above the version that any later trainer resumed at.
    assert all(counted <= each for each in at)
    if all(version <= each for each in at):
        assert counted == version
    else:
        assert min(at) - counted == version - min(at)


@given(st.integers(0, 9), histories)
def test_no_version_stays_no_version(epoch: int, rollbacks: list[tuple[int, int]]):
    assert replayed(NO_VERSION, epoch, rollbacks) == NO_VERSION


@pytest.mark.parametrize(
    ("version", "epoch", "counts_as"),
    [(9, 1, -1), (7, 1, 1), (4, 1, 4), (6, 2, 2), (9, 3, 9), (0, 1, 0)],
)
def test_the_deepest_rollback_since_counts(version: int, epoch: int, counts_as: int):
    # Epoch 1 reached 9; the second began at 6, the third at 4.
    assert replayed(version, epoch, [(1, 0), (2, 6), (3, 4)]) == counts_as


@given(st.data())
def test_the_oldest_of_a_span_is_at_one_of_its_ends(data: st.DataObject):
    """So a header needs no more than its oldest and newest version."""
    low = data.draw(st.integers(0, 30))
    high = data.draw(st.integers(low, 40))
    rollbacks = data.draw(histories)
    inner = [replayed(v, 0, rollbacks) for v in range(low, high + 1)]
    assert min(inner) == min(inner[0], inner[-1])


# ---- the shape of a run --------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "samples_per_version": 64,
    "batch_size": 32,
    "group_size": 8,
    "max_staleness": 2,
    "pipeline_depth": 2,
}


def test_a_good_shape_passes():
    check_shape(**GOOD)
    check_shape(**{**GOOD, "max_staleness": 0, "pipeline_depth": 0})
    check_shape(**{**GOOD, "batch_size": 192})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_version": 0}, "samples_per_version is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"group_size": -1}, "group_size is -1; it must be at least 1"),
        ({"max_staleness": -1}, "max_staleness is -1; it must be at least 0"),
        ({"pipeline_depth": -1}, "pipeline_depth is -1; it must be at least 0"),
        ({"batch_size": 30}, r"batch_size = 30 .* group_size = 8.*\(30 = 3 x 8 \+ 6\)"),
        ({"batch_size": 200}, r"\(2 \+ 1\) x 64 = 192 samples"),
        ({"group_size": 128, "batch_size": 256}, r"\(2 \+ 1\) x 64 = 192"),
        (
            {"batch_size": 192, "oversample": 2},
            r"with 184 of its 192 .* 8 \+ 2 = 10 more.*\(2 \+ 1\) x 64 = 192 .* to 65",
        ),
        ({"batch_size": 192, "torn": True}, r"with 191 of its 192 .* 8 \+ 0 = 8 more"),
        (
            {"max_staleness": 0},
            r"pipeline_depth = 2 .* max_staleness = 0: \(2 \+ 1\) x 64 = 192 .* <= 0",
        ),
    ],
)
def test_a_shape_that_must_wait_for_itself_is_refused_with_the_arithmetic(
    change: dict[str, Any], message: str
):
    with pytest.raises(SettingsError, match=message):
        check_shape(**{**GOOD, **change})


@given(
    spv=st.integers(1, 24),
    batch=st.integers(1, 48),
    group=st.integers(1, 12),
    depth=st.integers(0, 4),
)
def test_a_shape_that_passes_always_fills_a_batch(spv: int, batch: int, group: int, depth: int):
    """Progress, with the credit of a version held back until it is published."""
    try:
        check_shape(
            samples_per_version=spv,
            batch_size=batch,
            group_size=group,
            max_staleness=depth,
            pipeline_depth=depth,
        )
    except SettingsError:
        return
    outstanding = 0
    for _ in range(20):
        while capacity(depth, spv, outstanding) >= group:
            outstanding += group
        assert outstanding >= batch, "the trainer would wait for ever"
        outstanding -= batch
