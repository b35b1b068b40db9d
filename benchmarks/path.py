"""How fast is the path? ``python -m benchmarks.path [--json]``; docs/benchmarks.md explains it.

- The floor (benchmarks/floor.py) and rollfleet (benchmarks/ours.py) take turns on one server, round
  by round, so that whatever else the machine does meets both.
- Throughput: `n` tasks through at most WINDOW outstanding. Latency: one task at a time.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
from typing import Any

import uvloop

from benchmarks.floor import WINDOW, Floor
from benchmarks.machine import cpu_s, describe
from benchmarks.ours import SLOTS, Ours
from benchmarks.workflow import sample_of
from rollfleet_common.codec import encode_header, encode_samples
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.messages import Header, Kind
from rollfleet_common.redis import check_server, connect

__all__ = ["main"]

FLOOR_BATCHES = (16, 64, 256)
#: Tasks through each side before anything is measured.
WARM = 512
#: The sample whose bytes per token are reported.
WIRE_PROMPT, WIRE_TOKENS = 256, 2048


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what is printed."""
    report: dict[str, Any] = {
        "machine": describe(),
        "settings": {
            **{key: value for key, value in vars(args).items() if key != "json"},
            "slots": SLOTS,
            "window": WINDOW,
            "worker_processes": 1,
            "transport": "unix socket",
        },
    }
    with EmbeddedServer(appendonly=args.aof) as server:
        client = connect(server.url, role="benchmark")
        said = await check_server(client, strict=False)
        await client.aclose()
        product = "Valkey" if said.is_valkey else "Redis"
        report["server"] = f"{product} {said.product_version}, appendonly {args.aof}"
        sides: dict[str, Floor | Ours] = {}
        for batch in FLOOR_BATCHES:
            floor = Floor(server.url, batch, args.prompt_bytes, args.result_bytes)
            sides[f"floor, batches of {batch}"] = floor
        sides["rollfleet"] = Ours(
            server.url,
            group_size=args.group_size,
            batch=args.batch,
            prompt_bytes=args.prompt_bytes,
            result_bytes=args.result_bytes,
        )
        if args.only:
            sides = {name: side for name, side in sides.items() if args.only in name}
        report |= await _compare(sides, server.pid, args)
    report["wire"] = wire()
    return report


async def _compare(
    sides: dict[str, Floor | Ours],
    server_pid: int | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, dict[str, list[float]]] = {
        name: {"trainer": [], "worker": [], "server": []} for name in sides
    }
    latencies: dict[str, list[float]] = {name: [] for name in sides}
    n = args.n - args.n % args.group_size
    warm = min(WARM, n) // args.group_size * args.group_size
    for _ in range(args.rounds):
        for name, side in sides.items():
            async with side:
                await side.round(warm)
                pids = {"trainer": os.getpid(), "worker": side.process.pid, "server": server_pid}
                before = {part: cpu_s(pid) for part, pid in pids.items()}
                rates[name].append(n / await side.round(n))
                for part, pid in pids.items():
                    cpu[name][part].append((cpu_s(pid) - before[part]) / n * 1e6)
                latencies[name] += [await side.one() for _ in range(args.pings)]
    floors = [name for name in sides if name.startswith("floor")]
    result: dict[str, Any] = {"sides": {}}
    for name in sides:
        result["sides"][name] = {
            "tasks_per_s": _spread(rates[name]),
            "rounds": [round(rate) for rate in rates[name]],
            "latency_ms": _latency(latencies[name]),
            "cpu_us_per_task": {
                part: _number(statistics.median(values)) for part, values in cpu[name].items()
            },
        }
    if floors and "rollfleet" in sides:
        best = max(floors, key=lambda name: statistics.median(rates[name]))
        quick = min(floors, key=lambda name: statistics.median(latencies[name]))
        result["best_floor"] = best
        result["ratio"] = round(
            statistics.median(rates["rollfleet"]) / statistics.median(rates[best]), 3
        )
        result["ratio_by_round"] = [
            round(ours / floor, 3)
            for ours, floor in zip(rates["rollfleet"], rates[best], strict=True)
        ]
        result["latency_ratio"] = round(
            statistics.median(latencies["rollfleet"]) / statistics.median(latencies[quick]), 2
        )
    return result


def wire() -> dict[str, Any]:
    """Bytes of a single-turn sample, header and payload."""
    payload = encode_samples([sample_of(WIRE_PROMPT, WIRE_TOKENS, 7)])
    entry = "1790000000000-0"
    header = encode_header(
        Header(
            group="p123456",
            index=3,
            n=8,
            attempt=1,
            kind=Kind.TRAIN,
            route="default",
            task="default",
            position=123456,
            entry=entry,
            payload=f"{entry}:0123abcd",
            payload_bytes=len(payload),
            epoch=1,
            min_version=7,
            max_version=7,
            samples=1,
            tokens=WIRE_TOKENS,
            trained_tokens=WIRE_TOKENS - WIRE_PROMPT,
            reward=1.0,
            worker="worker-host-12345-abcdef",
            server="http://10.0.0.7:8000",
            queue_ms=12,
            generate_ms=12345,
            reward_ms=12,
        )
    )
    return {
        "tokens": WIRE_TOKENS,
        "header_bytes": len(header),
        "payload_bytes": len(payload),
        "bytes_per_token": round((len(header) + len(payload)) / WIRE_TOKENS, 3),
    }


def _spread(values: list[float]) -> dict[str, int]:
    return {
        "min": round(min(values)),
        "median": round(statistics.median(values)),
        "max": round(max(values)),
    }


def _latency(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"p{p}": round(ordered[min(len(ordered) * p // 100, len(ordered) - 1)] * 1e3, 3)
        for p in (50, 95)
    }


def _number(value: float) -> int | None:
    return None if math.isnan(value) else round(value)


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        (
            f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}; "
            f"Python {machine['python']}; {report['server']}, {settings['transport']}"
        ),
        ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        (
            f"{settings['n']:,} tasks a round, {settings['rounds']} interleaved rounds, "
            f"{settings['prompt_bytes']:,} bytes in, {settings['result_bytes']:,} bytes out, "
            f"groups of {settings['group_size']}, {SLOTS} slots, 1 worker process"
        ),
        "",
        f"{'':26}{'tasks/s':>9}{'min':>9}{'max':>9}{'p50 ms':>9}{'p95 ms':>9}   CPU us a task",
        f"{'':26}{'':45}   trainer worker server",
    ]
    for name, side in report["sides"].items():
        rate, latency, cpu = side["tasks_per_s"], side["latency_ms"], side["cpu_us_per_task"]
        lines.append(
            f"{name:26}{rate['median']:>9,}{rate['min']:>9,}{rate['max']:>9,}"
            f"{latency['p50']:>9.2f}{latency['p95']:>9.2f}   "
            + " ".join(f"{cpu[part] or 0:>7}" for part in ("trainer", "worker", "server"))
        )
    if "ratio" in report:
        lines += [
            "",
            f"{report['ratio']:.2f} of the best floor ({report['best_floor']}); by round "
            + ", ".join(f"{ratio:.2f}" for ratio in report["ratio_by_round"]),
            f"{report['latency_ratio']:.2f} times the floor's median latency",
        ]
    w = report["wire"]
    lines.append(
        f"{w['bytes_per_token']:.2f} bytes a token on the wire (header {w['header_bytes']} + "
        f"payload {w['payload_bytes']:,} bytes, {w['tokens']:,} tokens)"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--n", type=int, default=10_000, help="tasks of a round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--prompt-bytes", type=int, default=2048, help="bytes in")
    parser.add_argument("--result-bytes", type=int, default=20_480, help="bytes out")
    parser.add_argument("--group-size", type=int, default=8, help="samples of one prompt")
    parser.add_argument("--batch", type=int, default=256, help="samples of one batch")
    parser.add_argument("--pings", type=int, default=100, help="tasks of a round's latency")
    parser.add_argument("--aof", choices=("no", "everysec"), default="no", help="append-only file")
    parser.add_argument("--only", default="", help="measure sides whose name contains this")
    args = parser.parse_args(argv)
    if args.n < args.group_size or args.batch % args.group_size:
        parser.error("--n and --batch must hold whole groups")
    report = uvloop.run(asyncio.wait_for(measure(args), timeout=1800))
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
