"""One read of a whole fleet: where every prompt is, who works, and what all of it waits for.

- Reads only: safe on a live run, at any moment, with any rights that may read.
- Every term is read from the structure that holds it; ages are taken by the clock of Redis.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rollfleet_common.board import Board
from rollfleet_common.keys import PartitionKeys, RunKeys, check_name, route_names
from rollfleet_common.ledger import read_books
from rollfleet_common.schemas import Schemas
from rollfleet_common.scripts import reads
from rollfleet_common.servers import Servers
from rollfleet_common.text import cleaned, decoded, json_int, parse_json
from rollfleet_console.status.explain import explain
from rollfleet_console.status.servers import gather
from rollfleet_console.status.views import LOST_AFTER_S, Route, Snapshot, WorkerCard, WorkerServer

__all__ = ["Snapshot", "take"]


async def take(client: Any, run: str) -> Snapshot:
    """Read the run `run`.

    Raises:
        redis.exceptions.RedisError: As redis-py said it.
        SettingsError: `run` is no name of a run.
    """
    keys = RunKeys(check_name(run, "the run"))
    seconds, micros = await client.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    board = Board(client, keys)
    policy, shape = await board.read() or (None, None)
    warnings = await board.warnings()
    who = decoded(await client.hget(keys.board, "who") or b"")
    left_ms = int(await client.pttl(keys.trainer))
    partitions = [keys.partition(p) for p in range(shape.partitions if shape else 1)]
    books = await read_books(client, partitions)
    cards, unreadable = _read_cards(await client.hgetall(keys.workers), now_ms)
    tallies, pending = await _read_routes(client, partitions, now_ms)
    workers = tuple(_worker(card, pending, now_ms) for card in cards)
    registered, weights = await Servers(client, keys).read()
    known = {worker.id for worker in workers}
    snapshot = Snapshot(
        run=run,
        taken_ms=now_ms,
        policy=policy,
        shape=shape,
        trainer=who if left_ms > 0 else "",
        last_trainer=who,
        trainer_left_s=max(0, left_ms) / 1000,
        books=books,
        workers=workers,
        routes=tuple(_route(name, tallies[name], workers) for name in sorted(tallies)),
        strangers={name: n for name, n in sorted(pending.items()) if name not in known and n},
        unreadable=unreadable,
        servers=gather(registered, weights, workers),
    )
    # Names are compared above as they are; what is shown may hold no escape sequence.
    return cleaned(replace(snapshot, reasons=[*explain(snapshot), *warnings]))


# ---- workers -------------------------------------------------------------------------------------


def _read_cards(
    raw: Mapping[bytes, bytes], now_ms: int
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    cards: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for name, text in sorted(raw.items()):
        worker = name.decode("utf-8", "replace")
        try:
            card = parse_json(text)
            # Of a newer release it may say more, of a broken one less: then it still counts.
            card = {**card, "id": worker, "seen_ms": json_int(card.get("seen_ms", now_ms))}
            _worker(card, {}, now_ms)  # one field that makes no sense must not hide the others
            cards.append(card)
        except (ValueError, TypeError, AttributeError, OverflowError):
            unreadable.append(worker)
    return cards, tuple(unreadable)


def _worker(card: Mapping[str, Any], pending: Mapping[str, int], now_ms: int) -> WorkerCard:
    seen_s = max(0.0, (now_ms - card["seen_ms"]) / 1000)
    return WorkerCard(
        id=card["id"],
        host=str(card.get("host", "?")),
        pid=json_int(card.get("pid", 0)),
        version=str(card.get("version", "?")),
        schemas=Schemas.of(card.get("schemas"), str(card.get("version", ""))),
        routes=tuple(map(str, card.get("routes", ()))),
        slots=json_int(card.get("slots", 0)),
        busy=json_int(card.get("busy", 0)),
        servers=tuple(
            WorkerServer(
                name=str(s.get("name", "?")),
                state=str(s.get("state", "?")),
                in_flight=json_int(s.get("in_flight") or 0),
                version=None if s.get("version") is None else json_int(s["version"]),
                error=str(s.get("error") or ""),
                limit=json_int(s.get("limit") or 0),
                why=str(s.get("why") or ""),
            )
            for s in card.get("servers", ())
        ),
        state="lost" if seen_s > LOST_AFTER_S else str(card.get("state", "?")),
        policy_version=json_int(card.get("policy_version", -1)),
        delivered=json_int(card.get("delivered", 0)),
        failed=json_int(card.get("failed", 0)),
        seen_s=seen_s,
        up_s=max(0.0, (now_ms - json_int(card.get("started_ms", now_ms))) / 1000),
        pending=pending.get(card["id"], 0),
        ahead_s=max(0.0, (card["seen_ms"] - now_ms) / 1000),
    )


# ---- routes --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """One route, summed over the partitions read so far."""

    waiting: int = 0
    delayed: int = 0
    in_flight: int = 0
    oldest_waiting_s: float | None = None
    oldest_pending_s: float | None = None
    next_due_s: float | None = None


def _route(name: str, tally: _Tally, workers: Sequence[WorkerCard]) -> Route:
    served_by = sum(name in worker.routes and not worker.lost for worker in workers)
    return Route(name=name, served_by=served_by, **asdict(tally))


async def _read_routes(
    client: Any, partitions: Sequence[PartitionKeys], now_ms: int
) -> tuple[dict[str, _Tally], dict[str, int]]:
    """The routes by name, and the leases by consumer."""
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    leases: dict[str, int] = defaultdict(int)
    for k in partitions:
        for route in route_names(await client.smembers(k.routes)):
            await _read_route(client, k, route, tallies[route], leases, now_ms)
    return dict(tallies), dict(leases)


async def _read_route(
    client: Any, k: PartitionKeys, route: str, tally: _Tally, leases: dict[str, int], now_ms: int
) -> None:
    """Add one route of one partition to `tally`, and its leases to `leases`."""
    view = await reads.route(client, k, route=route)
    for name, leased in view.holders.items():
        leases[decoded(name)] += leased
    if view.oldest_pending:
        tally.oldest_pending_s = _older(tally.oldest_pending_s, view.oldest_pending, now_ms)
    if view.oldest_unread:
        tally.oldest_waiting_s = _older(tally.oldest_waiting_s, view.oldest_unread, now_ms)
    if view.due_ms is not None:
        wait_s = max(0.0, (view.due_ms - now_ms) / 1000)
        tally.next_due_s = min(wait_s, wait_s if tally.next_due_s is None else tally.next_due_s)
    tally.waiting += view.length - view.pending
    tally.in_flight += view.pending
    tally.delayed += view.delayed


def _older(age_s: float | None, entry: bytes, now_ms: int) -> float:
    """The greater of `age_s` and the age of a stream entry."""
    return max(age_s or 0.0, (now_ms - int(entry.partition(b"-")[0])) / 1000)
