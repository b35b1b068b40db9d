"""The whole path with real workers: submit, claim, deliver, consume; what arrives, and how much."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.fleet_processes import Processes, lines
from support import wait_until, wait_until_async
from torch.utils.data import DataLoader

import rollfleet
from rollfleet.policy.policies import BasePolicy
from rollfleet_common.redis import connect_sync

SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "starve_s": 30.0}


def with_shape(**changes: Any) -> dict[str, Any]:
    return {**SHAPE, **changes}


def prompts(count: int, **data: Any) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {"token_ids": [1, 2, 3], "answer": float(i), **data}


def members(batch: rollfleet.Batch) -> list[tuple[str, int]]:
    return [(r.header.group, r.header.index) for r in batch.rollouts]


def assert_each_once(seen: list[tuple[str, int]], groups: int, n: int = 4) -> None:
    wanted = {(f"p{g}", i): 1 for g in range(groups) for i in range(n)}
    assert Counter(seen) == Counter(wanted)


def assert_empty(fleet: rollfleet.Fleet) -> None:
    """Everything was submitted, and is committed or dropped: nothing else is left anywhere."""
    books = fleet.books()
    assert books.balance == 0, books
    ended = books.committed + sum(books.dropped.values()) + books.dead
    assert (ended, books.outstanding) == (books.submitted, 0), books


# ---- one round ---------------------------------------------------------------------------------


def test_a_run_from_prompt_to_tensor(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "path")
    seen: list[tuple[str, int]] = []
    with rollfleet.connect(redis_url, run="path", max_staleness=2, **SHAPE) as fleet:
        # Deeper than a version, so that nothing is dropped by a worker that learns late.
        fleet.feed(prompts(4))
        for batch in fleet.batches():
            seen += members(batch)
            assert len(batch) == 8
            assert [g.name for g in batch.groups] == list(dict.fromkeys(g for g, _ in seen[-8:]))
            t = batch.tensors
            assert t.input_ids.shape == (8, 7)
            assert t.input_ids.dtype == torch.int64
            assert t.input_ids.tolist() == [[1, 2, 3, 100, 101, 102, 103]] * 8
            assert t.attention_mask.all()
            assert t.loss_mask.tolist() == [[False] * 3 + [True] * 4] * 8
            assert t.logprobs.tolist() == [[0.0] * 3 + [-0.5] * 4] * 8
            assert (t.versions[:, :3] == -1).all()
            assert (t.versions[:, 3:] == batch.rollouts[0].header.min_version).all()
            assert t.rewards.tolist() == [float(g[1:]) for g, _ in seen[-8:]]
            assert t.group_ids.tolist() == [0] * 4 + [1] * 4
            assert t.lengths.tolist() == [7] * 8
            assert {r.header.attempt for r in batch.rollouts} == {1}
            assert batch.stats["rollfleet/samples"] == 8
        assert_each_once(seen, 4)
        assert_empty(fleet)


def test_rows_of_different_length_are_padded(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "pad")
    with rollfleet.connect(redis_url, run="pad", collate={"pad_id": 7}, **SHAPE) as fleet:
        fleet.feed([{"token_ids": [5] * 6}, {"token_ids": []}])
        (batch,) = list(fleet.batches())
    t = batch.tensors
    short = t.lengths == 4
    assert sorted(t.lengths.tolist()) == [4] * 4 + [10] * 4
    assert t.input_ids.shape == (8, 10)
    assert (t.input_ids[short, 4:] == 7).all()
    assert (t.versions[short, 4:] == -1).all()
    assert (t.versions[short, :4] == 0).all()
    assert not t.loss_mask[short, 4:].any()
    assert not t.attention_mask[short, 4:].any()
    assert t.oldest.tolist() == [0] * 8


def test_versions_are_those_of_the_board(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "versions")
    shape: dict[str, Any] = SHAPE | {"samples_per_version": 4}
    with rollfleet.connect(redis_url, run="versions", version=5, **shape) as fleet:
        for version in (5, 6, 9):
            if version != fleet.version:
                assert fleet.publish(version) == version
            worker.event("following", version=version)
            fleet.submit({"token_ids": [1]})
            batch = fleet.next_batch()
            assert batch is not None
            assert (batch.version, batch.staleness) == (version, [0] * 4)
            assert {r.header.max_version for r in batch.rollouts} == {version}
            fleet.commit(batch)
        with pytest.raises(rollfleet.SettingsError, match="version 8 is below version 9"):
            fleet.publish(8)


# ---- feeding -----------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"token_ids": torch.tensor([1, index]), "answer": np.float64(index)}


@pytest.mark.parametrize("kind", ["generator", "list", "loader"])
def test_feeds_from_any_iterable(redis_url: str, processes: Processes, kind: str) -> None:
    rows = [{"token_ids": [1, i], "answer": float(i)} for i in range(6)]
    source: Any = {
        "generator": (row for row in rows),
        "list": rows,
        "loader": DataLoader(Rows(), batch_size=2, collate_fn=list),
    }[kind]
    processes.worker(redis_url, "feed")
    with rollfleet.connect(redis_url, run="feed", **SHAPE) as fleet:
        fleet.feed(source)
        got = {
            (r.header.position, r.samples[0].token_ids[1], r.samples[0].reward)
            for batch in fleet.batches()
            for r in batch.rollouts
        }
    assert got == {(i, i, float(i)) for i in range(6)}


def test_the_end_of_a_feed_is_a_smaller_batch_and_then_none(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "end")
    with rollfleet.connect(redis_url, run="end", **SHAPE) as fleet:
        fleet.feed(prompts(5))
        assert [len(batch) for batch in fleet.batches()] == [8, 8, 4]
        assert fleet.next_batch() is None
        assert list(fleet.batches(3)) == []
        assert_empty(fleet)
        # Another iterable goes on where this one ended: positions are those of the run.
        fleet.feed(prompts(7))
        assert [len(batch) for batch in fleet.batches()] == [8]
        assert_empty(fleet)


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_one_feed_at_a_time(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="one", **SHAPE) as fleet:
        fleet.feed(prompts(100))
        with pytest.raises(rollfleet.SettingsError, match="a feed is running"):
            fleet.feed(prompts(1))
        # Pacing: (depth + 1) x samples_per_version, and not one more.
        wait_until(lambda: fleet.books().submitted == 24, "the feed to fill the room")
        time.sleep(0.2)
        assert fleet.books().submitted == 24


def test_an_empty_feed_ends_at_once(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="none", **SHAPE) as fleet:
        fleet.feed([])
        assert list(fleet.batches()) == []


# ---- routes, partitions, workers ---------------------------------------------------------------


def test_a_worker_reads_only_its_own_routes(redis_url: str, processes: Processes) -> None:
    shape: dict[str, Any] = SHAPE | {"samples_per_version": 16}
    with rollfleet.connect(redis_url, run="routes", **shape) as fleet:
        processes.worker(redis_url, "routes", "a=Echo")
        for route in ("a", "b", "a", "b"):
            fleet.submit({"token_ids": [1], "route": route})
        batch = fleet.next_batch(8)
        assert batch is not None
        assert {r.header.route for r in batch.rollouts} == {"a"}
        fleet.commit(batch)
        assert fleet.books().waiting_by_route == {"a": 0, "b": 8}
        processes.worker(redis_url, "routes", "b=Other", "c=Echo")
        batch = fleet.next_batch(8)
        assert batch is not None
        assert {r.header.route for r in batch.rollouts} == {"b"}
        assert all(r.samples[0].metrics == {"other": 1.0} for r in batch.rollouts)
        fleet.commit(batch)
        assert_empty(fleet)


@pytest.mark.parametrize("partitions", [2, 3])
def test_several_partitions(redis_url: str, processes: Processes, partitions: int) -> None:
    for _ in range(2):
        processes.worker(redis_url, "parts", slots=4)
    seen: list[tuple[str, int]] = []
    with rollfleet.connect(
        redis_url, run="parts", partitions=partitions, max_staleness=4, **SHAPE
    ) as fleet:
        fleet.feed(prompts(20))
        for batch in fleet.batches():
            seen += members(batch)
        homes = {
            key for key in fleet.books().raw if key.startswith("XLEN") and key.endswith("rollouts")
        }
        assert len(homes) == partitions
        assert_each_once(seen, 20)
        assert_empty(fleet)


def test_scaling_from_one_worker_to_three_and_back(
    redis_url: str, processes: Processes, tmp_path: Any
) -> None:
    trace = tmp_path / "trace"
    one = processes.worker(redis_url, "scale", "Slow", slots=4)
    more: list[Any] = []
    back: list[int] = []
    fed = 0
    seen: list[tuple[str, int]] = []
    shape: dict[str, Any] = SHAPE | {"samples_per_version": 16, "max_staleness": 8}

    def until_scaled_back() -> Iterator[dict[str, Any]]:
        nonlocal fed
        for prompt in prompts(2000, trace=str(trace)):
            if back:
                return
            fed += 1
            yield prompt

    with rollfleet.connect(redis_url, run="scale", **shape) as fleet:
        fleet.feed(until_scaled_back())
        for batch in fleet.batches():
            seen += members(batch)
            if batch.number == 3:
                more = [processes.worker(redis_url, "scale", "Slow", slots=4) for _ in range(2)]
            served = {line["pid"] for line in lines(trace)}
            if more and not back and served >= {worker.pid for worker in more}:
                back = [worker.stop() for worker in more]
        assert back == [0, 0]
        assert_each_once(seen, fed)
        assert_empty(fleet)
    # Scaling in is no reason to do anything twice: who drains finishes what it has.
    assert_each_once([(line["group"], line["index"]) for line in lines(trace)], fed)
    assert one.stop() == 0


def test_slots_bound_what_runs_at_once(redis_url: str, processes: Processes, tmp_path: Any) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    shape: dict[str, Any] = SHAPE | {"samples_per_version": 12}
    with rollfleet.connect(redis_url, run="slots", **shape) as fleet:
        # Fewer slots than routes, all of which have work.
        for route in ("a", "b", "c"):
            fleet.submit({"token_ids": [1], "route": route, "gate": str(gate), "trace": str(trace)})
        worker = processes.worker(redis_url, "slots", "a=Gated", "b=Gated", "c=Gated", slots=2)
        wait_until(lambda: len(lines(trace)) >= 2, "two episodes to start", 30.0)
        # One more look of the claimer would have brought too many.
        time.sleep(0.7)
        assert len(lines(trace)) == 2
        assert fleet.books().in_flight == 2
        gate.touch()
        batch = fleet.next_batch(12)
        assert batch is not None
        fleet.commit(batch)
        wait_until(lambda: worker.metric("rollfleet_slots_busy") == 0, "no slot to be busy")
        assert_empty(fleet)


def test_leases_of_two_routes_are_two_although_their_entries_have_one_name(
    redis_url: str, processes: Processes, tmp_path: Any
) -> None:
    """Stream ids are unique in one stream only."""
    trace = tmp_path / "trace"
    routes = ("a", "b", "c", "d")
    with (
        connect_sync(redis_url, role="test") as client,
        rollfleet.connect(redis_url, run="names", **SHAPE) as fleet,
    ):
        for route in routes:
            fleet.submit({"token_ids": [1], "route": route, "n": 1, "trace": str(trace)})
        # The same entries once more, under one id each.
        for route in routes:
            stream = f"rf:{{names/0}}:prompts:{route}"
            entries: Any = client.xrange(stream)
            ((old, fields),) = entries
            client.xdel(stream, old)
            entry: Any = client.xadd(stream, fields, "9999999999999-1")
            client.hset(f"rf:{{names/0}}:group:{fields[b'g'].decode()}", "0", b"p" + entry)
        flags = [f"{route}=Slow" for route in routes]
        worker = processes.worker(redis_url, "names", *flags, slots=4, lease_s=1)
        batch = fleet.next_batch(4)
        assert batch is not None
        assert {r.header.route for r in batch.rollouts} == set(routes)
        fleet.commit(batch)
        wait_until(lambda: worker.metric("rollfleet_slots_busy") == 0, "no slot to be busy")
        assert len(lines(trace)) == 4
        # All four slots are free again.
        for _ in range(4):
            fleet.submit({"token_ids": [1], "route": "a", "n": 1, "seconds": 0.3})
        wait_until(lambda: worker.metric("rollfleet_slots_busy") == 4, "four to run at once", 30.0)
        batch = fleet.next_batch(4)
        assert batch is not None
        fleet.commit(batch)
        assert_empty(fleet)


# ---- what the trainer refuses ------------------------------------------------------------------


def test_what_should_accept_rejects_is_refilled(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "accept")
    asked: list[str] = []

    def even(rollouts: Any) -> bool:
        asked.append(rollouts[0].header.group)
        assert [r.header.index for r in rollouts] == [0, 1, 2, 3]
        return int(rollouts[0].samples[0].reward) % 2 == 0

    seen: list[tuple[str, int]] = []
    with rollfleet.connect(
        redis_url, run="accept", should_accept=even, max_staleness=4, **SHAPE
    ) as fleet:
        fleet.feed(prompts(12))
        sizes = []
        for batch in fleet.batches():
            sizes.append(len(batch))
            seen += members(batch)
        assert sizes == [8, 8, 8]
        assert sorted(int(g[1:]) for g, i in seen if i == 0) == [0, 2, 4, 6, 8, 10]
        assert set(asked) == {f"p{i}" for i in range(12)}
        assert fleet.books().dropped == {"rejected": 24}
        assert_empty(fleet)


def test_a_policy_of_ones_own(redis_url: str, processes: Processes) -> None:
    class OnlyTwo(BasePolicy):
        def judge(self, group: rollfleet.Group, current: int) -> str | None:
            return None if group.name in ("p0", "p3") else "unwanted"

    processes.worker(redis_url, "policy")
    with rollfleet.connect(redis_url, run="policy", policy=OnlyTwo(), **SHAPE) as fleet:
        fleet.feed(prompts(5))
        (batch,) = list(fleet.batches())
        assert {g.name for g in batch.groups} == {"p0", "p3"}
        assert fleet.books().dropped == {"unwanted": 12}
        assert_empty(fleet)


# ---- AReaL's verbs -----------------------------------------------------------------------------


def test_wait_keeps_what_came_when_it_is_too_early(redis_url: str, processes: Processes) -> None:
    with rollfleet.connect(redis_url, run="wait", **SHAPE) as fleet:
        fleet.submit({"token_ids": [1]})
        with pytest.raises(ValueError, match="count is 0"):
            fleet.wait(0)
        with pytest.raises(rollfleet.StarvedError, match="4 samples wait for a worker"):
            fleet.wait(1, timeout=0.2)
        processes.worker(redis_url, "wait")
        wait_until(lambda: fleet.books().handed_out == 4, "the first group", 30.0)
        with pytest.raises(rollfleet.StarvedError, match="a batch of 8 samples did not come wi"):
            fleet.wait(2, timeout=1.5)
        fleet.submit({"token_ids": [1]})
        assert len(fleet.wait(2)) == 8
        fleet.submit({"token_ids": [1]})
        assert len(fleet.wait(1)) == 4
        fleet.commit()
        assert fleet.books().committed == 8  # of the last one the next call, or close, decides
        fleet.commit(fleet._auto)
        assert_empty(fleet)


def test_rollout_batch_refills_what_is_rejected(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "refill")
    refused: Counter[float] = Counter()

    def second_try(rollouts: Any) -> bool:
        reward = rollouts[0].samples[0].reward
        refused[reward] += 1
        return reward != 1.0 or refused[reward] > 2

    with rollfleet.connect(redis_url, run="refill", should_accept=second_try, **SHAPE) as fleet:
        batch = fleet.rollout_batch(list(prompts(3)))
        assert (
            sorted(r.samples[0].reward for r in batch.rollouts) == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
        )
        assert fleet.books().dropped["rejected"] == 8
        with pytest.raises(ValueError, match="at least one prompt"):
            fleet.rollout_batch([])
        with pytest.raises(rollfleet.SettingsError, match=r"\(2 \+ 1\) x 8 = 24 may"):
            fleet.rollout_batch(list(prompts(7)))
        fleet.commit(batch)
        assert_empty(fleet)


def test_rollout_batch_gives_up_on_a_prompt_that_is_always_rejected(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "reject")
    with rollfleet.connect(
        redis_url, run="reject", should_accept=lambda _: False, **SHAPE
    ) as fleet:
        with pytest.raises(rollfleet.StarvedError, match="was given up 8 times"):
            fleet.rollout_batch(list(prompts(1)))
        assert_empty(fleet)


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_rollout_batch_never_hangs_without_workers(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="hang", **with_shape(max_staleness=0)) as fleet:
        # The second one has no room to submit: the first one's prompts are still out.
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(rollfleet.StarvedError, match="no worker has ever shown up"):
                fleet.rollout_batch(list(prompts(2)), timeout=0.5)
            assert time.monotonic() - began < 5


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_submit_never_hangs_without_room(redis_url: str) -> None:
    shape: dict[str, Any] = SHAPE | {"max_staleness": 0, "starve_s": 0.5}
    with rollfleet.connect(redis_url, run="room", **shape) as fleet:
        for _ in range(2):
            fleet.submit({"token_ids": [1]})
        with pytest.raises(rollfleet.StarvedError, match="no worker has ever shown up"):
            fleet.submit({"token_ids": [1]})


def test_prepare_batch_goes_round_a_loader_again_and_again(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "prepare")
    loader = DataLoader(Rows(), batch_size=2, collate_fn=list)
    rewards: Counter[float] = Counter()
    with rollfleet.connect(redis_url, run="prepare", max_staleness=4, **SHAPE) as fleet:
        for _ in range(6):
            batch = fleet.prepare_batch(loader)
            assert len(batch) == 8
            rewards.update(r.samples[0].reward for r in batch.rollouts)
            fleet.publish()
    # Six batches of two prompts: the data set of six prompts, twice.
    assert rewards == {float(i): 8 for i in range(6)}
    with rollfleet.connect(redis_url, run="prepare", fresh=True, **SHAPE):
        pass


def test_prepare_batch_of_what_can_be_read_once_ends(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "once")
    with rollfleet.connect(redis_url, run="once", **SHAPE) as fleet:
        source = prompts(3)
        assert len(fleet.prepare_batch(source)) == 8
        assert len(fleet.prepare_batch(source)) == 4
        with pytest.raises(rollfleet.StarvedError, match="the feed has ended"):
            fleet.prepare_batch(source)
        assert_empty(fleet)


# ---- versions, pauses --------------------------------------------------------------------------


def test_a_pause_holds_claims_back_and_expires(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "pause")
    with rollfleet.connect(redis_url, run="pause", **SHAPE) as fleet:
        worker.event("claiming")
        fleet.pause(60)
        wait_until(lambda: worker.page("/readyz") == (503, "paused\n"), "the worker to pause")
        # A read that began before the pause may still take what comes in its block.
        time.sleep(0.6)
        fleet.submit({"token_ids": [1]})
        with pytest.raises(rollfleet.StarvedError):
            fleet.next_batch(4, timeout_s=0.7)
        assert fleet.books().waiting == 4
        fleet.pause(0.3)
        batch = fleet.next_batch(4)
        assert batch is not None
        fleet.commit(batch)
        assert_empty(fleet)


def test_max_staleness_0_is_synchronous(redis_url: str, processes: Processes) -> None:
    for _ in range(2):
        processes.worker(redis_url, "sync")
    seen: list[tuple[str, int]] = []
    with rollfleet.connect(redis_url, run="sync", max_staleness=0, **SHAPE) as fleet:
        fleet.feed(prompts(60))
        for batch in fleet.batches():
            assert batch.staleness == [0] * 8
            assert {r.header.max_version for r in batch.rollouts} == {batch.version}
            seen += members(batch)
            fleet.publish()
        assert fleet.version == 30
        assert fleet.books().dropped == {}
        assert_each_once(seen, 60)
        assert_empty(fleet)


def test_what_is_too_old_is_dropped_and_replaced(
    redis_url: str, processes: Processes, tmp_path: Any
) -> None:
    gate = tmp_path / "gate"
    processes.worker(redis_url, "stale", "slow=Gated", "default=Echo")
    with rollfleet.connect(redis_url, run="stale", max_staleness=1, **SHAPE) as fleet:
        fleet.submit({"token_ids": [1], "route": "slow", "gate": str(gate)})
        wait_until(lambda: fleet.books().in_flight == 4, "the slow ones to begin", 30.0)
        fleet.publish()
        fleet.publish()
        gate.touch()
        wait_until(lambda: fleet.books().dropped == {"stale": 4}, "the stale ones to be refused")
        fleet.feed(prompts(2))
        for batch in fleet.batches():
            assert {g.task for g in batch.groups} == {"default"}
            assert len(batch) == 8
        assert_empty(fleet)


def test_staleness_is_judged_when_the_batch_is_handed_over(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "sweep")
    with rollfleet.connect(redis_url, run="sweep", max_staleness=1, **SHAPE) as fleet:
        fleet.feed(prompts(4))
        wait_until(lambda: fleet.books().handed_out == 16, "all to be here", 30.0)
        for _ in range(2):
            fleet.publish()
        with pytest.raises(rollfleet.FailingError, match=r"16 were dropped \(16 stale\)"):
            list(fleet.batches())
        assert fleet.books().dropped == {"stale": 16}
        assert_empty(fleet)


# ---- asyncio -----------------------------------------------------------------------------------


def settings(redis_url: str, run: str, **changes: Any) -> rollfleet.TrainerSettings:
    return rollfleet.TrainerSettings(redis_url=redis_url, run=run, **with_shape(**changes))


async def test_the_async_twin(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "aio")
    seen: list[tuple[str, int]] = []
    async with rollfleet.AsyncFleet(settings(redis_url, "aio", max_staleness=4)) as fleet:
        fleet.feed(prompts(10))
        async for batch in fleet.batches():
            seen += members(batch)
            await fleet.publish()
        assert not fleet.feeding
        assert_each_once(seen, 10)
        books = await fleet.books()
        assert (books.balance, books.committed) == (0, 40)


async def test_two_who_ask_for_a_batch_at_once_get_different_ones(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "two")
    async with rollfleet.AsyncFleet(settings(redis_url, "two")) as fleet:
        fleet.feed(prompts(6))
        batches = await asyncio.gather(*(fleet.next_batch() for _ in range(3)))
        seen: list[tuple[str, int]] = []
        for batch in batches:
            assert batch is not None
            seen += members(batch)
            await fleet.commit(batch)
        assert_each_once(seen, 6)
        assert (await fleet.books()).balance == 0


async def test_a_cancelled_hand_over_commits_nothing(
    redis_url: str, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.worker(redis_url, "cancel")
    async with rollfleet.AsyncFleet(settings(redis_url, "cancel")) as fleet:
        fleet.feed(prompts(2))

        async def here() -> bool:
            return (await fleet.books()).handed_out == 8

        await wait_until_async(here, "both groups", 30.0)
        plan = fleet.board.plan
        planned, answered = asyncio.Event(), asyncio.Event()

        async def late(*args: Any, **more: Any) -> None:
            await plan(*args, **more)
            planned.set()
            await answered.wait()

        monkeypatch.setattr(fleet.board, "plan", late)
        asking = asyncio.create_task(fleet.next_batch())
        await planned.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        monkeypatch.undo()
        answered.set()
        # The next one trains another part of what the cancelled one had planned.
        batch = await fleet.next_batch(4)
        assert batch is not None
        await fleet.trained(batch)
        state = fleet.state_dict()
        left = ({"p0", "p1"} - {g.name for g in batch.groups}).pop()
    async with rollfleet.AsyncFleet(settings(redis_url, "cancel"), state=state) as fleet:
        again = await fleet.next_batch(4)
        assert again is not None
        assert [g.name for g in again.groups] == [left]
        await fleet.commit(again)
        books = await fleet.books()
        assert (books.balance, books.committed) == (0, 8)
