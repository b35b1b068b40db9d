"""Whose fault a refusal is, on all engines: the prompt's length, the prompt's, or the server's."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from fixtures import fake_vllm
from fixtures.engines import KITS, request_of
from fixtures.fake_openai import FakeLlamaCpp
from fixtures.fake_vllm import FakeVllm
from hypothesis import given
from hypothesis import strategies as st

from rollfleet_common.errors import (
    ContextFullError,
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
)
from rollfleet_engines.openai import OpenAIEngine
from rollfleet_engines.refusals import REFUSED_IN_A_ROW, context_refusal
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.breaker import BreakerSettings
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer
from rollfleet_worker.pool.server_states import ServerState


@pytest.fixture(params=KITS, ids=repr)
def kit(request):
    return request.param


@pytest.fixture
async def fake(kit):
    async with kit.server() as server:
        yield server


@pytest.fixture
async def client(fake, kit):
    made = kit.client(fake.url, timeout_s=20.0)
    yield made
    await made.close()


def prompt_of(tokens, group="g", **sampling):
    return replace(
        request_of(**sampling), token_ids=np.arange(tokens, dtype=np.int32), affinity=group
    )


# The server's.


@pytest.mark.parametrize("code", [400, 413, 422])
async def test_a_server_that_has_completed_nothing_is_at_fault_itself(fake, client, code):
    fake.script.append(fake_vllm.status(code, "no such tenant"))
    with pytest.raises(EngineProtocolError, match=r"no such tenant.*not completed any token ids"):
        await client.generate(request_of())
    await client.generate(request_of())
    fake.script.append(fake_vllm.status(code, "no such token"))
    with pytest.raises(EngineRefusedError, match="no such token"):
        await client.generate(request_of())


@pytest.mark.parametrize("code", [500, 501])
async def test_a_server_that_fails_on_token_ids_is_named(fake, client, code):
    fake.script.append(fake_vllm.status(code, "'list' object has no attribute 'strip'"))
    with pytest.raises(
        EngineUnavailableError, match=r"'strip'.*takes no token ids.*vLLM or SGLang"
    ):
        await client.generate(request_of())
    await client.generate(request_of())
    fake.script.append(fake_vllm.status(code, "out of memory"))
    with pytest.raises(EngineUnavailableError) as caught:
        await client.generate(request_of())
    assert "token ids" not in str(caught.value)


async def test_refusals_of_many_prompts_in_a_row_are_the_servers(fake, client):
    async def refused(group):
        fake.script.append(fake_vllm.status(400, "quota"))
        with pytest.raises((EngineRefusedError, EngineProtocolError)) as caught:
            await client.generate(prompt_of(4, group))
        return caught.type

    await client.generate(request_of())
    # One prompt, however often it is tried, says nothing of the server.
    assert [await refused("same") for _ in range(2 * REFUSED_IN_A_ROW)] == [EngineRefusedError] * (
        2 * REFUSED_IN_A_ROW
    )
    for k in range(REFUSED_IN_A_ROW - 2):
        assert await refused(f"g{k}") is EngineRefusedError
    assert await refused("last") is EngineProtocolError
    await client.generate(request_of())
    assert await refused("other") is EngineRefusedError


async def test_a_gateway_that_refuses_everything_goes_out_with_its_own_words(fake, kit):
    pool = EnginePool(
        [kit.client(fake.url)],
        wait_s=0.2,
        patience=BreakerSettings(backoff_s=60.0, max_backoff_s=60.0),
    )
    fake.script.extend([fake_vllm.status(422, "tenant unknown")] * 3)
    for k in range(3):
        with pytest.raises(EngineProtocolError):
            await pool.generate(prompt_of(4, f"g{k}"))
    (one,) = pool.states()
    assert one.state is ServerState.SUSPECT
    assert "tenant unknown" in one.last_error
    await pool.close()


# The prompt's length.


async def test_a_prompt_that_is_too_long_is_at_fault_on_a_server_that_is_not_proven(fake, client):
    fake.context = 8
    for k in range(4 * REFUSED_IN_A_ROW):
        with pytest.raises(ContextFullError, match=r"context"):
            await client.generate(prompt_of(12, f"g{k}"))
    # The server is as good as before.
    (one,) = await client.generate(prompt_of(4, max_tokens=2))
    assert len(one.token_ids) == 2


async def test_overlong_prompts_at_the_head_put_no_server_out(fake, kit):
    fake.context = 8
    pool = EnginePool([kit.client(fake.url)], wait_s=5.0)
    caught = await asyncio.gather(
        *(pool.generate(prompt_of(12, f"g{k}")) for k in range(48)), return_exceptions=True
    )
    assert {type(one) for one in caught} == {ContextFullError}
    assert len(await pool.generate(prompt_of(4, max_tokens=2))) == 1
    assert [one.state for one in pool.states()] == [ServerState.SERVING]
    await pool.close()


async def test_what_does_not_fit_is_asked_for_as_far_as_it_does(fake, client, kit):
    fake.context = 32
    (one,) = await client.generate(prompt_of(20, max_tokens=100))
    # SGLang wants one place more than the tokens that it makes.
    left = 11 if kit.name == "sglang" else 12
    assert (len(one.token_ids), one.finish_reason, one.context_full) == (left, "length", True)
    (one,) = await client.generate(prompt_of(4, max_tokens=8))
    assert (len(one.token_ids), one.finish_reason, one.context_full) == (8, "length", False)


async def test_the_context_that_was_learnt_spares_a_refusal(fake, client):
    fake.context = 32
    await client.generate(prompt_of(20, max_tokens=100))
    before = len(fake.seen)
    await client.generate(prompt_of(10, max_tokens=100))
    assert len(fake.seen) == before + 1
    with pytest.raises(ContextFullError, match=r"40 tokens leaves no room .* has 3[12] for"):
        await client.generate(prompt_of(40, max_tokens=100))


async def test_segments_use_the_room_that_is_left(fake, client, kit):
    fake.context = 100
    engine = Resumer(client, segment_tokens=32)
    (one,) = await engine.generate(prompt_of(10, max_tokens=1000))
    left = 89 if kit.name == "sglang" else 90
    assert (len(one.token_ids), one.finish_reason, one.context_full) == (left, "length", True)


async def test_a_context_that_ends_with_a_segment_is_marked_too(fake, client, kit):
    fake.context = 43 if kit.name == "sglang" else 42
    engine = Resumer(client, segment_tokens=32)
    (one,) = await engine.generate(prompt_of(10, max_tokens=1000))
    assert (len(one.token_ids), one.finish_reason, one.context_full) == (32, "length", True)


async def test_a_refusal_that_names_a_context_with_room_is_of_another_kind(fake, client):
    await client.generate(request_of())
    fake.script.append(fake_vllm.status(400, "bad field; maximum context length is 32768 tokens"))
    with pytest.raises(EngineRefusedError, match="bad field") as caught:
        await client.generate(request_of())
    assert not isinstance(caught.value, ContextFullError)


async def test_a_gateway_that_refuses_everything_with_such_words_is_at_fault(fake, client):
    words = "maximum context length is 100 tokens"
    fake.script.extend([fake_vllm.status(400, words)] * 3)
    with pytest.raises(EngineProtocolError, match=r"100 tokens.*not completed any token ids"):
        await client.generate(prompt_of(20, max_tokens=200))
    # Nothing is left of the limit that it named.
    (one,) = await client.generate(prompt_of(20, max_tokens=200))
    assert len(one.token_ids) == 200


async def test_a_limit_that_the_refusal_does_not_name_is_read_off_the_models(monkeypatch):
    async with FakeVllm(context=32) as fake:
        client = VllmEngine(fake.url)
        words = "the request exceeds the available context size, try increasing it"
        fake.script.append(fake_vllm.status(400, words))
        monkeypatch.setattr(fake, "too_long", lambda *_: None)
        (one,) = await client.generate(prompt_of(20, max_tokens=100))
        assert (len(one.token_ids), one.context_full) == (12, True)
        await client.close()


async def test_without_any_limit_it_is_refused_as_before():
    async with FakeVllm() as fake:
        client = VllmEngine(fake.url)
        fake.script.append(fake_vllm.status(400, "prompt is too long"))
        with pytest.raises(ContextFullError, match="prompt is too long"):
            await client.generate(prompt_of(20, max_tokens=100))
        await client.close()


async def test_llama_cpp_is_never_asked_for_more_than_its_context():
    # With --context-shift it would go on, and forget its prompt.
    async with FakeLlamaCpp(context=32) as fake:
        client = OpenAIEngine(fake.url)
        (one,) = await client.generate(prompt_of(20, max_tokens=100))
        assert (len(one.token_ids), one.context_full) == (12, True)
        assert [seen.body["max_tokens"] for seen in fake.seen] == [12]
        await client.close()


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ("This model's maximum context length is 8192 tokens. However, you requested 900", 8192),
        (
            "The decoder prompt (length 12324) is longer than the maximum model length of 8192.",
            8192,
        ),
        (
            "The input (131123 tokens) is longer than the model's context length (131072 tokens)",
            131072,
        ),
        (
            "Requested token count exceeds the model's maximum context length of 64000 tokens.",
            64000,
        ),
        ('{"message":"exceeds the available context size","n_prompt_tokens":9,"n_ctx":8192}', 8192),
        ("request (9412 tokens) exceeds the available context size (8192 tokens)", 8192),
        (
            "Input length (265330 tokens) exceeds the maximum allowed length (262144 tokens).",
            262144,
        ),
        ('{"code":"context_length_exceeded"}', 0),
    ],
)
def test_limits_are_read_in_the_words_of_every_server(words, limit):
    found = context_refusal(words.encode())
    assert found is not None
    assert found.limit == limit


@pytest.mark.parametrize("words", ["", "quota", "Unexpected fields: return_token_ids", "\xff\xfe"])
def test_other_refusals_name_no_context(words):
    assert context_refusal(words.encode("latin-1")) is None


@given(st.binary(max_size=300))
def test_no_bytes_upset_the_reader(body):
    for text in (body, b"context length " + body, b'"n_ctx": ' + body):
        found = context_refusal(text)
        assert found is None or (found.limit >= 0 and found.used >= 0)
