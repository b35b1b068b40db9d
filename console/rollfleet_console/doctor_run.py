"""What the doctor cross-checks in the partitions of a run: books, groups, orphans, plans.

- Reads only, in pages. Structures are read one after the other while the run goes on, so what one
  reading finds is a suspicion: :func:`confirmed` keeps what two readings agree on, word for word.
- A partition that holds more than :data:`LIMIT` of anything is not cross-checked, and that is told.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError

from rollfleet.recover import Plan
from rollfleet_common.codec import decode_header
from rollfleet_common.errors import WireError
from rollfleet_common.keys import PartitionKeys, RunKeys
from rollfleet_common.ledger import read_books
from rollfleet_console.doctor_ills import ILLS
from rollfleet_console.findings import Finding, Severity, some

__all__ = ["Suspicions", "confirmed", "judge", "read"]

#: Entries of one page: small, for a prompt may hold a megabyte.
PAGE = 100
#: Entries, keys or members of one structure that are looked at.
LIMIT = 200_000


@dataclass(slots=True)
class Suspicions:
    """What one reading found: for each ill, the detail of every thing that has it."""

    ills: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    #: Structures that were too large to be cross-checked.
    skipped: list[str] = field(default_factory=list)
    samples: int = 0
    groups: int = 0
    payloads: int = 0
    plans: int = 0

    def add(self, ill: str, thing: str, detail: str = "") -> None:
        """Note one."""
        self.ills[ill][thing] = detail


class _TooManyError(Exception):
    """A structure holds more than LIMIT."""


def confirmed(first: Suspicions, second: Suspicions) -> Suspicions:
    """The later reading, with only those suspicions that the earlier one had in the same words."""
    kept: dict[str, dict[str, str]] = defaultdict(dict)
    for ill, things in second.ills.items():
        before = first.ills.get(ill, {})
        kept[ill] = {k: v for k, v in things.items() if before.get(k) == v}
    second.ills = kept
    return second


def judge(s: Suspicions) -> list[Finding]:
    """Confirmed suspicions as findings, and what is well."""
    found = []
    for ill, (severity, check, what, fix) in ILLS.items():
        if things := s.ills.get(ill):
            where = some(f"{k} ({v})" if v else k for k, v in sorted(things.items()))
            found.append(Finding(severity, check, what.format(n=f"{len(things):,}"), where, fix))
    if s.skipped:
        what = f"more than {LIMIT:,} entries: not cross-checked"
        found.append(Finding(Severity.INFO, "groups", what, where=some(s.skipped)))
    bad = {f.check for f in found}
    for check, what in (
        ("books", f"{s.samples:,} samples submitted, and every one accounted for"),
        ("groups", f"{s.groups:,} open, and every member where its record says"),
        ("orphans", f"{s.payloads:,} payloads, and each has its rollout"),
        ("plans", f"{s.plans:,} batches handed out and not committed, all whole"),
    ):
        if check not in bad:
            found.append(Finding(Severity.OK, check, what))
    return found


# ---- reading -------------------------------------------------------------------------------------


async def read(client: Any, keys: RunKeys, partitions: Sequence[PartitionKeys]) -> Suspicions:
    """Look at everything once."""
    s = Suspicions()
    token = await client.hget(keys.board, "token")
    rollouts: dict[int, set[str]] = {}
    for k in partitions:
        books = await read_books(client, [k])
        s.samples += books.submitted
        if books.balance:
            s.add("unbalanced", k.ledger, f"{books.balance:+,}")
        fence = await client.hget(k.fence, "token")
        if token is not None and fence != token:
            s.add("fenced", k.fence, "not opened" if fence is None else _text(fence))
        try:
            rollouts[k.partition] = await _partition(client, k, s)
        except _TooManyError as exc:
            s.skipped.append(str(exc))
    await _plans(client, keys, rollouts, s)
    return s


async def _partition(client: Any, k: PartitionKeys, s: Suspicions) -> set[str]:
    """Cross-check one partition; returns the entries of its rollouts stream."""
    places = await _places(client, k, s)
    groups, payloads = await _keys(client, k)
    for name in (places.held | {_text(group) for group, _ in places.tombs}) - set(groups):
        s.add("stray", f"group {name} in {k.prefix}")
    s.groups += len(groups)
    s.payloads += len(places.named)
    for at in range(0, len(groups), PAGE):
        pipe = client.pipeline(transaction=False)
        for name in groups[at : at + PAGE]:
            pipe.hgetall(k.group(name))
        for name, record in zip(groups[at : at + PAGE], await pipe.execute(), strict=True):
            _group(k, name, record, places, s)
    await _payloads(client, k, places.named, payloads, s)
    async for member in client.sscan_iter(k.trained, count=PAGE):
        if _text(member) not in places.rollouts:
            s.add("trained alone", f"{k.trained} {_text(member)}")
    return places.rollouts


@dataclass(slots=True)
class _Places:
    """Where the samples of one partition are."""

    prompts: dict[str, set[str]] = field(default_factory=dict)
    delayed: dict[str, set[str]] = field(default_factory=dict)
    rollouts: set[str] = field(default_factory=set)
    tombs: set[tuple[bytes, bytes]] = field(default_factory=set)
    #: Groups of the rollouts, and their payloads with the entry that names them.
    held: set[str] = field(default_factory=set)
    named: dict[str, str] = field(default_factory=dict)


async def _places(client: Any, k: PartitionKeys, s: Suspicions) -> _Places:
    """Read every stream and sorted set of a partition."""
    places = _Places()
    for raw in sorted(await client.smembers(k.routes)):
        route = _text(raw)
        places.prompts[route] = {e async for e, _ in _entries(client, k.prompts(route))}
        await _unheld(client, k.prompts(route), places.prompts[route], s)
        places.delayed[route] = await _delayed(client, k, route, s)
    async for _, fields in _entries(client, k.tombstones):
        places.tombs.add((fields.get(b"g", b""), fields.get(b"i", b"")))
    async for entry, fields in _entries(client, k.rollouts):
        places.rollouts.add(entry)
        try:
            header = decode_header(fields[b"h"])
        except (KeyError, WireError) as exc:
            s.add("unreadable", f"{k.rollouts} {entry}", str(exc)[:80])
            continue
        places.named[header.payload] = entry
        places.held.add(header.group)
    return places


async def _unheld(client: Any, stream: str, entries: Collection[str], s: Suspicions) -> None:
    """Entries that were delivered, and that no worker leases."""
    try:
        groups = await client.xinfo_groups(stream)
        last = next((g["last-delivered-id"] for g in groups if g["name"] == b"workers"), b"0-0")
        leased: set[str] = set()
        after = "-"
        while rows := await client.xpending_range(stream, "workers", after, "+", PAGE):
            leased |= {_text(row["message_id"]) for row in rows}
            after = f"({_text(rows[-1]['message_id'])}"
            if len(leased) > LIMIT:
                raise _TooManyError(stream)
    except ResponseError as exc:
        if "NOGROUP" in str(exc) or "no such key" in str(exc):
            return
        raise
    given = _numbers(_text(last))
    for entry in entries:
        if entry not in leased and _numbers(entry) <= given:
            s.add("unheld", f"{stream} {entry}")


def _numbers(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))


async def _entries(client: Any, stream: str) -> AsyncIterator[tuple[str, Mapping[bytes, bytes]]]:
    """A stream, page by page."""
    after, seen = "-", 0
    while rows := await client.xrange(stream, min=after, count=PAGE):
        for entry, fields in rows:
            yield _text(entry), fields
        after, seen = f"({_text(rows[-1][0])}", seen + len(rows)
        if seen > LIMIT:
            raise _TooManyError(stream)


async def _keys(client: Any, k: PartitionKeys) -> tuple[list[str], list[str]]:
    """Names of the group records, and suffixes of the payloads."""
    groups: set[str] = set()
    payloads: set[str] = set()
    async for raw in client.scan_iter(match=f"{k.prefix}*", count=1000):
        name = _text(raw)
        if name.startswith(k.group("")):
            groups.add(name.removeprefix(k.group("")))
        elif name.startswith(k.payload("")):
            payloads.add(name.removeprefix(k.payload("")))
        if len(groups) + len(payloads) > LIMIT:
            raise _TooManyError(f"{k.prefix}*")
    return sorted(groups), sorted(payloads)


async def _delayed(client: Any, k: PartitionKeys, route: str, s: Suspicions) -> set[str]:
    """Members that wait for another attempt, and are complete."""
    due: set[str] = set()
    async for member, _ in client.zscan_iter(k.delayed(route), count=PAGE):
        due.add(_text(member))
        if len(due) > LIMIT:
            raise _TooManyError(k.delayed(route))
    parked = {_text(m) async for m, _ in client.hscan_iter(k.parked(route), count=PAGE)}
    for member in due - parked:
        s.add("due alone", f"{k.delayed(route)} {member}")
    for member in parked - due:
        s.add("parked alone", f"{k.parked(route)} {member}")
    return due & parked


def _group(
    k: PartitionKeys, name: str, record: Mapping[bytes, bytes], places: _Places, s: Suspicions
) -> None:
    """One group record against the places."""
    if not record:
        return  # settled since its name was read
    text = {_text(field): _text(value) for field, value in record.items()}
    try:
        n, route = int(text["n"]), text["route"]
        wheres = [text[str(i)] for i in range(n)]
    except (KeyError, ValueError) as exc:
        s.add("shapeless", k.group(name), f"{type(exc).__name__} {exc}")
        return
    for i, where in enumerate(wheres):
        state, entry, thing = where[:1], where[1:], f"group {name} #{i} in {k.prefix}"
        if state == "p" and entry not in places.prompts.get(route, ()):
            s.add("adrift", thing, entry)
        elif state == "d" and f"{name}:{i}" not in places.delayed.get(route, ()):
            s.add("unparked", thing, route)
        elif state == "r" and entry not in places.rollouts:
            s.add("undelivered", thing, entry)
        elif state not in ("p", "d", "r", "x"):
            s.add("shapeless", k.group(name), f"member {i} is {where!r}")
    tombless = [
        i
        for i, where in enumerate(wheres)
        if where == "x" and (name.encode(), b"%d" % i) not in places.tombs
    ]
    if len(tombless) == n:
        s.add("unfreed", k.group(name))
        return
    for i in tombless:
        s.add("unburied", f"group {name} #{i} in {k.prefix}")


async def _payloads(
    client: Any, k: PartitionKeys, named: Mapping[str, str], there: Sequence[str], s: Suspicions
) -> None:
    """Payloads against the headers that name them."""
    for suffix in named.keys() - set(there):
        s.add("bodiless", k.payload(suffix), f"rollout {named[suffix]}")
    strangers = [suffix for suffix in there if suffix not in named]
    for at in range(0, len(strangers), PAGE):
        pipe = client.pipeline(transaction=False)
        for suffix in strangers[at : at + PAGE]:
            pipe.pttl(k.payload(suffix))
        for suffix, left_ms in zip(strangers[at : at + PAGE], await pipe.execute(), strict=True):
            # One with a TTL is about to be delivered, or goes by itself.
            if int(left_ms) == -1:
                s.add("headless", k.payload(suffix))


async def _plans(
    client: Any, keys: RunKeys, rollouts: Mapping[int, set[str]], s: Suspicions
) -> None:
    """Plans of batches against the rollouts that they name."""
    async for raw, packed in client.hscan_iter(keys.batches, count=PAGE):
        number = _text(raw)
        try:
            plan = Plan.loads(int(number), packed)
            gone = [e for p, e, _, _ in plan.rollouts if p in rollouts and e not in rollouts[p]]
        except (WireError, ValueError, TypeError) as exc:
            s.add("planless", f"{keys.batches} {number}", str(exc)[:80])
            continue
        if plan.state == "committed":
            continue  # its entries may be gone already: it is rolled forward from here
        s.plans += 1
        if gone:
            lacks = f"{len(gone)} of {len(plan.rollouts)} rollouts, {plan.state}"
            s.add("plan", f"batch {number}", lacks)


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
