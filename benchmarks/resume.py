"""What do segments and parking save, and what do they cost? ``python -m benchmarks.resume``.

- Saved: a real worker process is killed -9 about half-way through a long generation, and another one
  takes over. Counted by the server: tokens made in all, for the tokens that one generation has.
- Parking: bytes and commands that Redis sees and processor time of the worker's loop for every 1,000
  tokens, segment sizes in turns, with parking and without.
- Segments: tokens a second of a server named by ``--url`` (a vLLM with ``--enable-scale-out``), for
  several segment sizes in turns.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import structlog
from aiohttp import web

import rollfleet
from benchmarks.held import ROUTE
from benchmarks.machine import describe
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.keys import RunKeys
from rollfleet_common.messages import Claim, PolicyVersion, Prompt, VersionSpans
from rollfleet_common.redis import connect
from rollfleet_engines.interface import Engine, Generation, Request, Sampling
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.partials.progress import PartialStore
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer
from rollfleet_worker.workflows.single_turn import SingleTurn

__all__ = ["OneTurn", "main"]

#: How far a generation has come when its worker is killed, by round: on no segment's edge.
KILL_AT = (0.37, 0.53, 0.7)
PROMPT = np.arange(3, 12, dtype=np.int32)
WORKFLOW = "benchmarks.resume:OneTurn"


class OneTurn(SingleTurn):
    """One completion, worth its length."""

    @staticmethod
    def reward(completion: Any, prompt: Any, data: Any) -> float:  # noqa: ARG004  # its contract
        """Its length."""
        return float(len(completion))


def _request(place: int, tokens: int) -> Request:
    sampling = Sampling(max_tokens=tokens, extra={"ignore_eos": True})
    return Request(PROMPT, sampling, f"group-{place}", 0)


# ---- saved ---------------------------------------------------------------------------------------


class Paced:
    """A server that makes so many tokens a second for every request, and counts them."""

    def __init__(self, tokens_per_s: float, half: float) -> None:
        self.tokens_per_s = tokens_per_s
        self.half = half
        self.made = 0.0
        #: Set when a completion, its earlier segments included, has come to `half`.
        self.halfway = asyncio.Event()

    async def generate(self, request: web.Request) -> web.Response:
        """Answers in the time that the tokens take; a caller that goes away stops them."""
        body = await request.json()
        tokens, had = body["sampling_params"]["max_tokens"], len(body["token_ids"]) - len(PROMPT)
        began = time.monotonic()
        try:
            while (done := (time.monotonic() - began) * self.tokens_per_s) < tokens:
                if had + done >= self.half:
                    self.halfway.set()
                await asyncio.sleep(0.005)
        finally:
            self.made += min((time.monotonic() - began) * self.tokens_per_s, tokens)
        choice = {
            "index": 0,
            "finish_reason": "length",
            "token_ids": [7] * tokens,
            "logprobs": {"content": [{"logprob": -0.5}] * tokens},
            "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
        }
        return web.json_response({"choices": [choice]})

    async def serve(self) -> tuple[web.AppRunner, str]:
        """Start on a free port."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post(ROUTE, self.generate)
        app.router.add_get("/health", _well)
        app.router.add_get("/v1/models", _models)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _well(_: web.Request) -> web.Response:
    return web.Response()


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "paced", "owned_by": "vllm"}]})


async def _killed(
    redis_url: str, run: str, segment: int, *, park: bool, tokens: int, at: float
) -> float:
    """Tokens made for one generation whose worker is killed after `at` of it."""
    server = Paced(tokens_per_s=tokens / 4.0, half=tokens * at)
    runner, url = await server.serve()
    command = [sys.executable, "-m", "rollfleet_console", "worker", "--workflow", WORKFLOW]
    command += [f"--redis-url={redis_url}", f"--run={run}", f"--server={url}", "--engine=vllm"]
    command += [f"--max-tokens={tokens}", f"--segment-tokens={segment}", "--lease-s=1"]
    command += ["--health-port=off", "--park" if park else "--no-park", "--log-level=error"]
    shape: dict[str, Any] = {"samples_per_version": 1, "group_size": 1, "starve_s": 60.0}
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run=run, **shape)
    started: list[asyncio.subprocess.Process] = []
    try:
        async with rollfleet.AsyncFleet(settings, version=0) as fleet:
            started.append(await asyncio.create_subprocess_exec(*command))
            await fleet.submit({"token_ids": PROMPT.tolist()})
            await server.halfway.wait()
            started[0].kill()
            started.append(await asyncio.create_subprocess_exec(*command))
            batch = await fleet.next_batch(1)
            if batch is None or len(batch.rollouts[0].samples[0].token_ids) != tokens + len(PROMPT):
                raise RuntimeError("the rollout is not whole")
            await fleet.commit(batch)
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 30)
        await runner.cleanup()
    return server.made


async def saved(redis_url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens made for one generation of `args.tokens`, by how it was asked for."""
    ways = [(0, False), (2048, True), (1024, True), (256, True)]
    made: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    for at in KILL_AT:
        for segment, park in ways:
            run = f"saved-{at}-{segment}-{park}"
            made[segment, park].append(
                await _killed(redis_url, run, segment, park=park, tokens=args.tokens, at=at)
            )
    return [
        {"segment_tokens": segment, "park": park, "made_per_token": _spread(each, args.tokens)}
        for (segment, park), each in made.items()
    ]


# ---- parking -------------------------------------------------------------------------------------


class Instant:
    """A model that costs nothing: what remains is what resuming and parking cost."""

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """As many tokens as are asked for, after a turn of the loop."""
        # Time enough for a write, so that every segment is parked and none is skipped.
        await asyncio.sleep(0.02)
        tokens = request.sampling.max_tokens
        ids, logprobs = np.full(tokens, 7, np.int32), np.full(tokens, -0.5, np.float32)
        spans = VersionSpans.constant(0)
        return [Generation(ids, logprobs, spans, "length", "http://instant")] * n

    async def ready(self) -> bool:
        """Always."""
        return True

    async def close(self) -> None:
        """Nothing to close."""


async def _parked(client: Any, segment: int, *, park: bool, tokens: int, calls: int) -> Any:
    """Per 1,000 tokens: commands, bytes into Redis, and microseconds of this process."""
    engine, metrics = Resumer(Instant(), segment_tokens=segment), Metrics()
    parking = PartialStore(client, RunKeys("cost"), engine, metrics, 16 << 20)

    async def one(place: int) -> None:
        claim = Claim(Prompt(f"g{place}", 1, PROMPT, {}), 0, 1, "1-1", 0, 0)
        progress = parking.episode(claim, PolicyVersion(0, 1))
        await (progress if park else engine).generate(_request(place, tokens))
        progress.settle(None)

    before, began = await _seen(client), time.process_time()
    for first in range(0, calls, 16):
        await asyncio.gather(*(one(place) for place in range(first, first + 16)))
        await parking.flush(10.0)
    used, after = time.process_time() - began, await _seen(client)
    thousands = calls * tokens / 1000
    return (
        (after[0] - before[0] - 1) / thousands,
        (after[1] - before[1]) / thousands,
        used * 1e6 / thousands,
    )


async def _seen(client: Any) -> tuple[int, int]:
    stats = await client.info("stats")
    return stats["total_commands_processed"], stats["total_net_input_bytes"]


async def parking(redis_url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What parking costs, for segment sizes."""
    client = connect(redis_url, role="bench")
    ways = [(segment, park) for segment in (256, 1024, 2048) for park in (False, True)]
    rows: dict[tuple[int, bool], list[Any]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for segment, park in ways:
            row = await _parked(client, segment, park=park, tokens=args.tokens, calls=args.calls)
            rows[segment, park].append(row)
    await client.aclose()
    names = ("commands", "bytes", "cpu_us")
    return [
        {"segment_tokens": segment, "park": park}
        | {name: _spread(each) for name, each in zip(names, zip(*found, strict=True), strict=True)}
        for (segment, park), found in rows.items()
    ]


# ---- segments ------------------------------------------------------------------------------------


async def segments(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second, for segment sizes in turns; all prompts begin together."""
    below: Engine = CoalescingEngine(
        EnginePool([VllmEngine(args.url, route="generate")]), max_merge=1
    )
    rates: dict[int, list[float]] = {size: [] for size in args.segments}
    for number in range(args.rounds + 1):
        for size in args.segments:
            engine = Resumer(below, segment_tokens=size)
            began = time.monotonic()
            asked = [_request(place, args.tokens) for place in range(args.at_once)]
            made = await asyncio.gather(*(engine.generate(one) for one in asked))
            rate = sum(len(one.token_ids) for (one,) in made) / (time.monotonic() - began)
            if number:  # the first round warms up
                rates[size].append(rate)
    await below.close()
    whole = statistics.median(rates[args.segments[0]])
    return [
        {
            "segment_tokens": size,
            "tokens_per_s": _spread(each),
            "ratio": round(statistics.median(each) / whole, 3),
        }
        for size, each in rates.items()
    ]


def _spread(values: Sequence[float], by: float = 1.0) -> list[float]:
    """Median, least and most."""
    return [round(f(values) / by, 3) for f in (statistics.median, min, max)]


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": describe(), "tokens": args.tokens, "rounds": args.rounds}
    if "segments" in args.only:
        report["segments"] = await segments(args)
    if {"saved", "parking"} & set(args.only):
        server = EmbeddedServer()
        server.start()
        try:
            if "parking" in args.only:
                report["parking"] = await parking(server.url, args)
            if "saved" in args.only:
                report["saved"] = await saved(server.url, args)
        finally:
            server.stop()
    return report


def main(argv: list[str] | None = None) -> int:
    """The program; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["parking", "saved"])
    parser.add_argument("--url", help="of a vLLM, for `--only segments`")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--segments", type=int, nargs="+", default=[0, 256, 1024])
    args = parser.parse_args(argv)
    if "segments" in args.only and not args.url:
        parser.error("--only segments wants --url URL of a vLLM")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    print(json.dumps(asyncio.run(_run(args)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
