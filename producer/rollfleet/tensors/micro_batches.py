"""Micro-batches of one step, collated one at a time, and what a loss over all of them divides by.

- Rows are named by their position in the step's rows, in the order of :func:`rollfleet.collate`;
  `group_ids` and `rollout_ids` mean the same in every micro-batch, so statistics of the whole step
  (``group_stats(micros)``) are looked up by them.
- :meth:`MicroBatch.weights` makes the sum over all tokens of all micro-batches of all ranks the mean
  over the step, exactly; nothing else is scaled.
- The form of the user's own fields is decided for the step, so it is the same in each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rollfleet.tensors.balance import Cost
from rollfleet.tensors.collate import (
    MAX_BYTES,
    PackedBatch,
    TensorBatch,
    check_options,
    collate_rows,
)
from rollfleet.tensors.mixture import tell_mixture
from rollfleet.tensors.packing import Form, Over, StepTotals, plan_micro
from rollfleet.tensors.sequences import Extras, Rows
from rollfleet_common.messages import Header, Rollout

__all__ = ["MicroBatch", "MicroBatches", "micro_batches", "micro_batches_of"]

#: Whose mean a loss is: every trained token counts alike, or every row, or every rollout.
Mean = Literal["token", "row", "rollout"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """b rows of a step: tensors, and what they are a part of."""

    tensors: TensorBatch | PackedBatch
    #: int64[b]: position of each row among the rows of this rank's step; -1 in a filler.
    rows: Tensor
    #: int64[b]: trained tokens of the row, and of its rollout with all of its rows.
    row_trained: Tensor
    rollout_trained: Tensor
    #: What a mean over the step divides by; of all ranks after :meth:`MicroBatches.within`.
    step: StepTotals
    #: Which micro-batch of this rank's, and how many it has.
    index: int
    count: int
    #: Nothing of the step: a row of one masked token, so that this rank, too, runs a forward and a
    #: backward pass while others do. Its group and rollout ids are -1, its weights 0.
    filler: bool = False

    @property
    def last(self) -> bool:
        """Whether gradients are complete after it: where DDP and FSDP synchronise them."""
        return self.index == self.count - 1

    def weights(self, mean: Mean = "token") -> Tensor:
        """float32, shaped as `loss_mask`: 0 where nothing is trained.

        ``(per_token_loss * micro.weights()).sum()``, added up over all micro-batches of all ranks, is
        the mean over the step. Ranks whose gradients are averaged multiply by their number.

        Args:
            mean: Over trained "token"s; over "row"s of the mean over their tokens; over "rollout"s,
                where the tokens of a rollout's rows are one sequence.

        Raises:
            ValueError: Another mean.
        """
        batch = self.tensors
        if mean == "token":
            return batch.loss_mask / max(self.step.trained_tokens, 1)
        if mean == "row":
            row = 1.0 / (self.row_trained.clamp(min=1) * max(self.step.trained_rows, 1))
        elif mean == "rollout":
            rollouts = max(self.step.trained_rollouts, 1)
            row = 1.0 / (self.rollout_trained.clamp(min=1) * rollouts)
        else:
            raise ValueError(f"mean {mean!r} must be token, row or rollout")
        if isinstance(batch, TensorBatch):
            return batch.loss_mask * row[:, None]
        # In the tail, -1 looks up the last row, and the mask is False.
        return batch.loss_mask * row[batch.row_ids.long()]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MicroBatch":
        """The same with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("tensors", "rows", "row_trained", "rollout_trained")
        }
        return replace(self, **moved)


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of one rank's step; each is collated when it is asked for, every time."""

    def __init__(
        self,
        rows: Rows,
        extras: Extras,
        parts: Sequence[tuple[int, ...]],
        form: Form,
        options: Mapping[str, Any],
    ) -> None:
        """Of `rows`, the rows of each part; () is a filler. Use :func:`micro_batches`."""
        self._rows = rows
        self._extras = extras
        self._form: Form = form
        self._options = dict(options)
        self._device = self._options.pop("device", None)
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else None
        self._trained = np.array([np.count_nonzero(s.loss_mask) for s in rows.samples], np.int64)
        by_rollout = np.zeros(len(rows.headers), np.int64)
        np.add.at(by_rollout, rows.rollout_ids, self._trained)
        self._rollout_trained = by_rollout
        #: Rows of each micro-batch, as in :class:`rollfleet.tensors.packing.MicroPlan`.
        self.parts = tuple(parts)
        #: Of this rank alone: to be gathered and given to :meth:`within` if there are others.
        self.totals = StepTotals(
            trained_tokens=int(self._trained.sum()),
            trained_rows=int(np.count_nonzero(self._trained)),
            trained_rollouts=int(np.count_nonzero(by_rollout)),
            micro_batches=len(self.parts),
        )
        self.step = self.totals

    def within(self, step: StepTotals) -> "MicroBatches":
        """The same as a part of a step of several ranks: its denominators, its number of each.

        Args:
            step: The sum of the `totals` of all ranks. Those that have fewer micro-batches than
                the others get fillers; nothing is packed anew.

        Raises:
            ValueError: It is not that sum.
        """
        missing = step.micro_batches - len(self.parts)
        if missing < 0:
            raise ValueError(
                f"a step of {step.micro_batches} micro-batches cannot hold {len(self.parts)}: "
                "it is not the sum of all ranks' totals"
            )
        parts = (*self.parts, *[()] * missing)
        options = {**self._options, "device": self._device}
        other = MicroBatches(self._rows, self._extras, parts, self._form, options)
        other.step = step
        return other

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        return self._make(index % len(self))

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self._make(k) for k in range(len(self)))

    def _make(self, index: int) -> MicroBatch:
        part = self.parts[index]
        if part:
            rows = self._rows.take(part)
            trained = self._trained[list(part)]
            of_rollout = self._rollout_trained[rows.rollout_ids]
        else:
            rows = self._rows.filler(self._options.get("pad_id", 0))
            trained = of_rollout = np.zeros(1, np.int64)
        micro = MicroBatch(
            tensors=collate_rows(rows, self._extras.take(part), self._form, **self._options),
            rows=torch.tensor(part or (-1,)),
            row_trained=torch.from_numpy(trained),
            rollout_trained=torch.from_numpy(of_rollout),
            step=self.step,
            index=index,
            count=len(self),
            filler=not part,
        )
        if self._device is None:
            return micro
        return micro.to(self._device, non_blocking=bool(self._options.get("pin")))

    # ---- of the whole step, for group_stats and advantages -------------------------------------

    @cached_property
    def rewards(self) -> Tensor:
        """float32[B], of all rows of this rank's step."""
        rewards = [sample.reward for sample in self._rows.samples]
        return torch.tensor(rewards, dtype=torch.float32, device=self._device)

    @cached_property
    def group_ids(self) -> Tensor:
        """int64[B]."""
        return torch.tensor(self._rows.group_ids, dtype=torch.int64, device=self._device)

    @cached_property
    def rollout_ids(self) -> Tensor:
        """int64[B]."""
        return torch.tensor(self._rows.rollout_ids, dtype=torch.int64, device=self._device)

    @property
    def headers(self) -> tuple[Header, ...]:
        """Of the R rollouts."""
        return tuple(self._rows.headers)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the G groups."""
        return tuple(self._rows.groups)


def micro_batches(
    rollouts: Sequence[Rollout] | Sequence[tuple[Header, bytes]],
    *,
    budget_tokens: int,
    form: Form = "packed",
    cost: Cost | None = None,
    over: Over = "alone",
    at_least: int = 0,
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    missing: Literal["error", "fill"] = "error",
    max_bytes: int = MAX_BYTES,
    device: torch.device | str | None = None,
) -> MicroBatches:
    """One rank's rollouts as micro-batches that a forward pass has room for.

    Args:
        rollouts: Decoded, or headers with payload bytes; none only with `at_least`, which gives
            fillers.
        budget_tokens: What a micro-batch may hold, padding included; see
            :func:`rollfleet.plan_micro`.
        form: Of their tensors.
        cost: What micro-batches are made alike in; tokens if not given.
        over: A row longer than the budget gets a micro-batch "alone", keeps only its first tokens
            ("truncate"), or is a ValueError ("refuse").
        at_least: Micro-batches there must be.
        pad_side: As in :func:`rollfleet.collate`; so are those that follow.
        pad_multiple: A micro-batch's length is rounded up to it.
        pad_id: In padding and fillers.
        ids_dtype: torch.int64 or torch.int32.
        pin: In page-locked memory.
        missing: What to do about a named field that some rows do not have.
        max_bytes: Largest memory of the tensors of one micro-batch.
        device: Where each is copied when it is asked for; None leaves it on the host, "auto" means
            CUDA if there is any.

    Raises:
        ValueError: No rollouts, one without samples, a key missing in a row, a row that is refused,
            or a setting that cannot be.
        CodecError, SchemaError: Bytes that are no payload of ours.
    """
    check_options(form, pad_side, pad_multiple, ids_dtype)
    rows = Rows(rollouts)
    tell_mixture(rows.samples)
    parts: Sequence[tuple[int, ...]]
    if rollouts:
        plan = plan_micro(
            rows.lengths,
            budget_tokens=budget_tokens,
            cost=cost or Cost(),
            over=over,
            form=form,
            pad_multiple=pad_multiple,
            at_least=max(at_least, 1),
        )
        rows = rows.shortened(plan.cut)
        parts = plan.ranks[0]
    elif at_least:
        parts = [()] * at_least
    else:
        raise ValueError("cannot divide an empty batch: there is no rollout in it")
    options = {
        "pad_side": pad_side,
        "pad_multiple": pad_multiple,
        "pad_id": pad_id,
        "ids_dtype": ids_dtype,
        "pin": pin,
        "max_bytes": max_bytes,
        "device": device,
    }
    return MicroBatches(rows, Extras(rows, missing), parts, form, options)


def micro_batches_of(
    rollouts: Sequence[Rollout] | Sequence[tuple[Header, bytes]],
    parts: Sequence[Sequence[int]],
    *,
    form: Form = "packed",
    missing: Literal["error", "fill"] = "error",
    **options: Any,
) -> MicroBatches:
    """Micro-batches that somebody else has planned, from headers.

    Args:
        rollouts: Of this rank.
        parts: Positions in `rollouts` of each micro-batch; a rollout goes with all of its rows.
            () is a filler. Every position comes once.
        form: Of their tensors.
        missing: As in :func:`rollfleet.collate`.
        options: `pad_side`, `pad_multiple`, `pad_id`, `ids_dtype`, `pin`, `max_bytes` and `device`,
            as in
            :func:`micro_batches`.

    Raises:
        ValueError: A position that is missing or comes twice, or as in :func:`micro_batches`.
        CodecError, SchemaError: Bytes that are no payload of ours.
    """
    if sorted(at for part in parts for at in part) != list(range(len(rollouts))):
        raise ValueError(f"the plan is not one of {len(rollouts)} rollouts, each of them once")
    said = {"pad_side": "right", "pad_multiple": 1, "ids_dtype": torch.int64, **options}
    check_options(form, said["pad_side"], said["pad_multiple"], said["ids_dtype"])
    rows = Rows(rollouts)
    tell_mixture(rows.samples)
    of_rollout: list[list[int]] = [[] for _ in rollouts]
    for row, rollout in enumerate(rows.rollout_ids):
        of_rollout[rollout].append(row)
    by_row = [tuple(row for at in part for row in of_rollout[at]) for part in parts]
    return MicroBatches(rows, Extras(rows, missing), by_row, form, options)
