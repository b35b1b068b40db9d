"""A run as plain dictionaries: what Redis and its scripts must agree with, written without them.

- A sample is always in exactly one place. Places are changed one sample at a time, by the rules of
  the design and by nothing that was read from the code under test.
- A *ticket* is one stay on the prompts stream, numbered in order: what a stream entry is in Redis.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Group", "Model", "Sample"]

Key = tuple[str, int]

#: Places that were never delivered; of these a trainer may cancel.
OPEN = ("waiting", "delayed", "in_flight")
#: Where a rollout is.
DELIVERED = ("ready", "handed_out", "trained")


@dataclass
class Sample:
    group: str
    index: int
    place: str = "waiting"
    attempt: int = 1
    failures: int = 0
    ticket: int = 0
    owner: str = ""
    deliveries: int = 0
    #: Whether its credit came back.
    settled: bool = False


@dataclass
class Group:
    name: str
    n: int
    kind: str
    position: int
    samples: list[Sample] = field(default_factory=list)
    #: Whether the trainer gave its verdict, so that nothing of it is left in Redis.
    closed: bool = False


class Model:
    """One partition of one run."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.cursor = -1
        self.epoch = 1
        self.version = 0
        self.min_useful = 0
        #: Prompts that wait, in order.
        self.waiting: list[Key] = []
        #: Rollouts, and tombstones, that nobody read, in order.
        self.unread: list[Key] = []
        self.unread_stones: list[Key] = []
        #: Tombstones that were read and not settled.
        self.stones: set[Key] = set()
        self._tickets = 0

    # ---- the books ---------------------------------------------------------------------------

    def all(self) -> Iterable[Sample]:
        return (sample for group in self.groups.values() for sample in group.samples)

    def unsettled(self) -> Iterable[Sample]:
        return (s for s in self.all() if s.place in (*OPEN, *DELIVERED))

    def count(self, place: str) -> int:
        return sum(sample.place == place for sample in self.all())

    def dropped(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for sample in self.all():
            if sample.place.startswith("dropped:"):
                reason = sample.place.removeprefix("dropped:")
                found[reason] = found.get(reason, 0) + 1
        return found

    @property
    def outstanding(self) -> int:
        return sum(
            not sample.settled and self.groups[sample.group].kind == "train"
            for sample in self.all()
        )

    def record(self, group: Group) -> dict[int, str]:
        """The first letter of where each member is, as the group record has it."""
        letters = {"waiting": "p", "in_flight": "p", "delayed": "d"}
        letters |= dict.fromkeys(DELIVERED, "r")
        return {sample.index: letters.get(sample.place, "x") for sample in group.samples}

    # ---- the trainer submits -----------------------------------------------------------------

    def submit(self, rows: Sequence[tuple[str, int, str, int]], limit: int) -> list[int]:
        """(name, n, kind, position) of each; returns 1, 0 or -1 of each."""
        states: list[int] = []
        full = False
        for name, n, kind, position in rows:
            known = position <= self.cursor if position >= 0 else name in self.groups
            over = kind == "train" and limit >= 0 and self.outstanding + n > limit
            if known:
                states.append(0)
            elif full or over:
                full = True
                states.append(-1)
            else:
                group = self.groups[name] = Group(name, n, kind, position)
                group.samples = [Sample(name, index) for index in range(n)]
                for sample in group.samples:
                    self._wait(sample)
                if position >= 0:
                    self.cursor = position
                states.append(1)
        return states

    def _wait(self, sample: Sample) -> None:
        self._tickets += 1
        sample.place, sample.ticket, sample.owner = "waiting", self._tickets, ""
        sample.deliveries = 0
        self.waiting.append((sample.group, sample.index))

    def sample(self, key: Key) -> Sample:
        return self.groups[key[0]].samples[key[1]]

    # ---- workers -----------------------------------------------------------------------------

    def claim(self, worker: str, count: int) -> list[Sample]:
        taken = [self.sample(key) for key in self.waiting[:count]]
        del self.waiting[:count]
        for sample in taken:
            sample.place, sample.owner, sample.deliveries = "in_flight", worker, 1
        return taken

    def holds(self, worker: str, key: Key, ticket: int) -> int:
        """1: the lease is this worker's; 0: there is none; -1: it is another's."""
        sample = self.sample(key)
        if sample.place != "in_flight" or sample.ticket != ticket:
            return 0
        return 1 if sample.owner == worker else -1

    def reclaim(self, worker: str, victims: Iterable[str], count: int) -> list[Sample]:
        idle = [s for s in self.all() if s.place == "in_flight" and s.owner in victims]
        taken = sorted(idle, key=lambda s: s.ticket)[:count]
        for sample in taken:
            sample.owner = worker
            sample.deliveries += 1
        return taken

    def deliver(self, worker: str, key: Key, ticket: int, epoch: int, version: int) -> int:
        held = self.holds(worker, key, ticket)
        if held != 1:
            return held
        sample = self.sample(key)
        train = self.groups[key[0]].kind == "train"
        if train and epoch == self.epoch and version < self.min_useful:
            self._end(sample, "dropped:stale")
            return -3
        sample.place = "ready"
        self.unread.append(key)
        return 1

    def fail(self, worker: str, key: Key, ticket: int, *, last: bool) -> bool:
        if self.holds(worker, key, ticket) != 1:
            return False
        sample = self.sample(key)
        sample.failures += 1
        if last:
            self._end(sample, "dead")
        else:
            sample.place = "delayed"
            sample.attempt += 1
        return True

    def delayed(self) -> set[Key]:
        return {(s.group, s.index) for s in self.all() if s.place == "delayed"}

    def promote(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._wait(self.sample(key))

    def hand_back(self, worker: str, tickets: Sequence[tuple[Key, int]]) -> list[Key]:
        back = [key for key, ticket in tickets if self.holds(worker, key, ticket) == 1]
        for key in back:
            self._wait(self.sample(key))
        return back

    def _end(self, sample: Sample, place: str) -> None:
        """A sample that will never come: its credit returns, and a tombstone says so."""
        if sample.place == "waiting":
            self.waiting.remove((sample.group, sample.index))
        sample.place, sample.settled = place, True
        self.unread_stones.append((sample.group, sample.index))

    # ---- the trainer -------------------------------------------------------------------------

    def cancel(self, name: str, reason: str, at_most: int) -> int:
        group = self.groups[name]
        found = [s for s in reversed(group.samples) if s.place in OPEN][:at_most]
        for sample in found:
            self._end(sample, f"dropped:{reason}")
        return len(found)

    def read(self, count: int) -> tuple[list[Key], list[Key]]:
        """Read up to `count` rollouts and as many tombstones."""
        rollouts, stones = self.unread[:count], self.unread_stones[:count]
        del self.unread[:count], self.unread_stones[:count]
        for key in rollouts:
            self.sample(key).place = "handed_out"
        self.stones |= set(stones)
        return rollouts, stones

    def came(self, group: Group) -> int:
        """Members that the trainer has, alive or as tombstones."""
        return sum(
            s.place in ("handed_out", "trained") or (s.group, s.index) in self.stones
            for s in group.samples
        )

    def train(self, names: Iterable[str]) -> None:
        for sample in self._rollouts(names):
            sample.place, sample.settled = "trained", True

    def untrain(self, names: Iterable[str]) -> None:
        for sample in self._rollouts(names):
            if sample.place == "trained":
                sample.place, sample.settled = "handed_out", False

    def close(self, names: Iterable[str], place: str) -> None:
        """Commit or drop whole groups; what was trained and given up alike is freed."""
        names = list(names)
        for sample in self._rollouts(names):
            sample.place, sample.settled = place, True
        for name in names:
            group = self.groups[name]
            group.closed = True
            self.stones -= {(name, s.index) for s in group.samples}

    def _rollouts(self, names: Iterable[str]) -> list[Sample]:
        return [
            s
            for name in names
            for s in self.groups[name].samples
            if s.place in ("handed_out", "trained")
        ]
