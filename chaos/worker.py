"""A worker as `rollfleet worker` starts it, with a planted bug if CHAOS_MUTANT names one."""

import os
import sys
import time

from chaos import mutants

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Run the product's worker with these flags."""
    mutants.plant("worker")
    if hour_s := float(os.environ.get("CHAOS_CLOCK_S", "0")):
        _bend_clock(hour_s)
    # After the mutants were planted.
    from rollfleet_common.errors import RollfleetError  # noqa: PLC0415
    from rollfleet_worker.daemon import run  # noqa: PLC0415
    from rollfleet_worker.settings import WorkerSettings  # noqa: PLC0415

    try:
        return run(WorkerSettings.load(argv=argv))
    except RollfleetError as exc:
        sys.stderr.write(f"rollfleet: {exc}\n")
        return 2


def _bend_clock(by_s: float) -> None:
    """Let this process's wall clock jump ahead and back, every two seconds."""
    true = time.time

    def bent() -> float:
        now = true()
        return now + (0.0, by_s, -by_s)[int(now / 2) % 3]

    time.time = bent
