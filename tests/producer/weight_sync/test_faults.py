"""Refits when hosts go dark, Redis is away, heals are in the way, or another trainer took the run."""

import asyncio
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fixtures.fake_control import ControlledVllm
from fixtures.refits import Board, Make, fakes, make, rows, states
from fixtures.rig import Rig
from redis.exceptions import ConnectionError as RedisConnectionError
from support import wait_until_async

from rollfleet.settings import TrainerSettings
from rollfleet.weight_sync.coordinator import Refits
from rollfleet.weight_sync.repair import Repairer
from rollfleet.weight_sync.update import Meeting
from rollfleet_common import tasks
from rollfleet_common.errors import RefitError, SupersededError
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_engines import control as drivers
from rollfleet_engines.control import Weights
from rollfleet_engines.control_http import ControlClient

__all__ = ["fakes", "make"]

SERVING, STALE = WeightState.SERVING, WeightState.STALE
NEW, NEWER = Weights(3, "/weights/v3"), Weights(4, "/weights/v4")


async def heal_until_it_loads(refits: Refits, fake: ControlledVllm) -> asyncio.Event:
    """Have the healer refit `fake`, whose load hangs until the event that is returned."""
    gate = asyncio.Event()
    fake.faults["/collective_rpc"] = gate
    assert refits.current is not None
    await Repairer(refits).look(refits.current)
    await wait_until_async(lambda: "/collective_rpc" in fake.routes, "the healer's reload")
    del fake.faults["/collective_rpc"]
    return gate


# ---- hosts -------------------------------------------------------------------------------------


@contextmanager
def dark(url: str) -> Iterator[None]:
    """A host that answers no connection at all, at the address of a server that was stopped."""
    address = urlsplit(url).hostname, urlsplit(url).port
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with suppress(BlockingIOError):
                filler.connect(address)
        yield


async def test_a_host_that_goes_dark_is_stale_and_the_others_are_refitted(
    make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drivers, "CONNECT_S", 0.3)
    refits = make(fakes)
    await refits.publish(NEW, Board())
    await fakes[0].stop()
    with dark(fakes[0].url):
        await refits.publish(NEWER, Board())
    told = await rows(refits)
    assert (told[fakes[0].url].state, told[fakes[0].url].version) == (STALE, 3)
    assert "cannot be reached" in told[fakes[0].url].why
    assert [told[fake.url].version for fake in fakes[1:]] == [4, 4]


async def test_more_servers_than_connections_of_a_pool_are_refitted_at_once(make: Make):
    n, loading, all_load = 105, set[str](), asyncio.Event()
    tags: dict[str, str] = {}
    paused: set[str] = set()

    async def handle(request: web.Request) -> web.Response:
        name, route = request.match_info["name"], request.match_info["route"]
        if route == "model_info":
            return web.Response(status=404)
        if route == "pause":
            paused.add(name)
        elif route == "resume":
            paused.discard(name)
        elif route == "update_weight_version":
            tags[name] = (await request.json())["new_version"]
        elif route == "collective_rpc":
            loading.add(name)
            if len(loading) == n:
                all_load.set()
            await all_load.wait()
        return web.json_response({"version": "0.32", "weight_version": tags.get(name)})

    app = web.Application()
    app.router.add_route("*", "/{name}/{route}", handle)
    server = TestServer(app)
    await server.start_server(backlog=512)
    refits = make([], refit_s=8.0)
    base = str(server.make_url("/"))
    refits.settings = TrainerSettings(servers=[f"{base}s{i}" for i in range(n)], refit_s=8.0)
    await refits.publish(NEW, Board())
    assert set((await states(refits)).values()) == {(SERVING, 3)}
    assert not paused
    await refits.close()
    await server.close()


@pytest.mark.parametrize("with_key", [True, False])
async def test_what_a_server_repeats_of_our_secrets_is_not_quoted(with_key: bool):
    async def repeat(request: web.Request) -> web.Response:
        return web.Response(status=500, text=f"s3cret p%40ss p@ss {dict(request.headers)}")

    app = web.Application()
    app.router.add_post("/pause", repeat)
    server = TestServer(app)
    await server.start_server()
    url = f"http://user:p%40ss@127.0.0.1:{server.port}"
    async with aiohttp.ClientSession() as session:
        control = ControlClient(session, url, api_key="s3cret" if with_key else None)
        with pytest.raises(RefitError, match="/pause answered 500") as caught:
            await control.post("/pause")
    await server.close()
    said = str(caught.value)
    assert "***" in said
    hidden = ["p%40ss", "p@ss", "dXNlcjpwQHNz", *(["s3cret"] if with_key else [])]
    assert [secret for secret in hidden if secret in said] == []


# ---- heals and publishes -----------------------------------------------------------------------


async def test_a_publish_begins_when_what_was_healed_goes_on(
    make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    fake, refits = fakes[0], make(fakes[:1])
    await refits.publish(NEW, Board())
    await fake.restart()
    loads = await heal_until_it_loads(refits, fake)
    # A busy engine: what it generates is ended when the load is over.
    aborts = fake.faults["/abort_requests"] = asyncio.Event()
    publishing = asyncio.create_task(refits.publish(NEWER, Board()))
    await wait_until_async(
        lambda: all(task.done() for task in refits.healing.values()), "the heal to be cancelled"
    )
    for _ in range(20):
        await states(refits)  # whoever does not wait goes on meanwhile
    aborts.set()
    loads.set()
    await publishing
    healed = ["/pause", "/collective_rpc", "/abort_requests", "/resume"]
    anew = ["/pause", "/collective_rpc", "/update_weight_version", "/resume"]
    assert fake.routes == healed + anew
    assert await states(refits) == {fake.url: (SERVING, 4)}


async def test_a_server_that_is_being_resumed_is_not_healed(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes[:1])
    await refits.publish(NEW, Board())
    await fakes[0].restart()
    going_on = refits.resuming[fakes[0].url] = asyncio.create_task(asyncio.sleep(0, ""))
    await Repairer(refits).look(NEW)
    assert refits.healing == {}
    await going_on
    refits.resuming.clear()


async def test_a_transfer_takes_all_servers_from_the_healer(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes[:2])
    await refits.publish(NEW, Board())
    await fakes[0].restart()
    gate = await heal_until_it_loads(refits, fakes[0])
    seen: list[Any] = []

    async def transfer() -> None:
        seen.append((refits.busy, fakes[0].paused, [t.done() for t in refits.healing.values()]))
        await Repairer(refits).look(NEW)

    await refits.hands_off(transfer)
    gate.set()
    await asyncio.gather(*refits.healing.values(), return_exceptions=True)
    assert seen == [(True, False, [True, True])]
    assert (await rows(refits), refits.current) == ({}, None)
    assert fakes[0].routes.count("/pause") == 1


async def test_a_transfer_that_fails_leaves_the_servers_to_the_healer(
    make: Make, fakes: list[ControlledVllm]
):
    async def transfer() -> None:
        raise ConnectionError("the ring broke")

    refits = make(fakes[:1])
    await refits.publish(NEW, Board())
    with pytest.raises(ConnectionError):
        await refits.hands_off(transfer)
    assert (refits.current, refits.busy) == (NEW, False)
    assert await states(refits) == {fakes[0].url: (SERVING, 3)}


async def test_a_publish_that_begins_while_the_healer_forgets_has_the_servers(
    make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    refits = make(fakes[:2])
    await refits.publish(NEW, Board())
    await fakes[0].restart()
    forget = refits.forget

    async def publish_begins(urls: Any) -> None:
        await forget(urls)
        refits.busy = True

    monkeypatch.setattr(refits, "forget", publish_begins)
    await Repairer(refits).look(NEW)
    assert refits.healing == {}


# ---- Redis -------------------------------------------------------------------------------------


async def test_a_row_that_redis_did_not_take_for_long_still_has_all_of_its_time(
    make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    refits = make(fakes[:1], refit_s=1.0)
    tell, late_s = refits.servers.tell, 0.0
    told: list[tuple[ServerWeights, float]] = []

    async def away(token: str, given: Sequence[ServerWeights]) -> None:
        nonlocal late_s
        if not late_s:
            late_s = 3600.0
            raise RedisConnectionError("away")
        told.extend((row, time.time() * 1000) for row in given)
        await tell(token, given)

    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + late_s)
    monkeypatch.setattr(refits.servers, "tell", away)
    await refits.publish(NEW, Board())
    assert [row.state for row, _ in told] == [WeightState.REFITTING, SERVING]
    begun, at_ms = told[0]
    assert begun.until_ms - at_ms > 1000
    assert at_ms - begun.at_ms < 60_000


# ---- another trainer ---------------------------------------------------------------------------


async def test_a_trainer_that_was_superseded_after_its_row_touches_nothing(
    rig: Rig, make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    refits = make(fakes)
    begin = refits.begin

    async def frozen(urls: Any) -> None:
        await begin(urls)
        await rig.open("trainer-2")

    monkeypatch.setattr(refits, "begin", frozen)
    with pytest.raises(SupersededError):
        await refits.publish(NEW, Board())
    assert [fake.calls for fake in fakes] == [[], [], []]


async def test_a_trainer_that_was_superseded_while_it_paused_loads_nothing(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    gate = fakes[0].faults["/pause"] = asyncio.Event()
    publishing = asyncio.create_task(make(fakes[:1]).publish(NEW, Board()))
    await wait_until_async(lambda: fakes[0].routes == ["/pause"], "the pause")
    await rig.open("trainer-2")
    gate.set()
    with pytest.raises(SupersededError):
        await publishing
    # The other one resumes it: it may be loading by now.
    assert fakes[0].routes == ["/pause"]


async def test_what_a_superseded_trainer_loaded_is_tagged_for_the_other_to_heal(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    gate = fakes[0].faults["/collective_rpc"] = asyncio.Event()
    refits = make(fakes[:1])
    publishing = asyncio.create_task(refits.publish(NEW, Board()))
    await wait_until_async(lambda: "/collective_rpc" in fakes[0].routes, "the reload")
    await rig.open("trainer-2")
    gate.set()
    with pytest.raises(SupersededError):
        await publishing
    assert fakes[0].version == "superseded"
    assert "/resume" not in fakes[0].routes


async def test_a_superseded_healer_resumes_no_server(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes[:1])
    await refits.publish(NEW, Board())
    await rig.open("trainer-2")
    fakes[0].paused = True  # by trainer-2
    await Repairer(refits).look(NEW)
    with pytest.raises(SupersededError):
        await asyncio.gather(*refits.healing.values())
    assert fakes[0].paused


async def test_a_run_that_redis_lost_stops_no_refit(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes[:1])
    await refits.publish(NEW, Board())
    before = await rig.client.hgetall(rig.keys.board)
    fakes[0].paused = True
    await rig.client.delete(rig.keys.board)
    await Repairer(refits).look(NEW)
    await asyncio.gather(*refits.healing.values())
    assert not fakes[0].paused
    await rig.client.hset(rig.keys.board, mapping=before)


# ---- transfers ---------------------------------------------------------------------------------


async def test_who_gave_up_waiting_is_in_no_transfer():
    moved: list[Any] = []

    async def load(version: int, urls: Sequence[str]) -> None:
        moved.append((version, list(urls)))

    meeting = Meeting(load, 3, ["a", "b", "c"])
    early = asyncio.create_task(meeting.come("a"))
    await asyncio.sleep(0)
    early.cancel()
    await asyncio.wait({early})
    meeting.leave("a")
    meeting.leave("c")
    await meeting.come("b")
    meeting.leave("b")
    assert moved == [(3, ["b"])]
