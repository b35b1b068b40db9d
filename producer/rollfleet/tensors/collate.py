"""Rollouts to tensors: a padded or a packed batch, written field by field into one block of memory.

- Straight from payload bytes: arrays of the wire are copied (and ids widened) once, by numpy, into
  their place in the batch; versions are written by runs. No Python is run per token.
- Rows are in the order of the rollouts and of their samples; :mod:`rollfleet.tensors.padded` says what
  every field of a padded batch is, :mod:`rollfleet.tensors.packed` of a packed one.
- Samples are taken to be valid: whoever reads them from Redis has called
  :func:`rollfleet_common.validate.check_samples`.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from rollfleet.tensors.layout import Layout, Packed, Padded, write_extras, write_versions
from rollfleet.tensors.memory import Field, allocate
from rollfleet.tensors.mixture import tell_mixture
from rollfleet.tensors.packed import PackedBatch
from rollfleet.tensors.padded import GroupStats, TensorBatch, group_stats
from rollfleet.tensors.sequences import Extras, Rows
from rollfleet_common.errors import OversizeError
from rollfleet_common.messages import Header, Rollout

__all__ = [
    "MAX_BYTES",
    "GroupStats",
    "PackedBatch",
    "TensorBatch",
    "check_options",
    "collate",
    "collate_rows",
    "group_stats",
]

_F4 = np.dtype(np.float32)
_I4 = np.dtype(np.int32)
_I8 = np.dtype(np.int64)
_B1 = np.dtype(np.bool_)
_IDS: dict[torch.dtype, "np.dtype[Any]"] = {torch.int64: _I8, torch.int32: _I4}
#: Fields of one value a token; ids have the dtype that was asked for.
_PADDED: dict[str, "np.dtype[Any] | None"] = {
    "input_ids": None,
    "attention_mask": _B1,
    "loss_mask": _B1,
    "logprobs": _F4,
    "versions": _I4,
}
_PACKED: dict[str, "np.dtype[Any] | None"] = {
    "input_ids": None,
    "position_ids": None,
    "row_ids": _I4,
    "loss_mask": _B1,
    "logprobs": _F4,
    "versions": _I4,
}
#: Fields of one value a row.
_ROWS: dict[str, "np.dtype[Any]"] = {
    "rewards": _F4,
    "group_ids": _I8,
    "rollout_ids": _I8,
    "lengths": _I8,
    "oldest": _I8,
}

#: Memory that one batch may take unless told otherwise.
MAX_BYTES = 32 << 30

_Array = npt.NDArray[Any]
_Rollouts = Sequence[Rollout] | Sequence[tuple[Header, bytes]]


@overload
def collate(
    rollouts: _Rollouts,
    *,
    form: Literal["padded"] = "padded",
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    missing: Literal["error", "fill"] = "error",
    max_bytes: int = MAX_BYTES,
) -> TensorBatch: ...
@overload
def collate(
    rollouts: _Rollouts,
    *,
    form: Literal["packed"],
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    missing: Literal["error", "fill"] = "error",
    max_bytes: int = MAX_BYTES,
) -> PackedBatch: ...
def collate(
    rollouts: _Rollouts,
    *,
    form: Literal["padded", "packed"] = "padded",
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    missing: Literal["error", "fill"] = "error",
    max_bytes: int = MAX_BYTES,
) -> TensorBatch | PackedBatch:
    """Rollouts as one batch, rows in the order of rollouts and of their samples.

    An array of the user counts as one value a token if, in every row that has it, its first axis
    is as long as the row, and dtype and further axes agree.

    Args:
        rollouts: Decoded, or headers with payload bytes.
        form: "padded", rows of equal width, or "packed", one behind the other without padding
            between them.
        pad_side: Where padding goes; packed, it is always behind the last row.
        pad_multiple: T is the longest row (packed: all rows), rounded up to a multiple of this.
        pad_id: What padding holds in `input_ids`.
        ids_dtype: torch.int64 or torch.int32.
        pin: In page-locked memory, for asynchronous copies; pageable without a CUDA device.
        missing: What to do when some rows have a named component, metric or array and others do
            not: refuse, or fill.
        max_bytes: Largest memory of all tensors together.

    Raises:
        OversizeError: The tensors would be over `max_bytes`.
        ValueError: No rollouts, one without samples, a key missing in a row, or a setting that
            cannot be.
        CodecError, SchemaError: Bytes that are no payload of ours.
    """
    check_options(form, pad_side, pad_multiple, ids_dtype)
    if not rollouts:
        raise ValueError("cannot collate an empty batch: there is no rollout in it")
    rows = Rows(rollouts)
    tell_mixture(rows.samples)
    options: Any = {
        "pad_side": pad_side,
        "pad_multiple": pad_multiple,
        "pad_id": pad_id,
        "ids_dtype": ids_dtype,
        "pin": pin,
        "max_bytes": max_bytes,
    }
    return collate_rows(rows, Extras(rows, missing), form, **options)


def check_options(form: str, pad_side: str, pad_multiple: int, ids_dtype: torch.dtype) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: It cannot.
    """
    if form not in ("padded", "packed") or (form == "packed" and pad_side == "left"):
        raise ValueError(
            f"form {form!r} must be padded or packed, and pad_side right if it is packed: there "
            "the only padding is behind the last row"
        )
    if pad_multiple < 1 or pad_side not in ("right", "left") or ids_dtype not in _IDS:
        raise ValueError(
            f"pad_multiple {pad_multiple} must be at least 1, pad_side {pad_side!r} right or left, "
            f"ids_dtype {ids_dtype} torch.int64 or torch.int32"
        )


def collate_rows(
    rows: Rows,
    extras: Extras,
    form: Literal["padded", "packed"],
    *,
    pad_side: Literal["right", "left"] = "right",
    pad_multiple: int = 1,
    pad_id: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    pin: bool = False,
    max_bytes: int = MAX_BYTES,
) -> TensorBatch | PackedBatch:
    """:func:`collate` of rows, and of what `extras` has of each of them."""
    packed = form == "packed"
    layout: Layout
    if packed:
        layout = Packed(rows.lengths, pad_multiple)
        fields = _PACKED
    else:
        layout = Padded(rows.lengths, pad_multiple, pad_side)
        fields = _PADDED
    count = (len(rows.samples),)
    wanted = {("", k): Field(v or _IDS[ids_dtype], layout.shape) for k, v in fields.items()}
    wanted |= {("", name): Field(dtype, count) for name, dtype in _ROWS.items()}
    if packed:
        wanted["", "cu_seqlens"] = Field(_I4, (count[0] + 1 + len(layout.gaps),))
    for key, (dtype, further) in extras.forms.items():
        whole = count if key in extras.numbers else layout.shape
        wanted[key] = Field(dtype, (*whole, *further))
    _check_size(sum(field.nbytes for field in wanted.values()), rows, layout, max_bytes)
    made = allocate(wanted, pin=pin)
    flat = {key: tensor.numpy() for key, tensor in made.items()}
    _write_tokens(rows, layout, {name: flat["", name].reshape(-1) for name in fields}, pad_id)
    _write_rows(rows, {name: flat["", name] for name in _ROWS})
    write_extras(extras.numbers, extras.tokens, rows.lengths, layout, flat)
    if packed:
        flat["", "cu_seqlens"][:] = [
            *layout.begins,
            *(gap.start for gap in layout.gaps),
            *layout.shape,
        ]
    core: dict[str, Any] = {"components": {}, "metrics": {}, "arrays": {}}
    for (part, name), tensor in made.items():
        (core[part] if part else core)[name] = tensor
    core["lists"] = extras.lists
    core["finish_reasons"] = tuple(sample.finish_reason for sample in rows.samples)
    core["logprobs_kinds"] = tuple(sample.logprobs_kind for sample in rows.samples)
    core["temperatures"] = tuple(sample.temperature for sample in rows.samples)
    core["context_full"] = tuple(sample.context_full for sample in rows.samples)
    core["headers"] = tuple(rows.headers)
    core["groups"] = tuple(rows.groups)
    if not packed:
        return TensorBatch(**core)
    tail = layout.shape[0] - sum(rows.lengths)
    return PackedBatch(**core, max_seqlen=max(*rows.lengths, tail), tail=tail)


def _check_size(nbytes: int, rows: Rows, layout: Layout, max_bytes: int) -> None:
    """Refuse what would take too much memory, before any of it is asked for.

    Raises:
        OversizeError: It would.
    """
    if nbytes <= max_bytes:
        return
    if len(layout.shape) == 2:
        longest = max(range(len(rows.lengths)), key=rows.lengths.__getitem__)
        what = (
            f"a padded batch of {layout.shape[0]:,} rows of {layout.shape[1]:,} tokens, the length "
            f"of {rows.name(longest)}, of which {sum(rows.lengths):,} tokens are no padding,"
        )
        remedy = 'collate it with form="packed", take batch.micro_batches(budget_tokens)'
    else:
        what = f"a packed batch of {layout.shape[0]:,} tokens"
        remedy = "take batch.micro_batches(budget_tokens)"
    raise OversizeError(
        f"{what} would take {nbytes:,} bytes, over the cap of {max_bytes:,} (max_batch_bytes): "
        f"{remedy}, or raise the cap"
    )


def _write_tokens(rows: Rows, layout: Layout, out: dict[str, _Array], pad_id: int) -> None:
    samples = rows.samples
    layout.write(out["input_ids"], [sample.token_ids for sample in samples], pad_id)
    layout.write(out["loss_mask"], [sample.loss_mask for sample in samples], False)
    layout.write(out["logprobs"], [sample.logprobs for sample in samples], 0.0)
    if "attention_mask" in out:
        attention = out["attention_mask"]
        attention.fill(True)
        for gap in layout.gaps:
            attention[gap] = False
    else:
        _write_positions(rows.lengths, layout, out["position_ids"], out["row_ids"])
    write_versions(out["versions"], samples, layout)


def _write_positions(
    lengths: Sequence[int], layout: Layout, positions: _Array, row_ids: _Array
) -> None:
    tails = [gap.stop - gap.start for gap in layout.gaps]
    count = np.arange(max([*lengths, *tails]), dtype=positions.dtype)
    np.concatenate([count[:length] for length in (*lengths, *tails)], out=positions)
    for row, (begin, length) in enumerate(zip(layout.begins, lengths, strict=True)):
        row_ids[begin : begin + length] = row
    for gap in layout.gaps:
        row_ids[gap] = -1


def _write_rows(rows: Rows, out: dict[str, _Array]) -> None:
    for name, values in (
        ("rewards", [sample.reward for sample in rows.samples]),
        ("group_ids", rows.group_ids),
        ("rollout_ids", rows.rollout_ids),
        ("lengths", rows.lengths),
        ("oldest", [sample.versions.oldest(sample.loss_mask) for sample in rows.samples]),
    ):
        out[name][:] = values
