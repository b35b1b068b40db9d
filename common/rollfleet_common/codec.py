"""Messages to bytes and back: msgpack, arrays as raw little-endian bytes, never pickle.

- The wire is written down field by field in docs/wire.md and held by golden bytes in the tests.
- The first element of every message is its schema version; an unknown one is a
  :class:`SchemaError`, anything else unreadable a :class:`CodecError`. No bytes do more than that:
  msgpack bounds every length by the bytes it was given, and no message can name code.
- Masks and versions are run-length encoded: a single-turn sample costs 8 bytes a token
  (id + log-probability) and about a hundred bytes besides.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgpack
import numpy as np
import numpy.typing as npt

from rollfleet_common import schemas
from rollfleet_common.errors import CodecError, InvalidPromptError, OversizeError, SchemaError
from rollfleet_common.messages import Bool, Header, Int32, Kind, Prompt, Sample, VersionSpans
from rollfleet_common.scan import unpack, unpack_usual

__all__ = [
    "ARRAY_DTYPES",
    "MAX_DIMS",
    "decode_header",
    "decode_prompt",
    "decode_samples",
    "encode_header",
    "encode_prompt",
    "encode_samples",
]

_PROMPT_TYPES = (str, int, bytes, dict, str, str, str, int, dict, int)
_HEADER_TYPES = (
    *(str, int, int, int, str, str, str, int, str, str, int, int, int, int, int, int, int),
    *(float, str, str, int, int, int),
)
#: dtypes that named extra arrays may have, as numpy spells them.
ARRAY_DTYPES = frozenset(
    ["|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8"]
)
#: Axes that a named extra array may have.
MAX_DIMS = 8

_I4 = np.dtype("<i4")
_F4 = np.dtype("<f4")

#: A prompt and its completion, the usual mask, is a window on the one edge that all such masks have.
_REACH = 1 << 20
_TWO_RUNS = struct.Struct("<2i").unpack
_EDGE: Bool = np.zeros(2 * _REACH, np.bool_)
_EDGE[_REACH:] = True
_EDGE.flags.writeable = False


def encode_prompt(prompt: Prompt, max_bytes: int) -> bytes:
    """The part of a prompt that all members of its group share.

    Raises:
        InvalidPromptError: A field cannot be encoded; the message names it.
        OversizeError: The result is over `max_bytes`; the message names the largest field.
    """
    fields = {
        "group": prompt.group,
        "n": prompt.n,
        "token_ids": np.ascontiguousarray(prompt.token_ids, _I4).tobytes(),
        "data": prompt.data,
        "kind": prompt.kind.value,
        "route": prompt.route,
        "task": prompt.task,
        "position": prompt.position,
        "sampling": prompt.sampling,
        "deadline_ms": prompt.deadline_ms,
    }
    try:
        packed = cast(bytes, msgpack.packb([schemas.PROMPT, *fields.values()]))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidPromptError(
            f"prompt of group {prompt.group!r}: {_culprit(fields)}: {exc}; prompts carry only what "
            "msgpack knows: None, bool, int, float, str, bytes, lists and maps of these"
        ) from exc
    if len(packed) > max_bytes:
        name, size = max(
            ((k, len(cast(bytes, msgpack.packb(v)))) for k, v in fields.items()), key=lambda x: x[1]
        )
        raise OversizeError(
            f"prompt of group {prompt.group!r} is {len(packed):,} bytes, over the cap of "
            f"{max_bytes:,} (max_prompt_bytes); its largest field is {name!r} with {size:,} bytes: "
            "send a reference instead of the content"
        )
    return packed


def _culprit(fields: Mapping[str, Any]) -> str:
    """Name the field (and, in data and sampling, the key) that msgpack refuses."""
    for name, value in fields.items():
        for key, part in value.items() if isinstance(value, Mapping) else ((None, value),):
            try:
                msgpack.packb({key: part})
            except (TypeError, ValueError, OverflowError, RecursionError):
                where = name if key is None else f"{name}[{key!r}]"
                return f"field {where} ({type(part).__name__}) cannot be encoded"
    return "it cannot be encoded"


def decode_prompt(packed: bytes) -> Prompt:
    """The inverse of :func:`encode_prompt`.

    Raises:
        SchemaError: It is of another wire version.
        CodecError: It is no prompt of ours.
    """
    f = _fields(packed, "prompt", schemas.PROMPT, _PROMPT_TYPES)
    try:
        return Prompt(
            group=f[0],
            n=f[1],
            token_ids=_array(f[2], _I4, "token_ids"),
            data=f[3],
            kind=Kind(f[4]),
            route=f[5],
            task=f[6],
            position=f[7],
            sampling=f[8],
            deadline_ms=f[9],
        )
    except ValueError as exc:
        raise CodecError(f"prompt of group {f[0]!r}: {exc}") from exc


def encode_header(header: Header) -> bytes:
    """A rollout's header: a few hundred bytes."""
    h = header
    return cast(
        bytes,
        msgpack.packb(
            (
                *(schemas.HEADER, h.group, h.index, h.n, h.attempt, h.kind.value, h.route),
                h.task,
                *(h.position, h.entry, h.payload, h.payload_bytes, h.epoch, h.min_version),
                *(h.max_version, h.samples, h.tokens, h.trained_tokens, float(h.reward)),
                *(h.worker, h.server, h.queue_ms, h.generate_ms, h.reward_ms),
            )
        ),
    )


def decode_header(packed: bytes) -> Header:
    """The inverse of :func:`encode_header`.

    Raises:
        SchemaError: It is of another wire version.
        CodecError: It is no header of ours.
    """
    f = _fields(packed, "header", schemas.HEADER, _HEADER_TYPES)
    try:
        f[4] = Kind(f[4])
        return Header(*f)
    except ValueError as exc:
        raise CodecError(f"header of group {f[0]!r}: {exc}") from exc


def encode_samples(samples: Sequence[Sample]) -> bytes:
    """The payload of a rollout: its training sequences."""
    return cast(
        bytes, msgpack.packb([schemas.PAYLOAD, [_pack_sample(sample) for sample in samples]])
    )


def _pack_sample(s: Sample) -> dict[str, Any]:
    # Buffers, not bytes: of a large array every copy costs more than all the rest.
    packed: dict[str, Any] = {
        "ids": np.ascontiguousarray(s.token_ids, _I4).data,
        "lp": np.ascontiguousarray(s.logprobs, _F4).data,
        "mask": mask_runs(s.loss_mask).tobytes(),
        "vs": np.ascontiguousarray(s.versions.starts, _I4).tobytes(),
        "vv": np.ascontiguousarray(s.versions.versions, _I4).tobytes(),
        "r": float(s.reward),
        "f": s.finish_reason,
    }
    if s.components:
        packed["c"] = {str(k): float(v) for k, v in s.components.items()}
    if s.metrics:
        packed["m"] = {str(k): float(v) for k, v in s.metrics.items()}
    if s.arrays:
        packed["a"] = {str(k): _pack_array(v) for k, v in s.arrays.items()}
    return packed


def _pack_array(array: npt.NDArray[Any]) -> list[Any]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return [little.dtype.str, list(array.shape), little.data]


def mask_runs(mask: Bool) -> Int32:
    """Lengths of the runs of a mask, the first run being of False (and possibly empty)."""
    if not len(mask):
        return np.zeros(0, _I4)
    # By hand: numpy's diff and append cost four times as much.
    (edges,) = (mask[1:] != mask[:-1]).nonzero()
    first = int(mask[0])
    bounds = np.empty(len(edges) + 2 + first, _I4)
    bounds[: 1 + first] = 0
    bounds[1 + first : -1] = edges
    bounds[1 + first : -1] += 1
    bounds[-1] = len(mask)
    return bounds[1:] - bounds[:-1]


def expand_mask(runs: Sequence[int]) -> Bool:
    """The inverse of :func:`mask_runs`: bool[sum of runs], read-only."""
    mask = np.zeros(sum(runs), np.bool_)
    end = 0
    for k, run in enumerate(runs):
        if k & 1:
            mask[end : end + run] = True
        end += run
    mask.flags.writeable = False
    return mask


def decode_samples(packed: bytes) -> tuple[Sample, ...]:
    """The inverse of :func:`encode_samples`.

    Arrays are read-only, and large ones are views into `packed`, at any alignment: whoever keeps one
    keeps all of it.

    Raises:
        SchemaError: It is of another wire version.
        CodecError: It is no payload of ours.
    """
    usual = unpack_usual(packed)
    if usual is not None:
        return (_unpack_sample(usual, 0),)
    (samples,) = _fields(packed, "payload", schemas.PAYLOAD, (list,), unpack)
    return tuple(_unpack_sample(sample, i) for i, sample in enumerate(samples))


def _unpack_sample(raw: Any, i: int) -> Sample:
    try:
        ids = _array(raw["ids"], _I4, "ids")
        return Sample(
            ids,
            _mask(raw["mask"], len(ids)),
            _array(raw["lp"], _F4, "lp"),
            VersionSpans(_array(raw["vs"], _I4, "vs"), _array(raw["vv"], _I4, "vv")),
            float(raw["r"]),
            _numbers(raw["c"], "c") if "c" in raw else {},
            {str(k): _unpack_array(v, k) for k, v in raw["a"].items()} if "a" in raw else {},
            _numbers(raw["m"], "m") if "m" in raw else {},
            str(raw["f"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, CodecError) as exc:
        raise CodecError(f"payload, sample {i}: {type(exc).__name__}: {exc}") from exc


def _mask(raw: Any, tokens: int) -> Bool:
    # The usual one, a prompt and its completion, is most of what there is to decode.
    if type(raw) is bytes and len(raw) == 8:
        prompt, completion = _TWO_RUNS(raw)
        if prompt >= 0 <= completion and prompt + completion == tokens <= _REACH:
            return _EDGE[_REACH - prompt : _REACH + completion]
    # The sum is taken in Python's integers, and before anything is allocated from it.
    runs: list[int] = _array(raw, _I4, "mask").tolist()
    if sum(runs) != tokens or min(runs, default=0) < 0:
        raise CodecError(f"mask runs {runs[:8]} do not add up to {tokens} tokens")
    return expand_mask(runs)


def _numbers(raw: Any, what: str) -> dict[str, float]:
    if not isinstance(raw, dict):
        raise CodecError(f"{what} is a {type(raw).__name__}, not a map of numbers")
    return {str(k): float(v) for k, v in raw.items()}


def _unpack_array(raw: Any, name: Any) -> npt.NDArray[Any]:
    dtype, shape, data = raw
    if dtype not in ARRAY_DTYPES:
        raise CodecError(f"array {name!r} has dtype {dtype!r}, not one of {sorted(ARRAY_DTYPES)}")
    if len(shape) > MAX_DIMS:
        raise CodecError(f"array {name!r} has {len(shape)} dimensions, more than {MAX_DIMS}")
    return _array(data, np.dtype(dtype), f"array {name!r}").reshape([int(n) for n in shape])


def _array(data: Any, dtype: "np.dtype[Any]", what: str) -> npt.NDArray[Any]:
    try:
        return np.frombuffer(data, dtype)
    except (TypeError, ValueError, AttributeError) as exc:
        if not isinstance(data, bytes | memoryview):
            raise CodecError(f"{what} is a {type(data).__name__}, not bytes") from exc
        raise CodecError(f"{what} has {len(data)} bytes, no multiple of {dtype.itemsize}") from exc


def _plain(packed: bytes) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)


def _fields(
    packed: bytes,
    what: str,
    schema: int,
    types: tuple[type, ...],
    read: Callable[[bytes], Any] = _plain,
) -> list[Any]:
    """The fields of a message after its schema version, their number and types checked."""
    try:
        raw = read(packed)
    except Exception as exc:
        raise CodecError(f"{what} of {len(packed)} bytes is not msgpack: {exc}") from exc
    if type(raw) is not list or not raw or type(raw[0]) is not int:
        raise CodecError(f"{what} of {len(packed)} bytes is no message of rollfleet")
    if raw[0] != schema:
        raise SchemaError(
            f"{what} is of wire version {raw[0]}, this release speaks {schema}: "
            "run one release of rollfleet on both sides"
        )
    del raw[0]
    if len(raw) != len(types):
        raise CodecError(f"{what} has {len(raw)} fields, not {len(types)}")
    for at, (value, kind) in enumerate(zip(raw, types, strict=True)):
        if type(value) is not kind:
            if kind is float and type(value) is int:
                raw[at] = float(value)
                continue
            raise CodecError(f"{what}, field {at}: a {type(value).__name__}, not a {kind.__name__}")
    return raw
