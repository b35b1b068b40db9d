"""Nothing is left to a server's own defaults of sampling, and samples say how they were sampled."""

import asyncio

import numpy as np
import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.engines import KITS, request_of
from fixtures.fake_openai import FakeLlamaCpp, FakeOpenAI
from fixtures.fake_sglang import FakeSglang
from fixtures.fake_vllm import COMPLETIONS, FakeVllm

from rollfleet_common.errors import EngineRefusedError, SettingsError
from rollfleet_common.messages import Claim, LogprobsKind, Prompt, VersionSpans
from rollfleet_engines.detect import make_engine
from rollfleet_engines.interface import Generation, Sampling
from rollfleet_engines.openai import OpenAIEngine
from rollfleet_engines.resume import join
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.workflows.base import Context


@pytest.fixture
async def engine_of():
    engines = []

    def make(url, **options):
        engines.append(make_engine(url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


# What is sent.


@pytest.mark.parametrize("owner", ["llamacpp", "my-gateway"])
async def test_llama_cpp_samples_from_the_whole_softmax(engine_of, owner):
    async with FakeLlamaCpp(owner=owner) as fake:
        (one,) = await engine_of(fake.url).generate(request_of())
        assert fake.samples_with(fake.seen[0].body) == {}
        assert one.logprobs_kind == LogprobsKind.RAW


async def test_no_default_of_a_command_line_or_a_model_file_applies(engine_of):
    set_there = {"top_n_sigma": 1.0, "xtc_probability": 0.5, "mirostat": 2, "dry_multiplier": 0.8}
    set_there |= {"dynatemp_range": 0.3, "typical_p": 0.9, "presence_penalty": 1.0}
    async with FakeLlamaCpp() as fake:
        fake.defaults.update(set_there)
        await engine_of(fake.url).generate(request_of())
        assert fake.samples_with(fake.seen[0].body) == {}
        assert fake.seen[0].body["samplers"].index("temperature") < 4


async def test_what_is_asked_for_reaches_llama_cpp_by_its_own_names(engine_of):
    async with FakeLlamaCpp() as fake:
        extra = {"repetition_penalty": 1.2}
        await engine_of(fake.url).generate(
            request_of(top_k=7, min_p=0.1, temperature=0.5, extra=extra)
        )
        wanted = {"top_k": 7, "min_p": 0.1, "temperature": 0.5, "repeat_penalty": 1.2}
        assert fake.samples_with(fake.seen[0].body) == wanted


async def test_a_llama_cpp_that_hides_gets_neutral_values_too(engine_of):
    """Behind a gateway without /props nobody knows what it is."""
    async with FakeOpenAI() as fake:
        await engine_of(fake.url).generate(request_of())
        body = fake.seen[0].body
        assert FakeLlamaCpp.samples_with(FakeLlamaCpp(), body) == {"top_k": -1}
        assert body["repetition_penalty"] == 1.0


STRICT = {"top_k", "min_p", "repetition_penalty", "typical_p", "repeat_penalty"}


async def strict(fake, request, body):
    """Refuses what is not OpenAI's, as servers with closed schemas do."""
    if unknown := sorted(STRICT & body.keys()):
        error = {"error": {"message": f"Unrecognized request argument: {unknown[0]}"}}
        return web.json_response(error, status=400)
    return web.json_response(fake.answered(request.path, body))


async def test_a_server_that_refuses_further_fields_gets_the_standard_ones():
    async with FakeOpenAI() as fake:
        client = OpenAIEngine(fake.url)
        fake.script.extend([strict] * 5)
        (one,) = await client.generate(request_of())
        assert one.logprobs_kind == LogprobsKind.UNKNOWN
        await client.generate(request_of())
        assert len(fake.seen) == 3
        with pytest.raises(EngineRefusedError, match="top_k and min_p cannot be sampled with"):
            await client.generate(request_of(top_k=5))
        await client.close()


@pytest.mark.parametrize("route", ["generate", "completions"])
async def test_defaults_of_the_model_do_not_apply_to_vllm(route):
    async with FakeVllm() as fake:
        client = VllmEngine(fake.url, route=route)
        await client.generate(request_of())
        body = fake.seen[0].body
        sent = body if fake.seen[0].path == COMPLETIONS else body["sampling_params"]
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        neutral |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert {name: sent[name] for name in neutral} == neutral
        await client.close()


async def test_stop_tokens_end_a_completion_where_the_server_does_not_know_them(engine_of):
    async with FakeLlamaCpp() as fake:
        engine = engine_of(fake.url)
        (one,) = await engine.generate(request_of(max_tokens=8, stop_token_ids=(6, 2)))
        assert (one.token_ids.tolist(), one.finish_reason) == ([0, 1, 2], "stop")
        assert one.logprobs.tolist() == [-0.125, -0.25, -0.375]
        assert not one.context_full
        (one,) = await engine.generate(request_of(max_tokens=3, stop_token_ids=(2,)))
        assert one.token_ids.tolist() == [0, 1, 2]


# What samples say.


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        (FakeVllm, LogprobsKind.RAW),
        (FakeSglang, LogprobsKind.TEMPERED),
        (FakeLlamaCpp, LogprobsKind.RAW),
        (FakeOpenAI, LogprobsKind.UNKNOWN),
    ],
)
async def test_generations_say_what_their_logprobs_are_of(engine_of, server, kind):
    async with server() as fake:
        (one,) = await engine_of(fake.url).generate(request_of(temperature=0.5))
        assert (one.logprobs_kind, one.temperature) == (kind, 0.5)
        (one,) = await engine_of(fake.url, logprobs="processed").generate(request_of())
        assert (one.logprobs_kind, one.temperature) == (LogprobsKind.PROCESSED, 1.0)


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(SettingsError, match="none of auto, raw, tempered, processed"):
        VllmEngine("http://x", logprobs="cooked")


def test_segments_that_differ_say_so():
    def piece(kind, temperature):
        arrays = np.array([1], np.int32), np.zeros(1, np.float32), VersionSpans.constant(1)
        return Generation(*arrays, "length", "s", logprobs_kind=kind, temperature=temperature)

    raw, tempered = piece("raw", 1.0), piece("tempered", 0.5)
    assert (join([raw, raw], "stop").logprobs_kind, join([raw, raw], "stop").temperature) == (
        "raw",
        1.0,
    )
    mixed = join([raw, tempered], "stop")
    assert (mixed.logprobs_kind, mixed.temperature) == (LogprobsKind.UNKNOWN, None)


# Seeds, and siblings that stand for themselves.


class Echo:
    """Notes the seeds that it was asked with."""

    def __init__(self):
        self.seeds = []

    async def generate(self, request, n=1):
        self.seeds.append(request.sampling.seed)
        arrays = np.array([1], np.int32), np.zeros(1, np.float32), VersionSpans.constant(1)
        made = Generation(*arrays, "stop", "s", logprobs_kind="raw", temperature=0.7)
        return [made] * n


def context_of(engine, index, attempt=1, **sampling):
    prompt = Prompt("g", 4, np.array([1, 2], np.int32), sampling=sampling)
    claim = Claim(prompt, index, attempt, "1-0", 0, 0)
    return Context(claim, 1, engine, Sampling(max_tokens=4), None)


async def test_members_of_a_seeded_group_differ_and_attempts_do_not():
    echo = Echo()
    for attempt in (1, 2):
        for index in range(4):
            await context_of(echo, index, attempt, seed=42).generate([1, 2])
    await context_of(echo, 3).generate([1, 2], seed=7)
    await context_of(echo, 3).generate([1, 2])
    assert echo.seeds == [42, 43, 44, 45] * 2 + [10, None]


async def test_a_sample_carries_how_it_was_sampled():
    context = context_of(Echo(), 0)
    sample = context.sample([1, 2], await context.generate([1, 2]), 1.0)
    assert (sample.logprobs_kind, sample.temperature, sample.context_full) == ("raw", 0.7, False)


@pytest.fixture(params=KITS, ids=repr)
def kit(request):
    return request.param


async def test_one_unusable_answer_spoils_no_sibling(kit):
    """One of eight is broken, whether the server was asked for them at once or one by one."""
    async with kit.server() as fake:
        pool = EnginePool([kit.client(fake.url)])
        engine = CoalescingEngine(pool, max_merge=8)

        def spoil(answer):
            kit.set_ids(answer[0] if isinstance(answer, list) else answer, None)

        fake.script.append(fake_vllm.spoilt(spoil))
        made = await asyncio.gather(
            *(engine.generate(request_of()) for _ in range(8)), return_exceptions=True
        )
        failed = [one for one in made if isinstance(one, Exception)]
        assert len(failed) <= 1, failed
        if kit.name == "openai":
            assert [len(seen.body["prompt"]) for seen in fake.seen] == [4] * 8
        await engine.close()
