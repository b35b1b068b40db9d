"""Two real servers, one of which is killed in the middle: the pool goes on at the other."""

import asyncio
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
from fixtures.real_vllm import URL, Control, needs_model, request_of, running, start_server
from support import wait_until_async

from rollfleet_common.errors import EngineUnavailableError
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.pool import EnginePool, ServerState
from rollfleet_worker.pool.resuming import Resumer

pytestmark = needs_model

#: Some seconds even for twelve at once, so that the kill falls into the middle.
TOKENS = 1000


@pytest.fixture
async def spare(control, tmp_path):
    """A server beside the shared one, that may be killed."""
    server = start_server(tmp_path)
    try:
        await asyncio.to_thread(server.wait)
        yield server
    finally:
        server.end()


def state_of(pool, server):
    (found,) = [one for one in pool.states() if one.name == server.url]
    return found.state


async def test_a_server_killed_mid_generation_and_back(spare, control, forward, tmp_path):
    pool = EnginePool([VllmEngine(url, route="generate") for url in (URL, spare.url)])
    await pool.generate(request_of(version=0))
    # The first one that answers would get the whole crowd.
    await wait_until_async(
        lambda: {one.state for one in pool.states()} == {ServerState.SERVING}, "both to serve"
    )
    request = request_of(version=0, max_tokens=TOKENS)
    tasks = [
        asyncio.create_task(pool.generate(replace(request, affinity=str(seat))))
        for seat in range(12)
    ]
    crowd = asyncio.gather(*tasks)
    await asyncio.gather(*(running(crowd, 1, url, tokens=50) for url in (URL, spare.url)))
    spare.kill()
    made = [one for (one,) in await crowd]
    assert {one.server for one in made} == {URL}
    for one in made:
        assert len(one.token_ids) == TOKENS
        assert one.versions.versions.tolist() == [0]
        forward.judge(request.token_ids, one)
    assert state_of(pool, spare) != ServerState.SERVING
    alone = VllmEngine(spare.url, route="generate", connect_timeout_s=2.0)
    with pytest.raises(EngineUnavailableError):
        await alone.generate(request)
    await alone.close()
    # The same address, started anew: let in again without a word from anybody.
    again = start_server(tmp_path, "again", port=spare.port)
    try:
        await asyncio.to_thread(again.wait)

        async def served():
            seats = [replace(request_of(version=0), affinity=str(seat)) for seat in range(12)]
            made = await asyncio.gather(*(pool.generate(seat) for seat in seats))
            return spare.url in {one.server for (one,) in made}

        await wait_until_async(served, "a generation of the server that came back", 90.0)
        assert state_of(pool, spare) == ServerState.SERVING
    finally:
        again.end()
        await pool.close()


async def test_an_abort_is_resumed_wherever_there_is_a_server(spare, control, forward):
    """Cut off at one server, under one version; finished under another, and every token is true."""
    async with aiohttp.ClientSession(spare.url, raise_for_status=True) as session:
        other = Control(session)
        await other("/update_weight_version", new_version="0")
        engine = Resumer(VllmEngine(spare.url, route="generate"))
        request = request_of(version=0, max_tokens=TOKENS)
        task = asyncio.create_task(engine.generate(request, 2))
        await running(task, 2, spare.url, tokens=100)
        await other.refit(2, "/pause?mode=abort")
        for one in await task:
            assert one.versions.versions.tolist() == [0, 2]
            assert len(one.token_ids) == TOKENS
            assert np.isfinite(one.logprobs).all()
            forward.judge(request.token_ids, one)
        await engine.close()
