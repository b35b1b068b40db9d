from hypothesis import given
from hypothesis import strategies as st

from rollfleet.state.capacity import Pacer


def test_room_is_what_the_ledger_leaves():
    pacer = Pacer(2, 8)
    assert (pacer.room, pacer.limit) == (24, 24)
    pacer.outstanding = 20
    assert (pacer.room, pacer.limit) == (4, 24)
    pacer.outstanding = 30  # an earlier trainer had a deeper pipeline
    assert pacer.room == -6


def test_the_credit_of_training_is_held_until_the_next_version():
    pacer = Pacer(1, 8)
    pacer.outstanding = 16
    pacer.settled(8, hold=True)
    assert (pacer.outstanding, pacer.held, pacer.room, pacer.limit) == (8, 8, 0, 8)
    pacer.release()
    assert (pacer.room, pacer.limit) == (8, 16)


def test_the_credit_of_what_was_dropped_is_free_at_once():
    pacer = Pacer(1, 8)
    pacer.outstanding = 16
    pacer.settled(4)
    assert (pacer.room, pacer.held) == (4, 0)


def test_several_batches_of_one_version_hold_no_more_than_the_version():
    pacer = Pacer(1, 8)
    pacer.outstanding = 16
    for _ in range(4):
        pacer.settled(4, hold=True)
    assert (pacer.outstanding, pacer.held, pacer.limit) == (0, 8, 8)


def test_more_credit_than_was_known_is_no_debt():
    pacer = Pacer(0, 8)
    pacer.settled(5)
    assert (pacer.outstanding, pacer.room) == (0, 8)


@given(
    depth=st.integers(0, 4),
    size=st.integers(1, 32),
    events=st.lists(st.sampled_from(["fill", "train", "drop", "publish"]), max_size=60),
)
def test_no_history_lets_more_out_than_the_pipeline_holds(depth: int, size: int, events: list[str]):
    pacer = Pacer(depth, size)
    for event in events:
        if event == "fill" and pacer.room > 0:
            pacer.outstanding += pacer.room
        elif event == "train" and pacer.outstanding >= size:
            pacer.settled(size, hold=True)
        elif event == "drop":
            pacer.settled(min(3, pacer.outstanding))
        elif event == "publish":
            pacer.release()
        assert 0 <= pacer.outstanding <= pacer.limit + pacer.held == (depth + 1) * size
        assert 0 <= pacer.held <= size
    # No credit is lost: once published, all that is not out is free.
    pacer.release()
    assert pacer.room + pacer.outstanding == (depth + 1) * size


@given(depth=st.integers(0, 4), size=st.integers(1, 16))
def test_nothing_is_submitted_that_must_be_too_old(depth: int, size: int):
    """With rollouts of one version each, trained oldest first, none is over `depth` behind."""
    pacer = Pacer(depth, size)
    queue: list[int] = []
    for version in range(12):
        queue += [version] * max(pacer.room, 0)
        pacer.outstanding = len(queue)
        batch = queue[:size]
        del queue[:size]
        assert len(batch) == size
        assert version - min(batch) <= depth
        pacer.settled(size, hold=True)
        assert pacer.room <= 0
        pacer.release()
