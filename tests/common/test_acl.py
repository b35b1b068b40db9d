"""The users of deploy/acl can do their work, and nothing else."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.fleet_processes import Process, Processes
from fixtures.rig import SHAPE, delivery_of, prompt_of
from fixtures.servers import MakeServer
from redis.exceptions import NoPermissionError, ResponseError
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common import scripts
from rollfleet_common.board import Board
from rollfleet_common.errors import BrokerSetupError, SupersededError
from rollfleet_common.keys import RunKeys
from rollfleet_common.leases import AttemptFailure, FailureKind, Leases
from rollfleet_common.ledger import read_books
from rollfleet_common.redis import connect, connect_sync, translate
from rollfleet_common.servers import RegisteredServer, Servers, ServerWeights, WeightState
from rollfleet_common.streams import Streams, Submission
from rollfleet_console import dead_letters
from rollfleet_console.doctor import examine
from rollfleet_console.record import record
from rollfleet_console.status.snapshot import take

ACL = Path(__file__).parents[2] / "deploy" / "acl"
ROLES = ("trainer", "worker", "console-readonly", "console-operator", "console-recorder")
RUN, OTHER = "mine", "other"
SERVER = "http://10.0.0.7:8000"


class Guarded:
    """A server that knows the four users of run `mine`, and an administrator."""

    def __init__(self, url: str) -> None:
        self.url = url

    def of(self, role: str) -> str:
        """The URL of a role, password and all."""
        user = role if role == "admin" else f"rollfleet-{role}"
        return self.url.replace("://", f"://{user}:secret-{role}%40@", 1)


def acl_lines(role: str) -> str:
    """What is shipped, for run `mine`, with a password that a URL has to escape."""
    text = (ACL / f"{role}.acl").read_text(encoding="utf-8")
    return text.replace("RUN", RUN).replace("CHANGE-ME", f"secret-{role}@")


@pytest.fixture
def guarded(make_server: MakeServer, tmp_path: Path) -> Guarded:
    users = "user default off\nuser admin on >secret-admin@ ~* &* +@all\n"
    users += "".join(map(acl_lines, ROLES))
    path = tmp_path / "users.acl"
    path.write_text(users, encoding="utf-8")
    return Guarded(make_server(tcp=True, extra=["--aclfile", str(path)]).url)


@pytest.fixture
def admin(guarded: Guarded) -> Iterator[Any]:
    with connect_sync(guarded.of("admin"), role="admin") as client:
        yield client


# ---- what they can do --------------------------------------------------------------------------


def denied(process: Process) -> list[str]:
    """Lines in which a right was missing, but for the one that says so on purpose."""
    lines = [line for line in process.text.splitlines() if re.search("permission|NOPERM", line)]
    return [line for line in lines if "CONFIG GET is denied" not in line]


@pytest.mark.slow
def test_a_trainer_and_workers_complete_a_run(
    guarded: Guarded, admin: Any, processes: Processes, tmp_path: Path
) -> None:
    """Every script of a worker runs: deliver, fail, promote, hand back, take over, renew."""
    options: dict[str, Any] = {"attempts_data": 2, "lease_s": 1, "drain_s": 0}
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    prompts: list[dict[str, Any]] = [{"token_ids": [1, 2], "answer": 1.0} for _ in range(4)]
    prompts += [{"token_ids": [3], "act": "raise", "fails": 1}, {"token_ids": [4], "act": "raise"}]
    prompts += [{"token_ids": [5], "act": "gate", "gate": str(gate), "trace": str(trace)}]
    shape: dict[str, Any] = {"samples_per_version": 8, "group_size": 2, "starve_s": 40.0}
    url = guarded.of("trainer")
    with rollfleet.connect(url, run=RUN, max_staleness=4, **shape) as fleet:
        first = processes.worker(guarded.of("worker"), RUN, "Actor", **options)
        fleet.feed(prompts)
        wait_until(trace.exists, "an episode at the gate", 30)
        assert first.stop() == 0
        assert first.events("handed back")
        second = processes.worker(guarded.of("worker"), RUN, "Actor", **options)
        wait_until(lambda: trace.read_text().count("\n") >= 4, "them again", 30)
        second.kill()
        third = processes.worker(guarded.of("worker"), RUN, "Actor", **options)
        third.event("lease taken over")
        gate.touch()
        groups: list[str] = []
        for batch in fleet.batches():
            groups += [group.name for group in batch.groups]
            fleet.publish()
        assert sorted(groups) == ["p0", "p1", "p2", "p3", "p4", "p6"]
        books = fleet.books()
        assert (books.balance, books.outstanding) == (0, 0)
        assert books.dead + books.dropped.get("torn", 0) == 2
        assert books.committed == 12
        # A run that is opened again finds what was left.
        fleet.submit({"token_ids": [1]})
    with rollfleet.connect(url, run=RUN, take_over=True, **shape) as fleet:
        assert fleet.next_batch(2) is not None
    assert third.stop() == 0
    for process in (first, second, third):
        assert denied(process) == []
    assert admin.acl_log() == [] or {entry["object"] for entry in _log(admin)} <= {
        "config|get",
        "client|setinfo",
    }


def _log(admin: Any) -> list[dict[str, str]]:
    """What was refused, by its name."""
    rows: list[dict[Any, Any]] = admin.execute_command("ACL", "LOG")
    found: list[dict[str, str]] = []
    for row in rows:
        pairs = row.items() if isinstance(row, dict) else zip(row[::2], row[1::2], strict=True)
        found.append({_text(k): _text(v) for k, v in pairs})
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


async def stage(guarded: Guarded) -> None:
    """One group on the stream, and one that died."""
    keys = RunKeys(RUN)
    async with connect(guarded.of("trainer"), role="test") as trainer:
        board, streams = Board(trainer, keys), Streams(trainer, keys.partition(0))
        seized = await board.seize("t", 20_000, "t", SHAPE, version=0, take_over=True)
        await streams.open("t", seized.epoch, 0, 0)
        rows = [Submission(name, prompt_of(name, n=1)) for name in ("g0", "g1")]
        await streams.submit("t", -1, rows, 1 << 20)
    async with connect(guarded.of("worker"), role="test") as worker:
        streams = Streams(worker, keys.partition(0))
        await streams.make_groups(["default"])
        (claim,), _ = await streams.claim(worker, "w1", ["default"], 1, None)
        leases = Leases(worker, keys.partition(0), "w1")
        await leases.fail(claim, AttemptFailure(FailureKind.DATA, "no", "w1"), None)


async def test_the_consoles_read_and_the_operator_sees_to_dead_letters(guarded: Guarded) -> None:
    await stage(guarded)
    for role in ("console-readonly", "console-operator"):
        async with connect(guarded.of(role), role="test") as client:
            snapshot = await take(client, RUN)
            assert (snapshot.books.balance, snapshot.books.waiting) == (0, 1)
            report = await examine.examine(client, RUN, lease_s=30, pause_s=0)
            blind = [f for f in report.findings if "permission" in f.what]
            assert [f.check for f in blind] == ["server"], blind
            (letter,) = await dead_letters.select(client, RUN)
            if role == "console-readonly":
                for change in (
                    dead_letters.retry(client, RUN, letter),
                    dead_letters.purge(client, RUN, [letter]),
                ):
                    with pytest.raises(
                        ResponseError, match=r"(?i)permission|NOPERM|ACL|script can't"
                    ):
                        await change
            else:
                assert await dead_letters.retry(client, RUN, letter)
                assert await dead_letters.select(client, RUN) == []
                assert (await take(client, RUN)).books.waiting == 2


async def test_the_recorder_taps_a_run_that_trainer_and_worker_serve(
    guarded: Guarded, admin: Any, tmp_path: Path
) -> None:
    """A commit, a drop and a rollout too old to be delivered, under everybody's own rights."""
    keys = RunKeys(RUN)
    trainer = connect(guarded.of("trainer"), role="trainer")
    worker = connect(guarded.of("worker"), role="worker")
    recorder = connect(guarded.of("console-recorder"), role="console")
    await Board(trainer, keys).seize("t", 9000, "t", SHAPE, version=-1, take_over=False)
    mine, theirs = (Streams(client, keys.partition(0)) for client in (trainer, worker))
    await mine.open("t", 1, 0, 0)
    await mine.submit("t", -1, [Submission(f"id-{g}", prompt_of(g, 1)) for g in "abc"], 1 << 20)
    await theirs.make_groups(["default"])
    claims, _ = await theirs.claim(worker, "w", ["default"], 3, None)
    stop = asyncio.Event()
    recording = asyncio.create_task(record(recorder, RUN, tmp_path / "r", stopping=stop))
    await wait_until_async(
        lambda: recorder.exists(keys.partition(0).tap), "the recorder's tap stands"
    )
    await theirs.deliver("w", [delivery_of(claim, nonce=claim.entry) for claim in claims[:2]])
    await mine.advance("t", 5, 5)
    await theirs.deliver("w", [delivery_of(claims[2], version=0)])
    headers = (await mine.consume(trainer, "t", 10, None)).headers
    for verb, (entry, header) in zip(("commit:1:0", "drop:stale"), headers, strict=True):
        await mine.settle("t", verb, [(entry, header.kind, header.payload)])
    stop.set()
    tally = await recording
    assert (tally.trained, tally.dropped, tally.without) == (1, 2, 0)
    assert not admin.keys("rf:{mine/0}:payload:*")
    for client in (trainer, worker, recorder):
        await client.aclose()


async def test_who_says_which_servers_there_are_and_what_they_hold(guarded: Guarded) -> None:
    await stage(guarded)
    row = ServerWeights(SERVER, WeightState.SERVING, 3)

    async def registry(role: str, call: Callable[[Servers], Awaitable[Any]]) -> Any:
        async with connect(guarded.of(role), role="test") as client:
            return await call(Servers(client, RunKeys(RUN)))

    assert await registry("console-operator", lambda s: s.add(RegisteredServer(SERVER)))
    assert await registry("console-operator", lambda s: s.drain(SERVER))
    assert not await registry("console-operator", lambda s: s.drain("http://nobody:1"))
    await registry("trainer", lambda s: s.tell("t", [row]))
    for role in ROLES:
        if role != "console-recorder":
            known, weights = await registry(role, lambda s: s.read())
            assert (known, weights) == (
                {SERVER: RegisteredServer(SERVER, draining=True)},
                {SERVER: row},
            )
    for role in ("worker", "console-readonly", "trainer"):
        with pytest.raises(ResponseError, match=r"(?i)permission|NOPERM"):
            await registry(role, lambda s: s.add(RegisteredServer(SERVER)))
    for role in ("worker", "console-readonly", "console-operator"):
        with pytest.raises((ResponseError, SupersededError)):
            await registry(role, lambda s: s.tell("t", [row]))
    await registry("trainer", lambda s: s.forget("t", [SERVER]))
    assert await registry("console-operator", lambda s: s.remove(SERVER))


async def test_a_worker_parks_reads_and_removes(guarded: Guarded, admin: Any) -> None:
    key = RunKeys(RUN).partition(0).progress("g", 0, 0)
    async with connect(guarded.of("worker"), role="test") as client:
        await client.set(key, b"half", px=1000)
        assert await client.mget([key]) == [b"half"]
        assert 0 < admin.pttl(key) <= 1000
        assert await client.unlink(key) == 1
    for role in ROLES:
        if role != "worker":
            async with connect(guarded.of(role), role="test") as client:
                with pytest.raises(NoPermissionError):
                    await client.set(key, b"forged", px=1000)


async def test_scripts_that_were_loaded_ahead_need_no_right_to_eval(
    guarded: Guarded, admin: Any
) -> None:
    for role in ("trainer", "worker"):
        words = acl_lines(role).replace("+evalsha +eval ", "+evalsha ").split()[1:]
        rules = re.findall(r"\([^)]*\)|\S+", " ".join(words))
        admin.execute_command("ACL", "SETUSER", rules[0], "reset", *rules[1:])
    with pytest.raises(NoPermissionError):
        await stage(guarded)
    for text in scripts.script_texts().values():
        admin.script_load(text)
    await stage(guarded)


# ---- what they cannot do -----------------------------------------------------------------------

ANYONE = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("CONFIG", "GET", "requirepass"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("ACL", "LIST"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SHUTDOWN", "NOSAVE"),
    ("DEBUG", "SLEEP", "0"),
    ("MONITOR",),
    ("REPLICAOF", "NO", "ONE"),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "FLUSH"),
    ("MODULE", "LIST"),
    ("SAVE",),
    ("SWAPDB", "0", "1"),
    ("PUBLISH", "news", "x"),
    ("DEL", "rf:{mine}:board"),
    ("DEL", "rf:{mine/0}:ledger"),
    ("SET", "elsewhere", "x"),
    ("GET", "elsewhere"),
    # Another run, and one whose name begins alike.
    ("HGETALL", "rf:{other}:board"),
    ("HGETALL", "rf:{mine2}:board"),
    ("XRANGE", "rf:{other/0}:rollouts", "-", "+"),
    ("XADD", "rf:{other/0}:rollouts", "*", "h", "x"),
    ("XADD", "rf:{mine2/0}:prompts:default", "*", "d", "x"),
    ("XREADGROUP", "GROUP", "workers", "w", "STREAMS", "rf:{other/0}:prompts:default", ">"),
    ("EVAL", "return redis.call('HGETALL', KEYS[1])", "1", "rf:{other}:board"),
    ("EVAL", "return redis.call('HGETALL', 'rf:{other}:board')", "0"),
    ("EVAL", "return redis.call('FLUSHALL')", "0"),
    ("EVAL", "return redis.call('CONFIG', 'GET', 'requirepass')", "0"),
]
WORKER = [
    # Publishing, steering and settling are the trainer's; so is what it read.
    ("HSET", "rf:{mine}:board", "version", "9"),
    ("HGET", "rf:{mine}:board", "token"),
    ("XADD", "rf:{mine}:news", "*", "version", "9"),
    ("SET", "rf:{mine}:trainer", "me"),
    ("GET", "rf:{mine}:trainer"),
    ("HSET", "rf:{mine/0}:fence", "token", "me"),
    ("HSET", "rf:{mine/0}:ledger", "committed", "9"),
    ("HSET", "rf:{mine}:batches", "1", "x"),
    ("HSET", "rf:{mine}:servers", "http://mine:1", "{}"),
    ("HSET", "rf:{mine}:weights", "http://mine:1", "{}"),
    ("SADD", "rf:{mine/0}:trained", "1-1"),
    ("SADD", "rf:{mine/0}:routes", "x"),
    ("XRANGE", "rf:{mine/0}:rollouts", "-", "+"),
    ("XREADGROUP", "GROUP", "trainer", "t", "STREAMS", "rf:{mine/0}:rollouts", ">"),
    ("XACK", "rf:{mine/0}:rollouts", "trainer", "1-1"),
    ("XDEL", "rf:{mine/0}:rollouts", "1-1"),
    ("XDEL", "rf:{mine/0}:dead", "1-1"),
    ("XRANGE", "rf:{mine/0}:dead", "-", "+"),
    ("GET", "rf:{mine/0}:payload:1-1:n"),
    ("SCAN", "0"),
    ("XTRIM", "rf:{mine/0}:prompts:default", "MAXLEN", "0"),
    ("XGROUP", "DESTROY", "rf:{mine/0}:prompts:default", "workers"),
    ("XGROUP", "SETID", "rf:{mine/0}:prompts:default", "workers", "0"),
    ("RENAME", "rf:{mine/0}:group:a", "rf:{mine/0}:group:b"),
    ("EVAL", "return redis.call('HSET', KEYS[1], 'token', 'me')", "1", "rf:{mine/0}:fence"),
    ("EVAL", "return redis.call('HGET', 'rf:{mine}:board', 'token')", "0"),
    ("SCRIPT", "LOAD", "return 1"),
    ("SET", "rf:{other/0}:progress:g:0:0", "x"),
    ("SET", "rf:{mine/0}:progress", "x"),
    ("PERSIST", "rf:{mine/0}:progress:g:0:0"),
]
TRAINER = [
    ("SCAN", "0"),
    ("HSET", "rf:{mine}:servers", "http://mine:1", "{}"),
    ("HSET", "rf:{mine}:workers", "w", "{}"),
    ("XGROUP", "CREATE", "rf:{mine/0}:prompts:default", "workers", "0"),
    ("XREADGROUP", "GROUP", "workers", "w", "STREAMS", "rf:{mine/0}:prompts:default", ">"),
    ("XADD", "rf:{mine/0}:rollouts", "*", "h", "forged"),
    ("SET", "rf:{mine/0}:payload:1-1:n", "forged"),
    ("XDEL", "rf:{mine/0}:dead", "1-1"),
]
READER = [
    ("HSET", "rf:{mine}:weights", "http://mine:1", "{}"),
    ("HSET", "rf:{mine}:board", "version", "9"),
    ("HSET", "rf:{mine}:workers", "w", "{}"),
    ("SET", "rf:{mine}:trainer", "me"),
    ("GET", "rf:{mine/0}:payload:1-1:n"),
    # The operator reads the fence, for `dead retry`; who writes it steers.
    ("HSET", "rf:{mine/0}:fence", "token", "me"),
    ("HSET", "rf:{mine/0}:fence", "min_useful", "999"),
    ("MULTI",),
    ("XTRIM", "rf:{mine/0}:dead", "MAXLEN", "0"),
    ("XADD", "rf:{mine/0}:rollouts", "*", "h", "x"),
    ("XADD", "rf:{mine/0}:tombstones", "*", "g", "x"),
    ("RENAME", "rf:{mine/0}:dead", "rf:{mine/0}:rollouts"),
    ("UNLINK", "rf:{mine/0}:group:g"),
    ("XACK", "rf:{mine/0}:rollouts", "trainer", "1-1"),
    ("XREADGROUP", "GROUP", "workers", "w", "STREAMS", "rf:{mine/0}:prompts:default", ">"),
    ("EVAL", "return redis.call('SET', KEYS[1], 'x')", "1", "rf:{mine}:trainer"),
]
READONLY = [
    ("HSET", "rf:{mine}:servers", "http://mine:1", "{}"),
    ("SADD", "rf:{mine/0}:routes", "x"),
    ("XDEL", "rf:{mine/0}:dead", "1-1"),
    ("XADD", "rf:{mine/0}:prompts:default", "*", "d", "x"),
    ("HINCRBY", "rf:{mine/0}:ledger", "committed", "1"),
    ("EVAL", "return redis.call('HSET', KEYS[1], 'a', 'b')", "1", "rf:{mine/0}:ledger"),
]
FORBIDDEN = {
    "worker": [*ANYONE, *WORKER],
    "trainer": [*ANYONE, *TRAINER],
    "console-readonly": [*ANYONE, *READER, *READONLY],
    "console-operator": [*ANYONE, *READER],
    "console-recorder": [*ANYONE, *READER, *READONLY],
}


@pytest.mark.parametrize("role", ROLES)
def test_what_is_not_theirs_is_refused(guarded: Guarded, admin: Any, role: str) -> None:
    admin.set("elsewhere", "precious")
    for run in (RUN, OTHER):
        admin.hset(f"rf:{{{run}}}:board", mapping={"version": 1, "token": "t"})
    before = admin.dbsize()
    allowed: list[tuple[str, ...]] = []
    with connect_sync(guarded.of(role), role="test") as client:
        for command in FORBIDDEN[role]:
            try:
                client.execute_command(*command)
            except ResponseError as exc:
                if re.search(
                    "(?i)permission|NOPERM|ACL failure|not allowed|script can't", str(exc)
                ):
                    continue
                allowed.append((*command, str(exc)))
            else:
                allowed.append(command)
    assert allowed == []
    assert admin.dbsize() == before


async def test_a_worker_that_knows_the_token_still_cannot_steer(guarded: Guarded) -> None:
    """Scripts run with the rights of their caller."""
    await stage(guarded)
    keys = RunKeys(RUN)
    refused = (ResponseError, SupersededError)
    async with connect(guarded.of("worker"), role="test") as client:
        streams, board = Streams(client, keys.partition(0)), Board(client, keys)
        (claim,), _ = await streams.claim(client, "w1", ["default"], 1, None)
        await streams.deliver("w1", [delivery_of(claim)])
        for step in (
            board.publish("t", {"version": 9}),
            board.hold("t", 1000),
            board.seize("me", 1000, "me", SHAPE, version=0, take_over=True),
            board.plan("t", 1, b"x"),
            streams.advance("t", 9, 9),
            streams.open("me", 9, 0, 0),
            streams.submit("t", -1, [Submission("x", prompt_of("x"))], 1 << 20),
            streams.consume(client, "w1", 10, None),
            streams.settle("t", "commit", [("1-1", claim.prompt.kind, "x")]),
            streams.cancel("t", claim.prompt, "cancelled", 1),
        ):
            with pytest.raises(refused):
                await step
    async with connect(guarded.of("console-readonly"), role="test") as client:
        books = await read_books(client, [keys.partition(0)])
        assert (books.balance, books.ready, books.dead) == (0, 1, 1)


async def test_a_missing_right_and_a_wrong_password_are_said_without_the_password(
    guarded: Guarded,
) -> None:
    url = guarded.of("worker").replace("secret-worker", "wrong-worker")
    async with connect(url, role="test") as client:
        with pytest.raises(Exception) as caught:
            await client.ping()
    error = translate(caught.value, url)
    assert isinstance(error, BrokerSetupError)
    assert "wrong-worker" not in str(error)
    assert "check the user and the password" in str(error)
    url = guarded.of("worker")
    async with connect(url, role="test") as client:
        with pytest.raises(NoPermissionError) as refused:
            await client.flushall()
    error = translate(refused.value, url)
    assert isinstance(error, BrokerSetupError)
    assert "ACL file of its role" in str(error)
    assert "secret" not in str(error)


def test_a_worker_without_its_rights_ends_and_says_why(
    guarded: Guarded, admin: Any, processes: Processes
) -> None:
    admin.execute_command("ACL", "SETUSER", "rollfleet-worker", "clearselectors")
    worker = processes.worker(guarded.of("worker"), RUN)
    assert worker.wait() == 2
    assert "lacks rights" in worker.text
    assert "secret" not in worker.text


def test_every_file_is_one_line_that_a_server_takes() -> None:
    for role in ROLES:
        text = (ACL / f"{role}.acl").read_text(encoding="utf-8")
        assert text.count("\n") == 1
        assert text.startswith(f"user rollfleet-{role} on >CHANGE-ME resetkeys resetchannels -@all")
        assert "+@" not in text
        assert "~*" not in text
        assert set(re.findall(r"~(\S*?)[ )]", text)) == {
            key for key in re.findall(r"~(\S*?)[ )]", text) if key.startswith("rf:{RUN")
        }
    assert {path.stem for path in ACL.glob("*.acl")} == set(ROLES)
