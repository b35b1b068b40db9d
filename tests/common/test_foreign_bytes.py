"""Arbitrary bytes and absurd numbers in every plain field: a value, or an error of ours.

Readers of plain fields, by key: `prompts` (claim, reclaim, bury), `rollouts` and `tombstones` (consume),
`parked` and `delayed` (promote), `group` (bury, cancel), `fence` (open, submit, deliver), `ledger`
(read_books, submit, deliver), `routes` (read_books), `board` (read, seize, plan, rollbacks, warnings),
`batches` (plans), `servers` and `weights` (Servers.read), `tap` (deliver, settle), `workers`, `dead` and
consumer names (the console: `tests/console/test_hostile_text.py`).
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fixtures.rig import INFRA, SHAPE, TOKEN, Rig, delivery_of, prompt_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollfleet.records import Plan
from rollfleet_common.errors import RollfleetError
from rollfleet_common.ledger import read_books
from rollfleet_common.redis import retry, translate
from rollfleet_common.servers import Servers
from rollfleet_common.streams import Arrivals, Delivered, Garbage, _read_tombstone, _sort
from rollfleet_common.text import json_safe, parse_json, printable, whole

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")

LAST = "18446744073709551615-18446744073709551615"
#: What nobody should write, and somebody does.
ABSURD = [
    b"",
    b"\xff",
    b"\xed\xa0\x80",
    b"\x00",
    b"abc",
    b"-1",
    b"1.5",
    b"1e309",
    b"nan",
    b"inf",
    b"0x10",
    b" 1",
    b"1_0",
    b"9" * 16,
    b"9" * 25,
    b"-" + b"9" * 25,
    b"9" * 5000,
    "\u0663".encode(),
    b"[" * 100_000,
    b"{}",
    b"[]",
    b"null",
    b"\x1b[2J",
]
anything = st.sampled_from(ABSURD) | st.binary(max_size=40)
busy = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

# ---- what reads text ---------------------------------------------------------------------------


@given(raw=anything)
def test_numbers_and_json_are_read_or_refused(raw: bytes) -> None:
    for read in (whole, parse_json):
        try:
            read(raw)
        except ValueError:
            continue


@given(text=st.text() | anything.map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_what_is_printable_holds_no_controls_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200f\u2028")
    json.dumps(json_safe({text: [text, raw_tree(text)]}), allow_nan=False).encode()


def raw_tree(text: str) -> Any:
    tree: Any = {"bytes": b"\xff", "number": float("nan"), "other": object, "text": text}
    for _ in range(2000):
        tree = [tree]
    return tree


def test_long_text_is_cut_and_that_is_said() -> None:
    assert printable("x" * 5000) == "x" * 4000 + "... (5,000 characters)"
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable("a\nb\tc", lines=True) == "a\nb    c"


@given(
    fields=st.dictionaries(
        st.sampled_from([b"g", b"i", b"n", b"k", b"t", b"p", b"r", b"e"]), anything
    )
)
def test_a_tombstone_is_one_or_garbage(fields: dict[bytes, bytes]) -> None:
    arrivals = Arrivals([], [], [], [])
    _sort(arrivals.tombstones, arrivals.garbage_tombstones, "1-1", fields, _read_tombstone)
    assert len(arrivals.tombstones) + len(arrivals.garbage_tombstones) == 1


# ---- the state of the run ----------------------------------------------------------------------

STATE: list[tuple[str, str]] = [
    *(("board", name) for name in ("version", "epoch", "weights", "paused_until_ms", "min_useful")),
    *(
        ("board", name)
        for name in ("refits", "shape", "rollbacks", "warnings", "last_batch", "who")
    ),
    *(("fence", name) for name in ("epoch", "version", "min_useful", "cursor")),
    *(
        ("ledger", name)
        for name in ("submitted:train", "settled:train", "delivered", "dropped:stale")
    ),
]


async def every_step(rig: Rig, name: str) -> list[BaseException]:
    """Every reader of the run's state; errors that are ours, and nothing else."""
    errors: list[BaseException] = []

    async def made(step: Callable[[], Awaitable[Any]]) -> None:
        try:
            await retry(step, what="step", deadline_s=0)
        except RollfleetError as exc:
            errors.append(exc)

    board, streams = rig.board, rig.streams
    prompt = prompt_of(name, 1)
    await made(board.read)
    await made(board.warnings)
    await made(board.last_batch)
    await made(board.rollbacks)
    await made(board.plans)
    await made(lambda: board.plan(TOKEN, 1, None))
    await made(lambda: rig.submit(prompt))
    await made(lambda: read_books(rig.client, [rig.part]))
    await made(lambda: streams.cancel(TOKEN, prompt, "cancelled", 9))
    await made(lambda: board.seize(TOKEN, 9000, "me", SHAPE, version=-1, take_over=True))
    await made(lambda: streams.open(TOKEN, 1 << 30, 0, 0))
    return errors


@pytest.mark.parametrize(("where", "field"), STATE, ids=str)
async def test_state_that_somebody_else_wrote_is_a_value_or_an_error_that_names_it(
    rig: Rig, where: str, field: str
) -> None:
    key = getattr(rig.keys if where == "board" else rig.part, where)
    before = await rig.client.hgetall(key)
    for number, raw in enumerate(ABSURD):
        await rig.client.delete(key)
        await rig.client.hset(key, mapping={**before, field: raw})
        for exc in await every_step(rig, f"g{number}"):
            said = str(exc)
            assert "another trainer" in said or (key in said and field in said) or "doctor" in said
            assert "Traceback" not in said
    await rig.client.delete(key)
    if before:
        await rig.client.hset(key, mapping=before)


async def test_a_shape_that_is_broken_is_named(rig: Rig) -> None:
    for text, said in (
        ('{"partitions": 0}', "'partitions' is 0, not a whole number from 1"),
        ('{"partitions": 1e999}', "'partitions' is inf"),
        ("[" * 100_000, "nested too deeply"),
        ("\u202e", "Expecting value"),
    ):
        await rig.client.hset(rig.keys.board, "shape", text)
        with pytest.raises(RollfleetError, match=r"field 'shape' of rf:\{rig\}:board") as caught:
            await rig.board.read()
        assert said in str(caught.value)


@pytest.mark.parametrize("raw", ABSURD, ids=lambda raw: repr(raw[:9]))
async def test_a_delivery_does_not_fail_for_what_stands_in_fence_ledger_or_tap(
    rig: Rig, raw: bytes
) -> None:
    await rig.submit(prompt_of("g", 2))
    claims = await rig.claim()
    await rig.client.hset(rig.part.fence, "min_useful", raw)
    await rig.client.hset(rig.part.ledger, "delivered", raw)
    await rig.client.hset(rig.part.ledger, "dropped:stale", raw)
    await rig.client.set(rig.part.tap, raw, px=9000)
    states = await rig.streams.deliver("w1", [delivery_of(claims[0])])
    assert states[0] in (Delivered.YES, Delivered.STALE)
    assert await rig.streams.deliver("w1", [delivery_of(claims[0])]) == [Delivered.GONE]
    await rig.client.hset(rig.part.fence, "min_useful", 5)
    assert await rig.streams.deliver("w1", [delivery_of(claims[1])]) == [Delivered.STALE]
    assert len(await rig.tombstones()) == 1 + (states[0] is Delivered.STALE)
    await rig.settle("commit", await rig.headers())


@busy
@given(rows=st.dictionaries(anything, anything, max_size=4))
async def test_rows_of_servers_and_plans_are_read_or_refused(
    rig: Rig, rows: dict[bytes, bytes]
) -> None:
    for key in (rig.keys.servers, rig.keys.weights, rig.keys.batches, rig.part.routes):
        await rig.client.delete(key)
    registry = Servers(rig.client, rig.keys)
    for name, raw in rows.items():
        await rig.client.hset(rig.keys.servers, name, raw)
        await rig.client.hset(rig.keys.weights, name, b'{"state": "serving", "version": %b}' % raw)
        await rig.client.hset(rig.keys.batches, name, raw)
        await rig.client.sadd(rig.part.routes, name)
    await registry.read()
    await read_books(rig.client, [rig.part])
    try:
        for number, packed in (await rig.board.plans()).items():
            Plan.loads(number, packed)
    except RollfleetError:
        pass
    finally:
        await rig.client.delete(rig.keys.batches)


# ---- stream entries, and what waits beside them ------------------------------------------------


@busy
@given(
    fields=st.dictionaries(
        st.sampled_from([b"g", b"i", b"n", b"a", b"k", b"d", b"e", b"v", b"x"]),
        anything,
        min_size=1,
    ),
    known=st.booleans(),
)
async def test_any_entry_among_the_prompts_is_put_aside(
    rig: Rig, fields: dict[bytes, bytes], known: bool
) -> None:
    """Also one that the record of a group names as its own."""
    entry = (await rig.client.xadd(rig.part.prompts("default"), fields)).decode()
    if known:
        await rig.client.hset("rf:{rig/0}:group:forged", b"0", f"p{entry}")
        await rig.client.xdel(rig.part.prompts("default"), entry)
        fields = {**fields, b"g": b"forged", b"i": b"0"}
        entry = (await rig.client.xadd(rig.part.prompts("default"), fields)).decode()
        await rig.client.hset("rf:{rig/0}:group:forged", b"0", f"p{entry}")
    before = int(await rig.client.xlen(rig.part.dead))
    _, garbage = await rig.streams.claim(rig.client, "w1", ["default"], 9, None)
    for each in garbage:
        await rig.leases().quarantine(each)
    assert len(garbage) == 1
    assert await rig.client.xlen(rig.part.dead) == before + 1
    assert await rig.client.xlen(rig.part.prompts("default")) == 0
    await rig.client.delete("rf:{rig/0}:group:forged", rig.part.dead, rig.part.tombstones)
    await rig.open()


async def test_a_consumer_of_any_name_is_taken_over(rig: Rig) -> None:
    await rig.submit(prompt_of("g", 1))
    await rig.client.xreadgroup("workers", b"\xff\x1b[2J", {rig.part.prompts("default"): ">"})
    ((claim, _, owner),) = await rig.leases().reclaim(rig.streams, "default", 0, 9)
    assert not isinstance(claim, Garbage)
    assert owner == "\ufffd\x1b[2J"
    assert await rig.leases().fail(claim, INFRA, None)
    await rig.client.delete(rig.part.dead, rig.part.tombstones, rig.part.group("g"))


@pytest.mark.parametrize(
    "raw", [*ABSURD, b"1:g1:02:x", b"5:hello" * 9], ids=lambda raw: repr(raw[:9])
)
async def test_a_parked_prompt_that_cannot_be_read_dies_and_closes_its_group(
    rig: Rig, raw: bytes
) -> None:
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.leases().fail(claim, INFRA, 0)
    await rig.client.hset(rig.part.parked("default"), "g:0", raw)
    await rig.client.zadd(rig.part.delayed("default"), {b"\xff": 0, b"later": "+inf"})
    promoted, wait_ms = await rig.leases().promote("default")
    assert promoted >= 1
    assert wait_ms <= 86_400_000
    for garbage in await rig.claim_garbage():
        await rig.leases().quarantine(garbage)
    (letter,) = await rig.dead()
    assert letter["g"] == "g"
    assert [t["r"] for t in await rig.tombstones()] == ["dead"]
    await rig.client.delete(rig.part.delayed("default"))
    assert (await rig.books()).dead == 1
    await rig.client.delete(rig.part.dead, rig.part.tombstones, rig.part.group("g"))


# ---- a stream that takes no more entries -------------------------------------------------------


async def test_a_refused_delivery_leaves_no_payload_and_charges_nobody(rig: Rig) -> None:
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.xadd(rig.part.rollouts, {"x": "y"}, id=LAST)
    delivery = delivery_of(claim)
    with pytest.raises(Exception, match="exhausted") as caught:
        await rig.streams.deliver("w1", [delivery])
    assert "doctor" in str(translate(caught.value))
    assert 0 < await rig.client.pttl(rig.part.payload(delivery.header.payload)) <= 600_000
    assert await rig.leases().renew("default", [claim.entry]) == []
    await rig.client.delete(rig.part.rollouts)
    await rig.streams.open(TOKEN, 99, 0, 0)
    assert await rig.streams.deliver("w1", [delivery]) == [Delivered.YES]
    assert await rig.client.pttl(rig.part.payload(delivery.header.payload)) == -1
    await rig.settle("commit", await rig.headers(), groups=["g"])


@pytest.mark.parametrize("stream", ["dead", "tombstones"])
async def test_a_burial_that_is_refused_changes_nothing(rig: Rig, stream: str) -> None:
    await rig.submit(prompt_of("g", 1))
    (claim,) = await rig.claim()
    await rig.client.xadd(getattr(rig.part, stream), {"x": "y"}, id=LAST)
    with pytest.raises(Exception, match="exhausted"):
        await rig.leases().fail(claim, INFRA, None)
    assert (await rig.books()).in_flight == 1
    await rig.client.delete(rig.part.dead, rig.part.tombstones)
    await rig.streams.open(TOKEN, 99, 0, 0)
    await rig.leases().fail(claim, INFRA, None)
    await rig.client.delete(rig.part.dead, rig.part.tombstones, rig.part.group("g"))
