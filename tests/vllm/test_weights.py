"""Real weights change under a real load: every token is judged by a forward pass of its own weights.

A label that is one token off, a key or value of older weights, a segment that was tagged as a
whole: each of them shows as a log-probability that these weights do not give.
"""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from fixtures.real_vllm import LONG, TOLERANCE, URL, needs_model, request_of, running

from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer

pytestmark = needs_model

#: Long enough for several blocks of a prefix cache.
PREFIX = [3 + i * 7 % 120 for i in range(700)]


@pytest.fixture
async def engine(control):
    made = VllmEngine(URL, route="generate", timeout_s=300.0)
    yield made
    await made.close()


def changes(made):
    return made.versions.versions.tolist()


@pytest.mark.parametrize("mode", ["keep", "abort"])
async def test_weights_reloaded_under_load_and_no_token_mislabelled(engine, control, forward, mode):
    request = request_of(version=0, max_tokens=LONG)
    task = asyncio.create_task(Resumer(engine).generate(request, 3))
    for number in (1, 2):
        await running(task, 3, tokens=150)
        await control.refit(number, f"/pause?mode={mode}")
    made = await task
    for one in made:
        assert len(one.token_ids) == LONG
        assert changes(one) == [0, 1, 2]
        forward.judge(request.token_ids, one)


async def test_keys_and_values_that_a_server_keeps_are_labelled_truly_too(engine, control, forward):
    request = request_of(version=0, max_tokens=LONG)
    task = asyncio.create_task(engine.generate(request))
    for number in (1, 2):
        await running(task, tokens=100)
        await control.refit(number, "/pause?mode=keep&clear_cache=false")
    (one,) = await task
    assert changes(one) == [0, 1, 2]
    # What came before is seen as the older weights saw it, and that is not what these would see.
    forward.judge(request.token_ids, one, kept=True)
    with pytest.raises(AssertionError, match="is off by"):
        forward.judge(request.token_ids, one)


async def test_waiting_for_the_end_gives_whole_generations(engine, control, forward):
    request = request_of(version=0, max_tokens=200)
    task = asyncio.create_task(engine.generate(request))
    await running(task)
    await control.refit(1, "/pause?mode=wait")
    (before,) = await task
    (after,) = await engine.generate(replace(request, version=1))
    assert (changes(before), changes(after)) == ([0], [1])
    forward.judge(request.token_ids, before)
    forward.judge(request.token_ids, after)


async def test_reloads_under_a_crowd_leaves_nothing_mislabelled(control, forward):
    engine = CoalescingEngine(EnginePool([VllmEngine(URL, route="generate")], per_server_cap=32))
    ended = asyncio.Event()

    async def crowd(seat):
        made = []
        while not ended.is_set():
            prompt = [3 + seat, 4, 5, 6 + len(made) % 100]
            request = replace(
                request_of(prompt, version=control.weights, max_tokens=20 + seat),
                affinity=str(seat // 4),
            )
            made += [(prompt, one) for one in await engine.generate(request)]
        return made

    tasks = [asyncio.create_task(crowd(seat)) for seat in range(16)]
    for number in (1, 2, 3):
        await running(tasks[0], 8, tokens=200)
        await control.refit(number)
    await running(tasks[0], 8, tokens=200)
    ended.set()
    made = [one for each in await asyncio.gather(*tasks) for one in each]
    seen = {tuple(changes(one)) for _, one in made}
    assert {version for versions in seen for version in versions} == {0, 1, 2, 3}
    assert any(len(versions) > 1 for versions in seen), "no generation was in flight at a refit"
    for prompt, one in made:
        forward.judge(prompt, one)
    await engine.close()


async def test_a_reload_without_a_new_label_is_seen_by_the_judge(engine, control, forward):
    # What a fleet must never do, done by hand: or the judge might be one who agrees to everything.
    await control("/pause?mode=keep")
    await control.load(1)
    await control("/resume")
    (one,) = await engine.generate(request_of(version=0, max_tokens=64))
    assert changes(one) == [0]
    with pytest.raises(AssertionError, match="is off by"):
        forward.judge(request_of().token_ids, one)


async def test_the_salt_keeps_a_new_version_from_reading_old_keys(engine, control, forward):
    request = request_of(PREFIX, version=0, max_tokens=16)
    for _ in range(2):
        (one,) = await engine.generate(request)
        forward.judge(PREFIX, one)
    assert await control.metric("vllm:prefix_cache_hits_total") > 0
    # The pause of a refit clears the cache unless it is told not to: then only the salt is left.
    await control.refit(1, "/pause?mode=keep&clear_cache=false")
    (stale,) = await engine.generate(request)
    assert changes(stale) == [1]
    pure = forward.logprobs(PREFIX, stale.token_ids.tolist(), [(0, 1)])
    assert np.abs(pure - stale.logprobs).max() > 10 * TOLERANCE, "the old salt read no old keys"
    (fresh,) = await engine.generate(replace(request, version=1))
    assert changes(fresh) == [1]
    forward.judge(PREFIX, fresh)
