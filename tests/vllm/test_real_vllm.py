"""The vLLM client against a real vLLM, which is the judge of it and of the recorded shapes.

Wants a server that nobody else uses, started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out,
at ROLLFLEET_VLLM_URL; a context of 2,048 to 16,384 tokens and 8 sequences at once will do.
"""

import asyncio
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from fixtures.real_vllm import LONG, URL, needs_model, request_of, running

from rollfleet_common.errors import EngineRefusedError, EngineUnavailableError
from rollfleet_engines.vllm import Route, VllmEngine
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer

ROUTES: list[Route] = ["generate", "completions"]


@pytest.fixture(params=ROUTES)
async def engine(request, control):
    made = VllmEngine(URL, route=request.param, timeout_s=300.0)
    yield made
    await made.close()


async def test_ids_logprobs_and_versions(engine):
    assert await engine.ready()
    made = await engine.generate(request_of(), n=3)
    assert len(made) == 3
    for one in made:
        assert len(one.token_ids) == len(one.logprobs) == 12
        assert (one.logprobs <= 0).all()
        assert one.versions.expand(12).tolist() == [3] * 12
        assert one.finish_reason == "length"
    assert len({one.token_ids.tobytes() for one in made}) == 3


async def test_auto_finds_the_route_with_versions(control):
    engine = VllmEngine(URL)
    await engine.generate(request_of())
    assert engine.route == "generate"
    await engine.close()


async def test_greedy_is_one_answer_on_both_routes(control):
    answers = []
    for route in ROUTES:
        engine = VllmEngine(URL, route=route)
        answers += await engine.generate(request_of(temperature=0.0), n=2)
        await engine.close()
    assert len({one.token_ids.tobytes() for one in answers}) == 1
    for one in answers:
        assert np.allclose(one.logprobs, answers[0].logprobs, atol=1e-5)


async def test_a_seed_repeats_itself_and_a_stop_token_stops(engine):
    first, second = [(await engine.generate(request_of(seed=7)))[0] for _ in range(2)]
    assert first.token_ids.tolist() == second.token_ids.tolist()
    stop = int(first.token_ids[4])
    (third,) = await engine.generate(request_of(seed=7, stop_token_ids=(stop,)))
    at = first.token_ids.tolist().index(stop)
    assert third.token_ids.tolist() == first.token_ids[: at + 1].tolist()
    assert third.finish_reason == "stop"


@needs_model
async def test_logprobs_are_those_of_a_direct_forward_pass(engine, forward):
    request = request_of(version=0, max_tokens=200)
    (made,) = await engine.generate(request)
    forward.judge(request.token_ids, made)


@needs_model
async def test_token_ids_are_those_that_were_sent_and_sampled(engine, forward):
    # Every id of the vocabulary, special ones too: text would not bring them back.
    request = request_of(prompt=range(128), version=0, max_tokens=64, temperature=2.0)
    (made,) = await engine.generate(request)
    assert made.token_ids.min() >= 0
    assert made.token_ids.max() < 128
    forward.judge(request.token_ids, made)


async def test_a_new_version_under_load_splits_the_spans(engine, control):
    await control("/update_weight_version", new_version="7")
    task = asyncio.create_task(engine.generate(request_of(version=7, max_tokens=LONG)))
    await running(task)
    await control("/pause?mode=keep")
    await control("/update_weight_version", new_version="8")
    await control("/resume")
    (made,) = await task
    assert len(made.token_ids) == LONG
    versions = made.versions.expand(LONG)
    assert versions[0] == 7
    if engine.route == "generate":
        assert set(versions.tolist()) == {7, 8}
        assert (np.diff(versions) >= 0).all()
    else:
        # This route tells nothing per token: the older one counts.
        assert set(versions.tolist()) == {7}


@pytest.mark.parametrize("n", [1, 3])
async def test_an_abort_is_resumed_on_the_original_budget(engine, control, n):
    await control("/update_weight_version", new_version="4")
    request = request_of(version=4, max_tokens=LONG)
    task = asyncio.create_task(Resumer(engine).generate(request, n))
    await running(task, n)
    await control("/pause?mode=abort")
    await control("/update_weight_version", new_version="5")
    await control("/resume")
    for made in await task:
        assert len(made.token_ids) == len(made.logprobs) == LONG
        assert made.finish_reason == "length"
        versions = made.versions.expand(LONG)
        assert versions[0] == 4
        if engine.route == "generate":
            assert versions[-1] == 5
            assert (np.diff(versions) >= 0).all()


async def test_an_abort_before_the_first_token_is_asked_again(engine, control):
    await control("/pause?mode=abort")
    task = asyncio.create_task(Resumer(engine).generate(request_of()))
    aborted = 0
    while not aborted:
        aborted = (await control("/abort_requests"))["aborted"]
    await control("/resume")
    (made,) = await task
    assert len(made.token_ids) == 12


async def test_a_cancelled_call_is_aborted_on_the_server(engine, control):
    task = asyncio.create_task(engine.generate(request_of(max_tokens=LONG)))
    await running(task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    # It would block here until the request had run to its end.
    async with asyncio.timeout(10):
        await control("/pause?mode=wait")


async def test_refusals_are_the_prompts_fault(engine):
    for request in (
        request_of(prompt=[5] * 20_000),
        request_of(prompt=[10**6]),
        request_of(top_p=7.0),
    ):
        with pytest.raises(EngineRefusedError, match="400"):
            await engine.generate(request)


async def test_a_wrong_model_is_the_set_up(control):
    for route in get_args(Route):
        engine = VllmEngine(URL, model="no-such-model", route=route)
        with pytest.raises(EngineUnavailableError, match="no-such-model"):
            await engine.generate(request_of())
        assert not await engine.ready()
        await engine.close()


async def test_siblings_through_a_pool(control):
    engine = CoalescingEngine(EnginePool([VllmEngine(URL)], per_server_cap=8))
    made = await asyncio.gather(
        *(engine.generate(replace(request_of(), affinity=str(i // 4))) for i in range(32))
    )
    assert all(len(one.token_ids) == 12 for (one,) in made)
    assert len({one.token_ids.tobytes() for (one,) in made}) == 32
    await engine.close()
