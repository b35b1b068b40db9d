"""The command `rollfleet`: run a worker, look at a fleet, see to its dead letters, try the demo.

- Errors of ours are one line on stderr and exit code 2; Ctrl-C is 130. A traceback is a defect.
- Nothing heavy is imported before a command is chosen: `rollfleet --help` answers at once, and
  torch is imported by the demo only.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rollfleet_common.errors import RollfleetError, SettingsError
from rollfleet_console.commands.dead import dead
from rollfleet_console.commands.doctor import doctor
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
from rollfleet_console.commands.server import server
from rollfleet_console.commands.simulate import simulate

__all__ = ["app", "main"]

#: Seconds that a health check waits for an answer.
CHECK_TIMEOUT_S = 3.0


class _Root(TyperGroup):
    """Says our errors in one line, for every command below."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RollfleetError as exc:
            tell(f"rollfleet: {exc}", err=True)
            raise typer.Exit(2) from exc


class _WorkerCommand(TyperCommand):
    """Adds the worker's settings, which are read by WorkerSettings, to the help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from rollfleet_console.commands.help import show_settings  # noqa: PLC0415  # heavy
        from rollfleet_worker.settings import WorkerSettings  # noqa: PLC0415  # heavy

        show_settings(WorkerSettings)


app = typer.Typer(
    cls=_Root,
    help="A fleet of rollout workers for asynchronous RL, on Redis streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dead, name="dead")
app.add_typer(server, name="server")
app.command()(doctor)
app.command()(simulate)


def main() -> None:
    """What the command runs."""
    app()


# ---- worker --------------------------------------------------------------------------------------


@app.command(
    cls=_WorkerCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[SETTINGS]",
)
def worker(
    ctx: typer.Context,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Ask the worker on this host whether it is ready: exit code 0 or 1."
        ),
    ] = False,
) -> None:
    """Claim prompts, run episodes, deliver rollouts, until SIGTERM."""
    # Until the daemon drains by itself it holds nothing: told to stop, it has drained already.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from rollfleet_worker.settings import WorkerSettings  # noqa: PLC0415  # heavy

    if check:
        # Which workflows run is no concern of a check, and may be known to the daemon's flags only.
        raise typer.Exit(_check(WorkerSettings.load(argv=ctx.args, workflows={"check": "no:One"})))
    settings = WorkerSettings.load(argv=ctx.args)
    from rollfleet_worker import daemon  # noqa: PLC0415  # heavy

    raise typer.Exit(daemon.run(settings))


def _check(settings: Any) -> int:
    import urllib.error  # noqa: PLC0415  # for this command only
    import urllib.request  # noqa: PLC0415

    host, port = str(settings.health_host), settings.health_port
    if not port:
        raise SettingsError(
            "--check needs a health_port that is known: --health-port, ROLLFLEET_HEALTH_PORT or "
            "the settings file, the same as the worker's"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # the other way round
    url = f"http://[{host}]:{port}/readyz" if ":" in host else f"http://{host}:{port}/readyz"
    # No proxy of the environment stands between a worker and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=CHECK_TIMEOUT_S):
            typer.echo("ready")
            return 0
    except urllib.error.HTTPError as exc:
        tell(f"not ready: {exc.read(200).decode('utf-8', 'replace').strip() or exc}")
    except OSError as exc:
        typer.echo(f"not ready: {url} does not answer ({getattr(exc, 'reason', exc)})")
    return 1


# ---- status --------------------------------------------------------------------------------------


@app.command()
def status(
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Look at a whole fleet once: where every prompt is, who works, and why it waits."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console.status.snapshot import take  # noqa: PLC0415  # heavy

    if watch:
        if as_json:
            raise SettingsError("--watch draws on a terminal: it does not go with --json")
        from rollfleet_console.status.watch import watch_run  # noqa: PLC0415  # heavy

        ask(settings, lambda client, name: watch_run(client, name, interval))
        return
    snapshot = ask(settings, take)
    if as_json:
        print_json(snapshot.to_json())
        return
    from rollfleet_console.status.render import render  # noqa: PLC0415  # heavy

    show(render(snapshot))


@app.command()
def mend(redis_url: RedisUrl = None, run: Run = None, config: Config = None) -> None:
    """Make streams take entries again that were given the highest id there is; doctor names them.

    Needs an administrator's URL. Nothing that is in them is lost.
    """
    settings = settings_of(redis_url, run, config)
    from rollfleet_console.doctor.streams import mend as mended  # noqa: PLC0415  # heavy

    streams = ask(settings, mended)
    for name, kept in streams:
        tell(f"{name}: built anew, {kept:,} entries kept")
    if not streams:
        tell("no stream needs mending")


# ---- demo, version -------------------------------------------------------------------------------


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(help="Training steps.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    kill_worker_at: Annotated[
        int | None, typer.Option(help="Kill a worker with -9 at this step.", metavar="STEP")
    ] = None,
    max_staleness: Annotated[
        int | None, typer.Option(help="Versions behind; 0 trains synchronously.", min=0)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="What is done about the stale: drop, mask, wait, standard, segment."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.", min=1)] = None,
    engine: Annotated[
        str | None, typer.Option(help="Inference servers: tiny (our own) or vllm (the real one).")
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(help="The vllm command; by default the one of `make vllm`.", metavar="PATH"),
    ] = None,
    servers: Annotated[int | None, typer.Option(help="Inference servers.", min=1)] = None,
    kill_server_at: Annotated[
        int | None,
        typer.Option(help="Kill an inference server with -9 at this step.", metavar="STEP"),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="End at this reward, as a mean of 10 steps.", min=0, max=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for picture and logs.")] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep", help="Leave logs and weights in that folder.")
    ] = None,
) -> None:
    """Train a small model on one machine, with a real fleet, until its reward has risen."""
    given = {
        "steps": steps,
        "seed": seed,
        "report": report,
        "kill_worker_at": kill_worker_at,
        "max_staleness": max_staleness,
        "policy": policy,
        "workers": workers,
        "engine": engine,
        "vllm": vllm,
        "servers": servers,
        "kill_server_at": kill_server_at,
        "target": target,
        "out": out,
        "keep": keep,
    }
    try:
        job = importlib.import_module("rollfleet_demo.job")
        code = job.main({k: v for k, v in given.items() if v is not None})
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("rollfleet"):
            raise
        raise SettingsError(f'the demo needs {exc.name}: pip install "rollfleet[demo]"') from exc
    raise typer.Exit(code or 0)


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="File to write; it must not exist.", metavar="FILE")],
    redis_url: RedisUrl = None,
    run: Run = None,
    config: Config = None,
    seconds: Annotated[
        float | None, typer.Option(help="Stop after so long; else at Ctrl-C.", min=0.0)
    ] = None,
    max_mib: Annotated[int, typer.Option(help="Stop at a file of so many MiB.", min=1)] = 1024,
) -> None:
    """Write the rollouts that a live run trains on or drops to a file, for rollfleet.replay."""
    settings = settings_of(redis_url, run, config)
    from rollfleet_console.record import run_recording  # noqa: PLC0415  # heavy

    ask(settings, lambda c, name: run_recording(c, name, out, seconds, max_mib << 20))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed  # noqa: PLC0415  # for this command only

    typer.echo(f"rollfleet {installed('rollfleet')} (Python {sys.version.split()[0]})")
