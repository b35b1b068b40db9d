"""`rollfleet server`: what it writes, what it refuses, and what it shows of three sources."""

import asyncio
import dataclasses
import json
from typing import Any

from fixtures.rig import TOKEN, Rig
from rich.console import Console
from typer.testing import CliRunner, Result

from rollfleet_common.servers import RegisteredServer, Servers, ServerWeights, WeightState
from rollfleet_console.cli import app
from rollfleet_console.status.servers import gather, render_servers
from rollfleet_console.status.views import FleetServer, WorkerCard
from rollfleet_console.status.views import WorkerServer as Seen

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def card(name: str, *servers: Seen, state: str = "claiming") -> WorkerCard:
    return WorkerCard(name, "h", 1, "0", ("r",), 8, 0, servers, state, 3, 0, 0, 1.0, 9.0, 0)


def drawn(servers: tuple[FleetServer, ...]) -> str:
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(render_servers(servers))
    return captured.get()


def test_three_sources_stand_side_by_side() -> None:
    found = gather(
        {A: RegisteredServer(A, "vllm"), C: RegisteredServer(C, draining=True)},
        {
            A: ServerWeights(A, WeightState.SERVING, 4),
            "http://user:pw@b:1": ServerWeights(B, WeightState.STALE, 3, why="HTTP 500"),
        },
        [
            card("w0", Seen(A, "serving", 3, 4, limit=8), Seen(B, "stale", 0, 3, why="HTTP 500")),
            card("w1", Seen(A, "suspect", 2, 3, error="refused", limit=0)),
            card("w2", Seen(A, "dead", 9, 1, limit=9), state="lost"),
        ],
    )
    one, two, three = found
    assert dataclasses.asdict(one) == {
        "name": A,
        "registered": True,
        "engine": "vllm",
        "draining": False,
        "weights": "serving",
        "version": 4,
        "why": "refused",
        "states": {"serving": 1, "suspect": 1},
        "in_flight": 5,
        "limit": 8,
        "seen_versions": (3, 4),
    }
    assert (two.name, two.registered, two.weights, two.why) == (B, False, "stale", "HTTP 500")
    assert (three.draining, three.states, three.version) == (True, {}, None)
    shown = drawn(found)
    for said in ("1 serving, 1 suspect", "3-4", "refused", "stale", "draining", "nobody does"):
        assert said in shown
    assert "pw" not in shown
    assert "no inference server is known" in drawn(())


def test_a_large_fleet_is_summed_up() -> None:
    servers = {f"http://s{i}:1": RegisteredServer(f"http://s{i}:1") for i in range(40)}
    assert "8 more" in drawn(gather(servers, {}, []))


async def cli(url: str, *args: str) -> Result:
    env = {"ROLLFLEET_REDIS_URL": url, "ROLLFLEET_RUN": "rig", "COLUMNS": "120"}
    return await asyncio.to_thread(CliRunner().invoke, app, ["server", *args], env=env)


async def test_what_the_commands_write(rig: Rig, redis_url: str) -> None:
    registry = Servers(rig.client, rig.keys)

    async def known() -> dict[str, Any]:
        rows = (await registry.read())[0]
        return {url: (row.engine, row.draining) for url, row in rows.items()}

    assert (await cli(redis_url, "add", A + "/v1")).stdout == f"{A}: added\n"
    assert (await cli(redis_url, "add", A, "--engine", "sglang")).stdout.endswith("anew\n")
    assert await known() == {A: ("sglang", False)}
    assert (await cli(redis_url, "drain", A)).exit_code == 0
    # One that workers were started with is not registered: its drain is a row of its own.
    assert (await cli(redis_url, "drain", B)).exit_code == 0
    assert await known() == {A: ("sglang", True), B: ("auto", True)}
    assert "serves again" in (await cli(redis_url, "undrain", A)).stdout
    assert await known() == {A: ("sglang", False), B: ("auto", True)}
    await registry.tell(TOKEN, [ServerWeights(A, WeightState.SERVING, 4)])
    listed = await cli(redis_url, "list", "--json")
    assert [(row["name"], row["weights"]) for row in json.loads(listed.stdout)] == [
        (A, "serving"),
        (B, ""),
    ]
    assert A in (await cli(redis_url, "list")).stdout
    assert (await cli(redis_url, "remove", A)).stdout == f"{A}: removed\n"
    assert await known() == {B: ("auto", True)}


async def test_a_router_is_registered_with_the_servers_behind_it(rig: Rig, redis_url: str) -> None:
    registry = Servers(rig.client, rig.keys)
    assert (await cli(redis_url, "add", A, "--behind", f"{B}/v1, {C}")).exit_code == 0
    assert (await registry.read())[0][A].behind == (B, C)
    await cli(redis_url, "drain", A)
    await cli(redis_url, "undrain", A)
    (row,) = (await registry.read())[0].values()
    assert (row.draining, row.behind) == (False, (B, C))
    await registry.tell(TOKEN, [ServerWeights(B, WeightState.SERVING, 4)])
    listed = json.loads((await cli(redis_url, "list", "--json")).stdout)
    assert [(one["name"], one["why"]) for one in listed] == [(A, ""), (B, f"behind {A}")]


async def test_what_the_commands_refuse(rig: Rig, redis_url: str) -> None:
    for args, said in (
        (("add", "b:1"), "should be a URL such as"),
        (("add", "http://me:secret@b:1"), "a key belongs into the workers' api_key"),
        (("add", A, "--behind", "http://me:secret@b:1"), "a key belongs into the workers' api_key"),
        (("add", A, "--behind", "b:1"), "should be a URL such as"),
        (("add", A, "--behind", f"{B},{A}/"), "cannot stand behind itself"),
        (("undrain", A), "is not registered: see `rollfleet server list`"),
        (("remove", A), "One that workers were started with can be drained only"),
    ):
        done = await cli(redis_url, *args)
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert "secret" not in done.output
    assert (await Servers(rig.client, rig.keys).read())[0] == {}
