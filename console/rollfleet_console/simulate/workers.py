"""The slots of a fleet on the virtual clock: who waits, who runs, who fails.

- Slots take samples one by one, in the order of the prompts stream, the moment one is free.
- A rollout goes on under new weights: its tokens are of every version in force meanwhile, and it is
  as old as the one that was in force when its attempt began.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from rollfleet_common.messages import NO_VERSION
from rollfleet_console.simulate.clock import Clock
from rollfleet_console.simulate.scenario import Scenario

__all__ = ["Place", "Task", "Work", "Workers"]

#: Random numbers drawn in one call.
BLOCK = 4096


class Place(Enum):
    """Where a sample is."""

    WAITING = "waiting"
    DELAYED = "delayed"
    RUNNING = "running"
    DELIVERED = "delivered"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Work:
    """One sample of a group."""

    task: "Task"
    index: int
    duration_s: float
    tokens: float
    place: Place = Place.WAITING
    attempt: int = 1
    #: In force when this attempt began.
    version: int = NO_VERSION
    began_s: float = 0.0
    ends_s: float = 0.0
    #: Of this attempt, if nothing pauses it.
    span_s: float = 0.0
    fails: bool = False
    #: Settled by the trainer while it ran: it holds a slot, but nothing else any more.
    over: bool = False


@dataclass(slots=True, eq=False)
class Task:
    """The samples of one prompt, until the last of them has come or was given up."""

    name: str
    works: list[Work] = field(default_factory=list)
    #: Whole, or given up: what still runs is needless.
    closed: bool = False

    @property
    def open(self) -> list[Work]:
        """Samples that have neither come nor been given up."""
        done = (Place.DELIVERED, Place.ENDED)
        return [w for w in self.works if w.place not in done and not w.over]


class Workers:
    """All slots of a fleet.

    Args:
        clock: Virtual.
        scenario: Slots and failures.
        version: The version in force.
        done: Told of a rollout that ended.
        failed: Told of an attempt that failed.
    """

    def __init__(
        self,
        clock: Clock,
        scenario: Scenario,
        version: Callable[[], int],
        done: Callable[[Work], None],
        failed: Callable[[Work], None],
    ) -> None:
        self.clock = clock
        self.scenario = scenario
        self.version = version
        self.done = done
        self.failed = failed
        self.running: dict[Work, None] = {}
        #: Of these, leases that are lost, which is learnt at the next renewal; and to which guard.
        self.lost: dict[Work, str] = {}
        self.waiting = 0
        self.delayed = 0
        #: Slot-seconds that held a rollout, and that generated.
        self.busy_s = 0.0
        self.generating_s = 0.0
        self._queue: deque[Work] = deque()
        self._paused_at: float | None = None
        self._counted_s = 0.0
        self._luck = _uniforms(scenario.seed)

    def put(self, work: Work) -> None:
        """A prompt on the stream; :meth:`fill` starts it."""
        work.place = Place.WAITING
        self.waiting += 1
        self._queue.append(work)

    def fill(self) -> None:
        """Start what waits on what is free."""
        if self._paused_at is not None:
            return
        while self._queue and len(self.running) < self.scenario.slots:
            work = self._queue.popleft()
            if work.place is Place.WAITING:  # else it was cancelled
                self._start(work)

    def pause(self, seconds: float) -> None:
        """Generation stands still, and nothing starts, until :meth:`resume` `seconds` later."""
        self.count()
        self._paused_at = self.clock.now
        for work in self.running:
            work.ends_s += seconds

    def resume(self) -> None:
        """Go on."""
        self.count()
        self._paused_at = None
        self.fill()

    def cancel(self, work: Work) -> float:
        """Take a sample off the fleet; returns the tokens it had made."""
        made = 0.0
        if work.place is Place.WAITING:
            self.waiting -= 1
        elif work.place is Place.DELAYED:
            self.delayed -= 1
        else:
            now = self.clock.now
            if self._paused_at is not None:
                # Its end was put off by the whole pause: what is left counts from the resume.
                now = self._paused_at + self.scenario.update_s
            made = self._made(work, work.span_s - (work.ends_s - now))
            self._free(work)
        work.place = Place.ENDED
        return made

    def withdraw(self, work: Work, guard: str) -> bool:
        """The trainer settled a sample; returns whether it is gone, or holds its slot for now."""
        if work.place is not Place.RUNNING:
            self.cancel(work)
            return True
        work.over = True
        self.lost[work] = guard
        return False

    def count(self) -> None:
        """Bring the slot-seconds up to now."""
        passed = (self.clock.now - self._counted_s) * len(self.running)
        self._counted_s = self.clock.now
        self.busy_s += passed
        if self._paused_at is None:
            self.generating_s += passed

    def _start(self, work: Work) -> None:
        self.count()
        self.waiting -= 1
        self.running[work] = None
        now, luck = self.clock.now, next(self._luck)
        work.place = Place.RUNNING
        work.version = self.version()
        work.began_s = now
        rate = self.scenario.failure_rate
        work.fails = luck < rate
        # Below the rate, luck is uniform again: it also says where the attempt fails.
        work.span_s = work.duration_s * (luck / rate if work.fails else 1.0)
        work.ends_s = now + work.span_s
        self.clock.at(work.ends_s, self._end, work)

    def _end(self, work: Work) -> None:
        if work.place is not Place.RUNNING:
            return  # cancelled meanwhile
        if work.ends_s > self.clock.now:
            self.clock.at(work.ends_s, self._end, work)  # a pause put it off
            return
        self._free(work)
        if not work.fails:
            work.place = Place.DELIVERED
            self.done(work)
        else:
            work.place = Place.ENDED
            self.failed(work)
            if work.attempt < self.scenario.attempts and not work.over:
                work.attempt += 1
                work.place = Place.DELAYED
                self.delayed += 1
                self.clock.at(self.clock.now + self.scenario.retry_s, self._promote, work)
        self.fill()

    def _promote(self, work: Work) -> None:
        if work.place is Place.DELAYED:
            self.delayed -= 1
            self.put(work)
            self.fill()

    def _free(self, work: Work) -> None:
        self.count()
        del self.running[work]
        self.lost.pop(work, None)

    def _made(self, work: Work, elapsed_s: float) -> float:
        return work.tokens * elapsed_s / work.duration_s


def _uniforms(seed: int) -> Iterator[float]:
    rng = np.random.default_rng([seed, 2])
    while True:
        yield from rng.random(BLOCK).tolist()
