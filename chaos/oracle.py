"""The judge: were the promises kept? From Redis, the logs, and what was seen from outside.

- Shares no code with the product: a bug there cannot hide itself here.
- The truth of a sample is what its workflow wrote into its payload; the truth of what was trained
  is the trainer's last checkpoint line and those before it.
- A verdict is yes, no, or not judged; every no names its witnesses.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos.case import Case
from chaos.observe import Look
from chaos.snapshot import Member

__all__ = ["PROMISES", "Verdict", "as_json", "judge"]

PROMISES = {
    "P1": "no acknowledged prompt is lost",
    "P2": "at most one rollout is published per attempt chain",
    "P3": "each sample is in at most one committed batch",
    "P4": "nothing over the staleness bound is trained on",
    "P5": "a dead worker's prompts are taken over within the lease + 2 s",
    "P6": "memory returns",
    "P7": "a drain exits with 0 within its deadline",
    "P8": "back-pressure never drops",
    "P9": "health tells the truth",
    "P10": "groups are whole",
}
#: Why a group may be dropped. What is not here was dropped for want of room, or by a defect.
REASONS = frozenset({"stale", "torn", "dead", "duplicate", "cancelled", "deadline", "future"})
#: Seconds past the lease that taking over may take.
TAKE_OVER_S = 2.0
#: Seconds past its deadline in which a drained process still may say its last words and end.
LAST_WORDS_S = 3.0
#: Seconds after which a worker must have noticed an outage: refused at once, or silence, where the
#: product's socket timeout (5 s, and 0.5 s of block) has to pass first.
NOTICE_S = {"down": 3.0, "frozen": 8.0}
#: A version may be seen this much before the clock of its publisher says so.
CLOCK_S = 0.05
#: Seconds after the last harm in which a worker may still be making up its mind.
CALM_S = 10.0
WITNESSES = 5


@dataclass(slots=True)
class Verdict:
    """One promise, judged."""

    promise: str
    #: None: there was nothing to judge it by.
    ok: bool | None
    said: str
    witnesses: list[str] = field(default_factory=list)
    measured: Mapping[str, float] = field(default_factory=dict)


def judge(case: Case) -> list[Verdict]:
    """Judge all ten promises."""
    judges: list[Callable[[Case], Found]] = [
        _lost, _twice, _again, _stale, _late, _memory, _drains, _pressure, _health, _torn,
    ]  # fmt: skip
    verdicts: list[Verdict] = []
    for promise, judged in zip(PROMISES, judges, strict=True):
        found = judged(case)
        if found is None:
            verdicts.append(Verdict(promise, None, "nothing happened that it could be judged by"))
            continue
        said, witnesses, measured = found
        verdicts.append(Verdict(promise, not witnesses, said, witnesses[:WITNESSES], measured))
    return verdicts


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """For a report."""
    return [asdict(verdict) | {"means": PROMISES[verdict.promise]} for verdict in verdicts]


Found = tuple[str, list[str], Mapping[str, float]] | None


def _lost(case: Case) -> Found:
    acked = case.acked()
    if not acked:
        return None
    trained = {(row["group"], row["index"]) for _, row in case.trained()}
    here = case.snapshot.everywhere()
    missing = [m for m in acked if m not in trained and m not in here and m[0] not in case.dropped]
    lost = [m for m in missing if not case.excused(acked[m])]
    witnesses = [f"{g} #{i}, acknowledged at {acked[g, i]:.3f}, is nowhere" for g, i in lost]
    if not case.evidence.excused and case.snapshot.balance:
        witnesses.append(f"the ledger is out by {case.snapshot.balance} samples")
    said = f"{len(acked)} acknowledged, {len(trained)} trained, {len(lost)} lost"
    measured = {"acked": len(acked), "trained": len(trained), "lost": len(lost)}
    return said, witnesses, measured | {"lost by fsync contract": len(missing) - len(lost)}


def _twice(case: Case) -> Found:
    seen: dict[Member, float] = {}
    twice: list[str] = []
    for delivery in case.evidence.deliveries:
        member = (delivery.group, delivery.index)
        if member in seen and not case.excused(seen[member]):
            twice.append(f"{member[0]} #{member[1]} again {delivery.t - seen[member]:.3f} s later")
        seen[member] = delivery.t
    alive = Counter(case.snapshot.places.get("rollouts", ()))
    twice += [f"{m[0]} #{m[1]} stands {n} times" for m, n in alive.items() if n > 1]
    measured = {"delivered": len(case.evidence.deliveries), "duplicated": len(twice)}
    return f"{len(seen)} members delivered, {len(twice)} twice", twice, measured


def _again(case: Case) -> Found:
    batches: dict[Member, int] = {}
    again: list[str] = []
    for batch, row in case.trained():
        member = (row["group"], row["index"])
        if member in batches:
            again.append(f"{member[0]} #{member[1]} in batches {batches[member]} and {batch}")
        batches[member] = batch
    if not batches:
        return None
    said = f"{len(batches)} samples in {len(set(batches.values()))} batches, {len(again)} again"
    return said, again, {"trained twice": len(again)}


def _stale(case: Case) -> Found:
    opened = [(x["epoch"], x["version"]) for x in case.log if x["ev"] == "opened"]
    known = _published(case.log)
    worst, stale, samples = 0, [], 0
    for line, current in case.handed():
        for row in line["samples"]:
            samples += 1
            who = f"{row['group']} #{row['index']} in batch {line['batch']}"
            # A version past a rollback is as far on the other side of it: as the docs promise.
            then = [(epoch, at) for epoch, at in opened if epoch <= line["epoch"]]
            oldest = min(_replayed(row[end], row["epoch"], then) for end in ("oldest", "newest"))
            worst = max(worst, current - oldest)
            if current - oldest > case.max_staleness:
                stale.append(f"{who} is {current - oldest} versions behind {current}")
            elif oldest > current:
                stale.append(f"{who} is of version {oldest}, the trainer is at {current}")
            if known.get((row["epoch"], row["newest"]), 0.0) > row["born"] + CLOCK_S:
                stale.append(f"{who} claims version {row['newest']}, published after it was begun")
    if not samples:
        return None
    said = f"{samples} samples handed over, the oldest {worst} of {case.max_staleness} behind"
    return said, stale, {"stale": len(stale), "worst staleness": worst}


def _published(log: Iterable[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """The earliest moment at which anybody can have known a version, by (epoch, version)."""
    known: dict[tuple[int, int], float] = {}
    opening = 0.0
    for line in log:
        if line["ev"] == "opening":
            opening = line["t"]
        elif line["ev"] in ("opened", "publishing"):
            t = opening if line["ev"] == "opened" else line["t"]
            known.setdefault((line["epoch"], line["version"]), t)
    return known


def _replayed(version: int, epoch: int, opened: Iterable[tuple[int, int]]) -> int:
    for began, at in opened:
        if began > epoch and version > at:
            version = 2 * at - version
    return version


def _late(case: Case) -> Found:
    judged = [kill for kill in case.evidence.kills if kill.leases]
    if not judged:
        return None
    late: list[str] = []
    times: list[float] = []
    for kill in judged:
        took = float("inf") if kill.recovered_s is None else kill.recovered_s
        away = case.away_s(kill.t, kill.t + min(took, 1e6))
        bound = case.lease_s + TAKE_OVER_S + (away + TAKE_OVER_S if away else 0.0)
        if took > bound:
            late.append(
                f"{kill.worker}: {kill.leases} leases after {took:.2f} s, bound {bound:.2f}"
            )
        elif not away:
            times.append(took)
    times.sort()
    measured: dict[str, float] = {"kills": len(judged)}
    if times:
        measured |= {"p50 s": times[len(times) // 2], "max s": times[-1]}
    said = f"{len(judged)} deaths with leases, taken over after " + (
        f"{measured['p50 s']:.2f} s (median), {times[-1]:.2f} s (longest)" if times else "no time"
    )
    return said, late, measured


def _memory(case: Case) -> Found:
    if not case.ended:
        return "the run did not come to its end", ["not drained: see the logs"], {}
    return "all streams empty, every other key has a TTL or an owner", case.snapshot.leftovers, {}


def _drains(case: Case) -> Found:
    if not case.evidence.drains:
        return None
    bad: list[str] = []
    longest = 0.0
    for drain in case.evidence.drains:
        took = float("inf") if drain.took_s is None else drain.took_s
        away = case.away_s(drain.t - 6.0, drain.t + min(took, 60.0))
        allowed = {0, 3} if away else {0}
        slack = LAST_WORDS_S + (away + 6.0 if away else 0.0)
        longest = max(longest, 0.0 if away else took)
        if drain.code not in allowed or took > drain.deadline_s + slack:
            bad.append(f"{drain.worker}: exit {drain.code} after {took:.1f} s")
    measured = {"drains": len(case.evidence.drains), "longest s": longest}
    return f"{len(case.evidence.drains)} drains, the longest {longest:.2f} s", bad, measured


def _pressure(case: Case) -> Found:
    bad = [
        f"{number} samples dropped as {name[8:]!r}"
        for name, number in case.snapshot.ledger.items()
        if name.startswith("dropped:") and name[8:] not in REASONS and not case.evidence.excused
    ]
    if case.snapshot.balance and not case.evidence.excused:
        bad.append(f"{case.snapshot.balance} samples left the streams without a verdict")
    most, limit = case.evidence.most_outstanding, case.limit + case.owed_again()
    if most > limit and not case.evidence.excused:
        bad.append(f"{most} samples were outstanding, over the limit of {limit}")
    return f"at most {most} of {limit} samples outstanding", bad, {"most outstanding": most}


def _health(case: Case) -> Found:
    if not case.evidence.looks:
        return None
    looks: dict[str, list[Look]] = {}
    for look in case.evidence.looks:
        looks.setdefault(look.worker, []).append(look)
    lies: list[str] = []
    judged = 0
    for worker, mine in looks.items():
        for judges in (_outages, _drained, _calm):
            found, count = judges(case, worker, mine)
            lies += found
            judged += count
    said = f"{len(case.evidence.looks)} looks at {len(looks)} workers, {judged} of them judged"
    return said, lies, {"looks": len(case.evidence.looks), "judged": judged}


def _awake(case: Case, worker: str, looks: Iterable[Look]) -> list[Look]:
    """Looks at a worker that was not frozen: a frozen one cannot answer."""
    frozen = [(b - 1.5, e + 1.5) for w, b, e in case.evidence.frozen if w == worker]
    return [look for look in looks if not any(b <= look.t <= e for b, e in frozen)]


def _leaves(case: Case, worker: str) -> tuple[float, float]:
    """When a worker was told to end, and when it had."""
    drain = next((d for d in case.evidence.drains if d.worker == worker), None)
    if drain is None:
        return float("inf"), float("inf")
    return drain.t, drain.t + (drain.took_s or 0.0)


def _outages(case: Case, worker: str, looks: Sequence[Look]) -> tuple[list[str], int]:
    """While Redis is away a worker is not ready, and it is live all the same."""
    lies: list[str] = []
    judged = 0
    leaves, _ = _leaves(case, worker)
    born = next((look.t for look in looks if look.live), float("inf"))
    for look in _awake(case, worker, looks):
        outage = next((o for o in case.evidence.outages if o.began <= look.t <= o.ended), None)
        if outage is None or look.t < outage.began + NOTICE_S[outage.kind]:
            continue
        judged += 1
        if look.ready and look.t < outage.ended - 0.5:
            since = look.t - outage.began
            lies.append(f"{worker} is ready, {since:.1f} s after Redis was {outage.kind}")
        if not look.live and born < look.t < leaves:
            lies.append(f"{worker} is not live because Redis is {outage.kind}")
    return lies, judged


def _drained(case: Case, worker: str, looks: Sequence[Look]) -> tuple[list[str], int]:
    """While it drains a worker is not ready."""
    began, ended = _leaves(case, worker)
    draining = [look for look in _awake(case, worker, looks) if began + 0.5 < look.t < ended]
    return [f"{worker} is ready while it drains" for look in draining if look.ready], len(draining)


def _calm(case: Case, worker: str, looks: Sequence[Look]) -> tuple[list[str], int]:
    """Just before it is told to end, with nothing wrong for a while, a worker is ready."""
    seen = case.evidence
    t, _ = _leaves(case, worker)
    before = [look for look in looks if t - 1.5 < look.t < t - 0.1]
    harmed = case.away_s(t - CALM_S, t) or any(t - CALM_S < d < t for d in seen.disturbed)
    if not before or harmed or len(looks) < 20 or any(w == worker for w, _, _ in seen.frozen):
        return [], 0
    why = before[-1].reason
    return [f"{worker} is not ready ({why}) while nothing is wrong"] * (not before[-1].ready), 1


def _torn(case: Case) -> Found:
    torn: list[str] = []
    batches: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line, _ in case.handed():
        for row in line["samples"]:
            batches.setdefault((line["batch"], row["group"]), []).append(row)
    for (batch, group), rows in batches.items():
        if sorted(row["index"] for row in rows) != list(range(rows[0]["n"])):
            torn.append(f"{group} in batch {batch} has {len(rows)} of {rows[0]['n']}")
        for row in rows:
            if f"p{row['position']:.0f}" != group or row["index"] != row["own"]:
                who = f"{group} #{row['index']}"
                torn.append(f"{who} holds the payload of another sample")
    if not batches:
        return None
    return f"{len(batches)} groups handed over, {len(torn)} torn", torn, {"torn": len(torn)}
