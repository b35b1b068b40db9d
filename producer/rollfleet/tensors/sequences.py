"""Rollouts flattened to rows, and the user's own fields sorted by the form they take in a batch.

- A row is one training sequence; a rollout whose conversation forked gives several.
- Which form a field takes (a number, one value a token, or as it came) is decided once, for all
  rows: batches that are made of some of them agree.
- No torch: a plan of micro-batches needs nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rollfleet_common.codec import decode_samples
from rollfleet_common.messages import NO_VERSION, Header, Rollout, Sample, VersionSpans

__all__ = ["Extras", "Rows", "shorten"]

_Array = npt.NDArray[Any]
#: Kind ("components", "metrics" or "arrays") and name of a field of the user's.
Key = tuple[str, str]

_F4 = np.dtype(np.float32)


class Rows:
    """The rows of a batch, or some of them."""

    def __init__(self, rollouts: Sequence[Rollout] | Sequence[tuple[Header, bytes]] = ()) -> None:
        """All rows of `rollouts`, decoded or not.

        Raises:
            ValueError: A rollout without samples.
            CodecError, SchemaError: Bytes that are no payload of ours.
        """
        self.samples: list[Sample] = []
        self.headers: list[Header] = []
        #: Dense ids by group name.
        self.groups: dict[str, int] = {}
        self.group_ids: list[int] = []
        self.rollout_ids: list[int] = []
        for rollout in rollouts:
            if isinstance(rollout, Rollout):
                header, samples = rollout.header, rollout.samples
            else:
                header, samples = rollout[0], decode_samples(rollout[1])
            if not samples:
                raise ValueError(
                    f"rollout of group {header.group!r} #{header.index} has no samples"
                )
            group = self.groups.setdefault(header.group, len(self.groups))
            self.group_ids += [group] * len(samples)
            self.rollout_ids += [len(self.headers)] * len(samples)
            self.headers.append(header)
            self.samples += samples
        self.lengths = [len(sample.token_ids) for sample in self.samples]

    def take(self, rows: Sequence[int]) -> Self:
        """Some rows; groups and rollouts keep their ids, headers and names."""
        some = self._like([self.samples[row] for row in rows])
        some.group_ids = [self.group_ids[row] for row in rows]
        some.rollout_ids = [self.rollout_ids[row] for row in rows]
        return some

    def filler(self, token: int) -> Self:
        """One row of one token that no policy made and nothing is trained on, of no group."""
        nothing = Sample(
            token_ids=np.array([token], np.int32),
            loss_mask=np.zeros(1, np.bool_),
            logprobs=np.zeros(1, np.float32),
            versions=VersionSpans.constant(NO_VERSION),
            reward=0.0,
            finish_reason="",
        )
        row = self._like([nothing])
        row.group_ids = row.rollout_ids = [-1]
        return row

    def _like(self, samples: list[Sample]) -> Self:
        other = type(self)()
        other.headers, other.groups = self.headers, self.groups
        other.samples = samples
        other.lengths = [len(sample.token_ids) for sample in samples]
        return other

    def shortened(self, cut: Mapping[int, int]) -> Self:
        """The same rows, but of those in `cut` only so many tokens."""
        if not cut:
            return self
        some = self.take(range(len(self.samples)))
        for row, tokens in cut.items():
            some.samples[row] = shorten(some.samples[row], tokens)
            some.lengths[row] = tokens
        return some

    def name(self, row: int) -> str:
        """For messages."""
        header = self.headers[self.rollout_ids[row]]
        return f"row {row} (group {header.group!r} #{header.index})"


def shorten(sample: Sample, tokens: int) -> Sample:
    """The first `tokens` of a sample; arrays whose first axis is as long as it are cut with it."""
    length = len(sample.token_ids)
    spans = sample.versions
    kept = int(np.searchsorted(spans.starts, tokens))
    return replace(
        sample,
        token_ids=sample.token_ids[:tokens],
        loss_mask=sample.loss_mask[:tokens],
        logprobs=sample.logprobs[:tokens],
        versions=VersionSpans(spans.starts[:kept], spans.versions[:kept]),
        arrays={
            name: array[:tokens] if array.ndim and len(array) == length else array
            for name, array in sample.arrays.items()
        },
    )


class Extras:
    """The user's named numbers and arrays of every row, None where a row has none."""

    def __init__(self, rows: Rows, missing: str) -> None:
        """Sort the fields of `rows`.

        Raises:
            ValueError: Some rows have a field and others do not, unless `missing` is "fill".
        """
        samples = rows.samples
        self.numbers: dict[Key, list[Any]] = {}
        self.tokens: dict[str, list[_Array | None]] = {}
        self.lists: dict[str, list[_Array | None]] = {}
        #: Of what becomes a tensor: its dtype and its axes after the first.
        self.forms: dict[Key, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for kind, maps in (
            ("components", [sample.components for sample in samples]),
            ("metrics", [sample.metrics for sample in samples]),
        ):
            for name, values in _columns(rows, kind, maps, missing):
                self.numbers[kind, name] = values
                self.forms[kind, name] = (_F4, ())
        for name, arrays in _columns(rows, "arrays", [s.arrays for s in samples], missing):
            self._sort(name, arrays, rows.lengths)

    def _sort(self, name: str, arrays: list[Any], lengths: Sequence[int]) -> None:
        present = [(a, n) for a, n in zip(arrays, lengths, strict=True) if a is not None]
        first = present[0][0]
        if all(a.ndim == 0 for a, _ in present):
            self.numbers["arrays", name] = arrays
            dtype = np.result_type(*(a.dtype for a, _ in present))
            # Only a float can say NaN.
            if len(present) < len(arrays) and dtype.kind != "f":
                dtype = np.dtype(np.float64)
            self.forms["arrays", name] = (dtype.newbyteorder("="), ())
        elif all(
            a.ndim and len(a) == n and a.dtype == first.dtype and a.shape[1:] == first.shape[1:]
            for a, n in present
        ):
            self.tokens[name] = arrays
            self.forms["arrays", name] = (first.dtype.newbyteorder("="), first.shape[1:])
        else:
            self.lists[name] = arrays

    def take(self, rows: Sequence[int]) -> "Extras":
        """Of some rows, in the same forms; of none, what a filler has."""
        other = object.__new__(Extras)
        other.forms = self.forms
        for part in ("numbers", "tokens", "lists"):
            columns = getattr(self, part).items()
            some = {key: [column[row] for row in rows] or [None] for key, column in columns}
            setattr(other, part, some)
        return other


def _columns(
    rows: Rows, kind: str, maps: Sequence[Mapping[str, Any]], missing: str
) -> list[tuple[str, list[Any]]]:
    """(name, values of every row or None) of every name that any row has."""
    columns: list[tuple[str, list[Any]]] = []
    for name in dict.fromkeys(name for values in maps for name in values):
        column = [values.get(name) for values in maps]
        if missing != "fill" and any(value is None for value in column):
            row = next(row for row, value in enumerate(column) if value is None)
            raise ValueError(
                f"{kind}[{name!r}] is missing in {rows.name(row)} while other rows of the "
                'batch have it: give it to all, or collate with missing="fill"'
            )
        columns.append((name, column))
    return columns
