import asyncio
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.exceptions
from fixtures.servers import leaked_keys
from fixtures.tcp_proxy import TcpProxy
from support import wait_until_async

from rollfleet_common import redis as broker
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.errors import (
    BrokerError,
    BrokerSetupError,
    BrokerUnavailableError,
    RollfleetError,
    SettingsError,
    SupersededError,
)
from rollfleet_common.redis import (
    TRANSIENT,
    check_server,
    connect,
    connect_sync,
    is_transient,
    retry,
    safe_url,
    translate,
)
from rollfleet_common.redis_errors import error_code

MakeServer = Callable[..., EmbeddedServer]


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:secret@h", "redis://:***@h"),
        ("redis://user:secret@h:1/2", "redis://user:***@h:1/2"),
        ("redis://secret@h", "redis://***@h"),
        ("redis://u:sec/r@et@h", "redis://u:***@h"),
        ("redis://u:sec?ret#@h", "redis://u:***@h"),
        ("unix:///run/redis.sock?db=1&password=secret", "unix:///run/redis.sock?db=1&password=***"),
        ("unix:///r.sock?password=sec@ret&db=1", "unix:///r.sock?password=***&db=1"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_printed_url_has_no_password(url: str, printed: str) -> None:
    assert safe_url(url) == printed


@pytest.mark.parametrize("make", [connect, connect_sync])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://u:secret@h", "unix:///path"),
        ("localhost:6379", "redis://host:port/db"),
        ("embedded://", "embedded.resolve"),
        ("redis://:secret@h:port", "cannot be parsed"),
        ("redis://:sec/ret@h", "percent-encode"),
        ("redis://[::1", "cannot be parsed"),
        ("redis://:secret@[bad", "cannot be parsed"),
        ("redis://:sec#ret@h", "# is %23"),
        ("redis://:secret@a..b", "check the host"),
        ("rediss://:secret@h?ssl_foo=1", "the query"),
        ("redis://:secret@h?ssl_ca_certs=/x", "the query"),
        ("rediss://:secret@h?ssl_cert_reqs=perhaps", "the query"),
        ("redis://:secret@h?retry_on_timeout=1&socket_timeout=9", "retry_on_timeout, socket_timeo"),
    ],
)
def test_a_wrong_url_is_refused_in_words(make: Callable[..., object], url: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make(url, role="test")
    assert said in str(caught.value)
    assert "sec" not in str(caught.value)
    assert caught.value.__cause__ is None  # the parser's own message quotes the URL


@pytest.mark.parametrize("make", [connect, connect_sync])
@pytest.mark.parametrize(
    "url",
    ["redis://u:sec%2Fret@h:1/2", "unix://u:secret@/x.sock", "unix:///x.sock?password=secret"],
)
def test_a_client_does_not_show_its_password_but_has_it(
    make: Callable[..., redis.Redis], url: str
) -> None:
    client = make(url, role="test")
    assert "sec" not in repr(client)
    assert "sec" not in repr(client.connection_pool)
    provider = client.connection_pool.connection_kwargs["credential_provider"]
    assert provider.get_credentials()[-1] in ("sec/ret", "secret")


def test_clients_of_one_url_agree_in_what_matters() -> None:
    for make in (connect, connect_sync):
        command = make("redis://h:1/7", role="a b\n").connection_pool.connection_kwargs
        assert command["client_name"] == "rollfleet-a-b-"
        assert command["db"] == 7
        assert (command["socket_timeout"], command["socket_connect_timeout"]) == (5.0, 5.0)
        assert command["retry_on_timeout"] is False
        assert (command["protocol"], command["decode_responses"]) == (2, False)
        reads = make("unix:///x", role="a", blocking=True, block_s=3).connection_pool
        assert reads.connection_kwargs["socket_timeout"] == 8.0
        endless = make("unix:///x", role="a", blocking=True, block_s=None).connection_pool
        assert endless.connection_kwargs["socket_timeout"] is None


async def test_a_client_speaks_bytes_over_either_kind_of_socket(make_server: MakeServer) -> None:
    server = make_server(tcp=True)
    for url in (server.url, f"unix://{server.directory}/redis.sock"):
        async with connect(url, role="worker") as client:
            await client.set("rf:x", "1")
            assert await client.get("rf:x") == b"1"
            assert await client.client_getname() in ("rollfleet-worker", b"rollfleet-worker")
        with connect_sync(url, role="cli") as sync:
            assert sync.get("rf:x") == b"1"


def test_a_sync_blocking_read_may_outlast_the_timeout_of_commands(redis_url: str) -> None:
    with connect_sync(redis_url, role="t", blocking=True, block_s=0.3, timeout_s=0.05) as client:
        assert client.xread({"rf:x": "$"}, block=300) in ([], {})


async def test_a_full_pool_waits_for_a_connection(redis_url: str) -> None:
    async with connect(redis_url, role="test", max_connections=2) as client:
        assert await asyncio.gather(*(client.echo(str(i)) for i in range(50))) == [
            str(i).encode() for i in range(50)
        ]


async def test_a_blocking_read_may_outlast_the_timeout_of_commands(redis_url: str) -> None:
    async with connect(
        redis_url, role="test", blocking=True, block_s=0.3, timeout_s=0.05
    ) as client:
        assert await client.xread({"rf:x": "$"}, block=300) in ([], {})


@pytest.mark.parametrize("cut", [True, False], ids=["connection cut", "reply never came"])
async def test_an_xadd_whose_reply_is_lost_appends_once(make_server: MakeServer, cut: bool) -> None:
    server = make_server(tcp=True)
    with TcpProxy(server.url) as proxy:
        async with connect(proxy.url, role="test", timeout_s=0.3) as client:
            await client.ping()
            proxy.drop_replies(b"XADD", cut=cut)
            with pytest.raises(TRANSIENT) as caught:
                await client.xadd("rf:x", {"n": "1"})
            assert is_transient(caught.value)
            assert isinstance(translate(caught.value, proxy.url), BrokerUnavailableError)
            proxy.resume()
            assert await client.xlen("rf:x") == 1
        assert proxy.replies_lost == 1


def test_a_sync_xadd_whose_reply_is_lost_appends_once(make_server: MakeServer) -> None:
    with (
        TcpProxy(make_server(tcp=True).url) as proxy,
        connect_sync(proxy.url, role="test", timeout_s=0.3) as client,
    ):
        proxy.drop_replies(b"XADD")
        with pytest.raises(redis.exceptions.ConnectionError):
            client.xadd("rf:x", {"n": "1"})
        proxy.resume()
        assert client.xlen("rf:x") == 1


async def test_the_lost_reply_would_duplicate_with_a_client_that_retries(
    make_server: MakeServer,
) -> None:
    # The control: it shows that the two tests above could fail.
    with TcpProxy(make_server(tcp=True).url) as proxy:
        again = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 2)
        async with redis.asyncio.Redis(
            host="127.0.0.1",
            port=proxy.port,
            retry=again,
            retry_on_error=[redis.exceptions.ConnectionError],  # redis-py 5 wants to be told
        ) as client:
            proxy.drop_replies(b"XADD")
            with pytest.raises(redis.exceptions.ConnectionError):
                await client.xadd("rf:x", {"n": "1"})
            proxy.resume()
            assert await client.xlen("rf:x") == 3


async def test_a_wrong_password_is_no_outage(make_server: MakeServer) -> None:
    server = make_server(extra=["--requirepass", "right"])
    for userinfo in ("", ":wrong@", "nobody:wrong@"):
        url = server.url.replace("unix://", f"unix://{userinfo}")
        async with connect(url, role="test") as client:
            with pytest.raises(redis.exceptions.RedisError) as caught:
                await client.ping()
        assert not is_transient(caught.value)
        error = translate(caught.value, url)
        assert isinstance(error, BrokerSetupError)
        assert "check the user and the password" in str(error)
        assert "wrong@" not in str(error)
    async with connect(server.url.replace("unix://", "unix://:right@"), role="test") as client:
        assert await client.ping()


async def test_a_password_that_the_server_does_not_want_is_named(redis_url: str) -> None:
    url = redis_url.replace("://", "://:needless@", 1)
    async with connect(url, role="test") as client:
        with pytest.raises(BrokerSetupError, match="refused us"):
            await retry(client.ping, what="hello", deadline_s=30, url=url)


@pytest.mark.parametrize(
    ("exc", "wanted"),
    [
        (redis.exceptions.ConnectionError("gone"), BrokerUnavailableError),
        (redis.exceptions.TimeoutError("late"), BrokerUnavailableError),
        (redis.exceptions.BusyLoadingError("loading"), BrokerUnavailableError),
        (redis.exceptions.ReadOnlyError("replica"), BrokerUnavailableError),
        (redis.exceptions.OutOfMemoryError("full"), BrokerUnavailableError),
        (redis.exceptions.TryAgainError("moving"), BrokerUnavailableError),
        (redis.exceptions.ClusterDownError("CLUSTERDOWN down"), BrokerUnavailableError),
        (redis.exceptions.MasterDownError("MASTERDOWN down"), BrokerUnavailableError),
        (redis.exceptions.ResponseError("MISCONF no disk"), BrokerUnavailableError),
        (redis.exceptions.ResponseError("NOREPLICAS too few"), BrokerUnavailableError),
        (redis.exceptions.ResponseError("BUSY in a script"), BrokerUnavailableError),
        (ConnectionResetError("reset"), BrokerUnavailableError),
        (TimeoutError(), BrokerUnavailableError),
        (redis.exceptions.AuthenticationError("bad"), BrokerSetupError),
        (redis.exceptions.NoPermissionError("no"), BrokerSetupError),
        (redis.exceptions.ResponseError("NOAUTH first"), BrokerSetupError),
        (redis.exceptions.ResponseError("NOPERM in a script"), BrokerSetupError),
        (redis.exceptions.ResponseError("BUSYGROUP exists"), BrokerError),
        (redis.exceptions.ResponseError("WRONGTYPE"), BrokerError),
        (redis.exceptions.NoScriptError("load it"), BrokerError),
    ],
)
def test_every_error_of_redis_has_one_name(exc: Exception, wanted: type[RollfleetError]) -> None:
    error = translate(exc, "redis://:secret@h")
    assert type(error) is wanted
    assert error.__cause__ is exc
    assert "redis://:***@h" in str(error)
    assert is_transient(exc) == is_transient(error) == (wanted is BrokerUnavailableError)


def test_what_stands_behind_a_connection_error_decides() -> None:
    for cause in (
        ssl.SSLCertVerificationError("self-signed"),
        PermissionError(13, "denied"),
        redis.exceptions.AuthenticationError("invalid password"),
    ):
        exc = redis.exceptions.ConnectionError("Error connecting")
        exc.__cause__ = cause
        assert isinstance(translate(exc), BrokerSetupError)
    # An outage that happens while a refusal is being handled is an outage all the same.
    exc = redis.exceptions.ConnectionError("gone")
    exc.__context__ = redis.exceptions.AuthenticationError("invalid password")
    assert isinstance(translate(exc), BrokerUnavailableError)


def test_our_own_errors_stay_as_they_are() -> None:
    ours = SupersededError("another trainer")
    assert translate(ours) is ours
    assert not is_transient(ours)


CODES = {
    "NOREPLICAS": "Not enough good replicas to write.",
    "MISCONF": "Errors writing to the AOF file: No space left on device",
    "READONLY": "You can't write against a read only replica.",
    "LOADING": "Redis is loading the dataset in memory",
    "TRYAGAIN": "Multiple keys request during rehashing of slot",
    "CLUSTERDOWN": "The cluster is down",
    "MASTERDOWN": "Link with MASTER is down",
    "BUSY": "Redis is busy running a script. You can only call SCRIPT KILL",
    "OOM": "command not allowed when used memory > 'maxmemory'.",
}
#: How redis-py and script engines write the error of a command.
WRITTEN = {
    "a command": "{}",
    "a script": "{} script: 2a5f, on @user_script:41.",
    "a script that raised it": "user_script:12: {} script: 2a5f, on @user_script:12.",
    "a pipeline": "Command # 1 (HSET k f v) of pipeline caused error: {}",
    "an asyncio pipeline": "Command # 1 (HSET k f v) of pipeline caused error: ('{}',)",
    "a script in a pipeline": "Command # 2 (EVALSHA 2a5f 1 k) of pipeline caused error: {} script: 2",
    "a hostile command": "Command # 1 (SET k ) of pipeline caused error: NOPERM\n) of pipeline caused "
    "error: {}",
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("code", CODES)
def test_a_transient_error_is_told_by_its_code_wherever_it_stands(code: str, written: str) -> None:
    exc = redis.exceptions.ResponseError(written.format(f"{code} {CODES[code]}"))
    assert is_transient(exc)
    assert type(translate(exc)) is BrokerUnavailableError


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_what_a_command_holds_is_no_code(written: str) -> None:
    for text in ("WRONGTYPE Operation against a key", "ERR unknown command 'BUSY'"):
        assert not is_transient(redis.exceptions.ResponseError(written.format(text)))
    refused = redis.exceptions.ResponseError(written.format("NOPERM this user has no permissions"))
    assert type(translate(refused)) is BrokerSetupError


async def _failures(client: Any) -> list[BaseException]:
    """What a server says to a write: alone, in two kinds of scripts, in a pipeline, in MULTI."""
    text = "return redis.call('SET', KEYS[1], 'v')"

    async def pipelined(transaction: bool) -> None:
        pipe = client.pipeline(transaction=transaction)
        pipe.set("k", "v", px=1000)
        await pipe.execute()

    calls: list[Callable[[], Any]] = [
        lambda: client.set("k", "v", px=1000),
        lambda: client.eval(text, 1, "k"),
        lambda: client.eval(f"#!lua\n{text}", 1, "k"),
        lambda: pipelined(False),
        lambda: pipelined(True),
    ]
    found: list[BaseException] = []
    for call in calls:
        with pytest.raises(redis.exceptions.RedisError) as caught:
            await call()
        found.append(caught.value)
    return found


async def test_what_real_servers_say_in_a_bad_hour_is_transient(make_server: MakeServer) -> None:
    """OOM, NOREPLICAS, READONLY and MASTERDOWN, as this server writes them."""
    async with connect(make_server().url, role="test") as client:
        for name, bad, good in (("maxmemory", 1, 0), ("min-replicas-to-write", 1, 0)):
            await client.config_set(name, bad)
            for exc in await _failures(client):
                assert is_transient(exc), exc
            await client.config_set(name, good)
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")
        for stale in ("yes", "no"):
            await client.config_set("replica-serve-stale-data", stale)
            for exc in await _failures(client):
                assert is_transient(exc), exc
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await client.xadd("s", {"x": "y"}, id="18446744073709551615-18446744073709551615")
        with pytest.raises(redis.exceptions.ResponseError) as caught:
            await client.xadd("s", {"x": "y"})
        assert is_transient(caught.value)
        assert "rollfleet doctor" in str(translate(caught.value))
        await client.delete("s")


async def test_a_server_that_runs_a_long_script_is_busy(make_server: MakeServer) -> None:
    url = make_server().url
    async with connect(url, role="test") as client, connect(url, role="slow") as other:
        await client.config_set("busy-reply-threshold", 20)
        running = asyncio.create_task(other.eval("while true do end", 0))

        async def busy() -> bool:
            try:
                await client.ping()
            except redis.exceptions.ResponseError as exc:
                return "BUSY" in str(exc)
            return False

        await wait_until_async(busy, "the script to take long")
        for exc in await _failures(client):
            assert is_transient(exc), exc
        await client.script_kill()
        with pytest.raises(redis.exceptions.ResponseError):
            await running


async def test_a_server_that_cannot_write_its_snapshot_refuses_writes_for_a_while(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(tmp_path / "redis", tcp=True)
    async with connect(server.url, role="test") as client:
        await client.config_set("appendonly", "no")
        await client.config_set("save", "3600 1")
        shutil.rmtree(tmp_path / "redis")
        await client.bgsave()

        async def failed() -> bool:
            return (await client.info("persistence"))["rdb_last_bgsave_status"] != "ok"

        await wait_until_async(failed, "the snapshot to fail")
        for exc in await _failures(client):
            assert is_transient(exc), exc
            assert error_code(exc) == "MISCONF"


async def test_retry_waits_an_outage_out(make_server: MakeServer) -> None:
    server = make_server(appendonly="always")
    waits: list[float] = []
    async with connect(server.url, role="test") as client:
        await client.set("rf:x", 1)
        server.kill()

        def note(error: BrokerUnavailableError, wait_s: float) -> None:
            assert server.url in str(error)
            waits.append(wait_s)

        call = asyncio.create_task(
            retry(
                lambda: client.get("rf:x"),
                what="read x",
                deadline_s=None,
                on_wait=note,
                url=server.url,
            )
        )
        await wait_until_async(lambda: len(waits) >= 3, "three attempts in the outage")
        assert not call.done()
        await asyncio.to_thread(server.restart)
        assert await call == b"1"
    assert all(0 <= wait_s <= broker.LONGEST_WAIT_S for wait_s in waits)
    assert waits[0] <= broker.FIRST_WAIT_S


async def test_retry_gives_up_at_its_deadline() -> None:
    attempts: list[int] = []

    async def call() -> None:
        attempts.append(1)
        raise redis.exceptions.TimeoutError("late")

    with pytest.raises(BrokerUnavailableError, match=r"renew 3 leases: gave up .* late") as caught:
        await retry(call, what="renew 3 leases", deadline_s=0.2)
    assert isinstance(caught.value.__cause__, redis.exceptions.TimeoutError)
    assert len(attempts) >= 2


@pytest.mark.parametrize("exc", [redis.exceptions.ResponseError("WRONGTYPE"), ValueError("mine")])
async def test_retry_does_not_repeat_what_will_fail_again(exc: Exception) -> None:
    attempts: list[int] = []

    async def call() -> None:
        attempts.append(1)
        raise exc

    wanted = BrokerError if isinstance(exc, redis.exceptions.RedisError) else ValueError
    with pytest.raises(wanted):
        await retry(call, what="x", deadline_s=30)
    assert len(attempts) == 1


async def test_retry_takes_an_error_that_was_named_already() -> None:
    answers: list[Exception | int] = [BrokerUnavailableError("down"), 7]

    async def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await retry(call, what="x", deadline_s=30) == 7


async def test_a_good_server_has_no_warnings(make_server: MakeServer) -> None:
    server = make_server(appendonly="always", maxmemory="64mb")
    async with connect(server.url, role="test") as client:
        report = await check_server(client, strict=True)
    assert report.warnings == ()
    assert report.version is not None
    assert report.product_version is not None
    assert (report.appendonly, report.appendfsync) == (True, "always")
    assert (report.maxmemory_bytes, report.maxmemory_policy) == (64 * 2**20, "noeviction")
    assert not report.is_replica
    assert "power loss" in report.durability


async def test_a_server_that_evicts_is_a_warning_or_refused(make_server: MakeServer) -> None:
    server = make_server()
    async with connect(server.url, role="test") as client:
        await client.config_set("maxmemory-policy", "allkeys-lru")
        report = await check_server(client, strict=False)
        assert len(report.warnings) == 1
        assert "CONFIG SET maxmemory-policy noeviction" in report.warnings[0]
        assert "no append-only file" in report.durability
        with pytest.raises(BrokerSetupError, match="allkeys-lru"):
            await check_server(client, strict=True)


async def test_a_server_that_denies_config_is_asked_by_info(make_server: MakeServer) -> None:
    server = make_server(appendonly="everysec", maxmemory="32mb")
    async with connect(server.url, role="admin") as admin:
        await admin.config_set("maxmemory-policy", "volatile-lru")
        await admin.acl_setuser(
            "managed", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"],
            commands=["-config"],
        )  # fmt: skip
        await admin.acl_setuser(
            "blind", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"],
            commands=["-config", "-info"],
        )  # fmt: skip
    async with connect(server.url.replace("//", "//managed:pw@", 1), role="test") as client:
        report = await check_server(client, strict=False)
    assert "CONFIG GET is denied" in report.warnings[0]
    assert "volatile-lru" in report.warnings[1]
    assert report.maxmemory_bytes == 32 * 2**20
    assert (report.appendonly, report.appendfsync) == (True, None)
    async with connect(server.url.replace("//", "//blind:pw@", 1), role="test") as client:
        report = await check_server(client, strict=True)
    assert len(report.warnings) == 2
    assert (report.version, report.maxmemory_policy, report.appendonly) == (None, None, None)
    assert "does not say" in report.durability


async def test_an_old_server_is_refused_and_a_replica_is_named() -> None:
    class Old:
        async def info(self) -> dict[str, object]:
            return {"redis_version": "6.2.14"}

        async def config_get(self, *names: str) -> dict[str, str]:
            return {}

    class Replica(Old):
        async def info(self) -> dict[str, object]:
            return {"redis_version": "7.2.4", "valkey_version": "9.1.2", "role": "slave"}

    with pytest.raises(BrokerSetupError, match=r"6\.2\.14 is too old"):
        await check_server(Old(), strict=False)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    report = await check_server(Replica(), strict=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert (report.is_valkey, report.product_version, report.is_replica) == (True, "9.1.2", True)
    assert "primary" in report.warnings[0]


async def test_a_server_that_is_away_cannot_be_checked(make_server: MakeServer) -> None:
    server = make_server()
    server.kill()
    async with connect(server.url, role="test") as client:
        with pytest.raises(BrokerUnavailableError):
            await check_server(client, strict=False)


@pytest.mark.leaves_keys("it tests the check that would fail it", "rf:{r/0}:dead", "rf:{r/0}:set")
def test_keys_that_are_left_behind_are_found(redis_url: str) -> None:
    with connect_sync(redis_url, role="test") as client:
        client.set("rf:{r/0}:fence", 1)
        client.set("rf:{r/0}:payload:1", 1, px=60_000)
        client.set("other", 1)
        client.xgroup_create("rf:{r/0}:rollouts", "g", id="0", mkstream=True)
        assert leaked_keys(redis_url) == []
        client.xadd("rf:{r/0}:dead", {"n": 1})
        client.sadd("rf:{r/0}:set", 1)
    assert leaked_keys(redis_url) == ["rf:{r/0}:dead", "rf:{r/0}:set"]
    assert leaked_keys(redis_url, ("rf:*:dead",)) == ["rf:{r/0}:set"]


async def test_the_proxy_stalls_refuses_and_recovers(make_server: MakeServer) -> None:
    with TcpProxy(make_server().url) as proxy:
        async with connect(proxy.url, role="test", timeout_s=0.2) as client:
            assert await client.ping()
            proxy.pause()
            with pytest.raises(redis.exceptions.TimeoutError):
                await client.incr("rf:x")
            proxy.refuse()
            with pytest.raises(redis.exceptions.ConnectionError):
                await client.incr("rf:x")
            proxy.resume()
            assert await client.ping()
            proxy.cut()
            assert await retry(client.ping, what="ping", deadline_s=5)
