"""Opening a run: is Redis fit for it, is it free, and what did the last trainer leave in it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rollfleet.settings import TrainerSettings
from rollfleet_common.board import Board, Shape
from rollfleet_common.errors import BrokerSetupError, LostBatchesError, SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.logs import get_logger
from rollfleet_common.redis import check_server, retry, safe_url
from rollfleet_common.tasks import call

__all__ = [
    "REACH_S",
    "State",
    "check",
    "check_lost",
    "check_state",
    "claim",
    "read_state",
    "shape",
    "wipe",
]

log = get_logger("rollfleet.trainer")

#: What `state_dict` returned, or a function that reads it; None: there is none.
State = (
    Mapping[str, Any]
    | Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any] | None] | None]
    | None
)

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
    """Delete every key of a run but the registered servers, which are its operators'.

    The lease and the board, by which it is renewed, are spared as well: this may take longer than a
    lease lasts.
    """
    spared = {name.encode() for name in (keys.servers, keys.trainer, keys.board)}
    for pattern in (f"{keys.prefix}*", f"rf:{{{keys.run}/*"):
        names = [
            name async for name in client.scan_iter(match=pattern, count=1000) if name not in spared
        ]
        for at in range(0, len(names), DELETE_AT_ONCE):
            await client.unlink(*names[at : at + DELETE_AT_ONCE])


def shape(s: TrainerSettings) -> Shape:
    """What the board says of the run."""
    return Shape(s.partitions, s.samples_per_version, s.max_staleness, s.depth)


async def claim(board: Board, token: str, s: TrainerSettings) -> int:
    """Take the lease on the run, waiting out that of a trainer that died.

    Returns:
        The number of the last batch that was committed; nobody else commits from here on.

    Raises:
        SettingsError: Another trainer holds the run, and renews its lease.
    """
    deadline = time.monotonic() + s.lease_s + 2
    lease_ms = int(s.lease_s * 1000)
    while True:
        claimed = await board.claim(token, lease_ms, token, take_over=s.take_over)
        if claimed.ok:
            return claimed.last_committed
        if time.monotonic() > deadline:
            raise SettingsError(
                f"run {s.run!r} is held by trainer {claimed.holder}, which renewed its lease "
                f"{s.lease_s - claimed.left_ms / 1000:.1f} s ago: two trainers on one run would "
                "train on each other's rollouts. Choose another run name, stop the other trainer, "
                "or pass take_over=True to supersede it"
            )
        log.info("waiting for the run", holder=claimed.holder, left_ms=claimed.left_ms)
        await asyncio.sleep(min(claimed.left_ms / 1000 + 0.05, 1.0))


def check_state(state: Mapping[str, Any], run: str) -> None:
    """Refuse what is no state of this run.

    Raises:
        SettingsError: It is of another run, or nothing that state_dict() returned.
    """
    if state and "run" not in state:
        raise SettingsError(
            f"state is not what state_dict() returned: it has no `run`, but {', '.join(map(repr, state))[:200]}"
        )
    if state and state.get("run") != run:
        raise SettingsError(f"the state is of run {state.get('run')!r}, not of {run!r}")


async def read_state(state: State, run: str) -> dict[str, Any]:
    """The checkpoint's part of the fleet; a function is called in a thread of its own.

    Raises:
        SettingsError: It is no mapping, or of another run.
    """
    found: Any = await call(state) if callable(state) else state
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise SettingsError(
            f"state is {type(found).__name__}; give what state_dict() returned, a function that "
            "returns that, or None"
        )
    read = dict(found)
    check_state(read, run)
    return read


def check_lost(state: Mapping[str, Any], last_committed: int, s: TrainerSettings) -> int:
    """How many batches were committed after `state` was saved, at most; logged if accepted.

    Raises:
        LostBatchesError: There are some, and `lost_batches` is "refuse".
    """
    if "batch" not in state:
        if last_committed:  # it takes the run wherever it is
            log.warning(
                "the run goes on, and no state was given: its committed batches are in no model that "
                "starts anew",
                committed=last_committed,
                remedy="pass state=, or fresh=True to begin the run anew",
            )
        return 0
    saved = int(state["batch"])
    known = max([saved, *map(int, state.get("beyond", ()))])
    if last_committed <= known:
        return 0
    lost = last_committed - known
    what = (
        f"run {s.run!r}: the state ends at batch {known}, and batches up to {last_committed} were "
        f"committed after it was saved: they are not served again, and the model that resumes from "
        "this state was not trained on them"
    )
    if s.lost_batches == "accept":
        log.warning("batches are lost", saved=known, committed=last_committed, lost=lost)
        return lost
    raise LostBatchesError(
        f"{what}. Resume from the newest checkpoint (state= also takes a function, which is called "
        "once the trainer before has let go of the run); or accept the loss with "
        'lost_batches="accept" or ROLLFLEET_LOST_BATCHES=accept. To prevent it, commit after a '
        'checkpoint is durable: commit="checkpoint"',
        known,
        last_committed,
    )
