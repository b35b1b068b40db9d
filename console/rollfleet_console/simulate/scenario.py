"""What is simulated: a fleet, its trainer and how long things take. The defaults are the reference.

- The reference was fixed before the first run, and is not tuned to its numbers.
- Light to import: the command's help shows these defaults.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rollfleet_common.errors import SettingsError

__all__ = ["REFERENCE", "ROLLOUT_SHARE", "Scenario"]

#: Share of the accelerators that generate, in a fleet apart from its trainer (AReaL: 75/25).
ROLLOUT_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One simulated run. All counts are in samples, all times in seconds."""

    #: Rollouts that run at once, over all workers.
    slots: int = 256
    #: Samples that one version is trained on: one batch.
    samples_per_version: int = 512
    group_size: int = 8
    max_staleness: int = 2
    #: None: `max_staleness`.
    pipeline_depth: int | None = None
    #: Train on a torn group of at least so many samples; None: whole groups only.
    min_group_size: int | None = None
    #: Samples launched beyond `group_size`: the first of a group are taken, the rest cancelled.
    oversample: int = 0
    #: Lognormal duration of a rollout that runs alone on a slot.
    median_s: float = 30.0
    sigma: float = 1.0
    #: Of the log-durations of two samples of one group; hard prompts are long for all of them.
    group_correlation: float = 0.0
    #: Speed of one slot, whatever the others do.
    tokens_per_s: float = 50.0
    #: Budget of one rollout: longer ones are cut there, and trained on. None: unbounded.
    max_tokens: int | None = None
    train_s: float = 20.0
    #: From the end of the train step to the publish.
    update_s: float = 2.0
    #: Generation stands still during the update; else it goes on with the old weights.
    pause: bool = True
    #: Chance that an attempt fails, at a uniform point of its life; all of it is lost.
    failure_rate: float = 0.01
    retry_s: float = 5.0
    attempts: int = 3
    #: Stop what has become too old, and cancel the rest of its group.
    early_cancel: bool = True
    #: A fifth of the lease of 30 s.
    renew_s: float = 6.0
    #: Pacing alone, nothing judged: what an admission formula without a sweep would train on.
    pacing_only: bool = False
    #: Versions that are measured, after those of the warm-up.
    versions: int = 60
    #: None: enough to fill the pipeline twice.
    warm_up: int | None = None
    seed: int = 0
    #: Longest simulated wait for one batch.
    starve_s: float = 100_000.0

    @property
    def depth(self) -> int:
        """`pipeline_depth`, or what it is when not given."""
        return self.max_staleness if self.pipeline_depth is None else self.pipeline_depth

    @property
    def launched(self) -> int:
        """Samples launched for one prompt."""
        return self.group_size + self.oversample

    @property
    def skipped(self) -> int:
        """`warm_up`, or what it is when not given."""
        return 2 * (self.depth + 1) + 4 if self.warm_up is None else self.warm_up

    def check(self) -> None:
        """Refuse what cannot be simulated.

        Raises:
            SettingsError: With the arithmetic.
        """
        from rollfleet_common.staleness import check_shape  # noqa: PLC0415  # brings numpy

        check_shape(
            samples_per_version=self.samples_per_version,
            batch_size=self.samples_per_version,
            group_size=self.group_size,
            max_staleness=self.max_staleness,
            pipeline_depth=self.depth,
        )
        positive = ("slots", "median_s", "tokens_per_s", "renew_s", "attempts", "versions")
        for name in positive:
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("sigma", "train_s", "update_s", "retry_s", "skipped", "oversample"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 0")
        least = self.group_size if self.min_group_size is None else self.min_group_size
        if not 1 <= least <= self.group_size:
            raise SettingsError(
                f"min_group_size is {least}; it is from 1 to group_size = {self.group_size}"
            )
        if not 0 <= self.group_correlation <= 1:
            raise SettingsError(f"group_correlation is {self.group_correlation}; it is from 0 to 1")
        if not 0 <= self.failure_rate < 1:
            raise SettingsError(f"failure_rate is {self.failure_rate}; it is from 0 to below 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SettingsError(f"max_tokens is {self.max_tokens}; it must be at least 1")

    def synchronous(self) -> "Scenario":
        """The same fleet and trainer, taking turns: max_staleness = 0.

        With whole groups and none to spare: what a torn group or a surplus gives back at depth 0
        may be room for less than a group, and then nothing could happen any more.
        """
        return replace(
            self,
            max_staleness=0,
            pipeline_depth=0,
            min_group_size=None,
            oversample=0,
            warm_up=None,
        )

    def colocated(self) -> "Scenario":
        """Synchronous on the same accelerators, all of which generate and then all of which train.

        Generous to it: slots and the train step scale without loss, and switching costs nothing.
        """
        return replace(
            self.synchronous(),
            slots=max(round(self.slots / ROLLOUT_SHARE), 1),
            train_s=self.train_s * (1 - ROLLOUT_SHARE),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types, with what was derived."""
        return asdict(self) | {"pipeline_depth": self.depth, "warm_up": self.skipped}


REFERENCE = Scenario()
