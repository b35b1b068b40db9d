"""A real vLLM through the clients of all engines: found out, and the same tokens by every face."""

from dataclasses import replace

import pytest
from fixtures.real_vllm import URL, request_of

from rollfleet_common.errors import EngineUnavailableError, StaleServerError
from rollfleet_engines.detect import AutoEngine, make_engine
from rollfleet_engines.vllm import VllmEngine


@pytest.fixture
async def engine_of():
    engines = []

    def make(**options):
        engines.append(make_engine(URL, timeout_s=120.0, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


async def test_it_says_itself_that_it_is_vllm(control, engine_of):
    engine = engine_of()
    assert isinstance(engine, AutoEngine)
    assert await engine.ready()
    assert engine.kind == "vllm"


async def test_openais_route_says_the_same_tokens_and_logprobs(control, engine_of):
    (ours,) = await engine_of().generate(request_of(temperature=0.0))
    (plain,) = await engine_of(engine="openai").generate(request_of(temperature=0.0))
    assert plain.token_ids.tolist() == ours.token_ids.tolist()
    assert plain.logprobs.tolist() == pytest.approx(ours.logprobs.tolist(), abs=1e-3)


async def test_seeds_mean_the_same_by_both(control, engine_of):
    ours = await engine_of().generate(request_of(seed=5), n=2)
    plain = await engine_of(engine="openai").generate(request_of(seed=5), n=2)
    assert [one.token_ids.tolist() for one in plain] == [one.token_ids.tolist() for one in ours]
    assert ours[0].token_ids.tolist() != ours[1].token_ids.tolist()


@pytest.mark.parametrize("route", ["generate", "completions"])
async def test_a_server_that_says_older_weights_than_it_was_given_is_found_out(control, route):
    engine = VllmEngine(URL, route=route, timeout_s=120.0)
    request = replace(request_of(version=7), serves=7)
    with pytest.raises(StaleServerError, match="never were refitted"):
        await engine.generate(request)
    await control("/update_weight_version", new_version="6")
    with pytest.raises(StaleServerError, match="made by version 6"):
        await engine.generate(request)
    await control("/update_weight_version", new_version="7")
    (one,) = await engine.generate(request)
    assert one.versions.newest() == 7
    await engine.close()


async def test_another_engines_client_says_that_it_is_wrong_here(control, engine_of):
    with pytest.raises(EngineUnavailableError, match=r"404.*check this server's url"):
        await engine_of(engine="sglang").generate(request_of())
