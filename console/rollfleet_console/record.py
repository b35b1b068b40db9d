"""Writes down the rollouts that a live run settles, drops included, without slowing its trainer.

- The tap of every partition is a key with a TTL: while it stands, what the trainer frees is told on
  a capped stream and its payload stays a while. A recorder that dies leaves nothing behind.
- Nothing is taken from the run: the rollouts here were trained on or dropped already.
- What came and went faster than it could be read is counted, and stands in the file without payload.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollfleet_common.board import Board
from rollfleet_common.errors import SettingsError, WireError
from rollfleet_common.keys import PartitionKeys, RunKeys, check_name
from rollfleet_common.recording import Row, Writer

__all__ = ["Tally", "record", "run_recording"]

#: How long what was freed stays to be recorded; the tap itself is renewed three times as often.
KEEP_MS = 60_000
BLOCK_MS = 500
COUNT = 32


@dataclass(slots=True)
class Tally:
    """How far a recording is."""

    trained: int = 0
    dropped: int = 0
    #: Of these, rows whose payload was gone.
    without: int = 0
    bytes: int = 0


async def record(
    client: Any,
    run: str,
    path: Path,
    *,
    seconds: float | None = None,
    max_bytes: int | None = None,
    on_rows: Callable[[Tally], None] = lambda _: None,
    stopping: asyncio.Event | None = None,
) -> Tally:
    """Record the run `run` into a new file until `stopping` is set or a limit is reached.

    Args:
        client: Of the run's Redis.
        run: Which run.
        path: A file that does not exist yet.
        seconds: Longest recording; None: no limit.
        max_bytes: Largest file, give or take one rollout; None: no limit.
        on_rows: Told now and then how far it is.
        stopping: Ends the recording; what was told by then is written.

    Raises:
        SettingsError: The run was never opened, or the file exists.
        redis.exceptions.RedisError: As redis-py said it.
    """
    keys = RunKeys(check_name(run, "the run"))
    found = await Board(client, keys).read()
    if found is None:
        raise SettingsError(f"run {run!r} was never opened: there is nothing to record")
    partitions = [keys.partition(p) for p in range(found[1].partitions)]
    stop = stopping or asyncio.Event()
    tally = Tally()
    try:
        writer = Writer(path, run)
    except FileExistsError:
        raise SettingsError(f"{path} exists: a recording never overwrites a file") from None
    with writer:
        last = dict.fromkeys((k.tapped for k in partitions), "$")
        last.update([(k.tapped, await _newest(client, k)) for k in partitions])
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            while True:
                await _open(client, partitions)
                ending = stop.is_set() or (deadline is not None and time.monotonic() >= deadline)
                if not await _read(client, partitions, last, writer, tally) and ending:
                    break
                writer.flush()
                on_rows(tally)
                if max_bytes is not None and writer.bytes >= max_bytes:
                    break
        finally:
            await asyncio.shield(_close(client, partitions))
            writer.flush()
    return tally


async def _newest(client: Any, keys: PartitionKeys) -> str:
    """Where a partition's tap stands: what an earlier recorder left is not ours."""
    found = await client.xrevrange(keys.tapped, count=1)
    return str(found[0][0].decode()) if found else "0-0"


async def _open(client: Any, partitions: list[PartitionKeys]) -> None:
    for keys in partitions:
        await client.set(keys.tap, KEEP_MS, px=KEEP_MS // 3)


async def _close(client: Any, partitions: list[PartitionKeys]) -> None:
    for keys in partitions:
        await client.unlink(keys.tap, keys.tapped)


async def _read(
    client: Any,
    partitions: list[PartitionKeys],
    last: dict[str, str],
    writer: Writer,
    tally: Tally,
) -> int:
    """Write what the taps told since `last`; returns how many rollouts."""
    rows = 0
    for keys in partitions:
        told = await client.xrange(keys.tapped, min=f"({last[keys.tapped]}", count=COUNT)
        while told:
            await _write(client, keys, told, writer, tally)
            rows += len(told)
            last[keys.tapped] = told[-1][0].decode()
            if len(told) < COUNT:
                break
            told = await client.xrange(keys.tapped, min=f"({last[keys.tapped]}", count=COUNT)
    if not rows:
        await client.xread(last, count=1, block=BLOCK_MS)
    return rows


async def _write(
    client: Any, keys: PartitionKeys, told: list[Any], writer: Writer, tally: Tally
) -> None:
    names: list[str | None] = []
    for _, fields in told:
        try:
            row = Row.of(fields[b"v"].decode(), fields[b"h"], None)
            names.append(keys.payload(row.header.payload))
            if row.dropped:
                tally.dropped += 1
            else:
                tally.trained += 1
        except (WireError, KeyError, ValueError):
            names.append(None)  # a header of another release: it is for whoever can read it
    wanted = [name for name in names if name is not None]
    payloads = dict(zip(wanted, await client.mget(wanted) if wanted else [], strict=True))
    for (_, fields), name in zip(told, names, strict=True):
        if name is None:
            continue
        writer.write(fields[b"v"].decode(), fields[b"h"], payloads[name])
        tally.without += payloads[name] is None
    tally.bytes = writer.bytes
    if wanted:
        await client.unlink(*wanted)
    await client.xdel(keys.tapped, *(entry for entry, _ in told))


async def run_recording(
    client: Any, run: str, path: Path, seconds: float | None, max_bytes: int
) -> Tally:
    """Record until Ctrl-C or a limit, and say how it goes on standard error."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)

    def say(tally: Tally, end: str = "") -> None:
        gone = f", {tally.without:,} without payload" if tally.without else ""
        sys.stderr.write(
            f"\r{tally.trained:,} trained, {tally.dropped:,} dropped{gone}, "
            f"{tally.bytes / 2**20:,.1f} MiB{end}"
        )
        sys.stderr.flush()

    tally = await record(
        client, run, path, seconds=seconds, max_bytes=max_bytes, on_rows=say, stopping=stop
    )
    say(tally, f" in {path}\n")
    return tally
