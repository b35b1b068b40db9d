"""A recorder that lags: it misses nothing unsaid, ends when it is told to, and is the only one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fixtures.rig import Rig, prompt_of
from fixtures.servers import MakeServer
from redis.exceptions import ConnectionError as RedisConnectionError
from support import wait_until_async

from rollfleet_common.errors import SettingsError
from rollfleet_common.recording import read_rows
from rollfleet_console import record as recorder
from rollfleet_console.record import RecordingProgress, record


@dataclass
class Recording:
    """A recorder at work."""

    task: "asyncio.Task[RecordingProgress]"
    stop: asyncio.Event
    path: Path

    async def end(self) -> RecordingProgress:
        self.stop.set()
        return await asyncio.wait_for(self.task, 20)


def on_payloads(client: Any, then: Callable[[], Awaitable[None]]) -> None:
    """Have `then` happen while a recorder has read some rows and waits for their payloads."""
    mget = client.mget

    async def slow(names: Any) -> Any:
        await then()
        return await mget(names)

    client.mget = slow


@asynccontextmanager
async def recording(rig: Rig, path: Path, **limits: Any) -> AsyncIterator[Recording]:
    stop = asyncio.Event()
    task = asyncio.create_task(
        record(rig.client, "rig", path, stopping=stop, **limits), name="recorder"
    )
    try:
        await wait_until_async(lambda: rig.client.exists(rig.part.tap), "the tap stands")
        yield Recording(task, stop, path)
    finally:
        task.cancel()
        await asyncio.wait([task])


def rows_in(path: Path) -> int:
    return sum(1 for _ in read_rows(path))


async def test_the_tap_stands_while_the_recorder_is_at_one_read(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "KEEP_MS", 1200)
    renewed = 0

    async def stuck() -> None:
        nonlocal renewed
        await rig.client.set(rig.part.tap, 1, px=60_000)

        async def again() -> bool:
            return bool(await rig.client.get(rig.part.tap) == b"1200")

        await wait_until_async(again, "the tap is renewed")
        renewed += 1

    headers = await rig.delivered(prompt_of("a", 40))
    on_payloads(rig.client, stuck)
    async with recording(rig, tmp_path / "x") as one:
        await rig.settle("commit:1:0", headers)
        await wait_until_async(lambda: renewed == 2, "both reads have waited")
        tally = await one.end()
    assert (tally.trained, tally.missed, rows_in(one.path)) == (40, 0, 40)


async def test_a_run_that_frees_as_fast_as_it_is_read_does_not_keep_a_recorder(
    rig: Rig, tmp_path: Path
) -> None:
    headers = await rig.delivered(prompt_of("a", 200))

    async def free() -> None:
        if headers:
            await rig.settle("commit:1:0", [headers.pop()])

    on_payloads(rig.client, free)
    async with recording(rig, tmp_path / "x") as one:
        await free()
        tally = await one.end()
    assert 1 <= tally.trained < 200
    assert rows_in(one.path) == tally.trained
    assert not await rig.client.exists(rig.part.tap, rig.part.tapped, rig.keys.recorder)


async def test_no_file_is_larger_than_it_may_be_but_for_one_rollout(
    rig: Rig, tmp_path: Path
) -> None:
    headers = await rig.delivered(prompt_of("a", 100))
    async with recording(rig, tmp_path / "x", max_bytes=2000) as one:
        await rig.settle("commit:1:0", headers)
        tally = await asyncio.wait_for(one.task, 20)
    size = one.path.stat().st_size
    assert tally.bytes == size
    assert tally.trained == rows_in(one.path)
    assert 2000 <= size < 2000 + 2 * size / tally.trained


@pytest.mark.parametrize(("lost", "missed"), [(False, 8 + 7), (True, 8)])
async def test_rows_that_the_stream_let_go_of_are_counted(
    rig: Rig, tmp_path: Path, lost: bool, missed: int
) -> None:
    """Of a stream that is lost as a whole, those that were known of."""
    first = await rig.delivered(prompt_of("a", 40))
    second = await rig.delivered(prompt_of("b", 10))
    third = await rig.delivered(prompt_of("c", 2))
    told = asyncio.Event()

    async def cut() -> None:
        if not told.is_set():
            await rig.settle("commit:2:0", second)
            if lost:
                await rig.client.unlink(rig.part.tapped)
            else:
                await rig.client.xtrim(rig.part.tapped, maxlen=3, approximate=False)
            told.set()

    on_payloads(rig.client, cut)
    async with recording(rig, tmp_path / "x") as one:
        await rig.settle("commit:1:0", first)
        await told.wait()
        await rig.settle("commit:3:0", third)
        tally = await one.end()
    kept = 32 + 2 + (0 if lost else 3)
    assert (tally.trained, tally.missed, rows_in(one.path)) == (kept, missed, kept)


async def test_a_second_recorder_is_refused_and_takes_nothing(rig: Rig, tmp_path: Path) -> None:
    headers = await rig.delivered(prompt_of("a", 2))
    async with recording(rig, tmp_path / "one") as one:
        with pytest.raises(SettingsError, match="is being recorded already"):
            await record(rig.client, "rig", tmp_path / "two")
        assert not (tmp_path / "two").exists()
        await rig.settle("commit:1:0", headers)
        assert (await one.end()).trained == 2
    async with recording(rig, tmp_path / "two") as two:
        assert (await two.end()).trained == 0


async def test_a_recorder_that_was_away_says_so_and_goes_on(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "KEEP_MS", 1200)
    headers = await rig.delivered(prompt_of("a", 4))
    async with recording(rig, tmp_path / "x") as one:
        await rig.client.unlink(rig.part.tap, rig.keys.recorder)
        await rig.settle("commit:1:0", headers[:2])
        await wait_until_async(lambda: rig.client.exists(rig.part.tap), "the tap stands again")
        await rig.settle("commit:2:0", headers[2:])
        tally = await one.end()
    assert (tally.trained, tally.lapses) == (2, 1)


async def test_a_recorder_that_another_has_followed_leaves_its_taps_alone(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "KEEP_MS", 1200)
    async with recording(rig, tmp_path / "x") as one:
        await rig.client.set(rig.keys.recorder, "another's", px=60_000)
        await rig.client.set(rig.part.tap, 1200, px=60_000)
        with pytest.raises(SettingsError, match="another recorder of run 'rig' has come"):
            await asyncio.wait_for(one.task, 20)
    assert await rig.client.get(rig.keys.recorder) == b"another's"
    assert await rig.client.exists(rig.part.tap)


@pytest.mark.parametrize("released", [True, False])
async def test_a_run_whose_redis_goes_away_has_ended_if_its_trainer_let_go(
    make_server: MakeServer, tmp_path: Path, released: bool
) -> None:
    server = make_server()
    rig = Rig(server.url)
    await rig.open()
    exists, seen = rig.client.exists, []

    async def noted(*names: str) -> int:
        found: int = await exists(*names)
        if names == (rig.keys.trainer,):
            seen.append(found)
        return found

    rig.client.exists = noted
    task = asyncio.create_task(record(rig.client, "rig", tmp_path / "x"))
    await wait_until_async(lambda: seen[-1:] == [1], "the recorder has seen the trainer")
    if released:
        await rig.client.delete(rig.keys.trainer)
        await wait_until_async(lambda: seen[-1:] == [0], "the recorder has seen it leave")
    server.stop()
    if released:
        tally = await task
        assert (tally.ended, tally.trained, rows_in(tmp_path / "x")) == (True, 0, 0)
    else:
        with pytest.raises(RedisConnectionError):
            await task
    await rig.client.aclose()
    await rig.reader.aclose()
