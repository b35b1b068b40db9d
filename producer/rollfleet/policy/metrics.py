"""What freshness costs, and whom: the metrics that show a bias in what is trained on. Pure.

- Headers only. Every sample whose fate is known is one record, kept or dropped; quantiles and means
  are over the last `window` of them, drop counts are of the whole life of the meter.
- Durations include those of what was dropped: what survives a bound says nothing of the bound.
- Token-weighted staleness counts every trained token at the age of its sample's oldest: never too low.
- State and keys are bounded: lengths by powers of two, ages up to :data:`OLDEST`, the first
  :data:`TASKS` tasks by name in numbers, the first :data:`KEPT_TASKS` in words, and the rest as one.
- The pace of versions is taken from the first one that was trained on what was made since the meter
  was: what a trainer that resumes finds ready is consumed at once, and says nothing of the pace.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rollfleet.records import Group
from rollfleet_common.messages import NO_VERSION, Header

__all__ = ["BiasMeter", "effective_sample_size"]

#: Ages are counted up to here; what is older counts as this.
OLDEST = 16
#: Tasks that have keys of their own in :meth:`BiasMeter.as_dict`.
TASKS = 20
#: Tasks that are told apart; all others count as :data:`OTHER`.
KEPT_TASKS = 64
OTHER = "other"
#: Versions that must have passed before their pace is known.
PACED = 8
#: Versions of which the pace is taken.
PACE_VERSIONS = 32
#: Samples of a task before a sentence is made of it.
ENOUGH = 8
#: Samples of a task that are given up in a row before it counts as starved.
IN_A_ROW = 32


@dataclass(frozen=True, slots=True)
class _Fate:
    """One sample, and what became of it."""

    task: str
    #: Why it was dropped; "" if it was kept.
    reason: str
    #: Versions behind, by its oldest trained token.
    age: int
    tokens: int
    trained_tokens: int
    reward: float
    #: Reward less its group's mean.
    advantage: float
    #: From its claim to its delivery.
    duration_ms: int
    queue_ms: int
    #: From its group's first delivery to the group's verdict.
    waited_ms: float


class BiasMeter:
    """Fed with verdicts, asked for numbers and sentences. Not thread-safe.

    Args:
        window: Samples that quantiles and means look back.
        clock: Unix time in seconds; stream entries are dated by it.
    """

    def __init__(self, window: int = 4096, clock: Callable[[], float] = time.time) -> None:
        self._fates: deque[_Fate] = deque(maxlen=window)
        self._clock = clock
        #: By (reason, task, length bucket, age), over the meter's life.
        self.drops: Counter[tuple[str, str, str, int]] = Counter()
        #: Samples that never came, by (reason, task): they have no header.
        self.lost: Counter[tuple[str, str]] = Counter()
        #: The last version at which a task was trained on.
        self._fed: dict[str, int] = {}
        #: The first version at which a task was seen.
        self._met: dict[str, int] = {}
        #: Why samples of a task were given up, since one of its groups was last trained on.
        self._in_a_row: dict[str, Counter[str]] = {}
        #: When each of the last versions was first seen, in milliseconds.
        self._seen: dict[int, float] = {}
        self._version = NO_VERSION
        self._began_ms = clock() * 1000
        #: Whether something was trained on that was made since the meter was.
        self._paced = False

    # ---- events ------------------------------------------------------------------------------

    def kept(self, group: Group, version: int, headers: Sequence[Header] | None = None) -> None:
        """A group was handed to a trainer at `version`.

        Args:
            group: As it was chosen.
            version: The trainer's.
            headers: As refined (a masking policy changes ages and trained tokens), by index.
        """
        task = self._task(group)
        self._fed[task] = version
        self._take(group, version, "", headers)
        self._in_a_row[task].clear()

    def dropped(self, group: Group, reason: str, version: int) -> None:
        """A group was dropped by a trainer at `version`."""
        task = self._task(group)
        for member in group.members.values():
            age = _age(version - member.oldest)
            self.drops[reason, task, _bucket(member.header.tokens), age] += 1
        self._take(group, version, reason, None)

    def _take(
        self, group: Group, version: int, reason: str, headers: Sequence[Header] | None
    ) -> None:
        now_ms = self._clock() * 1000
        task = self._task(group)
        members = [group.members[index] for index in sorted(group.members)]
        first_ms = min((_born_ms(member.entry, now_ms) for member in members), default=now_ms)
        self._paced = self._paced or (not reason and first_ms >= self._began_ms)
        self._tick(version, now_ms)
        self._met.setdefault(task, version)
        in_a_row = self._in_a_row.setdefault(task, Counter())
        if group.members:
            in_a_row[reason] += len(group.members)
        for _, tombstone in group.tombstones.values():
            self.lost[tombstone.reason, task] += 1
            in_a_row[tombstone.reason] += 1
        if not members:
            return
        mean = sum(member.header.reward for member in members) / len(members)
        for at, member in enumerate(members):
            h = member.header if headers is None else headers[at]
            oldest = member.oldest if headers is None else h.min_version
            self._fates.append(
                _Fate(
                    task=task,
                    reason=reason,
                    age=0 if oldest == NO_VERSION else version - oldest,
                    tokens=h.tokens,
                    trained_tokens=h.trained_tokens,
                    reward=h.reward,
                    advantage=h.reward - mean,
                    duration_ms=h.generate_ms + h.reward_ms,
                    queue_ms=h.queue_ms,
                    waited_ms=max(now_ms - first_ms, 0.0),
                )
            )

    def _task(self, group: Group) -> str:
        """The name under which a group's task is kept."""
        known = group.task in self._met or len(self._met) < KEPT_TASKS
        return group.task if known else OTHER

    def _tick(self, version: int, now_ms: float) -> None:
        self._version = max(version, self._version)
        if not self._paced:
            return
        if version not in self._seen:
            self._seen[version] = now_ms
        while len(self._seen) > PACE_VERSIONS:
            del self._seen[min(self._seen)]

    def snapshot(self) -> "BiasMeter":
        """A copy that later events do not change: cheap, for answers that may never be asked."""
        twin = BiasMeter(0, self._clock)
        twin._fates = deque(self._fates)
        twin.drops, twin.lost = Counter(self.drops), Counter(self.lost)
        twin._fed, twin._met, twin._seen = dict(self._fed), dict(self._met), dict(self._seen)
        twin._in_a_row = {task: Counter(row) for task, row in self._in_a_row.items()}
        twin._version, twin._paced = self._version, self._paced
        return twin

    # ---- answers -----------------------------------------------------------------------------

    @property
    def version_ms(self) -> float | None:
        """Milliseconds that a version lasts, over the last ones; None until enough were paced."""
        if len(self._seen) < PACED:
            return None
        first, last = min(self._seen), max(self._seen)
        lasted = (self._seen[last] - self._seen[first]) / (last - first)
        return lasted if lasted > 0 else None

    def durations(self, task: str) -> list[float]:
        """How many versions each of a task's last samples took to make; [] if not known yet."""
        pace = self.version_ms
        if pace is None:
            return []
        return [fate.duration_ms / pace for fate in self._fates if fate.task == task]

    def warnings(self, bound: int) -> list[str]:
        """What is wrong, a sentence each, with the remedy; tasks by name.

        Args:
            bound: Versions that a sample may be behind: `max_staleness`.
        """
        said: list[str] = []
        by_task: dict[str, list[_Fate]] = {}
        for fate in self._fates:
            by_task.setdefault(fate.task, []).append(fate)
        pace = self.version_ms
        for task in sorted(self._met):
            fates = by_task.get(task, [])
            known = pace is not None and len(fates) >= ENOUGH
            slow = _p95([fate.duration_ms for fate in fates]) / pace if known and pace else 0.0
            if slow > bound:
                said.append(
                    f"task {task}: p95 duration {slow:.1f} versions, bound {bound}: use mask or "
                    "segment-wise, or raise max_staleness"
                )
            in_a_row = self._in_a_row[task]
            if in_a_row.total() >= IN_A_ROW:
                why = ", ".join(f"{count} {reason}" for reason, count in in_a_row.most_common())
                said.append(
                    f"task {task}: starved for {self._since(task)} versions: its last "
                    f"{in_a_row.total()} samples were all given up ({why})"
                )
            said += _skew(task, fates)
        return said

    def as_dict(self) -> dict[str, float]:
        """Numbers for a trainer's logger; ``nan`` never, a number that is not known is left out."""
        kept = [fate for fate in self._fates if not fate.reason]
        dropped = [fate for fate in self._fates if fate.reason]
        out = _numbers("kept", kept) | _numbers("dropped", dropped)
        if kept:
            ages = np.array([fate.age for fate in kept], float)
            weights = np.array([fate.trained_tokens for fate in kept], float)
            out["staleness/sample_mean"] = float(ages.mean())
            out["staleness/sample_p95"] = float(np.quantile(ages, 0.95))
            out["staleness/max"] = float(ages.max())
            if weights.sum():
                out["staleness/token_mean"] = float((ages * weights).sum() / weights.sum())
            signal = [abs(fate.advantage) for fate in kept]
            out["effective/samples"] = effective_sample_size(signal)
            out["effective/share"] = out["effective/samples"] / len(kept)
            out["effective/informative_share"] = float(np.mean(np.array(signal) > 0))
        if self._fates:
            out["dropped/share"] = len(dropped) / len(self._fates)
        if (pace := self.version_ms) is not None:
            out["version_s"] = pace / 1000
        labels = {t: t if at < TASKS else "other" for at, t in enumerate(self._met)}
        out |= self._by_task(labels)
        for (reason, task, bucket, age), count in self.drops.items():
            key = f"dropped/{reason}/{labels[task]}/{bucket}/age_{age}"
            out[key] = out.get(key, 0.0) + count
        for (reason, task), count in self.lost.items():
            key = f"lost/{reason}/{labels[task]}"
            out[key] = out.get(key, 0.0) + count
        return {f"rollfleet/bias/{key}": value for key, value in out.items()}

    def _by_task(self, labels: Mapping[str, str]) -> dict[str, float]:
        out: dict[str, float] = {}
        fates: dict[str, list[_Fate]] = {}
        for fate in self._fates:
            fates.setdefault(labels[fate.task], []).append(fate)
        pace = self.version_ms
        for name, here in fates.items():
            gone = sum(fate.reason != "" for fate in here)
            out[f"task/{name}/dropped_share"] = gone / len(here)
            if pace is not None:
                slow = _quantile([fate.duration_ms for fate in here], 0.95)
                out[f"task/{name}/duration_versions_p95"] = slow / pace
        for task, name in labels.items():
            key = f"task/{name}/starved_versions"
            out[key] = max(out.get(key, 0.0), float(self._since(task)))
        return out

    def _since(self, task: str) -> int:
        """Versions since a task was last trained on, or first seen."""
        return self._version - self._fed.get(task, self._met[task])


def effective_sample_size(weights: Iterable[float]) -> float:
    """Kish's ``(sum w)^2 / sum w^2``: equally weighted samples that would say as much; 0 of none.

    Of importance weights (pi_prox / pi_behave), it says what the correction costs; of the
    advantages' sizes, as in :meth:`BiasMeter.as_dict`, how many samples carry the signal.
    """
    w = np.fromiter(weights, float)
    largest = w.max(initial=0.0)
    if largest <= 0:
        return 0.0
    w = w / largest  # squares of large weights overflow
    return float(w.sum() ** 2 / (w**2).sum())


def _numbers(name: str, fates: Sequence[_Fate]) -> dict[str, float]:
    if not fates:
        return {}
    tokens = [fate.tokens for fate in fates]
    return {
        f"{name}/samples": float(len(fates)),
        f"{name}/reward_mean": float(np.mean([fate.reward for fate in fates])),
        f"{name}/tokens_mean": float(np.mean(tokens)),
        f"{name}/tokens_p95": _quantile(tokens, 0.95),
        f"{name}/queue_s_mean": float(np.mean([fate.queue_ms for fate in fates])) / 1000,
        f"{name}/waited_s_mean": float(np.mean([fate.waited_ms for fate in fates])) / 1000,
        f"{name}/waited_s_p95": _quantile([fate.waited_ms for fate in fates], 0.95) / 1000,
    }


def _skew(task: str, fates: Sequence[_Fate]) -> list[str]:
    """Whether what was dropped is much longer than what was kept."""
    kept = [fate.tokens for fate in fates if not fate.reason]
    stale = [fate.tokens for fate in fates if fate.reason == "stale"]
    if len(kept) < ENOUGH or len(stale) < ENOUGH:
        return []
    of_kept, of_stale = sum(kept) / len(kept), sum(stale) / len(stale)
    if of_stale < 1.5 * of_kept:
        return []
    sentence = (
        f"task {task}: samples dropped as stale have {of_stale:.0f} tokens, kept ones "
        f"{of_kept:.0f}: what is trained on is biased towards short answers; use mask or "
        "segment-wise, or raise max_staleness"
    )
    return [sentence]


def _p95(values: list[int]) -> float:
    """The 95th percentile, interpolated as numpy does; without its cost for short lists."""
    values.sort()
    at = 0.95 * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def _quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0


def _age(behind: int) -> int:
    return min(max(behind, 0), OLDEST)


def _bucket(tokens: int) -> str:
    """``512-1023``: the powers of two around a length; up to 255 is one bucket."""
    low = 1 << (max(tokens, 1).bit_length() - 1)
    return f"{low}-{2 * low - 1}" if low >= 256 else "0-255"


def _born_ms(entry: str, now_ms: float) -> float:
    """Unix time in milliseconds at which a stream entry was added: the first part of its id."""
    head = entry.partition("-")[0]
    return float(head) if head.isdigit() else now_ms
