"""Which engine a server is: found out by asking, and again when another one came back."""

import asyncio

import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.engines import request_of
from fixtures.fake_openai import FakeOpenAI
from fixtures.fake_sglang import FakeSglang
from fixtures.fake_vllm import FakeVllm

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    OverloadedError,
    SettingsError,
)
from rollfleet_common.messages import NO_VERSION
from rollfleet_engines.detect import AutoEngine, make_engine
from rollfleet_engines.interface import Sampling
from rollfleet_engines.openai import OpenAIEngine
from rollfleet_engines.sglang import SglangEngine
from rollfleet_engines.vllm import VllmEngine

SERVERS = {"vllm": FakeVllm, "sglang": FakeSglang, "openai": FakeOpenAI}


@pytest.fixture
async def engine_of():
    engines = []

    def make(url, **options):
        engines.append(make_engine(url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("owner", [None, "my-proxy"])
async def test_every_engine_is_known_by_its_owner_or_by_its_routes(engine_of, kind, owner):
    async with SERVERS[kind](version="4") as fake:
        fake.owner = owner or fake.owner
        engine = engine_of(fake.url + "/v1/")
        assert (engine.kind, engine.version, engine.name) == ("auto", NO_VERSION, fake.url)
        (one,) = await engine.generate(request_of(version=4))
        assert engine.kind == kind
        assert one.token_ids.tolist() == [0, 1, 2, 3]
        assert engine.version == 4
        assert await engine.ready()


def counted(fake):
    """A list that grows whenever the server is asked for its models."""
    asked, cards = [], fake.cards()

    def listed():
        asked.append(None)
        return cards

    fake.cards = listed
    return asked


async def test_a_crowd_asks_only_once(engine_of):
    async with FakeSglang() as fake:
        asked = counted(fake)
        engine = engine_of(fake.url)
        await asyncio.gather(*(engine.generate(request_of()) for _ in range(20)))
        await engine.generate(request_of())
        assert len(asked) == 1


async def test_another_engine_may_come_back_at_the_address(engine_of):
    fake = FakeVllm()
    await fake.start()
    engine = engine_of(fake.url)
    await engine.generate(request_of())
    await fake.stop()
    with pytest.raises(EngineUnavailableError):
        await engine.generate(request_of())
    assert not await engine.ready()
    async with FakeSglang(port=fake.port):
        (one,) = await engine.generate(request_of())
        assert engine.kind == "sglang"
        assert len(one.token_ids) == 4


async def test_another_engine_that_came_back_unseen_costs_one_request(engine_of):
    fake = FakeSglang()
    await fake.start()
    engine = engine_of(fake.url)
    await engine.generate(request_of())
    await fake.stop()
    async with FakeOpenAI(port=fake.port):
        with pytest.raises(EngineUnavailableError):
            await engine.generate(request_of())
        await engine.generate(request_of())
        assert engine.kind == "openai"


async def test_a_busy_server_is_still_the_same(engine_of):
    async with FakeVllm() as fake:
        asked = counted(fake)
        engine = engine_of(fake.url)
        fake.script.append(fake_vllm.status(429))
        with pytest.raises(OverloadedError):
            await engine.generate(request_of())
        await engine.generate(request_of())
        assert len(asked) == 1
        fake.script.append(fake_vllm.status(500))
        with pytest.raises(EngineUnavailableError):
            await engine.generate(request_of())
        await engine.generate(request_of())
        assert len(asked) == 2


async def test_a_web_site_is_no_inference_server(engine_of):
    app = web.Application()

    async def page(_):
        return web.Response(text="<html>welcome</html>", content_type="text/html")

    app.router.add_get("/{path:.*}", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine = engine_of(f"http://127.0.0.1:{runner.addresses[0][1]}")
    with pytest.raises(EngineProtocolError, match="text/html that is no JSON"):
        await engine.generate(request_of())
    assert not await engine.ready()
    await runner.cleanup()


async def test_a_server_without_any_known_route_says_what_to_do(engine_of):
    async with FakeOpenAI(lists_models=False) as fake:
        with pytest.raises(EngineUnavailableError, match=r"none of the routes.*which engine it is"):
            await engine_of(fake.url).generate(request_of())


async def test_a_wrong_key_is_said_at_once(engine_of):
    async with FakeSglang(api_key="right") as fake:
        with pytest.raises(EngineUnavailableError, match=r"401.*api_key"):
            await engine_of(fake.url, api_key="wrong").generate(request_of())


async def test_a_closed_engine_says_so(engine_of):
    async with FakeVllm() as fake:
        engine = engine_of(fake.url)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineUnavailableError, match="closed"):
            await engine.generate(request_of())


def test_the_engine_may_be_configured():
    url = "http://host:1"
    assert isinstance(make_engine(url), AutoEngine)
    assert isinstance(make_engine(url, engine="vllm"), VllmEngine)
    assert isinstance(make_engine(url, engine="sglang"), SglangEngine)
    assert isinstance(make_engine(url, engine="openai"), OpenAIEngine)
    with pytest.raises(SettingsError, match="none of auto, vllm, sglang, openai"):
        make_engine(url, engine="tgi")


# Text.


TALK = [{"role": "system", "content": "judge"}, {"role": "user", "content": "abc"}]


@pytest.mark.parametrize("engine", ["auto", *SERVERS])
@pytest.mark.parametrize("kind", SERVERS)
async def test_every_server_answers_in_text_through_every_client(engine_of, engine, kind):
    async with SERVERS[kind]() as fake:
        said = await engine_of(fake.url, engine=engine).chat(TALK, Sampling(max_tokens=5))
        assert (said.text, said.finish_reason, said.server) == ("cba", "stop", fake.url)
        assert (said.prompt_tokens, said.completion_tokens) == (7, 3)
        # A field that was not asked for may be one that the server refuses.
        assert fake.seen[-1].body == {
            "model": "tiny",
            "messages": TALK,
            "max_tokens": 5,
            "temperature": 1.0,
            "top_p": 1.0,
        }


async def test_what_is_asked_for_in_a_conversation_is_said(engine_of):
    sampling = Sampling(
        max_tokens=5, top_k=3, min_p=0.1, stop_token_ids=(1,), seed=2, extra={"stop": ["x"]}
    )
    async with FakeOpenAI(model="mine") as fake:
        await engine_of(fake.url, engine="openai", model="mine").chat(TALK, sampling)
        (seen,) = fake.seen
    said = {name: seen.body[name] for name in ("top_k", "min_p", "stop_token_ids", "seed", "stop")}
    assert said == {"top_k": 3, "min_p": 0.1, "stop_token_ids": [1], "seed": 2, "stop": ["x"]}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: a["choices"][0]["message"].update(content=None), "no text, and ended by 'stop'"),
        (lambda a: a["choices"][0].pop("message"), "no text"),
        (lambda a: a.update(choices=[]), "expected one answer"),
        (lambda a: a["choices"].append(a["choices"][0]), "expected one answer"),
    ],
)
async def test_an_answer_without_text_is_an_error(engine_of, spoil, said):
    async with FakeVllm() as fake:
        fake.script.append(fake_vllm.spoilt(spoil))
        with pytest.raises(EngineProtocolError, match=said):
            await engine_of(fake.url).chat(TALK, Sampling(max_tokens=5))


async def test_an_answer_that_counts_nothing_is_still_text(engine_of):
    async with FakeVllm() as fake:
        fake.script.append(fake_vllm.spoilt(lambda answer: answer.pop("usage")))
        said = await engine_of(fake.url).chat(TALK, Sampling(max_tokens=5))
        assert (said.text, said.prompt_tokens) == ("cba", 0)


async def test_the_talks_own_fields_cannot_be_set_beside_it(engine_of):
    with pytest.raises(EngineRefusedError, match="messages"):
        await engine_of("http://127.0.0.1:1", engine="openai").chat(
            TALK, Sampling(max_tokens=5, extra={"messages": []})
        )


async def test_the_model_is_asked_for_again_after_the_server_was_down(engine_of):
    fake = FakeVllm()
    await fake.start()
    engine = engine_of(fake.url)
    await engine.chat(TALK, Sampling(max_tokens=5))
    await fake.stop()
    with pytest.raises(EngineUnavailableError):
        await engine.chat(TALK, Sampling(max_tokens=5))
    async with FakeVllm(port=fake.port, model="other") as back:
        await engine.chat(TALK, Sampling(max_tokens=5))
        assert back.seen[0].body["model"] == "other"


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(
    "cards",
    [
        [{"id": None, "object": "model", "owned_by": None}],
        [{"id": None, "object": None, "owned_by": None, "parent": None, "meta": None}, None],
    ],
)
@pytest.mark.parametrize("model", [None, "tiny"])
async def test_routers_that_write_null_for_what_they_do_not_know(
    engine_of, monkeypatch, kind, cards, model
):
    async with SERVERS[kind](version="4") as fake:
        monkeypatch.setattr(fake, "cards", lambda: cards)
        answered = fake.answered

        def unnamed(path, body):
            made = answered(path, body)
            if isinstance(made, dict):
                made["model"] = None
            return made

        monkeypatch.setattr(fake, "answered", unnamed)
        engine = engine_of(fake.url, model=model)
        assert await engine.ready()
        assert engine.kind == kind
        (one,) = await engine.generate(request_of(version=4))
        assert one.token_ids.tolist() == [0, 1, 2, 3]
        assert fake.seen[-1].body.get("model") in (None, model)
        said = await engine.chat([{"role": "user", "content": "ab"}], Sampling(max_tokens=4))
        assert said.text == "ba"
        assert fake.seen[-1].body.get("model") in (None, model)
