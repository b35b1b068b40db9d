"""A worker that does nothing says why: once after 10 s, again after a minute, then every 5 minutes.

- The cause is named with what an operator can act on: which server gave which error, how long a pause
  lasts, which runs there are instead of the one that was asked for.
- Nothing is said of a worker that works, or that drains.
"""

import asyncio
import difflib
import re
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import NoPermissionError

from rollfleet_common.board import Board
from rollfleet_common.errors import SettingsError
from rollfleet_common.keys import check_name
from rollfleet_common.logs import get_logger
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.server_states import PROBED

__all__ = ["Facts", "Idle", "explain", "of_servers", "similar_runs"]

log = get_logger("rollfleet.worker")

#: Seconds of one and the same cause after which it is said; the last is the distance from then on.
SAY_S = (10.0, 60.0, 300.0)
#: Between two looks.
LOOK_S = 1.0
#: Servers whose errors are quoted.
QUOTED = 3
#: Keys of Redis that are looked through for names of runs, at most, and in one step.
SCANNED = 100_000
SCAN_STEP = 1000
#: A trainer that was seen within this time is at work: to have no prompts then is nothing unusual.
TRAINER_S = 60.0
_BOARD = re.compile(rb"rf:\{([^{}/]{1,64})\}:board")


class Idle:
    """Says why a worker does nothing.

    `look()` gives the cause now, in one word, and a mark that changes when the worker does something;
    "" if it works. `explain(cause)` gives the sentence, and whether it is worth a warning.
    """

    def __init__(
        self,
        look: Callable[[], tuple[str, Hashable]],
        explain: Callable[[str], Awaitable[tuple[str, bool]]],
    ) -> None:
        self._look = look
        self._explain = explain

    async def run(self) -> None:
        """Look until cancelled."""
        before: tuple[str, Hashable] = ("", None)
        since = time.monotonic()
        said = 0
        while True:
            await asyncio.sleep(min(LOOK_S, SAY_S[0] / 2))
            now = self._look()
            if now != before:
                before, since, said = now, time.monotonic(), 0
            for_s = time.monotonic() - since
            if now[0] and for_s >= _due_s(said):
                said += 1
                await self._say(now[0], for_s)

    async def _say(self, cause: str, for_s: float) -> None:
        try:
            why, warn = await self._explain(cause)
        except Exception as exc:  # noqa: BLE001 - a worker is not ended by what it wanted to say
            why, warn = f"{cause} (the details cannot be read: {exc})", True
        say = log.warning if warn else log.info
        say(
            "nothing to do" if cause == "no-prompts" else "cannot work",
            state=cause,
            why=why,
            for_s=round(for_s),
        )


def _due_s(said: int) -> float:
    """How long a cause has to last until it is said once more."""
    if said < len(SAY_S):
        return SAY_S[said]
    return SAY_S[-1] * (said - len(SAY_S) + 2)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker knows that explains why it does nothing."""

    run: str
    routes: Sequence[str]
    #: None before Redis was reached.
    board: Board | None
    #: Unix milliseconds by Redis's clock.
    paused_until_ms: int
    now_ms: float
    pool: EnginePool | None
    #: What Redis said when it last failed.
    trouble: str
    outbox_bytes: int


async def explain(cause: str, facts: Facts) -> tuple[str, bool]:
    """What an operator should know of a cause, and whether it is worth a warning.

    Raises:
        redis.exceptions.RedisError, OSError: Redis did not say what it was asked.
    """
    if cause == "no-prompts" and facts.board is not None:
        return await _no_prompts(facts.board, facts)
    if cause == "no-run" and facts.board is not None:
        try:
            others = await similar_runs(facts.board.client, facts.run)
        except NoPermissionError:  # a worker's rights need not allow it
            others = ""
        return f"no trainer has opened run {facts.run!r}{'; ' if others else ''}{others}", True
    if cause == "paused":
        left_s = (facts.paused_until_ms - facts.now_ms) / 1000
        return f"paused for another {max(left_s, 0):.0f} s by the trainer", True
    if cause == "no-server" and facts.pool is not None:
        return of_servers(facts.pool), True
    if cause == "redis-full":
        return f"Redis is full: {facts.trouble}; raise its maxmemory, or commit batches", True
    if cause == "outbox-full":
        size = f"{facts.outbox_bytes:,} bytes of rollouts wait for Redis (buffer_bytes)"
        return f"{size}: {facts.trouble}", True
    return f"Redis does not answer: {facts.trouble or 'it was not reached yet'}", True


async def _no_prompts(board: Board, facts: Facts) -> tuple[str, bool]:
    who, seen_ms = await board.trainer()
    ago_s = max(facts.now_ms - seen_ms, 0.0) / 1000
    seen = f"was last seen {ago_s:.0f} s ago" if seen_ms else "does not say when it was last seen"
    routes = f"{'routes' if len(facts.routes) > 1 else 'route'} {', '.join(facts.routes)}"
    said = f"no prompts on {routes} of run {facts.run!r}; trainer {who} {seen}"
    return said, not seen_ms or ago_s > TRAINER_S


def of_servers(pool: EnginePool) -> str:
    """Why no inference server can be used."""
    states = pool.states()
    if not states:
        return (
            "no inference server is known: start the worker with --server URL, or register one with "
            "`rollfleet server add URL`"
        )
    said = [f"{one.name}: {one.why or one.last_error or one.state.value}" for one in states]
    more = f"; and {len(said) - QUOTED} more" if len(said) > QUOTED else ""
    answers = any(one.state not in PROBED for one in states)
    what = "no server can be used" if answers else "no server answers"
    return f"{what}: {'; '.join(said[:QUOTED])}{more}"


async def similar_runs(client: Any, run: str) -> str:
    """Which runs there are in place of `run`, in words; "" if they cannot be told.

    Looks through a bounded part of the keys; a worker's rights need not allow it.
    """
    names: set[str] = set()
    cursor, looked = 0, 0
    while looked < SCANNED:
        cursor, found = await client.scan(cursor, match="rf:{*}:board", count=SCAN_STEP)
        looked += SCAN_STEP
        for key in found:
            if (match := _BOARD.fullmatch(key)) and (name := _name(match.group(1))):
                names.add(name)
        if not int(cursor):
            break
    names.discard(run)
    if close := difflib.get_close_matches(run, sorted(names), n=3, cutoff=0.5):
        return f"runs in this Redis with similar names: {', '.join(close)}"
    if not names:
        return "" if int(cursor) else "this Redis holds no other run: is it the right one?"
    some = sorted(names)[:3]
    return f"runs in this Redis: {', '.join(some)}{', ...' * (len(names) > len(some))}"


def _name(raw: bytes) -> str:
    """The name of a run, or "" where a key is none of ours."""
    try:
        return check_name(raw.decode("ascii"), "run")
    except (UnicodeDecodeError, SettingsError):
        return ""
