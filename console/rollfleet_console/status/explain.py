"""Why a fleet waits, in words: every wait that a snapshot shows has a sentence here.

- A sentence names who or what is waited for, how many prompts wait, and the remedy if there is one.
- Pure: a snapshot in, sentences out, those that an operator has to act on first.
"""

from collections.abc import Iterator, Sequence

from rollfleet_console.status.views import Snapshot, WorkerCard

__all__ = ["ago", "explain"]


def ago(seconds: float) -> str:
    """A span of time, short: ``45 s``, ``12 min``, ``3 h``, ``2 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def explain(s: Snapshot) -> list[str]:
    """The reasons of all that waits; none if all of it moves."""
    return [
        *_books(s),
        *_trainer(s),
        *_unserved(s),
        *_workers(s),
        *_delayed(s),
        *_flow(s),
        *_letters(s),
    ]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _wait(n: int) -> str:
    return f"{_count(n, 'prompt')} {'waits' if n == 1 else 'wait'}"


def _names(workers: Sequence[WorkerCard]) -> str:
    shown = ", ".join(worker.id for worker in workers[:3])
    return f"{shown} and {len(workers) - 3} more" if len(workers) > 3 else shown


def _books(s: Snapshot) -> Iterator[str]:
    if s.books.balance > 0:
        yield (
            f"the books do not balance: {_count(s.books.balance, 'prompt')} submitted, and nowhere "
            "to be found; Redis may have lost its last writes"
        )
    elif s.books.balance < 0:
        yield f"the books do not balance: {_count(-s.books.balance, 'prompt')} too many"


def _trainer(s: Snapshot) -> Iterator[str]:
    if s.policy is None:
        yield f"no trainer has ever opened run {s.run!r}: nothing is submitted"
    elif not s.trainer:
        last = f" (the last was {s.last_trainer})" if s.last_trainer else ""
        kept = s.books.ready + s.books.handed_out + s.books.trained
        held = f"; {_count(kept, 'rollout')} wait for one" if kept else ""
        yield f"no trainer holds the run{last}: nothing is submitted or trained{held}"
    if s.paused_s:
        yield f"the trainer has paused claiming for another {ago(s.paused_s)}"


def _servers(live: Sequence[WorkerCard]) -> Iterator[str]:
    # A refit is over in a moment, and a drain is as somebody wanted it.
    meant = {"refitting", "draining"}
    down = {x.name: (x, w) for w in live for x in w.servers if not x.up and x.state not in meant}
    for name, (server, worker) in list(down.items())[:3]:
        said = server.why or server.error
        state = {"trial": "on trial"}.get(server.state, server.state)
        yield f"inference server {name} is {state}, says {worker.id}{f': {said}' if said else ''}"
    if len(down) > 3:
        yield f"{len(down) - 3} more inference servers are not serving"


def _workers(s: Snapshot) -> Iterator[str]:
    live = [w for w in s.workers if not w.lost]
    lost = [w for w in s.workers if w.lost]
    if not s.workers:
        yield "no worker is registered: start one with `rollfleet worker`"
    elif not live:
        seen_s = min(w.seen_s for w in lost)
        who = "the only worker" if len(lost) == 1 else f"all {len(lost)} workers"
        yield f"{who} lost contact {ago(seen_s)} ago: {_names(lost)}"
    else:
        for worker in lost:
            held = f"; its {_count(worker.pending, 'prompt')} will be taken over"
            yield (
                f"worker {worker.id} lost contact {ago(worker.seen_s)} ago"
                f"{held if worker.pending else ''}"
            )
    for state, what in (
        ("no-redis", "could not reach Redis lately"),
        ("no-server", "no inference server answers"),
        ("outbox-full", "finished rollouts fill the buffer, and Redis does not take them"),
        ("draining", "draining: nothing new is claimed"),
    ):
        if those := [w for w in live if w.state == state]:
            yield f"{_count(len(those), 'worker')} ({_names(those)}): {what}"
    yield from _servers(live)
    if s.unreadable:
        yield f"the card of {', '.join(s.unreadable)} cannot be read: it counts as no worker"
    if s.strangers:
        held = ", ".join(f"{name} ({n})" for name, n in list(s.strangers.items())[:3])
        yield (
            f"{_count(sum(s.strangers.values()), 'prompt')} leased to workers that are not "
            f"registered: {held}; taken over when the lease ends"
        )


def _unserved(s: Snapshot) -> Iterator[str]:
    for route in s.routes:
        stuck = route.waiting + route.delayed
        if stuck and not route.served_by:
            oldest = ""
            if route.oldest_waiting_s is not None:
                oldest = f", the oldest for {ago(route.oldest_waiting_s)}"
            yield f"no worker serves route {route.name!r}: {_wait(stuck)}{oldest}"


def _delayed(s: Snapshot) -> Iterator[str]:
    for route in s.routes:
        if route.delayed and route.served_by and route.next_due_s is not None:
            yield (
                f"{_wait(route.delayed)} for the next attempt on route {route.name!r}, "
                f"the first is due in {ago(route.next_due_s)}"
            )


def _flow(s: Snapshot) -> Iterator[str]:
    """Which side is the bottleneck, where both sides are there and have servers that answer."""
    live = [w for w in s.workers if not w.lost and w.state != "no-server"]
    if s.limit is None or not s.trainer or not live or s.paused_s:
        return
    slots, busy = sum(w.slots for w in live), sum(w.busy for w in live)
    books = s.books
    outstanding = f"outstanding {books.outstanding:,} of {s.limit:,}"
    nothing = not (books.waiting or books.in_flight or books.delayed or busy)
    if nothing and books.outstanding >= s.limit:
        yield f"workers idle: nothing waiting, {outstanding}: the trainer is the bottleneck"
    elif nothing:
        yield (
            f"workers idle: nothing waiting, {outstanding}: the trainer feeds too few prompts, or "
            "its data set has ended"
        )
    elif slots and busy >= slots and books.waiting:
        yield (
            f"all {_count(slots, 'slot')} busy, {_wait(books.waiting)}: the workers are the "
            "bottleneck; add some, or slots"
        )
    if slots > s.limit:
        yield (
            f"{slots:,} slots, but at most {s.limit:,} samples may be outstanding: the rest stay "
            "idle; raise pipeline_depth, or use fewer slots"
        )


def _letters(s: Snapshot) -> Iterator[str]:
    if s.books.dead_letters:
        yield f"{_count(s.books.dead_letters, 'dead letter')}: see `rollfleet dead list`"
