"""Scripts that touch the names of a run: its board, its lease, its plans and its servers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollfleet_common.errors import SupersededError
from rollfleet_common.keys import RunKeys
from rollfleet_common.messages import NO_VERSION
from rollfleet_common.scripts.script import chunks, load, room
from rollfleet_common.text import decoded, printable

__all__ = [
    "Claimed",
    "Seized",
    "claim",
    "hold",
    "plan",
    "publish",
    "refit",
    "register",
    "release",
    "seize",
]

_CLAIM, _HOLD, _PLAN, _PUBLISH = map(load, ("claim", "hold", "plan", "publish"))
_REFIT, _REGISTER, _RELEASE, _SEIZE = map(load, ("refit", "register", "release", "seize"))


@dataclass(frozen=True, slots=True)
class Claimed:
    """The outcome of asking for the lease on a run."""

    ok: bool
    #: Number of the youngest batch that was ever committed; 0: none was.
    last_committed: int = 0
    #: If refused: who holds it and for how long its lease still runs.
    holder: str = ""
    left_ms: int = 0


@dataclass(frozen=True, slots=True)
class Seized:
    """The outcome of asking for a run."""

    ok: bool
    epoch: int = 0
    version: int = NO_VERSION
    #: If refused: who holds it and for how long its lease still runs.
    holder: str = ""
    left_ms: int = 0


async def claim(
    client: Any, k: RunKeys, *, token: str, lease_ms: int, who: str, take_over: bool
) -> Claimed:
    """Take the lease on a run, and shut its last trainer out."""
    reply = await _CLAIM(client, [k.trainer, k.board], [token, lease_ms, who, int(take_over)])
    if reply[0] == 0:
        return Claimed(ok=False, holder=printable(decoded(reply[1]), 200), left_ms=int(reply[2]))
    return Claimed(ok=True, last_committed=int(reply[1]))


async def seize(
    client: Any,
    k: RunKeys,
    *,
    token: str,
    lease_ms: int,
    who: str,
    take_over: bool,
    version: int,
    shape: str,
    above: int,
    schemas: str,
) -> Seized:
    """Take the run in a new epoch, at `version` (NO_VERSION: wherever the board is)."""
    args = [token, lease_ms, who, int(take_over), version, shape, above, schemas]
    reply = await _SEIZE(client, [k.trainer, k.board, k.news], args)
    if reply[0] == 0:
        return Seized(ok=False, holder=printable(decoded(reply[1]), 200), left_ms=int(reply[2]))
    return Seized(ok=True, epoch=int(reply[1]), version=int(reply[2]))


async def hold(client: Any, k: RunKeys, *, token: str, lease_ms: int) -> None:
    """Renew the trainer's lease."""
    _held(k, await _HOLD(client, [k.trainer, k.board], [token, lease_ms]))


async def release(client: Any, k: RunKeys, *, token: str) -> bool:
    """Let go of the run; returns whether `token` held its lease."""
    return bool(int(await _RELEASE(client, [k.trainer], [token])))


async def publish(client: Any, k: RunKeys, *, token: str, fields: Mapping[str, int | str]) -> None:
    """Write fields of the board, and wake those who follow it."""
    flat = [part for pair in fields.items() for part in pair]
    _held(k, await _PUBLISH(client, [k.board, k.news], [token, *flat]))


async def plan(
    client: Any, k: RunKeys, *, token: str, batch: int, plan: bytes, committed: bool
) -> None:
    """Write the plan of a batch, which commits it if `committed`; an empty one is forgotten."""
    args = [token, batch, plan, int(committed)]
    _held(k, await _PLAN(client, [k.board, k.batches], args))


async def refit(client: Any, k: RunKeys, *, token: str, rows: Sequence[tuple[str, str]]) -> None:
    """Write which weights servers hold, (URL, row) each; an empty row forgets one."""
    for some in chunks(rows, room(fixed=4, each=2)):
        flat = [part for pair in some for part in pair]
        _held(k, await _REFIT(client, [k.board, k.weights, k.news], [token, *flat]))


async def register(client: Any, k: RunKeys, *, url: str, seen: bytes, row: bytes) -> bool:
    """Write the `row` of a server if the present one is still what was `seen`; empty is none."""
    return bool(int(await _REGISTER(client, [k.servers, k.news], [url, seen, row])))


def _held(k: RunKeys, reply: Any) -> None:
    if int(reply) == 0:
        raise SupersededError.of(k.run)
