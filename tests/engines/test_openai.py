"""Servers of OpenAI's routes: what they can say exactly is taken, the rest is refused by name."""

import pytest
from fixtures import fake_vllm
from fixtures.engines import request_of
from fixtures.fake_openai import FakeOpenAI

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
)
from rollfleet_engines.openai import OpenAIEngine


@pytest.fixture
async def fake():
    async with FakeOpenAI() as server:
        yield server


@pytest.fixture
async def connect(fake):
    clients = []

    def make(**options):
        clients.append(OpenAIEngine(fake.url, **{"timeout_s": 20.0, **options}))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


@pytest.mark.parametrize("dialect", ["ids", "beside", "names"])
async def test_ids_are_read_where_the_server_puts_them(fake, connect, dialect):
    fake.dialect = dialect
    (one,) = await connect().generate(request_of())
    assert one.token_ids.tolist() == [0, 1, 2, 3]
    assert one.logprobs.tolist() == [-0.125, -0.25, -0.375, -0.5]
    assert one.finish_reason == "length"
    assert one.server == fake.url


async def test_text_without_ids_is_refused_and_says_what_to_do(fake, connect):
    fake.dialect = "text"
    with pytest.raises(
        EngineProtocolError, match=rf"{fake.url}.*no token ids and no logprobs.*chat"
    ):
        await connect().generate(request_of())


async def test_ids_with_logprobs_ignored_are_refused(fake, connect):
    fake.script.append(fake_vllm.spoilt(lambda a: a["choices"][0].update(logprobs=None)))
    with pytest.raises(EngineProtocolError, match="no logprobs in the answer"):
        await connect().generate(request_of())


async def test_a_text_token_among_named_ids_is_no_id(fake, connect):
    fake.dialect = "names"

    def spoil(answer):
        answer["choices"][0]["logprobs"]["tokens"][2] = "a"

    fake.script.append(fake_vllm.spoilt(spoil))
    with pytest.raises(EngineProtocolError, match="no token ids"):
        await connect().generate(request_of())


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        # A token that the server put before the prompt.
        ({"prompt_tokens": 5}, "a prompt of 5 tokens, not ours of 4"),
        # A token that splits a character has no entry at llama.cpp's.
        ({"completion_tokens": 5}, "counts 5 tokens and names 4"),
    ],
)
async def test_counts_that_differ_are_refused(fake, connect, usage, said):
    fake.dialect = "beside"
    fake.script.append(fake_vllm.spoilt(lambda answer: answer["usage"].update(usage)))
    with pytest.raises(EngineProtocolError, match=said):
        await connect().generate(request_of())


async def test_the_request_says_all_that_matters(fake, connect):
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop_token_ids": (1,)}
    await connect().generate(request_of(seed=11, extra={"user": "me"}, **sampling))
    (seen,) = fake.seen
    assert seen.headers["X-Session-ID"] == "group%201"
    assert seen.body == {
        "model": "tiny",
        "prompt": [5, 6, 7, 8],
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop_token_ids": [1],
        "seed": 11,
        "user": "me",
        # Stated at their neutral values: a server may have defaults of its own.
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "repeat_penalty": 1.0,
        "typical_p": 1.0,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "cache_salt": "3",
        "stream": False,
    }


async def test_completions_are_asked_for_one_by_one_with_seeds_of_their_own(fake, connect):
    assert len(await connect().generate(request_of(seed=3), n=3)) == 3
    assert sorted(seen.body["seed"] for seen in fake.seen) == [3, 4, 5]
    assert all("n" not in seen.body for seen in fake.seen)


async def test_fields_that_are_the_clients_are_refused(fake, connect):
    with pytest.raises(EngineRefusedError, match="return_token_ids"):
        await connect().generate(request_of(extra={"return_token_ids": False}))
    assert not fake.seen


async def test_a_refusal_is_the_servers_until_one_prompt_went_through(fake, connect):
    client = connect()
    fake.script.append(fake_vllm.status(422, "Unexpected fields: return_token_ids"))
    with pytest.raises(EngineProtocolError, match=r"return_token_ids.*not completed any token ids"):
        await client.generate(request_of())
    await client.generate(request_of())
    fake.script.append(fake_vllm.status(400, "too long"))
    with pytest.raises(EngineRefusedError, match="too long"):
        await client.generate(request_of())


@pytest.mark.parametrize(
    ("serves", "base", "expected"), [(-1, None, 6), (-1, 0, 0), (4, None, 4), (4, 0, 4)]
)
async def test_versions_are_what_is_known_of_the_server(fake, connect, serves, base, expected):
    client = connect(base_version=base)
    (one,) = await client.generate(request_of(version=6, serves=serves))
    assert one.versions.expand(4).tolist() == [expected] * 4


async def test_which_of_many_models_must_be_said(fake, connect, monkeypatch):
    many = [{"id": "one"}, {"id": "two"}, {"id": "adapter", "parent": "one"}]
    monkeypatch.setattr(fake, "cards", lambda: many)
    with pytest.raises(EngineUnavailableError, match=r"2 models \(one, two\): set this server's"):
        await connect().generate(request_of())
