"""Policies: what each lets through at which age, and that none is trusted to answer sanely."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fixtures.rollouts import make_group, make_header, make_rollout, make_sample
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.policy.checked import REASON, CheckedPolicy, policy_named
from rollfleet.policy.orders import FreshestFirst, OldestFirst, Order, Windowed
from rollfleet.policy.policies import (
    BasePolicy,
    DropStale,
    Mask,
    Policy,
    SegmentWise,
    StandardPPO,
    Wait,
    segment_stale,
)
from rollfleet.policy.version_history import VersionHistory
from rollfleet.records import Group
from rollfleet_common.errors import PolicyError, RollfleetError, SettingsError
from rollfleet_common.messages import NO_VERSION, Header, Kind, Rollout

NAMES = ("drop", "mask", "wait", "standard", "segment", "segment-recomputed")
#: The versions of a sample's trained tokens: they never go backwards.
spans = st.lists(st.integers(0, 12), min_size=1, max_size=8).map(sorted)
groups = st.lists(spans, min_size=1, max_size=5)


def of(*versions: Sequence[int], **changes: Any) -> Group:
    rollouts = [
        make_rollout(row, index=i, n=len(versions), **changes) for i, row in enumerate(versions)
    ]
    return make_group(*rollouts, n=changes.get("n"), kind=changes.get("kind", Kind.TRAIN))


def rollouts_of(*versions: Sequence[int]) -> list[Rollout]:
    return [make_rollout(row, index=i, n=len(versions)) for i, row in enumerate(versions)]


def trained_versions(rollout: Rollout) -> list[int]:
    return [
        int(version)
        for s in rollout.samples
        for version in s.versions.expand(len(s.token_ids))[s.loss_mask]
    ]


# ---- what every policy owes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_never_judged(name: str) -> None:
    policy = policy_named(name, 0).policy
    evaluation = make_group(make_rollout([0], kind=Kind.EVAL), n=4, kind=Kind.EVAL)
    assert policy.judge(evaluation, 99) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_torn_group_is_refused_unless_its_size_was_chosen(name: str) -> None:
    torn = make_group(make_rollout([5]), make_rollout([5]), n=4)
    assert policy_named(name, 2).judge(torn, 5) == "torn"
    assert policy_named(name, 2, 3).judge(torn, 5) == "torn"
    assert policy_named(name, 2, 2).judge(torn, 5) is None


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_group_is_torn_whatever_was_chosen(name: str) -> None:
    assert policy_named(name, 2, 1).judge(make_group(n=4), 5) == "torn"


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_group_passes_untouched(name: str) -> None:
    policy, rollouts = policy_named(name, 2), rollouts_of([5, 5], [4, 5])
    assert policy.judge(of([5, 5], [4, 5]), 5) is None
    assert all(a is b for a, b in zip(policy.refine(rollouts, 5), rollouts, strict=True))


@pytest.mark.parametrize("name", ["drop", "mask", "segment", "segment-recomputed"])
def test_a_version_that_no_one_told_is_never_waved_through(name: str) -> None:
    untold = make_group(replace_header(make_rollout([0]), min_version=-1))
    for current in (0, 1):
        assert policy_named(name, 5).judge(untold, current) == "unversioned"


@pytest.mark.parametrize("name", ["drop", "mask", "wait", "segment"])
def test_a_rollout_from_the_future_is_named(name: str) -> None:
    assert policy_named(name, 2).judge(of([5], [6]), 5) == "future"


def replace_header(rollout: Rollout, **changes: Any) -> Rollout:
    return Rollout(replace(rollout.header, **changes), rollout.samples)


@pytest.mark.parametrize("bad", [-1, -7])
def test_settings_that_cannot_be_are_refused(bad: int) -> None:
    for make in (DropStale, Mask, Wait, SegmentWise):
        with pytest.raises(SettingsError, match=f"max_staleness is {bad}"):
            make(bad)
    with pytest.raises(SettingsError, match="min_group_size"):
        StandardPPO(bad)
    with pytest.raises(SettingsError, match="window"):
        Windowed(bad)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(SettingsError, match="min_share"):
            Mask(2, min_share=share)


def test_policies_and_orders_are_found_by_name() -> None:
    assert isinstance(policy_named("mask", 3).policy, Mask)
    assert policy_named("drop", 3, order="freshest").order(of([4]), 5) == (-4, 1)
    assert policy_named("drop", 3, order="windowed").order(of([4]), 5) == (1, 1)
    with pytest.raises(SettingsError, match=r"'dorp'.*drop, mask, wait, standard, segment"):
        policy_named("dorp", 3)
    with pytest.raises(SettingsError, match=r"'youngest'.*oldest, freshest, windowed"):
        policy_named("drop", 3, order="youngest")
    with pytest.raises(SettingsError, match="could wait for ever"):
        policy_named("wait", 3, order="freshest")
    assert policy_named("wait", 3).waits


# ---- drop, standard, wait ------------------------------------------------------------------------


@given(groups, st.integers(0, 14), st.integers(0, 4))
def test_drop_keeps_exactly_what_is_within_the_bound(
    versions: list[list[int]], current: int, bound: int
) -> None:
    oldest, newest = min(map(min, versions)), max(map(max, versions))
    reason = DropStale(bound).judge(of(*versions), current)
    assert (reason == "stale") == (current - oldest > bound)
    if reason != "stale":
        assert reason == ("future" if newest > current else None)


@given(groups, st.integers(0, 40))
def test_standard_ppo_and_wait_never_drop_for_age(versions: list[list[int]], current: int) -> None:
    assert StandardPPO().judge(of(*versions), current) is None
    assert Wait(0).judge(of(*versions), current) in (None, "future")


@given(groups, st.integers(0, 14), st.integers(0, 4), st.sampled_from(NAMES))
def test_the_horizon_refuses_only_what_no_verdict_would_accept(
    versions: list[list[int]], current: int, bound: int, name: str
) -> None:
    policy = policy_named(name, bound)
    if min(map(min, versions)) < policy.horizon(current):
        assert policy.judge(of(*versions), current) == "stale"


def test_horizons() -> None:
    assert DropStale(2).horizon(7) == 5
    assert DropStale(2).horizon(1) == 0
    assert SegmentWise(2, recomputed=True).horizon(7) == 5
    for policy in (Mask(2), Wait(2), StandardPPO(), SegmentWise(2), BasePolicy()):
        assert policy.horizon(7) == NO_VERSION
    by_header = SegmentWise(2, recomputed=lambda *_: None)
    assert by_header.horizon(7) == NO_VERSION


@pytest.mark.parametrize(
    ("submitted", "left", "spare", "waits"),
    [
        ([], [], 0, False),
        ([3], [], 0, True),  # version 6 would outdate it
        ([3], [], 1, False),  # it may come in this version's next batch
        ([4], [], 0, False),
        ([4, 4, 4], [], 0, True),  # version 6 trains on 2: one of them would be outdated by 7
        ([4, 5, 5], [4], 0, False),
        ([5], [4, 4, 4], 0, True),
        ([], [4, 4, 4], 0, False),  # nothing is to come: waiting would have no end
        ([0, 1], [2], 0, False),  # past saving
    ],
)
def test_wait_holds_a_batch_while_something_could_miss_its_turn(
    submitted: list[int], left: list[int], spare: int, waits: bool
) -> None:
    wait = Wait(2)
    assert wait.must_wait(submitted, 5, left=left, per_version=2, spare=spare) is waits


@given(
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=60),
)
def test_wait_keeps_the_bound_without_drops_and_without_deadlock(
    bound: int, less: int, batches: int, pattern: list[tuple[int, int]]
) -> None:
    depth, size, wait = max(bound - less, 0), 3, Wait(bound)
    per_version = size * batches
    clock = made = 0
    coming: dict[int, tuple[int, int]] = {}  # by sample: version at submission, time of arrival
    ready: dict[int, int] = {}  # its oldest version, which may be younger than its submission
    for current in range(25):
        while len(coming) + len(ready) < (depth + 1) * per_version:
            coming[made] = current, clock + pattern[made % len(pattern)][0]
            made += 1
        for spare in range(per_version - size, -1, -size):
            for _ in range(10):
                for one in [one for one, (_, at) in coming.items() if at <= clock]:
                    late = pattern[one % len(pattern)][1]
                    ready[one] = min(coming.pop(one)[0] + late, current)
                batch = sorted(ready, key=lambda one: (ready[one], one))[:size]
                left = [version for one, version in ready.items() if one not in batch]
                waiting = [version for version, _ in coming.values()]
                if len(batch) == size and not wait.must_wait(
                    waiting, current, left=left, per_version=per_version, spare=spare
                ):
                    break
                clock += 1
            else:
                pytest.fail(f"waits for ever at version {current}")
            assert all(current - ready.pop(one) <= bound for one in batch)


# ---- mask ----------------------------------------------------------------------------------------


def test_mask_takes_stale_tokens_out_of_the_loss_and_nothing_else() -> None:
    long, short = rollouts_of([1, 1, 3, 4, 5, 5], [5])
    refined = Mask(2).refine([long, short], 5)
    assert not isinstance(refined, str)
    assert trained_versions(refined[0]) == [3, 4, 5, 5]
    assert refined[0].samples[0].loss_mask.tolist() == [False] * 4 + [True] * 4
    assert refined[0].samples[0].reward == long.samples[0].reward
    assert refined[0].samples[0].logprobs is long.samples[0].logprobs
    assert (refined[0].header.min_version, refined[0].header.trained_tokens) == (3, 4)
    assert refined[1] is short
    # Frozen messages are never written to.
    assert trained_versions(long) == [1, 1, 3, 4, 5, 5]


@given(groups, st.integers(0, 16), st.integers(0, 4), st.sampled_from([0.01, 0.34, 0.5, 1.0]))
def test_mask_never_trains_past_the_bound_and_drops_only_what_it_must(
    versions: list[list[int]], current: int, bound: int, share: float
) -> None:
    policy = CheckedPolicy(Mask(bound, min_share=share))
    kept = [[v for v in row if current - v <= bound] for row in versions]
    enough = all(k and len(k) >= share * len(row) for k, row in zip(kept, versions, strict=True))
    reason = policy.judge(of(*versions), current)
    refined = policy.refine(rollouts_of(*versions), current)
    # The header must not drop what masking can save, and must drop what it cannot.
    assert (reason == "stale") == any(not k for k in kept)
    assert (refined != "masked") == enough
    if reason == "stale":
        assert refined == "masked"
    if not isinstance(refined, str):
        assert [trained_versions(rollout) for rollout in refined] == kept


def test_mask_with_a_group_size_keeps_the_reward_of_what_it_masks_whole() -> None:
    versions = [[5, 5], [1, 1], [1, 5]]
    assert Mask(2).judge(of(*versions), 5) == "stale"
    policy = Mask(2, min_group_size=2)
    assert policy.judge(of(*versions), 5) is None
    refined = policy.refine(rollouts_of(*versions), 5)
    assert not isinstance(refined, str)
    assert [trained_versions(rollout) for rollout in refined] == [[5, 5], [], [5]]
    assert [rollout.header.reward for rollout in refined] == [1.0, 1.0, 1.0]
    assert refined[1].header.min_version == NO_VERSION
    assert Mask(2, min_group_size=3).judge(of(*versions), 5) == "stale"


def test_mask_counts_the_share_over_all_sequences_of_a_rollout() -> None:
    forked = [make_rollout([1, 1], [5, 5])]
    refined = Mask(2).refine(forked, 5)
    assert not isinstance(refined, str)
    assert trained_versions(refined[0]) == [5, 5]
    assert Mask(2, min_share=0.6).refine(forked, 5) == "masked"


def test_mask_leaves_an_untrained_tail_alone() -> None:
    # The newest version is of tool output that a policy made and nobody trains on.
    sample = make_sample([1, 1, 5], mask=[True, True, False])
    rollout = Rollout(make_header([sample]), (sample,))
    assert Mask(2).judge(make_group(rollout), 5) is None
    assert Mask(2).refine([rollout], 5) == "masked"


# ---- segment-wise: the defects of the seed -------------------------------------------------------


@pytest.mark.parametrize(
    ("oldest", "newest", "recomputed", "bound", "stale"),
    [
        (5, 5, None, 4, False),
        (4, 4, None, 4, False),
        (3, 3, None, 4, True),  # the tail rule allows 1, whatever the bound
        (2, 2, None, 4, True),
        (0, 5, None, 0, False),  # the tail alone counts
        (4, 5, None, 0, False),
        (1, 5, 5, 4, False),
        (0, 5, 5, 4, True),
        (3, 3, 4, 2, False),
        (3, 5, 0, 1, True),  # recomputed at version 0: the head rule, not the tail's
        (3, 5, -1, 1, False),  # not recomputed
    ],
)
def test_tail_and_head_rule(
    oldest: int, newest: int, recomputed: int | None, bound: int, stale: bool
) -> None:
    assert segment_stale(oldest, newest, 5, recomputed, bound) is stale


def test_recompute_version_zero_is_a_version() -> None:
    policy = SegmentWise(2, recomputed=lambda *_: 0)
    assert policy.judge(of([0, 0]), 2) is None  # the tail rule would refuse: 2 behind
    assert SegmentWise(2).judge(of([0, 0]), 2) == "stale"


@given(groups, st.integers(0, 14))
def test_every_sample_of_a_group_is_judged_not_only_the_first(
    versions: list[list[int]], current: int
) -> None:
    stale = any(current - max(row) > 1 for row in versions)
    assert (SegmentWise(0).judge(of(*versions), current) == "stale") == stale
    recomputed = SegmentWise(3, recomputed=True).judge(of(*versions), current)
    assert (recomputed == "stale") == any(current - min(row) > 3 for row in versions)


def test_the_tail_is_of_trained_tokens() -> None:
    # By its header the sample reaches version 5; what is trained on ends at 2.
    sample = make_sample([2, 5], mask=[True, False])
    rollout = Rollout(make_header([sample]), (sample,))
    policy = SegmentWise(3)
    assert policy.judge(make_group(rollout), 5) is None
    assert policy.refine([rollout], 5) == "stale"
    untold = replace(sample, loss_mask=np.ones(4, np.bool_))
    assert policy.refine([Rollout(rollout.header, (untold,))], 5) == "unversioned"


def test_every_sequence_of_a_rollout_is_judged() -> None:
    assert SegmentWise(3).refine([make_rollout([5], [2, 3])], 5) == "stale"
    quiet = make_sample([5], mask=[False])
    rollout = make_rollout([5])
    assert SegmentWise(3).refine([Rollout(rollout.header, (*rollout.samples, quiet))], 5)


def test_a_failing_recompute_book_closes_the_gate() -> None:
    def book(header: Header) -> int | None:
        raise KeyError(header.index)

    with pytest.raises(PolicyError, match=r"SegmentWise: judge\(group 'g', 5\) raised KeyError"):
        CheckedPolicy(SegmentWise(2, recomputed=book)).judge(of([5]), 5)


# ---- orders --------------------------------------------------------------------------------------


def in_order(order: Order, current: int, oldest: Sequence[int]) -> list[int]:
    made = [make_group(make_rollout([v]), seq=i) for i, v in enumerate(oldest)]
    policy = StandardPPO(order=order)
    return [g.seq for g in sorted(made, key=lambda g: policy.order(g, current))]


def test_orders() -> None:
    oldest = [5, 3, 5, 2, 4]
    assert in_order(OldestFirst(), 5, oldest) == [3, 1, 4, 0, 2]
    assert in_order(FreshestFirst(), 5, oldest) == [0, 2, 4, 1, 3]
    assert in_order(Windowed(2), 5, oldest) == [3, 1, 0, 2, 4]
    assert in_order(Windowed(0), 5, oldest) == in_order(OldestFirst(), 5, oldest)
    assert in_order(Windowed(9), 5, oldest) == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 12), st.integers(0, 5))
def test_orders_are_total_and_lose_nothing(oldest: list[int], current: int, window: int) -> None:
    for order in (OldestFirst(), FreshestFirst(), Windowed(window)):
        assert sorted(in_order(order, current, oldest)) == list(range(len(oldest)))
    # Nothing stays in a window until it is lost: what has left it goes first.
    by_window = [oldest[i] for i in in_order(Windowed(window), current, oldest)]
    past = [current - version >= window for version in by_window]
    assert past == sorted(past, reverse=True)


# ---- policies of users ---------------------------------------------------------------------------


class Fussy(BasePolicy):
    """A policy of a user who overrides one method only."""

    def verdict(self, group: Group, current: int) -> str | None:
        return "dull" if len({m.header.reward for m in group.members.values()}) == 1 else None


def test_a_policy_needs_to_say_only_what_differs() -> None:
    policy = CheckedPolicy(Fussy(min_group_size=1))
    assert policy.judge(of([1], [1]), 1) == "dull"
    assert policy.horizon(4) == -1
    assert policy.order(of([1]), 1) == (1, 1)
    assert not policy.waits
    assert policy.must_wait([0], 99, per_version=1) is False


def broken(**methods: Callable[..., Any]) -> CheckedPolicy:
    return CheckedPolicy(
        type("Broken", (BasePolicy,), {k: staticmethod(m) for k, m in methods.items()})()
    )


def boom(*args: Any, **rest: Any) -> Any:
    raise ZeroDivisionError("division by zero")


ROLLOUTS = rollouts_of([5, 5], [5])


def shorter(rollouts: Sequence[Rollout], current: int) -> list[Rollout]:
    sample = replace(rollouts[0].samples[0], loss_mask=np.ones(1, np.bool_))
    return [Rollout(rollouts[0].header, (sample,)), *rollouts[1:]]


def untraced(rollouts: Sequence[Rollout], current: int) -> list[Rollout]:
    sample = rollouts[0].samples[0]
    sample = replace(sample, loss_mask=np.ones(len(sample.token_ids), np.bool_))
    return [Rollout(rollouts[0].header, (sample,)), *rollouts[1:]]


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("judge", lambda *_: True),
        ("judge", lambda *_: ""),
        ("judge", lambda *_: "Too Old!"),
        ("judge", lambda *_: "x" * 33),
        ("judge", lambda *_: 3),
        ("judge", boom),
        ("refine", lambda *_: None),
        ("refine", lambda *_: "Not A Reason"),
        ("refine", lambda r, _: r[:1]),
        ("refine", lambda r, _: [*r, r[0]]),
        ("refine", lambda r, _: r[::-1]),
        ("refine", lambda *_: ["g", "g"]),
        ("refine", lambda r, _: [Rollout(r[0].header, ()), r[1]]),
        ("refine", shorter),
        ("refine", untraced),
        ("refine", boom),
        ("horizon", lambda *_: None),
        ("horizon", lambda *_: True),
        ("horizon", lambda *_: 2.5),
        ("horizon", lambda *_: -2),
        ("horizon", lambda v: v + 1),
        ("horizon", boom),
        ("order", lambda *_: 3),
        ("order", lambda *_: ("a",)),
        ("order", lambda *_: (float("nan"),)),
        ("order", boom),
        ("must_wait", lambda *_, **__: 1),
        ("must_wait", boom),
    ],
)
def test_nonsense_is_an_error_with_the_policys_name(
    method: str, answer: Callable[..., Any]
) -> None:
    policy = broken(**{method: answer})
    calls: dict[str, Callable[[], Any]] = {
        "judge": lambda: policy.judge(of([5]), 5),
        "refine": lambda: policy.refine(ROLLOUTS, 5),
        "horizon": lambda: policy.horizon(5),
        "order": lambda: policy.order(of([5]), 5),
        "must_wait": lambda: policy.must_wait([1], 5, per_version=1),
    }
    with pytest.raises(PolicyError, match=rf"policy Broken: {method}\(.*(answered|raised)") as got:
        calls[method]()
    assert isinstance(got.value, RollfleetError)
    if answer is boom:
        assert isinstance(got.value.__cause__, ZeroDivisionError)


def test_sane_answers_pass_the_guard() -> None:
    def halved(rollouts: Sequence[Rollout], current: int) -> list[Rollout]:
        return [
            Rollout(r.header, tuple(replace(s, reward=s.reward / 2) for s in r.samples))
            for r in rollouts
        ]

    policy = broken(refine=halved, horizon=np.int64, judge=lambda *_: "too-old_2")
    assert [r.samples[0].reward for r in policy.refine(ROLLOUTS, 5)] == [0.5, 0.5]  # type: ignore[union-attr]
    assert policy.horizon(5) == 5
    assert policy.judge(of([5]), 5) == "too-old_2"
    assert broken(refine=lambda *_: "dull").refine(ROLLOUTS, 5) == "dull"
    assert broken(refine=lambda r, _: r).refine([], 5) == []


def test_an_error_of_ours_keeps_its_name() -> None:
    def refuse(group: Group, current: int) -> str:
        raise SettingsError("no")

    with pytest.raises(SettingsError):
        broken(judge=refuse).judge(of([5]), 5)


def test_a_policy_without_its_methods_is_refused_at_once() -> None:
    class Judge:
        def judge(self, group: Group, current: int) -> str | None:
            return None

    half: Any = Judge()
    with pytest.raises(PolicyError, match="policy Judge has no refine and no horizon and no order"):
        CheckedPolicy(half)


def test_a_guard_is_a_policy_and_reasons_are_words() -> None:
    policy: Policy = CheckedPolicy(DropStale(2))
    assert policy.judge(of([1]), 5) == "stale"
    for reason in ("stale", "torn", "future", "masked", "unversioned", "rollback"):
        assert REASON.fullmatch(reason)


# ---- rollbacks -----------------------------------------------------------------------------------


def test_what_lost_weights_made_counts_as_far_away_as_they_were() -> None:
    past = VersionHistory([(1, 0), (2, 5)])  # epoch 2 resumed at version 5
    assert [past.version(v, 1) for v in (4, 5, 6, 8)] == [4, 5, 4, 2]
    assert [past.version(v, 2) for v in (5, 6, 8)] == [5, 6, 8]
    assert past.version(NO_VERSION, 1) == NO_VERSION
    assert past.lost(make_rollout([4, 6]).header)
    assert not past.lost(make_rollout([4, 5]).header)
    assert not past.lost(make_rollout([4, 6], epoch=2).header)


def test_the_deepest_of_several_rollbacks_counts() -> None:
    # Epoch 1 reached 15; epoch 2 resumed at 10, epoch 3 at 5. Version 15 is 10 steps from 5.
    past = VersionHistory([(1, 0), (2, 10), (3, 5)])
    assert past.version(15, 1) < 0
    assert past.version(10, 1) == 0
    # A checkpoint of epoch 1 at 5, then one of epoch 2 at 10: they parted at 5.
    assert VersionHistory([(2, 5), (3, 10)]).version(8, 1) == 2


def test_a_count_below_zero_never_looks_like_no_version() -> None:
    past = VersionHistory([(2, 2)])
    counted = [past.version(v, 1) for v in range(12)]
    assert NO_VERSION not in counted
    assert counted[:7] == [0, 1, 2, 1, 0, -2, -3]


@given(spans, st.integers(0, 12), st.integers(0, 12))
def test_a_headers_span_holds_the_payloads(versions: list[int], at: int, epoch: int) -> None:
    past = VersionHistory([(2, at)])
    rollout = make_rollout(versions)
    oldest, newest = past.span(rollout.header)
    redated = trained_versions(past.redate(rollout))
    assert redated == [past.version(v, 1) for v in versions]
    assert oldest <= min(redated)
    assert newest >= max(redated)
    assert oldest == min(redated)  # all of it is trained on, so it is exact


def test_redated_rollouts_say_what_they_hold() -> None:
    past = VersionHistory([(2, 5)])
    rollout = make_rollout([4, 5, 6, 7])
    redated = past.redate(rollout)
    assert trained_versions(redated) == [4, 5, 4, 3]
    assert (redated.header.min_version, redated.header.max_version) == (3, 5)
    assert past.redate(redated) is redated
    kept = make_rollout([4, 5])
    assert past.redate(kept) is kept
    # Runs that became equal melt.
    melted = past.redate(make_rollout([4, 6])).samples[0].versions
    assert melted.versions.tolist() == [-1, 4]


def test_a_lost_future_is_never_fresh_under_any_policy() -> None:
    past = VersionHistory([(2, 5)])
    group = make_group(make_rollout([8, 8]), history=past)
    assert DropStale(2).judge(group, 5) == "stale"
    redated = [past.redate(rollout) for rollout in (make_rollout([8, 8]),)]
    assert SegmentWise(2).refine(redated, 5) == "stale"
    assert Mask(2).refine(redated, 5) == "masked"
