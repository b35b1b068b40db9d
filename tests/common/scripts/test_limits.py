"""No call has more words than the strictest server takes, and nothing is lost where one is split."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fixtures.declared_keys import Watched
from fixtures.rig import TOKEN, Rig, delivery_of, prompt_of

from rollfleet_common.keys import PartitionKeys
from rollfleet_common.leases import Leases
from rollfleet_common.messages import Kind
from rollfleet_common.scripts import MAX_ARGUMENTS, Script, reads, run, trainer, worker
from rollfleet_common.scripts.script import chunks, room
from rollfleet_common.streams import Delivered, Streams, Submission, Submitted

#: More than any call may have items.
MANY = 4_100

pytestmark = pytest.mark.usefixtures("declared_keys")


@pytest_asyncio.fixture
async def watched(rig: Rig) -> AsyncIterator[Watched]:
    """The rig's client, whose calls are counted: none is too long, and some are near the limit."""
    client = Watched(rig.client)
    yield client
    assert client.most <= MAX_ARGUMENTS


async def test_a_call_that_is_too_long_is_refused_before_it_is_sent():
    script = Script("long", "return 1")
    keys, args = ["{a}k"] * 2_000, ["a"] * 1_996
    with pytest.raises(ValueError, match=r"long\.lua has 4,000 words, 2,001 of them keys"):
        await script(None, [*keys, "{a}k"], args)
    with pytest.raises(ValueError, match=r"long\.lua has 4,000 words"):
        script.queue(None, keys, [*args, "a"])


def test_rows_fill_a_call():
    assert room(fixed=6, each=10) * 10 + 6 + 3 <= MAX_ARGUMENTS < room(6, 10) * 10 + 6 + 3 + 10
    assert [len(some) for some in chunks(range(7), 3)] == [3, 3, 1]
    assert list(chunks((), 3)) == []


@pytest.mark.timeout(180)
async def test_thousands_of_groups_go_the_whole_way(rig: Rig, watched: Watched):
    """Submit, renew, hand back, fail, promote, deliver, settle: all of them at once."""
    part, client = rig.part, watched
    streams, leases = Streams(client, part), Leases(client, part, "w1")
    groups = [Submission(f"id-{i}", prompt_of(f"g{i}", 1)) for i in range(MANY)]
    states, outstanding = await streams.submit(TOKEN, -1, groups, 1 << 20)
    assert (states, outstanding) == ([Submitted.YES] * MANY, MANY)
    assert client.most > MAX_ARGUMENTS - 10
    assert (await streams.submit(TOKEN, -1, groups, 1 << 20))[0] == [Submitted.KNOWN] * MANY

    claims = await rig.claim(MANY)
    assert await leases.renew("default", [c.entry for c in claims]) == []
    held = [(c.entry, c.prompt.group) for c in claims]
    assert await leases.hand_back("default", held) == MANY
    claims = await rig.claim(MANY)
    assert [c.prompt.group for c in claims] == [group.prompt.group for group in groups]

    # Members of which nothing is parked are only taken off.
    pipe = rig.client.pipeline(transaction=False)
    for claim in claims[:MANY]:
        pipe.zadd(part.delayed("default"), {f"{claim.prompt.group}:0": 0})
    await pipe.execute()
    assert await leases.promote("default", MANY) == (MANY, -1)

    client.most = 0
    items = [delivery_of(claim) for claim in claims]
    assert await streams.deliver("w1", items) == [Delivered.YES] * MANY
    assert client.most > MAX_ARGUMENTS - 13
    assert await streams.deliver("w1", items) == [Delivered.GONE] * MANY

    arrivals = await streams.consume(client, TOKEN, MANY, None)
    payloads = await streams.fetch([header.payload for _, header in arrivals.headers])
    assert payloads == [item.payload for item in items]
    rollouts = [(entry, header.kind, header.payload) for entry, header in arrivals.headers]
    entries = [entry for entry, _, _ in rollouts]
    assert (await streams.adopt(TOKEN, "t2"))[0] == entries
    assert await streams.settle(TOKEN, "train", rollouts) == MANY
    assert await streams.untrain(TOKEN, [row[:2] for row in rollouts]) == MANY
    found = await reads.there(client, key=part.rollouts, kind="stream", things=entries[:130])
    assert found == [True] * 130
    names = [group.prompt.group for group in groups]
    assert await streams.settle(TOKEN, "commit", rollouts, names) == MANY
    assert (await rig.books()).committed == MANY


async def test_no_group_overtakes_one_that_does_not_fit(rig: Rig, watched: Watched):
    """As within one call: after the first refusal, nothing of the calls that would follow."""
    rows = [Submission(f"id-{i}", prompt_of(f"g{i}", 1)) for i in range(900)]
    rows[300] = Submission("id-large", prompt_of("large", 200))
    states, outstanding = await Streams(watched, rig.part).submit(TOKEN, 450, rows, 1 << 20)
    assert states == [Submitted.YES] * 300 + [Submitted.FULL] * 600
    assert outstanding == 300
    assert await rig.client.xlen(rig.part.prompts("default")) == 300
    await rig.streams.cancel(TOKEN, prompt_of("g0", 1), "surplus", 1)


async def test_submitting_nothing_tells_what_is_outstanding(rig: Rig):
    await rig.submit(prompt_of("g", 3))
    assert await rig.streams.submit(TOKEN, -1, [], 1 << 20) == ([], 3)


async def test_a_group_of_thousands_is_mended(rig: Rig, watched: Watched):
    await rig.submit(prompt_of("g", MANY, token_ids=np.arange(1, dtype=np.int32)))
    mended = await _mend(watched, rig.part, body=b"body")
    assert mended == [trainer.Mended.WELL] * MANY
    await rig.client.delete(rig.part.prompts("default"))
    # What a trainer holds counts for members that were delivered: here, none was.
    held = dict.fromkeys(range(MANY), "5-5")
    mended = await _mend(watched, rig.part, body=b"body", holds=held)
    assert mended == [trainer.Mended.AGAIN] * MANY
    assert await rig.client.xlen(rig.part.prompts("default")) == MANY
    assert set(await _mend(watched, rig.part, body=b"body")) == {trainer.Mended.WELL}
    await rig.client.delete(rig.part.prompts("default"))
    assert set(await _mend(watched, rig.part, body=b"")) == {trainer.Mended.CLOSED}
    assert (await rig.books()).dropped == {"vanished": MANY}


@pytest.mark.parametrize("n", ["", "x", "-1", "9" * 40, "1e9"])
async def test_a_group_record_that_others_wrote_is_left_alone(rig: Rig, n: str):
    await rig.client.hset(rig.part.group("g"), mapping={"n": n, "kind": "train"})
    assert await _mend(rig.client, rig.part, body=b"") == []
    await rig.client.delete(rig.part.group("g"))
    assert await _mend(rig.client, rig.part, body=b"") == []


async def _mend(
    client: Any, part: PartitionKeys, *, body: bytes, holds: dict[int, str] | None = None
) -> list[trainer.Mended]:
    return await trainer.mend(
        client,
        part,
        token=TOKEN,
        group="g",
        route="default",
        body=body,
        task="",
        position=-1,
        holds=holds or {},
    )


async def test_thousands_of_routes_are_counted(rig: Rig, watched: Watched):
    await rig.submit(prompt_of("g", 3, route="r4000"), prompt_of("h", 2, route="r7"))
    routes = [f"r{i}" for i in range(MANY)]
    counts = await reads.ledger(watched, rig.part, routes=routes)
    assert list(counts.routes) == routes
    assert {name: at.length for name, at in counts.routes.items() if at.length} == {
        "r7": 2,
        "r4000": 3,
    }
    assert watched.most > MAX_ARGUMENTS - 4
    assert (await reads.ledger(watched, rig.part, routes=[])).counters[b"submitted:train"] == b"5"
    await rig.streams.cancel(TOKEN, prompt_of("g", 3, route="r4000"), "surplus", 9)


async def test_thousands_of_servers_are_written(rig: Rig, watched: Watched):
    rows = [(f"http://10.0.0.1:{i}", "{}") for i in range(MANY)]
    await run.refit(watched, rig.keys, token=TOKEN, rows=rows)
    assert await rig.client.hlen(rig.keys.weights) == MANY
    await run.refit(watched, rig.keys, token=TOKEN, rows=[(url, "") for url, _ in rows])
    assert await rig.client.hlen(rig.keys.weights) == 0


async def test_nothing_is_sent_for_nothing(rig: Rig):
    part = rig.part
    assert await worker.deliver(rig.client, part, consumer="w1", items=[]) == []
    assert await worker.renew(None, part, route="r", consumer="w1", entries=[]) == []
    assert await worker.handback(None, part, route="r", consumer="w1", leases=[]) == []
    assert await trainer.untrain(None, part, token=TOKEN, rollouts=[]) == 0
    assert await rig.streams.settle(TOKEN, "drop:stale", [("5-5", Kind.TRAIN, "5-5:n")]) == 0
