"""What servers do wrong, played on the clients of all engines: an error of ours, never a sample."""

import asyncio
import math
import shutil
import ssl
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.engines import KITS, request_of

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    OverloadedError,
    SettingsError,
)
from rollfleet_engines import http
from rollfleet_engines.detect import AutoEngine
from rollfleet_engines.resume import ABORTED


@pytest.fixture(params=KITS, ids=repr)
def kit(request):
    return request.param


@pytest.fixture
async def fake(kit):
    async with kit.server() as server:
        yield server


@pytest.fixture
async def connect(fake, kit):
    """Clients of the fake server, closed at the end."""
    clients = []

    def make(url=None, **options):
        clients.append(kit.client(url or fake.url, **{"timeout_s": 20.0, **options}))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def proven(connect):
    """A client that has had one good answer."""
    client = connect()
    await client.generate(request_of())
    return client


# Statuses.


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (400, EngineRefusedError),
        (413, EngineRefusedError),
        (422, EngineRefusedError),
        (401, EngineUnavailableError),
        (403, EngineUnavailableError),
        (404, EngineUnavailableError),
        (408, EngineUnavailableError),
        (429, OverloadedError),
        (500, EngineUnavailableError),
        (502, EngineUnavailableError),
        (503, EngineUnavailableError),
        (418, EngineProtocolError),
    ],
)
async def test_statuses_say_whose_fault_it_was(fake, proven, code, error):
    fake.script.append(fake_vllm.status(code, "the reason"))
    with pytest.raises(error, match="the reason") as caught:
        await proven.generate(request_of())
    assert type(caught.value) is error
    assert str(code) in str(caught.value)


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize(("header", "asked_s"), [("7", 7.0), ("later", 0.0)])
async def test_retry_after_is_kept(fake, connect, code, header, asked_s):
    fake.script.append(fake_vllm.status(code, headers={"Retry-After": header}))
    with pytest.raises(EngineUnavailableError) as caught:
        await connect().generate(request_of())
    assert getattr(caught.value, "retry_after_s", 0.0) == asked_s


def test_retry_after_may_be_a_date():
    assert http._retry_after_s("Fri, 31 Dec 2100 23:59:59 GMT") > 1e9
    assert http._retry_after_s("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert http._retry_after_s("Fri, 99 Dec 1999") == 0.0


async def test_a_prompt_longer_than_the_context_is_the_prompts_fault(fake, proven):
    fake.script.append(fake_vllm.status(400, "longer than the model's context length"))
    with pytest.raises(EngineRefusedError, match="context length"):
        await proven.generate(request_of())


async def test_a_redirect_is_not_followed(fake, connect):
    other = web.Application()
    visits = []

    async def elsewhere(request):
        visits.append(request)
        return web.json_response({})

    other.router.add_route("*", "/{path:.*}", elsewhere)
    runner = web.AppRunner(other)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    location = f"http://127.0.0.1:{runner.addresses[0][1]}/generate"
    fake.script.append(fake_vllm.status(307, headers={"Location": location}))
    with pytest.raises(EngineProtocolError, match=rf"{location}.*not followed"):
        await connect().generate(request_of())
    assert not visits
    await runner.cleanup()


# Bodies.


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("<html><body>nginx</body></html>", "text/html", "text/html that is no JSON"),
        ('{"choices": [{"index": 0, "token_i', "application/json", "is no JSON"),
        ("", "application/json", "0 bytes"),
        ("[]", "application/json", "expected a JSON object|asked for 1 completions, got 0"),
        ("[" * 100_000, "application/json", "is no JSON"),
        ("{}", "application/json", "asked for 1 completions, got NoneType|no meta_info"),
        ('{"choices": []}', "application/json", "asked for 1 completions, got 0|no meta_info"),
        ('{"choices": [7]}', "application/json", "not an object|got 1|no meta_info"),
        ("[7]", "application/json", "expected a JSON object|no meta_info"),
    ],
)
async def test_what_is_no_answer_is_quoted_shortly(fake, connect, text, kind, said):
    fake.script.append(fake_vllm.body(text, kind))
    with pytest.raises(EngineProtocolError, match=said) as caught:
        await connect().generate(request_of())
    assert len(str(caught.value)) < 600


FOUR = [-0.125, -0.25, -0.375, -0.5]


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("ids", None, "no token ids"),
        ("ids", "abc", "no token ids"),
        ("ids", 7, "no token ids"),
        ("ids", [], "no token, and ended by 'length'"),
        ("ids", [1, 2, 3], "3 tokens but 4 logprobs"),
        ("ids", [1, 2, 3, 4, 5], "5 tokens where 4 were allowed"),
        ("ids", [1, 2, 3, -4], "not within 0"),
        ("ids", [1, 2, 3, 2**31], "not within 0"),
        ("ids", [1, 2, 3, 2**80], "not all integers"),
        ("ids", [1, 2, 3, 4.5], "not all integers"),
        ("ids", [1, 2, 3, None], "not all integers"),
        ("ids", ["1", "2", "3", "4"], "not all integers"),
        ("ids", [[1], [2], [3], [4]], "not all integers"),
        ("ids", [1, [2], 3, 4], "no flat list"),
        ("logprobs", None, "no logprobs"),
        ("logprobs", 5, "no logprobs"),
        ("logprobs", FOUR[:3], "4 tokens but 3 logprobs"),
        ("logprobs", [*FOUR, -1.0], "4 tokens but 5 logprobs"),
        ("logprobs", [-1.0, math.nan, -1.0, -1.0], "logprob of token 1 of 4 is nan|is no JSON"),
        ("logprobs", [-1.0, -math.inf, -1.0, -1.0], "logprob of token 1 of 4 is -inf|is no JSON"),
        ("logprobs", [-1.0, -9999.0, -1.0, -1.0], "logprob of token 1 of 4 is -9999"),
        ("logprobs", [-1.0, -3.4028234663852886e38, -1.0, -1.0], "token 1 of 4 is -3.4"),
        ("logprobs", [-1.0, None, -1.0, -1.0], "not all numbers"),
        ("logprobs", [-1.0, "-0.5", -1.0, -1.0], "not all numbers"),
        ("logprobs", [-1.0, [-0.5], -1.0, -1.0], "no flat list"),
        ("finish", None, "ended by None"),
        ("finish", "error", "ended by .*error"),
        ("finish", ["stop"], "ended by .*stop"),
    ],
)
async def test_an_unusable_generation_is_never_patched_up(fake, connect, kit, part, value, said):
    setter = {"ids": kit.set_ids, "logprobs": kit.set_logprobs, "finish": kit.set_finish}[part]
    fake.script.append(fake_vllm.spoilt(lambda answer: setter(answer, value)))
    with pytest.raises(EngineProtocolError, match=said):
        await connect().generate(request_of())


async def test_more_than_asked_for_is_refused(fake, connect):
    async def two(fake, request, body):
        answer = fake.answered(request.path, body)
        if "choices" in answer:
            answer["choices"].append(answer["choices"][0])
        else:
            answer = [answer, answer]
        return web.json_response(answer)

    fake.script.append(two)
    with pytest.raises(EngineProtocolError, match="asked for 1 completions, got 2"):
        await connect().generate(request_of())


async def test_an_answer_over_the_cap_is_not_read(fake, proven, monkeypatch):
    monkeypatch.setattr(proven._http, "_max_response_bytes", 1000)
    fake.script.append(fake_vllm.body(" " * 5000))
    with pytest.raises(EngineProtocolError, match="longer than 1000 bytes"):
        await proven.generate(request_of())

    async def unannounced(fake, request, body):
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b" " * 5000)
        return response

    fake.script.append(unannounced)
    with pytest.raises(EngineProtocolError, match="longer than 1000 bytes"):
        await proven.generate(request_of())


# Servers that are not there.


async def test_a_reset_connection_is_an_unavailable_server(fake, connect):
    fake.script.append(fake_vllm.reset)
    with pytest.raises(EngineUnavailableError, match=r"Payload|Disconnected|reset"):
        await connect().generate(request_of())


async def test_a_hanging_server_runs_into_the_timeout(fake, connect):
    fake.script.append(fake_vllm.hang)
    with pytest.raises(EngineUnavailableError, match="no whole answer after"):
        await connect(timeout_s=0.1).generate(request_of())
    await asyncio.wait_for(fake.left.wait(), 5)


async def test_a_cancelled_caller_hangs_up(fake, connect):
    fake.script.append(fake_vllm.hang)
    task = asyncio.create_task(connect().generate(request_of()))
    await fake.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(fake.left.wait(), 5)


async def test_nobody_there(fake, connect):
    await fake.stop()
    client = connect()
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1"):
        await client.generate(request_of())
    assert not await client.ready()


async def test_something_else_than_http(connect):
    async def say(reader, writer):
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(EngineProtocolError, match="no HTTP"):
        await connect(f"http://127.0.0.1:{port}").generate(request_of())
    server.close()
    await server.wait_closed()


async def test_a_page_of_something_else_is_a_wrong_url(fake, connect):
    client = connect(fake.url + "/not/here")
    with pytest.raises(EngineUnavailableError, match=r"404.*check this server's url"):
        await client.generate(request_of())


async def test_https_where_there_is_none(fake, connect):
    client = connect(fake.url.replace("http", "https"))
    with pytest.raises(EngineUnavailableError, match=r"TLS|SSL"):
        await client.generate(request_of())


async def test_a_certificate_that_nobody_vouches_for(connect, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH to make a certificate with")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    argv = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    await asyncio.to_thread(
        subprocess.run,
        [*argv, "-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    client = connect(f"https://127.0.0.1:{runner.addresses[0][1]}")
    with pytest.raises(EngineUnavailableError, match=r"TLS failed .*certificate"):
        await client.generate(request_of())
    await runner.cleanup()


async def test_a_closed_client_says_so(connect):
    client = connect()
    await client.close()
    await client.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        await client.generate(request_of())


# Set up wrongly.


async def test_a_wrong_key_is_the_servers_set_up_and_stays_secret(fake, connect):
    fake.api_key = "right"
    client = connect(api_key="wr0ng-secret")
    with pytest.raises(EngineUnavailableError, match=r"401.*api_key") as caught:
        await client.generate(request_of())
    assert "wr0ng-secret" not in str(caught.value)
    assert not await client.ready()


async def test_a_key_that_the_server_echoes_stays_secret(fake, connect):
    fake.script.append(fake_vllm.status(500, "bad key wr0ng-secret"))
    with pytest.raises(EngineUnavailableError) as caught:
        await connect(api_key="wr0ng-secret").generate(request_of())
    assert "wr0ng-secret" not in str(caught.value)
    assert "bad key ***" in str(caught.value)


async def test_a_password_in_the_url_stays_secret(fake, connect):
    client = connect(fake.url.replace("http://", "http://me:hunter2@"))
    assert client.name == fake.url
    fake.script.append(fake_vllm.status(500))
    with pytest.raises(EngineUnavailableError) as caught:
        await client.generate(request_of())
    assert "hunter2" not in str(caught.value)
    assert fake.seen[0].headers["Authorization"].startswith("Basic ")


async def test_a_wrong_model_is_named(connect):
    client = connect(model="huge")
    with pytest.raises(EngineUnavailableError, match=r"huge.*model name"):
        await client.generate(request_of())
    assert not await client.ready()


async def test_ready_makes_do_without_a_list_of_models(fake, connect):
    fake.lists_models = False
    assert await connect(model="tiny").ready()


async def test_ready_asks_for_health_and_model(fake, connect):
    assert await connect().ready()
    assert await connect(model="tiny").ready()
    fake.healthy = False
    assert not await connect().ready()


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("localhost:8000", {}),
        ("ftp://host", {}),
        ("http://", {}),
        ("http://[", {}),
        ("http://host", {"api_key": "a\nb"}),
        ("http://me:pass@host", {"api_key": "k"}),
    ],
)
def test_settings_that_make_no_sense(kit, url, options):
    with pytest.raises(SettingsError):
        kit.client(url, **options)
    with pytest.raises(SettingsError):
        AutoEngine(url, **options)


async def test_requests_that_make_no_sense_never_leave(fake, connect):
    client = connect()
    empty = replace(request_of(), token_ids=np.zeros(0, np.int32))
    for request, n in [
        (empty, 1),
        (request_of(), 0),
        (request_of(max_tokens=0), 1),
        (request_of(extra={"n": 5}), 1),
        (request_of(extra={"logit_bias": object()}), 1),
        (request_of(temperature=math.nan), 1),
    ]:
        with pytest.raises(EngineRefusedError):
            await client.generate(request, n)
    assert not fake.seen


# Cut off.


async def test_what_was_cut_off_is_returned_as_it_is_where_somebody_else_goes_on(
    fake, connect, kit
):
    fake.script.append(fake_vllm.spoilt(lambda answer: kit.set_finish(answer, "abort")))
    (one,) = await connect().generate(request_of(max_tokens=8))
    assert (one.finish_reason, one.server) == (ABORTED, fake.url)
    assert len(one.token_ids) == len(one.logprobs)
    assert len(fake.seen) == 1
