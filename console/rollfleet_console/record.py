"""Writes down the rollouts that a live run settles, drops included, without slowing its trainer.

- The tap of every partition is a key with a TTL: while it stands, what the trainer frees is told on
  a capped stream and its payload stays a while. A recorder that dies leaves nothing behind.
- Taps are renewed beside the reading: one that lapsed because the reader lags would say nothing of
  what it missed.
- Nothing is taken from the run: the rollouts here were trained on or dropped already.
- What came and went faster than it could be read is counted: without a payload it stands in the
  file, and what the capped stream let go of is said in numbers.
- One recorder a run: two would read each other's rows away.
"""

import asyncio
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from rollfleet_common.board import Board
from rollfleet_common.errors import SettingsError, WireError
from rollfleet_common.keys import PartitionKeys, RunKeys, check_name
from rollfleet_common.recording import Row, Writer
from rollfleet_common.scripts import reads
from rollfleet_common.tasks import cancel_all

__all__ = ["RecordingProgress", "record", "run_recording"]

#: How long what was freed stays to be recorded; a tap stands a third of it, renewed four times.
KEEP_MS = 60_000
BLOCK_MS = 500
#: How long what was written may not be on the disk yet while there is more to read.
FLUSH_S = 1.0
#: Rows that are read at once, of each partition.
COUNT = 32


@dataclass(slots=True)
class RecordingProgress:
    """How far a recording is."""

    trained: int = 0
    dropped: int = 0
    #: Of these, rows whose payload was gone.
    without: int = 0
    #: Rollouts that were told and gone before they could be read: not in the file.
    missed: int = 0
    #: How often the taps were found closed, and nobody knows what was freed meanwhile: the recorder
    #: was frozen, or Redis was away.
    lapses: int = 0
    bytes: int = 0
    #: Whether the trainer had let go of the run when that was last looked at.
    released: bool = False
    #: Whether Redis went away after that: the run has ended, and all that was read is in the file.
    ended: bool = False


async def record(
    client: Any,
    run: str,
    path: Path,
    *,
    seconds: float | None = None,
    max_bytes: int | None = None,
    on_rows: Callable[[RecordingProgress], None] = lambda _: None,
    stopping: asyncio.Event | None = None,
) -> RecordingProgress:
    """Record the run `run` into a new file until `stopping` is set or a limit is reached.

    Args:
        client: Of the run's Redis.
        run: Which run.
        path: A file that does not exist yet.
        seconds: Longest recording; None: no limit.
        max_bytes: Largest file, give or take one rollout; None: no limit. What was told by then
            and does not fit is left out.
        on_rows: Told now and then how far it is.
        stopping: Ends the recording; what was told by then is written.

    Raises:
        SettingsError: The run was never opened, is being recorded already, or the file exists.
        redis.exceptions.RedisError: As redis-py said it; not when Redis goes away after the trainer
            let go of the run, which ends the recording.
    """
    keys = RunKeys(check_name(run, "the run"))
    found = await Board(client, keys).read()
    if found is None:
        raise SettingsError(f"run {run!r} was never opened: there is nothing to record")
    parts = [keys.partition(p) for p in range(found[1].partitions)]
    tally = RecordingProgress()
    taps = _Taps(client, keys, parts, tally)
    await taps.claim()
    try:
        try:
            writer = Writer(path, run)
        except FileExistsError:
            raise SettingsError(f"{path} exists: a recording never overwrites a file") from None
        until = None if seconds is None else time.monotonic() + seconds
        stop = stopping or asyncio.Event()

        def ended() -> bool:
            return stop.is_set() or (until is not None and time.monotonic() >= until)

        with writer:
            await taps.open()
            reading = _Reading(client, [_Told(part) for part in parts], writer, tally, max_bytes)
            try:
                await _follow(taps, reading, ended, on_rows)
            except RedisConnectionError:
                if not tally.released:
                    raise
                tally.ended = True
    finally:
        if not tally.ended:
            await asyncio.shield(taps.leave())
    return tally


async def _follow(
    taps: "_Taps",
    reading: "_Reading",
    ended: Callable[[], bool],
    on_rows: Callable[[RecordingProgress], None],
) -> None:
    """Read on until it has `ended` and all that was told is written, or the file is full."""
    holding = asyncio.create_task(taps.hold())
    closed, flush_at = False, 0.0
    try:
        while not reading.full:
            if not closed and holding.done():
                holding.result()
            if not closed and ended():
                # Closed, the taps tell no more: what is left to be read has an end.
                await cancel_all([holding])
                await taps.close()
                closed = True
            rows = await reading.read()
            if not rows or time.monotonic() >= flush_at:
                reading.writer.flush()
                on_rows(reading.tally)
                flush_at = time.monotonic() + FLUSH_S
            if not rows:
                if closed:
                    break
                reading.tally.released = await taps.released()
                await reading.wait()
    finally:
        await cancel_all([holding])
        reading.writer.flush()


class _Taps:
    """The taps of all partitions, held by one recorder."""

    def __init__(
        self, client: Any, keys: RunKeys, parts: list[PartitionKeys], tally: RecordingProgress
    ) -> None:
        self.client = client
        self.name = keys.recorder
        self.trainer = keys.trainer
        self.run = keys.run
        self.parts = parts
        self.tally = tally
        self.token = secrets.token_hex(8)

    async def claim(self) -> None:
        """Be the run's recorder.

        Raises:
            SettingsError: Another one is.
        """
        life_ms = KEEP_MS // 3
        if not await self.client.set(self.name, self.token, nx=True, px=life_ms):
            raise SettingsError(
                f"run {self.run!r} is being recorded already: two recorders would read each "
                f"other's rows away. End the other one; if it died, try again in {life_ms / 1000:g} s"
            )

    async def open(self) -> None:
        """Open them, and let go of what an earlier recorder left: it is not ours."""
        for part in self.parts:
            await self.client.unlink(part.tapped)
            await self.client.set(part.tap, KEEP_MS, px=KEEP_MS // 3)

    async def hold(self) -> None:
        """Keep them open until cancelled.

        Raises:
            SettingsError: Another recorder has come while we were away.
        """
        while True:
            await asyncio.sleep(KEEP_MS / 12_000)
            holder = await self.client.get(self.name)
            if holder is None:
                self.tally.lapses += 1
                await self.claim()
            elif holder != self.token.encode():
                raise SettingsError(
                    f"another recorder of run {self.run!r} has come while this one was frozen or "
                    "Redis was away"
                )
            await self.client.set(self.name, self.token, px=KEEP_MS // 3)
            for part in self.parts:
                await self.client.set(part.tap, KEEP_MS, px=KEEP_MS // 3)

    async def released(self) -> bool:
        """Whether no trainer holds the run."""
        return not await self.client.exists(self.trainer)

    async def close(self) -> None:
        """Nothing more is told; what was, is still there."""
        for part in self.parts:
            await self.client.unlink(part.tap)

    async def leave(self) -> None:
        """Leave nothing behind, unless it is another's by now."""
        holder = await self.client.get(self.name)
        if holder == self.token.encode():
            for part in self.parts:
                await self.client.unlink(part.tap, part.tapped)
            await self.client.unlink(self.name)


@dataclass(slots=True)
class _Told:
    """The stream of one partition, and how much of it was read."""

    keys: PartitionKeys
    last: str = "0-0"
    #: Entries that were ever added to the stream that is there now, by its own count, and read.
    added: int = 0
    read: int = 0
    #: Entries that left it unread; of streams that are gone, and of this one.
    lost: int = 0
    cut: int = 0

    def look(self, added: int, length: int) -> None:
        """See that nothing has left it but what was read."""
        if added < self.added:  # it ran out, or Redis lost it, and another began
            self.lost += self.added - self.read
            self.read = 0
        self.added = added
        self.cut = max(added - length - self.read, 0)


class _Reading:
    """Reads what the taps tell, and writes it down."""

    def __init__(
        self,
        client: Any,
        told: list[_Told],
        writer: Writer,
        tally: RecordingProgress,
        max_bytes: int | None,
    ) -> None:
        self.client = client
        self.told = told
        self.writer = writer
        self.tally = tally
        self.max_bytes = max_bytes

    @property
    def full(self) -> bool:
        """Whether no more may be written."""
        return self.max_bytes is not None and self.writer.bytes >= self.max_bytes

    async def read(self) -> int:
        """Write some of what was told, of each partition; returns how many rollouts were read."""
        rows = 0
        for told in self.told:
            entries = await self._entries(told)
            if entries and not self.full:
                await self._write(told, entries)
                rows += len(entries)
        self.tally.missed = sum(told.lost + told.cut for told in self.told)
        return rows

    async def wait(self) -> None:
        """For the next rollout; not for long."""
        streams = {told.keys.tapped: told.last for told in self.told}
        await self.client.xread(streams, count=1, block=BLOCK_MS)

    async def _entries(self, told: _Told) -> list[Any]:
        keys = told.keys
        found = await reads.told(self.client, keys, after=told.last, at_most=COUNT)
        told.look(found.added, found.length)
        return found.entries

    async def _write(self, told: _Told, entries: list[Any]) -> None:
        keys = told.keys
        names: list[str | None] = []
        drops: list[bool] = []
        for _, fields in entries:
            name, dropped = None, False
            # A header of another release is for whoever can read it.
            with suppress(WireError, KeyError, ValueError):
                row = Row.of(fields[b"v"].decode(), fields[b"h"], None)
                name, dropped = keys.payload(row.header.payload), bool(row.dropped)
            names.append(name)
            drops.append(dropped)
        wanted = [name for name in names if name is not None]
        payloads = dict(zip(wanted, await self.client.mget(wanted) if wanted else [], strict=True))
        for (_, fields), name, dropped in zip(entries, names, drops, strict=True):
            if name is None or self.full:
                continue
            self.writer.write(fields[b"v"].decode(), fields[b"h"], payloads[name])
            self.tally.dropped += dropped
            self.tally.trained += not dropped
            self.tally.without += payloads[name] is None
        self.tally.bytes = self.writer.bytes
        told.read += len(entries)
        told.last = entries[-1][0].decode()
        if wanted:
            await self.client.unlink(*wanted)
        await self.client.xdel(keys.tapped, *(entry for entry, _ in entries))


async def run_recording(
    client: Any, run: str, path: Path, seconds: float | None, max_bytes: int
) -> RecordingProgress:
    """Record until Ctrl-C or a limit, and say how it goes on standard error."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)

    def say(tally: RecordingProgress, end: str = "") -> None:
        gone = f", {tally.without:,} without payload" if tally.without else ""
        gone += f", {tally.missed:,} missed" if tally.missed else ""
        gone += f", taps found closed {tally.lapses:,} times" if tally.lapses else ""
        sys.stderr.write(
            f"\r{tally.trained:,} trained, {tally.dropped:,} dropped{gone}, "
            f"{tally.bytes / 2**20:,.1f} MiB{end}"
        )
        sys.stderr.flush()

    tally = await record(
        client, run, path, seconds=seconds, max_bytes=max_bytes, on_rows=say, stopping=stop
    )
    say(tally, f" in {path}\n")
    if tally.ended:
        sys.stderr.write("the run has ended: its trainer let go of it, and its Redis is gone\n")
    return tally
