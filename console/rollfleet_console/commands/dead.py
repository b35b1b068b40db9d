"""`rollfleet dead list|show|retry|purge`.

- Nothing is deleted without being asked for by name, or a question answered.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

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
    tell,
)

if TYPE_CHECKING:
    from rollfleet_console.dead_letters import DeadLetter

__all__ = ["dead"]

dead = typer.Typer(help="Dead letters: prompts that ran out of attempts.", no_args_is_help=True)


class Cause(StrEnum):
    """What ends a prompt: the kinds of failure, and bytes that are no prompt."""

    INFRA = "infra"
    DATA = "data"
    TIMEOUT = "timeout"
    POISON = "poison"
    GARBAGE = "garbage"


Ids = Annotated[list[str] | None, typer.Argument(help="Ids of dead letters.", metavar="ID...")]
Why = Annotated[Cause | None, typer.Option(help="Only those that died of this.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dead.command("list")
def dead_list(
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    why: Why = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """List dead letters, the newest first."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console import dead_letters as d  # noqa: PLC0415  # heavy

    # One more than is shown, to know whether there are more.
    letters = ask(settings, lambda c, name: d.select(c, name, why=why, limit=limit + 1))
    if as_json:
        print_json([d.to_json(letter, whole=False) for letter in letters[:limit]])
        return
    show(d.render_list(letters[:limit]))
    if len(letters) > limit:
        typer.echo(f"... and more: --limit {limit * 10}")


@dead.command("show")
def dead_show(
    letter_id: Annotated[str, typer.Argument(help="Id of a dead letter.", metavar="ID")],
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter: its prompt, and the history of its attempts."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console import dead_letters as d  # noqa: PLC0415  # heavy

    (letter,) = ask(settings, lambda client, name: d.find(client, name, [letter_id]))
    if as_json:
        print_json(d.to_json(letter, whole=True))
    else:
        show(d.render_letter(letter))


@dead.command("retry")
def dead_retry(
    ids: Ids = None,
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    why: Why = None,
) -> None:
    """Submit dead prompts again, each as a new group of one sample."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console import dead_letters as d  # noqa: PLC0415  # heavy

    _chosen(ids, "--all", every)

    async def again(client: Any, name: str) -> tuple[int, int, int]:
        retried, refused = 0, 0
        letters = await d.select(client, name, ids=ids or (), why=why)
        for letter in letters:
            if letter.prompt is None and every:
                refused += 1
                continue
            new = await d.retry(client, name, letter)
            retried += 1
            said = f"submitted again as group {letter.retry_group}" if new else "was known already"
            tell(f"{letter.id}: {said}")
        return len(letters), retried, refused

    total, retried, refused = ask(settings, again)
    left = f"; {refused} without a readable prompt can only be purged" if refused else ""
    typer.echo(f"{retried} of {_count(total)} retried{left}")


@dead.command("purge")
def dead_purge(
    ids: Ids = None,
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    older_than: Annotated[
        str | None, typer.Option(help="Those older than this: 90s, 12h, 7d.", metavar="TIME")
    ] = None,
    why: Why = None,
    yes: Yes = False,
) -> None:
    """Delete dead letters for good."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_common.units import parse_seconds  # noqa: PLC0415  # heavy
    from rollfleet_console import dead_letters as d  # noqa: PLC0415  # heavy

    _chosen(ids, "--all or --older-than", every or older_than is not None)
    older_than_s = None if older_than is None else parse_seconds(older_than, "--older-than")

    async def chosen(client: Any, name: str) -> "list[DeadLetter]":
        return await d.select(client, name, ids=ids or (), why=why, older_than_s=older_than_s)

    letters = ask(settings, chosen)
    if letters and not yes:
        typer.confirm(
            f"Delete {_count(len(letters))} of run {settings.run!r} for good?", abort=True
        )
    gone = ask(settings, lambda client, name: d.purge(client, name, letters))
    typer.echo(f"{_count(gone)} deleted")


def _count(n: int) -> str:
    return "1 dead letter" if n == 1 else f"{n:,} dead letters"


def _chosen(ids: list[str] | None, options: str, given: bool) -> None:
    if bool(ids) == given:
        raise SettingsError(f"give either ids or {options}{', not both' if given else ''}")
