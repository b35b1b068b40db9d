"""A worker as `rollfleet worker` starts it, with a planted bug if CHAOS_MUTANT names one."""

import sys

from chaos import mutants

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Run the product's worker with these flags."""
    mutants.plant("worker")
    # After the mutants were planted.
    from rollfleet_common.errors import RollfleetError  # noqa: PLC0415
    from rollfleet_worker.daemon import run  # noqa: PLC0415
    from rollfleet_worker.settings import WorkerSettings  # noqa: PLC0415

    try:
        return run(WorkerSettings.load(argv=argv))
    except RollfleetError as exc:
        sys.stderr.write(f"rollfleet: {exc}\n")
        return 2
