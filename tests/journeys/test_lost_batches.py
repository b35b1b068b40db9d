"""A checkpoint that is older than the last commit is not resumed in silence."""

import asyncio
from typing import Any

import pytest
from fixtures.by_hand import ByHand, by_hand
from fixtures.fleet_processes import Processes
from fixtures.ranks import run_ranks
from support import wait_until_async

import rollfleet
from rollfleet import aio
from rollfleet.run import open_run
from rollfleet_common.board import Board
from rollfleet_common.errors import LostBatchesError
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect

RUN = "lost"


async def train(hand: ByHand, batches: int) -> None:
    for _ in range(batches):
        await hand.groups(2)
        batch = await hand.next()
        await hand.fleet.commit(batch)
        await hand.fleet.publish()


def again(hand: ByHand, state: Any, **settings: Any) -> rollfleet.AsyncFleet:
    shape = hand.fleet.settings.model_dump(exclude_unset=True) | settings
    return rollfleet.AsyncFleet(rollfleet.TrainerSettings(**shape), state=state)


async def test_what_was_committed_after_the_checkpoint_is_named(redis_url: str) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await train(hand, 2)
        state = hand.fleet.state_dict()
        await train(hand, 3)
        await hand.fleet.close()
        board = await hand.client.hgetall(hand.fleet.keys.board)
        with pytest.raises(LostBatchesError, match=r"ends at batch 2, .* up to 5 .*accept") as said:
            await again(hand, state).open()
        assert (said.value.saved, said.value.committed) == (2, 5)
        after = await hand.client.hgetall(hand.fleet.keys.board)
        for secret in (b"token", b"who", b"seen_ms"):
            board.pop(secret), after.pop(secret)
        assert after == board, "neither version nor epoch has moved"
        assert not await hand.client.exists(hand.fleet.keys.trainer), "the run was let go of"


async def test_an_accepted_loss_is_counted_and_is_no_loss_the_next_time(redis_url: str) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await train(hand, 2)
        state = hand.fleet.state_dict()
        await train(hand, 3)
        await hand.fleet.close()
        async with again(hand, state, lost_batches="accept") as fleet:
            assert fleet.lost_batches == 3
            second = ByHand(fleet, hand.client)
            await second.groups(2)
            batch = await second.next()
            assert (batch.number, batch.stats["rollfleet/lost_batches"]) == (6, 3)
            await fleet.trained(batch)
            state = fleet.state_dict()
            await fleet.commit(batch)
        async with again(hand, state) as fleet:
            assert fleet.lost_batches == 0


async def test_the_variable_accepts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLFLEET_LOST_BATCHES", "accept")
    assert rollfleet.TrainerSettings.load().lost_batches == "accept"


async def test_without_a_state_the_run_is_taken_wherever_it_is(redis_url: str) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await train(hand, 2)
        await hand.fleet.close()
        async with again(hand, None) as fleet:
            assert (fleet.version, fleet.lost_batches) == (2, 0)


async def test_a_batch_trained_ahead_of_its_turn_is_in_the_state(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, samples_per_version=16, batch_size=8) as hand:
        await hand.groups(4)
        first, second = (await hand.next(), await hand.next())
        await hand.fleet.trained(second)
        state = hand.fleet.state_dict()
        assert (state["batch"], state["beyond"]) == (0, [2])
        await hand.fleet.commit()
        await hand.fleet.close()
        async with again(hand, state) as fleet:
            batch = await fleet.next_batch(8, timeout_s=10)
            assert batch is not None
            assert [g.name for g in batch.groups] == [g.name for g in first.groups]


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_state_that_is_a_function_is_read_when_the_run_is_held(
    redis_url: str, kind: str
) -> None:
    """The living trainer saves and commits more while its successor waits for the run."""
    async with by_hand(redis_url, RUN, lease_s=1.0) as hand:
        await train(hand, 1)
        saved = hand.fleet.state_dict()
        reads: list[bool] = []

        def read() -> dict[str, Any]:
            reads.append(hand.fleet._tenure.claimed)
            return saved

        async def read_async() -> dict[str, Any]:
            return read()

        fleet = again(hand, read if kind == "plain" else read_async)
        coming = asyncio.create_task(fleet.open())
        await train(hand, 2)
        saved = hand.fleet.state_dict()
        assert reads == []
        await hand.fleet.close()
        await coming
        assert reads == [True]
        assert (fleet.version, fleet.commits.number, fleet.lost_batches) == (3, 3, 0)
        await fleet.close()


async def test_the_lease_is_kept_while_the_state_is_read(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, lease_s=1.0) as hand:
        await hand.fleet.close()
        go = asyncio.Event()

        async def slow() -> None:
            await go.wait()

        fleet = again(hand, slow)
        coming = asyncio.create_task(fleet.open())
        key = hand.fleet.keys.trainer
        await wait_until_async(lambda: hand.client.exists(key), "the lease is taken")
        renewed = 0
        hold = fleet.board.hold

        async def held(*args: Any) -> None:
            nonlocal renewed
            await hold(*args)
            renewed += 1

        fleet.board.hold = held  # type: ignore[method-assign]
        await wait_until_async(lambda: renewed >= 3, "the lease was renewed")
        go.set()
        await (await coming).close()


async def test_a_state_that_is_none_is_refused(redis_url: str) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await hand.fleet.close()
        with pytest.raises(rollfleet.SettingsError, match="state is str"):
            await again(hand, lambda: "checkpoint.pt").open()
        with pytest.raises(rollfleet.SettingsError, match="run 'other'"):
            await again(hand, lambda: {"run": "other"}).open()
        async with again(hand, lambda: None) as fleet:
            assert fleet.version == 0


async def test_every_rank_is_told(redis_url: str) -> None:
    async with by_hand(redis_url, RUN, samples_per_version=16, batch_size=8) as hand:
        state = hand.fleet.state_dict()
        await train(hand, 1)
        await hand.fleet.close()
        outcomes, _ = await asyncio.to_thread(
            run_ranks, redis_url, 2, lambda _: None, run=RUN, state=state
        )
        assert [type(outcome.error) for outcome in outcomes] == [LostBatchesError] * 2


@pytest.mark.leaves_keys("the run is left as a crash leaves it")
def test_a_kill_between_commit_and_save_is_told_apart_from_a_crash(
    redis_url: str, processes: Processes
) -> None:
    """With an exit code of its own, every time: a supervisor must not start it again for ever."""
    processes.worker(redis_url, RUN)
    first = processes.trainer(redis_url, RUN, feed=20, steps=1, checkpoint=1)
    assert first.wait() == 0
    (said,) = first.events("state")
    killed = processes.trainer(
        redis_url, RUN, state=said["state"], feed=20, die={"at": "committed", "step": 1}
    )
    assert killed.wait() == -9
    for _ in range(2):
        refused = processes.trainer(redis_url, RUN, state=said["state"], feed=20)
        assert refused.wait() == LostBatchesError.exit_code
        (error,) = refused.events("error")
        assert "up to 2" in error["message"]
    accepted = processes.trainer(
        redis_url,
        RUN,
        state=said["state"],
        feed=20,
        steps=1,
        settings={"lost_batches": "accept"},
    )
    assert accepted.wait() == 0


@pytest.mark.parametrize("given", [{"a": 1}, lambda: {"a": 1}])
async def test_what_is_no_state_is_refused_in_words(redis_url: str, given: Any) -> None:
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run=RUN, samples_per_version=8)
    with pytest.raises(rollfleet.SettingsError, match=r"not what state_dict\(\) returned.*'a'"):
        async with rollfleet.AsyncFleet(settings, state=given):
            pass


async def test_a_trainer_without_a_state_is_told_what_it_goes_on_from(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with by_hand(redis_url, RUN) as hand:
        await train(hand, 2)
        await hand.fleet.close()
        async with rollfleet.AsyncFleet(hand.fleet.settings):
            pass
    assert "no state was given" in caplog.text


async def test_options_of_collate_are_refused_at_once(redis_url: str) -> None:
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run=RUN, samples_per_version=8)
    with pytest.raises(
        rollfleet.SettingsError, match=r"collate has devcie; its options are device"
    ):
        rollfleet.AsyncFleet(settings, collate={"devcie": "cuda"})


async def test_a_fresh_start_that_takes_longer_than_a_lease_keeps_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = 0
    hold = Board.hold

    async def counted(self: Board, token: str, lease_ms: int) -> None:
        nonlocal renewed
        await hold(self, token, lease_ms)
        renewed += 1

    async def slow(client: Any, keys: RunKeys) -> None:
        await wait_until_async(lambda: renewed >= 3, "the lease to be renewed")
        await open_run.wipe(client, keys)

    monkeypatch.setattr(Board, "hold", counted)
    monkeypatch.setattr(aio, "wipe", slow)
    settings = rollfleet.TrainerSettings(
        redis_url=redis_url, run=RUN, samples_per_version=8, lease_s=1.0, fresh=True
    )
    async with rollfleet.AsyncFleet(settings) as fleet:
        assert (await fleet.books()).submitted == 0


async def test_a_run_held_by_who_knows_whom_is_refused_in_printable_words(redis_url: str) -> None:
    settings = rollfleet.TrainerSettings(
        redis_url=redis_url, run=RUN, samples_per_version=8, lease_s=1.0
    )
    async with connect(redis_url, role="test") as client:
        keys = RunKeys(RUN)
        await client.set(keys.trainer, "another", ex=60)
        await client.hset(keys.board, mapping={"token": "another", "who": b"\xff\x1b[2Jx"})
        with pytest.raises(rollfleet.SettingsError, match="is held by trainer") as said:
            await rollfleet.AsyncFleet(settings).open()
        await client.delete(keys.trainer, keys.board)
    assert str(said.value).isprintable()
