import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from fixtures.rig import INFRA, TOKEN, Rig, delivery_of, prompt_of
from fixtures.tcp_proxy import TcpProxy
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from rollfleet_common import scripts
from rollfleet_common.codec import decode_samples, encode_prompt
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.errors import InvalidPromptError, OversizeError, SupersededError
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Kind
from rollfleet_common.redis import connect
from rollfleet_common.streams import Delivered, Garbage, Streams, Submission, Submitted

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")

YES, KNOWN, FULL = Submitted.YES, Submitted.KNOWN, Submitted.FULL


# ---- submit --------------------------------------------------------------------------------------


async def test_submit_writes_every_sample_and_the_group_record(rig: Rig):
    assert await rig.submit(prompt_of("g", 3, deadline_ms=77)) == ([YES], 3)
    rows = await rig.client.xrange(rig.part.prompts("default"))
    assert [(f[b"g"], f[b"i"], f[b"a"], f[b"k"], f[b"n"]) for _, f in rows] == [
        (b"g", str(i).encode(), b"1", b"train", b"3") for i in range(3)
    ]
    assert await rig.record("g") == {
        "n": "3",
        "kind": "train",
        "route": "default",
        "deadline": "77",
        **{str(i): f"p{entry.decode()}" for i, (entry, _) in enumerate(rows)},
    }
    books = await rig.books()
    assert (books.submitted, books.waiting, books.outstanding) == (3, 3, 3)
    assert books.waiting_by_route == {"default": 3}


async def test_a_repeated_submission_changes_nothing(rig: Rig):
    by_name, by_position = prompt_of("a"), prompt_of("b", position=0)
    await rig.submit(by_name, by_position)
    before = await rig.snapshot()
    assert await rig.submit(by_name, by_position) == ([KNOWN, KNOWN], 4)
    assert await rig.snapshot() == before


async def test_what_is_fed_is_known_by_its_position_alone(rig: Rig):
    await rig.submit(prompt_of("p7", position=7))
    states, _ = await rig.streams.submit(
        TOKEN, -1, [Submission("another id", prompt_of("p6", position=6))], 1 << 20
    )
    assert states == [KNOWN]
    assert await rig.streams.open(TOKEN, 1, 0, 0) == 7


async def test_a_group_is_submitted_whole_or_not_at_all(rig: Rig):
    # The third would fit, but may not overtake the second.
    states, outstanding = await rig.submit(
        prompt_of("a", 4), prompt_of("b", 4), prompt_of("c", 1), limit=7
    )
    assert (states, outstanding) == ([YES, FULL, FULL], 4)
    assert await rig.client.xlen(rig.part.prompts("default")) == 4
    assert await rig.record("b") == await rig.record("c") == {}
    assert await rig.submit(prompt_of("b", 4), limit=8) == ([YES], 8)


async def test_nothing_fed_overtakes_what_was_full_not_even_an_evaluation(rig: Rig):
    fed = [
        prompt_of("p0", 4, position=0),
        prompt_of("p1", 4, position=1),
        prompt_of("p2", 4, position=2, kind=Kind.EVAL),
    ]
    assert await rig.submit(*fed, limit=4) == ([YES, FULL, FULL], 4)
    assert await rig.streams.open(TOKEN, 1, 0, 0) == 0
    assert (await rig.submit(*fed[1:], limit=8))[0] == [YES, YES]


async def test_evaluation_is_outside_pacing(rig: Rig):
    assert await rig.submit(prompt_of("e", 9, kind=Kind.EVAL), limit=0) == ([YES], 0)
    books = await rig.books()
    assert (books.submitted, books.outstanding) == (9, 0)


async def test_limits_count_what_is_not_settled_yet(rig: Rig):
    headers = await rig.delivered(prompt_of("a", 4))
    assert (await rig.submit(prompt_of("b", 4), limit=4))[0] == [FULL]
    await rig.settle("train", headers[:2])
    assert await rig.submit(prompt_of("c", 2), limit=4) == ([YES], 4)


async def test_a_group_of_thousands_is_whole(rig: Rig):
    # Lua's unpack ends at 8,000 values.
    assert await rig.submit(prompt_of("large", 5000)) == ([YES], 5000)
    record = await rig.record("large")
    assert len([name for name in record if name.isdecimal()]) == 5000
    await rig.books()


async def test_a_prompt_that_cannot_travel_is_refused_before_anything_is_sent(rig: Rig):
    with pytest.raises(InvalidPromptError, match=r"data\['x'\]"):
        await rig.submit(prompt_of("good"), prompt_of("bad", data={"x": object()}))
    with pytest.raises(OversizeError, match="data"):
        await rig.submit(prompt_of("good"), prompt_of("bad", data={"x": "y" * (1 << 20)}))
    assert (await rig.books()).submitted == 0


async def test_out_of_memory_submits_nothing(rig: Rig, redis_server: EmbeddedServer):
    before = await rig.snapshot()
    await _full(rig, True)
    try:
        with pytest.raises(OutOfMemoryError):
            await rig.submit(prompt_of("a", 3))
        assert await rig.snapshot() == before
    finally:
        await _full(rig, False)
    assert await rig.submit(prompt_of("a", 3)) == ([YES], 3)


async def test_a_lost_reply_of_submit_does_no_harm(rig: Rig, redis_url: str):
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        streams = Streams(client, rig.part)
        rows = [
            Submission("x", prompt_of("x", 3)),
            Submission("y", prompt_of("y", 2, position=0)),
        ]
        await client.ping()
        # A server that does not know the script says so in the reply that is lost here.
        await rig.client.script_load(scripts.load("submit").text)
        proxy.drop_replies(b"EVAL")
        for _ in range(2):
            with pytest.raises(RedisConnectionError):
                await streams.submit(TOKEN, -1, rows, 1 << 20)
        assert proxy.replies_lost == 2
        proxy.resume()
        states, outstanding = await streams.submit(TOKEN, -1, rows, 1 << 20)
        await client.aclose()
    assert (states, outstanding) == ([KNOWN, KNOWN], 5)
    assert (await rig.books()).waiting == 5


async def _full(rig: Rig, full: bool) -> None:
    """Whether the server is out of memory from now on."""
    await rig.client.config_set("maxmemory", "1" if full else "0")


# ---- the fence -----------------------------------------------------------------------------------


async def test_a_younger_trainer_supersedes_every_step_that_steers(rig: Rig):
    headers = await rig.delivered(prompt_of("a", 2))
    await rig.submit(prompt_of("b", 2))
    rows = [(entry, header.kind, header.payload) for entry, header in headers]
    await rig.settle("train", headers[:1])
    await rig.open("trainer-2")
    before = await rig.snapshot()
    s = rig.streams
    for step in (
        lambda: s.submit(TOKEN, -1, [Submission("c", prompt_of("c"))], 1 << 20),
        lambda: s.advance(TOKEN, 9, 9),
        lambda: s.settle(TOKEN, "train", rows),
        lambda: s.settle(TOKEN, "commit", rows),
        lambda: s.settle(TOKEN, "drop:stale", rows, ["a"]),
        lambda: s.untrain(TOKEN, [(entry, header.kind) for entry, header in headers]),
        lambda: s.cancel(TOKEN, prompt_of("b"), "surplus", 9),
        lambda: s.adopt(TOKEN, TOKEN),
        lambda: s.open(TOKEN, 1, 9, 9),
    ):
        with pytest.raises(SupersededError, match="rig"):
            await step()
    assert await rig.snapshot() == before


async def test_opening_anew_makes_the_streams_and_keeps_the_cursor(rig: Rig):
    assert await rig.streams.open(TOKEN, 1, 0, 0) == -1
    await rig.submit(prompt_of("p3", position=3))
    assert await rig.streams.open("trainer-2", 2, 5, 3) == 3
    fence = await rig.client.hgetall(rig.part.fence)
    assert fence[b"token"] == b"trainer-2"
    assert (fence[b"epoch"], fence[b"version"], fence[b"min_useful"]) == (b"2", b"5", b"3")
    for stream in (rig.part.rollouts, rig.part.tombstones):
        (group,) = await rig.client.xinfo_groups(stream)
        assert (group["name"], group["last-delivered-id"]) == (b"trainer", b"0-0")


# ---- claim ---------------------------------------------------------------------------------------


async def test_a_claim_tells_all_that_was_submitted(rig: Rig):
    sent = prompt_of("g", 2, position=4, task="math", sampling={"top_p": 0.5}, deadline_ms=12)
    await rig.submit(sent)
    claims = await rig.claim()
    assert [(c.index, c.attempt, c.partition, c.history) for c in claims] == [
        (0, 1, 0, b""),
        (1, 1, 0, b""),
    ]
    for claim in claims:
        got = claim.prompt
        assert got.token_ids.tolist() == sent.token_ids.tolist()
        assert replace(got, token_ids=sent.token_ids) == sent
        assert claim.queued_ms == int(claim.entry.split("-")[0])
    # Siblings share their body: it is decoded once.
    assert claims[0].prompt is claims[1].prompt


async def test_routes_are_read_apart(rig: Rig):
    await rig.streams.make_groups(["math", "code"])
    await rig.submit(prompt_of("m", 3, route="math"), prompt_of("c", 2, route="code"))
    assert [c.prompt.group for c in await rig.claim(routes=["code"])] == ["c", "c"]
    await rig.submit(prompt_of("c2", 2, route="code"))
    # COUNT is per stream.
    both = await rig.claim(1, routes=["math", "code"])
    assert sorted(c.prompt.route for c in both) == ["code", "math"]
    assert (await rig.books()).waiting_by_route == {"code": 1, "math": 2}


async def test_groups_read_what_was_submitted_before_them(rig: Rig):
    await rig.submit(prompt_of("early", 1, route="late"))
    await rig.streams.make_groups(["late"])
    await rig.streams.make_groups(["late"])
    assert [c.prompt.group for c in await rig.claim(routes=["late"])] == ["early"]


async def test_a_blocked_claim_wakes_at_a_submission(rig: Rig):
    waiting = asyncio.create_task(rig.streams.claim(rig.reader, "w1", ["default"], 4, 2000))
    await rig.submit(prompt_of("g"))
    claims, garbage = await waiting
    assert (len(claims), garbage) == (2, [])


BODY = encode_prompt(prompt_of("g", 1), 1 << 20)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"x": b"\xff\x00"}, "missing field b'd'"),
        ({"g": "g", "i": 0, "a": 1, "k": "train", "n": 1, "d": b"junk"}, "not msgpack|no message"),
        ({"g": "g", "a": 1, "k": "train", "n": 1, "d": BODY}, "missing field b'i'"),
        ({"g": "g", "i": "zero", "a": 1, "k": "train", "n": 1, "d": BODY}, "not a whole number"),
        (
            {"g": "g", "i": 0, "a": b"\xff", "k": "train", "n": 1, "d": BODY},
            "not a whole number",
        ),
        ({"g": "g", "i": 1, "a": 1, "k": "train", "n": 1, "d": BODY}, "member 1 of"),
        ({"g": "g", "i": -1, "a": 1, "k": "train", "n": 1, "d": BODY}, "not between 0 and"),
        ({"g": "g", "i": 0, "a": 0, "k": "train", "n": 1, "d": BODY}, "not between 1 and"),
        ({"g": "other", "i": 0, "a": 1, "k": "train", "n": 1, "d": BODY}, "other"),
    ],
)
async def test_garbage_is_told_apart_and_good_neighbours_are_claimed(
    rig: Rig, fields: dict[str, Any], why: str
):
    await rig.submit(prompt_of("before", 1))
    entry = await rig.client.xadd(rig.part.prompts("default"), fields)
    await rig.submit(prompt_of("after", 1))
    claims, garbage = await rig.streams.claim(rig.client, "w1", ["default"], 9, None)
    assert [c.prompt.group for c in claims] == ["before", "after"]
    (bad,) = garbage
    assert (bad.entry, bad.route) == (entry.decode(), "default")
    assert bad.fields == {k.encode(): _bytes(v) for k, v in fields.items()}
    assert re.search(why, bad.why)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


async def test_a_prompt_of_another_route_is_garbage(rig: Rig):
    # It would be delivered on a stream where it has no lease.
    body = encode_prompt(prompt_of("g", 1, route="elsewhere"), 1 << 20)
    fields = {"g": "g", "i": 0, "a": 1, "k": "train", "n": 1, "d": body}
    await rig.client.xadd(rig.part.prompts("default"), fields)
    (bad,) = await rig.claim_garbage()
    assert "elsewhere" in bad.why


async def test_an_entry_deleted_while_pending_reads_as_garbage(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.xdel(rig.part.prompts("default"), claim.entry)
    made = rig.streams.read_claim("default", claim.entry, {})
    assert isinstance(made, Garbage)
    await rig.leases().quarantine(made)
    summary = await rig.client.xpending(rig.part.prompts("default"), "workers")
    assert summary["pending"] == 0


# ---- deliver -------------------------------------------------------------------------------------


async def test_deliver_publishes_the_header_and_takes_the_prompt_off(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    claims = await rig.claim()
    item = delivery_of(claims[0], version=0)
    assert await rig.streams.deliver("w1", [item]) == [Delivered.YES]
    ((entry, header),) = await rig.headers()
    assert header == item.header
    record = await rig.record("g")
    assert (record["0"], record["1"]) == (f"r{entry}", f"p{claims[1].entry}")
    payload = rig.part.payload(header.payload)
    assert await rig.client.ttl(payload) == -1
    (packed,) = await rig.streams.fetch([header.payload])
    assert packed == item.payload
    assert len(decode_samples(item.payload)) == 1
    books = await rig.books()
    assert (books.in_flight, books.handed_out, books.counters["delivered"]) == (1, 1, 1)
    assert books.outstanding == 2


async def test_one_call_tells_the_fate_of_each(rig: Rig):
    await rig.submit(prompt_of("g", 6), prompt_of("e", 1, kind=Kind.EVAL))
    *claims, evaluation = await rig.claim(7)
    await rig.streams.advance(TOKEN, 3, 1)
    gone, stolen, bare, stale, fine, older_epoch = (
        delivery_of(claim, version=version, epoch=epoch)
        for claim, version, epoch in zip(
            claims, (1, 1, 1, 0, 1, 0), (1, 1, 1, 1, 1, 0), strict=True
        )
    )
    assert await rig.streams.deliver("w1", [gone]) == [Delivered.YES]
    await rig.leases("w2").reclaim(rig.streams, "default", 0, 100)
    for claim in (*claims[2:], evaluation):
        await rig.client.xclaim(rig.part.prompts("default"), "workers", "w1", 0, [claim.entry])
    old_eval = delivery_of(evaluation, version=0)

    losing = _Losing(rig.client, rig.part.payload(bare.header.payload))
    items = [gone, stolen, bare, stale, fine, older_epoch, old_eval]
    states = await Streams(losing, rig.part).deliver("w1", items)
    assert states == [0, -1, -2, -3, 1, 1, 1]
    books = await rig.books()
    assert (books.in_flight, books.ready, books.dropped) == (2, 4, {"stale": 1})
    # All but the stale one still hold credit.
    assert books.outstanding == 5
    (stone,) = await rig.tombstones()
    assert (stone["g"], stone["i"], stone["n"], stone["k"]) == ("g", "3", "6", "train")
    assert stone["r"] == "stale"
    assert "version 0, useful from 1" in stone["e"]
    assert (await rig.record("g"))["3"] == "x"
    assert not await rig.client.exists(rig.part.payload(stale.header.payload))
    assert len(await rig.headers()) == 4


class _Losing:
    """A client whose pipelines never set one key: as if it were evicted at once."""

    def __init__(self, client: Any, key: str) -> None:
        self.client, self.key = client, key

    def pipeline(self, **options: Any) -> Any:
        pipe = self.client.pipeline(**options)
        plain = pipe.set

        def set_others(name: str, *args: Any, **kwargs: Any) -> Any:
            return pipe.echo("lost") if name == self.key else plain(name, *args, **kwargs)

        pipe.set = set_others
        return pipe


async def test_a_repeated_delivery_changes_nothing_and_puts_no_ttl_back(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    items = [delivery_of(claim) for claim in await rig.claim()]
    assert await rig.streams.deliver("w1", items) == [Delivered.YES] * 2
    before = await rig.snapshot()
    assert await rig.streams.deliver("w1", items) == [Delivered.GONE] * 2
    assert await rig.snapshot() == before
    assert {await rig.client.ttl(rig.part.payload(i.header.payload)) for i in items} == {-1}


async def test_the_same_lease_twice_in_one_call_is_delivered_once(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    pair = [delivery_of(claim, nonce="a"), delivery_of(claim, nonce="b")]
    assert await rig.streams.deliver("w1", pair) == [Delivered.YES, Delivered.GONE]
    assert [h.payload for _, h in await rig.headers()] == [f"{claim.entry}:a"]


async def test_a_zombie_overwrites_nothing_and_its_payload_expires(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim(worker="zombie")
    ((again, _, _),) = await rig.leases("w2").reclaim(rig.streams, "default", 0, 1)
    assert not isinstance(again, Garbage)
    assert await rig.streams.deliver("zombie", [delivery_of(claim, nonce="z")]) == [
        Delivered.STOLEN
    ]
    winner = delivery_of(again, nonce="w")
    assert await rig.streams.deliver("w2", [winner]) == [Delivered.YES]
    assert await rig.streams.deliver("zombie", [delivery_of(claim, nonce="z")]) == [Delivered.GONE]
    assert await rig.streams.fetch([winner.header.payload]) == [winner.payload]
    assert await rig.client.ttl(rig.part.payload(f"{claim.entry}:z")) > 0


async def test_a_lease_that_ran_out_but_was_not_taken_still_delivers(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.execute_command(
        "XCLAIM", rig.part.prompts("default"), "workers", "w1", 0, claim.entry, "IDLE", 999_999
    )
    assert await rig.streams.deliver("w1", [delivery_of(claim)]) == [Delivered.YES]


async def test_deliver_loads_its_script_where_it_was_flushed(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    first, second = [delivery_of(claim) for claim in await rig.claim()]
    assert await rig.streams.deliver("w1", [first]) == [Delivered.YES]
    await rig.client.script_flush()
    assert await rig.streams.deliver("w1", [second]) == [Delivered.YES]
    await rig.books()


async def test_out_of_memory_leaves_the_prompt_pending_and_a_later_delivery_succeeds(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    items = [delivery_of(claim) for claim in await rig.claim()]
    await _full(rig, True)
    try:
        with pytest.raises(OutOfMemoryError):
            await rig.streams.deliver("w1", items)
        books = await rig.books()
        assert (books.in_flight, books.ready) == (2, 0)
    finally:
        await _full(rig, False)
    assert await rig.streams.deliver("w1", items) == [Delivered.YES] * 2


async def test_out_of_memory_between_payload_and_header_strands_nothing(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    items = [delivery_of(claim, version=0) for claim in await rig.claim()]
    await rig.client.set(rig.part.payload(items[0].header.payload), items[0].payload, px=600_000)
    await _full(rig, True)
    try:
        # One payload is there already: its SET is answered, the other one refused.
        with pytest.raises(OutOfMemoryError):
            await rig.streams.deliver("w1", items)
        await rig.books()
    finally:
        await _full(rig, False)
    states = await rig.streams.deliver("w1", items)
    assert states in ([Delivered.YES] * 2, [Delivered.GONE, Delivered.YES])
    headers = await rig.headers()
    assert sorted(h.index for _, h in headers) == [0, 1]
    payloads = await rig.streams.fetch([h.payload for _, h in headers])
    assert None not in payloads
    assert {await rig.client.ttl(rig.part.payload(h.payload)) for _, h in headers} == {-1}


async def test_a_payload_that_never_expires_is_still_a_payload(rig: Rig):
    # As a delivery leaves it that was refused between its payload and its header.
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    item = delivery_of(claim)
    await rig.client.set(rig.part.payload(item.header.payload), item.payload)
    assert await rig.streams.deliver("w1", [item]) == [Delivered.YES]


async def test_out_of_memory_on_a_stale_delivery_leaves_the_prompt_pending(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.streams.advance(TOKEN, 5, 3)
    item = delivery_of(claim, version=1)
    await rig.client.set(rig.part.payload(item.header.payload), item.payload, px=600_000)
    await _full(rig, True)
    try:
        with pytest.raises(OutOfMemoryError):
            await rig.streams.deliver("w1", [item])
        assert (await rig.books()).in_flight == 1
    finally:
        await _full(rig, False)
    assert await rig.streams.deliver("w1", [item]) == [Delivered.STALE]


async def test_a_lost_reply_of_deliver_does_no_harm(rig: Rig, redis_url: str):
    await rig.submit(prompt_of("g", 3))
    items = [delivery_of(claim) for claim in await rig.claim()]
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        streams = Streams(client, rig.part)
        assert await streams.deliver("w1", items[:1]) == [Delivered.YES]
        proxy.drop_replies(b"EVALSHA")
        with pytest.raises(RedisConnectionError):
            await streams.deliver("w1", items[1:])
        proxy.resume()
        assert await streams.deliver("w1", items[1:]) == [Delivered.GONE] * 2
        await client.aclose()
    assert sorted(h.index for _, h in await rig.headers()) == [0, 1, 2]
    assert (await rig.books()).handed_out == 3


async def test_a_repeat_after_the_rollout_was_freed_leaves_nothing_for_ever(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    item = delivery_of(claim)
    await rig.streams.deliver("w1", [item])
    await rig.settle("commit", await rig.headers(), groups=["g"])
    assert await rig.streams.deliver("w1", [item]) == [Delivered.GONE]
    payload = rig.part.payload(item.header.payload)
    assert not await rig.client.exists(payload) or await rig.client.ttl(payload) > 0


# ---- consume -------------------------------------------------------------------------------------


async def test_consume_moves_headers_and_tombstones_apart(rig: Rig):
    await rig.submit(prompt_of("g", 3))
    claims = await rig.claim()
    await rig.streams.deliver("w1", [delivery_of(claims[0])])
    await rig.streams.cancel(TOKEN, prompt_of("g", 3), "surplus", 1)
    arrivals = await rig.streams.consume(rig.client, TOKEN, 10, None)
    assert [h.index for _, h in arrivals.headers] == [0]
    ((_, stone),) = arrivals.tombstones
    assert (stone.group, stone.index, stone.n, stone.kind) == ("g", 2, 3, Kind.TRAIN)
    assert (stone.reason, stone.position) == ("surplus", -1)
    again = await rig.streams.consume(rig.client, TOKEN, 10, None)
    assert (again.headers, again.tombstones) == ([], [])
    # What was read and not settled is found again.
    old = await rig.streams.consume(rig.client, TOKEN, 10, None, since=("0-0", "0-0"))
    assert (old.headers, old.tombstones) == (arrivals.headers, arrivals.tombstones)
    last = (old.headers[-1][0], old.tombstones[-1][0])
    after = await rig.streams.consume(rig.client, TOKEN, 10, None, since=last)
    assert (after.headers, after.tombstones) == ([], [])


async def test_garbage_on_the_trainers_streams_is_told_apart(rig: Rig):
    (good,) = await rig.delivered(prompt_of("g", 1))
    bad = [
        await rig.client.xadd(rig.part.rollouts, fields)
        for fields in ({"x": "y"}, {"h": b"\xc1"}, {"h": b"\x91\x09"})
    ]
    stones = [
        await rig.client.xadd(rig.part.tombstones, fields)
        for fields in (
            {"g": "g"},
            dict.fromkeys("gintkpre", "?"),
            {**dict.fromkeys("gtre", "?"), "i": 0, "n": 1, "p": -1, "k": "bogus"},
        )
    ]
    arrivals = await rig.streams.consume(rig.client, TOKEN, 10, None)
    assert [g.entry.encode() for g in arrivals.garbage] == bad
    assert [g.entry.encode() for g in arrivals.garbage_tombstones] == stones
    assert arrivals.headers == arrivals.tombstones == []
    assert good[0] < arrivals.garbage[0].entry


async def test_an_entry_deleted_after_it_was_read_is_garbage_and_no_error(rig: Rig):
    (first, second) = await rig.delivered(prompt_of("g", 2))
    await rig.client.xdel(rig.part.rollouts, first[0])
    old = await rig.streams.consume(rig.client, TOKEN, 10, None, since=("0-0", "0-0"))
    assert [entry for entry, _ in old.headers] == [second[0]]
    assert [g.entry for g in old.garbage] == [first[0]]


async def test_a_blocked_consume_wakes_at_a_delivery(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    waiting = asyncio.create_task(rig.streams.consume(rig.reader, TOKEN, 4, 2000))
    await rig.streams.deliver("w1", [delivery_of(claim)])
    assert len((await waiting).headers) == 1


async def test_fetch_says_none_where_there_is_nothing(rig: Rig):
    assert await rig.streams.fetch([]) == []
    ((_, header),) = await rig.delivered(prompt_of("g", 1))
    packed, missing = await rig.streams.fetch([header.payload, "no:such"])
    assert packed is not None
    assert missing is None


# ---- settle, untrain -----------------------------------------------------------------------------


async def test_train_then_commit_returns_credit_once_and_frees_everything(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2))
    assert await rig.settle("train", headers) == 2
    books = await rig.books()
    assert (books.trained, books.handed_out, books.outstanding) == (2, 0, 0)
    before = await rig.snapshot()
    assert await rig.settle("train", headers) == 0
    assert await rig.snapshot() == before
    assert await rig.settle("commit", headers, groups=["g"]) == 2
    before = await rig.snapshot()
    assert await rig.settle("commit", headers, groups=["g"]) == 0
    assert await rig.settle("train", headers) == 0
    assert await rig.settle("drop:late", headers) == 0
    assert await rig.snapshot() == before
    books = await rig.books()
    assert (books.committed, books.trained, books.outstanding) == (2, 0, 0)
    await _is_empty(rig)


async def test_commit_without_training_returns_the_credit_too(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2))
    assert await rig.settle("commit", headers, groups=["g"]) == 2
    books = await rig.books()
    assert (books.committed, books.outstanding) == (2, 0)
    await _is_empty(rig)


@pytest.mark.parametrize("trained", [False, True])
async def test_drop_counts_by_reason_and_returns_credit_once(rig: Rig, trained: bool):
    headers = await rig.delivered(prompt_of("g", 2))
    if trained:
        await rig.settle("train", headers)
    assert await rig.settle("drop:stale", headers, groups=["g"]) == 2
    assert await rig.settle("drop:stale", headers, groups=["g"]) == 0
    books = await rig.books()
    assert (books.dropped, books.outstanding, books.trained) == ({"stale": 2}, 0, 0)
    await _is_empty(rig)


async def test_settle_takes_tombstones_along(rig: Rig):
    await rig.submit(prompt_of("g", 2))
    await rig.streams.cancel(TOKEN, prompt_of("g"), "deadline", 2)
    arrivals = await rig.streams.consume(rig.client, TOKEN, 10, None)
    stones = [entry for entry, _ in arrivals.tombstones]
    assert (await rig.books()).tombstones == 2
    assert await rig.streams.settle(TOKEN, "drop:dead", [], ["g"], stones) == 0
    await _is_empty(rig)


async def test_what_was_not_read_cannot_be_settled(rig: Rig):
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    item = delivery_of(claim)
    await rig.streams.deliver("w1", [item])
    ((entry, _),) = await rig.client.xrange(rig.part.rollouts)
    for verb in ("train", "commit", "drop:x"):
        row = [(entry.decode(), Kind.TRAIN, item.header.payload)]
        assert await rig.streams.settle(TOKEN, verb, row) == 0
    assert (await rig.books()).ready == 1


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", ["stream", "entries", "reader", "group"])
@pytest.mark.parametrize("verb", ["commit", "drop:stale"])
async def test_credit_returns_once_for_what_somebody_took_away(
    rig: Rig, how: str, verb: str, trained: bool
):
    headers = await rig.delivered(prompt_of("g", 2))
    if how == "stream":
        await rig.client.delete(rig.part.rollouts)
    elif how == "entries":
        await rig.client.xtrim(rig.part.rollouts, maxlen=0, approximate=False)
    elif how == "reader":
        await rig.client.xgroup_delconsumer(rig.part.rollouts, "trainer", TOKEN)
    else:
        await rig.client.xgroup_destroy(rig.part.rollouts, "trainer")
        await rig.streams.make_trainer_groups()
        await rig.streams.consume(rig.client, TOKEN, 10, None)
    if trained:
        assert await rig.settle("train", headers, groups=["g"]) == 2
        assert await rig.settle("train", headers, groups=["g"]) == 0
        assert await rig.client.hget(rig.part.ledger, "settled:train") == b"2"
    assert await rig.settle(verb, headers, groups=["g"]) == 2
    assert await rig.settle(verb, headers, groups=["g"]) == 0
    assert await rig.settle("train", headers, groups=["g"]) == 0
    books = await rig.books()
    assert (books.outstanding, books.balance) == (0, 0)
    await _is_empty(rig)


async def test_adopt_finds_what_a_deleted_reader_had_read(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2), prompt_of("h", 1))
    await rig.submit(prompt_of("i", 1))
    (claim,) = await rig.claim()
    await rig.streams.deliver("w1", [delivery_of(claim)])
    await rig.client.xgroup_delconsumer(rig.part.rollouts, "trainer", TOKEN)
    for _ in range(2):
        owned, _ = await rig.streams.adopt(TOKEN, TOKEN)
        assert owned == [entry for entry, _ in headers]
        books = await rig.books()
        assert (books.ready, books.handed_out) == (1, 3)
    assert [header.group for _, header in await rig.headers()] == ["i"]


async def test_settle_of_more_than_one_script_can_take(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 100), prompt_of("h", 1100))
    assert len(headers) == 1000
    headers += await rig.headers()
    assert await rig.settle("train", headers) == 1200
    assert await rig.settle("commit", headers, groups=["g", "h"]) == 1200
    await _is_empty(rig)


async def test_evaluations_touch_no_credit(rig: Rig):
    headers = await rig.delivered(prompt_of("e", 2, kind=Kind.EVAL), prompt_of("t", 2))
    assert (await rig.books()).outstanding == 2
    await rig.settle("commit", headers[:2], groups=["e"])
    books = await rig.books()
    assert (books.outstanding, books.counters["settled:eval"]) == (2, 2)


async def test_untrain_owes_again_what_was_trained_and_only_that(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 3))
    await rig.settle("train", headers[:2])
    rows = [(entry, header.kind) for entry, header in headers]
    assert await rig.streams.untrain(TOKEN, rows) == 2
    before = await rig.snapshot()
    assert await rig.streams.untrain(TOKEN, rows) == 0
    assert await rig.snapshot() == before
    books = await rig.books()
    assert (books.trained, books.handed_out, books.outstanding) == (0, 3, 3)
    await rig.settle("train", headers)
    assert (await rig.books()).outstanding == 0
    await rig.settle("commit", headers, groups=["g"])
    assert await rig.streams.untrain(TOKEN, rows) == 0
    assert (await rig.books()).outstanding == 0


async def test_a_lost_reply_of_settle_does_no_harm(rig: Rig, redis_url: str):
    headers = await rig.delivered(prompt_of("g", 2))
    rows = [(entry, header.kind, header.payload) for entry, header in headers]
    with TcpProxy(redis_url) as proxy:
        client: Any = connect(proxy.url, role="far")
        streams = Streams(client, rig.part)
        for verb in ("train", "commit"):
            await streams.settle(TOKEN, verb, [])  # the script is known from now on
            proxy.drop_replies(b"EVALSHA")
            with pytest.raises(RedisConnectionError):
                await streams.settle(TOKEN, verb, rows, ["g"] if verb == "commit" else [])
            proxy.resume()
            assert await streams.settle(TOKEN, verb, rows, ["g"]) == 0
        await client.aclose()
    assert (await rig.books()).committed == 2


async def test_freeing_and_steering_work_without_memory(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2))
    await rig.submit(prompt_of("h", 2))
    await _full(rig, True)
    try:
        assert await rig.settle("train", headers) == 2
        assert await rig.streams.untrain(TOKEN, [(headers[0][0], Kind.TRAIN)]) == 1
        assert await rig.settle("commit", headers, groups=["g"]) == 2
        assert await rig.streams.cancel(TOKEN, prompt_of("h"), "surplus", 9) == 2
        await rig.streams.advance(TOKEN, 1, 0)
        await rig.streams.adopt(TOKEN, TOKEN)
        await rig.streams.open("trainer-2", 2, 1, 0)
        await rig.board.publish(TOKEN, {"version": 1})
        await rig.board.hold(TOKEN, 1000)
        await rig.books()
    finally:
        await _full(rig, False)


async def _is_empty(rig: Rig) -> None:
    """Nothing is left of any rollout: streams are empty, and no payload or record stands."""
    for stream in (rig.part.prompts("default"), rig.part.rollouts, rig.part.tombstones):
        assert await rig.client.xlen(stream) == 0
    left = {key.removeprefix(rig.part.prefix) for key in await rig.snapshot()}
    assert not {key for key in left if key.startswith(("payload:", "group:", "trained", "parked"))}


# ---- cancel --------------------------------------------------------------------------------------


async def test_cancel_settles_waiting_delayed_and_in_flight_members(rig: Rig):
    prompt = prompt_of("g", 4, task="math", position=-1)
    await rig.submit(prompt)
    flying, failing, done = await rig.claim(3)
    assert await rig.leases().fail(failing, INFRA, 60_000)
    await rig.streams.deliver("w1", [delivery_of(done)])
    books = await rig.books()
    assert (books.waiting, books.delayed, books.in_flight, books.ready) == (1, 1, 1, 1)

    assert await rig.streams.cancel(TOKEN, prompt, "deadline", 9) == 3
    assert await rig.streams.cancel(TOKEN, prompt, "deadline", 9) == 0
    books = await rig.books()
    assert (books.waiting, books.delayed, books.in_flight, books.ready) == (0, 0, 0, 1)
    assert (books.dropped, books.outstanding) == ({"deadline": 3}, 1)
    assert not await rig.client.exists(rig.part.parked("default"), rig.part.delayed("default"))
    stones = await rig.tombstones()
    assert sorted(stone["i"] for stone in stones) == ["0", "1", "3"]
    assert {(s["g"], s["n"], s["k"], s["t"], s["p"], s["r"]) for s in stones} == {
        ("g", "4", "train", "math", "-1", "deadline")
    }
    record = await rig.record("g")
    assert [record[str(i)][0] for i in range(4)] == ["x", "x", "r", "x"]

    # The worker that holds the lease learns it, and can publish nothing.
    assert await rig.leases().renew("default", [flying.entry]) == [flying.entry]
    assert await rig.streams.deliver("w1", [delivery_of(flying)]) == [Delivered.GONE]
    assert not await rig.leases().fail(flying, INFRA, 0)
    assert await rig.leases().hand_back("default", [(flying.entry, "g")]) == 0
    await rig.books()


async def test_cancel_takes_the_last_members_first_and_no_more_than_asked(rig: Rig):
    await rig.submit(prompt_of("g", 5))
    await rig.claim(2)
    assert await rig.streams.cancel(TOKEN, prompt_of("g", 5), "surplus", 2) == 2
    record = await rig.record("g")
    assert [record[str(i)][0] for i in range(5)] == ["p", "p", "p", "x", "x"]
    assert await rig.streams.cancel(TOKEN, prompt_of("g", 5), "surplus", 0) == 0


async def test_cancel_finds_a_prompt_wherever_it_moved(rig: Rig):
    prompt = prompt_of("g", 3)
    await rig.submit(prompt)
    handed, failed, _ = await rig.claim()
    assert await rig.leases().hand_back("default", [(handed.entry, "g")]) == 1
    assert await rig.leases().fail(failed, INFRA, 0)
    assert (await rig.leases().promote("default"))[0] == 1
    await rig.claim(1, "w2")
    assert await rig.streams.cancel(TOKEN, prompt, "surplus", 9) == 3
    books = await rig.books()
    assert (books.waiting, books.in_flight, books.delayed) == (0, 0, 0)
    assert books.dropped == {"surplus": 3}


async def test_cancel_before_any_worker_ever_came(rig: Rig):
    await rig.submit(prompt_of("g", 2, route="unserved"))
    assert await rig.streams.cancel(TOKEN, prompt_of("g", 2, route="unserved"), "surplus", 9) == 2
    assert await rig.streams.cancel(TOKEN, prompt_of("nobody"), "surplus", 9) == 0
    await rig.books()


async def test_cancel_of_an_evaluation_touches_no_credit(rig: Rig):
    prompt = prompt_of("e", 2, kind=Kind.EVAL)
    await rig.submit(prompt, prompt_of("t", 2))
    assert await rig.streams.cancel(TOKEN, prompt, "deadline", 9) == 2
    books = await rig.books()
    assert (books.outstanding, books.counters["settled:eval"]) == (2, 2)


# ---- adopt ---------------------------------------------------------------------------------------


async def test_adopt_takes_over_what_another_trainer_read(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2))
    await rig.submit(prompt_of("h", 1))
    await rig.streams.cancel(TOKEN, prompt_of("h", 1), "surplus", 1)
    arrivals = await rig.streams.consume(rig.client, TOKEN, 10, None)
    await rig.open("trainer-2")
    rollouts, stones = await rig.streams.adopt("trainer-2", "trainer-2")
    assert rollouts == [entry for entry, _ in headers]
    assert stones == [entry for entry, _ in arrivals.tombstones]
    own = await rig.streams.consume(rig.client, "trainer-2", 10, None, since=("0-0", "0-0"))
    assert own.headers == headers
    assert own.tombstones == arrivals.tombstones
    gone = await rig.streams.consume(rig.client, TOKEN, 10, None, since=("0-0", "0-0"))
    assert gone.headers == []


async def test_adopt_finds_what_a_lost_reply_stranded(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 2))  # read, and say that the reply was lost
    assert (await rig.streams.adopt(TOKEN, TOKEN))[0] == [entry for entry, _ in headers]
    assert await rig.headers() == []


async def test_adopt_follows_its_cursor(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rollfleet_common.scripts.trainer.ADOPT_CHUNK", 3)
    headers = await rig.delivered(prompt_of("g", 9), prompt_of("h", 1))
    assert (await rig.streams.adopt(TOKEN, "t2"))[0] == [entry for entry, _ in headers]


def test_keys_of_a_partition_share_its_tag():
    part = PartitionKeys("run", 3)
    assert part.prompts("r") == "rf:{run/3}:prompts:r"
