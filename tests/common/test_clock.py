"""Redis's clock as a process keeps it."""

import time

import pytest
from fixtures.rig import Rig
from hypothesis import given
from hypothesis import strategies as st

from rollfleet_common.clock import DRIFT, MEASURE_S, Clock

trips = st.lists(
    st.tuples(
        st.floats(0.0, 0.5),  # seconds on the way there
        st.floats(0.0, 0.5),  # and back
        st.floats(0.001, 60.0),  # until the next question
    ),
    min_size=1,
    max_size=20,
)


class Host:
    """A monotonic and a wall clock that a test sets."""

    def __init__(self, patch: pytest.MonkeyPatch, wall_ahead_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.wall_ahead_s = wall_ahead_s
        patch.setattr(time, "monotonic", lambda: self.now_s)
        patch.setattr(time, "time", lambda: 1.8e9 + self.now_s + self.wall_ahead_s)

    def redis_ms(self, set_by_ms: float = 0.0) -> float:
        return (1.8e9 + self.now_s) * 1000 + set_by_ms

    def trip(self, clock: Clock, there_s: float, back_s: float, set_by_ms: float = 0.0) -> None:
        asked_s = self.now_s
        self.now_s += there_s
        said = self.redis_ms(set_by_ms)
        self.now_s += back_s
        clock.heard(asked_s, self.now_s, said)


@given(trips, st.floats(-1e5, 1e5))
def test_it_is_never_further_off_than_it_says(
    trips: list[tuple[float, float, float]], wall_ahead_s: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        host, clock = Host(patch, wall_ahead_s), Clock()
        for there_s, back_s, pause_s in trips:
            host.trip(clock, there_s, back_s)
            host.now_s += pause_s
            assert abs(clock.now_ms() - host.redis_ms()) <= clock.error_ms + 0.01
            assert clock.error_ms <= 500.0 + MEASURE_S * 60 * 1000 * DRIFT + 20 * 60_000 * DRIFT
            assert clock.from_wall_ms(time.time() * 1000) == pytest.approx(clock.now_ms(), abs=0.01)


@given(st.floats(-1e7, 1e7), st.floats(-1e7, 1e7))
def test_a_jump_of_either_clock(redis_by_ms: float, wall_by_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        host, clock = Host(patch), Clock()
        host.trip(clock, 0.001, 0.001)
        before_ms = clock.now_ms()
        host.wall_ahead_s += wall_by_s
        assert clock.now_ms() == before_ms
        host.trip(clock, 0.01, 0.01, redis_by_ms)
        # A jump that is smaller than a round trip cannot be told from one.
        assert abs(clock.now_ms() - host.redis_ms(redis_by_ms)) <= clock.error_ms + 20.1


def test_the_better_measurement_wins_until_it_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    host, clock = Host(monkeypatch), Clock()
    assert clock.due
    assert clock.now_ms() == host.redis_ms()  # the wall clock, until Redis was asked
    host.trip(clock, 0.001, 0.001)
    assert not clock.due
    good_ms = clock.error_ms
    host.trip(clock, 0.4, 0.0)
    assert clock.error_ms == pytest.approx(good_ms, abs=0.5)
    clock.doubt()
    assert clock.due
    host.trip(clock, 0.4, 0.0)
    assert clock.error_ms == pytest.approx(200.0)
    host.now_s += MEASURE_S + 1
    assert clock.due


async def test_it_is_measured_with_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() - 7200)
    clock = Clock()
    await clock.measure(rig.client)
    seconds, micros = await rig.client.time()
    said_ms = int(seconds) * 1000 + int(micros) / 1000
    later_ms = clock.now_ms()
    await clock.measure(rig.client)
    # Redis answered before `later`, and not long before, as its own clock says.
    seconds, micros = await rig.client.time()
    end_ms = int(seconds) * 1000 + int(micros) / 1000
    assert said_ms - clock.error_ms - 50 <= later_ms <= end_ms + clock.error_ms + 50
