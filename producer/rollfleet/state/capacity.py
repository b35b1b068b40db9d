"""How many samples may be submitted now: the trainer's view of the ledger. Pure.

- The ledger in Redis is the truth; what is kept here is its last answer, which errs on the safe
  side, because others only ever return credit.
- Credit of samples trained since the last publish is held back: a prompt submitted between the
  training step and the publish would be answered by a policy that is already one version older.
"""

from rollfleet_common.staleness import capacity

__all__ = ["Pacer"]


class Pacer:
    """Paces submission.

    Args:
        pipeline_depth: Versions that rollouts may be started ahead of.
        samples_per_version: Samples that one version is trained on.
        tallied: Whether `outstanding` follows every event here. Not with several partitions:
            no submit then answers for all of them, and what was read and what was heard of would
            be counted twice; the ledger is read instead.
    """

    def __init__(
        self, pipeline_depth: int, samples_per_version: int, *, tallied: bool = True
    ) -> None:
        self.tallied = tallied
        self.pipeline_depth = pipeline_depth
        self.samples_per_version = samples_per_version
        #: Training samples submitted and not yet trained, dropped or dead.
        self.outstanding = 0
        #: Of the credit that came back, what waits for the next version.
        self.held = 0

    @property
    def room(self) -> int:
        """Samples that may be submitted now; negative if more are out than should be."""
        free = capacity(self.pipeline_depth, self.samples_per_version, self.outstanding)
        return free - self.held

    @property
    def limit(self) -> int:
        """The most that may be outstanding now, for submit's own check."""
        return (self.pipeline_depth + 1) * self.samples_per_version - self.held

    def settled(self, samples: int, *, hold: bool = False) -> None:
        """Credit came back: `samples` were trained (`hold`), dropped or died."""
        if self.tallied:
            self.outstanding = max(self.outstanding - samples, 0)
        if hold:
            self.held = min(self.held + samples, self.samples_per_version)

    def release(self) -> None:
        """A version was published, or the trainer asks for more at the version it has."""
        self.held = 0
