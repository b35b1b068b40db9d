"""What does the inference client cost? ``python -m benchmarks.inference``; docs/benchmarks.md explains it.

- Overhead: the same requests through a raw aiohttp loop, the vLLM client, a pool, and a pool with
  merged siblings, in turns, on one server. The servers are the demo's tiny one, one that answers at
  once from memory, and a real vLLM if ``--vllm URL`` names one.
- Crowd: many generations at once in this one process, at a server that holds them for seconds:
  memory, and how late the event loop is.
- Processor time is this process's own: on a shared machine it says more than the rate.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop

from benchmarks.held import ROUTE, serve_held, serve_tiny, serving
from benchmarks.machine import describe
from rollfleet_engines.interface import Engine, Request, Sampling
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool

__all__ = ["main"]

PROMPT = list(range(3, 12))
GROUP = 8
SAMPLE_S = 0.005

Ask = Callable[[int], Awaitable[int]]


# ---- overhead ------------------------------------------------------------------------------------


def _request(place: int, tokens: int) -> Request:
    sampling = Sampling(max_tokens=tokens, extra={"ignore_eos": True})
    return Request(np.array(PROMPT, np.int32), sampling, f"group-{place // GROUP}", 3)


async def _raw(url: str, n: int, tokens: int) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """A loop of aiohttp and json, and nothing that a client should also do."""
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    body = {
        "token_ids": PROMPT,
        "sampling_params": {
            "n": n,
            "max_tokens": tokens,
            "temperature": 1.0,
            "logprobs": 0,
            "output_kind": 2,
            "detokenize": False,
            "ignore_eos": True,
        },
        "cache_salt": "3",
        "stream": False,
    }

    async def ask(_: int) -> int:
        async with session.post(url + ROUTE, json=body) as reply:
            said = json.loads(await reply.read())
        return len(said["choices"])

    return ask, session.close


async def _ours(
    make: Callable[[], Engine], tokens: int
) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    engine = make()

    async def ask(place: int) -> int:
        return len(await engine.generate(_request(place, tokens)))

    return ask, engine.close


async def _round(ask: Ask, calls: int, at_once: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and completions of `calls` calls, `at_once` at a time."""
    places = iter(range(calls))
    made = 0

    async def seat() -> None:
        nonlocal made
        for place in places:
            got = await ask(place)
            made += got

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(seat() for _ in range(at_once)))
    return time.perf_counter() - began, time.process_time() - cpu, made


async def overhead(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Each side in turns; medians over the rounds."""
    tokens = args.tokens

    def client() -> VllmEngine:
        return VllmEngine(url, route="generate", max_connections=4096)

    def pool() -> EnginePool:
        return EnginePool([client()], per_server_cap=4096)

    sides = {
        "raw": await _raw(url, 1, tokens),
        "client": await _ours(client, tokens),
        "pool": await _ours(pool, tokens),
        f"raw, n={GROUP}": await _raw(url, GROUP, tokens),
        "pool and siblings": await _ours(lambda: CoalescingEngine(pool()), tokens),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, (ask, _) in sides.items():
            calls = args.requests // GROUP if name.startswith("raw, n=") else args.requests
            at_once = args.at_once // GROUP if name.startswith("raw, n=") else args.at_once
            seconds, cpu, made = await _round(ask, calls, at_once)
            if number:  # the first one warms connections
                rounds[name].append((made / seconds, 1e6 * cpu / made))
    for _, close in sides.values():
        await close()
    return {
        name: {
            "completions_per_s": statistics.median(rate for rate, _ in some),
            "cpu_us": statistics.median(cpu for _, cpu in some),
            "rounds": some,
        }
        for name, some in rounds.items()
    }


# ---- crowd ---------------------------------------------------------------------------------------


async def crowd(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """`args.crowd` generations at once: memory and loop lag, merged in groups and not."""
    late: list[float] = []
    ended = asyncio.Event()

    async def watch() -> None:
        while not ended.is_set():
            began = time.perf_counter()
            await asyncio.sleep(SAMPLE_S)
            late.append(1e3 * (time.perf_counter() - began - SAMPLE_S))

    client = VllmEngine(url, route="generate", max_connections=args.crowd)
    engine: Engine = EnginePool([client], per_server_cap=args.crowd)
    if args.siblings:
        engine = CoalescingEngine(engine)
    before = _rss_bytes()
    watcher = asyncio.create_task(watch())
    began, cpu = time.perf_counter(), time.process_time()
    request = _request(0, args.crowd_tokens)
    tasks = [
        asyncio.create_task(engine.generate(replace(request, affinity=str(place // GROUP))))
        for place in range(args.crowd)
    ]
    await asyncio.sleep(args.hold_s / 2)
    held = _rss_bytes()
    made = await asyncio.gather(*tasks)
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    ended.set()
    await watcher
    await engine.close()
    late.sort()
    return {
        "generations": len(made),
        "tokens_each": len(made[0][0].token_ids),
        "seconds": seconds,
        "held_s": args.hold_s,
        "cpu_ms_each": 1e3 * used / len(made),
        "rss_before_mib": before / (1 << 20),
        "kib_each_held": (held - before) / 1024 / len(made),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "lag_ms": {
            "p50": late[len(late) // 2],
            "p99": late[len(late) * 99 // 100],
            "max": late[-1],
        },
    }


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---- program -------------------------------------------------------------------------------------


def _crowd_process(pipe: Connection, url: str, args: argparse.Namespace) -> None:
    """In a process of its own, whose memory nothing else has touched."""
    pipe.send(uvloop.run(crowd(url, args)))


def _crowds(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for siblings in (False, True):
        given = argparse.Namespace(**{**vars(args), "siblings": siblings})
        for _ in range(args.rounds):
            with serving(serve_held, args.hold_s, args.crowd_tokens) as url:
                ours, theirs = context.Pipe()
                process = context.Process(target=_crowd_process, args=(theirs, url, given))
                process.start()
                if not ours.poll(args.hold_s + 120):
                    process.kill()
                    raise RuntimeError("the crowd was not served in time")
                yield {"siblings": siblings, **ours.recv()}
                process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", help="URL of a real vLLM with --enable-scale-out")
    parser.add_argument("--requests", type=int, default=2000, help="completions in a round")
    parser.add_argument("--at-once", type=int, default=64, help="completions in flight")
    parser.add_argument("--tokens", type=int, default=10, help="of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crowd", type=int, default=2000, help="generations at once; 0: none")
    parser.add_argument("--crowd-tokens", type=int, default=512)
    parser.add_argument("--hold-s", type=float, default=10.0, help="until the crowd is answered")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": describe(), "settings": vars(args), "overhead": {}}
    with serving(serve_held, 0.0, args.tokens) as url:
        report["overhead"]["from memory"] = uvloop.run(overhead(url, args))
    with tempfile.TemporaryDirectory() as folder, serving(serve_tiny, folder) as url:
        report["overhead"]["tiny server"] = uvloop.run(overhead(url, args))
    if args.vllm:
        report["overhead"]["vLLM"] = uvloop.run(overhead(args.vllm, args))
    report["crowd"] = [*_crowds(args)] if args.crowd else []
    report["machine_after"] = {"load_average": os.getloadavg()}
    print(json.dumps(report, indent=1) if args.json else _text(report))


def _text(report: dict[str, Any]) -> str:
    lines = [json.dumps(report["machine"]), ""]
    for server, sides in report["overhead"].items():
        for name, side in sides.items():
            base = sides[f"raw, n={GROUP}" if "siblings" in name else "raw"]
            lines.append(
                f"{server:12} {name:18} {side['completions_per_s']:9,.0f} completions/s "
                f"(x {side['completions_per_s'] / base['completions_per_s']:.2f})  "
                f"{side['cpu_us']:7.0f} us of processor each (+{side['cpu_us'] - base['cpu_us']:.0f})"
            )
    for one in report["crowd"]:
        lag = one["lag_ms"]
        lines.append(
            f"crowd of {one['generations']:,}{' merged' if one['siblings'] else '':7}: "
            f"{one['kib_each_held']:.1f} KiB each while held, peak {one['peak_mib']:.0f} MiB, "
            f"lag p50 {lag['p50']:.1f} p99 {lag['p99']:.1f} max {lag['max']:.0f} ms, "
            f"{one['cpu_ms_each']:.2f} ms of processor each, {one['seconds']:.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
