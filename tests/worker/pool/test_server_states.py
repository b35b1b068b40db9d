"""The state machine of a server, pair by pair, and what a trainer's row means for it."""

from dataclasses import replace

import pytest

from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_worker.pool.eligibility import UNGATED, eligibility_of
from rollfleet_worker.pool.server_states import MOVES, Event, ServerState, step

#: Written by hand from the drawing; "." stays where it is.
TABLE = """
            answered proven  failed  gave-up refit     current outdated drain    undrain  remove
starting    serving  .       .       dead    .         .       .        draining .        removed
serving     .        .       suspect .       refitting .       stale    draining .        removed
suspect     trial    .       .       dead    .         .       .        draining .        removed
trial       .        serving suspect .       refitting .       stale    draining .        removed
dead        trial    .       .       .       .         .       .        draining .        removed
refitting   .        .       .       .       .         serving stale    draining .        removed
stale       .        .       .       .       refitting trial   .        draining .        removed
draining    .        .       .       .       .         .       .        .        starting removed
removed     .        .       .       .       .         .       .        .        .        .
"""


def pairs():
    head, *rows = (line.split() for line in TABLE.strip().splitlines())
    for state, *ends in rows:
        for event, end in zip(head, ends, strict=True):
            yield state, event.replace("-", " "), state if end == "." else end


def test_the_table_speaks_of_every_pair():
    told = {(state, event) for state, event, _ in pairs()}
    assert told == {(state.value, event.value) for state in ServerState for event in Event}
    assert set(MOVES) == set(ServerState)


@pytest.mark.parametrize(("state", "event", "end"), list(pairs()))
def test_a_server_moves_as_it_is_drawn(state, event, end):
    assert step(ServerState(state), Event(event)) is ServerState(end)


# ---- rows --------------------------------------------------------------------------------------

URL = "http://s0:1"
BOARD = PolicyVersion(version=5, epoch=2)
SERVING = ServerWeights(URL, WeightState.SERVING, 5, epoch=2, at_ms=100)


def judged(row, *, gated=True, now_ms=1000, belied=None):
    return eligibility_of(
        row, gated=gated, policy=BOARD, now_ms=now_ms, belied=belied, belied_by="it says default"
    )


def test_where_nobody_refits_every_server_may_serve_and_no_version_is_known():
    assert judged(None, gated=False) == UNGATED
    assert UNGATED.serves == NO_VERSION
    assert not UNGATED.unrefitted


@pytest.mark.parametrize(
    ("row", "event", "serves", "why"),
    [
        (SERVING, Event.CURRENT, 5, ""),
        # It was refitted ahead of our reading of the board.
        (replace(SERVING, version=6), Event.CURRENT, 6, ""),
        (replace(SERVING, version=9, epoch=3), Event.CURRENT, 9, ""),
        (replace(SERVING, version=4, epoch=1), Event.CURRENT, 4, ""),
        (replace(SERVING, version=9, epoch=1), Event.OUTDATED, 9, "version 9 of an earlier epoch"),
        (replace(SERVING, state=WeightState.STALE, why="HTTP 500"), Event.OUTDATED, 5, "HTTP 500"),
        (
            replace(SERVING, state=WeightState.REFITTING, until_ms=1000),
            Event.REFIT,
            5,
            "being refitted",
        ),
        (
            replace(SERVING, state=WeightState.REFITTING, until_ms=999),
            Event.OUTDATED,
            5,
            "did not end in time",
        ),
        (None, Event.OUTDATED, NO_VERSION, "has not refitted it"),
    ],
)
def test_a_row_decides_whether_a_server_may_serve(row, event, serves, why):
    stand = judged(row)
    assert (stand.event, stand.serves) == (event, serves)
    assert why in stand.why
    assert bool(stand.why) is (event is not Event.CURRENT)
    assert stand.unrefitted is (row is None)
    assert stand.expired is ("in time" in why)


def test_a_row_that_proved_wrong_counts_no_more_and_the_next_one_does():
    assert judged(SERVING, belied=SERVING).event is Event.OUTDATED
    assert judged(SERVING, belied=SERVING).why == "it says default"
    assert judged(replace(SERVING, at_ms=99), belied=SERVING).event is Event.CURRENT
