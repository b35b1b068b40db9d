"""One batch as the trainer gets it: rollouts, their tensors on demand, and numbers for its logger.

Torch is imported by `tensors` only, so that `import rollfleet` works without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rollfleet.policy.metrics import BiasMeter
from rollfleet.records import Group
from rollfleet_common.errors import SettingsError
from rollfleet_common.messages import NO_VERSION, Rollout

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rollfleet.tensors.device import PreparedTensors
    from rollfleet.tensors.micro_batches import MicroBatches
    from rollfleet.tensors.padded import TensorBatch

__all__ = ["Batch", "check_collate"]

#: Options of :func:`rollfleet.collate`, and the `device` that tensors are to be on.
_COLLATE_OPTIONS = frozenset(
    [
        "device",
        "form",
        "ids_dtype",
        "max_bytes",
        "missing",
        "pad_id",
        "pad_multiple",
        "pad_side",
        "pin",
    ]
)


def check_collate(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of `collate`, long before a batch is collated.

    Raises:
        SettingsError: An option is unknown.
    """
    if unknown := options.keys() - _COLLATE_OPTIONS:
        raise SettingsError(
            f"collate has {', '.join(sorted(unknown))}; its options are "
            f"{', '.join(sorted(_COLLATE_OPTIONS))}"
        )


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
    #: Options of :func:`rollfleet.collate` for `tensors`, and the `device` that they are to be on.
    collate: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: The tensors, if they are being made already.
    ahead: "Future[PreparedTensors] | None" = field(default=None, repr=False)

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
        """The padded tensors; see :class:`rollfleet.TensorBatch` for shapes and dtypes.

        Ask for them in the thread, and under the stream, that will use them.

        Raises:
            SettingsError: `collate` names a CUDA device, and there is none.
        """
        from rollfleet.tensors.device import tensors_of  # noqa: PLC0415 - torch is optional

        ahead, self.ahead = self.ahead, None
        return tensors_of(self.rollouts, self.collate, ahead)

    def micro_batches(self, budget_tokens: int, **options: Any) -> "MicroBatches":
        """The batch in pieces that a forward pass has room for; packed, unless told otherwise.

        Args:
            budget_tokens: What each may hold, padding included.
            options: Of :func:`rollfleet.micro_batches`, over those of `collate`; each is moved to
                the `device` when its turn comes.

        Raises:
            ValueError: An option that cannot be, or a row that is refused.
        """
        from rollfleet.tensors.micro_batches import micro_batches  # noqa: PLC0415 - torch is optional

        said: dict[str, Any] = {"missing": "fill", **self.collate, **options}
        return micro_batches(self.rollouts, budget_tokens=budget_tokens, **said)

    @property
    def asked(self) -> bool:
        """Whether it was asked for its tensors."""
        return "tensors" in vars(self)

    @property
    def staleness(self) -> list[int]:
        """Versions behind of each rollout, by its oldest trained token; 0 if all are masked."""
        oldest = [rollout.header.min_version for rollout in self.rollouts]
        return [0 if version == NO_VERSION else self.version - version for version in oldest]
