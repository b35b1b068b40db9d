"""Work that nobody needs any more is stopped: surplus, torn, past its deadline, hopelessly stale."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures.fleet_processes import Processes
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.errors import FailureKind
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.redis import connect
from rollfleet_common.streams import Streams

SHAPE: dict[str, Any] = {
    "samples_per_version": 8,
    "group_size": 2,
    "max_staleness": 1,
    "starve_s": 30.0,
}


def stuck(gate: Path, **data: Any) -> dict[str, Any]:
    """A prompt of which member `index` waits for a gate that never opens."""
    return {"token_ids": [1, 2, 3], "act": "gate", "gate": str(gate), **data}


def settled(fleet: rollfleet.Fleet, **dropped: int) -> None:
    def over() -> bool:
        books = fleet.books()
        return (books.dropped, books.in_flight, books.outstanding) == (dropped, 0, 0)

    wait_until(over, f"dropped {dropped} and nothing out")
    assert fleet.books().balance == 0


def test_of_more_than_needed_the_first_are_taken_and_the_rest_cancelled(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    worker = processes.worker(redis_url, "more", "Actor", lease_s=1)
    with rollfleet.connect(redis_url, run="more", oversample=1, **SHAPE) as fleet:
        fleet.submit(stuck(tmp_path / "never", index=1))
        batch = fleet.next_batch(2)
        assert batch is not None
        assert [(r.header.index, r.header.n) for r in batch.rollouts] == [(0, 3), (2, 3)]
        fleet.commit(batch)
        settled(fleet, surplus=1)
        # The stuck episode gave its slot back.
        wait_until(
            lambda: worker.metric("rollfleet_leases_lost_total") == 1, "the worker learnt it"
        )


@pytest.mark.leaves_keys("dead letters", "rf:*:dead")
async def test_a_group_that_cannot_become_whole_is_cancelled(redis_url: str) -> None:
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="torn", **SHAPE)
    client = connect(redis_url, role="test")
    keys = PartitionKeys("torn", 0)
    streams, leases = Streams(client, keys), Leases(client, keys, "w")
    async with client, rollfleet.AsyncFleet(settings) as fleet:
        await fleet.submit({"token_ids": [1], "n": 3})
        await streams.make_groups(["default"])
        (claim,), _ = await streams.claim(client, "w", ["default"], 1, None)
        assert await leases.fail(claim, AttemptFailure(FailureKind.DATA, "no use", "w"), None)

        async def over() -> bool:
            books = await fleet.books()
            return (books.dead, books.dropped, books.waiting) == (1, {"torn": 2}, 0)

        await wait_until_async(over, "the siblings that wait are cancelled")
        assert (await fleet.books()).balance == 0


@pytest.mark.leaves_keys("no worker takes the other group")
def test_a_group_past_its_deadline_is_closed_with_the_reason(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="late", **SHAPE) as fleet:
        fleet.submit({"token_ids": [1], "deadline_ms": int(time.time() * 1000) + 200})
        fleet.submit({"token_ids": [1]})
        wait_until(lambda: fleet.books().dropped == {"deadline": 2}, "the deadline closed it")
        assert fleet.books().waiting == 2


def test_an_episode_that_became_too_old_is_stopped(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    worker = processes.worker(redis_url, "old", "Actor", lease_s=1)
    with rollfleet.connect(redis_url, run="old", **SHAPE) as fleet:
        fleet.submit(stuck(tmp_path / "never"))
        wait_until(lambda: fleet.books().in_flight == 2, "both run")
        fleet.publish()
        assert fleet.books().in_flight == 2, "one version behind is within the bound"
        fleet.publish()
        settled(fleet, stale=2)
        # The first to be given up dooms the group, so the trainer may have cancelled the other.
        wait_until(lambda: worker.metric("rollfleet_cancelled_total") >= 1, "it was counted")
        wait_until(lambda: worker.metric("rollfleet_slots_busy") == 0, "the slots are free")


def test_evaluations_are_never_stopped_for_their_age(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    processes.worker(redis_url, "eval", "Actor", lease_s=1)
    gate = tmp_path / "gate"
    with rollfleet.connect(redis_url, run="eval", oversample=3, **SHAPE) as fleet:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(fleet.evaluate, [stuck(gate)])
            wait_until(lambda: fleet.books().in_flight == 2, "both run")
            for _ in range(3):
                fleet.publish()
            gate.touch()
            assert [len(rollouts) for rollouts in made.result(30)] == [2]
        with pytest.raises(rollfleet.InvalidPromptError, match="evaluate"):
            fleet.submit({"token_ids": [1], "kind": "eval"})
        books = fleet.books()
        assert (books.dropped, books.balance) == ({}, 0)
