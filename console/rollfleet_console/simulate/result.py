"""What a simulated run came to: shares, means and rates over the measured window.

- The window begins and ends with a publish, after the warm-up. A sample counts where it ends:
  handed over, dropped or dead.
- Staleness comes from the simulation's own record of when every rollout began, not from what the
  policy was told.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rollfleet_console.simulate.clock import Clock
from rollfleet_console.simulate.scenario import Scenario
from rollfleet_console.simulate.trainer import SimulatedTrainer
from rollfleet_console.simulate.workers import Work

__all__ = ["Meter", "Result"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Result:
    """One simulated run. Shares are from 0 to 1."""

    #: Length of the window.
    simulated_s: float
    samples_per_h: float
    steps_per_h: float
    tokens_per_s: float
    #: Slot time that held a rollout; that generated (a pause does not); whose tokens were trained.
    slots_busy: float
    slots_generating: float
    slots_useful: float
    #: Of the trainer's time, waiting for a batch.
    trainer_idle: float
    #: Versions behind at hand-over, by the oldest token of every sample.
    staleness_mean: float
    staleness_p99: float
    staleness_max: int
    #: Mean over trained tokens, each by its own version.
    staleness_of_tokens: float
    #: Share of trained samples by versions behind.
    staleness_shares: dict[int, float]
    #: Of trained samples, more than `max_staleness` behind: 0 unless only pacing bounds it.
    over_bound: float
    #: Of all samples that ended, dropped by a guard; and by which.
    dropped: float
    dropped_by: dict[str, float]
    dead: float
    #: Of all tokens made, those of dropped samples, and of attempts that failed.
    tokens_dropped: float
    tokens_failed: float
    #: Full length in tokens; None if nothing was dropped.
    trained_length: float
    dropped_length: float | None
    #: Mean length of what is trained on over that of the data set: 1 is no bias.
    length_bias: float
    #: Of samples, and of the longest tenth of them, what was trained on.
    trained: float
    longest_trained: float

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(slots=True)
class _Marks:
    """Totals at the start of the window."""

    at_s: float = 0.0
    busy_s: float = 0.0
    generating_s: float = 0.0
    idle_s: float = 0.0


@dataclass(slots=True)
class _Rows:
    """What ended in the window."""

    #: Per trained sample: full tokens, versions behind, began, ended, version at hand-over.
    trained: list[tuple[float, int, float, float, int]] = field(default_factory=list)
    #: Per wasted sample: full tokens, tokens made.
    wasted: list[tuple[float, float]] = field(default_factory=list)
    guards: dict[str, int] = field(default_factory=dict)
    failed_tokens: float = 0.0


class Meter:
    """Watches a trainer and stops its clock when enough was seen."""

    def __init__(self, clock: Clock, scenario: Scenario) -> None:
        self.clock = clock
        self.scenario = scenario
        self.trainer: SimulatedTrainer | None = None
        #: When each version began to make tokens.
        self.published_s = [0.0]
        self._rows = _Rows()
        self._marks = _Marks()

    def trained(self, work: Work, stale: int) -> None:
        """A sample was handed over."""
        row = (work.tokens, stale, work.began_s, work.ends_s, work.version + stale)
        self._rows.trained.append(row)

    def wasted(self, work: Work, guard: str, tokens: float) -> None:
        """A sample was dropped, or died."""
        self._rows.wasted.append((work.tokens, tokens))
        self._rows.guards[guard] = self._rows.guards.get(guard, 0) + 1

    def lost(self, tokens: float) -> None:
        """An attempt failed."""
        self._rows.failed_tokens += tokens

    def published(self, version: int) -> None:
        """Begin at the last version of the warm-up, stop at the last of all."""
        self.published_s.append(self.clock.now)
        if version == self.scenario.skipped:
            self._rows = _Rows()
            self._marks = self._now()
        elif version == self.scenario.skipped + self.scenario.versions:
            self.clock.stop()

    def _now(self) -> _Marks:
        assert self.trainer is not None, "set by who made both"  # noqa: S101 - a defect
        workers = self.trainer.workers
        workers.count()
        return _Marks(self.clock.now, workers.busy_s, workers.generating_s, self.trainer.idle_s)

    def result(self) -> Result:
        """Of the window; the clock has stopped."""
        s, rows, since, now = self.scenario, self._rows, self._marks, self._now()
        span_s = now.at_s - since.at_s
        slot_s = span_s * s.slots
        kept = np.array(rows.trained, np.float64)
        lost = np.array(rows.wasted, np.float64).reshape(-1, 2)
        lengths = np.concatenate([kept[:, 0], lost[:, 0]])
        dead = rows.guards.get("dead", 0)
        dropped = len(lost) - dead
        made = kept[:, 0].sum() + lost[:, 1].sum() + rows.failed_tokens
        threshold = np.quantile(lengths, 0.9)
        longest = int((lengths >= threshold).sum())
        behind = kept[:, 1].astype(np.int64)
        ages, counts = np.unique(behind, return_counts=True)
        generating_s = now.generating_s - since.generating_s
        return Result(
            simulated_s=span_s,
            samples_per_h=len(kept) / span_s * 3600,
            steps_per_h=s.versions / span_s * 3600,
            tokens_per_s=float(kept[:, 0].sum()) / span_s,
            slots_busy=(now.busy_s - since.busy_s) / slot_s,
            slots_generating=generating_s / slot_s,
            slots_useful=generating_s / slot_s * float(kept[:, 0].sum() / made),
            trainer_idle=(now.idle_s - since.idle_s) / span_s,
            staleness_mean=float(behind.mean()),
            staleness_p99=float(np.quantile(behind, 0.99)),
            staleness_max=int(behind.max()),
            staleness_of_tokens=self._token_staleness(kept),
            staleness_shares={
                int(age): float(count / len(kept)) for age, count in zip(ages, counts, strict=True)
            },
            over_bound=float((behind > s.max_staleness).mean()),
            dropped=dropped / len(lengths),
            dropped_by={
                guard: count / len(lengths)
                for guard, count in sorted(rows.guards.items())
                if guard != "dead"
            },
            dead=dead / len(lengths),
            tokens_dropped=float(lost[:, 1].sum() / made),
            tokens_failed=float(rows.failed_tokens / made),
            trained_length=float(kept[:, 0].mean()),
            dropped_length=float(lost[:, 0].mean()) if len(lost) else None,
            length_bias=float(kept[:, 0].mean() / lengths.mean()),
            trained=len(kept) / len(lengths),
            longest_trained=float((kept[:, 0] >= threshold).sum() / longest),
        )

    def _token_staleness(self, kept: Float64) -> float:
        """Mean over tokens of (version at hand-over - version of the token).

        Tokens are made evenly from began to ended, but for pauses; these are as short as they are
        rare, and are not taken out.
        """
        starts = np.array(self.published_s)
        # The integral of the version over time: linear between two publishes.
        area = np.append(0.0, np.cumsum(np.arange(len(starts) - 1) * np.diff(starts)))
        began, ended = kept[:, 2], kept[:, 3]
        covered = np.interp(ended, starts, area) - np.interp(began, starts, area)
        version = covered / np.maximum(ended - began, 1e-12)
        return round(float(np.average(kept[:, 4] - version, weights=kept[:, 0])), 9)
