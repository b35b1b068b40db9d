"""A batch of packed tensors, rows one behind the other: what every field is, in shape, dtype and pad value.

- For variable-length attention (`cu_seqlens`, `max_seqlen`) and for models that tell sequences apart
  by position ids, which begin anew with every row.
- Padding, if any, is a *tail* behind the last row: a sequence of its own for attention, so that
  kernels that compute only what `cu_seqlens` covers leave nothing undefined; no row of the batch.
- As in :mod:`rollfleet.tensors.padded`, padding can be told from data in every field.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from rollfleet.tensors.padded import map_tensors, staleness_of
from rollfleet_common.messages import Header

__all__ = ["PackedBatch"]

_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B rows in T tokens, tail included, from R rollouts of G groups."""

    #: int64 or int32 [T]: token ids; `pad_id` in the tail. Most models want ``input_ids[None]``.
    input_ids: Tensor
    #: As input_ids: position of a token in its row, from 0; in the tail from 0 again.
    position_ids: Tensor
    #: int32[T]: row of a token, 0 .. B-1; -1 in the tail.
    row_ids: Tensor
    #: bool[T]: True on tokens that are trained on; False in the tail. A row's first token has no
    #: logits that predict it: shift within rows, see docs/batches.md.
    loss_mask: Tensor
    #: float32[T]: log-probability under the policy that sampled the token; 0.0 elsewhere.
    logprobs: Tensor
    #: int32[T]: version of the policy that made the token; -1 where none did and in the tail.
    versions: Tensor
    #: int32[B+1]: where rows begin, and the end of the last; int32[B+2] with a tail, whose end it is.
    cu_seqlens: Tensor
    #: Tokens of the longest row, or of the tail if that is longer.
    max_seqlen: int
    #: Tokens of the tail, 0 if there is none.
    tail: int
    #: float32[B].
    rewards: Tensor
    #: int64[B]: which group a row belongs to, 0 .. G-1: its name is `groups[id]`.
    group_ids: Tensor
    #: int64[B]: which rollout a row came from, 0 .. R-1: its header is `headers[id]`.
    rollout_ids: Tensor
    #: int64[B]: tokens in a row.
    lengths: Tensor
    #: int64[B]: version of the oldest trained token of a row; -1 if none is trained.
    oldest: Tensor
    #: float32[B] each: parts of the reward; NaN where a row has none (``missing="fill"``).
    components: dict[str, Tensor]
    #: float32[B] each: the user's numbers; NaN where a row has none.
    metrics: dict[str, Tensor]
    #: The user's arrays of one value a token, [T, ...] in their own dtype, 0 in the tail and in rows
    #: without; and those without dimensions, [B], NaN in rows without.
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
        return self.lengths.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens without the tail."""
        return self.input_ids.shape[0] - self.tail

    def staleness(self, version: int) -> Tensor:
        """int64[B]: versions between a trainer at `version` and each row's oldest trained token.

        Rows that train nothing are 0 versions behind.
        """
        return staleness_of(self.oldest, version)

    def row_sum(self, values: Tensor) -> Tensor:
        """[B] or [B, ...]: values of one a token ([T, ...]) added up by row; differentiable."""
        ours = values[: self.tokens]
        zeros = ours.new_zeros((self.rows, *ours.shape[1:]))
        return zeros.index_add(0, self.row_ids[: self.tokens], ours)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The batch with its tensors on `device`; lists, headers and names stay where they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The batch in page-locked memory; needs a CUDA device. ``collate(pin=True)`` saves a copy."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        return map_tensors(self, change)
