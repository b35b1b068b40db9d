"""How fast are batches collated, and how evenly divided? ``python -m benchmarks.collate [--json]``.

- Every way takes its turn in every round, so that whatever else the machine does meets all of them;
  what is reported are medians, and ratios of medians. "cpu" is the ratio of the processor time of
  the thread that collates, which moves less than the clock's when a machine is shared.
- GB/s count the bytes of the tensors that come out (those of one value a token), so a way is not
  faster for reading less.
- The floor copies those same bytes, row by row, from other arrays into arrays that are there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import torch

from benchmarks.machine import describe
from rollfleet.tensors.balance import Cost
from rollfleet.tensors.collate import PackedBatch, TensorBatch, collate
from rollfleet.tensors.packing import plan_micro
from rollfleet_common.codec import decode_samples, encode_samples
from rollfleet_common.messages import Header, Kind, Rollout, Sample, VersionSpans
from rollfleet_common.validate import check_samples

__all__ = ["main"]

GROUP = 8
NEWEST = 9
PADDED = ("input_ids", "attention_mask", "loss_mask", "logprobs", "versions")
PACKED = ("input_ids", "position_ids", "row_ids", "loss_mask", "logprobs", "versions")
#: Of the lengths that are divided over ranks: exp(N(8, 1)), that is 2,981 in the middle.
MU, SIGMA, LONGEST = 8.0, 1.0, 32_768
BUDGET = 32_768

_Packed = list[tuple[Header, bytes]]


# ---- collation ----------------------------------------------------------------------------------


def sample(rng: np.random.Generator, tokens: int) -> Sample:
    """A prompt of an eighth, a completion that two versions made."""
    prompt, half = tokens // 8, tokens // 2
    mask = np.arange(tokens) >= prompt
    return Sample(
        token_ids=rng.integers(0, 150_000, tokens).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -rng.random(tokens, np.float32), np.float32(0)),
        versions=VersionSpans.of([(prompt, -1), (half, 3), (tokens - prompt - half, 4)]),
        reward=1.0,
        metrics={"turns": 1.0},
    )


def header(at: int, tokens: int, packed: int) -> Header:
    return Header(
        group=f"g{at // GROUP}",
        index=at % GROUP,
        n=GROUP,
        attempt=1,
        kind=Kind.TRAIN,
        route="default",
        task="default",
        position=at,
        entry="1790000000000-0",
        payload="1790000000000-0:0123abcd",
        payload_bytes=packed,
        epoch=1,
        min_version=3,
        max_version=4,
        samples=1,
        tokens=tokens,
        trained_tokens=tokens - tokens // 8,
        reward=1.0,
        worker="w",
        server="http://10.0.0.7:8000",
        queue_ms=1,
        generate_ms=1,
        reward_ms=1,
    )


def rollouts(rows: int, tokens: int, ragged: bool) -> tuple[_Packed, list[Rollout]]:
    """The same rollouts as they come from Redis, and decoded."""
    rng = np.random.default_rng(0)
    packed: _Packed = []
    for at in range(rows):
        length = int(rng.integers(tokens // 4, tokens + 1)) if ragged else tokens
        payload = encode_samples([sample(rng, length)])
        packed.append((header(at, length, len(payload)), payload))
    return packed, [Rollout(h, decode_samples(p)) for h, p in packed]


def floor(batch: TensorBatch | PackedBatch, names: Sequence[str]) -> Callable[[], object]:
    """Copies of the bytes that came out, row by row."""
    arrays = [getattr(batch, name).numpy() for name in names]
    if isinstance(batch, PackedBatch):
        edges: list[int] = batch.cu_seqlens.tolist()
        places = [slice(a, b) for a, b in pairwise(edges)]
    else:
        places = [slice(row, row + 1) for row in range(batch.rows)]
    rows = [[array[place].copy() for array in arrays] for place in places]
    there = [np.zeros_like(array) for array in arrays]

    def copy() -> None:
        for place, row in zip(places, rows, strict=True):
            for array, values in zip(there, row, strict=True):
                array[place] = values

    return copy


def to_lists(samples: Sequence[Sample]) -> list[list[list[Any]]]:
    """What peers send: lists of numbers, a version and a mask for every token."""
    return [
        [
            s.token_ids.tolist(),
            s.loss_mask.tolist(),
            s.logprobs.tolist(),
            s.versions.expand(len(s.token_ids)).tolist(),
        ]
        for s in samples
    ]


def from_lists(rows: Sequence[Sequence[list[Any]]]) -> list[torch.Tensor]:
    """The plain way: pad lists, and make tensors of them."""
    width = max(len(row[0]) for row in rows)
    padded = [
        [row[field] + [pad] * (width - len(row[field])) for row in rows]
        for field, pad in enumerate((0, False, 0.0, -1))
    ]
    ids, mask, logprobs, versions = padded
    lengths = torch.tensor([len(row[0]) for row in rows])
    return [
        torch.tensor(ids),
        torch.arange(width) < lengths[:, None],
        torch.tensor(mask),
        torch.tensor(logprobs),
        torch.tensor(versions, dtype=torch.int32),
    ]


def ways(packed: _Packed, decoded: list[Rollout], lists: bool) -> dict[str, Callable[[], object]]:
    """All that is compared on some rollouts, by name; "(packed)" ones have a floor of their own."""

    def checked() -> TensorBatch:
        fresh = [Rollout(h, decode_samples(p)) for h, p in packed]
        for each in fresh:
            check_samples(each.samples, where="benchmark", newest=NEWEST)
        return collate(fresh)

    found: dict[str, Callable[[], object]] = {
        "floor": floor(collate(packed), PADDED),
        "from bytes": lambda: collate(packed),
        "decoded": lambda: collate(decoded),
        "decode, check, collate": checked,
        "floor (packed)": floor(collate(packed, form="packed"), PACKED),
        "from bytes (packed)": lambda: collate(packed, form="packed"),
        "decoded (packed)": lambda: collate(decoded, form="packed"),
    }
    if lists:
        plain = to_lists([sample for each in decoded for sample in each.samples])
        sent = [msgpack.packb(row) for row in plain]
        found["msgpack lists"] = lambda: from_lists([msgpack.unpackb(row) for row in sent])
        found["torch.tensor(list)"] = lambda: from_lists(plain)
    return found


def measure(tokens: int, rows: int, rounds: int, *, ragged: bool, lists: bool) -> dict[str, Any]:
    """Milliseconds, GB/s and the share of the floor of every way, in turns."""
    packed, decoded = rollouts(rows, tokens, ragged)
    found = ways(packed, decoded, lists)
    spent: dict[str, list[float]] = {name: [] for name in found}
    busy: dict[str, list[float]] = {name: [] for name in found}
    kept: object = None
    for turn in range(rounds + 1):
        for name, run in found.items():
            # The batch before it is gone, as in a loop that keeps one: its memory is used again.
            kept = None
            began, on = time.perf_counter(), time.thread_time()
            kept = run()
            if turn:
                spent[name].append(time.perf_counter() - began)
                busy[name].append(time.thread_time() - on)
    del kept
    report: dict[str, Any] = {"tokens": tokens, "rows": rows, "ragged": ragged, "ways": {}}
    for name, seconds in spent.items():
        form, fields = ("packed", PACKED) if "(packed)" in name else ("padded", PADDED)
        batch: Any = collate(packed, form=form)  # type: ignore[call-overload]
        nbytes = sum(getattr(batch, field).nbytes for field in fields)
        middle = statistics.median(seconds)
        under = "floor (packed)" if form == "packed" else "floor"
        report["ways"][name] = {
            "ms": round(middle * 1e3, 3),
            "gb_per_s": round(nbytes / middle / 1e9, 3),
            "of_floor": round(statistics.median(spent[under]) / middle, 3),
            "cpu_of_floor": round(
                statistics.median(busy[under]) / statistics.median(busy[name]), 3
            ),
        }
    return report


# ---- balance ------------------------------------------------------------------------------------


def balance(ranks: int, per_rank: int, seed: int, cost: Cost, *, whole: bool) -> dict[str, float]:
    """How evenly lognormal lengths are divided, and how long the plan takes."""
    rng = np.random.default_rng(seed)
    drawn = np.clip(rng.lognormal(MU, SIGMA, ranks * per_rank), 16, LONGEST)
    lengths: list[int] = drawn.astype(int).tolist()
    groups = [at // GROUP for at in range(len(lengths))]
    began = time.perf_counter()
    plan = plan_micro(
        lengths, groups, ranks=ranks, budget_tokens=BUDGET, whole_groups=whole, cost=cost
    )
    took = time.perf_counter() - began
    in_order = [
        sum(cost.of(n) for n in lengths[rank * per_rank : (rank + 1) * per_rank])
        for rank in range(ranks)
    ]
    return {
        "imbalance": plan.imbalance,
        "in_order": max(in_order) / statistics.mean(in_order),
        "micro_batches": plan.micro_batches,
        "at_least": -(-sum(lengths) // (BUDGET * ranks)),
        "fillers": plan.fillers,
        "ms": took * 1e3,
    }


def balances(draws: int) -> list[dict[str, Any]]:
    """Medians over as many draws, of every setting."""
    rows: list[dict[str, Any]] = []
    for ranks in (8, 64):
        for per_rank in (16, 64):
            for model, cost in (("tokens", Cost()), ("attention", Cost.attention(4096))):
                for whole in (False, True):
                    drawn = [balance(ranks, per_rank, s, cost, whole=whole) for s in range(draws)]
                    middle = {
                        key: round(statistics.median(each[key] for each in drawn), 4)
                        for key in drawn[0]
                    }
                    rows.append(
                        {
                            "ranks": ranks,
                            "per_rank": per_rank,
                            "cost": model,
                            "whole_groups": whole,
                            **middle,
                        }
                    )
    return rows


# ---- the report ---------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        (
            f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}; Python "
            f"{machine['python']}, numpy {machine['packages']['numpy']}, torch {report['torch']}"
        ),
        f"medians of {report['rounds']} interleaved rounds; GB/s of output bytes",
    ]
    for each in report["collate"]:
        shape = "a quarter to all of" if each["ragged"] else "all of"
        lines += ["", f"{each['rows']} rows of {shape} {each['tokens']:,} tokens"]
        for name, way in each["ways"].items():
            lines.append(
                f"  {name:26}{way['ms']:>10.2f} ms{way['gb_per_s']:>9.2f} GB/s"
                f"{way['of_floor']:>8.3f} of the floor (cpu {way['cpu_of_floor']:.3f})"
            )
    lines += ["", "cost of the costliest rank over the mean; lognormal lengths"]
    for row in report["balance"]:
        lines.append(
            f"  {row['ranks']:>3} ranks, {row['per_rank']:>3} samples each, {row['cost']:9} "
            f"{'whole groups' if row['whole_groups'] else 'rows':12} {row['imbalance']:.3f} "
            f"(in order {row['in_order']:.3f}), {row['micro_batches']:.0f} micro-batches "
            f"(at least {row['at_least']:.0f}), {row['ms']:.1f} ms"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds")
    parser.add_argument("--draws", type=int, default=5, help="draws of lengths to divide")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192, 32_768], help="tokens of a row"
    )
    parser.add_argument("--ragged", action="store_true", help="rows of unequal length, too")
    parser.add_argument("--no-lists", action="store_true", help="leave the slow ways out")
    args = parser.parse_args(argv)
    report = {
        "machine": describe(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "collate": [
            measure(tokens, args.rows, args.rounds, ragged=ragged, lists=not args.no_lists)
            for tokens in args.tokens
            for ragged in ([False, True] if args.ragged else [False])
        ],
        "balance": balances(args.draws),
    }
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
