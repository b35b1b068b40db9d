"""`rollfleet doctor`: the command."""

from typing import Annotated

import typer

from rollfleet_common.errors import BrokerError
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

__all__ = ["doctor"]


def doctor(
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    lease: Annotated[
        str, typer.Option(help="The workers' lease_s, if it is not the default.", metavar="TIME")
    ] = "30s",
    as_json: Json = False,
) -> None:
    """Examine a run and its Redis, and say what to do; changes nothing, safe on a live run.

    Exit code: 0 all is well, 1 warnings, 2 errors, 3 Redis cannot be reached or refuses us.
    """
    settings = settings_of(redis_url, run, config)
    from rollfleet_common.units import parse_seconds  # noqa: PLC0415  # heavy
    from rollfleet_console.doctor import examine as d  # noqa: PLC0415  # heavy

    lease_s = parse_seconds(lease, "--lease")
    try:
        report = ask(settings, lambda client, name: d.examine(client, name, lease_s=lease_s))
    except BrokerError as exc:
        tell(f"rollfleet: {exc}", err=True)
        raise typer.Exit(d.UNREACHABLE) from exc
    if as_json:
        print_json(report.to_json())
    else:
        show(d.render(report))
    raise typer.Exit(report.exit_code)
