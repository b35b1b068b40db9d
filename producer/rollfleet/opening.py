"""Opening a run: is Redis fit for it, is it free, and what did the last trainer leave in it."""

import asyncio
import time
from typing import Any

from rollfleet.settings import TrainerSettings
from rollfleet_common.board import Board, Seized, Shape
from rollfleet_common.errors import BrokerSetupError, SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.logs import get_logger
from rollfleet_common.redis import check_server, retry, safe_url

__all__ = ["REACH_S", "check", "seize", "shape", "wipe"]

log = get_logger("rollfleet.trainer")

#: How long an unreachable Redis is tried before the trainer is told.
REACH_S = 10.0
#: Keys deleted at once.
DELETE_AT_ONCE = 500


async def check(client: Any, s: TrainerSettings) -> None:
    """Whether Redis can be reached, may be trusted with a run, and can hold what may be out.

    Raises:
        BrokerUnavailableError: It cannot be reached.
        BrokerSetupError: It refuses us, may evict keys (`strict`), or is too small.
    """
    report = await retry(
        lambda: check_server(client, strict=s.strict),
        what=f"reach Redis at {safe_url(s.redis_url)}",
        deadline_s=REACH_S,
        url=s.redis_url,
    )
    for warning in report.warnings:
        log.warning(warning)
    need = (s.depth + 1) * s.samples_per_version * s.reserve_bytes
    if report.maxmemory_bytes and need > report.maxmemory_bytes:
        raise BrokerSetupError(
            f"Redis may hold {report.maxmemory_bytes:,} bytes (maxmemory), but "
            f"(pipeline_depth + 1) x samples_per_version x reserve_bytes = ({s.depth} + 1) x "
            f"{s.samples_per_version} x {s.reserve_bytes:,} = {need:,} bytes of rollouts may be "
            "outstanding: raise maxmemory, or lower one of the three"
        )


async def wipe(client: Any, keys: RunKeys) -> None:
    """Delete every key of a run but the registered servers, which are its operators'."""
    for pattern in (f"{keys.prefix}*", f"rf:{{{keys.run}/*"):
        names = [
            name
            async for name in client.scan_iter(match=pattern, count=1000)
            if name != keys.servers.encode()
        ]
        for at in range(0, len(names), DELETE_AT_ONCE):
            await client.unlink(*names[at : at + DELETE_AT_ONCE])


def shape(s: TrainerSettings) -> Shape:
    """What the board says of the run."""
    return Shape(s.partitions, s.samples_per_version, s.max_staleness, s.depth)


async def seize(board: Board, token: str, s: TrainerSettings, version: int) -> Seized:
    """Take the run, waiting out the lease of a trainer that died.

    Raises:
        SettingsError: Another trainer holds the run, and renews its lease.
    """
    deadline = time.monotonic() + s.lease_s + 2
    lease_ms = int(s.lease_s * 1000)
    while True:
        seized = await board.seize(
            token, lease_ms, token, shape(s), version=version, take_over=s.take_over
        )
        if seized.ok:
            return seized
        if time.monotonic() > deadline:
            raise SettingsError(
                f"run {s.run!r} is held by trainer {seized.holder}, which renewed its lease "
                f"{s.lease_s - seized.left_ms / 1000:.1f} s ago: two trainers on one run would "
                "train on each other's rollouts. Choose another run name, stop the other trainer, "
                "or pass take_over=True to supersede it"
            )
        log.info("waiting for the run", holder=seized.holder, left_ms=seized.left_ms)
        await asyncio.sleep(min(seized.left_ms / 1000 + 0.05, 1.0))
