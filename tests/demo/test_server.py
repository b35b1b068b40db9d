import asyncio
import json
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from support import wait_until, wait_until_async

from rollfleet_demo.engine import BatchingEngine
from rollfleet_demo.model import TinyPolicy, save
from rollfleet_demo.requests import EngineClosedError
from rollfleet_demo.sampling import SamplerSettings
from rollfleet_demo.server import application
from rollfleet_demo.task import END_ID, VOCABULARY, encode

PROMPT = encode("83920174=")
#: Long generations: the end token does not end them.
ENDLESS = {"max_tokens": 50, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Served:
    """A server in this process, and a client of it."""

    session: aiohttp.ClientSession
    engine: BatchingEngine
    folder: Path

    async def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        async with self.session.post(path, json=body) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def get(self, path: str) -> Any:
        async with self.session.get(path) as response:
            assert response.status == 200
            return await response.json()

    async def generate(self, *, status: int = 200, request_id: str = "r", **sampling: Any) -> Any:
        body = {"token_ids": PROMPT, "request_id": request_id, "sampling_params": sampling}
        return await self.post("/inference/v1/generate", body, status=status)

    def truth(self) -> list[dict[str, Any]]:
        return read_log(self.folder / "tokens.jsonl")


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path, weights_id: int) -> Path:
    path = folder / f"{weights_id}.safetensors"
    save(TinyPolicy(seed=weights_id), path, weights_id)
    return path


@asynccontextmanager
async def serve(folder: Path, **settings: Any):
    engine = BatchingEngine(
        weights(folder, 7), version="7", token_log=folder / "tokens.jsonl", **settings
    )
    runner = web.AppRunner(application(engine), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            yield Served(session, engine, folder)
    finally:
        await asyncio.to_thread(engine.close)
        await runner.cleanup()


@pytest.fixture
async def served(tmp_path: Path):
    async with serve(tmp_path) as server:
        yield server


@pytest.fixture
async def slow(tmp_path: Path):
    """A server that is slow enough to be caught in the middle of a generation."""
    for later in (8, 9):
        weights(tmp_path, later)
    async with serve(tmp_path, delay_per_token_s=0.03) as server:
        yield server


async def in_flight(server: Served, tokens: int = 1) -> None:
    await wait_until_async(
        lambda: server.engine.stats.generation_tokens >= tokens, f"{tokens} tokens generated"
    )


def recomputed(policy: TinyPolicy, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        return policy.logprobs(torch.tensor([prompt + completion]))[0, len(prompt) :].tolist()


# What is answered.


async def test_generate_answers_in_the_shape_of_vllm(served: Served):
    answer = await served.generate(n=3, max_tokens=12, logprobs=1, seed=1)
    assert answer["request_id"] == "generate-tokens-r"
    assert answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    made = 0
    for choice in answer["choices"]:
        ids = choice["token_ids"]
        made += len(ids)
        assert choice["finish_reason"] == ("stop" if ids[-1] == END_ID else "length")
        assert choice["weight_versions"] == [{"version": "7", "start": 0, "end": len(ids)}]
        content = choice["logprobs"]["content"]
        assert [entry["token_id"] for entry in content] == ids
        for entry in content:
            assert entry["top_logprobs"][0]["token_id"] == entry["token_id"]
            assert 1 <= entry["rank"] <= len(VOCABULARY)
        expected = recomputed(served.engine.policy, PROMPT, ids)
        assert [entry["logprob"] for entry in content] == pytest.approx(expected, abs=1e-4)
    assert answer["usage"]["completion_tokens"] == made
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 3


async def test_logprobs_are_left_out_unless_asked_for_and_ranked_if_many(served: Served):
    plain = await served.generate(max_tokens=2)
    assert plain["choices"][0]["logprobs"] is None
    many = await served.generate(max_tokens=2, logprobs=5)
    for entry in many["choices"][0]["logprobs"]["content"]:
        first, *others = entry["top_logprobs"]
        assert first["token_id"] == entry["token_id"]
        assert len(entry["top_logprobs"]) == 5
        assert [o["rank"] for o in others] == sorted(o["rank"] for o in others)
        values = [o["logprob"] for o in others]
        assert values == sorted(values, reverse=True)


async def test_a_seed_repeats_a_request_whatever_else_is_running(served: Served):
    alone = await served.generate(n=2, seed=5, **ENDLESS)
    crowd = [served.generate(n=4, **ENDLESS) for _ in range(3)]
    among, *_ = await asyncio.gather(served.generate(n=2, seed=5, **ENDLESS), *crowd)
    ids = [[choice["token_ids"] for choice in a["choices"]] for a in (alone, among)]
    assert ids[0] == ids[1]


async def test_stop_tokens_and_limits(served: Served):
    everything = list(range(len(VOCABULARY)))
    stopped = await served.generate(stop_token_ids=everything, ignore_eos=True, max_tokens=9)
    (choice,) = stopped["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("stop", 1)
    assert choice["stop_reason"] == choice["token_ids"][0]
    full = await served.generate(ignore_eos=True)
    (choice,) = full["choices"]
    assert choice["finish_reason"] == "length"
    assert len(PROMPT) + len(choice["token_ids"]) == served.engine.max_tokens


async def test_stop_texts_end_a_choice(served: Served):
    """Any text of one token ends it at once; its token counts, its text does not."""
    texts = [text for text in VOCABULARY if len(text) == 1]
    for stop in (texts, [*texts, "ab"]):
        full = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 9, "return_token_ids": True}
        answer = await served.post("/v1/completions", {**full, "stop": stop})
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == VOCABULARY[choice["token_ids"][-1]]
        assert not set(choice["text"]) & set(texts)
    # Of two tokens: it ends where the first token and the second have come.
    seeded = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 9, "seed": 5}
    seeded |= {"return_token_ids": True}
    (whole,) = (await served.post("/v1/completions", seeded))["choices"]
    pair = "".join(VOCABULARY[token] for token in whole["token_ids"][2:4])
    (cut,) = (await served.post("/v1/completions", {**seeded, "stop": pair}))["choices"]
    length = len(cut["token_ids"])
    assert 2 <= length <= 4
    assert cut["token_ids"] == whole["token_ids"][:length]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", pair)


async def test_completions_take_ids_and_text(served: Served):
    body = {"prompt": [PROMPT, PROMPT[3:]], "n": 2, "max_tokens": 4, "ignore_eos": True}
    answer = await served.post(
        "/v1/completions", {**body, "logprobs": 1, "return_token_ids": True, "model": "tiny"}
    )
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [PROMPT, PROMPT, PROMPT[3:], PROMPT[3:]]
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert "weight_versions" not in choice
        expected = recomputed(served.engine.policy, prompt, choice["token_ids"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert choice["logprobs"]["tokens"] == [VOCABULARY[t] for t in choice["token_ids"]]
    assert answer["usage"]["total_tokens"] == 2 * len(PROMPT) - 3 + 16
    text = await served.post("/v1/completions", {"prompt": "12=", "max_tokens": 3})
    assert text["choices"][0]["token_ids"] is None
    assert isinstance(text["choices"][0]["text"], str)


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/inference/v1/generate", {"sampling_params": {}}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [], "sampling_params": {}}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [3]}, 400, "sampling_params"),
        ("/inference/v1/generate", {"token_ids": [-1], "sampling_params": {}}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [99], "sampling_params": {}}, 400, "vocabulary"),
        ("/inference/v1/generate", {"token_ids": [3] * 64, "sampling_params": {}}, 400, "length"),
        ("/inference/v1/generate", {"token_ids": [3], "sampling_params": {"n": 0}}, 400, "n"),
        ("/inference/v1/generate", {"token_ids": [3], "sampling_params": {"n": 999}}, 400, "999"),
        (
            "/inference/v1/generate",
            {"token_ids": [3], "sampling_params": {"n": 2, "temperature": 0}},
            400,
            "greedy",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [3], "sampling_params": {"top_p": 0}},
            400,
            "top_p",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [3], "sampling_params": {"stop": [""]}},
            400,
            "stop",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [3], "sampling_params": {}, "stream": True},
            400,
            "stream",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [3], "sampling_params": {}, "model": "other"},
            404,
            "other",
        ),
        ("/inference/v1/generate", [1, 2], 400, "object"),
        ("/v1/completions", {"prompt": "what?"}, 400, "vocabulary"),
        ("/v1/completions", {"prompt": []}, 400, "empty"),
        ("/v1/completions", {"prompt": [[3], []]}, 400, "empty"),
        ("/v1/completions", {"prompt": [3], "model": "other"}, 404, "other"),
        ("/pause?mode=later", None, 400, "mode"),
        ("/update_weight_version", {}, 400, "new_version"),
        ("/collective_rpc", {}, 400, "method"),
        ("/collective_rpc", {"method": "sleep"}, 500, "sleep"),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"x": 1}}, 500, "x"),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": "x"}, 500, "x"),
        ("/abort_requests", {"request_ids": "r"}, 400, "request_ids"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
async def test_bad_requests_are_refused_in_the_shape_of_vllm(
    served: Served, path: str, body: Any, status: int, word: str
):
    error = (await served.post(path, body, status=status))["error"]
    assert error["code"] == status
    assert word in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


async def test_malformed_json_and_other_content_types_are_400(served: Served):
    for path in ("/inference/v1/generate", "/v1/completions", "/collective_rpc"):
        for kind, data in (("application/json", b"{nope"), ("text/plain", b"{}")):
            async with served.session.post(
                path, data=data, headers={"Content-Type": kind}
            ) as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == 400


async def test_small_routes(served: Served):
    async with served.session.get("/health") as response:
        assert (response.status, await response.text()) == (200, "")
    models = await served.get("/v1/models")
    assert [card["id"] for card in models["data"]] == ["tiny"]
    assert await served.get("/load") == {"server_load": 0}
    assert "version" in await served.get("/version")
    assert await served.get("/weight_info") == {"weight_version": "7"}
    assert await served.get("/is_paused") == {"is_paused": False}
    assert await served.post("/reset_prefix_cache") == {"success": True}
    await served.generate(max_tokens=3, ignore_eos=True)
    async with served.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    labels = '{engine="0",model_name="tiny"}'
    assert f"vllm:num_requests_running{labels} 0.0" in lines
    assert f"vllm:num_requests_waiting{labels} 0.0" in lines
    assert f"vllm:kv_cache_usage_perc{labels} 0.0" in lines
    assert f"vllm:generation_tokens_total{labels} 3.0" in lines


# Versions and their truth.


async def refit(server: Served, weights_id: int) -> None:
    path = str(server.folder / f"{weights_id}.safetensors")
    await server.post("/pause?mode=keep")
    await server.post(
        "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}
    )
    await server.post("/update_weight_version", {"new_version": str(weights_id)})
    await server.post("/resume")


async def test_spans_follow_refits_in_the_middle_of_a_generation_and_equal_the_truth(slow: Served):
    old = TinyPolicy(seed=7)
    task = asyncio.create_task(slow.generate(n=2, **ENDLESS))
    await in_flight(slow, 10)
    await refit(slow, 8)
    at = slow.engine.stats.generation_tokens
    await in_flight(slow, at + 10)
    await refit(slow, 9)
    answer = await task
    assert await slow.get("/weight_info") == {"weight_version": "9"}
    for choice, logged in zip(answer["choices"], slow.truth(), strict=True):
        spans = choice["weight_versions"]
        assert [span["version"] for span in spans] == ["7", "8", "9"]
        assert spans[0]["start"] == 0
        assert spans[-1]["end"] == len(choice["token_ids"]) == 50
        assert all(a["end"] == b["start"] for a, b in pairwise(spans))
        expanded = [int(s["version"]) for s in spans for _ in range(s["start"], s["end"])]
        assert (logged["request_id"], logged["index"]) == ("r", choice["index"])
        assert (logged["prompt"], logged["token_ids"]) == (PROMPT, choice["token_ids"])
        assert logged["truth"] == expanded
        # The weights really changed: what the old ones would have said holds only up to there.
        got = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        as_old = recomputed(old, PROMPT, choice["token_ids"])
        border = spans[0]["end"]
        assert got[:border] == pytest.approx(as_old[:border], abs=1e-4)
        assert got[border:] != pytest.approx(as_old[border:], abs=1e-2)


async def test_a_reload_without_a_label_is_caught_by_the_truth(slow: Served):
    task = asyncio.create_task(slow.generate(**ENDLESS))
    await in_flight(slow, 5)
    path = str(slow.folder / "8.safetensors")
    await slow.post(
        "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}
    )
    (choice,) = (await task)["choices"]
    assert [span["version"] for span in choice["weight_versions"]] == ["7"]
    assert set(slow.truth()[0]["truth"]) == {7, 8}


async def test_a_reload_without_a_path_reads_the_original_file_again(served: Served):
    save(TinyPolicy(seed=11), served.folder / "7.safetensors", 11)
    await served.post("/collective_rpc", {"method": "reload_weights"})
    await served.generate(max_tokens=1)
    assert served.truth()[-1]["truth"] == [11]


async def test_a_reload_that_fails_changes_nothing(served: Served):
    (served.folder / "rubbish").write_bytes(b"rubbish")
    for name in ("missing", "rubbish"):
        body = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(served.folder / name)},
        }
        error = (await served.post("/collective_rpc", body, status=500))["error"]
        assert name in error["message"]
    await served.generate(max_tokens=1)
    assert served.truth()[-1]["truth"] == [7]


# Pause, abort, disconnect.


async def test_keep_freezes_what_is_in_flight_and_later_requests_wait(slow: Served):
    early = asyncio.create_task(slow.generate(request_id="early", **ENDLESS))
    await in_flight(slow, 5)
    await slow.post("/pause?mode=keep")
    assert await slow.get("/is_paused") == {"is_paused": True}
    frozen = slow.engine.stats.generation_tokens
    late = asyncio.create_task(slow.generate(request_id="late", max_tokens=1))
    await wait_until_async(lambda: slow.engine.stats.waiting == 1, "the late request waits")
    assert slow.engine.stats.generation_tokens == frozen
    assert not early.done()
    await slow.post("/resume")
    assert len((await late)["choices"][0]["token_ids"]) == 1
    (choice,) = (await early)["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 50)


async def test_wait_lets_what_is_in_flight_end_first(slow: Served):
    early = asyncio.create_task(slow.generate(**ENDLESS))
    await in_flight(slow)
    pause = asyncio.create_task(slow.post("/pause?mode=wait"))
    await wait_until_async(lambda: slow.engine.stats.paused, "the pause has begun")
    late = asyncio.create_task(slow.generate(max_tokens=1))
    await wait_until_async(lambda: slow.engine.stats.waiting == 1, "the late request waits")
    assert not pause.done()
    assert len((await early)["choices"][0]["token_ids"]) == 50
    assert await pause == {"status": "paused"}
    assert not late.done()
    await slow.post("/resume")
    await late


async def test_abort_answers_with_what_there_is(slow: Served):
    early = asyncio.create_task(slow.generate(n=2, **ENDLESS))
    await in_flight(slow, 10)
    await slow.post("/pause")
    for choice in (await early)["choices"]:
        assert choice["finish_reason"] == "abort"
        made = len(choice["token_ids"])
        assert 5 <= made < 50
        assert choice["weight_versions"] == [{"version": "7", "start": 0, "end": made}]
        assert len(choice["logprobs"]["content"]) == made
    late = asyncio.create_task(slow.generate(max_tokens=1))
    await wait_until_async(lambda: slow.engine.stats.waiting == 1, "the late request waits")
    assert not late.done()
    await slow.post("/resume")
    assert (await late)["choices"][0]["finish_reason"] in {"stop", "length"}


async def test_requests_are_aborted_by_name_or_all_together(slow: Served):
    one, two = (
        asyncio.create_task(slow.generate(request_id=name, **ENDLESS)) for name in ("one", "two")
    )
    await wait_until_async(lambda: slow.engine.stats.running == 2, "both run")
    answer = await slow.post("/abort_requests", {"request_ids": ["one", "unknown"]})
    assert answer == {"status": "aborted", "aborted": 1}
    assert (await one)["choices"][0]["finish_reason"] == "abort"
    assert not two.done()
    assert await slow.post("/abort_requests", {}) == {"status": "aborted", "aborted": 1}
    assert (await two)["choices"][0]["finish_reason"] == "abort"
    await slow.post("/pause?mode=keep")
    waiting = asyncio.create_task(slow.generate(**ENDLESS))
    await wait_until_async(lambda: slow.engine.stats.waiting == 1, "a request waits")
    await slow.post("/abort_requests", {})
    (choice,) = (await waiting)["choices"]
    assert (choice["finish_reason"], choice["token_ids"]) == ("abort", [])
    assert choice["weight_versions"] == []


async def test_a_client_that_leaves_frees_its_slots(tmp_path: Path):
    async with serve(tmp_path, delay_per_token_s=0.03, max_num_seqs=2) as server:
        leaving = asyncio.create_task(server.generate(n=2, request_id="gone", **ENDLESS))
        await wait_until_async(lambda: server.engine.stats.running == 2, "it runs")
        waiting = asyncio.create_task(server.generate(max_tokens=2, ignore_eos=True))
        await wait_until_async(lambda: server.engine.stats.waiting == 1, "another waits")
        assert await server.get("/load") == {"server_load": 2}
        leaving.cancel()
        assert len((await waiting)["choices"][0]["token_ids"]) == 2
        gone = [line for line in server.truth() if line["request_id"] == "gone"]
        assert [line["finish_reason"] for line in gone] == ["abort", "abort"]
        assert len(gone[0]["token_ids"]) < 50
        assert await server.get("/load") == {"server_load": 0}


async def test_more_sequences_than_slots_take_turns_and_stay_themselves(tmp_path: Path):
    async with serve(tmp_path, max_num_seqs=3) as server:
        prompts = [encode(f"{i}{i + 1}{'5' * i}=") for i in range(5)]
        bodies = [
            {
                "request_id": str(i),
                "token_ids": prompt,
                "sampling_params": {"n": 3, "max_tokens": 3 + 2 * i, "logprobs": 0},
            }
            for i, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(
            *(server.post("/inference/v1/generate", body) for body in bodies)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            for choice in answer["choices"]:
                got = [entry["logprob"] for entry in choice["logprobs"]["content"]]
                expected = recomputed(server.engine.policy, prompt, choice["token_ids"])
                assert got == pytest.approx(expected, abs=1e-4)
        assert len(server.truth()) == 15


# The engine's end, and the program.


async def test_a_closed_engine_says_so(slow: Served):
    task = asyncio.create_task(slow.generate(status=503, **ENDLESS))
    await in_flight(slow)
    await asyncio.to_thread(slow.engine.close)
    assert (await task)["error"]["type"] == "ServiceUnavailableError"
    await slow.generate(status=503)
    async with slow.session.get("/health") as response:
        assert response.status == 503
    with pytest.raises(EngineClosedError):
        slow.engine.resume()
    slow.engine.close()


def test_closing_fails_those_who_wait(tmp_path: Path):
    engine = BatchingEngine(weights(tmp_path, 1), delay_per_token_s=0.02)
    ticket = engine.submit("r", PROMPT, SamplerSettings(n=2, max_tokens=50, ignore_eos=True))
    wait_until(lambda: engine.stats.generation_tokens, "it generates")
    drained = engine.pause("wait")
    engine.close()
    for future in (ticket.result, drained):
        with pytest.raises(EngineClosedError):
            future.result(timeout=5)
    engine.cancel(ticket)


@pytest.fixture
def program(tmp_path: Path):
    """The server as a program of its own, and the line that it printed."""
    command = [
        *(sys.executable, "-m", "rollfleet_demo.server"),
        *("--weights", str(weights(tmp_path, 3)), "--version", "3", "--port", "0"),
        *("--max-num-seqs", "4", "--token-log", str(tmp_path / "log")),
        *("--delay-per-token-s", "0.02"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


async def test_the_program_serves_logs_and_ends_on_sigterm(program, tmp_path: Path):
    process, ready = program
    assert ready["pid"] == process.pid
    async with aiohttp.ClientSession(ready["url"]) as session:

        async def generate(sampling: dict[str, Any]) -> tuple[int, Any]:
            body = {"request_id": "a", "token_ids": PROMPT, "sampling_params": sampling}
            async with session.post("/inference/v1/generate", json=body) as response:
                return response.status, await response.json()

        async def running() -> bool:
            async with session.get("/metrics") as response:
                lines = (await response.text()).splitlines()
            (gauge,) = [line for line in lines if line.startswith("vllm:num_requests_running")]
            return gauge.endswith(" 1.0")

        status, answer = await generate({"n": 4, "max_tokens": 9})
        assert status == 200
        lines = read_log(tmp_path / "log")
        assert [line["token_ids"] for line in lines] == [
            choice["token_ids"] for choice in answer["choices"]
        ]
        assert all(set(line["truth"]) == {3} for line in lines)
        task = asyncio.create_task(generate(ENDLESS))
        await wait_until_async(running, "the request runs")
        process.send_signal(signal.SIGTERM)
        assert (await task)[0] == 503
    assert await asyncio.to_thread(process.wait, 5) == 0
