"""A feed has ended when the ledger says so, whatever the trainer's own count says in between."""

import asyncio
from pathlib import Path
from typing import Any

from fixtures.fleet_processes import Processes
from support import wait_until

import rollfleet

SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "starve_s": 30.0}


def test_a_count_that_is_too_low_ends_nothing(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    processes.worker(redis_url, "low", "Actor")
    rows = [
        {"token_ids": [1], "act": act, "gate": str(gate)} for act in ["echo"] * 2 + ["gate"] * 2
    ]
    with rollfleet.connect(redis_url, run="low", **SHAPE) as fleet:
        fleet.feed(rows)
        first = fleet.next_batch()
        assert first is not None
        wait_until(lambda: not fleet.aio.feeding, "the feed to end")

        async def late_reply() -> None:
            # What a submit leaves that is answered before a commit that Redis carried out first.
            fleet.aio.pacer.outstanding -= 8
            asyncio.get_running_loop().call_later(0.5, gate.touch)

        asyncio.run_coroutine_threadsafe(late_reply(), fleet._loop).result()
        second = fleet.next_batch()
        assert second is not None
        assert len(second) == 8
        fleet.commit(first)
        fleet.commit(second)
        assert fleet.next_batch() is None
