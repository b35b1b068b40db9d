"""The vLLM client against a real vLLM, which is the judge of it and of the recorded shapes.

Wants a server that nobody else uses, started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out,
at ROLLFLEET_VLLM_URL; a context of 2,048 to 16,384 tokens and 8 sequences at once will do. On a
machine of few cores, leave one to its API server (VLLM_CPU_OMP_THREADS_BIND): a starved one learns
of a pause when the generation is over. With ROLLFLEET_VLLM_MODEL (the served model's folder) logprobs are compared with a direct forward pass.
"""

import asyncio
import os
from dataclasses import replace
from typing import get_args

import aiohttp
import numpy as np
import pytest

from rollfleet_common.errors import EngineRefusedError, EngineUnavailableError
from rollfleet_worker.inference.engine import Request, Sampling
from rollfleet_worker.inference.pool import EnginePool
from rollfleet_worker.inference.siblings import SiblingEngine
from rollfleet_worker.inference.vllm import Route, VllmEngine

URL = os.environ.get("ROLLFLEET_VLLM_URL", "")
MODEL = os.environ.get("ROLLFLEET_VLLM_MODEL", "")
ROUTES: list[Route] = ["generate", "completions"]
#: Tokens that take a tiny model some seconds: time enough to interrupt it.
LONG = 1500

pytestmark = pytest.mark.skipif(
    not URL, reason="ROLLFLEET_VLLM_URL is not set: no real vLLM to test against"
)


def request_of(prompt=(5, 6, 7, 8), version=3, **sampling):
    sampling = {"max_tokens": 12, "extra": {"ignore_eos": True}, **sampling}
    return Request(np.array(prompt, np.int32), Sampling(**sampling), "group", version)


@pytest.fixture
async def control():
    """The server's control routes; whatever a test did to versions and pauses is undone."""
    async with aiohttp.ClientSession(URL, raise_for_status=True) as session:

        async def post(path, **payload):
            async with session.post(path, json=payload) as response:
                return await response.json()

        await post("/update_weight_version", new_version="default")
        yield post
        await post("/resume")
        await post("/update_weight_version", new_version="default")


@pytest.fixture(params=ROUTES)
async def engine(request, control):
    made = VllmEngine(URL, route=request.param, timeout_s=300.0)
    yield made
    await made.close()


async def running(task, at_least=1):
    """Until the server itself says that so many requests are running, and `task` is not done."""
    async with aiohttp.ClientSession(URL, raise_for_status=True) as session, asyncio.timeout(30):
        while True:
            async with session.get("/metrics") as response:
                text = await response.text()
            counts = [
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("vllm:num_requests_running")
            ]
            assert not task.done(), "it was over before the server could be asked: see LONG"
            if sum(counts) >= at_least:
                return
            await asyncio.sleep(0.01)


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


@pytest.mark.skipif(not MODEL, reason="ROLLFLEET_VLLM_MODEL is not set: no weights to compare with")
async def test_logprobs_are_those_of_a_direct_forward_pass(engine):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    request = request_of(max_tokens=200)
    (made,) = await engine.generate(request)
    ids = np.concatenate([request.token_ids, made.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0, len(request.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1).numpy()
    direct = logprobs[np.arange(200), made.token_ids]
    assert np.abs(direct - made.logprobs).max() < 2e-3


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
    task = asyncio.create_task(engine.generate(request_of(version=4, max_tokens=LONG), n))
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
    task = asyncio.create_task(engine.generate(request_of()))
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
    engine = SiblingEngine(EnginePool([VllmEngine(URL)], per_server_cap=8))
    made = await asyncio.gather(
        *(engine.generate(replace(request_of(), affinity=str(i // 4))) for i in range(32))
    )
    assert all(len(one.token_ids) == 12 for (one,) in made)
    assert len({one.token_ids.tobytes() for (one,) in made}) == 32
    await engine.close()
