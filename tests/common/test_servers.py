import asyncio

import pytest
from fixtures.rig import TOKEN, Rig

from rollfleet_common.errors import SettingsError, SupersededError
from rollfleet_common.servers import (
    RegisteredServer,
    Servers,
    ServerWeights,
    WeightState,
    server_name,
    server_url,
)

#: No script may touch a key that it was not given.
pytestmark = pytest.mark.usefixtures("declared_keys")

A, B = "http://10.0.0.7:8000", "http://10.0.0.8:8000/prefix"


@pytest.fixture
def servers(rig: Rig) -> Servers:
    """The registry of a run that trainer-1 holds."""
    return Servers(rig.client, rig.keys)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://h:8000/", "http://h:8000"),
        (" http://h:8000/v1", "http://h:8000"),
        ("https://h/v1/", "https://h"),
        ("https://h/proxy/a", "https://h/proxy/a"),
        ("HTTP://Host:80/A", "http://host/A"),
        ("https://h:443", "https://h"),
        ("https://h:80", "https://h:80"),
        ("http://User:Pw@h", "http://User:Pw@h"),
    ],
)
def test_a_url_is_written_in_one_way(written: str, meant: str):
    assert server_url(written) == meant


@pytest.mark.parametrize("url", ["", "h:8000", "ftp://h", "http://", "http://a b", "http://h/?x=1"])
def test_what_is_no_url_of_a_server_is_refused(url: str):
    with pytest.raises(SettingsError, match="should be a URL"):
        server_url(url)


def test_the_name_of_a_server_holds_no_password():
    assert server_name("http://user:pw@h:1/a@b") == "http://h:1/a@b"
    assert server_name("http://h:1/a@b") == "http://h:1/a@b"
    with pytest.raises(SettingsError) as caught:
        server_url("http://user:pw@")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://user:pw@h", "http://h/", "http://h:80", "HTTP://h"])
async def test_a_url_that_is_written_otherwise_is_not_registered(servers: Servers, url: str):
    with pytest.raises(SettingsError, match="cannot be registered") as caught:
        await servers.add(RegisteredServer(url))
    assert "pw" not in str(caught.value)


async def test_servers_come_go_and_drain(servers: Servers):
    assert await servers.read() == ({}, {})
    assert await servers.add(RegisteredServer(A, "vllm", added_ms=7))
    assert await servers.add(RegisteredServer(B))
    assert not await servers.add(RegisteredServer(B, "sglang"))
    assert await servers.drain(A)
    assert not await servers.drain("http://nobody:1")
    known, _ = await servers.read()
    assert known == {
        A: RegisteredServer(A, "vllm", draining=True, added_ms=7),
        B: RegisteredServer(B, "sglang"),
    }
    assert await servers.drain(A, draining=False)
    assert await servers.remove(B)
    assert not await servers.remove(B)
    known, _ = await servers.read()
    assert known == {A: RegisteredServer(A, "vllm", added_ms=7)}


async def test_every_change_wakes_who_follows_the_board(rig: Rig, servers: Servers):
    async def wakes() -> int:
        return int(await rig.client.xlen(rig.keys.news))

    before = await wakes()
    await servers.add(RegisteredServer(A))
    await servers.drain(A)
    await servers.remove(A)
    await servers.tell(TOKEN, [ServerWeights(A, WeightState.SERVING, 1)])
    assert await wakes() == before + 4


async def test_operators_at_once_lose_no_server(servers: Servers):
    urls = [f"http://10.0.0.{i}:8000" for i in range(20)]
    await asyncio.gather(*(servers.add(RegisteredServer(url)) for url in urls))
    known, _ = await servers.read()
    assert sorted(known) == sorted(urls)


async def test_the_trainer_says_what_servers_hold_and_forgets_them(servers: Servers):
    rows = [
        ServerWeights(A, WeightState.REFITTING, 3, 1, until_ms=99, at_ms=5),
        ServerWeights(B, WeightState.STALE, 2, 1, why="it answered 500", at_ms=5),
    ]
    await servers.tell(TOKEN, rows)
    assert (await servers.read())[1] == {row.url: row for row in rows}
    await servers.tell(TOKEN, [ServerWeights(A, WeightState.SERVING, 4, 1)])
    await servers.forget(TOKEN, [B])
    assert (await servers.read())[1] == {A: ServerWeights(A, WeightState.SERVING, 4, 1)}


async def test_a_trainer_that_was_superseded_says_nothing_any_more(servers: Servers):
    await servers.tell(TOKEN, [ServerWeights(A, WeightState.SERVING, 4)])
    with pytest.raises(SupersededError):
        await servers.tell("trainer-0", [ServerWeights(A, WeightState.SERVING, 9)])
    with pytest.raises(SupersededError):
        await servers.forget("trainer-0", [A])
    with pytest.raises(SupersededError):
        await servers.check("trainer-0")
    await servers.check(TOKEN)
    assert (await servers.read())[1][A].version == 4


async def test_a_row_that_makes_no_sense_hides_no_other(rig: Rig, servers: Servers):
    await servers.add(RegisteredServer(A))
    await rig.client.hset(rig.keys.servers, "http://x:1", b"\xff no json")
    await rig.client.hset(rig.keys.weights, "http://x:1", b'{"state": "flying"}')
    await rig.client.hset(rig.keys.weights, "http://x:2", b'{"state": "serving", "new": 1}')
    known, weights = await servers.read()
    assert list(known) == [A]
    assert weights == {"http://x:2": ServerWeights("http://x:2", WeightState.SERVING)}
