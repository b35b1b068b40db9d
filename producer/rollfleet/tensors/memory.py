"""Memory for batches: all fields of one batch in one block, and blocks that are used again.

- A fresh block of tens of megabytes costs more in page faults than in copying, so the blocks of
  batches that are gone are kept for the next ones: at most `spare` of them, of any size.
- A block comes back when the last tensor, view or array that looks into it is gone, and not
  before: whoever keeps a tensor keeps his block, and the next batch gets another.
- Pinned memory is left to torch, whose allocator alone knows when a copy to a device has ended.
"""

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["BlockPool", "Field", "allocate"]

#: Fields begin at multiples of this many bytes: a cache line, and any dtype's size.
_ALIGN = 64

_UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor to be: its numpy dtype and shape."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without alignment."""
        return self.dtype.itemsize * prod(self.shape)


class BlockPool:
    """Blocks of pageable memory; safe from any thread, and from within a garbage collection."""

    def __init__(self, spare: int = 2) -> None:
        # A deque's append and popleft are atomic: a lock could be met again by a finalizer that
        # runs in the thread that holds it.
        self._spare: deque[_UInt8] = deque(maxlen=spare)

    def take(self, nbytes: int) -> Tensor:
        """uint8[nbytes], uninitialised."""
        block = self._fitting(nbytes)
        # The block is seen through a memoryview so that every view's base is `root`, whose end is
        # thereby the end of the last view: numpy shortens chains of bases, but not past a
        # foreign buffer.
        root = np.frombuffer(block.data, np.uint8)
        weakref.finalize(root, self._spare.append, block).atexit = False
        return torch.from_numpy(root)[:nbytes]

    def _fitting(self, nbytes: int) -> _UInt8:
        while self._spare:
            try:
                block = self._spare.popleft()
            except IndexError:  # another thread was faster
                break
            if block.nbytes >= nbytes:
                return block
        # An eighth more, which costs nothing while untouched: batches differ a little in length.
        return np.empty(nbytes + nbytes // 8, np.uint8)


_POOL = BlockPool()


def allocate(
    wanted: Mapping[tuple[str, str], Field], *, pin: bool
) -> dict[tuple[str, str], Tensor]:
    """Uninitialised tensors in one block.

    Args:
        wanted: Dtype and shape by name.
        pin: In page-locked memory, if there is a CUDA device; pageable otherwise.
    """
    offsets: dict[tuple[str, str], int] = {}
    total = 0
    for name, field in wanted.items():
        offsets[name] = total
        total += -(-field.nbytes // _ALIGN) * _ALIGN
    if pin and torch.cuda.is_available():
        block = torch.empty(total, dtype=torch.uint8, pin_memory=True)
        # By torch's own views, so that its allocator knows whose memory a copy reads.
        return {
            name: block[at : at + wanted[name].nbytes]
            .view(_torch_dtype(wanted[name].dtype))
            .view(wanted[name].shape)
            for name, at in offsets.items()
        }
    root = _POOL.take(total).numpy()
    return {
        name: torch.from_numpy(np.ndarray(field.shape, field.dtype, root, offsets[name]))
        for name, field in wanted.items()
    }


@cache
def _torch_dtype(dtype: "np.dtype[Any]") -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
