"""Streams whose ids ran away: what is added gets an absurd id, or nothing can be added any more.

- Whoever may add an entry may choose its id, and all later ids are above it. After the highest there
  is, Redis refuses to add: deliveries, submissions and burials wait.
- :func:`mend` builds such a stream anew, with all that was in it; it needs an administrator's rights.
"""

from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from rollfleet_common.board import Board
from rollfleet_common.keys import LAST_ID, PartitionKeys, RunKeys, check_name, route_names
from rollfleet_common.scripts.operator import rebuild_stream
from rollfleet_common.text import decoded
from rollfleet_console.doctor.findings import Finding, Severity
from rollfleet_console.status.explain import ago

__all__ = ["mend", "run_away"]

#: How far ids may be ahead of the clock of Redis, which may be set back.
AHEAD_S = 86_400.0


async def _names(client: Any, keys: RunKeys, partitions: Sequence[PartitionKeys]) -> list[str]:
    """All streams that a run adds to."""
    names = [keys.news]
    for k in partitions:
        routes = route_names(await client.smembers(k.routes))
        names += [k.rollouts, k.tombstones, k.dead, *map(k.prompts, routes)]
    return names


async def run_away(
    client: Any, keys: RunKeys, partitions: Sequence[PartitionKeys], now_s: float
) -> list[Finding]:
    """Streams whose last id is beyond any time."""
    found: list[Finding] = []
    for name in await _names(client, keys, partitions):
        try:
            info = await client.xinfo_stream(name)
        except ResponseError as exc:
            if "no such key" in str(exc):
                continue
            raise
        last = decoded(info["last-generated-id"])
        ahead_s = int(last.partition("-")[0]) / 1000 - now_s
        if last == LAST_ID:
            what = (
                "a stream takes no more entries: one was given the highest id there is. What would "
            )
            what += "be added waits, and no prompt is charged for it"
            fix = "rollfleet mend, with an administrator's URL; then find who may XADD (docs/security.md)"
            found.append(Finding(Severity.ERROR, "streams", what, name, fix))
        elif ahead_s > AHEAD_S:
            what = (
                f"the ids of a stream are {ago(ahead_s)} ahead of Redis' clock: ages that are told "
            )
            what += "of its entries are wrong"
            fix = (
                "an entry was added with an id of its own, or the clock was set back: find who may "
            )
            fix += "XADD (docs/security.md)"
            found.append(Finding(Severity.WARNING, "streams", what, name, fix))
    return found or [Finding(Severity.OK, "streams", "all take entries, with ids of this time")]


async def mend(client: Any, run: str) -> list[tuple[str, int]]:
    """Build the streams anew that take no more entries; returns (stream, entries kept) of each.

    Redis does nothing else meanwhile: a second or two for a million entries. Whoever reads a stream
    at that moment begins again by itself. Nothing is done to streams that need no mending.

    Raises:
        redis.exceptions.RedisError: As redis-py said it.
    """
    keys = RunKeys(check_name(run, "the run"))
    found = await Board(client, keys).read()
    partitions = [keys.partition(p) for p in range(found[1].partitions if found else 1)]
    mended: list[tuple[str, int]] = []
    for name in await _names(client, keys, partitions):
        kept = await rebuild_stream(client, stream=name)
        if kept is not None:
            mended.append((name, kept))
    return mended
