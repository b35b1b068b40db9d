"""The fault matrix: every row played with real processes on a real server, and judged."""

from collections.abc import Sequence

from chaos import rows_redis, rows_server, rows_trainer, rows_worker
from chaos.rows import Result, Row, play

__all__ = ["ROWS", "run"]

ROWS: dict[str, Row] = {
    row.name: row
    for rows in (rows_worker.ROWS, rows_redis.ROWS, rows_trainer.ROWS, rows_server.ROWS)
    for row in rows
}


def run(only: Sequence[str] | None = None) -> list[Result]:
    """Play rows (all, or those whose name holds one of the words), telling of each as it ends."""
    results: list[Result] = []
    for name, row in ROWS.items():
        if only and not any(word in name for word in only):
            continue
        result = play(row)
        results.append(result)
        took = "" if result.recovery_s is None else f" {result.recovery_s:.1f} s"
        print(f"{result.result:>12}{took:>8}  {name}  [{' '.join(result.judged)}]", flush=True)
        if result.result != "pass":
            print(f"{'':>22}{result.why}", flush=True)
    return results
