"""What goes on from tokens of some version rather goes to a server that has it, and never waits for one."""

import asyncio
from dataclasses import replace

import pytest
from fixtures.cut_off_model import Model, request_for
from fixtures.scripted_engine import Gate, Server, request_of
from support import wait_until_async

from rollfleet_common import servers as registry
from rollfleet_common.messages import PolicyVersion
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer

BOARD = PolicyVersion(version=3, epoch=1)


@pytest.fixture
async def pool():
    """Servers `old` (refitted to 2) and `new` (to 3), a place each."""
    servers = {name: Server(name) for name in ("old", "new")}
    made = EnginePool(list(servers.values()), 1, wait_s=5.0)
    rows = [
        ServerWeights(name, WeightState.SERVING, version, epoch=1, at_ms=1)
        for name, version in (("old", 2), ("new", 3))
    ]
    made.apply(
        {name: registry.RegisteredServer(name) for name in servers},
        {row.url: row for row in rows},
        BOARD,
    )
    made.servers = servers
    yield made
    await made.close()


async def asked(pool, not_before, affinity):
    (made,) = await pool.generate(replace(request_of(affinity), not_before=not_before))
    return made.server


async def test_a_server_that_has_the_version_comes_first_whatever_the_affinity(pool):
    seats = [str(seat) for seat in range(12)]
    assert {await asked(pool, -1, seat) for seat in seats} == {"old", "new"}
    assert {await asked(pool, 2, seat) for seat in seats} == {"old", "new"}
    assert {await asked(pool, 3, seat) for seat in seats} == {"new"}
    # Nobody has it yet: who goes on does not wait for a refit.
    assert {await asked(pool, 4, seat) for seat in seats} == {"old", "new"}


async def test_a_free_older_server_is_better_than_a_full_newer_one(pool):
    pool.servers["new"].gate = Gate()
    held = asyncio.create_task(asked(pool, 3, "a"))
    await wait_until_async(lambda: pool.servers["new"].in_flight, "the call to be held")
    assert await asyncio.wait_for(asked(pool, 3, "a"), 5) == "old"
    pool.servers["new"].gate.set()
    assert await held == "new"


async def test_every_segment_says_the_version_of_the_newest_token():
    model = Model([])  # its version grows with every request
    await Resumer(model, segment_tokens=4).go_on(request_for(10))
    assert [one.not_before for one in model.asked] == [-1, 1, 2]
    made = model.piece(0, 4, "abort")  # of version 3
    await Resumer(model).go_on(request_for(10), made)
    assert model.asked[-1].not_before == 3
