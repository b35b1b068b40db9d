import asyncio
import json
from typing import Any

import pytest
from fixtures.rig import INFRA, TOKEN, Rig, delivery_of, prompt_of
from fixtures.tcp_proxy import TcpProxy
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from support import wait_until_async

from rollfleet_common.errors import FailureKind
from rollfleet_common.leases import AttemptFailure, Leases, quarantine
from rollfleet_common.messages import Claim, Kind
from rollfleet_common.redis import connect
from rollfleet_common.scripts import worker as scripts
from rollfleet_common.streams import Delivered, Garbage

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")

DATA = AttemptFailure(FailureKind.DATA, 'it said "no"\nand ended', "w1")


async def _pending(rig: Rig) -> dict[str, tuple[str, int, int]]:
    """Consumer, idle ms and deliveries of every lease."""
    rows = await rig.client.xpending_range(rig.part.prompts("default"), "workers", "-", "+", 10_000)
    return {
        row["message_id"].decode(): (
            row["consumer"].decode(),
            row["time_since_delivered"],
            row["times_delivered"],
        )
        for row in rows
    }


async def _age(rig: Rig, idle_ms: int, *entries: str, worker: str = "w1") -> None:
    """Make leases look as if they had not been renewed for so long."""
    key = rig.part.prompts("default")
    await rig.client.xclaim(key, "workers", worker, 0, list(entries), idle=idle_ms, justid=True)


# ---- renew ---------------------------------------------------------------------------------------


async def test_renew_keeps_own_leases_and_names_the_lost(rig: Rig):
    await rig.submit(prompt_of("g", 4))
    mine, stolen, cancelled, delivered = await rig.claim()
    key = rig.part.prompts("default")
    await _age(rig, 60_000, mine.entry)
    await rig.client.xclaim(key, "workers", "w2", 0, [stolen.entry])
    await rig.client.xack(key, "workers", cancelled.entry)
    await rig.client.xdel(key, cancelled.entry)
    await rig.streams.deliver("w1", [delivery_of(delivered)])
    entries = [c.entry for c in (mine, stolen, cancelled, delivered)]
    assert await rig.leases().renew("default", [*entries, "5-5"]) == [*entries[1:], "5-5"]
    pending = await _pending(rig)
    owner, idle, deliveries = pending[mine.entry]
    assert (owner, deliveries) == ("w1", 1)
    assert idle < 60_000
    assert pending[stolen.entry][0] == "w2"


async def test_renew_of_thousands(rig: Rig):
    await rig.submit(prompt_of("g", 2500))
    entries = [claim.entry for claim in await rig.claim(2500)]
    await _age(rig, 60_000, *entries)
    assert await rig.leases().renew("default", entries) == []
    assert max(idle for _, idle, _ in (await _pending(rig)).values()) < 60_000
    assert await rig.leases("w2").renew("default", entries) == entries


async def test_renew_of_nothing_asks_nothing(rig: Rig):
    assert await rig.leases().renew("default", []) == []


# ---- reclaim -------------------------------------------------------------------------------------


async def test_reclaim_takes_what_nobody_renewed_and_counts_deliveries(rig: Rig):
    await rig.submit(prompt_of("g", 3))
    dead, _alive = await rig.claim(2)
    await _age(rig, 10_000, dead.entry)
    leases = rig.leases("w2")
    assert await leases.reclaim(rig.streams, "default", 60_000, 9) == []
    ((claim, deliveries, owner),) = await leases.reclaim(rig.streams, "default", 5_000, 9)
    assert isinstance(claim, Claim)
    assert (claim.entry, claim.index, deliveries, owner) == (dead.entry, dead.index, 2, "w1")
    assert claim.prompt.group == "g"
    # It is fresh in the new hands.
    assert await leases.reclaim(rig.streams, "default", 5_000, 9) == []
    await _age(rig, 10_000, dead.entry, worker="w2")
    ((_, deliveries, owner),) = await rig.leases("w3").reclaim(rig.streams, "default", 5_000, 9)
    assert (deliveries, owner) == (3, "w2")
    assert (await rig.books()).in_flight == 2


async def test_reclaim_finds_the_dead_in_a_busy_fleet(rig: Rig):
    await rig.submit(prompt_of("busy", 3000), prompt_of("dead", 5))
    claims = await rig.claim(4000)
    dead = [claim.entry for claim in claims if claim.prompt.group == "dead"]
    await _age(rig, 60_000, *dead)
    leases = rig.leases("w2")
    first = await leases.reclaim(rig.streams, "default", 30_000, 3)
    rest = await leases.reclaim(rig.streams, "default", 30_000, 3)
    taken = [row[0].entry for row in first + rest]
    assert taken == dead


async def test_reclaim_finds_ones_own_stranded_leases(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await _age(rig, 10_000, claim.entry)
    ((again, _, owner),) = await rig.leases().reclaim(rig.streams, "default", 5_000, 9)
    assert (again.entry, owner) == (claim.entry, "w1")


async def test_reclaim_hands_on_garbage_and_passes_over_what_was_deleted(rig: Rig):
    key = rig.part.prompts("default")
    await rig.client.xadd(key, {"x": "y"})
    await rig.submit(prompt_of("g", 2))
    claims, _ = await rig.streams.claim(rig.client, "w1", ["default"], 9, None)
    await rig.client.xdel(key, claims[0].entry)
    taken = await rig.leases("w2").reclaim(rig.streams, "default", 0, 9)
    assert [type(row[0]) for row in taken] == [Garbage, Claim]
    assert taken[1][0].entry == claims[1].entry
    assert claims[0].entry not in await _pending(rig)


# ---- fail ----------------------------------------------------------------------------------------


async def test_a_failure_with_attempts_left_is_parked_with_its_history(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    assert await rig.leases().fail(claim, DATA, 60_000)
    books = await rig.books()
    assert (books.delayed, books.in_flight, books.waiting, books.outstanding) == (1, 0, 0, 1)
    assert books.counters["retried:data"] == 1
    assert (await rig.record("g"))["0"] == "d"
    promoted, wait_ms = await rig.leases().promote("default")
    assert promoted == 0
    assert 50_000 < wait_ms <= 60_000


async def test_history_and_attempt_grow_over_failures_and_end_in_the_grave(rig: Rig):
    sent = prompt_of("g:1", 3, task="math", position=7)
    await rig.submit(sent)
    leases = rig.leases()
    (claim,) = await rig.claim(1)
    for attempt, failure in enumerate((INFRA, DATA, INFRA), 1):
        assert claim.attempt == attempt
        assert [json.loads(line)["attempt"] for line in claim.history.splitlines()] == [
            *range(1, attempt)
        ]
        assert await leases.fail(claim, failure, 0)
        assert await leases.promote("default") == (1, -1)
        waiting = await rig.claim()
        (claim,) = [c for c in waiting if c.attempt > 1]
    assert claim.prompt.token_ids.tolist() == sent.token_ids.tolist()
    assert (claim.index, claim.prompt.group) == (0, "g:1")
    assert (await rig.record("g:1"))["0"] == f"p{claim.entry}"

    assert await leases.fail(claim, DATA, None)
    books = await rig.books()
    assert (books.dead, books.dead_letters, books.tombstones, books.delayed) == (1, 1, 1, 0)
    assert (books.counters["dead:data"], books.counters["retried:infra"]) == (1, 2)
    assert books.outstanding == 2
    (letter,) = await rig.dead()
    assert (letter["g"], letter["i"], letter["a"], letter["k"]) == ("g:1", "0", "4", "train")
    assert (letter["n"], letter["why"]) == ("3", "data")
    history = [json.loads(line) for line in letter["e"].splitlines()]
    assert [(h["attempt"], h["kind"]) for h in history] == [
        (1, "infra"),
        (2, "data"),
        (3, "infra"),
        (4, "data"),
    ]
    assert history[1]["detail"] == DATA.detail
    (stone,) = await rig.tombstones()
    assert (stone["g"], stone["i"], stone["n"], stone["t"]) == ("g:1", "0", "3", "math")
    assert (stone["p"], stone["r"]) == ("7", "dead")
    assert (await rig.record("g:1"))["0"] == "x"


async def test_a_dead_evaluation_returns_no_training_credit(rig: Rig):
    await rig.submit(prompt_of("e", 1, kind=Kind.EVAL), prompt_of("t", 1))
    evaluation, _ = await rig.claim()
    assert await rig.leases().fail(evaluation, INFRA, None)
    books = await rig.books()
    assert (books.outstanding, books.dead, books.counters["settled:eval"]) == (1, 1, 1)


@pytest.mark.parametrize("delay_ms", [0, 60_000, None])
async def test_a_failure_ends_its_own_lease_only(rig: Rig, delay_ms: int | None):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim(worker="zombie")
    await rig.leases("w2").reclaim(rig.streams, "default", 0, 1)
    before = await rig.snapshot()
    assert not await rig.leases("zombie").fail(claim, INFRA, delay_ms)
    assert await rig.snapshot() == before
    assert await rig.leases("w2").fail(claim, INFRA, delay_ms)
    before = await rig.snapshot()
    assert not await rig.leases("w2").fail(claim, INFRA, delay_ms)
    assert await rig.snapshot() == before
    await rig.books()


async def test_a_lost_reply_of_fail_parks_once_and_buries_once(rig: Rig, redis_url: str):
    await rig.submit(prompt_of("g", 3))
    parked, buried, _ = await rig.claim()
    assert await rig.leases().fail(parked, INFRA, 0)
    # Its reply was lost, and its repeat comes when the next attempt is under way already.
    await rig.leases().promote("default")
    (second,) = await rig.claim(worker="w2")
    assert not await rig.leases().fail(parked, INFRA, 0)
    assert (await rig.books()).in_flight == 3
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        leases = Leases(client, rig.part, "w1")
        await client.ping()
        proxy.drop_replies(b"EVALSHA")
        with pytest.raises(RedisConnectionError):
            await leases.fail(buried, INFRA, None)
        proxy.resume()
        assert not await leases.fail(buried, INFRA, None)
        await client.aclose()
    books = await rig.books()
    assert (books.dead, books.dead_letters, books.tombstones, books.in_flight) == (1, 1, 1, 2)
    assert second.attempt == 2


async def test_out_of_memory_leaves_a_failed_prompt_pending(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    first, second = await rig.claim()
    before = await rig.snapshot()
    await rig.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(OutOfMemoryError):
            await rig.leases().fail(first, INFRA, 0)
        with pytest.raises(OutOfMemoryError):
            await rig.leases().fail(second, INFRA, None)
        with pytest.raises(OutOfMemoryError):
            await rig.leases().hand_back("default", [(first.entry, "g")])
        assert await rig.snapshot() == before
    finally:
        await rig.client.config_set("maxmemory", "0")
    assert await rig.leases().fail(first, INFRA, 0)


async def test_failing_a_lease_whose_entry_was_deleted_ends_the_lease(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.xdel(rig.part.prompts("default"), claim.entry)
    assert not await rig.leases().fail(claim, INFRA, 0)
    assert await _pending(rig) == {}


async def test_a_failure_after_its_group_was_forgotten_makes_no_record_anew(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.delete(rig.part.group("g"))
    assert await rig.leases().fail(claim, INFRA, 0)
    await rig.leases().promote("default")
    (claim,) = await rig.claim()
    assert await rig.leases().hand_back("default", [(claim.entry, "g")]) == 1
    (claim,) = await rig.claim()
    await rig.streams.deliver("w1", [delivery_of(claim)])
    assert await rig.record("g") == {}


# ---- promote -------------------------------------------------------------------------------------


async def test_promote_takes_the_due_in_order_and_no_more_than_asked(rig: Rig):
    await rig.submit(prompt_of("g", 5))
    claims = await rig.claim()
    leases = rig.leases()
    for claim in claims[:4]:
        assert await leases.fail(claim, INFRA, 0)
    assert await leases.fail(claims[4], INFRA, 60_000)
    await wait_until_async(lambda: _due(rig, 4), "four delayed prompts to be due")
    promoted, wait_ms = await leases.promote("default", 3)
    assert (promoted, wait_ms) == (3, 0)
    promoted, wait_ms = await leases.promote("default", 3)
    assert promoted == 1
    assert wait_ms > 50_000
    assert [c.index for c in await rig.claim()] == [0, 1, 2, 3]
    books = await rig.books()
    assert (books.delayed, books.in_flight) == (1, 4)


async def _due(rig: Rig, count: int) -> bool:
    seconds, micros = await rig.client.time()
    now_ms = seconds * 1000 + micros // 1000
    return await rig.client.zcount(rig.part.delayed("default"), "-inf", now_ms) == count


async def test_promoting_nothing(rig: Rig):
    assert await rig.leases().promote("default") == (0, -1)
    assert await rig.leases().promote("never-seen") == (0, -1)


async def test_a_lost_reply_of_promote_brings_a_prompt_back_once(rig: Rig, redis_url: str):
    await rig.submit(prompt_of("g", 2))
    for claim in await rig.claim():
        assert await rig.leases().fail(claim, INFRA, 0)
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        leases = Leases(client, rig.part, "w1")
        members, _ = await scripts.due(client, rig.part, route="default", at_most=9)
        await scripts.promote(client, rig.part, route="never-seen", members=[b"g:0"])
        proxy.drop_replies(b"EVALSHA")
        with pytest.raises(RedisConnectionError):
            await scripts.promote(client, rig.part, route="default", members=members)
        proxy.resume()
        assert await leases.promote("default") == (0, -1)
        await client.aclose()
    assert sorted(c.index for c in await rig.claim()) == [0, 1]


async def test_promote_wakes_a_blocked_claim(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    assert await rig.leases().fail(claim, INFRA, 0)
    waiting = asyncio.create_task(rig.streams.claim(rig.reader, "w2", ["default"], 1, 2000))
    await rig.leases().promote("default")
    ((again,), _) = await waiting
    assert again.attempt == 2


async def test_out_of_memory_promotes_nothing(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    assert await rig.leases().fail(claim, INFRA, 0)
    before = await rig.snapshot()
    await rig.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(OutOfMemoryError):
            await rig.leases().promote("default")
        assert await rig.snapshot() == before
    finally:
        await rig.client.config_set("maxmemory", "0")
    assert await rig.leases().promote("default") == (1, -1)


# ---- hand back -----------------------------------------------------------------------------------


async def test_hand_back_keeps_attempt_and_history_and_the_record_follows(rig: Rig):
    await rig.submit(prompt_of("g", 3))
    first, second, kept = await rig.claim()
    assert await rig.leases().fail(first, DATA, 0)
    await rig.leases().promote("default")
    (first,) = await rig.claim()
    await rig.client.xclaim(rig.part.prompts("default"), "workers", "w9", 0, [kept.entry])
    held = [(entry, "g") for entry in (first.entry, second.entry, kept.entry, "5-5")]
    assert await rig.leases().hand_back("default", held) == 2
    assert await rig.leases().hand_back("default", held) == 0
    books = await rig.books()
    assert (books.waiting, books.in_flight) == (2, 1)
    again = await rig.claim(worker="w2")
    assert [(c.index, c.attempt) for c in again] == [(first.index, 2), (second.index, 1)]
    assert again[0].history == first.history
    record = await rig.record("g")
    assert record[str(first.index)] == f"p{again[0].entry}"
    assert record[str(second.index)] == f"p{again[1].entry}"


async def test_hand_back_wakes_a_blocked_claim(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    waiting = asyncio.create_task(rig.streams.claim(rig.reader, "w2", ["default"], 1, 2000))
    assert await rig.leases().hand_back("default", [(claim.entry, "g")]) == 1
    ((again,), _) = await waiting
    assert (again.index, again.attempt) == (0, 1)


async def test_a_lost_reply_of_hand_back_gives_back_once(rig: Rig, redis_url: str):
    await rig.submit(prompt_of("g", 2))
    held = [(claim.entry, "g") for claim in await rig.claim()]
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        leases = Leases(client, rig.part, "w1")
        await leases.hand_back("default", [("5-5", "g")])
        proxy.drop_replies(b"EVALSHA")
        with pytest.raises(RedisConnectionError):
            await leases.hand_back("default", held)
        proxy.resume()
        # Another worker has them by now.
        assert len(await rig.claim(worker="w2")) == 2
        assert await leases.hand_back("default", held) == 0
        await client.aclose()
    assert (await rig.books()).in_flight == 2


async def test_a_delivery_after_hand_back_is_gone(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.leases().hand_back("default", [(claim.entry, "g")])
    assert await rig.streams.deliver("w1", [delivery_of(claim)]) == [Delivered.GONE]
    await rig.books()


# ---- bury and quarantine -------------------------------------------------------------------------


async def test_an_undecodable_prompt_of_ours_dies_and_closes_its_group(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    # What a reader of another release would see: an entry that submit wrote, of unknown bytes.
    _, claim = await rig.claim()
    ((_, fields),) = await rig.client.xrange(rig.part.prompts("default"), claim.entry, claim.entry)
    garbage = Garbage(claim.entry, "wire version 9", fields, "default")
    await rig.leases().quarantine(garbage)
    await rig.leases().quarantine(garbage)
    books = await rig.books()
    assert (books.dead, books.dead_letters, books.in_flight, books.outstanding) == (1, 1, 1, 1)
    (letter,) = await rig.dead()
    assert "wire version 9" in letter["e"]
    (stone,) = await rig.tombstones()
    assert (stone["g"], stone["i"], stone["r"]) == ("g", "1", "dead")


@pytest.mark.parametrize(
    "fields",
    [
        {"x": b"\xff\x00"},
        {"g": "g", "i": 0, "a": 1, "k": "train", "n": 1, "d": b"junk"},
        {"g": b"\xff", "i": b"\xfe", "d": b""},
        {"g": "stranger"},
        {"i": "0"},
        {f"field-{i}": i for i in range(5000)},
    ],
    ids=["bytes", "imitation", "latin", "no index", "no group", "thousands of fields"],
)
async def test_garbage_is_kept_among_the_dead_outside_the_law(rig: Rig, fields: dict[str, Any]):
    await rig.submit(prompt_of("g", 1))
    entry = await rig.client.xadd(rig.part.prompts("default"), fields)
    claims, (bad,) = await rig.streams.claim(rig.client, "w1", ["default"], 9, None)
    await rig.leases().quarantine(bad)
    await rig.leases().quarantine(bad)
    books = await rig.books()
    assert (books.dead, books.dead_letters, books.counters["garbage"]) == (0, 1, 1)
    assert books.in_flight == len(claims) == 1
    assert not await rig.client.xrange(rig.part.prompts("default"), entry, entry)
    ((_, letter),) = await rig.client.xrange(rig.part.dead)
    assert letter[b"why"] == b"garbage"
    assert letter[b"e"] == bad.why.encode()
    assert letter[b"from"] == rig.part.prompts("default").encode()
    name, value = next(iter(bad.fields.items()))
    assert letter[name] == value


async def test_the_trainers_garbage_is_quarantined_too(rig: Rig):
    await rig.client.xadd(rig.part.rollouts, {"h": b"\xc1"})
    (bad,) = (await rig.streams.consume(rig.client, TOKEN, 9, None)).garbage
    await quarantine(rig.client, rig.part, rig.part.rollouts, "trainer", bad)
    books = await rig.books()
    assert (books.ready, books.handed_out, books.counters["garbage"]) == (0, 0, 1)


async def test_garbage_that_another_worker_holds_by_now_is_left_to_it(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    ((_, fields),) = await rig.client.xrange(rig.part.prompts("default"))
    await rig.leases("w2").reclaim(rig.streams, "default", 0, 1)
    await rig.leases().quarantine(Garbage(claim.entry, "?", fields, "default"))
    assert (await rig.books()).in_flight == 1


# ---- reap ----------------------------------------------------------------------------------------


async def test_reap_forgets_the_idle_but_never_who_holds_a_lease(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    await rig.claim(worker="busy")
    key = rig.part.prompts("default")
    # A read that brings nothing makes no consumer before Redis 7.2.
    await rig.client.xgroup_createconsumer(key, "workers", "idle")
    assert await rig.leases().reap("default", 3_600_000) == 0
    assert await rig.leases().reap("default", 0) == 1
    assert [c["name"] for c in await rig.client.xinfo_consumers(key, "workers")] == [b"busy"]
    assert (await rig.books()).in_flight == 1


def test_a_failure_is_recorded_in_one_bounded_line():
    record = AttemptFailure(FailureKind.INFRA, "x\n" * 10_000, "w").record(3, 17)
    assert "\n" not in record
    assert len(record) < 2000
    assert json.loads(record)["attempt"] == 3
