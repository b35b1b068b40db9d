from dataclasses import replace

import pytest
from fixtures.rig import delivery_of, prompt_of
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.records import Group, Member
from rollfleet.state.groups import Groups
from rollfleet_common.messages import Claim, Kind, Tombstone


def member(group: str, index: int, n: int = 3, *, version: int = 0, entry: str = "") -> Member:
    claim = Claim(prompt_of(group, n), index, 1, f"{index + 1}-0", 0, 0)
    header = delivery_of(claim, version=version).header
    return Member(entry or f"{group}-{index}", header, version, version)


def stone(group: str, index: int, n: int = 3, reason: str = "dead") -> Tombstone:
    return Tombstone(group, index, n, Kind.TRAIN, "default", reason, "it died")


def test_a_group_closes_when_its_last_sample_comes():
    groups = Groups()
    assert groups.arrive(4, member("g", 1, version=7)) == (None, False)
    assert groups.arrive(4, member("g", 0, version=5)) == (None, False)
    assert groups.open["g"].closed is False
    closed, twice = groups.arrive(4, member("g", 2, version=6))
    assert not twice
    assert closed is not None
    assert (closed.name, closed.n, closed.partition, closed.kind) == ("g", 3, 4, Kind.TRAIN)
    assert (closed.whole, closed.oldest, closed.newest, closed.reasons) == (True, 5, 7, [])
    assert groups.open == {}


def test_a_tombstone_counts_as_an_arrival():
    groups = Groups()
    groups.arrive(0, member("g", 0))
    assert groups.add_tombstone(0, "t-1", stone("g", 1, reason="stale")) is None
    closed = groups.add_tombstone(0, "t-2", stone("g", 2, reason="cancelled"))
    assert closed is not None
    assert (closed.closed, closed.whole, len(closed.members)) == (True, False, 1)
    assert closed.reasons == ["stale", "cancelled"]
    assert closed.tombstones[1][0] == "t-1"


def test_a_group_of_tombstones_alone_closes():
    groups = Groups()
    for index in range(2):
        assert groups.add_tombstone(0, f"t-{index}", stone("g", index)) is None
    closed = groups.add_tombstone(0, "t-2", stone("g", 2))
    assert closed is not None
    assert closed.members == {}


def test_the_same_index_twice_is_a_duplicate_and_the_first_stays():
    groups = Groups()
    groups.arrive(0, member("g", 0, entry="first"))
    assert groups.arrive(0, member("g", 0, entry="second")) == (None, True)
    assert groups.open["g"].members[0].entry == "first"


@pytest.mark.parametrize("index", [-1, 3, 99])
def test_an_index_outside_of_its_group_is_refused_and_opens_nothing(index: int):
    groups = Groups()
    assert groups.arrive(0, member("g", index)) == (None, True)
    assert groups.add_tombstone(0, "t", stone("h", index)) is None
    assert groups.open == {}
    groups.arrive(0, member("g", 0))
    assert groups.arrive(0, member("g", index)) == (None, True)
    groups.add_tombstone(0, "t", stone("g", index))
    groups.arrive(0, member("g", 1))
    closed, _ = groups.arrive(0, member("g", 2))
    assert closed is not None
    assert closed.whole


def test_a_sample_after_its_tombstone_is_a_sample_and_the_tombstone_is_kept_to_be_settled():
    groups = Groups()
    groups.add_tombstone(0, "t-0", stone("g", 0, 2))
    assert groups.arrive(0, member("g", 0, 2)) == (None, False)
    closed, _ = groups.arrive(0, member("g", 1, 2))
    assert closed is not None
    assert closed.whole
    assert closed.reasons == []


def test_a_tombstone_after_its_sample_takes_nothing_away():
    groups = Groups()
    groups.arrive(0, member("g", 0, 2))
    assert groups.add_tombstone(0, "t-0", stone("g", 0, 2)) is None
    closed, _ = groups.arrive(0, member("g", 1, 2))
    assert closed is not None
    assert sorted(closed.members) == [0, 1]


def test_groups_are_numbered_in_the_order_in_which_they_began():
    groups = Groups()
    for name in ("b", "a", "c"):
        groups.arrive(0, member(name, 0, 2))
    closed = [groups.arrive(0, member(name, 1, 2))[0] for name in ("c", "a", "b")]
    assert [group.seq for group in closed if group] == [3, 2, 1]


def test_kinds_are_kept():
    groups = Groups()
    one = member("e", 0, 1)
    header = replace(one.header, kind=Kind.EVAL, task="math")
    closed, _ = groups.arrive(0, replace(one, header=header))
    assert closed is not None
    assert (closed.kind, closed.task) == (Kind.EVAL, "math")


@given(st.data())
def test_every_group_closes_exactly_once_whatever_the_order(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    events = [(f"g{g}", index, n) for g, n in enumerate(sizes) for index in range(n)]
    lost = data.draw(st.sets(st.sampled_from(events)))
    repeated = data.draw(st.lists(st.sampled_from(events), max_size=4))
    order = data.draw(st.permutations(events))
    groups, closed = Groups(), dict[str, Group]()
    for event in order:
        name, index, n = event
        group = (
            groups.add_tombstone(0, f"t-{name}-{index}", stone(name, index, n))
            if event in lost
            else groups.arrive(0, member(name, index, n))[0]
        )
        if group is not None:
            assert name not in closed
            closed[name] = group
        for again in repeated:
            if again[0] in groups.open and again not in lost:
                known = again[1] in groups.open[again[0]].members
                if known:
                    assert groups.arrive(0, member(*again)) == (None, True)
    assert groups.open == {}
    assert sorted(closed) == [f"g{g}" for g in range(len(sizes))]
    for name, group in closed.items():
        gone = {index for g, index, _ in lost if g == name}
        assert set(group.tombstones) == gone
        assert set(group.members) == set(range(group.n)) - gone
