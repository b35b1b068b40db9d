"""What a sequence costs a trainer, and costs divided into equal parts.

- Deterministic: the same costs give the same parts on every machine; ties go by position.
- The better of two heuristics that fail differently: longest processing time first (Graham), good
  when there are many to a part, and largest differencing (Karmarkar and Karp), good when there
  are few.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Cost", "partition"]

#: Of more items than this, longest-first alone: it is as good there, and differencing is slower.
DIFFERENCING_LIMIT = 4096

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Cost:
    """``per_token * tokens + per_square * tokens**2`` of one sequence, in any unit."""

    per_token: float = 1.0
    per_square: float = 0.0

    def __post_init__(self) -> None:
        if self.per_token < 0 or self.per_square < 0 or not self.per_token + self.per_square > 0:
            raise ValueError(
                f"per_token {self.per_token} and per_square {self.per_square} must not be "
                "negative, and one of them must be more than 0"
            )

    @classmethod
    def attention(cls, hidden: int) -> "Cost":
        """A dense transformer of width `hidden` with causal attention.

        A layer has about 12 hidden**2 weights, so 24 hidden**2 operations a token; its attention
        has 2 hidden operations a token and token before it on average: 12 hidden to 1.
        """
        return cls(12.0 * hidden, 1.0)

    def of(self, tokens: int, sequences: int = 1) -> float:
        """Of `tokens` in `sequences` sequences that are taken to be equally long."""
        return self.per_token * tokens + self.per_square * tokens * tokens / sequences


def partition(costs: Sequence[float], parts: int, *, even: bool = False) -> list[list[int]]:
    """Positions in `costs`, each in one of `parts` lists of about the same cost.

    Args:
        costs: Of each item; not negative.
        parts: How many lists, at least 1; some are empty when there are fewer items.
        even: No two lists differ by more than one in length.
    """
    found = _longest_first(costs, parts, even)
    if not even and 1 < parts < len(costs) <= DIFFERENCING_LIMIT:
        other = _differencing(costs, parts)
        if _highest(costs, other) < _highest(costs, found):
            found = other
    return [sorted(part) for part in found]


def _highest(costs: Sequence[float], parts: Sequence[Sequence[int]]) -> float:
    return max(sum(costs[i] for i in part) for part in parts)


def _longest_first(costs: Sequence[float], parts: int, even: bool) -> list[list[int]]:
    """The costliest that is left goes to the part that has least."""
    found: list[list[int]] = [[] for _ in range(parts)]
    most, longer = divmod(len(costs), parts)
    heap = [(0.0, k) for k in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cost, k = heapq.heappop(heap)
        found[k].append(i)
        if even and len(found[k]) >= most:
            if not longer or len(found[k]) > most:
                continue  # full
            # One more would be one of the longer parts: as long as there may be any.
            longer -= 1
        heapq.heappush(heap, (cost + costs[i], k))
    return found


def _differencing(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Merge the two most uneven divisions, the high sums of one on the low ones of the other."""
    heap: list[tuple[float, int, _Floats]] = []
    for i, cost in enumerate(costs):
        sums = np.zeros(parts)
        sums[0] = cost
        heap.append((-cost, i, sums))
    heapq.heapify(heap)
    # Where the sums of a merge went is remembered, and the items are dealt out at the end.
    merges: list[tuple[int, int, _Ints]] = []
    while len(heap) > 1:
        _, a, high = heapq.heappop(heap)
        _, b, low = heapq.heappop(heap)
        sums = high + low[::-1]
        order = np.argsort(-sums, kind="stable")
        sums = sums[order]
        heapq.heappush(heap, (float(sums[-1] - sums[0]), len(costs) + len(merges), sums))
        merges.append((a, b, order))
    return _deal(len(costs), parts, merges)


def _deal(count: int, parts: int, merges: Sequence[tuple[int, int, _Ints]]) -> list[list[int]]:
    #: Of a division that was merged: which part each of its sums ended in.
    ended: dict[int, npt.NDArray[Any]] = {count + len(merges) - 1: np.arange(parts)}
    for node in range(len(merges) - 1, -1, -1):
        a, b, order = merges[node]
        place = np.empty(parts, np.intp)
        place[order] = ended.pop(count + node)
        ended[a], ended[b] = place, place[::-1]
    found: list[list[int]] = [[] for _ in range(parts)]
    for i in range(count):
        found[int(ended[i][0])].append(i)
    return found
