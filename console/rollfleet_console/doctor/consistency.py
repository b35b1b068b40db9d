"""What the doctor cross-checks in the partitions of a run: books, groups, orphans, plans.

- Reads only, in pages. Structures are read one after the other while the run goes on, so what one
  reading finds is a suspicion: :func:`confirmed` keeps what two readings agree on, word for word.
- The work does not grow with the backlog. Numbers are read off the structures; of what a structure
  holds, as much is looked at as the constants below allow, and it is told where that was not all.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError

from rollfleet.records import Plan
from rollfleet_common.codec import decode_header
from rollfleet_common.errors import WireError
from rollfleet_common.keys import LAST_ID, PartitionKeys, RunKeys, route_names
from rollfleet_common.ledger import read_books
from rollfleet_common.scripts import reads
from rollfleet_common.text import decoded, whole
from rollfleet_console.doctor.diagnoses import DIAGNOSES
from rollfleet_console.doctor.findings import Finding, Severity, some

__all__ = ["Suspicions", "confirmed", "judge", "read"]


#: Entries, commands or members of one page.
PAGE = 200
#: Entries of a trainer's stream that are read; they are headers, not payloads.
ENTRIES = 10_000
#: Keys or members of one kind that are looked at.
SAMPLE = 2_000
#: Members of groups whose place is looked up. A prompt may hold a megabyte, which Redis copies.
MEMBERS = 4_000
#: Pages of SCAN, and how many keys one looks at.
PAGES, KEYS_AT_ONCE = 50, 1_000
#: Plans of batches that are looked at.
PLANS = 200


@dataclass(slots=True)
class Suspicions:
    """What one reading found: for each ill, the detail of every thing that has it."""

    ills: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    #: Structures of which not all was looked at.
    sampled: list[str] = field(default_factory=list)
    samples: int = 0
    groups: int = 0
    payloads: int = 0
    plans: int = 0

    def add(self, ill: str, thing: str, detail: str = "") -> None:
        """Note one."""
        self.ills[ill][thing] = detail


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
    for ill, (severity, check, what, fix) in DIAGNOSES.items():
        if things := s.ills.get(ill):
            where = some(f"{k} ({v})" if v else k for k, v in sorted(things.items()))
            found.append(Finding(severity, check, what.format(n=f"{len(things):,}"), where, fix))
    sample = "of a sample, " if s.sampled else ""
    if s.sampled:
        what = f"a sample was cross-checked, not all: {s.groups:,} groups, {s.payloads:,} payloads"
        found.append(Finding(Severity.INFO, "sample", what, where=some(sorted(set(s.sampled)))))
    bad = {f.check for f in found}
    for check, what in (
        ("books", f"{s.samples:,} samples submitted, and every one accounted for"),
        ("groups", f"{sample}{s.groups:,} open, and every member where its record says"),
        ("orphans", f"{sample}{s.payloads:,} payloads, and each has its rollout"),
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
    for k in partitions:
        books = await read_books(client, [k])
        s.samples += books.submitted
        if books.balance:
            s.add("unbalanced", k.ledger, f"{books.balance:+,}")
        fence = await client.hget(k.fence, "token")
        if token is not None and fence != token:
            s.add("fenced", k.fence, "not opened" if fence is None else decoded(fence))
        await _partition(client, k, s)
    await _plans(client, keys, len(partitions), s)
    return s


async def _partition(client: Any, k: PartitionKeys, s: Suspicions) -> None:
    """Cross-check one partition."""
    told = await _told(client, k, s)
    groups, payloads, every = await _keys(client, k)
    if not every:
        s.sampled.append(f"{k.prefix}group:*, payload:*")
    s.groups += len(groups)
    s.payloads += len(told.named)
    await _groups(client, k, groups, told, s)
    for route in route_names(await client.smembers(k.routes)):
        await _delayed(client, k, route, s)
    await _bodies(client, k, told, payloads, s)
    names = list(told.groups)[:SAMPLE]
    for name, there in zip(names, await _exist(client, map(k.group, names)), strict=True):
        if not there:
            s.add("stray", f"group {name} in {k.prefix}")
    trained = await _some(client.sscan_iter(k.trained, count=PAGE))
    for entry in await _missing(client, k.rollouts, trained):
        s.add("trained alone", f"{k.trained} {entry}")


@dataclass(slots=True)
class _Told:
    """What the trainer's streams of one partition say."""

    #: Whether all of the rollouts, and all of the tombstones, were read.
    rollouts: bool = True
    tombstones: bool = True
    tombs: set[tuple[bytes, bytes]] = field(default_factory=set)
    #: Groups of both, in order.
    groups: dict[str, None] = field(default_factory=dict)
    #: Payloads with the entry that names them.
    named: dict[str, str] = field(default_factory=dict)


async def _told(client: Any, k: PartitionKeys, s: Suspicions) -> _Told:
    """Read the trainer's streams, as far as that is allowed."""
    told = _Told()
    rows, told.tombstones = await _entries(client, k.tombstones, s)
    for _, fields in rows:
        group, index = fields.get(b"g", b""), fields.get(b"i", b"")
        told.tombs.add((group, index))
        told.groups[decoded(group)] = None
    rows, told.rollouts = await _entries(client, k.rollouts, s)
    for entry, fields in rows:
        try:
            header = decode_header(fields[b"h"])
        except (KeyError, WireError) as exc:
            s.add("unreadable", f"{k.rollouts} {entry}", str(exc)[:80])
            continue
        told.named[header.payload] = entry
        told.groups[header.group] = None
    return told


async def _unheld(client: Any, stream: str, entries: Sequence[str]) -> list[str]:
    """Those of `entries` of a prompts stream that were delivered, and that no worker leases."""
    try:
        groups = await client.xinfo_groups(stream)
    except ResponseError:
        return []  # no such stream: nothing was delivered
    last = next((g["last-delivered-id"] for g in groups if g["name"] == b"workers"), None)
    if last is None:
        return []
    given = [entry for entry in entries if _numbers(entry) <= _numbers(decoded(last))]
    unheld: list[str] = []
    for at in range(0, len(given), PAGE):
        pipe = client.pipeline(transaction=False)
        for entry in given[at : at + PAGE]:
            pipe.xpending_range(stream, "workers", entry, entry, 1)
        held = await pipe.execute()
        unheld += [e for e, rows in zip(given[at : at + PAGE], held, strict=True) if not rows]
    return unheld


def _numbers(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))


async def _entries(
    client: Any, stream: str, s: Suspicions
) -> tuple[list[tuple[str, Mapping[bytes, bytes]]], bool]:
    """The oldest entries of a stream, and whether these are all."""
    found: list[tuple[str, Mapping[bytes, bytes]]] = []
    after = "-"
    while len(found) < ENTRIES:
        rows = await client.xrange(stream, min=after, count=PAGE)
        found += [(decoded(entry), fields) for entry, fields in rows]
        if len(rows) < PAGE or found[-1][0] == LAST_ID:
            return found, True
        after = f"({found[-1][0]}"
    s.sampled.append(stream)
    return found, False


async def _keys(client: Any, k: PartitionKeys) -> tuple[list[str], list[str], bool]:
    """Names of group records, suffixes of payloads, and whether these are all of them."""
    groups: set[str] = set()
    payloads: set[str] = set()
    cursor, pages = 0, 0
    while pages < PAGES:
        cursor, raw = await client.scan(cursor, match=f"{k.prefix}*", count=KEYS_AT_ONCE)
        pages += 1
        for name in map(decoded, raw):
            if name.startswith(k.group("")):
                groups.add(name.removeprefix(k.group("")))
            elif name.startswith(k.payload("")):
                payloads.add(name.removeprefix(k.payload("")))
        if not cursor or (len(groups) >= SAMPLE and len(payloads) >= SAMPLE):
            break
    every = not cursor and len(groups) <= SAMPLE and len(payloads) <= SAMPLE
    return sorted(groups)[:SAMPLE], sorted(payloads)[:SAMPLE], every


async def _groups(
    client: Any, k: PartitionKeys, groups: list[str], told: _Told, s: Suspicions
) -> None:
    """Group records against the places that they name."""
    places: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    members = 0
    for at in range(0, len(groups), PAGE):
        if members >= MEMBERS:
            s.groups -= len(groups) - at
            s.sampled.append(f"{k.prefix}group:*")
            break
        names = groups[at : at + PAGE]
        pipe = client.pipeline(transaction=False)
        for name in names:
            pipe.hgetall(k.group(name))
        for name, record in zip(names, await pipe.execute(), strict=True):
            members += _group(k, name, record, told, places, s)
    for (state, route), named in places.items():
        things = list(named)
        if state == "d":
            due = await _scores(client, k.delayed(route), things)
            kept = await reads.there(client, key=k.parked(route), kind="hash", things=things)
            gone = [x for x, a, b in zip(things, due, kept, strict=True) if a is None or not b]
        else:
            stream = k.prompts(route) if state == "p" else k.rollouts
            gone = await _missing(client, stream, things)
            there = [thing for thing in things if thing not in set(gone)]
            for thing in await _unheld(client, stream, there) if state == "p" else ():
                s.add("unheld", f"{stream} {thing}")
        ill = {"p": "adrift", "d": "unparked", "r": "undelivered"}[state]
        for thing in gone:
            s.add(ill, named[thing], route if state == "d" else thing)


def _group(
    k: PartitionKeys,
    name: str,
    record: Mapping[bytes, bytes],
    told: _Told,
    places: dict[tuple[str, str], dict[str, str]],
    s: Suspicions,
) -> int:
    """One record: where its members should be goes into `places`; returns how many it has."""
    if not record:
        return 0  # settled since its name was read
    text = {decoded(field): decoded(value) for field, value in record.items()}
    try:
        n, route = whole(record[b"n"], 0, len(record)), text["route"]
        wheres = [text[str(i)] for i in range(n)]
    except (KeyError, ValueError) as exc:
        s.add("shapeless", k.group(name), f"{type(exc).__name__} {exc}")
        return 1
    for i, where in enumerate(wheres):
        state, entry, thing = where[:1], where[1:], f"group {name} #{i} in {k.prefix}"
        if state in ("p", "r"):
            places[state, route if state == "p" else ""][entry] = thing
        elif state == "d":
            places[state, route][f"{name}:{i}"] = thing
        elif state != "x":
            s.add("shapeless", k.group(name), f"member {i} is {where!r}")
    tombless = [
        i
        for i, where in enumerate(wheres)
        if where == "x" and (name.encode(), b"%d" % i) not in told.tombs
    ]
    if told.tombstones and len(tombless) == n:
        s.add("unfreed", k.group(name))
    elif told.tombstones:
        for i in tombless:
            s.add("unburied", f"group {name} #{i} in {k.prefix}")
    return n


async def _delayed(client: Any, k: PartitionKeys, route: str, s: Suspicions) -> None:
    """Due times against what was parked."""
    due, parked = k.delayed(route), k.parked(route)
    members = await _some(name async for name, _ in client.zscan_iter(due, count=PAGE))
    kept = await reads.there(client, key=parked, kind="hash", things=members)
    for member, there in zip(members, kept, strict=True):
        if not there:
            s.add("due alone", f"{due} {member}")
    if await client.zcard(due) > len(members):
        s.sampled.append(due)
    if await client.hlen(parked) == sum(kept):
        return
    # Looked through only where their number says that one is too many: each holds a prompt.
    others = await _some(name async for name, _ in client.hscan_iter(parked, count=PAGE))
    for member, score in zip(others, await _scores(client, due, others), strict=True):
        if score is None:
            s.add("parked alone", f"{parked} {member}")


async def _bodies(
    client: Any, k: PartitionKeys, told: _Told, there: Sequence[str], s: Suspicions
) -> None:
    """Payloads against the headers that name them."""
    names = list(told.named)[:SAMPLE]
    for suffix, exists in zip(names, await _exist(client, map(k.payload, names)), strict=True):
        if not exists:
            s.add("bodiless", k.payload(suffix), f"rollout {told.named[suffix]}")
    if not told.rollouts:
        return  # whose header was not read, no one can say
    strangers = [suffix for suffix in there if suffix not in told.named]
    for at in range(0, len(strangers), PAGE):
        pipe = client.pipeline(transaction=False)
        for suffix in strangers[at : at + PAGE]:
            pipe.pttl(k.payload(suffix))
        for suffix, left_ms in zip(strangers[at : at + PAGE], await pipe.execute(), strict=True):
            # One with a TTL is about to be delivered, or goes by itself.
            if int(left_ms) == -1:
                s.add("headless", k.payload(suffix))


# ---- look-ups ------------------------------------------------------------------------------------


async def _some(names: AsyncIterator[Any]) -> list[str]:
    """The first of a set's members, as many as are looked at."""
    found: dict[str, None] = {}
    async for raw in names:
        found[decoded(raw)] = None
        if len(found) >= SAMPLE:
            break
    return list(found)


async def _exist(client: Any, keys: Iterable[str]) -> list[int]:
    found: list[int] = []
    names = list(keys)
    for at in range(0, len(names), PAGE):
        pipe = client.pipeline(transaction=False)
        for name in names[at : at + PAGE]:
            pipe.exists(name)
        found += await pipe.execute()
    return found


async def _scores(client: Any, key: str, members: Sequence[str]) -> list[float | None]:
    found: list[float | None] = []
    for at in range(0, len(members), PAGE):
        pipe = client.pipeline(transaction=False)
        for member in members[at : at + PAGE]:
            pipe.zscore(key, member)
        found += await pipe.execute()
    return found


async def _missing(client: Any, stream: str, entries: Sequence[str]) -> list[str]:
    """Which of `entries` are not on a stream."""
    there = await reads.there(client, key=stream, kind="stream", things=entries)
    return [entry for entry, is_there in zip(entries, there, strict=True) if not is_there]


async def _plans(client: Any, keys: RunKeys, partitions: int, s: Suspicions) -> None:
    """Plans of batches against the rollouts that they name."""
    read = 0
    async for raw, packed in client.hscan_iter(keys.batches, count=PAGE):
        if (read := read + 1) > PLANS:
            s.sampled.append(keys.batches)
            return
        number = decoded(raw)
        try:
            plan = Plan.loads(whole(raw, 0), packed)
        except (WireError, ValueError) as exc:
            s.add("planless", f"{keys.batches} {number}", str(exc)[:80])
            continue
        if plan.state == "committed":
            continue  # its entries may be gone already: it is rolled forward from here
        s.plans += 1
        gone = 0
        for p in range(partitions):
            entries = [entry for where, entry, _, _ in plan.rollouts[:SAMPLE] if where == p]
            gone += len(await _missing(client, keys.partition(p).rollouts, entries))
        if gone:
            lacks = f"{gone} of {len(plan.rollouts)} rollouts, {plan.state}"
            s.add("plan", f"batch {number}", lacks)
