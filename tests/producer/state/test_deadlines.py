"""Deadlines are found by looking at those that are due, however many prompts are out."""

from dataclasses import replace
from typing import Any

from fixtures.rig import prompt_of
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.state.deadlines import KEEP, Deadlines
from rollfleet_common.messages import Prompt


class Looked(dict[str, Prompt]):
    """Counts who was looked up, and refuses to be walked."""

    looks = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.looks += 1
        return super().get(key, default)

    def values(self) -> Any:
        raise AssertionError("all that is out was walked")


def test_a_look_asks_only_for_those_that_are_due() -> None:
    out = Looked()
    deadlines = Deadlines(out)
    base = prompt_of("p")
    for i in range(20_000):
        out[f"p{i}"] = replace(base, group=f"p{i}", deadline_ms=1000 + i if i % 2 else 0)
        deadlines.add([out[f"p{i}"]])
    assert deadlines.late(1006) == ["p1", "p3", "p5"]
    assert out.looks == 3
    del out["p3"]
    assert deadlines.late(1006) == ["p1", "p5"], "named again while they are out"
    assert deadlines.late(0) == []


def test_what_is_no_longer_out_is_forgotten() -> None:
    out: dict[str, Prompt] = {}
    deadlines = Deadlines(out)
    for i in range(5 * KEEP):
        deadlines.add([prompt_of(f"p{i}", deadline_ms=10**9)])
    assert len(deadlines._due) <= KEEP


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 10)), max_size=40))
def test_as_a_walk_over_all_would_find_them(events: list[tuple[int, int, int]]) -> None:
    out: dict[str, Prompt] = {}
    deadlines = Deadlines(out)
    for name, deadline_ms, now_ms in events:
        group = f"p{name}"
        if out.pop(group, None) is None:
            out[group] = prompt_of(group, deadline_ms=deadline_ms)
            deadlines.add([out[group]])
        late = {p.group for p in out.values() if 0 < p.deadline_ms < now_ms}
        assert set(deadlines.late(now_ms)) == late
