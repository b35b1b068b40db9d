"""How long a trainer waits for its batches: ``python -m benchmarks.consume [--json]``.

- The rollouts are there: what is measured is choosing, loading, decoding, planning and collating,
  with and without batches prepared ahead, which take turns round by round.
- The trainer is a plain loop over a :class:`rollfleet.Fleet`; its step is a torch matrix product on
  one thread, which lets go of the GIL as real steps do, and a publish and a commit, as in real loops.
- Waiting is the time from asking for a batch until its tensors are in hand.
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

import rollfleet
from benchmarks.machine import describe
from benchmarks.workflow import sample_of
from rollfleet_common.codec import encode_samples
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Claim, Header
from rollfleet_common.redis import connect
from rollfleet_common.streams import Delivered, Delivery, Streams

__all__ = ["main"]

GROUP = 8
PROMPT_TOKENS = 256
#: Batches before anything is measured: blocks are made, and the trainer is known to want tensors.
WARM = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch: its samples, and the tokens of each."""

    samples: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """From ``256x2048``."""
        samples, tokens = map(int, text.split("x"))
        if samples % GROUP:
            raise argparse.ArgumentTypeError(f"{text}: a batch holds whole groups of {GROUP}")
        return cls(samples, tokens)

    def __str__(self) -> str:
        return f"{self.samples} x {self.tokens:,}"


class Round:
    """One run of a trainer over batches that are all there."""

    def __init__(
        self, url: str, shape: Shape, prefetch: int, steps: int, compute_ms: float
    ) -> None:
        self.url, self.shape = url, shape
        self.steps = steps + WARM
        self.compute_ms = compute_ms
        self.settings: dict[str, Any] = {
            "run": "consume",
            "fresh": True,
            "samples_per_version": shape.samples,
            "group_size": GROUP,
            "max_staleness": self.steps,
            "prefetch": prefetch,
        }
        self.fetched_bytes = 0

    def run(self) -> dict[str, Any]:
        """Milliseconds of every wait, and what was read for a batch."""
        waits: list[float] = []
        with rollfleet.connect(self.url, **self.settings) as fleet:
            fleet.feed({"token_ids": []} for _ in range(self.shape.samples // GROUP * self.steps))
            header_bytes = asyncio.run(self._fill())
            want = self.shape.samples * self.steps
            while sum(len(g.members) for g in list(fleet.aio.consumer.ready.values())) < want:
                time.sleep(0.01)
            self._count(fleet.aio.streams[0])
            for _ in range(self.steps):
                began = time.perf_counter()
                batch = fleet.next_batch()
                if batch is None or batch.tensors.rows != self.shape.samples:
                    raise RuntimeError("a batch is missing")
                waits.append((time.perf_counter() - began) * 1e3)
                compute(self.compute_ms)
                fleet.publish()
                fleet.commit(batch)
            books = fleet.books()
        if books.balance or books.committed != want:
            raise RuntimeError(f"the run does not balance: {books}")
        return {
            "waits_ms": waits[WARM:],
            "header_bytes": header_bytes // self.steps,
            "payload_bytes": self.fetched_bytes // self.steps,
        }

    async def _fill(self) -> int:
        """Be the worker: claim and deliver all of it; returns the bytes of all headers."""
        keys = PartitionKeys("consume", 0)
        payload = encode_samples([sample_of(PROMPT_TOKENS, self.shape.tokens, 0)])
        async with connect(self.url, role="benchmark") as client:
            streams = Streams(client, keys)
            await streams.make_groups(["default"])
            left = self.shape.samples * self.steps
            while left:
                claims, _ = await streams.claim(client, "w", ["default"], 64, 100)
                said = await streams.deliver("w", [self._delivery(c, payload) for c in claims])
                if said != [Delivered.YES] * len(claims):
                    raise RuntimeError(f"not delivered: {said}")
                left -= len(claims)
            entries = await client.xrange(keys.rollouts)
        return sum(len(part) for _, fields in entries for item in fields.items() for part in item)

    def _delivery(self, claim: Claim, payload: bytes) -> Delivery:
        p = claim.prompt
        header = Header(
            group=p.group,
            index=claim.index,
            n=p.n,
            attempt=claim.attempt,
            kind=p.kind,
            route=p.route,
            task=p.task,
            position=p.position,
            entry=claim.entry,
            payload=f"{claim.entry}:0123abcd",
            payload_bytes=len(payload),
            epoch=1,
            min_version=0,
            max_version=0,
            samples=1,
            tokens=self.shape.tokens,
            trained_tokens=self.shape.tokens - PROMPT_TOKENS,
            reward=1.0,
            worker="worker-host-12345-abcdef",
            server="http://10.0.0.7:8000",
            queue_ms=12,
            generate_ms=12,
            reward_ms=12,
        )
        return Delivery(header, payload)

    def _count(self, streams: Streams) -> None:
        fetch = streams.fetch

        async def counted(payloads: Sequence[str]) -> list[bytes | None]:
            found = await fetch(payloads)
            self.fetched_bytes += sum(len(value or b"") for value in found)
            return found

        streams.fetch = counted  # type: ignore[method-assign]


def compute(milliseconds: float) -> None:
    """A training step."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        torch.mm(_LEFT, _LEFT)


_LEFT = torch.ones(256, 256)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what is printed."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": describe(), "torch": torch.__version__, "shapes": {}}
    for shape in args.shape:
        sides: dict[int, list[dict[str, Any]]] = {depth: [] for depth in (0, *args.prefetch)}
        for _ in range(args.rounds):
            for depth, rounds in sides.items():
                with EmbeddedServer() as server:
                    rounds.append(
                        Round(server.url, shape, depth, args.steps, args.compute_ms).run()
                    )
        report["shapes"][str(shape)] = {
            str(depth): _summary(rounds) for depth, rounds in sides.items()
        }
    return report


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    medians = [statistics.median(each["waits_ms"]) for each in rounds]
    return {
        "wait_ms": round(statistics.median(medians), 2),
        "by_round": [round(value, 2) for value in medians],
        "worst_ms": round(max(max(each["waits_ms"]) for each in rounds), 2),
        "header_bytes": rounds[0]["header_bytes"],
        "payload_bytes": rounds[0]["payload_bytes"],
    }


def table(report: dict[str, Any], args: argparse.Namespace) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        (
            f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}; "
            f"Python {machine['python']}, torch {report['torch']}"
        ),
        (
            f"a step of {args.compute_ms:g} ms, {args.steps} batches a round, {args.rounds} "
            "interleaved rounds; medians of rounds' medians, in ms"
        ),
        "",
        f"{'batch':16}{'prefetch':>9}{'wait':>9}{'worst':>9}{'headers':>11}{'payloads':>13}",
    ]
    for shape, sides in report["shapes"].items():
        for depth, side in sides.items():
            lines.append(
                f"{shape:16}{depth:>9}{side['wait_ms']:>9.2f}{side['worst_ms']:>9.2f}"
                f"{side['header_bytes']:>11,}{side['payload_bytes']:>13,}   by round "
                + ", ".join(f"{value:.1f}" for value in side["by_round"])
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consume", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--shape",
        type=Shape.of,
        nargs="+",
        default=[Shape(64, 2048), Shape(256, 2048), Shape(64, 16384)],
        help="SAMPLESxTOKENS",
    )
    parser.add_argument("--prefetch", type=int, nargs="+", default=[1], help="depths, beside 0")
    parser.add_argument("--compute-ms", type=float, default=150.0, help="a training step")
    parser.add_argument("--steps", type=int, default=8, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    args = parser.parse_args(argv)
    # What the trainer says of itself would stand between the numbers.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    report = measure(args)
    print(json.dumps(report, indent=1) if args.json else table(report, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
