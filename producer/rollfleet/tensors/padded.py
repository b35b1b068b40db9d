"""A batch of padded tensors: what every field is, in shape, dtype and pad value.

- A *row* is one training sequence. A rollout whose conversation forked gives several rows, which
  share a rollout id, so that a loss can divide by rollouts and statistics count each once.
- Padding can be told from data in every field: versions -1, so that it never looks like version 0,
  masks False, log-probabilities 0.0.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from rollfleet_common.messages import NO_VERSION, Header

__all__ = ["GroupStats", "Scored", "TensorBatch", "group_stats", "map_tensors", "staleness_of"]

_Array = npt.NDArray[Any]
_Batch = TypeVar("_Batch", bound=Any)


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """B rows padded to T tokens, from R rollouts of G groups."""

    #: int64 or int32 [B, T]: token ids; `pad_id` in padding.
    input_ids: Tensor
    #: bool[B, T]: True on tokens; False in padding.
    attention_mask: Tensor
    #: bool[B, T]: True on tokens that are trained on; False in padding.
    loss_mask: Tensor
    #: float32[B, T]: log-probability under the policy that sampled the token; 0.0 elsewhere.
    logprobs: Tensor
    #: int32[B, T]: version of the policy that made the token; -1 where none did and in padding.
    versions: Tensor
    #: float32[B].
    rewards: Tensor
    #: int64[B]: which group a row belongs to, 0 .. G-1: its name is `groups[id]`.
    group_ids: Tensor
    #: int64[B]: which rollout a row came from, 0 .. R-1: its header is `headers[id]`.
    rollout_ids: Tensor
    #: int64[B]: tokens in a row, without padding.
    lengths: Tensor
    #: int64[B]: version of the oldest trained token of a row; -1 if none is trained.
    oldest: Tensor
    #: float32[B] each: parts of the reward; NaN where a row has none (``missing="fill"``).
    components: dict[str, Tensor]
    #: float32[B] each: the user's numbers; NaN where a row has none.
    metrics: dict[str, Tensor]
    #: The user's arrays of one value a token, [B, T, ...] in their own dtype, 0 in padding and in
    #: rows without; and those without dimensions, [B], NaN in rows without.
    arrays: dict[str, Tensor]
    #: The user's other arrays, one a row as they came (read-only); None in rows without.
    lists: dict[str, list[_Array | None]]
    #: Why generation ended, a row.
    finish_reasons: tuple[str, ...]
    #: What `logprobs` are log-probabilities of, a row: a value of `rollfleet.LogprobsKind`.
    logprobs_kinds: tuple[str, ...]
    #: Temperature that the tokens were sampled with, a row; None if unknown.
    temperatures: tuple[float | None, ...]
    #: Whether "length" means that the server's context was full, a row.
    context_full: tuple[bool, ...]
    #: Headers of the R rollouts, names of the G groups.
    headers: tuple[Header, ...]
    groups: tuple[str, ...]

    @property
    def rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens without padding; waits for the device if the batch is on one."""
        return int(self.lengths.sum())

    def staleness(self, version: int) -> Tensor:
        """int64[B]: versions between a trainer at `version` and each row's oldest trained token.

        Rows that train nothing are 0 versions behind.
        """
        return staleness_of(self.oldest, version)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TensorBatch":
        """The batch with its tensors on `device`; lists, headers and names stay where they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TensorBatch":
        """The batch in page-locked memory; needs a CUDA device. ``collate(pin=True)`` saves a copy."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TensorBatch":
        return map_tensors(self, change)


def staleness_of(oldest: Tensor, version: int) -> Tensor:
    """int64[B]: versions between `version` and `oldest`, 0 where nothing is trained."""
    return torch.where(oldest == NO_VERSION, 0, version - oldest)


def map_tensors(batch: _Batch, change: Callable[[Tensor], Tensor]) -> _Batch:
    """A batch with every tensor changed, those of its dicts, too."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif field.name in ("components", "metrics", "arrays"):
            changed[field.name] = {key: change(tensor) for key, tensor in value.items()}
    return replace(batch, **changed)


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Rewards by group; ``stats.mean[batch.group_ids]`` gives each row its group's."""

    #: float32[G].
    mean: Tensor
    #: float32[G]; 0.0 in a group of one.
    std: Tensor
    #: int64[G]: rollouts of the group in this batch.
    size: Tensor


class Scored(Protocol):
    """Rows with rewards: a batch in any form, or micro-batches before they are collated."""

    @property
    def rewards(self) -> Tensor:
        """float32[B]."""
        ...

    @property
    def group_ids(self) -> Tensor:
        """int64[B], 0 .. G-1."""
        ...

    @property
    def rollout_ids(self) -> Tensor:
        """int64[B], 0 .. R-1; -1 for a row of none."""
        ...

    @property
    def headers(self) -> tuple[Header, ...]:
        """Of the R rollouts."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the G groups."""
        ...


def group_stats(batch: Scored, *, correction: int = 1) -> GroupStats:
    """Mean and standard deviation of rewards by group, each rollout counted once.

    A rollout that forked counts with the reward of its first row, as its header does. A group of
    which there is no row (in a micro-batch) has a mean and deviation of NaN.

    Args:
        batch: In any form, on any device; the statistics are made there.
        correction: Subtracted from a group's size under the variance, as in `torch.std`: 1 as most
            GRPO trainers do, 0 for the population's.
    """
    rows, groups = len(batch.rewards), len(batch.groups)
    device = batch.rewards.device
    # One place more, for rows of no rollout.
    first = torch.full((len(batch.headers) + 1,), rows, device=device)
    order = torch.arange(rows, device=device)
    first = first.scatter_reduce(0, batch.rollout_ids + 1, order, "amin")[1:]
    here = (first < rows).long()
    first = first.clamp(max=rows - 1)
    rewards, ids = batch.rewards[first], batch.group_ids[first].clamp(min=0)
    zeros = torch.zeros(groups, device=device)
    size = torch.zeros(groups, dtype=torch.int64, device=device).index_add(0, ids, here)
    mean = zeros.index_add(0, ids, rewards * here) / size
    squares = zeros.index_add(0, ids, (rewards - mean[ids]).square() * here)
    variance = squares / (size - correction).clamp(min=1)
    return GroupStats(mean, torch.where(size > 0, variance.sqrt(), mean), size)
