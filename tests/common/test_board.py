import asyncio
from typing import Any

import pytest
from fixtures.rig import SHAPE, TOKEN, Rig
from fixtures.tcp_proxy import TcpProxy
from redis.exceptions import ConnectionError as RedisConnectionError

from rollfleet_common.board import Board, Claimed, Seized, Shape
from rollfleet_common.errors import SupersededError
from rollfleet_common.messages import PolicyVersion
from rollfleet_common.redis import connect
from rollfleet_common.staleness import replayed

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")


@pytest.fixture
def board(rig: Rig) -> Board:
    """The board of a run that trainer-1 holds, in its first epoch."""
    return rig.board


async def test_a_board_that_nobody_opened_says_nothing(redis_url: str):
    rig = Rig(redis_url, "fresh")
    assert await rig.board.read() is None
    assert await rig.board.last_batch() == 0
    assert await rig.board.rollbacks() == []
    assert await rig.board.plans() == {}
    with pytest.raises(SupersededError, match="fresh"):
        await rig.board.publish(TOKEN, {"version": 1})
    with pytest.raises(SupersededError):
        await rig.board.hold(TOKEN, 1000)
    await rig.close()


async def test_seize_takes_a_free_run_and_says_where_it_stands(board: Board):
    assert await board.read() == (PolicyVersion(version=0, epoch=1), SHAPE)
    assert await board.rollbacks() == [(1, 0)]


async def test_seize_is_refused_while_the_lease_runs_and_changes_nothing(rig: Rig, board: Board):
    before = await rig.client.hgetall(rig.keys.board)
    refused = await board.seize("trainer-2", 9000, "you", SHAPE, version=5, take_over=False)
    assert not refused.ok
    assert refused.holder == TOKEN
    assert 0 < refused.left_ms <= 20_000
    assert await rig.client.hgetall(rig.keys.board) == before
    assert await rig.client.get(rig.keys.trainer) == TOKEN.encode()


async def test_seize_takes_over_on_demand_and_the_old_trainer_can_do_no_more(board: Board):
    taken = await board.seize("trainer-2", 9000, "you", SHAPE, version=-1, take_over=True)
    assert taken == Seized(ok=True, epoch=2, version=0)
    for step in (
        lambda: board.publish(TOKEN, {"version": 9}),
        lambda: board.hold(TOKEN, 1000),
        lambda: board.plan(TOKEN, 3, b"plan"),
        lambda: board.plan(TOKEN, 3, None),
    ):
        with pytest.raises(SupersededError, match="another trainer"):
            await step()
    await board.release(TOKEN)  # lets go of nothing
    assert not (await board.seize(TOKEN, 9000, "me", SHAPE, version=-1, take_over=False)).ok
    policy, _ = await board.read() or pytest.fail("no board")
    assert policy.version == 0
    assert await board.plans() == {}


async def test_a_released_run_is_free_at_once_and_a_lease_that_ran_out_too(rig: Rig, board: Board):
    await board.publish(TOKEN, {"version": 4})
    await board.release(TOKEN)
    await board.release(TOKEN)
    second = await board.seize("trainer-2", 9000, "you", SHAPE, version=-1, take_over=False)
    assert second == Seized(ok=True, epoch=2, version=4)
    await rig.client.delete(rig.keys.trainer)  # as its TTL does
    third = await board.seize("trainer-3", 9000, "they", SHAPE, version=-1, take_over=False)
    assert third == Seized(ok=True, epoch=3, version=4)


async def test_a_lease_that_merely_ran_out_is_taken_again(rig: Rig, board: Board):
    await rig.client.delete(rig.keys.trainer)
    await board.hold(TOKEN, 7000)
    assert 0 < await rig.client.pttl(rig.keys.trainer) <= 7000


async def test_resuming_at_an_older_version_is_a_rollback(board: Board):
    await board.publish(TOKEN, {"version": 9})
    await board.release(TOKEN)
    seized = await board.seize("trainer-2", 9000, "you", SHAPE, version=6, take_over=False)
    assert seized.version == 6
    assert await board.rollbacks() == [(1, 0), (2, 6)]
    assert replayed(9, 1, await board.rollbacks()) == 3
    policy, _ = await board.read() or pytest.fail("no board")
    assert (policy.version, policy.epoch) == (6, 2)


async def test_a_lost_reply_of_seize_is_repeated_without_harm(rig: Rig, redis_url: str):
    await rig.board.publish(TOKEN, {"version": 9})
    await rig.board.release(TOKEN)
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        board = Board(client, rig.keys)
        await client.ping()
        proxy.drop_replies(b"EVAL")
        with pytest.raises(RedisConnectionError):
            await board.seize("trainer-2", 9000, "you", SHAPE, version=6, take_over=False)
        proxy.resume()
        again = await board.seize("trainer-2", 9000, "you", SHAPE, version=6, take_over=False)
        await client.aclose()
    assert again.ok
    assert again.version == 6
    # However many epochs it took, a lost version stands where it stood.
    rollbacks = await rig.board.rollbacks()
    assert [replayed(v, 1, rollbacks) for v in (5, 6, 7, 9)] == [5, 6, 5, 3]


async def test_publish_tells_everything_and_wakes_those_who_follow(rig: Rig, board: Board):
    follower = Board(rig.reader, rig.keys)
    waiting = asyncio.create_task(follower.wait(rig.reader, "0", 2000))
    last = await waiting  # the seizure itself was news
    waiting = asyncio.create_task(follower.wait(rig.reader, last, 2000))
    fields: dict[str, int | str] = {"version": 3, "weights": "/w/3", "paused_until_ms": 77}
    await board.publish(TOKEN, fields)
    assert await waiting > last
    policy, _ = await board.read() or pytest.fail("no board")
    assert policy == PolicyVersion(version=3, epoch=1, weights="/w/3", paused_until_ms=77)
    # Nothing of it was lost by publishing a part only.
    await board.publish(TOKEN, {"paused_until_ms": 0})
    policy, _ = await board.read() or pytest.fail("no board")
    assert policy == PolicyVersion(version=3, epoch=1, weights="/w/3")


async def test_waiting_in_vain_ends_and_keeps_its_place(rig: Rig, board: Board):
    last = await board.wait(rig.reader, "0", 50)
    assert await board.wait(rig.reader, last, 50) == last
    assert await board.wait(rig.reader, "$", 50) == "$"


async def test_several_news_are_one_waking(rig: Rig, board: Board):
    for version in range(1, 200):
        await board.publish(TOKEN, {"version": version})
    last = await board.wait(rig.reader, "0", 50)
    assert await board.wait(rig.reader, last, 50) == last
    # The stream is capped, though followers that were away lose nothing: the board is read.
    assert await rig.client.xlen(rig.keys.news) <= 64


async def test_plans_stand_until_they_are_forgotten(board: Board):
    await board.plan(TOKEN, 10, b"ten")
    await board.plan(TOKEN, 9, b"nine")
    await board.plan(TOKEN, 10, b"ten, trained")
    assert list((await board.plans()).items()) == [(9, b"nine"), (10, b"ten, trained")]
    await board.plan(TOKEN, 10, None)
    await board.plan(TOKEN, 10, None)
    await board.plan(TOKEN, 9, None)
    assert await board.plans() == {}
    # The number is not handed out again.
    assert await board.last_batch() == 10


def test_the_shape_of_a_newer_release_can_be_read():
    text = SHAPE.dumps().replace("{", '{"unheard_of": 1, ', 1)
    assert Shape.loads(text) == SHAPE


async def test_a_claim_shuts_the_last_trainer_out_and_moves_nothing_else(rig: Rig, board: Board):
    await board.plan(TOKEN, 3, b"plan", committed=True)
    await board.plan(TOKEN, 2, b"plan", committed=True)
    before = await rig.client.hgetall(rig.keys.board)
    refused = await board.claim("trainer-2", 9000, "you", take_over=False)
    assert (refused.ok, refused.holder) == (False, TOKEN)
    assert await rig.client.hgetall(rig.keys.board) == before
    for _ in range(2):  # a repeat only renews
        assert await board.claim("trainer-2", 9000, "you", take_over=True) == Claimed(True, 3)
    after = await rig.client.hgetall(rig.keys.board)
    assert after == before | {b"token": b"trainer-2", b"who": b"you"}
    with pytest.raises(SupersededError):
        await board.plan(TOKEN, 4, b"plan", committed=True)
