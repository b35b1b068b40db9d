"""No token is labelled with weights that did not make it, on any engine, whatever became of them."""

import copy
from collections import deque

import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.engines import KITS, request_of

from rollfleet_common.errors import EngineUnavailableError, StaleServerError
from rollfleet_common.messages import NO_VERSION
from rollfleet_worker.pool.resuming import Resumer

TELLING = [kit for kit in KITS if kit.name != "openai"]


@pytest.fixture(params=TELLING, ids=repr)
def kit(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["spans", "no-spans"])
async def fake(kit, request):
    async with kit.server(spans=request.param) as server:
        yield server


@pytest.fixture
async def connect(fake, kit):
    clients = []

    def make(**options):
        clients.append(kit.client(fake.url, **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


async def test_a_server_that_lost_its_weights_is_found_out(fake, connect):
    fake.version = "default"
    with pytest.raises(StaleServerError, match=r"never were refitted.* to version 7") as caught:
        await connect().generate(request_of(version=7, serves=7))
    assert isinstance(caught.value, EngineUnavailableError)
    assert (caught.value.serves, caught.value.found) == (7, NO_VERSION)
    assert fake.url in str(caught.value)


async def test_older_weights_than_it_was_given_are_found_out(fake, connect):
    fake.version = "6"
    with pytest.raises(StaleServerError, match="made by version 6") as caught:
        await connect().generate(request_of(version=7, serves=7))
    assert (caught.value.serves, caught.value.found) == (7, 6)


async def test_newer_weights_are_fine(fake, connect):
    fake.version = "8"
    (one,) = await connect().generate(request_of(version=7, serves=7))
    assert one.versions.expand(4).tolist() == [8] * 4


async def test_nothing_known_changes_nothing(fake, connect):
    fake.version = "default"
    (one,) = await connect().generate(request_of(version=7))
    assert one.versions.expand(4).tolist() == [7] * 4


@pytest.mark.parametrize(("base", "fine"), [(0, False), (7, True)])
async def test_the_weights_that_it_starts_with_may_be_new_enough(fake, connect, base, fine):
    fake.version = "default"
    client = connect(base_version=base)
    if fine:
        (one,) = await client.generate(request_of(version=7, serves=7))
        assert one.versions.newest() == 7
    else:
        with pytest.raises(StaleServerError, match="made by version 0"):
            await client.generate(request_of(version=7, serves=7))


async def test_what_was_read_before_a_refit_does_not_accuse_the_server(fake, connect):
    client = connect()
    fake.version = "6"
    await client.generate(request_of(version=6, serves=6))
    fake.version = "7"
    # Within the second for which the server's word is kept.
    (one,) = await client.generate(request_of(version=7, serves=7))
    assert one.versions.newest() == 7


async def test_a_restart_between_two_segments_is_found_out(fake, connect, kit, monkeypatch):
    # The server's word for itself is kept for a second, in which none restarts.
    monkeypatch.setattr("rollfleet_engines.weights._FRESH_S", 0.0)

    async def cut(fake, request, body):
        params = body.get("sampling_params", body)
        params["max_new_tokens" if "max_new_tokens" in params else "max_tokens"] = 4
        answer = fake.answered(request.path, body)
        kit.set_finish(answer, "abort")
        fake.version = "default"
        return web.json_response(answer)

    fake.version = "7"
    fake.script.append(cut)
    request = request_of(version=7, serves=7, max_tokens=8)
    with pytest.raises(EngineUnavailableError, match="refitted to version 7") as caught:
        await Resumer(connect(), max_resumes=0).generate(request)
    # Where the server told nothing of the first segment, it is found out before the second.
    assert StaleServerError in (type(caught.value), type(caught.value.__cause__))
    assert fake.script == deque()


async def test_a_server_that_tells_nothing_is_taken_at_the_fleets_word(fake, connect, kit):
    if fake.spans and kit.name != "vllm-completions":
        pytest.skip("this one tells")
    fake.dev_mode = False

    def silent(answer):
        if "meta_info" in answer:
            del answer["meta_info"]["weight_version"]

    fake.script.append(fake_vllm.spoilt(silent))
    (one,) = await connect().generate(request_of(version=6, serves=5))
    assert one.versions.expand(4).tolist() == [5] * 4


@pytest.mark.parametrize("serves", [NO_VERSION, 5])
async def test_versions_that_are_told_no_more_are_not_made_up(fake, connect, kit, serves):
    if not fake.spans or kit.name == "vllm-completions":
        pytest.skip("this one never told")
    client = connect()
    fake.version = "5"
    await client.generate(request_of(version=5))
    # The board is ahead of the server, which has told every token's version until now.
    fake.dev_mode = False

    def silent(answer):
        for one in answer.get("choices", ()):
            one.pop("weight_versions")
        if "meta_info" in answer:
            del answer["meta_info"]["weight_versions"]
            del answer["meta_info"]["weight_version"]

    fake.script.append(fake_vllm.spoilt(silent))
    if serves == NO_VERSION:
        weights = client._weights.read

        async def away(at_least=NO_VERSION):
            raise EngineUnavailableError("gone")

        client._weights.read = away
        with pytest.raises(EngineUnavailableError, match="does not say which weights made it"):
            await client.generate(request_of(version=6))
        client._weights.read = weights
        assert client._spans is None  # it is asked beforehand next time
    else:
        (one,) = await client.generate(request_of(version=6, serves=serves))
        assert one.versions.expand(4).tolist() == [5] * 4


def test_the_error_can_be_copied_for_every_caller():
    error = copy.copy(StaleServerError("lost", 7, 6))
    assert (str(error), error.serves, error.found) == ("lost", 7, 6)
