"""Servers for benchmarks/inference.py, each in a process of its own that ends with the block.

- One answers from memory, at once or after a while: what remains is the client's own cost.
- One is the demo's tiny server, with untrained weights.
"""

import asyncio
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

__all__ = ["ROUTE", "serve_held", "serve_tiny", "serving"]

ROUTE = "/inference/v1/generate"
START_TIMEOUT_S = 60.0


def _answer(tokens: int, n: int) -> bytes:
    """What vLLM would say to a request for n completions of so many tokens."""
    entry = {"token": "token_id:7", "logprob": -0.6931471824645996, "bytes": None}
    choice = {
        "finish_reason": "length",
        "token_ids": [7] * tokens,
        "logprobs": {"content": [entry] * tokens},
        "weight_versions": [{"version": "3", "start": 0, "end": tokens}],
    }
    choices = [{**choice, "index": index} for index in range(n)]
    return json.dumps({"request_id": "r", "choices": choices}).encode()


def serve_held(pipe: Connection, hold_s: float, tokens: int) -> None:
    """A server of its own process that answers every request after `hold_s`, from memory."""
    bodies: dict[int, bytes] = {}

    async def generate(request: web.Request) -> web.Response:
        n = int((await request.json())["sampling_params"]["n"])
        body = bodies.setdefault(n, _answer(tokens, n))
        if hold_s:
            await asyncio.sleep(hold_s)
        return web.Response(body=body, content_type="application/json")

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "held", "owned_by": "vllm"}]})

    async def serve() -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post(ROUTE, generate)
        app.router.add_get("/health", health)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=8192).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    uvloop.run(serve())


def serve_tiny(pipe: Connection, folder: str) -> None:
    """The demo's server with untrained weights."""
    import torch  # noqa: PLC0415  # only this process needs it

    from rollfleet_demo.engine import BatchingEngine as TinyModel  # noqa: PLC0415  # imports torch
    from rollfleet_demo.model import TinyPolicy, save  # noqa: PLC0415  # imports torch
    from rollfleet_demo.server import application  # noqa: PLC0415  # imports torch

    torch.set_num_threads(1)
    weights = Path(folder) / "weights.safetensors"
    save(TinyPolicy(seed=0), weights, 3)

    async def serve() -> None:
        engine = TinyModel(weights, version="3", max_num_seqs=256, seed=0)
        runner = web.AppRunner(application(engine), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=8192).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextmanager
def serving(program: Callable[..., None], *args: Any) -> Iterator[str]:
    """The URL of a server in a process of its own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=program, args=(theirs, *args), daemon=True)
    process.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"{program.__name__} did not serve in time")
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()
