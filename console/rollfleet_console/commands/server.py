"""`rollfleet server add|drain|undrain|remove|list`: which inference servers a run has, while it runs.

- Workers follow within a second; nobody is restarted.
- What runs on a server that drains or was removed ends there.
- A server that workers were started with (`--server`) is theirs: it can be drained, not removed.
"""

from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from rollfleet_common.errors import SettingsError
from rollfleet_console.commands.options import (
    Config,
    Json,
    RedisUrl,
    Run,
    ask,
    print_json,
    settings_of,
    show,
)

__all__ = ["server"]

server = typer.Typer(help="Inference servers of a live run.", no_args_is_help=True)


class EngineChoice(StrEnum):
    """What a server may run."""

    AUTO = "auto"
    VLLM = "vllm"
    SGLANG = "sglang"
    OPENAI = "openai"


Url = Annotated[str, typer.Argument(help="Where it is: http://host:port.", metavar="URL")]


def _registry(client: Any, run: str) -> Any:
    from rollfleet_common.keys import RunKeys, check_name  # noqa: PLC0415  # heavy
    from rollfleet_common.servers import Servers  # noqa: PLC0415  # heavy

    return Servers(client, RunKeys(check_name(run, "the run")))


def _row(url: str, engine: EngineChoice, *, draining: bool = False, behind: str = "") -> Any:
    from rollfleet_common.servers import RegisteredServer, server_url  # noqa: PLC0415  # heavy

    others = tuple(server_url(one) for one in behind.split(",") if one.strip())
    return RegisteredServer(server_url(url), engine.value, draining, behind=others)


async def _add(client: Any, run: str, row: Any) -> bool:
    """Register `row`, dated by Redis's clock; returns whether it is a new one."""
    seconds, micros = await client.time()
    dated = replace(row, added_ms=int(seconds) * 1000 + int(micros) // 1000)
    return bool(await _registry(client, run).add(dated))


@server.command("add")
def server_add(
    url: Url,
    engine: Annotated[
        EngineChoice, typer.Option(help="What it runs; auto asks it.")
    ] = EngineChoice.AUTO,
    behind: Annotated[
        str,
        typer.Option(
            help="It is a router: the servers behind it, which the trainer refits in its place.",
            metavar="URL,URL",
        ),
    ] = "",
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
) -> None:
    """Register a server: workers use it as soon as it answers and holds the run's weights."""
    row = _row(url, engine, behind=behind)
    settings = settings_of(redis_url, run, config)
    new = ask(settings, lambda client, name: _add(client, name, row))
    typer.echo(f"{row.url}: {'added' if new else 'registered anew'}")


@server.command("drain")
def server_drain(
    url: Url, redis_url: RedisUrl = None, run: Run = None, config: Config = None
) -> None:
    """Send a server nothing new; what runs there ends."""
    row = _row(url, EngineChoice.AUTO, draining=True)

    async def drain(client: Any, name: str) -> bool:
        registry = _registry(client, name)
        known: bool = await registry.drain(row.url)
        # One that workers were started with is drained by a row of its own.
        return known or await _add(client, name, row)

    ask(settings_of(redis_url, run, config), drain)
    typer.echo(f"{row.url}: draining")


@server.command("undrain")
def server_undrain(
    url: Url, redis_url: RedisUrl = None, run: Run = None, config: Config = None
) -> None:
    """Send a drained server work again."""
    row = _row(url, EngineChoice.AUTO)
    known = ask(
        settings_of(redis_url, run, config),
        lambda client, name: _registry(client, name).drain(row.url, draining=False),
    )
    if not known:
        raise SettingsError(f"server {row.url!r} is not registered: see `rollfleet server list`")
    typer.echo(f"{row.url}: serves again")


@server.command("remove")
def server_remove(
    url: Url, redis_url: RedisUrl = None, run: Run = None, config: Config = None
) -> None:
    """Forget a server; what runs there ends."""
    row = _row(url, EngineChoice.AUTO)
    known = ask(
        settings_of(redis_url, run, config),
        lambda client, name: _registry(client, name).remove(row.url),
    )
    if not known:
        raise SettingsError(
            f"server {row.url!r} is not registered: see `rollfleet server list`. One that workers "
            "were started with can be drained only"
        )
    typer.echo(f"{row.url}: removed")


@server.command("list")
def server_list(
    redis_url: RedisUrl = None, run: Run = None, config: Config = None, as_json: Json = False
) -> None:
    """List the servers: how workers see each, which weights it holds, and why it is out."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console.status.servers import render_servers  # noqa: PLC0415  # heavy
    from rollfleet_console.status.snapshot import take  # noqa: PLC0415  # heavy

    snapshot = ask(settings, take)
    if as_json:
        print_json(snapshot.to_json()["servers"])
    else:
        show(render_servers(snapshot.servers))
