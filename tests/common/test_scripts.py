import re
import socket
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
from fixtures.rig import INFRA, SHAPE, TOKEN, Rig, delivery_of, prompt_of
from redis.exceptions import NoPermissionError, ResponseError
from support import wait_until_async

from rollfleet_common import scripts
from rollfleet_common.board import Board
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.keys import PartitionKeys, RunKeys
from rollfleet_common.leases import Leases
from rollfleet_common.ledger import read_books
from rollfleet_common.redis import connect
from rollfleet_common.streams import Delivered, Garbage, Streams, Submission, Submitted

TEXTS = scripts.script_texts()
#: Those that free or steer.
ALLOW_OOM = {
    *("adopt", "advance", "cancel", "claim", "hold", "ledger", "open", "plan", "publish", "reap"),
    *("refit", "register", "release", "renew", "seize", "settle", "untrain"),
}
#: Scripts that write nothing.
READS = {"route", "there", "told"}


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
def test_scripts_touch_keys_of_one_tag_only(name: str):
    """Every key is one of KEYS, or a group record: the prefix of its siblings and a group's name."""
    text = re.sub(r"--[^\n]*", "", TEXTS[name])
    calls = re.findall(r"redis\.p?call\(\s*'(\w+)'\s*(?:,\s*([^,)]+(?:\.\.[^,)]+)?))?", text)
    assert calls
    allowed = {
        "handback": {"ARGV[2] .. f.g", "stream"},  # of `holder`, which is called with KEYS
        **{step: {"stream"} for step in ("deliver", "renew", "mend")},
        # Of `holder` and of `cut`, which are called with KEYS.
        "fail": {"stream", "fence", "dead", "ledger"},
        "quarantine": {"fence", "dead", "ledger"},
        "promote": {"group"},
        "ledger": {"key"},  # of `pending`, which is called with KEYS
        "settle": {"payload"},  # of `free`, which is called with KEYS
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
        assert "local group = ARGV[2] .. f[1]" in text


class _Watched:
    """A client that remembers the keys of every script call."""

    def __init__(self, client: Any, seen: list[list[str]]) -> None:
        self._client, self._seen = client, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _note(self, number: int, args: tuple[Any, ...]) -> None:
        self._seen.append([a.decode() if isinstance(a, bytes) else a for a in args[:number]])

    async def evalsha(self, digest: str, number: int, *args: Any) -> Any:
        self._note(number, args)
        return await self._client.evalsha(digest, number, *args)

    def pipeline(self, **options: Any) -> Any:
        pipe = self._client.pipeline(**options)
        plain = pipe.evalsha

        def evalsha(digest: str, number: int, *args: Any) -> Any:
            self._note(number, args)
            return plain(digest, number, *args)

        pipe.evalsha = evalsha
        return pipe


async def live(client: Any, run: str = "life") -> None:
    """Every atomic step once, from opening a run to its empty end."""
    keys = RunKeys(run)
    part = keys.partition(0)
    board, streams = Board(client, keys), Streams(client, part)
    seized = await board.seize(TOKEN, 9000, "me", SHAPE, version=-1, take_over=True)
    await board.hold(TOKEN, 9000)
    assert await streams.open(TOKEN, seized.epoch, 0, 0) == -1
    await streams.make_groups(["default"])
    await board.publish(TOKEN, {"version": 1, "weights": "w"})
    await streams.advance(TOKEN, 1, 1)

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
    assert await leases.hand_back("default", [a[2].entry]) == 1
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
    await board.plan(TOKEN, 1, b"plan")
    assert await streams.settle(TOKEN, "train", rollouts) == 4
    assert await streams.untrain(TOKEN, [row[:2] for row in rollouts]) == 4
    assert await streams.settle(TOKEN, "commit", rollouts[:2]) == 2
    assert await streams.settle(TOKEN, "drop:stale", rollouts[2:], ["a", "b", "p0"], stones) == 2
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


async def test_keys_of_every_call_share_one_tag(redis_url: str):
    rig = Rig(redis_url, "life")
    seen: list[list[str]] = []
    await live(_Watched(rig.client, seen))
    assert len(seen) > 20
    for keys in seen:
        assert len({re.search(r"\{(.+?)\}", key).group(1) for key in keys}) == 1, keys  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    await rig.close()


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
