import inspect
import re
import socket
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from fixtures.declared_keys import Watched, checked
from fixtures.rig import INFRA, SHAPE, TOKEN, Rig, delivery_of, prompt_of
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError
from support import wait_until_async

from rollfleet_common import scripts
from rollfleet_common.board import Board
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.keys import PartitionKeys, RunKeys
from rollfleet_common.leases import Leases
from rollfleet_common.ledger import read_books
from rollfleet_common.redis import connect
from rollfleet_common.scripts import operator, reads, run, trainer, worker
from rollfleet_common.servers import RegisteredServer, Servers, ServerWeights, WeightState
from rollfleet_common.streams import Delivered, Garbage, Streams, Submission, Submitted

TEXTS = scripts.script_texts()
#: Those that free or steer.
ALLOW_OOM = {
    *("adopt", "advance", "cancel", "claim", "hold", "ledger", "open", "plan", "publish", "reap"),
    *("refit", "register", "release", "renew", "seize", "settle", "untrain"),
}
#: Scripts that write nothing.
READS = {"due", "route", "there", "told"}
SERVER = "http://10.0.0.7:8000"


def test_every_script_is_loaded_under_its_own_digest():
    for name, text in TEXTS.items():
        script = scripts.load(name)
        assert (script.name, script.text) == (name, text)
        assert re.fullmatch(r"[0-9a-f]{40}", script.digest)
    assert len({scripts.load(name).digest for name in TEXTS}) == len(TEXTS)


def test_what_frees_or_steers_runs_without_memory_and_nothing_else_does():
    assert {n for n, text in TEXTS.items() if text.startswith("#!lua flags=allow-oom\n")} == (
        ALLOW_OOM
    )
    reads = "#!lua flags=no-writes,allow-oom\n"
    assert {n for n, text in TEXTS.items() if text.startswith(reads)} == READS
    assert not [n for n in TEXTS.keys() - ALLOW_OOM - READS if TEXTS[n].startswith("#!")]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_scripts_name_their_keys_as_keys(name: str):
    """What the checker shows of the branches that run, read from the text of all of them."""
    text = re.sub(r"--[^\n]*", "", TEXTS[name])
    calls = re.findall(r"redis\.p?call\(\s*'(\w+)'\s*(?:,\s*([^,)]+(?:\.\.[^,)]+)?))?", text)
    assert calls
    # Parameters of local functions that are called with KEYS, and copies of one of KEYS.
    allowed = {
        **{step: {"stream"} for step in ("deliver", "handback", "renew", "mend")},
        "fail": {"stream", "fence", "dead", "ledger"},
        "quarantine": {"fence", "dead", "ledger"},
        "promote": {"group"},
        "ledger": {"key"},
        "settle": {"payload"},
    }.get(name, set())
    for command, first in calls:
        if command == "TIME":
            continue
        if command in ("XGROUP", "XINFO"):
            assert first.startswith("'"), "a subcommand"
            continue
        assert re.fullmatch(r"KEYS\[.+\]", first.strip()) or first.strip() in allowed, (
            command,
            first,
        )
    for subcommand_key in re.findall(r"'(?:CREATE|CONSUMERS|DELCONSUMER)',\s*(\S+?)[,)]", text):
        assert re.fullmatch(r"KEYS\[\w+\]", subcommand_key)
    for key in re.findall(r"holder\((?!stream)([^,]+),", text):
        assert re.fullmatch(r"KEYS\[\w+\]", key)
    for payload in re.findall(r" free\(entry, ([^\n]+)\)\n", text.replace("function free", "")):
        assert re.fullmatch(r"KEYS\[.+\]", payload)
    if name == "promote":
        assert "local member, group = ARGV[i], KEYS[3 + i]" in text


def stubs() -> dict[str, Any]:
    """The typed functions, by the name of their script."""
    found: dict[str, Any] = {}
    for module in (run, trainer, worker, reads, operator):
        for name in module.__all__:
            if inspect.iscoroutinefunction(stub := getattr(module, name)):
                assert name.removesuffix("_") not in found
                found[name.removesuffix("_")] = stub
    return found


def test_every_script_has_one_typed_function_and_the_other_way_round():
    assert sorted(stubs()) == sorted(TEXTS)
    for name, stub in stubs().items():
        hints = typing.get_type_hints(stub)
        assert "return" in hints, name
        _, *parameters = inspect.signature(stub).parameters.values()
        for parameter in parameters:
            named = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            # After the client and the names of a run or a partition, everything is named.
            assert named or hints[parameter.name] in (RunKeys, PartitionKeys), (name, parameter)


def test_nothing_else_calls_a_script():
    """A list of keys and arguments is made in the package of the scripts alone."""
    root = Path(scripts.__file__).parents[3]
    callers = [
        path.relative_to(root)
        for folder in ("common", "engines", "producer", "worker", "console", "demo")
        for path in (root / folder).rglob("*.py")
        if re.search(
            r"\.evalsha\(|\.eval\(|\"EVAL(SHA)?\"|scripts import .*\bload\b|scripts\.load\(",
            path.read_text("utf-8"),
        )
    ]
    package = Path("common/rollfleet_common/scripts")
    assert {path for path in callers if path.parent != package} == set()


def head_of(name: str) -> str:
    """What a script says that its KEYS are."""
    (head,) = re.findall(r"(?m)^-- KEYS (.+?)(?:   ARGV|\n-- (?! ))", TEXTS[name], re.DOTALL)
    return " ".join(head.replace("\n--", "").split())


def pattern_of(name: str) -> str:
    """The same as a pattern of the words that stand for keys."""
    fixed, *repeated = head_of(name).split(";")
    numbers, words = zip(*re.findall(r"(\d+) (\w+)", fixed), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1)), name
    said = "".join(f"{_word(word)} " for word in words)
    for part in repeated:
        each = part.partition(":")[2].split(",")
        said += "(?:" + "".join(f"{_word(word.strip())} " for word in each) + ")*"
    return said


def _word(word: str) -> str:
    """Some scripts take any stream or hash."""
    return r"\w+" if word in ("stream", "key", "copy") else word


async def live(client: Any, name: str = "life") -> None:
    """Every atomic step once, from opening a run to its empty end."""
    keys = RunKeys(name)
    part = keys.partition(0)
    board, streams = Board(client, keys), Streams(client, part)
    servers = Servers(client, keys)
    assert (await board.claim(TOKEN, 9000, "me", take_over=True)).ok
    seized = await board.seize(TOKEN, 9000, "me", SHAPE, version=-1, take_over=True)
    await board.hold(TOKEN, 9000)
    assert await streams.open(TOKEN, seized.epoch, 0, 0) == -1
    await streams.make_groups(["default"])
    await board.publish(TOKEN, {"version": 1, "weights": "w"})
    await streams.advance(TOKEN, 1, 1)
    assert await servers.add(RegisteredServer(SERVER))
    await servers.tell(TOKEN, [ServerWeights(SERVER, WeightState.SERVING, 1)])

    rows = [Submission(name, prompt_of(name, 3)) for name in ("a", "b")]
    rows.append(Submission("@0", prompt_of("p0", 2, position=0)))
    states, outstanding = await streams.submit(TOKEN, 8, rows, 1 << 20)
    assert (states, outstanding) == ([Submitted.YES] * 3, 8)
    await client.xadd(part.prompts("default"), {"x": "y"})

    leases, others = Leases(client, part, "w1"), Leases(client, part, "w2")
    claims, garbage = await streams.claim(client, "w1", ["default"], 100, None)
    assert (len(claims), len(garbage)) == (8, 1)
    await leases.quarantine(garbage[0])
    a, b, p = claims[:3], claims[3:6], claims[6:]
    assert await leases.renew("default", [c.entry for c in claims]) == []
    assert await leases.fail(a[0], INFRA, 0)
    assert await leases.fail(a[1], INFRA, None)
    assert (await leases.promote("default"))[0] == 1
    assert await leases.hand_back("default", [(a[2].entry, "a")]) == 1
    ((taken, _, _),) = await others.reclaim(streams, "default", 0, 1)
    assert not isinstance(taken, Garbage)
    assert taken.entry == b[0].entry
    fates = [delivery_of(b[0]), delivery_of(b[1], version=1), delivery_of(b[2], version=0)]
    states = await streams.deliver("w1", fates)
    assert states == [Delivered.STOLEN, Delivered.YES, Delivered.STALE]
    assert await streams.deliver("w2", [delivery_of(taken, version=1, nonce="w2")]) == [
        Delivered.YES
    ]
    assert (
        await streams.deliver("w1", [delivery_of(c, version=1) for c in p]) == [Delivered.YES] * 2
    )
    mended = await trainer.mend(
        client,
        part,
        token=TOKEN,
        group="a",
        route="default",
        body=b"",
        task="",
        position=-1,
        holds={},
    )
    assert mended == [trainer.Mended.WELL] * 3
    view = await reads.route(client, part, route="default")
    assert (view.length, view.pending) == (2, 0)
    assert await streams.cancel(TOKEN, prompt_of("a", 3), "surplus", 9) == 2
    await leases.reap("default", 0)

    arrivals = await streams.consume(client, TOKEN, 100, None)
    assert await streams.adopt(TOKEN, TOKEN) == (
        [entry for entry, _ in arrivals.headers],
        [entry for entry, _ in arrivals.tombstones],
    )
    assert None not in await streams.fetch([h.payload for _, h in arrivals.headers])
    rollouts = [(entry, h.kind, h.payload) for entry, h in arrivals.headers]
    stones = [entry for entry, _ in arrivals.tombstones]
    found = [*(entry for entry, _, _ in rollouts), "5-5"]
    assert await reads.there(client, key=part.rollouts, kind="stream", things=found) == [
        *[True] * 4,
        False,
    ]
    assert await operator.rebuild_stream(client, stream=part.rollouts) is None
    await client.set(part.tap, 60_000, px=60_000)
    await board.plan(TOKEN, 1, b"plan")
    assert await streams.settle(TOKEN, "train", rollouts) == 4
    assert await streams.untrain(TOKEN, [row[:2] for row in rollouts]) == 4
    assert await streams.settle(TOKEN, "commit", rollouts[:2]) == 2
    assert await streams.settle(TOKEN, "drop:stale", rollouts[2:], ["a", "b", "p0"], stones) == 2
    told = await reads.told(client, part, after="0-0", at_most=9)
    assert [fields[b"v"] for _, fields in told.entries] == [b"commit"] * 2 + [b"drop:stale"] * 2
    await client.delete(part.tap, part.tapped)
    await board.plan(TOKEN, 1, None)
    books = await read_books(client, [part])
    assert (books.balance, books.submitted, books.outstanding) == (0, 8, 0)
    assert (books.committed, books.dead) == (2, 1)
    assert books.dropped == {"surplus": 2, "stale": 3}
    await board.release(TOKEN)
    left = {key.decode() async for key in client.scan_iter(match=f"{part.prefix}*")}
    names = {key.removeprefix(part.prefix) for key in left}
    names = {name for name in names if not name.startswith("payload:")}  # the zombie's expires
    assert names == {
        *("fence", "ledger", "marks", "routes", "dead"),
        *("prompts:default", "rollouts", "tombstones"),
    }


async def test_scripts_touch_only_the_keys_that_their_heads_name(
    redis_url: str, declared_keys: None
):
    """All of them, under a checker, with what their typed functions make of names."""
    rig = Rig(redis_url, "life")
    client = Watched(rig.client)
    await live(client)
    names = {scripts.load(name).digest: name for name in TEXTS}
    assert {names[digest] for digest, _ in client.seen} == TEXTS.keys()
    for digest, keys in client.seen:
        words = "".join(re.sub(r"^rf:\{.+?\}:(\w+).*$", r"\1 ", key) for key in keys)
        assert re.fullmatch(pattern_of(names[digest]), words), (names[digest], keys)
        assert len({re.search(r"\{(.+?)\}", key).group(1) for key in keys}) == 1, keys  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    await rig.close()


async def test_the_checker_refuses_undeclared_keys(redis_url: str):
    rig = Rig(redis_url)
    for text in (
        "return redis.call('GET', KEYS[1] .. 'y')",
        "return redis.pcall('XINFO', 'GROUPS', ARGV[1])",
        "#!lua flags=allow-oom\nreturn redis.call('UNLINK', KEYS[1], ARGV[1])",
    ):
        with pytest.raises(ResponseError, match="UNDECLARED"):
            await rig.client.eval(checked(text), 1, "{a}x", "{a}y")
    with pytest.raises(ResponseError, match="UNDECLARED: two hash tags"):
        await rig.client.eval(checked("return 1"), 2, "{a}x", "{b}x")
    assert await rig.client.eval(checked("return redis.call('GET', KEYS[1])"), 1, "{a}x") is None
    await rig.close()


def test_the_table_of_scripts_is_true():
    """docs/wire.md says which keys each script is given."""
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)\.lua` \| (.+?) \|", page)
    assert dict(rows) == {name: head_of(name) for name in TEXTS}
    assert [name for name, _ in rows] == sorted(TEXTS)


async def test_a_cluster_takes_every_step(make_server: Callable[..., EmbeddedServer]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        bus = probe.getsockname()[1]
    server = make_server(tcp=True, extra=["--cluster-enabled", "yes", "--cluster-port", str(bus)])
    client: Any = connect(server.url, role="test")
    await client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)

    async def ready() -> bool:
        return "'cluster_state': 'ok'" in str(await client.execute_command("CLUSTER INFO"))

    await wait_until_async(ready, "the cluster to be ready")
    # It does refuse what spans two slots.
    with pytest.raises(ResponseError, match="slot"):
        await client.eval("return 1", 2, "{a}x", "{b}x")
    await live(client)
    await client.aclose()


@pytest.mark.skipif(
    tuple(map(int, redis.__version__.split(".")[:2])) < (8, 1),
    reason="earlier cluster clients lose pipelines when retries are off",
)
async def test_three_masters_take_every_step_from_a_cluster_client(
    make_server: Callable[..., EmbeddedServer],
):
    """Runs whose board and partition lie on different nodes, through redis-py's cluster client."""
    nodes: list[tuple[str, int, int]] = []
    clients: list[Any] = []
    for first in (0, 5_500, 11_000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            bus = probe.getsockname()[1]
        extra = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
        url = make_server(tcp=True, extra=extra).url
        client: Any = connect(url, role="test")
        last = 16_383 if first == 11_000 else first + 5_499
        await client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        await client.execute_command("CLUSTER SET-CONFIG-EPOCH", len(nodes) + 1)
        nodes.append((url, int(url.rpartition(":")[2].partition("/")[0]), bus))
        clients.append(client)
    for _, port, bus in nodes[1:]:
        await clients[0].execute_command("CLUSTER MEET", "127.0.0.1", port, bus)

    async def whole() -> bool:
        said = [str(await client.execute_command("CLUSTER INFO")) for client in clients]
        return all("'cluster_state': 'ok'" in s and "_nodes': '3'" in s for s in said)

    await wait_until_async(whole, "the nodes to know each other")
    cluster: Any = RedisCluster(host="127.0.0.1", port=nodes[0][1], retry=Retry(NoBackoff(), 0))
    for name, spread in (("life", 1), ("a", 2), ("b", 2)):
        keys = RunKeys(name)
        homes = {cluster.keyslot(key) // 5_500 for key in (keys.board, keys.partition(0).fence)}
        assert len(homes) == spread
        await live(cluster, name)
    for client in (cluster, *clients):
        await client.aclose()


async def test_a_user_of_one_run_cannot_reach_another(make_server: Callable[..., EmbeddedServer]):
    server = make_server(tcp=True)
    admin: Any = connect(server.url, role="test")
    await admin.execute_command(
        *("ACL SETUSER", "fleet", "on", ">secret", "+@all", "-@dangerous", "+info"),
        *("~rf:{life}:*", "~rf:{life/0}:*"),
    )
    url = server.url.replace("redis://", "redis://fleet:secret@")
    client: Any = connect(url, role="test")
    await live(client)
    with pytest.raises((NoPermissionError, ResponseError), match=r"(?i)no permission|NOPERM"):
        await live(client, "other")
    await client.aclose()
    await admin.aclose()


async def test_a_script_that_the_server_forgot_is_sent_again(redis_url: str):
    rig = Rig(redis_url, "life")
    await live(rig.client)
    await rig.close()
    await rig.client.script_flush()
    await live(rig.client)
    await rig.close()


class _Stripped:
    """fakeredis, which has no shebang and no EVALSHA of what it was never told."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def eval(self, text: str, number: int, *args: Any) -> Any:
        return await self._client.eval(re.sub(r"^#!lua[^\n]*\n", "", text), number, *args)


async def test_the_steps_run_in_fakeredis():
    client = fakeredis.FakeAsyncRedis()
    await live(_Stripped(client))
    await client.aclose()


def test_names_of_a_run():
    keys = RunKeys("r")
    assert {keys.board, keys.news, keys.trainer, keys.workers, keys.servers, keys.batches} == {
        f"rf:{{r}}:{name}" for name in ("board", "news", "trainer", "workers", "servers", "batches")
    }
    assert keys.partition(3) == PartitionKeys("r", 3)
    assert keys.partition(3).group("") + "g" == keys.partition(3).group("g")
