"""Why no batch comes: causes with a code, the evidence for each, and what to do about it.

- :func:`diagnose` is pure: :class:`Evidence` in, causes out, the one to act on first in front.
- :func:`counts` says where the samples are; causes say why they are there.
- Codes are stable: programs may go by them. Sentences may change.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rollfleet_common.ledger import Books

__all__ = ["CardServer", "Cause", "Evidence", "WorkerSeen", "counts", "diagnose", "tell"]

#: A worker writes its card every 10 s; one that missed three is gone.
LOST_AFTER_S = 30.0
#: Share of `maxmemory` from which on Redis counts as full.
FULL = 0.98
#: Seconds that samples may be in flight before that is a cause.
LONG_S = 60.0


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason why no batch comes."""

    #: Stable name, such as ``no-worker``.
    code: str
    #: What was found, in a sentence.
    evidence: str
    #: What to do; "" if there is nothing to do but wait.
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.evidence}: {self.remedy}" if self.remedy else self.evidence


@dataclass(frozen=True, slots=True)
class CardServer:
    """An inference server as one worker sees it."""

    name: str
    state: str
    in_flight: int = 0
    version: int | None = None
    #: Why it is sent nothing, or what it did wrong last.
    why: str = ""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker as its card shows it."""

    id: str
    state: str
    seen_s: float
    slots: int = 0
    busy: int = 0
    routes: tuple[str, ...] = ()
    servers: tuple[CardServer, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether its card is out of date."""
        return self.seen_s > LOST_AFTER_S


@dataclass(slots=True)
class Evidence:
    """What is known of a run at one moment, for :func:`diagnose`."""

    books: Books
    #: Cards of workers; None if they could not be read, and why in `unread`.
    workers: Sequence[WorkerSeen] | None = ()
    #: Samples that the trainer holds and could train on.
    here: int = 0
    #: Samples of batches that were handed out and not trained.
    handed: int = 0
    #: Training samples that may be outstanding.
    limit: int = 0
    version: int = 0
    paused_s: float = 0.0
    #: Whether a feed was ever begun, has ended, and waits for its source.
    fed: bool = False
    feed_ended: bool = False
    source_silent: bool = False
    #: Groups of which every sample came or was given up, and that were torn in a row.
    torn_in_a_row: int = 0
    #: Newest failure of a sample, and how many deaths there were since the last rollout.
    newest: str = ""
    deaths_in_a_row: int = 0
    #: Seconds since the books stopped to balance, and since the oldest sample in flight was sent.
    unbalanced_s: float = 0.0
    oldest_flight_s: float = 0.0
    #: Whether prompts were found that were delivered to no worker.
    unheld: bool = False
    used_bytes: int = 0
    max_bytes: int = 0
    #: Why a part of the evidence could not be read.
    unread: Sequence[str] = ()
    #: What the trainer knows of its own refits; "" if all is well.
    refits: str = ""
    #: Least version that a server serves, if all serve a later one than the trainer's; else None.
    future: int | None = None
    routes: Mapping[str, int] = field(default_factory=dict)


def diagnose(e: Evidence) -> list[Cause]:
    """Every cause that the evidence shows; empty if it shows none."""
    return [*_redis(e), *_fed(e), *_workers(e), *_weights(e), *_failing(e), *_lost(e), *_slow(e)]


def tell(e: Evidence) -> str:
    """The causes, then the counts, in one line."""
    said = [str(cause) for cause in diagnose(e)]
    return "; ".join([*said, *counts(e), *e.unread])


def counts(e: Evidence) -> Iterator[str]:
    """Where the samples are, and what became of the others."""
    b = e.books
    yield f"{b.waiting} samples wait for a worker"
    yield f"{b.in_flight} are in flight"
    yield f"{b.delayed} wait for another attempt"
    yield f"{e.here} are ready"
    if e.handed:
        yield f"{e.handed} are handed out and not trained"
    yield f"{b.dead} died{_by(b.counters, 'dead:')}"
    if dropped := sum(b.dropped.values()):
        yield f"{dropped} were dropped{_by(b.counters, 'dropped:')}"
    if retried := sum(v for k, v in b.counters.items() if k.startswith("retried:")):
        yield f"{retried} attempts were repeated{_by(b.counters, 'retried:')}"


def _by(counters: Mapping[str, int], prefix: str) -> str:
    found = {k.removeprefix(prefix): v for k, v in counters.items() if k.startswith(prefix) and v}
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    return f" ({', '.join(f'{n} {reason}' for reason, n in ranked)})" if ranked else ""


def _redis(e: Evidence) -> Iterator[Cause]:
    if e.max_bytes and e.used_bytes >= FULL * e.max_bytes:
        yield Cause(
            "redis-full",
            f"Redis is full: {e.used_bytes / 2**20:,.0f} of maxmemory {e.max_bytes / 2**20:,.0f} MiB "
            "are used, and it refuses writes",
            "raise maxmemory, commit batches, or purge dead letters (`rollfleet dead purge`)",
        )
    if e.paused_s > 0:
        yield Cause(
            "paused",
            f"this trainer has paused claiming for another {e.paused_s:.0f} s",
            "call pause(0) to resume",
        )


def _fed(e: Evidence) -> Iterator[Cause]:
    b = e.books
    if not e.fed and not b.submitted:
        yield Cause("nothing-submitted", "nothing was submitted", "call feed() or submit()")
    elif not b.outstanding and not e.here and (not e.fed or e.feed_ended):
        ended = "the feed has ended" if e.feed_ended else "no feed is running"
        done = b.trained + b.committed
        yield Cause(
            "nothing-left",
            f"all {b.submitted} submitted samples are settled ({done} trained, "
            f"{sum(b.dropped.values())} dropped, {b.dead} dead) and {ended}",
            "call feed() or submit()",
        )
    elif e.source_silent and b.outstanding < e.limit:
        yield Cause(
            "source-silent",
            f"the source of prompts yields none ({b.outstanding} of {e.limit} samples are out)",
            "look at what the iterable given to feed() waits for",
        )
    if e.handed and e.handed + e.here >= e.limit > 0:
        yield Cause(
            "not-trained",
            f"all {e.limit} samples that may be outstanding are with the trainer, {e.handed} of them "
            "in batches that it did not say were trained",
            "call trained() or commit() for every batch",
        )


def _workers(e: Evidence) -> Iterator[Cause]:
    if e.workers is None:
        return
    live = [worker for worker in e.workers if not worker.lost]
    if not e.workers:
        yield Cause("no-worker", "no worker has ever shown up for this run")
        return
    if not live:
        since = min(worker.seen_s for worker in e.workers)
        yield Cause(
            "workers-lost",
            f"all {len(e.workers)} workers lost contact, the last {since:.0f} s ago",
            "look at their logs, and start them again",
        )
        return
    for route, waiting in e.routes.items():
        if waiting and not any(route in worker.routes for worker in live):
            yield Cause(
                "no-route",
                f"no worker serves route {route!r}, on which {waiting} samples wait",
                f"start one with --workflow {route}=PACKAGE.MODULE:CLASS",
            )
    yield from _servers(live)
    states = Counter(worker.state for worker in live)
    for state, what, remedy in (
        ("no-redis", "could not reach Redis lately", "look at their network and their URL"),
        ("outbox-full", "hold rollouts that Redis does not take", "look at the memory of Redis"),
        ("draining", "are draining, and claim nothing", "start others"),
    ):
        if states[state]:
            yield Cause(
                f"workers-{state}", f"{states[state]} of {len(live)} workers {what}", remedy
            )


def _servers(live: Sequence[WorkerSeen]) -> Iterator[Cause]:
    seen = {server.name: server for worker in live for server in worker.servers}
    up = {s.name for worker in live for s in worker.servers if s.state == "serving"}
    failing = {name: s.why for name, s in seen.items() if s.why}
    said = "; ".join(f"{name}: {why}" for name, why in list(failing.items())[:3])
    if any(worker.state == "no-server" for worker in live) and not up:
        states = Counter(server.state for server in seen.values())
        which = ", ".join(f"{n} {state}" for state, n in states.items()) or "none is known"
        yield Cause(
            "no-server",
            f"no inference server answers ({which}{f'; {said}' if said else ''})",
            "start or repair the servers; if they want a key, give it to the workers (--api-key)",
        )
    elif failing:
        yield Cause(
            "servers-failing",
            f"{len(failing)} of {len(seen)} inference servers fail ({said})",
            "look at the servers, and at the workers' --api-key if they refuse it",
        )


def _weights(e: Evidence) -> Iterator[Cause]:
    if e.future is not None:
        yield future(e.future, e.version)
    if e.refits:
        yield Cause("weights", e.refits)


def future(served: int, version: int) -> Cause:
    """Every server serves a later version than the trainer is at."""
    return Cause(
        "future",
        f"the inference servers serve version {served}, the trainer is at {version}: what they make "
        "is dropped as `future`",
        f"refit them with publish(weights=...) or open the run with version={served}",
    )


def _failing(e: Evidence) -> Iterator[Cause]:
    b = e.books
    newest = f"; the newest failure: {e.newest}" if e.newest else ""
    torn = b.dropped.get("torn", 0)
    retried = sum(v for k, v in b.counters.items() if k.startswith("retried:"))
    if e.torn_in_a_row and e.torn_in_a_row > e.deaths_in_a_row:
        yield Cause(
            "torn",
            f"the last {e.torn_in_a_row} groups were torn: some of their samples died{newest}",
            "mend what fails, or set min_group_size to train on groups that lack a sample",
        )
    elif e.deaths_in_a_row:
        yield Cause(
            "dying",
            f"the last {e.deaths_in_a_row} samples died, and none came{newest}",
            "see `rollfleet dead list`",
        )
    elif newest and (b.dead or torn or retried):
        yield Cause("failures", f"samples fail{newest}", "see `rollfleet dead list`")
    for reason, remedy in (
        ("rejected", "look at what should_accept refuses"),
        ("stale", "lower pipeline_depth, or raise max_staleness"),
    ):
        dropped = b.dropped.get(reason, 0)
        if dropped and dropped > b.trained + b.committed:
            what = f"more samples were dropped as `{reason}` ({dropped}) than were trained on"
            yield Cause(reason, what, remedy)


def _lost(e: Evidence) -> Iterator[Cause]:
    if e.unbalanced_s > 0 and e.books.balance:
        n = abs(e.books.balance)
        what = "samples are in no place" if e.books.balance > 0 else "samples are there twice"
        yield Cause(
            "unbalanced",
            f"{n} {what}, for {e.unbalanced_s:.0f} s: a stream or an entry was deleted or written "
            "by hand, or Redis lost writes",
            "the trainer submits again what it knows; see `rollfleet doctor`",
        )
    if e.unheld:
        yield Cause(
            "unheld",
            "prompts were delivered to a worker that Redis does not know any more (XGROUP "
            "DELCONSUMER): nobody runs them",
            "the trainer submits them again",
        )


def _slow(e: Evidence) -> Iterator[Cause]:
    if e.oldest_flight_s < LONG_S or not e.books.in_flight or not e.workers:
        return
    # Where no server answers, that is the cause.
    live = [worker for worker in e.workers if not worker.lost and worker.state != "no-server"]
    if not live:
        return
    asked = sum(server.in_flight for worker in live for server in worker.servers)
    if sum(worker.busy for worker in live) > asked:
        yield Cause(
            "episodes-hang",
            f"samples are in flight for up to {e.oldest_flight_s:.0f} s, and the workers wait for "
            f"servers with {asked} of them: the others are in workflows or reward functions",
            "look at the workers' logs; their episode and reward timeouts bound this",
        )
    else:
        yield Cause(
            "servers-slow",
            f"samples are in flight for up to {e.oldest_flight_s:.0f} s, in inference servers",
            "look at the servers' load, and at max_tokens",
        )
