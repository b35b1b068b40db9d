"""At maxmemory, when the commands are needed most: what reads, steers or frees works."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.servers import MakeServer
from fixtures.staged import TOKEN, StagedRun
from typer.testing import CliRunner

from rollfleet_common.errors import BrokerUnavailableError
from rollfleet_common.redis import connect_sync, retry
from rollfleet_common.streams import Streams
from rollfleet_console import dead_letters
from rollfleet_console.cli import app
from rollfleet_console.doctor import examine
from rollfleet_console.record import record
from rollfleet_console.status.snapshot import take


@pytest.fixture
def full(make_server: MakeServer) -> Iterator[str]:
    """A run with samples in every place, on a server that has no memory left."""

    async def stage(url: str) -> None:
        run = StagedRun(url)
        await run.open()
        await run.submit("g0", 4)
        await run.submit("g1", 4)
        claims = await run.claim("w0", 3)
        await run.fail(claims[0], "w0", delay_ms=60_000)
        await run.fail(claims[1], "w0")
        await run.card("w0")
        await run.client.aclose()

    url = make_server().url
    asyncio.run(stage(url))
    with connect_sync(url, role="test") as admin:
        admin.script_flush()  # they are sent anew, and that must not be refused either
        admin.config_set("maxmemory", "1")
        yield url


def invoke(url: str, *args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*args, "--redis-url", url, "--run", "staged"])
    assert result.exit_code == code, result.output
    return result.output


def test_every_command_that_looks_or_steers_works(full: str) -> None:
    assert "8" in invoke(full, "status")
    assert '"in_flight": 1' in invoke(full, "status", "--json")
    said = invoke(full, "doctor", code=2)
    assert "could not be made" not in said
    assert "of maxmemory" in said
    server = "http://10.0.0.7:8000"
    assert "added" in invoke(full, "server", "add", server)
    assert "draining" in invoke(full, "server", "drain", server)
    assert "draining" in invoke(full, "server", "list")
    assert "serves again" in invoke(full, "server", "undrain", server)
    assert "removed" in invoke(full, "server", "remove", server)
    invoke(full, "server", "remove", server, code=2)
    assert "data" in invoke(full, "dead", "list")
    refused = invoke(full, "dead", "retry", "--all", code=2)
    assert "is not available" in refused
    assert "maxmemory" in refused
    assert "1 dead letter deleted" in invoke(full, "dead", "purge", "--all", "--yes")


async def test_a_snapshot_is_whole_and_reads_nothing_in_a_transaction(full: str) -> None:
    run = StagedRun(full)
    async with run.client:
        await run.client.config_resetstat()
        snapshot = await take(run.client, "staged")
        assert snapshot.books.balance == 0
        assert (snapshot.routes[0].waiting, snapshot.routes[0].in_flight) == (5, 1)
        assert snapshot.routes[0].delayed == 1
        assert snapshot.routes[0].oldest_waiting_s is not None
        await examine.examine(run.client, "staged", pause_s=0)
        (letter,) = await dead_letters.select(run.client, "staged")
        assert letter.prompt is not None
        assert "cmdstat_multi" not in await run.client.info("commandstats")


async def test_a_trainer_can_pause_cancel_and_settle(full: str) -> None:
    run = StagedRun(full)
    async with run.client:
        await run.board.publish(TOKEN, {"paused_until_ms": 1})
        streams = Streams(run.client, run.part())
        await streams.consume(run.client, TOKEN, 9, None)
        assert await streams.settle(TOKEN, "drop:stale", [], groups=["g1"]) == 0


async def test_a_recorder_is_told_that_redis_is_full(full: str, tmp_path: Path) -> None:
    """It sets keys, which a full Redis refuses: nothing is left behind."""
    run = StagedRun(full)
    async with run.client:
        with pytest.raises(BrokerUnavailableError, match="maxmemory"):
            await retry(
                lambda: record(run.client, "staged", tmp_path / "r"), what="record", deadline_s=0
            )
        assert not (tmp_path / "r").exists()
