"""One rank's part of a batch: its own rollouts, and the numbers of the whole.

- `len(batch)`, `rollouts`, `tensors` and `micro` are of this rank; `samples`, `tokens`,
  `trained_tokens` and `stats` are of the whole batch, and the same on every rank.
- A loss that is a mean over the batch divides by the whole batch's numbers, on every rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rollfleet.batch import Batch
from rollfleet.ranks.protocol import ShareTotals
from rollfleet.ranks.share import Loaded
from rollfleet.tensors.packing import Form, StepTotals
from rollfleet_common.messages import NO_VERSION, Rollout

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rollfleet.tensors.device import PreparedTensors
    from rollfleet.tensors.micro_batches import MicroBatches
    from rollfleet.tensors.padded import TensorBatch

__all__ = ["RankBatch"]


@dataclass(eq=False)
class RankBatch:
    """The share of one rank in a batch that was judged fresh at `version`."""

    #: Number of the batch in its run, from 1; the same on every rank.
    number: int
    #: The trainer's version when it was handed over.
    version: int
    rank: int
    ranks: int
    #: Of this rank, in order: members of a group stand together, by index.
    rollouts: list[Rollout]
    #: Positions in `rollouts`, a tuple for each micro-batch; as many on every rank. () is one
    #: without rollouts, so that this rank, too, takes part in what the others do for it.
    micro: Sequence[tuple[int, ...]]
    #: Of the whole batch, as refined.
    tally: ShareTotals = field(repr=False)
    #: Numbers that only this rank knows: what it waited for and read; on rank 0 the whole fleet's.
    counted: Mapping[str, float] = field(repr=False)
    #: The batch in the ledger; on rank 0 only.
    whole: Batch | None = field(default=None, repr=False)
    #: Options of :func:`rollfleet.collate` for `tensors`, and the `device` that they are to be on.
    collate: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: Of the tensors of micro-batches.
    form: Form = "packed"
    #: The tensors, if they were made while the trainer computed.
    ahead: "Future[PreparedTensors] | None" = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        *,
        number: int,
        rank: int,
        ranks: int,
        tally: ShareTotals,
        counted: Mapping[str, float],
        whole: Batch | None,
        collate: Mapping[str, Any],
        form: Form,
    ) -> "RankBatch":
        """The share that was voted on."""
        return cls(
            number=number,
            version=loaded.version,
            rank=rank,
            ranks=ranks,
            rollouts=loaded.rollouts,
            micro=loaded.share.micro,
            tally=tally,
            counted=counted,
            whole=whole,
            collate=collate,
            form=form,
            ahead=loaded.made,
        )

    def __len__(self) -> int:
        """Samples of this rank; 0 only if the last batch of a feed has too few for all ranks."""
        return len(self.rollouts)

    @property
    def samples(self) -> int:
        """Samples of the whole batch."""
        return self.tally.samples

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch, prompts included."""
        return self.tally.tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens of the whole batch that are trained on."""
        return self.tally.trained_tokens

    @property
    def staleness(self) -> list[int]:
        """Versions behind of each rollout of this rank; 0 if all of it is masked."""
        oldest = [rollout.header.min_version for rollout in self.rollouts]
        return [0 if version == NO_VERSION else self.version - version for version in oldest]

    @cached_property
    def stats(self) -> dict[str, float]:
        """Numbers for a logger, of the whole batch; rank 0 adds the fleet's, and those of bias."""
        t = self.tally
        numbers: dict[str, float] = {
            "rollfleet/samples": t.samples,
            "rollfleet/tokens": t.tokens,
            "rollfleet/reward_mean": t.rewards / t.samples,
            "rollfleet/staleness_mean": t.behind / t.samples,
            "rollfleet/staleness_max": t.most_behind,
        }
        return {**({} if self.whole is None else self.whole.stats), **numbers, **self.counted}

    @cached_property
    def tensors(self) -> "TensorBatch":
        """The padded tensors of this rank's rollouts; see :class:`rollfleet.TensorBatch`.

        Raises:
            ValueError: This rank has no rollouts.
            SettingsError: `collate` names a CUDA device, and there is none.
        """
        from rollfleet.tensors.device import tensors_of  # noqa: PLC0415 - torch is optional

        ahead, self.ahead = self.ahead, None
        return tensors_of(self.rollouts, self.collate, ahead)

    def micro_batches(self) -> "MicroBatches":
        """The micro-batches of this rank, as many as on every other; each is collated when asked for.

        Their weights make the sum over all ranks the mean over the whole batch. Where this rank has
        nothing while others have, a filler of one masked token keeps it in step with them.
        """
        from rollfleet.tensors.micro_batches import micro_batches_of  # noqa: PLC0415 - torch is optional

        options = {"missing": "fill", **self.collate}
        options.pop("form", None)  # of `tensors`; ours is planned for
        t = self.tally
        whole = StepTotals(t.trained_tokens, t.trained_rows, t.trained_samples, len(self.micro))
        micros = micro_batches_of(self.rollouts, self.micro, form=self.form, **options)
        return micros.within(whole)
