import pytest
from fixtures.rig import INFRA, TOKEN, Rig, delivery_of, prompt_of

from rollfleet_common.ledger import Books, read_books
from rollfleet_common.messages import Kind

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")


async def test_empty_books(rig: Rig):
    books = await rig.books()
    assert (books.submitted, books.outstanding, books.dropped) == (0, 0, {})


async def test_every_place_is_told_apart(rig: Rig):
    await rig.streams.make_groups(["other"])
    await rig.submit(
        prompt_of("g", 9), prompt_of("o", 3, route="other"), prompt_of("u", 2, route="un")
    )
    claims = await rig.claim(7)
    waiting, flying, *rest = claims
    delayed, dead, *done = rest
    await rig.leases().hand_back("default", [(waiting.entry, waiting.prompt.group)])
    assert await rig.leases().fail(delayed, INFRA, 60_000)
    assert await rig.leases().fail(dead, INFRA, None)
    await rig.streams.deliver("w1", [delivery_of(claim) for claim in done[:2]])
    headers = await rig.headers()
    await rig.settle("train", headers[:1])
    await rig.streams.deliver("w1", [delivery_of(done[2])])
    books = await rig.books()
    assert books.submitted == 14
    assert (books.waiting, books.delayed, books.in_flight) == (3 + 5, 1, 1)
    assert (books.ready, books.handed_out, books.trained) == (1, 1, 1)
    assert (books.dead, books.dead_letters, books.tombstones) == (1, 1, 1)
    assert books.waiting_by_route == {"default": 3, "other": 3, "un": 2}
    assert books.outstanding == 14 - 2
    assert books.raw[f"XLEN {rig.part.rollouts}"] == 3
    assert books.raw[f"XPENDING {rig.part.rollouts}"] == 2
    assert books.raw[f"XLEN {rig.part.prompts('default')}"] == 4
    assert books.raw[f"XPENDING {rig.part.prompts('default')}"] == 1
    assert books.raw[f"ZCARD {rig.part.delayed('default')}"] == 1
    assert flying.entry


async def test_what_is_lost_or_doubled_shows(rig: Rig):
    headers = await rig.delivered(prompt_of("g", 3))
    await rig.client.xack(rig.part.rollouts, "trainer", headers[0][0])
    await rig.client.xdel(rig.part.rollouts, headers[0][0])
    assert (await read_books(rig.client, [rig.part])).balance == 1
    for _ in range(3):
        await rig.client.xadd(rig.part.rollouts, {"h": "forged"})
    assert (await read_books(rig.client, [rig.part])).balance == -2


async def test_books_add_up_over_partitions(redis_url: str):
    a, b = Rig(redis_url, "sum"), Rig(redis_url, "sum")
    b.part = a.keys.partition(1)
    b.streams = type(b.streams)(b.client, b.part)
    await a.open()
    await b.streams.open(TOKEN, 1, 0, 0)
    await a.submit(prompt_of("a", 2), prompt_of("e", 4, kind=Kind.EVAL))
    await b.submit(prompt_of("b", 3))
    both = await read_books(a.client, [a.part, b.part])
    assert (both.submitted, both.waiting, both.outstanding, both.balance) == (9, 9, 5, 0)
    assert both.waiting_by_route == {"default": 9}
    assert both.counters["submitted:train"] == 5
    await a.close()
    await b.close()


@pytest.mark.parametrize(
    "place",
    ["waiting", "delayed", "in_flight", "ready", "handed_out", "trained", "committed", "dead"],
)
def test_the_law_has_every_term(place: str):
    books = Books(submitted=3, dropped={"stale": 1, "torn": 1})
    assert books.balance == 1
    setattr(books, place, 1)
    assert books.balance == 0
    doubled = books + books
    assert (doubled.balance, doubled.dropped) == (0, {"stale": 2, "torn": 2})
