"""``python -m chaos run | faults | mutants``, and the programs that these start."""

import argparse
import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """The command; returns the exit code: 0 if every promise was kept."""
    if argv[:1] == ["worker"]:
        _end_with_parent()
        from chaos.worker import main as worker  # noqa: PLC0415 - mutants come before imports

        return worker(argv[1:])
    if argv[:1] == ["trainer"]:
        _end_with_parent()
        from chaos.trainer import main as trainer  # noqa: PLC0415 - as above

        return trainer(argv[1:])
    options = _parser().parse_args(argv)
    # Either way the stage is left by its door, and ends its processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(options.do(options))
    except KeyboardInterrupt:
        return 130


def _end_with_parent() -> None:
    """Be killed with the program that started us, also when that one is killed with -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="a seeded storm of faults, judged")
    run.add_argument("--seconds", type=float, default=60.0)
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--workers", type=int, default=4)
    run.add_argument("--aof", choices=("always", "everysec"), default="always")
    run.add_argument("--json", type=Path)
    run.add_argument("--keep", type=Path, help="where logs of a run that failed are copied")
    run.set_defaults(do=_run)
    faults = commands.add_parser("faults", help="the fault matrix, row by row")
    faults.add_argument("--only", action="append", help="a row; may be given again")
    faults.add_argument("--json", type=Path)
    faults.add_argument("--table", type=Path, help="the page whose table is to be regenerated")
    faults.add_argument("--list", action="store_true")
    faults.set_defaults(do=_faults)
    planted = commands.add_parser("mutants", help="planted bugs, which must be caught")
    planted.add_argument("--only", action="append", help="a promise; may be given again")
    planted.set_defaults(do=_mutants)
    return parser


def _run(options: Any) -> int:
    from chaos.driver import run  # noqa: PLC0415 - each command imports its own

    report = run(
        seconds=options.seconds,
        seed=options.seed,
        workers=options.workers,
        aof=options.aof,
        out=options.json,
        keep=options.keep,
    )
    _print_verdicts(report["verdicts"])
    print(json.dumps({k: v for k, v in report.items() if k != "verdicts"}, indent=1))
    return 0 if report["ok"] else 1


def _faults(options: Any) -> int:
    from chaos import faults, table  # noqa: PLC0415

    if options.list:
        for name in faults.ROWS:
            print(name)
        return 0
    rows: dict[str, dict[str, Any]] = {}
    if options.only and options.json and options.json.exists():
        # Some rows played again take their places among those played before.
        rows = {row["name"]: row for row in json.loads(options.json.read_text())}
    played = {result.row.name: result.as_json() for result in faults.run(options.only)}
    rows |= played
    ordered = [rows[name] for name in faults.ROWS if name in rows]
    if options.json:
        options.json.write_text(json.dumps(ordered, indent=1) + "\n")
    if options.table:
        table.write(options.table, ordered)
    return 1 if any(row["result"] == "fail" for row in played.values()) else 0


def _mutants(options: Any) -> int:
    from chaos.hunt import hunt  # noqa: PLC0415

    return 0 if hunt(options.only) else 1


def _print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    for v in verdicts:
        mark = {True: "kept  ", False: "BROKEN", None: "  -   "}[v["ok"]]
        print(f"{mark} {v['promise']:>3} {v['means']}: {v['said']}")
        for witness in v["witnesses"]:
            print(f"           {witness}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
