"""Scripts that are given keys by what was read before: they look again, and refuse what has changed."""

import asyncio
from typing import Any

import pytest
from fixtures.rig import INFRA, TOKEN, Rig, delivery_of, prompt_of
from hypothesis import given
from hypothesis import strategies as st
from support import wait_until_async

from rollfleet_common.leases import Leases
from rollfleet_common.redis import connect
from rollfleet_common.scripts import worker
from rollfleet_common.scripts.worker import HandedBack

pytestmark = pytest.mark.usefixtures("declared_keys")


async def delayed(rig: Rig, n: int) -> list[bytes]:
    """`n` members of group g that wait for their next attempt, and are due."""
    await rig.submit(prompt_of("g", n))
    for claim in await rig.claim():
        assert await rig.leases().fail(claim, INFRA, 0)

    async def due() -> bool:
        return len((await worker.due(rig.client, rig.part, route="default", at_most=n))[0]) == n

    await wait_until_async(due, "the delayed prompts to be due")
    members, wait_ms = await worker.due(rig.client, rig.part, route="default", at_most=n)
    assert wait_ms == 0
    return members


async def promote(rig: Rig, members: list[bytes], client: Any = None) -> int:
    done, _ = await worker.promote(client or rig.client, rig.part, route="default", members=members)
    return done


async def test_two_that_read_the_same_promote_each_member_once(rig: Rig):
    members = await delayed(rig, 4)
    assert members == [b"g:0", b"g:1", b"g:2", b"g:3"]
    assert await promote(rig, members[:3]) == 3
    assert await promote(rig, members) == 1
    assert await promote(rig, members) == 0
    assert sorted(c.index for c in await rig.claim()) == [0, 1, 2, 3]
    assert (await rig.books()).in_flight == 4


async def test_promoters_race(rig: Rig, redis_url: str):
    await delayed(rig, 200)
    clients = [connect(redis_url, role="racer") for _ in range(4)]

    async def all_of(client: Any) -> int:
        done, leases = 0, Leases(client, rig.part, "w")
        while True:
            some, wait_ms = await leases.promote("default", 7)
            done += some
            if wait_ms == -1:
                return done

    assert sum(await asyncio.gather(*map(all_of, clients))) == 200
    assert sorted(c.index for c in await rig.claim()) == list(range(200))
    for client in clients:
        await client.aclose()
    books = await rig.books()
    assert (books.in_flight, books.delayed, books.waiting) == (200, 0, 0)


async def test_what_was_delayed_anew_meanwhile_stays(rig: Rig):
    members = await delayed(rig, 1)
    await rig.leases("w2").promote("default")
    (claim,) = await rig.claim(worker="w2")
    assert await rig.leases("w2").fail(claim, INFRA, 60_000)
    assert await promote(rig, members) == 0
    assert (await rig.books()).delayed == 1
    assert (await rig.record("g"))["0"] == "d"


async def test_what_was_cancelled_meanwhile_does_not_come_back(rig: Rig):
    members = await delayed(rig, 2)
    assert await rig.streams.cancel(TOKEN, prompt_of("g", 2), "surplus", 9) == 2
    assert await promote(rig, members) == 0
    assert await rig.claim() == []
    await rig.books()


async def test_a_member_with_the_record_of_another_group_is_left_alone(rig: Rig):
    members = await delayed(rig, 1)
    await rig.submit(prompt_of("other", 1))
    before = await rig.record("other")
    k = rig.part
    keys = [k.prompts("default"), k.delayed("default"), k.parked("default")]
    script = worker._PROMOTE
    for key in (k.group("other"), k.group(""), k.group("gg"), k.payload("group:gx")):
        assert (await script(rig.client, [*keys, key], members))[0] == 0
    assert await rig.record("other") == before
    assert (await script(rig.client, [*keys, k.group("g")], members))[0] == 1


async def test_what_was_parked_for_another_group_is_no_prompt_of_this_one(rig: Rig):
    """Whoever may write the hash may not thereby move a member of a group that he was not given."""
    members = await delayed(rig, 1)
    await rig.submit(prompt_of("other", 1))
    before = await rig.record("other")
    packed = await rig.client.hget(rig.part.parked("default"), "g:0")
    forged = packed.replace(b"1:g1:0", b"5:other1:0", 1)
    assert forged != packed
    await rig.client.hset(rig.part.parked("default"), "g:0", forged)
    assert await promote(rig, members) == 1
    assert await rig.record("other") == before
    (claim,), (garbage,) = await rig.streams.claim(rig.client, "w1", ["default"], 9, None)
    assert claim.prompt.group == "other"
    await rig.leases().quarantine(garbage)
    assert [stone["r"] for stone in await rig.tombstones()] == ["dead"]
    assert (await rig.books()).dead == 1


@given(st.text(min_size=1), st.integers(0, 2**31))
def test_a_member_names_its_group(group: str, index: int):
    raw = group.encode("utf-8", "surrogatepass")
    assert worker._group_of(raw + b":%d" % index) == raw


@given(st.binary())
def test_any_bytes_name_a_group_or_none(raw: bytes):
    group = worker._group_of(raw)
    assert group == b"" or raw.startswith(group + b":")


async def test_a_lease_with_the_record_of_another_group_is_not_handed_back(rig: Rig):
    await rig.submit(prompt_of("g", 1), prompt_of("other", 1))
    mine, other = await rig.claim()
    before = await rig.record("other")
    states = await worker.handback(
        rig.client,
        rig.part,
        route="default",
        consumer="w1",
        leases=[(mine.entry, "other"), (other.entry, "other"), ("5-5", "g")],
    )
    assert states == [HandedBack.OTHER_GROUP, HandedBack.YES, HandedBack.GONE]
    assert (await rig.record("g"))["0"] == f"p{mine.entry}"
    assert await rig.record("other") != before
    assert await rig.leases().renew("default", [mine.entry]) == []
    assert (await rig.books()).in_flight == 1
    assert len(await rig.streams.deliver("w1", [delivery_of(mine)])) == 1


async def _gets(rig: Rig) -> int:
    """How many GET the server has run."""
    stats = await rig.client.info("commandstats")
    return int(stats.get("cmdstat_get", {"calls": 0})["calls"])


async def test_while_nobody_records_the_way_of_a_rollout_asks_for_no_tap(rig: Rig):
    """Deliver and train read nothing for a recorder; commit and drop read one key a call."""
    await rig.submit(prompt_of("g", 50))
    claims = await rig.claim()
    before = await _gets(rig)
    await rig.streams.deliver("w1", [delivery_of(claim) for claim in claims])
    headers = await rig.headers()
    assert await rig.settle("train", headers) == 50
    assert await _gets(rig) == before
    assert await rig.settle("commit:1:0", headers, groups=["g"]) == 50
    assert await _gets(rig) == before + 1
