"""What the doctor asks about those who work: trainer, workers, leases, routes, what nobody takes in.

- Ages are taken by the clock of Redis. A card of release 0.1.0 is dated by its worker's own clock,
  which may be wrong, and is then told apart by what Redis itself saw of that worker.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from rollfleet.run.watch import newest_failure
from rollfleet.state.causes import future
from rollfleet_common.keys import LAST_ID, PartitionKeys
from rollfleet_common.text import decoded, printable
from rollfleet_console.doctor.findings import Finding, Severity, some
from rollfleet_console.doctor.redis_server import CLOCK_SLACK_S
from rollfleet_console.status.explain import ago
from rollfleet_console.status.views import Snapshot, WorkerCard

__all__ = [
    "ConsumerInfo",
    "backlog",
    "consumers",
    "leases",
    "letters",
    "overdue",
    "routes",
    "trainer",
    "versions",
    "workers",
]

#: What a live reader takes in within a second may be this old before it is told.
TAKEN_IN_S = 15.0
#: A worker looks for lapsed leases three times a lease: at twice the lease, nobody does.
OVERDUE_LEASES = 2.0
#: Leases that are counted; what matters is that there are some.
COUNTED = 1000
PAGE = 50
#: Dead letters of a partition that are counted by reason, the newest; each may hold a megabyte.
LETTERS = 500


@dataclass(frozen=True, slots=True)
class ConsumerInfo:
    """A worker, as the consumer groups of the prompts streams know it."""

    name: str
    pending: int
    #: Since it last read, renewed or settled anything.
    idle_s: float


async def consumers(client: Any, partitions: Sequence[PartitionKeys]) -> list[ConsumerInfo]:
    """All of them, over all routes and partitions."""
    known: dict[str, ConsumerInfo] = {}
    for k in partitions:
        for raw in await client.smembers(k.routes):
            for row in await _ask(client.xinfo_consumers(k.prompts(decoded(raw)), "workers")):
                name, idle_s = printable(decoded(row["name"])), int(row["idle"]) / 1000
                before = known.get(name, ConsumerInfo(name, 0, idle_s))
                pending = before.pending + int(row["pending"])
                known[name] = ConsumerInfo(name, pending, min(before.idle_s, idle_s))
    return sorted(known.values(), key=lambda c: c.name)


async def _ask(question: Any) -> list[Any]:
    """The answer; nothing where the stream or its group is not there."""
    try:
        return list(await question)
    except ResponseError as exc:
        if "NOGROUP" in str(exc) or "no such key" in str(exc):
            return []
        raise


# ---- the trainer, and what nobody takes in -------------------------------------------------------


def trainer(s: Snapshot) -> list[Finding]:
    """Whether somebody holds the run."""
    if s.policy is None:
        what = f"no trainer has ever opened run {s.run!r}"
        return [Finding(Severity.WARNING, "trainer", what, fix="check the name of the run (--run)")]
    if s.trainer:
        what = f"{s.trainer} holds the run, at version {s.policy.version}"
        return [Finding(Severity.OK, "trainer", what)]
    last = f"; the last was {s.last_trainer}" if s.last_trainer else ""
    books = s.books
    held = books.ready + books.handed_out + books.trained
    left = held + books.waiting + books.delayed + books.in_flight
    what = f"no trainer holds the run{last}"
    if not left:
        return [Finding(Severity.OK, "trainer", f"{what}, and nothing is left for one")]
    what += (
        f"; {left:,} samples are not settled, of which {held:,} are done: their groups stay open"
    )
    fix = "start the trainer again: it takes up what is left"
    return [Finding(Severity.WARNING, "trainer", what, fix=fix)]


async def backlog(
    client: Any, partitions: Sequence[PartitionKeys], s: Snapshot, now_s: float
) -> list[Finding]:
    """Rollouts and tombstones that the trainer does not read."""
    if s.policy is None:
        return []
    found: list[Finding] = []
    for k in partitions:
        for stream, what in ((k.rollouts, "rollouts"), (k.tombstones, "tombstones")):
            groups = await _ask(client.xinfo_groups(stream))
            group = next((g for g in groups if g["name"] == b"trainer"), None)
            if group is None:
                lost = "the trainer's consumer group is gone: it can read nothing"
                fix = "Redis was flushed or restarted empty: end the trainer and open the run anew"
                found.append(Finding(Severity.ERROR, "intake", lost, stream, fix))
                continue
            last = decoded(group["last-delivered-id"])
            # Nothing comes after the highest id there is, and Redis refuses to look.
            unread = [] if last == LAST_ID else await client.xrange(stream, f"({last}", count=1)
            age_s = now_s - int(decoded(unread[0][0]).partition("-")[0]) / 1000 if unread else 0.0
            if s.trainer and age_s > TAKEN_IN_S:
                late = f"{what} wait to be read, the oldest for {ago(age_s)}, while a trainer "
                late += "holds the run"
                fix = "the trainer's event loop is blocked, or its reader failed: look at its log"
                found.append(Finding(Severity.WARNING, "intake", late, stream, fix))
    what = (
        "the trainer reads what arrives" if s.trainer else "nothing is lost while no trainer reads"
    )
    return found or [Finding(Severity.OK, "intake", what)]


def versions(s: Snapshot) -> list[Finding]:
    """Whether all servers serve weights that the trainer has not made."""
    serving = [x for w in s.workers if not w.lost for x in w.servers if x.up]
    known = [x.version for x in serving if x.version is not None]
    if s.policy is None or not s.trainer or not known or len(known) < len(serving):
        return []
    if min(known) <= s.policy.version:
        return []
    cause = future(min(known), s.policy.version)
    where = some(sorted({x.name for x in serving}))
    return [Finding(Severity.WARNING, "servers", cause.evidence, where, cause.remedy)]


async def letters(client: Any, partitions: Sequence[PartitionKeys], s: Snapshot) -> list[Finding]:
    """Dead letters and garbage, by what ended them, with the newest error."""
    reasons: Counter[str] = Counter()
    total = 0
    for k in partitions:
        total += await client.xlen(k.dead)
        before, seen = "+", 0
        while seen < LETTERS and (rows := await client.xrevrange(k.dead, max=before, count=PAGE)):
            reasons.update(decoded(fields.get(b"why", b"?"))[:60] for _, fields in rows)
            before, seen = f"({decoded(rows[-1][0])}", seen + len(rows)
            if before == "(0-0":
                break
    if not reasons:
        return [Finding(Severity.OK, "letters", "no dead letters")]
    of = f"{total:,}, of the newest" if total > reasons.total() else ""
    counted = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
    if cut := s.books.counters.get("letters:cut", 0):
        counted += f"; {cut:,} older ones were cut"
    if newest := await newest_failure(client, partitions):
        counted += f"; the newest of them: {newest}"
    fix = "rollfleet dead list; then retry or purge them"
    if s.books.dead and (torn := s.books.dropped.get("torn", 0)):
        fix += f". {torn:,} samples came and were dropped because another of their group died: set "
        fix += "min_group_size to train on groups that lack a sample"
    if reasons["garbage"]:
        fix += ". Garbage was written by something that is not this release of rollfleet"
    return [
        Finding(
            Severity.WARNING, "letters", f"dead letters: {of + ' ' if of else ''}{counted}", fix=fix
        )
    ]


# ---- workers -------------------------------------------------------------------------------------


def workers(s: Snapshot, seen: Sequence[ConsumerInfo], lease_s: float) -> list[Finding]:
    """Cards against what Redis saw of their workers."""
    idle = {c.name: c.idle_s for c in seen}
    found = [*_silent(seen, lease_s)]
    lost = [w for w in s.workers if w.lost]
    # Redis heard of it within a lease: it lives, and only its clock or its card is wrong.
    odd = [w for w in lost if idle.get(w.id, lease_s) < min(lease_s, w.seen_s / 2)]
    if odd:
        what = f"{len(odd)} worker(s) are at work, but their cards say that they have not been "
        what += f"seen for {ago(max(w.seen_s for w in odd))}: their clocks are behind"
        fix = "run NTP on their hosts; for workers of release 0.1.0 a pause ends late"
        found.append(_about(what, odd, fix))
    if gone := [w for w in lost if w not in odd]:
        what = f"{len(gone)} worker(s) have not shown themselves for "
        what += f"{ago(min(w.seen_s for w in gone))} or more"
        fix = "they were killed, or cannot reach Redis: look at their logs; a card goes after an "
        fix += "hour, and a drained worker takes it down itself"
        found.append(_about(what, gone, fix))
    ahead = [w for w in s.workers if w.ahead_s > CLOCK_SLACK_S]
    if ahead:
        by_s = max(w.ahead_s for w in ahead)
        what = f"the clocks of {len(ahead)} worker(s) are up to {ago(by_s)} ahead of Redis"
        found.append(
            _about(what, ahead, "run NTP on their hosts; for workers of 0.1.0 a pause ends early")
        )
    if s.unreadable:
        what = f"{len(s.unreadable)} worker card(s) cannot be read"
        fix = "another release, or not ours: HDEL them if nobody runs"
        found.append(Finding(Severity.WARNING, "workers", what, some(s.unreadable), fix))
    live = [w for w in s.workers if not w.lost]
    found += [*_states(live), *_releases(live)]
    if not found:
        slots = sum(w.slots for w in live)
        what = f"{len(live)} at work, {slots:,} slots" if live else "none is registered"
        found.append(Finding(Severity.OK, "workers", what))
    return found


def _about(what: str, those: Sequence[WorkerCard], fix: str) -> Finding:
    where = some(f"{w.id} on {w.host}" for w in those)
    return Finding(Severity.WARNING, "workers", what, where, fix)


def _silent(seen: Sequence[ConsumerInfo], lease_s: float) -> Iterator[Finding]:
    silent = [c for c in seen if c.pending and c.idle_s > lease_s]
    if silent:
        held = sum(c.pending for c in silent)
        what = f"{len(silent)} worker(s) hold {held:,} leases and have been silent for longer than "
        what += f"a lease ({ago(lease_s)})"
        fix = "dead or frozen; any worker of the route with a free slot takes the leases over: "
        fix += "if this stays, start one"
        where = some(f"{c.name} ({c.pending} for {ago(c.idle_s)})" for c in silent)
        yield Finding(Severity.WARNING, "workers", what, where, fix)


def _states(live: Sequence[WorkerCard]) -> Iterator[Finding]:
    for state, what, fix in (
        ("no-redis", "cannot reach Redis", "look at their network and their URL"),
        ("no-server", "have no inference server that answers", "start or repair the servers"),
        (
            "outbox-full",
            "hold finished rollouts that Redis does not take",
            "Redis is out of memory, or slow: see `memory` above",
        ),
    ):
        if those := [w for w in live if w.state == state]:
            yield _about(f"{len(those)} worker(s) {what}", those, fix)


def _releases(live: Sequence[WorkerCard]) -> Iterator[Finding]:
    releases = Counter(w.version for w in live)
    if len(releases) > 1:
        what = "workers of several releases: "
        what += ", ".join(f"{n} of {v}" for v, n in sorted(releases.items()))
        fix = "finish the rolling deploy, or drain the run first if the wire's version has changed"
        yield Finding(Severity.INFO, "workers", what, fix=fix)


# ---- leases and routes ---------------------------------------------------------------------------


async def leases(
    client: Any, partitions: Sequence[PartitionKeys], s: Snapshot, lease_s: float
) -> list[Finding]:
    """Leases that have lapsed, and that nobody takes over."""
    found: list[Finding] = []
    overdue_ms = int(lease_s * 1000 * OVERDUE_LEASES)
    served = {route.name: route.served_by for route in s.routes}
    for k in partitions:
        for raw in sorted(await client.smembers(k.routes)):
            route = decoded(raw)
            rows = await _ask(
                client.xpending_range(
                    k.prompts(route), "workers", min="-", max="+", count=COUNTED, idle=overdue_ms
                )
            )
            if not rows:
                continue
            oldest_s = max(int(row["time_since_delivered"]) for row in rows) / 1000
            number = f"{len(rows):,}" if len(rows) < COUNTED else f"{COUNTED:,} or more"
            what = f"{number} lease(s) were not renewed for up to {ago(oldest_s)} (a lease is "
            what += f"{ago(lease_s)}), and nobody takes them over"
            fix = "no live worker serves the route: start one"
            if served.get(route):
                fix = (
                    "all slots are busy, or the workers hang: add workers, or look at their logs; "
                )
                fix += "if workers run with another lease, say so: --lease"
            found.append(Finding(Severity.WARNING, "leases", what, k.prompts(route), fix))
    what = f"{s.books.in_flight:,} held, none overdue"
    return found or [Finding(Severity.OK, "leases", what)]


def routes(s: Snapshot, overdue_s: dict[str, float]) -> list[Finding]:
    """Routes that nobody serves, and delayed prompts that nobody brings back."""
    found: list[Finding] = []
    for route in s.routes:
        left = route.waiting + route.delayed + route.in_flight
        if left and not route.served_by:
            what = f"no live worker serves route {route.name!r}: {left:,} prompts wait"
            if route.oldest_waiting_s is not None:
                what += f", the oldest for {ago(route.oldest_waiting_s)}"
            fix = f"start a worker with --workflow {route.name}=PACKAGE.MODULE:CLASS"
            found.append(Finding(Severity.WARNING, "routes", what, fix=fix))
        elif (late_s := overdue_s.get(route.name, 0.0)) > TAKEN_IN_S:
            what = f"a prompt of route {route.name!r} was due for its next attempt "
            what += f"{ago(late_s)} ago, and is still parked"
            fix = "its workers cannot reach this partition, or hang: look at their logs"
            found.append(Finding(Severity.WARNING, "routes", what, fix=fix))
    what = f"{len(s.routes)}, each with prompts has a worker" if s.routes else "none yet"
    return found or [Finding(Severity.OK, "routes", what)]


async def overdue(
    client: Any, partitions: Sequence[PartitionKeys], now_s: float
) -> dict[str, float]:
    """Seconds that the first delayed prompt of each route is past its time."""
    late: dict[str, float] = {}
    for k in partitions:
        for raw in await client.smembers(k.routes):
            route = decoded(raw)
            for _, due_ms in await client.zrange(k.delayed(route), 0, 0, withscores=True):
                late[route] = max(late.get(route, 0.0), now_s - float(due_ms) / 1000)
    return late
