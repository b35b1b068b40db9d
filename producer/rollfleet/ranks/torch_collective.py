"""The ranks of a trainer that uses torch.distributed, heard through a gloo group of our own.

- A group of its own on the CPU: it works beside NCCL, puts nothing on a GPU, and never stands in
  the way of the trainer's own collectives.
- Bytes travel as tensors, not as pickles.
- A process that dies closes its connections, so that the others learn of it at once; one that is
  frozen is noticed by the timeout.
"""

from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rollfleet_common.errors import CollectiveError

__all__ = ["TorchCollective"]


class TorchCollective:
    """Sets torch.distributed up from the variables of torchrun if nobody did, with gloo.

    Every rank must make one, at the same point of its program.

    Args:
        timeout_s: Longest wait of any round.
    """

    def __init__(self, *, timeout_s: float = 1800.0) -> None:
        self._ours = not dist.is_initialized()
        if self._ours:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather(self, part: bytes, timeout_s: float) -> list[bytes]:
        """What every rank said; see :meth:`Collective.all_gather`."""
        own = torch.frombuffer(bytearray(part or b"\0"), dtype=torch.uint8)
        length = torch.tensor([len(part)])
        lengths = [int(each) for each in self._gather(length, timeout_s)]
        room = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        room[: len(part)] = own[: len(part)]
        parts = self._gather(room, timeout_s)
        return [p[:n].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]

    def _gather(self, own: Tensor, timeout_s: float) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        try:
            work = dist.all_gather(everyone, own, group=self._group, async_op=True)
            if work is not None:
                work.wait(timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as exc:
            raise CollectiveError(
                f"rank {self.rank} of {self.size} did not hear the others within {timeout_s:g} s, "
                f"or one of them is gone: {exc}"
            ) from exc
        return everyone

    def close(self, why: str = "") -> None:
        """Leave our group, which closes its connections; and torch.distributed if we set it up."""
        group, self._group = self._group, None
        if group is None:
            return
        # A group whose member died may refuse; there is nothing more to take back.
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(group)
        if self._ours:
            with suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group()
