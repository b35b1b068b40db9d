"""A plan places every unit exactly once, within the budget, evenly, and the same every time."""

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
from fixtures.rollouts import make_header, make_sample
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rollfleet.tensors.balance import DIFFERENCING_LIMIT, Cost, partition
from rollfleet.tensors.packing import MicroPlan, StepTotals, plan_headers, plan_micro

#: The machine may be busy.
timeless = hypothesis_settings(deadline=None)

# ---- any lengths, any settings ----------------------------------------------------------------

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)
settings = st.fixed_dictionaries(
    {
        "ranks": st.integers(1, 9),
        "budget_tokens": st.integers(64, 400),
        "whole_groups": st.booleans(),
        "cost": st.sampled_from([Cost(), Cost.attention(4), Cost(0.0, 1.0)]),
        "over": st.sampled_from(["alone", "truncate"]),
        "form": st.sampled_from(["packed", "padded"]),
        "pad_multiple": st.sampled_from([1, 8, 64]),
        "at_least": st.integers(1, 4),
    }
)


def placed(plan: MicroPlan) -> list[int]:
    return sorted(unit for rank in plan.ranks for micro in rank for unit in micro)


@timeless
@given(lengths, settings, st.integers(1, 8), st.booleans())
def test_nothing_is_lost_and_nothing_is_there_twice(
    of: list[int], said: dict[str, Any], group: int, even: bool
) -> None:
    groups = [i // group for i in range(len(of))]
    atoms = len(set(groups)) if said["whole_groups"] else len(of)
    even = even and atoms >= said["ranks"]
    plan = plan_micro(of, groups, **said, even=even)
    assert sorted(placed(plan) + list(plan.carry)) == list(range(len(of)))
    if even:
        left = atoms % said["ranks"]
        assert len({groups[i] for i in plan.carry}) == left or not said["whole_groups"]
        assert bool(plan.carry) == bool(left)
    else:
        assert not plan.carry


@timeless
@given(lengths, settings)
def test_every_rank_has_as_many_micro_batches_and_none_is_over_the_budget(
    of: list[int], said: dict[str, Any]
) -> None:
    plan = plan_micro(of, [0] * len(of), **{**said, "whole_groups": False})
    assert len(plan.ranks) == said["ranks"]
    assert {len(rank) for rank in plan.ranks} == {plan.micro_batches}
    assert plan.micro_batches >= said["at_least"]
    multiple = said["pad_multiple"]
    for micro in itertools.chain(*plan.ranks):
        kept = [plan.cut.get(i, of[i]) for i in micro]
        if said["form"] == "packed":
            size = -(-sum(kept) // multiple) * multiple
        else:
            size = len(micro) * -(-max(kept, default=0) // multiple) * multiple
        alone = len(micro) == 1 and micro[0] in plan.alone
        assert (size > said["budget_tokens"]) == alone
    for rank, costs in zip(plan.ranks, plan.costs, strict=True):
        filled = [bool(micro) for micro in rank]
        assert filled == sorted(filled, reverse=True), "fillers come last"
        assert list(costs) == sorted(costs, reverse=True)


@timeless
@given(lengths, settings, st.integers(1, 8))
def test_whole_groups_stay_on_one_rank(of: list[int], said: dict[str, Any], size: int) -> None:
    groups = [f"g{i % size}" for i in range(len(of))]
    plan = plan_micro(of, groups, **{**said, "whole_groups": True})
    homes: dict[str, set[int]] = {}
    for rank in range(said["ranks"]):
        for unit in plan.share(rank):
            homes.setdefault(groups[unit], set()).add(rank)
    assert all(len(home) == 1 for home in homes.values())


@timeless
@given(lengths, settings)
def test_the_same_input_gives_the_same_plan(of: list[int], said: dict[str, Any]) -> None:
    groups = [i // 3 for i in range(len(of))]
    assert plan_micro(of, groups, **said) == plan_micro(list(of), list(groups), **said)


def test_the_plan_is_the_same_in_another_process() -> None:
    of = [(7 * i * i) % 501 + 1 for i in range(64)]
    groups = [f"g{i // 8}" for i in range(64)]
    program = (
        "import sys; from rollfleet.tensors.packing import plan_micro\n"
        f"print(plan_micro({of}, {groups}, ranks=3, budget_tokens=900, whole_groups=True).ranks)\n"
        "assert 'torch' not in sys.modules"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = plan_micro(of, groups, ranks=3, budget_tokens=900, whole_groups=True)
    assert said.stdout == f"{here.ranks}\n"


# ---- how good it is ---------------------------------------------------------------------------


def test_first_fit_decreasing_packs_what_fits() -> None:
    plan = plan_micro([6, 4, 7, 3, 5, 5], budget_tokens=10)
    assert plan.micro_batches == 3
    assert plan.costs == ((10.0, 10.0, 10.0),)


def test_ranks_are_alike_in_cost() -> None:
    of = [100 + (37 * i) % 900 for i in range(256)]
    for cost in (Cost(), Cost.attention(64)):
        plan = plan_micro(of, ranks=8, budget_tokens=4096, cost=cost)
        assert plan.imbalance < 1.01
        assert plan.micro_batches == math.ceil(sum(of) / 8 / 4096)


def test_padded_micro_batches_hold_rows_of_like_length() -> None:
    plan = plan_micro([100, 10, 100, 10, 10, 10], budget_tokens=200, form="padded")
    assert sorted(plan.ranks[0]) == [(0, 2), (1, 3, 4, 5)]


def test_differencing_is_better_where_there_are_few() -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    sums = sorted(sum(costs[i] for i in part) for part in partition(costs, 2))
    # Longest first makes 17 and 13 of it, differencing 16 and 14.
    assert sums == [14.0, 16.0]


@timeless
@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 12), st.booleans())
def test_a_partition_is_one(costs: list[float], parts: int, even: bool) -> None:
    found = partition(costs, parts, even=even)
    assert len(found) == parts
    assert sorted(itertools.chain(*found)) == list(range(len(costs)))
    if even:
        sizes = [len(part) for part in found]
        assert max(sizes) - min(sizes) <= 1


def test_a_great_many_are_divided_without_differencing() -> None:
    found = partition([1.0] * (DIFFERENCING_LIMIT + 4), 4)
    assert {len(part) for part in found} == {DIFFERENCING_LIMIT // 4 + 1}


# ---- longer than the budget -------------------------------------------------------------------


def test_a_long_one_is_alone_unless_told_otherwise() -> None:
    plan = plan_micro([5, 30, 4], budget_tokens=10)
    assert plan.ranks == (((1,), (0, 2)),)
    assert plan.alone == (1,)
    assert not plan.cut


def test_a_long_one_may_be_cut_or_refused() -> None:
    plan = plan_micro([5, 30, 4], budget_tokens=11, over="truncate", pad_multiple=4)
    assert plan.cut == {1: 8}
    assert plan.alone == ()
    with pytest.raises(ValueError, match=r"1 of 3 .* 10 tokens, number 1 with 30"):
        plan_micro([5, 30, 4], budget_tokens=10, over="refuse")


def test_all_of_them_too_long_on_unequal_ranks() -> None:
    plan = plan_micro([30, 31, 32], ranks=2, budget_tokens=10)
    assert plan.micro_batches == 2
    assert plan.fillers == 1
    assert plan.alone == (0, 1, 2)


def test_fewer_units_than_ranks_leave_fillers() -> None:
    plan = plan_micro([3, 4], ranks=4, budget_tokens=10)
    assert plan.fillers == 2
    assert placed(plan) == [0, 1]


def test_what_does_not_divide_evenly_is_carried_and_said() -> None:
    plan = plan_micro([1] * 10, ranks=4, budget_tokens=10, even=True)
    assert [len(plan.share(rank)) for rank in range(4)] == [2, 2, 2, 2]
    assert plan.carry == (8, 9)


# ---- from headers -----------------------------------------------------------------------------


def test_headers_are_enough_and_a_fork_stays_whole() -> None:
    headers = [
        make_header([make_sample([1] * n) for n in forks], group=f"g{i // 2}", index=i % 2)
        for i, forks in enumerate([[30], [10, 10, 10], [5], [6]])
    ]
    plan = plan_headers(headers, ranks=2, budget_tokens=40)
    assert placed(plan) == [0, 1, 2, 3]
    assert {plan.share(0), plan.share(1)} == {(0, 1), (2, 3)}
    spread = plan_headers(headers, ranks=2, budget_tokens=40, whole_groups=False)
    assert spread.imbalance < plan.imbalance
    # Three rows of twelve tokens are 36, though none of them is over the budget: alone, not cut.
    small = plan_headers(headers, ranks=1, budget_tokens=20, over="truncate")
    assert small.cut == {0: 20}
    assert small.alone == (1,)


# ---- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "said", "says"),
    [
        ([], {}, "nothing to plan"),
        ([3, 0], {}, "a sequence of 0 tokens"),
        ([3], {"ranks": 0}, "ranks 0"),
        ([3], {"budget_tokens": 0}, "budget_tokens 0"),
        ([3], {"pad_multiple": 128}, "at least pad_multiple"),
        ([3], {"whole_groups": True}, "needs the group"),
        ([3], {"groups": [1, 2]}, "2 groups for 1 lengths"),
        ([3], {"sequences": [1, 2]}, "2 sequences for 1 lengths"),
        ([3], {"even": True, "ranks": 2}, "1 cannot be spread evenly over 2 ranks"),
    ],
)
def test_what_cannot_be_planned_is_said(of: list[int], said: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_micro(of, **{"budget_tokens": 64, **said})


@pytest.mark.parametrize(("token", "square"), [(-1.0, 1.0), (0.0, 0.0), (1.0, -1.0), (math.nan, 0)])
def test_costs_are_not_negative(token: float, square: float) -> None:
    with pytest.raises(ValueError, match="must not be"):
        Cost(token, square)


def test_totals_add_up() -> None:
    ranks = [StepTotals(10, 2, 1, 3), StepTotals(5, 1, 1, 4)]
    assert sum(ranks, StepTotals()) == StepTotals(15, 3, 2, 4)
