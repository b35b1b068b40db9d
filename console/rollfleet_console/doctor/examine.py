"""`rollfleet doctor`: is this run well, and if not, what to do; safe on a live one.

- Reads only, in pages, and no more of them for a larger backlog. What the life of the run may mimic is read twice, and told if it stays.
- A check that may not be made, for want of rights, is told as such; the others are made.
- Exit code: 0 well, 1 warnings, 2 errors, 3 Redis cannot be reached or refuses us.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ResponseError

from rollfleet_common.errors import CodecError
from rollfleet_common.keys import RunKeys, check_name
from rollfleet_common.redis_errors import error_code, is_transient
from rollfleet_common.text import cleaned
from rollfleet_console.doctor import consistency, redis_server, streams, workers
from rollfleet_console.doctor.findings import Finding, Report, Severity, render
from rollfleet_console.status.snapshot import take

__all__ = ["LEASE_S", "UNREACHABLE", "Finding", "Report", "Severity", "examine", "render"]

#: Exit code when Redis cannot be asked.
UNREACHABLE = 3
#: The workers' default lease.
LEASE_S = 30.0
#: Between two readings: longer than any step of the path takes.
PAUSE_S = 1.0


async def examine(
    client: Any, run: str, *, lease_s: float = LEASE_S, pause_s: float = PAUSE_S
) -> Report:
    """Look at everything.

    Args:
        client: Of :func:`rollfleet_common.redis.connect`.
        run: Which run.
        lease_s: The workers' lease: it is their setting, and stands nowhere in Redis.
        pause_s: Seconds between the two readings of what may be a race.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached.
        SettingsError: `run` is no name of a run.
    """
    keys = RunKeys(check_name(run, "the run"))
    found: list[Finding] = []

    async def made(check: str, call: Callable[[], Awaitable[list[Finding]]]) -> None:
        try:
            found.extend(await call())
        except CodecError as exc:
            fix = "the field was written by hand, or by something that is not rollfleet"
            found.append(Finding(Severity.ERROR, check, str(exc), fix=fix))
        except ResponseError as exc:
            if is_transient(exc) or error_code(exc) == "NOAUTH":
                raise
            what = f"this check could not be made: {exc}"
            fix = "use a user with the rights of deploy/acl/console-readonly.acl"
            found.append(Finding(Severity.WARNING, check, what, fix=fix))

    await made("server", lambda: redis_server.server(client))
    now_s, clocks = await redis_server.clock(client)
    found += [*clocks, *redis_server.library()]
    await made("fleet", lambda: _fleet(client, run, keys, lease_s, now_s))
    await made("books", lambda: _twice(client, keys, run, pause_s))
    return cleaned(Report(run, tuple(found)))


async def _fleet(
    client: Any, run: str, keys: RunKeys, lease_s: float, now_s: float
) -> list[Finding]:
    s = await take(client, run)
    partitions = [keys.partition(p) for p in range(s.shape.partitions if s.shape else 1)]
    seen = await workers.consumers(client, partitions)
    return [
        *workers.trainer(s),
        *workers.workers(s, seen, lease_s),
        *workers.routes(s, await workers.overdue(client, partitions, now_s)),
        *await workers.leases(client, partitions, s, lease_s),
        *await workers.backlog(client, partitions, s, now_s),
        *await workers.letters(client, partitions, s),
        *await streams.run_away(client, keys, partitions, now_s),
        *workers.versions(s),
    ]


async def _twice(client: Any, keys: RunKeys, run: str, pause_s: float) -> list[Finding]:
    s = await take(client, run)
    partitions = [keys.partition(p) for p in range(s.shape.partitions if s.shape else 1)]
    first = await consistency.read(client, keys, partitions)
    if not any(first.ills.values()):
        return consistency.judge(first)
    await asyncio.sleep(pause_s)
    second = await consistency.read(client, keys, partitions)
    return consistency.judge(consistency.confirmed(first, second))
