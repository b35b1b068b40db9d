"""The trainer of a simulated fleet: feeds by the ledger, chooses, sweeps, trains, publishes.

- Pacer, groups, policy, staleness rule and books are the fleet's own; the order of the steps is
  that of ``for batch in fleet.batches(): train; fleet.publish()``.
- Credit returns as it does there: with a sample refused or given up at once, with a dropped group
  when it is dropped, with a batch when it was trained but not before the next version.
- Cancelling is done as there: workers stop what is too old when a version is published; the rest
  of a group that can not become whole, or needs no more, is settled at once and stopped at the
  renewal of its leases.
- Where the guards stand is marked in the code. The first three save work; the fourth guarantees.
"""

from typing import Protocol

from rollfleet.policy.policies import DropStale, Policy, StandardPPO
from rollfleet.records import Group, Member
from rollfleet.state.capacity import Pacer
from rollfleet.state.groups import Groups
from rollfleet_common.errors import StarvedError
from rollfleet_common.ledger import Books
from rollfleet_common.messages import Header, Kind, Tombstone
from rollfleet_common.staleness import staleness
from rollfleet_console.simulate.clock import Clock
from rollfleet_console.simulate.lengths import Lengths
from rollfleet_console.simulate.scenario import Scenario
from rollfleet_console.simulate.shelf import Shelf
from rollfleet_console.simulate.workers import Place, Task, Work, Workers

__all__ = ["SimulatedTrainer", "TrainerObserver"]

#: How long a waiting trainer that swept something goes without choosing again.
LOOK_S = 1.0


class TrainerObserver(Protocol):
    """Is told what happens to samples."""

    def trained(self, work: Work, stale: int) -> None:
        """It was handed over `stale` versions after the version that it began under."""

    def wasted(self, work: Work, guard: str, tokens: float) -> None:
        """A guard dropped it, or its last attempt failed (``dead``)."""

    def lost(self, tokens: float) -> None:
        """An attempt failed."""

    def published(self, version: int) -> None:
        """A version is in force."""


class SimulatedTrainer:
    """One trainer and its fleet.

    Args:
        clock: Virtual.
        scenario: What is simulated.
        lengths: Of its rollouts.
        watcher: Is told what happens.
        policy: None: the scenario's. Payloads are not simulated, so nothing is refined.
    """

    def __init__(
        self,
        clock: Clock,
        scenario: Scenario,
        lengths: Lengths,
        watcher: TrainerObserver,
        policy: Policy | None = None,
    ) -> None:
        s = scenario
        self.clock = clock
        self.scenario = s
        self.lengths = lengths.groups(s.launched, s.seed)
        self.watcher = watcher
        self.version = 0
        self.policy = policy or policy_of(s)
        self.pacer = Pacer(s.depth, s.samples_per_version)
        self.groups = Groups(lambda n: s.oversample if n == s.launched else 0)
        self.shelf = Shelf(self.policy)
        self.books = Books()
        self.workers = Workers(clock, s, lambda: self.version, self._deliver, self._fail)
        #: Seconds spent waiting for a batch, and since when the present wait goes on.
        self.idle_s = 0.0
        self.waits_since: float | None = None
        self.batch: list[Group] = []
        self._tasks: dict[str, Task] = {}
        self._least = getattr(self.policy, "least", lambda group: group.need)

    def start(self) -> None:
        """Begin to feed and to wait for the first batch."""
        self.clock.at(self.scenario.renew_s, self._renew)
        self._next_batch()

    def take_stock(self) -> Books:
        """The books, with every place counted where the samples are."""
        books, workers = self.books, self.workers
        books.waiting, books.delayed = workers.waiting, workers.delayed
        books.in_flight = len(workers.running) - len(workers.lost)
        held = [*self.groups.open.values(), *self.shelf.ready.values(), *self.batch]
        books.handed_out = sum(len(group.members) for group in held)
        books.outstanding = self.pacer.outstanding
        return books

    # ---- guard 1: pacing at submit -----------------------------------------------------------

    def _feed(self) -> None:
        n = self.scenario.launched
        while self.pacer.room >= n:
            task = Task(f"p{self.books.submitted // n}")
            lengths = next(self.lengths)
            task.works = [Work(task, i, *length) for i, length in enumerate(lengths)]
            self._tasks[task.name] = task
            self.books.submitted += n
            self.pacer.outstanding += n
            for work in task.works:
                self.workers.put(work)
        self.workers.fill()

    # ---- guard 2: cancel in flight -----------------------------------------------------------

    def _stop_late(self) -> None:
        """A version was published: workers stop what began before its horizon."""
        floor = self.policy.horizon(self.version)
        for work in [w for w in self.workers.running if w.version < floor]:
            # A sibling that was stopped just now may have taken it with it.
            if work.place is Place.RUNNING:
                self.watcher.wasted(work, "cancel", self.workers.cancel(work))
                if not work.over:
                    self._give_up(work, "stale")

    def _withdraw(self, task: Task, reason: str, guard: str) -> None:
        """Settle all of a group that has not come yet."""
        for work in task.open:
            if self.workers.withdraw(work, guard):
                self.watcher.wasted(work, guard, 0.0)
            self._give_up(work, reason)

    def _renew(self, _: object) -> None:
        """Workers learn which leases they lost."""
        for work, guard in list(self.workers.lost.items()):
            self.watcher.wasted(work, guard, self.workers.cancel(work))
        self._feed()
        self._starved()
        self.clock.at(self.clock.now + self.scenario.renew_s, self._renew)

    # ---- guard 3: refusal at deliver ---------------------------------------------------------

    def _deliver(self, work: Work) -> None:
        if work.over:
            work.place = Place.ENDED
            self.watcher.wasted(work, "cancel", work.tokens)
            return
        if work.version < self.policy.horizon(self.version):
            work.place = Place.ENDED
            self.watcher.wasted(work, "deliver", work.tokens)
            self._give_up(work, "stale")
            self._feed()
            return
        member = Member("", self._header(work), work.version, self.version)
        closed, twice = self.groups.arrive(0, member)
        assert not twice, "every sample is delivered once"  # noqa: S101 - a defect
        self._closed(closed)

    def _fail(self, work: Work) -> None:
        made = work.tokens * work.span_s / work.duration_s
        if work.over:
            self.watcher.wasted(work, "cancel", made)
        elif work.attempt < self.scenario.attempts:
            self.watcher.lost(made)
        else:
            self.watcher.wasted(work, "dead", made)
            self._give_up(work, "dead")
            self._feed()

    def _give_up(self, work: Work, reason: str) -> None:
        """A tombstone: the credit of this sample returns, and its group may close by it."""
        task = work.task
        if reason == "dead":
            self.books.dead += 1
        else:
            self.books.dropped[reason] = self.books.dropped.get(reason, 0) + 1
        self.pacer.settled(1)
        if task.closed:
            return
        tombstone = Tombstone(
            task.name, work.index, len(task.works), Kind.TRAIN, "default", reason, ""
        )
        closed = self.groups.add_tombstone(0, "", tombstone)
        self._closed(closed)
        if closed is None and reason != "torn" and self.scenario.early_cancel:
            group = self.groups.open[task.name]
            if group.n - len(group.tombstones) < self._least(group):
                self._withdraw(task, "torn", "cancel")

    # ---- groups close ------------------------------------------------------------------------

    def _closed(self, group: Group | None) -> None:
        if group is None:
            return
        task = self._tasks[group.name]
        task.closed = True
        reason = self.shelf.judge(group, self.version)
        if reason is not None:
            self._drop(group, reason, "close")
        if group.n > group.arrived:
            self._withdraw(task, "surplus", "surplus")
        self._feed()
        self._choose()

    def _drop(self, group: Group, reason: str, guard: str) -> None:
        task = self._tasks.pop(group.name)
        for index in group.members:
            work = task.works[index]
            work.place = Place.ENDED
            self.watcher.wasted(work, guard, work.tokens)
        self.books.dropped[reason] = self.books.dropped.get(reason, 0) + len(group.members)
        self.pacer.settled(len(group.members))

    # ---- guard 4, THE guarantee: the sweep at hand-over --------------------------------------

    def _next_batch(self) -> None:
        self.pacer.release()
        self.waits_since = self.clock.now
        self._feed()
        self._choose()

    def _choose(self, _: object = None) -> None:
        if self.waits_since is None:
            return
        want = self.scenario.samples_per_version
        fresh, dropped = self.shelf.sweep(self.shelf.choose(want, self.version), self.version)
        for group, reason in dropped:
            self._drop(group, reason, "sweep")
        if sum(len(group.members) for group in fresh) >= want:
            self._hand_over(fresh)
            return
        if dropped:
            self._feed()
            self.clock.at(self.clock.now + LOOK_S, self._choose)
        self._starved()

    def _starved(self) -> None:
        s = self.scenario
        if self.waits_since is not None and self.clock.now - self.waits_since > s.starve_s:
            raise StarvedError(
                f"no batch of {s.samples_per_version} samples within {s.starve_s:g} simulated "
                f"seconds at version {self.version}: {self.say()}"
            )

    def say(self) -> str:
        """Where the samples are, in words."""
        books = self.take_stock()
        ready = sum(len(group.members) for group in self.shelf.ready.values())
        return (
            f"{books.waiting} wait, {books.in_flight} run, {books.delayed} wait for another "
            f"attempt, {ready} are ready, {books.dead} died, room for {self.pacer.room} more "
            f"and groups are of {self.scenario.launched}"
        )

    def _hand_over(self, groups: list[Group]) -> None:
        assert self.waits_since is not None, "only a trainer that waits is handed a batch"  # noqa: S101
        self.idle_s += self.clock.now - self.waits_since
        self.waits_since = None
        for group in groups:
            del self.shelf.ready[group.name]
            task = self._tasks.pop(group.name)
            for index in group.members:
                # From the simulation's own book of versions, not from what was judged.
                work = task.works[index]
                work.place = Place.ENDED
                self.watcher.trained(work, staleness(self.version, work.version))
        self.batch = groups
        self.clock.at(self.clock.now + self.scenario.train_s, self._update)

    def _update(self, _: object) -> None:
        if self.scenario.pause:
            self.workers.pause(self.scenario.update_s)
        self.clock.at(self.clock.now + self.scenario.update_s, self._publish)

    def _publish(self, _: object) -> None:
        self.version += 1
        samples = sum(len(group.members) for group in self.batch)
        self.batch = []
        self.books.committed += samples
        self.pacer.settled(samples, hold=True)
        self.watcher.published(self.version)
        if self.clock.stopped:
            return
        if self.scenario.early_cancel:
            self._stop_late()
        # The credit is released before workers go on, so that they find prompts.
        self._next_batch()
        self.workers.resume()

    def _header(self, work: Work) -> Header:
        return Header(
            group=work.task.name,
            index=work.index,
            n=len(work.task.works),
            attempt=work.attempt,
            kind=Kind.TRAIN,
            route="default",
            task="default",
            position=-1,
            entry="",
            payload="",
            payload_bytes=0,
            epoch=0,
            min_version=work.version,
            max_version=self.version,
            samples=1,
            tokens=round(work.tokens),
            trained_tokens=round(work.tokens),
            reward=0.0,
            worker="",
            server="",
            queue_ms=0,
            generate_ms=0,
            reward_ms=0,
        )


def policy_of(scenario: Scenario) -> Policy:
    """What a scenario judges by: its bound, or nothing but whether groups are whole."""
    if scenario.pacing_only:
        return StandardPPO(scenario.min_group_size)
    return DropStale(scenario.max_staleness, scenario.min_group_size)
