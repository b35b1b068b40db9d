"""The command `rollfleet simulate`: its options, and what it does with them."""

# ruff: noqa: ARG001  # a scenario has a flag for each of its fields, read by name from the context

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rollfleet_common.errors import SettingsError
from rollfleet_console.commands.options import Json, print_json, show
from rollfleet_console.simulate.scenario import REFERENCE, Scenario

__all__ = ["simulate"]

_R = REFERENCE


def simulate(
    ctx: typer.Context,
    slots: Annotated[int, typer.Option(help="Rollouts at once, over all workers.")] = _R.slots,
    samples_per_version: Annotated[
        int, typer.Option(help="Samples that one version is trained on.")
    ] = _R.samples_per_version,
    group_size: Annotated[int, typer.Option(help="Samples of a prompt.")] = _R.group_size,
    max_staleness: Annotated[
        int, typer.Option(help="Versions that the oldest token may be behind.")
    ] = _R.max_staleness,
    pipeline_depth: Annotated[
        int | None, typer.Option(help="Versions started ahead.", show_default="max-staleness")
    ] = None,
    min_group_size: Annotated[
        int | None, typer.Option(help="Train on torn groups of so many.", show_default="whole only")
    ] = None,
    oversample: Annotated[
        int, typer.Option(help="Samples launched beyond a group, to take the first.")
    ] = _R.oversample,
    median_s: Annotated[float, typer.Option(help="Median duration of a rollout.")] = _R.median_s,
    sigma: Annotated[float, typer.Option(help="Spread: of the log of durations.")] = _R.sigma,
    group_correlation: Annotated[
        float, typer.Option(help="Of the log-durations within a group, 0 to 1.")
    ] = _R.group_correlation,
    tokens_per_s: Annotated[float, typer.Option(help="Speed of one slot.")] = _R.tokens_per_s,
    max_tokens: Annotated[
        int | None, typer.Option(help="Budget of a rollout.", show_default="none")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="JSON lines with duration_s (tokens, group) of a real run.")
    ] = None,
    train_s: Annotated[float, typer.Option(help="One train step.")] = _R.train_s,
    update_s: Annotated[float, typer.Option(help="One weight update.")] = _R.update_s,
    pause: Annotated[
        bool, typer.Option("--pause/--no-pause", help="Generation stands still in an update.")
    ] = _R.pause,
    failure_rate: Annotated[
        float, typer.Option(help="Chance that an attempt fails.")
    ] = _R.failure_rate,
    retry_s: Annotated[float, typer.Option(help="Delay of a retry.")] = _R.retry_s,
    attempts: Annotated[int, typer.Option(help="Attempts before a sample dies.")] = _R.attempts,
    early_cancel: Annotated[
        bool, typer.Option("--early-cancel/--no-early-cancel", help="Stop what is hopeless.")
    ] = _R.early_cancel,
    renew_s: Annotated[float, typer.Option(help="Between lease renewals.")] = _R.renew_s,
    pacing_only: Annotated[
        bool, typer.Option("--pacing-only", help="Judge nothing: admission alone.")
    ] = False,
    versions: Annotated[int, typer.Option(help="Versions to measure.")] = _R.versions,
    warm_up: Annotated[
        int | None, typer.Option(help="Versions before that.", show_default="by depth")
    ] = None,
    starve_s: Annotated[
        float, typer.Option(help="Longest simulated wait for a batch.")
    ] = _R.starve_s,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _R.seed,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Run the table: some minutes. Needs --out.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the sweep's JSON and PNG.")] = None,
    charts: Annotated[bool, typer.Option("--charts/--no-charts", help="Draw the sweep.")] = True,
) -> None:
    """Simulate a fleet on a virtual clock: what staleness, slots and pipeline depth would bring."""
    given = {field.name: ctx.params[field.name] for field in fields(Scenario)}
    scenario = replace(_R, **given)
    if sweep:
        tree, drawn = _sweep(scenario, lengths, out, charts=charts)
    else:
        tree, drawn = _one(scenario, lengths)
    if report is not None:
        _write(report, tree)
    if as_json:
        print_json(tree)
    else:
        show(drawn)


def _one(scenario: Scenario, lengths: Path | None) -> tuple[dict[str, Any], Any]:
    from rollfleet_console.simulate.report import render  # noqa: PLC0415  # heavy
    from rollfleet_console.simulate.run import compare, lengths_of  # noqa: PLC0415  # heavy

    comparison = compare(scenario, lengths_of(scenario, lengths))
    return comparison.to_json(), render(comparison)


def _sweep(
    scenario: Scenario, lengths: Path | None, out: Path | None, *, charts: bool
) -> tuple[dict[str, Any], Any]:
    from rollfleet_console.simulate import sweep as table  # noqa: PLC0415  # heavy
    from rollfleet_console.simulate.charts import draw, need_matplotlib  # noqa: PLC0415  # heavy
    from rollfleet_console.simulate.report import render_sweep  # noqa: PLC0415  # heavy

    if out is None:
        raise SettingsError("--sweep needs --out: a folder for its JSON and charts")
    if lengths is not None:
        raise SettingsError("--sweep varies sigma: it does not go with --lengths")
    if charts:
        need_matplotlib()  # said before the minutes, not after
    swept = table.sweep(scenario, _progress if sys.stderr.isatty() else None)
    _write(out / "simulate.json", swept)
    if charts:
        draw(swept, out)
    return swept, render_sweep(swept, scenario)


def _progress(done: int, of: int) -> None:
    sys.stderr.write(f"\r{done} of {of} runs" + ("\n" if done == of else ""))
    sys.stderr.flush()


def _write(path: Path, tree: Any) -> None:
    import json  # noqa: PLC0415  # for this command only

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
