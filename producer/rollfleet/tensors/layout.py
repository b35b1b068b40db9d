"""Where rows and padding lie in the flat memory of a batch's fields, and writing them there.

- A field of one value a token is written by one call of numpy for all rows: what Python adds to a
  row is paid once for it, not once for each of its fields.
- Padding is written in the same call, from constants.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rollfleet_common.messages import NO_VERSION, Int32, Sample

__all__ = ["Layout", "Packed", "Padded", "write_extras", "write_versions"]

_Array = npt.NDArray[Any]


class Layout(Protocol):
    """How rows lie in memory."""

    #: Shape of a field of one value a token.
    shape: tuple[int, ...]
    #: Where each row begins in it, flattened.
    begins: Sequence[int]
    #: Where the padding is.
    gaps: Sequence[slice]

    def write(self, out: _Array, rows: Sequence[_Array], pad: Any) -> None:
        """Write rows, and `pad` where the padding is, into all of `out`, which is flat."""


class Padded:
    """Rows of equal width, one under the other."""

    def __init__(
        self, lengths: Sequence[int], multiple: int, side: Literal["right", "left"]
    ) -> None:
        width = -(-max(lengths) // multiple) * multiple
        self.shape: tuple[int, ...] = (len(lengths), width)
        self.right = side == "right"
        self.missing = [width - length for length in lengths]
        ends = range(width, width * len(lengths) + 1, width)
        if self.right:
            self.begins: Sequence[int] = range(0, width * len(lengths), width)
            gaps = [(end - gap, end) for end, gap in zip(ends, self.missing, strict=True)]
        else:
            self.begins = [end - length for end, length in zip(ends, lengths, strict=True)]
            gaps = [(end - width, end - n) for end, n in zip(ends, lengths, strict=True)]
        self.gaps: Sequence[slice] = [slice(a, b) for a, b in gaps if a < b]

    def write(self, out: _Array, rows: Sequence[_Array], pad: Any) -> None:
        """As in :class:`Layout`."""
        if not self.gaps:
            np.concatenate(rows, out=out, casting="same_kind")
            return
        padding = np.full((max(self.missing), *out.shape[1:]), pad, out.dtype)
        pieces: list[_Array] = []
        for row, missing in zip(rows, self.missing, strict=True):
            if not missing:
                pieces.append(row)
            elif self.right:
                pieces += (row, padding[:missing])
            else:
                pieces += (padding[:missing], row)
        np.concatenate(pieces, out=out, casting="same_kind")


class Packed:
    """Rows one behind the other, and padding behind the last."""

    def __init__(self, lengths: Sequence[int], multiple: int) -> None:
        tokens = sum(lengths)
        self.tail = -tokens % multiple
        self.shape: tuple[int, ...] = (tokens + self.tail,)
        ends: list[int] = np.cumsum(lengths).tolist()
        self.begins: Sequence[int] = [0, *ends[:-1]]
        self.gaps: Sequence[slice] = [slice(tokens, tokens + self.tail)] if self.tail else []

    def write(self, out: _Array, rows: Sequence[_Array], pad: Any) -> None:
        """As in :class:`Layout`."""
        for gap in self.gaps:
            out[gap] = pad
        np.concatenate(rows, out=out[: len(out) - self.tail], casting="same_kind")


def write_versions(out: Int32, samples: Sequence[Sample], layout: Layout) -> None:
    """Write every token's version, by runs."""
    for sample, begin in zip(samples, layout.begins, strict=True):
        versions: list[int] = sample.versions.versions.tolist()
        at = begin
        for start, version in zip(sample.versions.starts.tolist()[1:], versions, strict=False):
            end = begin + start
            out[at:end] = version
            at = end
        out[at : begin + len(sample.token_ids)] = versions[-1]
    for gap in layout.gaps:
        out[gap] = NO_VERSION


def write_extras(
    numbers: Mapping[Any, list[Any]],
    tokens: Mapping[str, list[_Array | None]],
    lengths: Sequence[int],
    layout: Layout,
    out: Mapping[tuple[str, str], _Array],
) -> None:
    """Write the user's numbers, and arrays, 0 where a row has none and in padding.

    Of numbers, a row that has none says NaN; in a dtype that cannot (a filler's, where all rows of
    the step have them) 0.
    """
    for key, values in numbers.items():
        none = np.nan if out[key].dtype.kind in "fc" else 0
        out[key][:] = [none if value is None else value for value in values]
    for name, arrays in tokens.items():
        flat = out["arrays", name]
        further = flat.shape[len(layout.shape) :]
        flat = flat.reshape(prod(layout.shape), *further)
        rows = [
            np.zeros((length, *further), flat.dtype) if array is None else array
            for array, length in zip(arrays, lengths, strict=True)
        ]
        layout.write(flat, rows, 0)
