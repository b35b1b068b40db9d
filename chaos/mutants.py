"""Planted bugs, one for each promise: what shows that the oracle can fail.

- A mutant lives in processes that this package started with CHAOS_MUTANT set; the product does not
  know of it. It is planted before the product's modules are imported, because they copy
  names from each other at import.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

__all__ = ["MEND", "MUTANTS", "plant"]


#: What a process says that could not plant its bug.
MEND = "mend the mutant"


def _rewrite(name: str, old: str, new: str) -> None:
    """Replace a piece of one Lua script."""
    from rollfleet_common import scripts  # noqa: PLC0415 - so that `plant` chooses when

    script = scripts.load(name)
    if old not in script.text:
        raise LookupError(f"{MEND}: {name}.lua does not say {old!r} any more")
    script.use(script.text.replace(old, new))


def _p1_lose(part: str) -> None:
    """A failed attempt is taken off the stream and parked nowhere, and nobody looks for it."""
    _rewrite("fail", "redis.call('HSET', KEYS[3], member, packed)", "")
    _rewrite("mend", "if done > 0 then", "if false then")


def _p2_twice(part: str) -> None:
    """Deliver does not look whose lease it is, and a worker is not told that it lost one."""
    _rewrite("renew", "lost[#lost + 1] = ARGV[i]", "")
    _rewrite("deliver", "if not owner then", "if false then")
    _rewrite("deliver", "elseif owner ~= ARGV[1] then", "elseif false then")


def _p3_again(part: str) -> None:
    """Commit frees nothing, and what was trained is not remembered."""
    from rollfleet.consume import reader  # noqa: PLC0415
    from rollfleet.run import recover  # noqa: PLC0415

    settle = recover.Plan.settle

    async def settled(self: Any, verb: str, token: str, streams: Any) -> None:
        if verb != "commit":
            await settle(self, verb, token, streams)

    recover.Plan.settle = settled
    reader.RolloutReader.remember = lambda self, trained: None


def _p4_stale(part: str) -> None:
    """Nobody looks at the age of a rollout."""
    _rewrite("deliver", "tonumber(ARGV[arg + 4]) < min_useful", "false")
    if part == "trainer":
        from rollfleet.policy import policies  # noqa: PLC0415

        policies.staleness = lambda current, oldest: 0
        policies.min_useful = lambda current, max_staleness: -1


def _p5_late(part: str) -> None:
    """Leases of the dead are taken over after ten times their length."""
    from rollfleet_common import leases  # noqa: PLC0415

    reclaim: Any = leases.Leases.reclaim

    async def late(
        self: Any, streams: Any, route: str, lease_ms: int, *more: Any, **kw: Any
    ) -> Any:
        return await reclaim(self, streams, route, lease_ms * 10, *more, **kw)

    setattr(leases.Leases, "reclaim", late)  # noqa: B010 - whatever its shape


def _p6_leak(part: str) -> None:
    """Payloads outlive their batch."""
    _rewrite("settle", "redis.call('UNLINK', payload)", "")


def _p7_linger(part: str) -> None:
    """A worker does not heed SIGTERM."""
    from rollfleet_worker import daemon  # noqa: PLC0415

    async def linger(self: Any, *_: Any) -> int:
        await asyncio.sleep(3600)
        return 0

    setattr(daemon.Worker, "_drain", linger)  # noqa: B010 - whatever its shape


def _p8_trim(part: str) -> None:
    """The rollouts stream is kept short by trimming it."""
    _rewrite("deliver", "KEYS[3], '*', 'h'", "KEYS[3], 'MAXLEN', '8', '*', 'h'")


def _p9_lie(part: str) -> None:
    """A worker always says that it is ready."""
    from rollfleet_worker import health  # noqa: PLC0415

    async def ready(self: Any, _: Any) -> Any:
        return health.web.Response(text="ok\n")

    health.HealthServer._readyz = ready  # noqa: SLF001 - a planted bug


def _p10_torn(part: str) -> None:
    """A group counts as whole with one member missing."""
    from rollfleet.state import groups  # noqa: PLC0415

    for name in ("closed", "whole"):
        setattr(groups.Group, name, property(lambda self: len(self.members) >= self.n - 1))

    from rollfleet.policy import policies  # noqa: PLC0415

    policies.DropStale.judge = lambda self, group, current: None


#: By the promise that each breaks.
MUTANTS: dict[str, Callable[[str], None]] = {
    "P1": _p1_lose,
    "P2": _p2_twice,
    "P3": _p3_again,
    "P4": _p4_stale,
    "P5": _p5_late,
    "P6": _p6_leak,
    "P7": _p7_linger,
    "P8": _p8_trim,
    "P9": _p9_lie,
    "P10": _p10_torn,
}


def plant(part: str) -> None:
    """Plant the mutant that CHAOS_MUTANT names, in a ``worker`` or a ``trainer``."""
    if name := os.environ.get("CHAOS_MUTANT"):
        MUTANTS[name](part)
