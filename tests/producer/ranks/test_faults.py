"""What fails on one rank between two steps: told to all of them, and nothing is trained on twice."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from fixtures.ranks import Outcome, ThreadWorker, run_ranks
from fixtures.rollouts import make_rollout
from support import wait_until

import rollfleet
from rollfleet.ranks import leader
from rollfleet.ranks.loader import Loader
from rollfleet.ranks.protocol import ShareTotals
from rollfleet.ranks.rank_batch import RankBatch
from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import RankError, SettingsError, SupersededError

RUN = "faults"


def prompts(count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield {"token_ids": [1, 2, 3]}


def values(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]


def test_a_publish_that_failed_takes_no_commit_with_it(redis_url: str) -> None:
    """A batch that was trained on and not committed would be served again to whoever resumes."""

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(8))
        first = fleet.next_batch()
        fleet.publish(1)
        fleet.publish(0)
        fleet.commit(first)
        with pytest.raises(SettingsError, match="version 0 is below version 1"):
            fleet.next_batch()
        second = fleet.next_batch()
        fleet.publish(0)
        fleet.publish(-1)
        assert second is not None
        fleet.trained(second)
        fleet.commit()
        with pytest.raises(SettingsError, match="version 0 is below"):  # the first that failed
            fleet.next_batch()
        if fleet.leader is None:
            return None
        books = fleet.leader.books()
        return books.committed, books.outstanding, fleet.state_dict()["batch"]

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [(32, 0, 2), None]


@pytest.mark.leaves_keys("the younger trainer holds the run", "*")
def test_what_a_left_over_wait_fails_with_is_raised_on_all(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 fails while rank 0 waits for rollouts; then the run is taken over."""
    monkeypatch.setattr(leader, "BEAT_S", 0.1)

    def refuse(rollouts: Any) -> bool:
        if rollouts[0].header.group in ("p4", "p5", "p6", "p7"):
            raise ZeroDivisionError
        return True

    def program(fleet: rollfleet.RankFleet) -> str:
        if fleet.rank == 1:
            fleet._loader._reader.payloads.accept = refuse
        fleet.feed(prompts(40))
        if fleet.leader is not None:
            ready = fleet.leader.aio.consumer.ready
            with ThreadWorker(redis_url, RUN):
                wait_until(lambda: len(ready) == 12, "all rollouts are here")
        fleet.commit(fleet.next_batch())
        fleet.publish(9)  # all that is here is stale, and nobody makes more
        with pytest.raises(RankError, match="ZeroDivisionError"):
            fleet.next_batch()
        if fleet._lead is not None:
            picking = fleet._lead._picking
            assert picking is not None
            rollfleet.connect(
                redis_url, run=RUN, take_over=True, samples_per_version=16, group_size=4
            ).close()
            wait_until(picking.done, "the wait that was left over has failed")
        with pytest.raises(SupersededError) as caught:
            fleet.next_batch()
        return str(caught.value)

    outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    for said in values(outcomes):
        assert said.startswith("rank 0 of 2: ")


@pytest.mark.parametrize(
    ("how", "made"), [({}, "TensorBatch"), ({"form": "packed"}, "PackedBatch")]
)
def test_a_form_for_tensors_is_one_for_micro_batches_too(
    redis_url: str, how: dict[str, Any], made: str
) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(4))
        (batch,) = fleet.batches()
        return [type(micro.tensors).__name__ for micro in batch.micro_batches()]

    collate = {"form": "padded"}
    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 1, program, run=RUN, collate=collate, **how)
    assert values(outcomes) == [[made]]


def test_a_batch_by_hand_may_name_the_form_twice() -> None:
    tally = ShareTotals(1, 8, 4, 1, 1, 1.0)
    rollouts = [make_rollout([1], n=1)]
    batch = RankBatch(
        1, 1, 0, 1, rollouts, ((0,),), tally, {}, collate={"form": "padded"}, form="packed"
    )
    assert type(batch.micro_batches()[0].tensors).__name__ == "PackedBatch"


@pytest.mark.parametrize(
    "how", [{"policy": "mask", "min_group_size": 2}, {"policy": rollfleet.Mask(1, 2)}]
)
def test_groups_that_are_divided_have_no_least_size(redis_url: str, how: dict[str, Any]) -> None:
    """A rank would count the members that it has, and train on what the whole group forbids."""
    outcomes, _ = run_ranks(redis_url, 2, lambda _: None, run=RUN, whole_groups=False, **how)
    for outcome in outcomes:
        assert type(outcome.error) is SettingsError
        assert "min_group_size counts the members" in str(outcome.error)


def test_a_policy_may_be_named(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        leader = fleet.leader
        policies = [fleet._loader._reader.payloads.policy, leader and leader.aio.policy]
        return [type(each.policy).__name__ for each in policies if each is not None]

    outcomes, _ = run_ranks(redis_url, 2, program, run=RUN, policy="mask")
    assert values(outcomes) == [["Mask", "Mask"], ["Mask"]]


def test_a_loader_that_closes_leaves_no_task_behind(redis_url: str) -> None:
    """One that is destroyed with its loop still pending is complained about when it is collected."""
    begun, pending = threading.Event(), threading.Event()

    class Stubborn:
        """Loses its first cancellation, as redis-py may (rollfleet_common.tasks)."""

        async def load(self, plan: str, version: int) -> Any:
            begun.set()
            pending.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            try:
                await asyncio.sleep(60)
            finally:
                pending.clear()

        def close(self) -> None:
            assert not pending.is_set()

    settings = TrainerSettings.load(redis_url=redis_url, run=RUN, samples_per_version=8)
    loader = Loader(settings, lambda _: Stubborn(), 0)  # type: ignore[arg-type,return-value]
    loader.begin("x-1", 0)
    assert begun.wait(10)
    loader.close()
    assert not pending.is_set()
