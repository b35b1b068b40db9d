"""Rollouts to tensors: a padded batch, written row by row into one block of memory.

- Straight from payload bytes: arrays of the wire are copied (and ids widened) once, by numpy, into
  their place in the batch; versions are written by runs. No Python is run per token.
- Rows are in the order of the rollouts and of their samples; :mod:`rollfleet.tensors` says what
  every field is.
- Samples are taken to be valid: whoever reads them from Redis has called
  :func:`rollfleet_common.validate.check_samples`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfleet.blocks import Field, allocate
from rollfleet.tensors import GroupStats, TensorBatch, group_stats
from rollfleet_common.codec import decode_samples
from rollfleet_common.messages import NO_VERSION, Bool, Header, Int32, Rollout, Sample, VersionSpans

__all__ = ["GroupStats", "TensorBatch", "collate", "group_stats"]

_F4 = np.dtype(np.float32)
_I4 = np.dtype(np.int32)
_I8 = np.dtype(np.int64)
_B1 = np.dtype(np.bool_)
_IDS: dict[torch.dtype, "np.dtype[Any]"] = {torch.int64: _I8, torch.int32: _I4}
#: Fields of one value a token, and of one a row.
_TOKENS: dict[str, "np.dtype[Any]"] = {
    "input_ids": _I8,
    "attention_mask": _B1,
    "loss_mask": _B1,
    "logprobs": _F4,
    "versions": _I4,
}
_ROWS: dict[str, "np.dtype[Any]"] = {
    "rewards": _F4,
    "group_ids": _I8,
    "rollout_ids": _I8,
    "lengths": _I8,
    "oldest": _I8,
}

_Array = npt.NDArray[Any]


def collate(
    rollouts: Sequence[Rollout] | Sequence[tuple[Header, bytes]],
    *,
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    missing: Literal["error", "fill"] = "error",
) -> TensorBatch:
    """Rollouts as one padded batch, rows in the order of rollouts and of their samples.

    An array of the user counts as one value a token if, in every row that has it, its first axis
    is as long as the row, and dtype and further axes agree.

    Args:
        rollouts: Decoded, or headers with payload bytes.
        pad_side: Where padding goes.
        pad_multiple: T is the longest row, rounded up to a multiple of this.
        pad_id: What padding holds in `input_ids`.
        ids_dtype: torch.int64 or torch.int32.
        pin: In page-locked memory, for asynchronous copies; pageable without a CUDA device.
        missing: What to do when some rows have a named component, metric or array and others do
            not: refuse, or fill.

    Raises:
        ValueError: No rollouts, one without samples, a key missing in a row, or a setting that
            cannot be.
        CodecError, SchemaError: Bytes that are no payload of ours.
    """
    if pad_multiple < 1 or pad_side not in ("right", "left") or ids_dtype not in _IDS:
        raise ValueError(
            f"pad_multiple {pad_multiple} must be at least 1, pad_side {pad_side!r} right or left, "
            f"ids_dtype {ids_dtype} torch.int64 or torch.int32"
        )
    if not rollouts:
        raise ValueError("cannot collate an empty batch: there is no rollout in it")
    rows = _Rows(rollouts)
    longest = max(rows.lengths)
    width = -(-longest // pad_multiple) * pad_multiple
    extras = _Extras(rows, missing)
    count = len(rows.samples)
    wanted = {("", name): Field(dtype, (count, width)) for name, dtype in _TOKENS.items()}
    wanted["", "input_ids"] = Field(_IDS[ids_dtype], (count, width))
    wanted |= {("", name): Field(dtype, (count,)) for name, dtype in _ROWS.items()}
    wanted |= extras.wanted(count, width)
    made = allocate(wanted, pin=pin)
    places = _places(rows.lengths, width, pad_side)
    core = {name: tensor for (part, name), tensor in made.items() if not part}
    oldest = _write_tokens(rows, places, core, pad_id)
    _write_rows(rows, oldest, core)
    extras.write(made, places)
    named: dict[str, dict[str, Tensor]] = {"components": {}, "metrics": {}, "arrays": {}}
    for (part, name), tensor in made.items():
        if part:
            named[part][name] = tensor
    rest: dict[str, Any] = {**core, **named}
    return TensorBatch(
        **rest,
        lists=extras.lists,
        finish_reasons=tuple(sample.finish_reason for sample in rows.samples),
        headers=tuple(rows.headers),
        groups=tuple(rows.groups),
    )


class _Rows:
    """Rollouts flattened to rows."""

    def __init__(self, rollouts: Sequence[Rollout] | Sequence[tuple[Header, bytes]]) -> None:
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

    def name(self, row: int) -> str:
        """For messages."""
        header = self.headers[self.rollout_ids[row]]
        return f"row {row} (group {header.group!r} #{header.index})"


#: Where a row's tokens lie in a flat buffer, and where its padding lies.
_Place = tuple[slice, slice]


def _places(lengths: list[int], width: int, pad_side: str) -> list[_Place]:
    places: list[_Place] = []
    for row, length in enumerate(lengths):
        begin, end = row * width, (row + 1) * width
        cut = begin + length if pad_side == "right" else end - length
        left, right = slice(begin, cut), slice(cut, end)
        places.append((left, right) if pad_side == "right" else (right, left))
    return places


def _write_tokens(
    rows: _Rows, places: list[_Place], tensors: Mapping[str, Tensor], pad_id: int
) -> list[int]:
    """Write all fields of one value a token; returns each row's oldest trained version."""
    ids, attention, mask, logprobs, versions = (tensors[name].view(-1).numpy() for name in _TOKENS)
    oldest: list[int] = []
    attention.fill(True)
    for sample, (at, gap) in zip(rows.samples, places, strict=True):
        ids[at] = sample.token_ids
        mask[at] = sample.loss_mask
        logprobs[at] = sample.logprobs
        oldest.append(_write_versions(versions, at, sample.versions, sample.loss_mask))
        if gap.start < gap.stop:
            ids[gap] = pad_id
            attention[gap] = False
            mask[gap] = False
            logprobs[gap] = 0.0
            versions[gap] = NO_VERSION
    return oldest


def _write_versions(out: Int32, at: slice, spans: VersionSpans, mask: Bool) -> int:
    starts: list[int] = spans.starts.tolist()
    versions: list[int] = spans.versions.tolist()
    begin = at.start
    ends = [begin + start for start in starts[1:]]
    for end, version in zip([*ends, at.stop], versions, strict=True):
        out[begin:end] = version
        begin = end
    # A prompt and one policy, the usual sample, needs no look at which spans are trained.
    if len(versions) == 1 or (len(versions) == 2 and versions[0] == NO_VERSION):
        made = mask[starts[-1] :]
        return versions[-1] if made[made.argmax()] else NO_VERSION
    return spans.oldest(mask)


def _write_rows(rows: _Rows, oldest: list[int], tensors: Mapping[str, Tensor]) -> None:
    for name, values in (
        ("rewards", [sample.reward for sample in rows.samples]),
        ("group_ids", rows.group_ids),
        ("rollout_ids", rows.rollout_ids),
        ("lengths", rows.lengths),
        ("oldest", oldest),
    ):
        tensors[name].numpy()[:] = values


class _Extras:
    """The user's named numbers and arrays, sorted by the form they take in a batch."""

    def __init__(self, rows: _Rows, missing: str) -> None:
        samples = rows.samples
        #: Values of every row, None where it has none, by (kind, name).
        self.numbers: dict[tuple[str, str], list[Any]] = {}
        self.tokens: dict[str, list[_Array | None]] = {}
        self.lists: dict[str, list[_Array | None]] = {}
        for kind, maps in (
            ("components", [sample.components for sample in samples]),
            ("metrics", [sample.metrics for sample in samples]),
        ):
            for name, values in _columns(rows, kind, maps, missing):
                self.numbers[kind, name] = values
        for name, arrays in _columns(rows, "arrays", [s.arrays for s in samples], missing):
            present = [(a, n) for a, n in zip(arrays, rows.lengths, strict=True) if a is not None]
            first = present[0][0]
            if all(a.ndim == 0 for a, _ in present):
                self.numbers["arrays", name] = arrays
            elif all(
                a.ndim and len(a) == n and a.dtype == first.dtype and a.shape[1:] == first.shape[1:]
                for a, n in present
            ):
                self.tokens[name] = arrays
            else:
                self.lists[name] = arrays

    def wanted(self, count: int, width: int) -> dict[tuple[str, str], Field]:
        """Dtype and shape of what becomes a tensor."""
        wanted = {key: Field(_number_dtype(*key, v), (count,)) for key, v in self.numbers.items()}
        for name, arrays in self.tokens.items():
            first = next(array for array in arrays if array is not None)
            dtype = first.dtype.newbyteorder("=")
            wanted["arrays", name] = Field(dtype, (count, width, *first.shape[1:]))
        return wanted

    def write(self, made: Mapping[tuple[str, str], Tensor], places: list[_Place]) -> None:
        for key, values in self.numbers.items():
            made[key].numpy()[:] = [np.nan if value is None else value for value in values]
        for name, arrays in self.tokens.items():
            out = made["arrays", name].flatten(0, 1).numpy()
            for array, (at, gap) in zip(arrays, places, strict=True):
                out[at] = 0 if array is None else array
                out[gap] = 0


def _columns(
    rows: _Rows, kind: str, maps: Sequence[Mapping[str, Any]], missing: str
) -> list[tuple[str, list[Any]]]:
    """(name, values of every row or None) of every name that any row has."""
    columns: list[tuple[str, list[Any]]] = []
    for name in dict.fromkeys(name for values in maps for name in values):
        column = [values.get(name) for values in maps]
        if missing != "fill":
            for row, value in enumerate(column):
                if value is None:
                    raise ValueError(
                        f"{kind}[{name!r}] is missing in {rows.name(row)} while other rows of the "
                        'batch have it: give it to all, or collate with missing="fill"'
                    )
        columns.append((name, column))
    return columns


def _number_dtype(kind: str, _name: str, values: list[Any]) -> "np.dtype[Any]":
    if kind != "arrays":
        return _F4
    dtype = np.result_type(*(value.dtype for value in values if value is not None))
    gaps = any(value is None for value in values)
    # Only a float can say NaN.
    return np.dtype(np.float64) if gaps and dtype.kind != "f" else dtype.newbyteorder("=")
