"""The doctor: a healthy run is clean, and every ill that is planted by hand is found."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from fixtures.fleet_processes import Processes
from fixtures.rig import delivery_of
from fixtures.servers import MakeServer
from fixtures.staged import TOKEN, StagedRun
from redis.exceptions import NoPermissionError
from rich.console import Console
from typer.testing import CliRunner

import rollfleet
from rollfleet.records import Plan
from rollfleet_common.keys import LAST_ID, PartitionKeys
from rollfleet_common.messages import Kind
from rollfleet_common.redis import connect
from rollfleet_common.streams import Streams
from rollfleet_console.cli import app
from rollfleet_console.doctor import consistency, redis_server, workers
from rollfleet_console.doctor import examine as doctor
from rollfleet_console.doctor.examine import Report, Severity, examine, render

OK, INFO, WARNING, ERROR = Severity
P = "rf:{staged/0}:"


async def stage(run: StagedRun) -> None:
    """Samples in every place: waiting, in flight, delayed, ready, handed out, trained."""
    await run.open()
    for name in ("g0", "g1", "g2"):
        await run.submit(name, 4)
    claims = await run.claim("w0", 9)
    streams = Streams(run.client, run.part())
    await run.fail(claims[0], "w0", delay_ms=60_000)
    await streams.deliver("w0", [delivery_of(c, version=7) for c in claims[4:8]])
    arrivals = await streams.consume(run.client, TOKEN, 100, None)
    rows = [(entry, h.kind, h.payload) for entry, h in arrivals.headers]
    await streams.settle(TOKEN, "train", rows[:2])
    plan = Plan(1, "trained", tuple((0, *row) for row in rows), ((0, "g1"),), ())
    await run.board.plan(TOKEN, 1, plan.dumps())
    await run.card("w0")


async def look(run: StagedRun, **options: Any) -> Report:
    return await examine(run.client, run.run, **{"lease_s": 30, "pause_s": 0.0} | options)


def told(report: Report, *ignored: str) -> list[str]:
    return [
        f"{f.check}: {f.what}"
        for f in report.findings
        if f.severity > OK and f.check not in ("durability", "redis-py", *ignored)
    ]


# ---- the healthy -------------------------------------------------------------------------------


def test_a_run_of_real_processes_is_clean(
    make_server: MakeServer, processes: Processes, tmp_path: Path
) -> None:
    """While it works at full speed: every state that a reading can meet is met."""
    url = make_server(tmp_path / "redis").url
    processes.worker(url, "well", "Slow")
    shape: dict[str, Any] = {"samples_per_version": 16, "group_size": 4, "starve_s": 30.0}
    args = ["doctor", "--redis-url", url, "--run", "well", "--lease", "2s", "--json"]
    seen: list[dict[str, Any]] = []
    with rollfleet.connect(url, run="well", max_staleness=4, partitions=2, **shape) as fleet:
        fleet.feed({"token_ids": [1], "answer": 1.0} for _ in range(400))
        for step, batch in enumerate(fleet.batches(commit="checkpoint")):
            assert batch.rollouts
            fleet.publish()
            if step % 8 == 7:
                fleet.commit()
            if step in (5, 15):
                result = CliRunner().invoke(app, args)
                assert result.exit_code == 0, result.output
                # The trainer in this process logs to the same stream.
                seen.append(json.loads(result.output[result.output.index("{\n") :]))
            if step >= 20:
                break
    for tree in seen:
        bad = [f for f in tree["findings"] if f["severity"] not in ("ok", "info")]
        assert bad == []
        assert tree["severity"] in ("ok", "info")


async def test_every_place_is_told_apart(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        report = await look(run)
        assert told(report) == []
        said = {f.check: f.what for f in report.findings}
        assert said["books"] == "12 samples submitted, and every one accounted for"
        assert said["groups"] == "3 open, and every member where its record says"
        assert said["orphans"] == "4 payloads, and each has its rollout"
        assert said["plans"] == "1 batches handed out and not committed, all whole"
        assert said["leases"] == "4 held, none overdue"
        assert said["workers"] == "1 at work, 64 slots"
        await run.claim("w0", 9)
        await run.add_dead_letter("g3")
        report = await look(run)
        newest = "data: workflow math.Sort: KeyError: 'answer' (worker w0)"
        assert told(report) == [f"letters: dead letters: 1 data; the newest of them: {newest}"]
        assert report.exit_code == 1


async def test_it_changes_nothing(redis_url: str) -> None:
    async def everything(run: StagedRun) -> dict[bytes, bytes]:
        return {key: await run.client.dump(key) async for key in run.client.scan_iter(count=1000)}

    async with StagedRun(redis_url, partitions=2) as run:
        await stage(run)
        before = await everything(run)
        await run.client.config_resetstat()
        await look(run)
        assert await everything(run) == before
        stats = await run.client.info("commandstats")
        used = {name.removeprefix("cmdstat_").partition("|")[0] for name in stats}
        assert not used & {"keys", "hgetall_all", "flushall", "set", "hset", "xadd", "smembers_all"}


async def test_a_run_that_nobody_opened(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        report = await look(run)
        assert told(report) == ["trainer: no trainer has ever opened run 'staged'"]


# ---- the ill -----------------------------------------------------------------------------------

Plant = Callable[[StagedRun, Any, PartitionKeys], Awaitable[Any]]


async def member(c: Any, k: PartitionKeys, state: str) -> tuple[str, str, str]:
    """The group, index and entry of some member in a state."""
    for group in ("g0", "g1", "g2"):
        for index, where in sorted((await c.hgetall(k.group(group))).items()):
            if index.isdigit() and where.decode().startswith(state):
                return group, index.decode(), where.decode()[1:]
    raise AssertionError(state)


async def torn(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    detail = {"kind": "data", "detail": "the reward function raised", "worker": "w0"}
    await c.xadd(k.dead, {"why": "data", "e": json.dumps(detail)})
    await c.hincrby(k.ledger, "dropped:torn", 3)


async def lost_prompt(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    _, _, entry = await member(c, k, "p")
    await c.xack(k.prompts("default"), "workers", entry)
    await c.xdel(k.prompts("default"), entry)


async def lost_header(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    _, _, entry = await member(c, k, "r")
    await c.xdel(k.rollouts, entry)


async def lost_tombstone(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await c.hset(k.group("g2"), "3", "x")


async def over(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await c.hset(
        k.group("gone"),
        mapping={"n": 2, "kind": "train", "route": "default", "deadline": 0, 0: "x", 1: "x"},
    )


async def silent(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await asyncio.sleep(0.3)  # with a lease of 0.2 s


async def overdue_lease(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    rows = await c.xpending_range(k.prompts("default"), "workers", "-", "+", 1)
    await c.xclaim(
        k.prompts("default"), "workers", "w0", 0, [rows[0]["message_id"]], idle=90_000, justid=True
    )


async def overdue_prompt(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await c.zadd(k.delayed("default"), {"g0:0": time.time() * 1000 - 60_000})


async def unread(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await c.xgroup_setid(k.rollouts, "trainer", "0")
    await c.xadd(k.tombstones, {"g": "g2", "i": 0}, id="1755000000000-0")


async def behind(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await run.card("w0", seen_s=300)


async def not_ours(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    await c.xadd(k.dead, {"why": "garbage", "e": "what is this", "from": k.rollouts})


async def plan_without_entries(run: StagedRun, c: Any, k: PartitionKeys) -> None:
    plan = Plan(9, "handed", ((0, "1-1", Kind.TRAIN, "1-1:n"),), ((0, "g9"),), ())
    await c.hset(run.keys.batches, "9", plan.dumps())


ILLS: list[tuple[str, Plant, Severity, str, str]] = [
    (
        "a prompt is deleted",
        lost_prompt,
        ERROR,
        "groups",
        "1 member(s) of groups are said to be on",
    ),
    ("... and so from the books", lost_prompt, ERROR, "books", "1 partition(s) whose books do not"),
    (
        "a busy worker's consumer is deleted",
        lambda _, c, k: c.xgroup_delconsumer(k.prompts("default"), "workers", "w0"),
        ERROR,
        "groups",
        "4 prompt(s) were delivered to a worker that holds no lease",
    ),
    (
        "one bad sample tears every group",
        torn,
        WARNING,
        "letters",
        "the newest of them: data: the reward function raised",
    ),
    (
        "every server is ahead of the trainer",
        lambda run, _, __: run.card(
            "w0", servers=[{"name": "s", "state": "serving", "version": 9}]
        ),
        WARNING,
        "servers",
        "serve version 9, the trainer is at",
    ),
    ("a header is deleted", lost_header, ERROR, "groups", "said to be delivered, but their header"),
    ("... which a plan names", lost_header, ERROR, "plans", "1 batch(es) that were handed out"),
    (
        "the ledger is changed",
        lambda _, c, k: c.hincrby(k.ledger, "committed", 3),
        ERROR,
        "books",
        "do not balance",
    ),
    (
        "a due time is deleted",
        lambda _, c, k: c.delete(k.delayed("default")),
        ERROR,
        "orphans",
        "1 parked prompt(s) that no due time",
    ),
    (
        "a parked prompt is deleted",
        lambda _, c, k: c.delete(k.parked("default")),
        ERROR,
        "orphans",
        "1 due time(s) of prompts whose content",
    ),
    (
        "... and so its group waits",
        lambda _, c, k: c.delete(k.parked("default")),
        ERROR,
        "groups",
        "said to wait for another attempt",
    ),
    ("no tombstone", lost_tombstone, ERROR, "groups", "closed without a rollout, and no tombstone"),
    ("a group is over", over, WARNING, "groups", "1 group(s) are over"),
    (
        "a record is deleted",
        lambda _, c, k: c.delete(k.group("g1")),
        WARNING,
        "groups",
        "have rollouts or tombstones, but no record",
    ),
    (
        "a record is nonsense",
        lambda _, c, k: c.hset(k.group("odd"), "n", "many"),
        ERROR,
        "groups",
        "1 group record(s) cannot be read",
    ),
    (
        "a state is nonsense",
        lambda _, c, k: c.hset(k.group("g1"), "0", "?"),
        ERROR,
        "groups",
        "1 group record(s) cannot be read",
    ),
    (
        "a payload that nobody names",
        lambda _, c, k: c.set(k.payload("1-1:n"), b"x"),
        WARNING,
        "orphans",
        "1 payload(s) that no header names",
    ),
    (
        "a payload is evicted",
        lambda _, c, k: _first(c, f"{k.prefix}payload:*"),
        ERROR,
        "orphans",
        "1 rollout(s) whose payload is gone",
    ),
    (
        "a header is garbage",
        lambda _, c, k: c.xadd(k.rollouts, {"h": b"\xff"}),
        WARNING,
        "orphans",
        "1 rollout header(s) cannot be read",
    ),
    (
        "trained without an entry",
        lambda _, c, k: c.sadd(k.trained, "1-1"),
        WARNING,
        "orphans",
        "1 rollout(s) count as trained",
    ),
    ("a plan lacks entries", plan_without_entries, ERROR, "plans", "1 batch(es) that were handed"),
    (
        "a plan is nonsense",
        lambda run, c, _: c.hset(run.keys.batches, "9", b"\xc1"),
        ERROR,
        "plans",
        "1 plan(s) of batches cannot be read",
    ),
    (
        "another trainer's fence",
        lambda _, c, k: c.hset(k.fence, "token", "somebody"),
        ERROR,
        "trainer",
        "obey another trainer",
    ),
    (
        "the trainer is gone",
        lambda run, c, _: c.delete(run.keys.trainer),
        WARNING,
        "trainer",
        "12 samples are not settled, of which 4 are done",
    ),
    ("a worker is silent", silent, WARNING, "workers", "1 worker(s) hold 4 leases and have been"),
    (
        "a card is old",
        lambda run, _c, _k: run.card("w9", seen_s=300),
        WARNING,
        "workers",
        "1 worker(s) have not shown themselves for 5 min or more",
    ),
    ("a clock is behind", behind, WARNING, "workers", "their clocks are behind"),
    (
        "a clock is ahead",
        lambda run, _c, _k: run.card("w0", seen_s=-60),
        WARNING,
        "workers",
        "1 worker(s) are up to 60 s ahead of Redis",
    ),
    (
        "a card is nonsense",
        lambda run, c, _: c.hset(run.keys.workers, "w9", "{"),
        WARNING,
        "workers",
        "1 worker card(s) cannot be read",
    ),
    (
        "a worker's server is dead",
        lambda run, _c, _k: run.card("w0", state="no-server"),
        WARNING,
        "workers",
        "1 worker(s) have no inference server that answers",
    ),
    (
        "two releases",
        lambda run, _c, _k: run.card("w1", version="0.2.0"),
        INFO,
        "workers",
        "workers of several releases: 1 of 0.1.0, 1 of 0.2.0",
    ),
    ("a lease is overdue", overdue_lease, WARNING, "leases", "1 lease(s) were not renewed for up"),
    (
        "no worker",
        lambda run, c, _: c.delete(run.keys.workers),
        WARNING,
        "routes",
        "no live worker serves route 'default': 8 prompts wait",
    ),
    ("a delayed prompt is due", overdue_prompt, WARNING, "routes", "due for its next attempt"),
    ("nobody reads tombstones", unread, WARNING, "intake", "tombstones wait to be read"),
    (
        "the trainer's group is gone",
        lambda _, c, k: c.xgroup_destroy(k.rollouts, "trainer"),
        ERROR,
        "intake",
        "the trainer's consumer group is gone",
    ),
    ("garbage", not_ours, WARNING, "letters", "dead letters: 1 garbage"),
]


async def _first(c: Any, pattern: str) -> None:
    async for key in c.scan_iter(pattern, count=1000):
        await c.delete(key)
        return


@pytest.mark.parametrize(
    ("plant", "severity", "check", "said"),
    [pytest.param(*ill[1:], id=ill[0]) for ill in ILLS],
)
async def test_every_ill_is_found(
    redis_url: str, plant: Plant, severity: Severity, check: str, said: str
) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        await plant(run, run.client, run.part())
        report = await look(run, lease_s=0.2 if plant is silent else 30)
        found = [f for f in report.of(check) if said in f.what]
        assert found, told(report)
        assert found[0].severity is severity
        assert found[0].fix
        assert report.exit_code == max(0, report.worst - 1)
        assert report.worst >= severity


def test_every_ill_that_it_knows_was_planted() -> None:
    planted = {ill[3] + ill[4] for ill in ILLS}
    for severity, check, what, fix in consistency.DIAGNOSES.values():
        assert severity > INFO
        assert fix
        rest = what.replace("{n} ", "")
        assert any(
            p.startswith(check) and _overlap(p.removeprefix(check), rest) for p in planted
        ), what


def _overlap(said: str, what: str) -> bool:
    words = said.split(" ", 1)[1] if said[0].isdigit() else said
    return words in what


async def test_what_two_readings_do_not_agree_on_is_no_finding(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        await run.client.sadd(run.part().trained, "1-1")
        reading = consistency.read

        async def moves(client: Any, *args: Any) -> Any:
            seen = await reading(client, *args)
            await run.client.srem(run.part().trained, "1-1")
            await run.client.sadd(run.part().trained, "2-2")
            return seen

        monkeypatch.setattr(consistency, "read", moves)
        report = await look(run)
        assert [f for f in report.of("orphans") if "1-1" in f.where or "2-2" in f.where] == []


async def test_what_is_too_large_is_told_and_not_guessed_at(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consistency, "SAMPLE", 2)
    monkeypatch.setattr(consistency, "PAGE", 2)
    monkeypatch.setattr(consistency, "ENTRIES", 2)
    async with StagedRun(redis_url) as run:
        await stage(run)
        report = await look(run)
        assert [f.severity for f in report.of("sample")] == [INFO]
        assert f"{P}rollouts" in report.of("sample")[0].where
        said = {f.check: f.what for f in report.findings}
        assert said["groups"] == "of a sample, 2 open, and every member where its record says"
        assert report.exit_code <= 1


async def test_the_work_does_not_grow_with_the_backlog(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands are bounded, and so is what the server sends."""
    for name, most in (("SAMPLE", 8), ("MEMBERS", 16), ("PAGE", 4), ("ENTRIES", 8), ("PAGES", 3)):
        monkeypatch.setattr(consistency, name, most)
    monkeypatch.setattr(consistency, "KEYS_AT_ONCE", 10)
    monkeypatch.setattr(workers, "LETTERS", 8)
    monkeypatch.setattr(workers, "PAGE", 4)

    async def cost(run: StagedRun) -> tuple[int, int]:
        before = await run.client.info("stats")
        await look(run)
        after = await run.client.info("stats")
        names = ("total_commands_processed", "total_net_output_bytes")
        return tuple(int(after[n]) - int(before[n]) for n in names)  # type: ignore[return-value]

    async def grow(run: StagedRun, first: int, last: int) -> None:
        for number in range(first, last):
            await run.submit(f"more{number}", 2)
            await run.client.set(run.part().payload(f"{number}-1:n"), b"x")
            await run.client.xadd(run.part().dead, {"why": "data", "d": b"x" * 500})
            await run.client.xadd(run.part().rollouts, {"h": b"\xc1"})
            await run.client.sadd(run.part().trained, f"{number}-1")
            await run.client.zadd(run.part().delayed("default"), {f"more{number}:9": 1})

    async with StagedRun(redis_url) as run:
        await stage(run)
        await grow(run, 0, 40)
        commands, sent = await cost(run)
        await grow(run, 40, 400)
        more_commands, more_sent = await cost(run)
        assert more_commands <= commands * 1.2
        assert more_sent <= sent * 1.3


async def test_a_stream_whose_ids_ran_away_is_named_and_mended(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        k, c = run.part(), run.client
        before = await c.xpending_range(k.prompts("default"), "workers", "-", "+", 99)
        await c.xadd(k.prompts("default"), {"x": "y"}, id=LAST_ID)
        await c.xadd(k.tombstones, {"x": "y"}, id=LAST_ID)
        await c.xadd(k.dead, {"x": "y"}, id="9000000000000-1")
        await run.claim("w0", 99)
        await c.xreadgroup("trainer", "t", {k.tombstones: ">"})
        report = await look(run)
        assert not any("could not be made" in finding.what for finding in report.findings)
        found = {f.where: (f.severity, f.fix) for f in report.of("streams")}
        assert found[k.prompts("default")][0] == found[k.tombstones][0] == ERROR
        assert "rollfleet mend" in found[k.tombstones][1]
        assert found[k.dead][0] == WARNING
        result = await asyncio.to_thread(
            CliRunner().invoke, app, ["mend", "--redis-url", redis_url, "--run", "staged"]
        )
        assert result.exit_code == 0, result.output
        assert f"{k.prompts('default')}: built anew, 7 entries kept" in result.output
        after = await c.xpending_range(k.prompts("default"), "workers", "-", "+", 99)
        held = {row["message_id"]: (row["consumer"], row["times_delivered"]) for row in after}
        for row in before:
            assert held[row["message_id"]] == (row["consumer"], row["times_delivered"])
        await run.submit("g9", 2)
        assert len(await run.claim("w1", 9)) == 2
        await c.delete(k.dead)
        assert (await look(run)).of("streams") == []
        again = await asyncio.to_thread(
            CliRunner().invoke, app, ["mend", "--redis-url", redis_url, "--run", "staged"]
        )
        assert again.output == "no stream needs mending\n"


# ---- the server, the clocks, the library -------------------------------------------------------


class Server:
    """A server that answers as told."""

    def __init__(self, info: dict[str, Any], config: dict[str, str] | Exception) -> None:
        self._info, self._config = info, config

    async def info(self) -> dict[str, Any]:
        return {"redis_version": "7.2.0", "used_memory": 1 << 20} | self._info

    async def config_get(self, *_: str) -> dict[str, str]:
        if isinstance(self._config, Exception):
            raise self._config
        return {"maxmemory": "0", "maxmemory-policy": "noeviction"} | self._config


AOF = {"appendonly": "yes", "appendfsync": "everysec"}


@pytest.mark.parametrize(
    ("info", "config", "severity", "check", "said"),
    [
        ({}, AOF, OK, "durability", "fsync every second"),
        ({}, {"appendonly": "no"}, WARNING, "durability", "no append-only file"),
        ({}, AOF | {"appendfsync": "no"}, WARNING, "durability", "fsync left to the kernel"),
        ({"loading": 1}, AOF, WARNING, "durability", "still reading its data"),
        (
            {"aof_last_write_status": "err"},
            AOF,
            ERROR,
            "durability",
            "the last write to the append",
        ),
        ({"rdb_last_bgsave_status": "err"}, AOF, ERROR, "durability", "the last snapshot to disk"),
        ({}, AOF | {"maxmemory-policy": "allkeys-lru"}, ERROR, "memory", "policy is allkeys-lru"),
        ({}, AOF | {"maxmemory": str(100 << 20)}, OK, "memory", "1.0 MiB used, 1.0% of maxmemory"),
        ({}, AOF | {"maxmemory": "1200000"}, WARNING, "memory", "87.4% of maxmemory"),
        ({}, AOF | {"maxmemory": "1050000"}, ERROR, "memory", "99.9% of maxmemory"),
        ({"total_system_memory": 8 << 30}, AOF, OK, "memory", "0.0% of the machine's memory"),
        ({"role": "slave", "master_host": "a"}, AOF, ERROR, "replicas", "this server is a replica"),
        (
            {"slave0": {"ip": "b", "state": "online", "lag": 60}},
            AOF,
            WARNING,
            "replicas",
            "a replica is online, 60 s behind",
        ),
        ({"slave0": {"state": "online", "lag": 0}}, AOF, OK, "replicas", "asynchronous"),
        ({"redis_version": "6.2.0"}, AOF, ERROR, "server", "Redis 6.2.0 is too old"),
        ({"uptime_in_seconds": 3720}, AOF, OK, "server", "Redis 7.2.0, up for 1 h 2 min"),
        ({}, NoPermissionError("no"), INFO, "server", "CONFIG GET is denied"),
    ],
)
async def test_the_server(
    info: dict[str, Any],
    config: dict[str, str] | Exception,
    severity: Severity,
    check: str,
    said: str,
) -> None:
    found = await redis_server.server(Server(info, config))
    assert any((f.severity, f.check) == (severity, check) and said in f.what for f in found), found
    assert all(f.fix for f in found if f.severity > OK)


class Clock:
    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    async def time(self) -> tuple[int, int]:
        now = time.time() + self.ahead_s
        return int(now), int(now % 1 * 1e6)


async def test_clocks() -> None:
    now_s, (found,) = await redis_server.clock(Clock(0.5))
    assert found.severity is OK
    assert now_s == pytest.approx(time.time() + 0.5, abs=0.2)
    _, (found,) = await redis_server.clock(Clock(-90))
    assert found.severity is WARNING
    assert "90.0" in found.what


@pytest.mark.parametrize(
    ("version", "severity"), [("4.6.0", ERROR), ("5.0.8", INFO), ("8.0.1", INFO), ("8.1.0", OK)]
)
def test_the_library(monkeypatch: pytest.MonkeyPatch, version: str, severity: Severity) -> None:
    monkeypatch.setattr(redis, "__version__", version)
    (found,) = redis_server.library()
    assert found.severity is severity


async def test_a_check_that_may_not_be_made_is_told(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any) -> Any:
        raise NoPermissionError("User x has no permissions to run the 'xrange' command")

    monkeypatch.setattr(workers, "letters", refused)
    async with StagedRun(redis_url) as run:
        await stage(run)
        report = await look(run)
        assert any("could not be made: User x has no perm" in line for line in told(report))
        assert any(f.check == "books" for f in report.findings)


# ---- the command -------------------------------------------------------------------------------


def drawn(report: Report, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(render(report))
    return captured.get()


async def test_the_worst_comes_last_and_nothing_is_cut_off(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        await lost_prompt(run, run.client, run.part())
        await run.card("[red]w9", seen_s=300)
        text = drawn(await look(run))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "[red]w9" in text
    assert text.index("ok ") < text.index("warning ") < text.index("ERROR ")
    last = text.splitlines()[-1]
    assert last.startswith("Run staged: 2 errors, ")


async def test_the_command(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await stage(run)
        args = ["doctor", "--redis-url", redis_url, "--run", "staged"]
        result = await asyncio.to_thread(CliRunner().invoke, app, [*args, "--json"])
        tree = json.loads(result.stdout)
        assert (result.exit_code, tree["severity"]) == (1, "warning")  # no append-only file
        assert {"severity", "check", "what", "where", "fix"} == set(tree["findings"][0])
        await run.client.hincrby(run.part().ledger, "dead", 1)
        result = await asyncio.to_thread(CliRunner().invoke, app, args)
        assert result.exit_code == 2
        assert "books" in result.stdout


def test_no_redis_is_an_exit_code_of_its_own() -> None:
    args = ["doctor", "--redis-url", "redis://x:secret@127.0.0.1:1", "--run", "r"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == doctor.UNREACHABLE == 3
    assert "is not available" in result.stderr
    assert "secret" not in result.output + result.stderr


async def test_a_worker_may_be_asked_for_on_a_server_with_few_rights(redis_url: str) -> None:
    async with connect(redis_url, role="test") as client:
        with pytest.raises(Exception, match="cannot be part of a Redis key"):
            await examine(client, "no such/run")
