"""A live run is written down and trained on again without it."""

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.fleet_processes import Processes
from fixtures.rig import TOKEN, Rig, delivery_of, prompt_of
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.errors import CodecError, SchemaError
from rollfleet_common.recording import Row, Writer, read_rows
from rollfleet_common.redis import connect_sync
from rollfleet_console.record import record

SHAPE: dict[str, Any] = {
    "samples_per_version": 8,
    "group_size": 4,
    "max_staleness": 2,
    "starve_s": 30.0,
}


def recorded(url: str, run: str, path: Path) -> "subprocess.Popen[str]":
    """A recorder as an operator starts it, once its tap stands."""
    command = [sys.executable, "-m", "rollfleet_console", "record", str(path)]
    command += ["--redis-url", url, "--run", run, "--seconds", "60"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ids_of(batch: rollfleet.Batch) -> list[tuple[str, int]]:
    return [(r.header.group, r.header.index) for r in batch.rollouts]


def test_a_recording_replays_the_same_batches_without_redis(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "run.rec"
    processes.worker(redis_url, "rec")
    live: list[tuple[int, int, list[tuple[str, int]], torch.Tensor]] = []
    refused: list[str] = []

    def accept(rollouts: Any) -> bool:
        if len(refused) < 2:
            refused.append(rollouts[0].header.group)
            return False
        return True

    with rollfleet.connect(redis_url, run="rec", should_accept=accept, **SHAPE) as fleet:
        recorder = recorded(redis_url, "rec", path)
        try:
            tap = fleet.aio.keys.partition(0).tap
            with connect_sync(redis_url, role="test") as raw:
                wait_until(lambda: bool(raw.exists(tap)), "the recorder's tap stands")
            fleet.feed({"token_ids": [1, 2, 3]} for _ in range(14))
            for batch in fleet.batches(6):
                live.append((batch.number, batch.version, ids_of(batch), batch.tensors.input_ids))
                fleet.publish()
            wait_until(lambda: rows_in(path) >= 6 * 8 + 2 * 4, "everything is written")
        finally:
            recorder.terminate()
            said = recorder.communicate(timeout=20)[1]
        assert recorder.returncode == 0, said
        assert "48 trained, 8 dropped" in said
        assert fleet.books().balance == 0

    with rollfleet.replay(path) as again:
        again.feed([])
        assert len(again) == 6
        for (number, version, ids, tokens), batch in zip(live, again.batches(), strict=True):
            assert (batch.number, batch.version, ids_of(batch)) == (number, version, ids)
            assert torch.equal(batch.tensors.input_ids, tokens)
            assert batch.stats["rollfleet/samples"] == 8
            again.publish()
        assert again.version == 6
        dropped = [(r.header.group, reason) for r, reason in again.dropped]
        assert dropped == [(group, "rejected") for group in refused for _ in range(4)]


def rows_in(path: Path) -> int:
    try:
        return sum(1 for _ in read_rows(path))
    except (OSError, CodecError):
        return 0


async def test_what_is_freed_unrecorded_is_gone_at_once_and_recorded_stays_a_while(rig: Rig):
    """The tap is the only difference, and it needs no trainer that knows of it."""
    await rig.submit(prompt_of("a", 2), prompt_of("b", 2))
    claims, _ = await rig.streams.claim(rig.reader, "w", ["default"], 4, None)
    await rig.streams.deliver("w", [delivery_of(claim, nonce=claim.entry) for claim in claims])
    headers = await rig.headers()
    await rig.settle("commit:1:0", headers[:1])
    assert not await rig.client.exists(rig.part.payload(headers[0][1].payload), rig.part.tapped)
    await rig.client.set(rig.part.tap, 5000, px=5000)
    await rig.settle("drop:stale", headers[1:2])
    await rig.settle("commit:2:7", headers[2:])
    told = [fields[b"v"].decode() for _, fields in await rig.client.xrange(rig.part.tapped)]
    assert told == ["drop:stale", "commit:2:7", "commit:2:7"]
    for _, header in headers[1:]:
        assert 0 < await rig.client.pttl(rig.part.payload(header.payload)) <= 5000
    assert 0 < await rig.client.pttl(rig.part.tapped) <= 5000


async def test_a_rollout_refused_for_age_is_told_too(rig: Rig):
    await rig.submit(prompt_of("a", 1))
    claims, _ = await rig.streams.claim(rig.reader, "w", ["default"], 1, None)
    await rig.streams.advance(TOKEN, 9, 7)
    await rig.client.set(rig.part.tap, 5000, px=5000)
    await rig.streams.deliver("w", [delivery_of(claims[0], version=3)])
    ((_, fields),) = await rig.client.xrange(rig.part.tapped)
    row = Row.of(fields[b"v"].decode(), fields[b"h"], None)
    assert (row.dropped, row.header.group) == ("stale", "a")
    assert 0 < await rig.client.pttl(rig.part.payload(row.header.payload)) <= 5000


async def test_a_recorder_leaves_nothing_behind_and_says_what_it_missed(rig: Rig, tmp_path: Path):
    await rig.submit(prompt_of("a", 2))
    claims, _ = await rig.streams.claim(rig.reader, "w", ["default"], 2, None)
    await rig.streams.deliver("w", [delivery_of(claim, nonce=claim.entry) for claim in claims])
    stop = asyncio.Event()
    path = tmp_path / "one.rec"
    task = asyncio.create_task(record(rig.client, "rig", path, stopping=stop))

    async def taps() -> bool:
        return bool(await rig.client.exists(rig.part.tap))

    await wait_until_async(taps, "the tap stands")
    headers = await rig.headers()
    await rig.client.unlink(rig.part.payload(headers[0][1].payload))
    await rig.settle("commit:1:0", headers)
    stop.set()
    tally = await task
    assert (tally.trained, tally.dropped, tally.without) == (2, 0, 1)
    assert tally.bytes == path.stat().st_size
    assert not await rig.client.exists(rig.part.tap, rig.part.tapped)
    assert not await rig.client.keys("rf:{rig/0}:payload:*")
    with rollfleet.replay(path) as again:
        batch = again.next_batch()
        assert batch is not None
        assert ids_of(batch) == [("a", 1)]
        assert again.next_batch() is None


async def test_a_recording_never_overwrites_and_needs_a_run(rig: Rig, tmp_path: Path):
    taken = tmp_path / "taken"
    taken.write_bytes(b"precious")
    with pytest.raises(rollfleet.SettingsError, match="exists"):
        await record(rig.client, "rig", taken)
    assert taken.read_bytes() == b"precious"
    with pytest.raises(rollfleet.SettingsError, match="never opened"):
        await record(rig.client, "nobody", tmp_path / "x")


def written(path: Path, batches: int = 2) -> Path:
    """A recording of whole batches, made by hand."""
    from fixtures.rollouts import make_rollout  # noqa: PLC0415

    from rollfleet_common.codec import encode_header, encode_samples  # noqa: PLC0415

    with Writer(path, "hand") as writer:
        for number in range(1, batches + 1):
            for index in range(2):
                rollout = make_rollout([number], group=f"g{number}", index=index, n=2)
                packed = encode_samples(rollout.samples)
                writer.write(f"commit:{number}:{number + 1}", encode_header(rollout.header), packed)
        writer.flush()
    return path


def test_a_replay_goes_on_from_its_own_state_and_refuses_others(tmp_path: Path):
    path = written(tmp_path / "a", 3)
    with rollfleet.replay(path) as first:
        assert [batch.number for batch in first.batches(2)] == [1, 2]
        state = first.state_dict()
    with rollfleet.replay(path, state=state) as second:
        assert [batch.number for batch in second.batches()] == [3]
    with pytest.raises(rollfleet.SettingsError, match="live run"):
        rollfleet.replay(path, state={"run": "x", "version": 1})
    with pytest.raises(rollfleet.RollfleetError, match="closed"):
        second.next_batch()
    with (
        rollfleet.replay(path) as third,
        pytest.raises(rollfleet.RollfleetError, match="cannot run"),
    ):
        third.evaluate([1, 2])


def test_a_recording_that_was_cut_off_is_read_to_its_last_whole_row(tmp_path: Path):
    whole = written(tmp_path / "a").read_bytes()
    rows = len(list(read_rows(tmp_path / "a")))
    cut = tmp_path / "cut"
    for left in (len(whole) - 1, len(whole) - 40):
        cut.write_bytes(whole[:left])
        assert len(list(read_rows(cut))) == rows - 1


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", CodecError, "no recording"),
        (b"\x93hello", CodecError, "no recording"),
        (b"\xc1\xc1", CodecError, "near byte"),
        (b"\x93\xb3rollfleet recording\x63\xa1r", SchemaError, "form 99"),
        (b"\x93\xb3rollfleet recording\x01\xa1r\x93\xa3no!\xc4\x00\xc0", CodecError, "row 1"),
        (b"\x93\xb3rollfleet recording\x01\xa1r\x01", CodecError, "row 1"),
    ],
)
def test_what_is_no_recording_is_said_so(
    tmp_path: Path, content: bytes, error: type[Exception], match: str
):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(error, match=match):
        list(read_rows(path))


def test_a_replay_has_the_face_of_a_fleet():
    """A loop that runs on the one runs on the other."""
    for name in ("feed", "next_batch", "batches", "trained", "commit", "publish", "pause"):
        live = inspect.signature(getattr(rollfleet.Fleet, name)).parameters
        again = inspect.signature(getattr(rollfleet.Replay, name)).parameters
        assert list(live) == list(again), name
    for name in ("evaluate", "state_dict", "close", "__enter__", "__exit__"):
        assert hasattr(rollfleet.Replay, name)
