"""One batch as the trainer gets it: rollouts, their tensors on demand, and numbers for its logger.

Torch is imported by `tensors` only, so that `import rollfleet` works without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rollfleet.bias import BiasMeter
from rollfleet.groups import Group
from rollfleet_common.messages import NO_VERSION, Rollout

if TYPE_CHECKING:
    from rollfleet.tensors import TensorBatch

__all__ = ["Batch"]


@dataclass(eq=False)
class Batch:
    """Whole groups, judged fresh at `version`, the moment they were handed over."""

    #: Number of the batch in its run, from 1.
    number: int
    #: The trainer's version when it was handed over.
    version: int
    #: In order: members of a group stand together, by index.
    rollouts: list[Rollout]
    #: Of `stats`, what was counted at hand-over.
    counted: Mapping[str, float] = field(repr=False)
    #: What was known of bias at hand-over.
    bias: BiasMeter = field(repr=False)
    groups: list[Group] = field(repr=False)
    #: "handed", "trained" or "committed".
    state: str = "handed"
    #: Options of :func:`rollfleet.collate` for `tensors`.
    collate: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Samples in the batch."""
        return len(self.rollouts)

    @cached_property
    def stats(self) -> dict[str, float]:
        """Numbers for a logger: staleness, reward, waiting, drops since the last batch, bias.

        Made when they are first asked for: a trainer that logs every tenth batch pays for that.
        """
        return {**self.counted, **self.bias.as_dict()}

    @cached_property
    def tensors(self) -> "TensorBatch":
        """The padded tensors; see :class:`rollfleet.TensorBatch` for shapes and dtypes."""
        from rollfleet.collate import collate  # noqa: PLC0415 - torch is optional

        # A metric that some rollouts lack is no reason to fail in the middle of training.
        return collate(self.rollouts, **{"missing": "fill", **self.collate})

    @property
    def staleness(self) -> list[int]:
        """Versions behind of each rollout, by its oldest trained token; 0 if all are masked."""
        oldest = [rollout.header.min_version for rollout in self.rollouts]
        return [0 if version == NO_VERSION else self.version - version for version in oldest]
