"""A tiny inference server with vLLM's HTTP protocol: ``python -m rollfleet_demo.server``.

- Same routes, shapes and status codes as a vLLM server started with `--enable-scale-out` and
  `VLLM_SERVER_DEV_MODE=1`, as far as they are listed in :func:`application`; others are 404.
- A refit is the caller's sequence, as with vLLM: ``/pause?mode=keep``, ``/collective_rpc`` with
  `reload_weights`, ``/update_weight_version``, ``/resume``. Each step applies between two passes.
- A client that goes away frees its slots.
- Started as a program it prints one line of JSON, ``{"url": ..., "pid": ...}``, once it serves.
- It listens on 127.0.0.1 only: like vLLM's dev mode, it lets any caller read any file as weights.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar, cast, get_args
from uuid import uuid4

import torch
from aiohttp import web
from pydantic import BaseModel, ValidationError

import rollfleet_demo.protocol as wire
from rollfleet_demo.engine import BatchingEngine, PauseMode
from rollfleet_demo.protocol import RequestError
from rollfleet_demo.requests import Completion, EngineClosedError
from rollfleet_demo.sampling import SamplerSettings

__all__ = ["TinyServer", "application", "main"]

_BODY_LIMIT_BYTES = 64 << 20
_Body = TypeVar("_Body", bound=BaseModel)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{labels} {running}
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{labels} {waiting}
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{labels} {usage}
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{labels} {prompt_tokens}
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{labels} {generation_tokens}
"""


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every refusal and failure in vLLM's error shape."""
    try:
        return await handler(request)
    except RequestError as exc:
        status, kind, text, param = exc.status, exc.kind, str(exc), exc.param
    except ValidationError as exc:
        text, param = wire.validation_message(exc)
        status, kind = HTTPStatus.BAD_REQUEST, HTTPStatus.BAD_REQUEST.phrase
    except web.HTTPException as exc:
        status, param = HTTPStatus(exc.status), None
        kind = text = exc.reason
    except EngineClosedError as exc:
        status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
        text, param = str(exc), None
    except (OSError, ValueError) as exc:
        status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"
        text, param = str(exc), None
    return web.json_response(
        wire.error_body(text, kind, int(status), param),
        status=status,
    )


async def _json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        RequestError: It is none.
    """
    kind = HTTPStatus.BAD_REQUEST.phrase
    try:
        body = json.loads(await request.read())
    except ValueError as exc:
        raise RequestError(f"JSON decode error: {exc}", kind=kind) from exc
    if not isinstance(body, dict):
        raise RequestError("Request body must be a JSON object", kind=kind)
    return body


async def _checked(request: web.Request, shape: type[_Body]) -> _Body:
    """The body of a generation request.

    Raises:
        RequestError, ValidationError: It is not of that shape.
    """
    if request.content_type != "application/json":
        raise RequestError(
            "Unsupported Media Type: Only 'application/json' is allowed",
            kind=HTTPStatus.BAD_REQUEST.phrase,
        )
    return shape.model_validate(await _json_object(request))


class TinyServer:
    """The routes, over one engine."""

    def __init__(self, engine: BatchingEngine, model: str = "tiny") -> None:
        """Serve `engine` under the name `model`. The engine stays the caller's to close."""
        self.engine = engine
        self.model = model
        self._load = 0

    async def _generate(
        self, request_id: str, prompts: Sequence[Sequence[int]], sampling: SamplerSettings
    ) -> list[list[Completion]]:
        """Completions of every prompt; if the caller is cancelled, so are they."""
        for prompt in prompts:
            wire.check_prompt(prompt, sampling, self.engine.max_tokens, self.engine.max_num_seqs)
        tickets = [self.engine.submit(request_id, prompt, sampling) for prompt in prompts]
        self._load += 1
        try:
            waits = [asyncio.wrap_future(ticket.result) for ticket in tickets]
            return list(await asyncio.gather(*waits))
        except asyncio.CancelledError:
            for ticket in tickets:
                self.engine.cancel(ticket)
            raise
        finally:
            self._load -= 1

    async def generate(self, request: web.Request) -> web.Response:
        """``POST /inference/v1/generate``."""
        body = await _checked(request, wire.GenerateBody)
        wire.check_model(body.model, self.model)
        request_id = request.headers.get("X-Request-Id", body.request_id)
        sampling = body.sampling_params.sampling()
        (choices,) = await self._generate(request_id, [body.token_ids], sampling)
        return web.json_response(wire.generate_answer(body, self.model, request_id, choices))

    async def completions(self, request: web.Request) -> web.Response:
        """``POST /v1/completions``."""
        body = await _checked(request, wire.CompletionBody)
        wire.check_model(body.model, self.model)
        request_id = request.headers.get("X-Request-Id", body.request_id)
        prompts = body.prompts()
        results = await self._generate(request_id, prompts, body.sampling())
        pairs = list(zip(prompts, results, strict=True))
        return web.json_response(wire.completion_answer(body, self.model, request_id, pairs))

    async def pause(self, request: web.Request) -> web.Response:
        """``POST /pause?mode=abort|wait|keep``."""
        mode = request.query.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise RequestError(
                f"query.mode: Input should be 'abort', 'wait' or 'keep', got {mode!r}",
                kind=HTTPStatus.BAD_REQUEST.phrase,
                param="query.mode",
            )
        await asyncio.wrap_future(self.engine.pause(cast("PauseMode", mode)))
        return web.json_response({"status": "paused"})

    async def resume(self, _: web.Request) -> web.Response:
        """``POST /resume``."""
        await asyncio.wrap_future(self.engine.resume())
        return web.json_response({"status": "resumed"})

    async def is_paused(self, _: web.Request) -> web.Response:
        """``GET /is_paused``."""
        return web.json_response({"is_paused": self.engine.stats.paused})

    async def abort_requests(self, request: web.Request) -> web.Response:
        """``POST /abort_requests``: those in `request_ids`, or all if there are none."""
        ids = (await _json_object(request)).get("request_ids")
        if ids is not None and not (isinstance(ids, list) and all(isinstance(i, str) for i in ids)):
            raise RequestError("request_ids must be a list of strings", param="request_ids")
        ended = await asyncio.wrap_future(self.engine.abort(ids or None))
        return web.json_response({"status": "aborted", "aborted": ended})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        """``POST /collective_rpc``: method `reload_weights`, optionally from `weights_path`."""
        body = await _json_object(request)
        method = body.get("method")
        if method is None:
            kind = HTTPStatus.BAD_REQUEST.phrase
            raise RequestError("Missing 'method' in request body", kind=kind)
        kwargs = body.get("kwargs") or {}
        path = kwargs.get("weights_path") if isinstance(kwargs, dict) else kwargs
        known = {} if path is None else {"weights_path": path}
        if method != "reload_weights" or kwargs != known or body.get("args"):
            # Not our caller's JSON but the worker's method is at fault: vLLM answers 500 too.
            raise ValueError(f"there is no method {method!r} that takes {kwargs!r}")
        await asyncio.wrap_future(self.engine.reload(None if path is None else Path(str(path))))
        return web.json_response({"results": [None]})

    async def update_weight_version(self, request: web.Request) -> web.Response:
        """``POST /update_weight_version``: label all further tokens `new_version`."""
        version = (await _json_object(request)).get("new_version")
        if not isinstance(version, str):
            raise RequestError(
                "1 validation error:\n  body.new_version: Input should be a valid string",
                kind=HTTPStatus.BAD_REQUEST.phrase,
                param="body.new_version",
            )
        await asyncio.wrap_future(self.engine.set_version(version))
        return web.json_response({"success": True, "new_version": version})

    async def weight_info(self, _: web.Request) -> web.Response:
        """``GET /weight_info``."""
        return web.json_response({"weight_version": self.engine.stats.version})

    async def reset_prefix_cache(self, _: web.Request) -> web.Response:
        """``POST /reset_prefix_cache``: there is none, so it is always empty."""
        return web.json_response({"success": True})

    async def health(self, _: web.Request) -> web.Response:
        """``GET /health``: 200 while the engine can generate, else 503."""
        return web.Response(status=200 if self.engine.alive else 503)

    async def models(self, _: web.Request) -> web.Response:
        """``GET /v1/models``."""
        card = {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "rollfleet",
            "root": self.model,
            "parent": None,
            "max_model_len": self.engine.max_tokens,
            "permission": [],
        }
        return web.json_response({"object": "list", "data": [card]})

    async def load(self, _: web.Request) -> web.Response:
        """``GET /load``: generation requests that are being answered."""
        return web.json_response({"server_load": self._load})

    async def version(self, _: web.Request) -> web.Response:
        """``GET /version``: of the protocol, which is vLLM 0.32's."""
        return web.json_response({"version": "0.32.0+rollfleet.demo"})

    async def metrics(self, _: web.Request) -> web.Response:
        """``GET /metrics``, in Prometheus' text format."""
        stats = self.engine.stats
        text = _METRICS.format(
            labels=f'{{engine="0",model_name="{self.model}"}}',
            running=float(stats.running),
            waiting=float(stats.waiting),
            usage=stats.cache_usage,
            prompt_tokens=float(stats.prompt_tokens),
            generation_tokens=float(stats.generation_tokens),
        )
        return web.Response(text=text)


def application(engine: BatchingEngine, model: str = "tiny") -> web.Application:
    """The aiohttp application.

    Run it with `handler_cancellation=True`: only then does a client that goes away cancel its
    handler, and with it its generation.
    """
    server = TinyServer(engine, model)
    app = web.Application(middlewares=[_errors], client_max_size=_BODY_LIMIT_BYTES)
    app.add_routes(
        [
            web.post("/inference/v1/generate", server.generate),
            web.post("/v1/completions", server.completions),
            web.post("/pause", server.pause),
            web.post("/resume", server.resume),
            web.get("/is_paused", server.is_paused),
            web.post("/abort_requests", server.abort_requests),
            web.post("/collective_rpc", server.collective_rpc),
            web.post("/update_weight_version", server.update_weight_version),
            web.get("/weight_info", server.weight_info),
            web.post("/reset_prefix_cache", server.reset_prefix_cache),
            web.get("/health", server.health),
            web.get("/v1/models", server.models),
            web.get("/load", server.load),
            web.get("/version", server.version),
            web.get("/metrics", server.metrics),
        ]
    )
    return app


async def _serve(engine: BatchingEngine, host: str, port: int, model: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        application(engine, model),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.5,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0][1]
        print(json.dumps({"url": f"http://{host}:{bound}", "pid": os.getpid()}), flush=True)
        await stop.wait()
    finally:
        # Whoever still waits is told 503 at once: try another server.
        await asyncio.to_thread(engine.close)
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="rollfleet_demo.server", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file to serve")
    parser.add_argument("--wait-weights-s", type=float, default=0.0, help="wait for that file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--version", default="default", help="label of these weights")
    parser.add_argument("--model", default="tiny", help="name that requests ask for")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences in one pass")
    parser.add_argument("--token-log", type=Path, help="append what really made each token here")
    parser.add_argument("--delay-per-token-s", type=float, default=0.0, help="play a slow model")
    parser.add_argument("--seed", type=int, help="of requests that bring none; default: random")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + options.wait_weights_s
    while not options.weights.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    engine = BatchingEngine(
        options.weights,
        version=options.version,
        max_num_seqs=options.max_num_seqs,
        token_log=options.token_log,
        delay_per_token_s=options.delay_per_token_s,
        seed=uuid4().int >> 65 if options.seed is None else options.seed,
    )
    asyncio.run(_serve(engine, options.host, options.port, options.model))


if __name__ == "__main__":
    main()
