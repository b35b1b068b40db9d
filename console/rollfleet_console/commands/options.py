"""How a command finds its run: the options that say where it is, and one visit to its Redis.

- Flags win over variables and the TOML file, as everywhere.
- What Redis says wrong is named as an error of ours, its password masked.
"""

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import unquote

import typer

from rollfleet_common.errors import SettingsError

if TYPE_CHECKING:
    from rollfleet_common.settings import Settings

__all__ = ["Config", "Json", "RedisUrl", "Run", "ask", "print_json", "settings_of", "show", "tell"]

T = TypeVar("T")

#: Columns of what is not wrapped.
UNWRAPPED = 10_000

RedisUrl = Annotated[
    str | None, typer.Option(help="Where Redis is; also ROLLFLEET_REDIS_URL.", metavar="URL")
]
Run = Annotated[str | None, typer.Option(help="Which run; also ROLLFLEET_RUN.", metavar="NAME")]
Config = Annotated[
    Path | None, typer.Option(help="TOML file that says both; also ROLLFLEET_CONFIG.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_of(redis_url: str | None, run: str | None, config: Path | None) -> "Settings":
    """Which run is meant."""
    from rollfleet_common.settings import Settings  # noqa: PLC0415  # heavy

    given = {"redis_url": redis_url, "run": run}
    return Settings.load(config=config, **{k: v for k, v in given.items() if v is not None})


def ask(settings: "Settings", call: Callable[[Any, str], Awaitable[T]]) -> T:
    """What `call(client, run)` returns.

    Raises:
        BrokerError: What Redis said, or that it cannot be reached.
        SettingsError: The URL cannot be used.
    """
    import asyncio  # noqa: PLC0415  # heavy

    from redis.exceptions import RedisError  # noqa: PLC0415  # heavy

    from rollfleet_common.embedded import resolve  # noqa: PLC0415  # heavy
    from rollfleet_common.redis import connect, translate  # noqa: PLC0415  # heavy

    scheme, _, where = settings.redis_url.partition("?")[0].partition("://")
    if (
        scheme == "embedded"
        and "#" not in where
        and not (where.strip("/") and Path(unquote(where)).is_dir())
    ):
        raise SettingsError(
            f"{settings.redis_url!r} names no directory that is there: no trainer has started its "
            "server yet, or the path is another (embedded:///path/to/dir); this command starts none"
        )
    url, server = resolve(settings.redis_url)

    async def asked() -> T:
        async with connect(url, role="console") as client:
            return await call(client, settings.run)

    try:
        return asyncio.run(asked())
    except (RedisError, OSError) as exc:
        raise translate(exc, url) from exc
    finally:
        if server is not None:
            server.stop()


def print_json(tree: Any) -> None:
    """For programs."""
    from rollfleet_common.text import json_safe  # noqa: PLC0415  # heavy

    typer.echo(json.dumps(json_safe(tree), indent=2, ensure_ascii=False))


def show(what: Any) -> None:
    """For people: anything that rich can draw, as wide as the terminal.

    What goes into a file or a pipe is not wrapped, unless COLUMNS says how wide it should be.
    """
    from rich.console import Console  # noqa: PLC0415  # heavy
    from rich.segment import Segment, Segments  # noqa: PLC0415  # heavy

    from rollfleet_common.text import printable  # noqa: PLC0415  # heavy

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=UNWRAPPED)
    # Names and reasons were made printable before they were laid out; this holds for all the rest.
    drawn = [
        segment if segment.control else Segment(_kept(segment.text, printable), segment.style)
        for segment in console.render(what)
    ]
    console.print(Segments(drawn), end="", soft_wrap=True)


def _kept(text: str, printable: Callable[..., str]) -> str:
    return printable(text, len(text), lines=True)


def tell(text: str, *, err: bool = False) -> None:
    """One line for people, made safe for a terminal."""
    from rollfleet_common.text import printable  # noqa: PLC0415  # heavy

    typer.echo(printable(text, lines=True), err=err)
