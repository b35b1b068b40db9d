"""Messages to bytes and back: msgpack, arrays as raw little-endian bytes, never pickle.

- The wire is written down field by field in docs/wire.md and held by golden bytes in the tests.
- The first element of every message is its schema version; an unknown one is a
  :class:`SchemaError`, anything else unreadable a :class:`CodecError`. No bytes do more than that:
  msgpack bounds every length by the bytes it was given, and no message can name code.
- Masks and versions are run-length encoded: a single-turn sample costs 8 bytes a token
  (id + log-probability) and about a hundred bytes besides.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgpack
import numpy as np
import numpy.typing as npt

from rollfleet_common import schemas
from rollfleet_common.errors import (
    CodecError,
    InvalidPromptError,
    OversizeError,
    SchemaError,
    WireError,
)
from rollfleet_common.limits import Limits
from rollfleet_common.messages import (
    Bool,
    Header,
    Int32,
    Kind,
    LogprobsKind,
    Prompt,
    Sample,
    VersionSpans,
)
from rollfleet_common.scan import unpack, unpack_usual

__all__ = [
    "ARRAY_DTYPES",
    "MAX_DIMS",
    "MAX_FLOAT",
    "decode_header",
    "decode_prompt",
    "decode_samples",
    "encode_header",
    "encode_prompt",
    "encode_samples",
    "shape_fault",
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
#: The largest number that is finite in float32, which batches are made of.
MAX_FLOAT = float(np.finfo(np.float32).max)
#: Values that an array without any may have along its axes, were the empty ones of length 1.
_MAX_EMPTY = 1 << 20
#: Spans, runs or names that the part of a usual payload besides its two large arrays has room for.
_REST_PARTS = 512
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

#: Values of "lk"; a reader takes others for unknown.
_KINDS = frozenset(LogprobsKind)

_I4 = np.dtype("<i4")
_F4 = np.dtype("<f4")

#: A prompt and its completion, the usual mask, is a window on the one edge that all such masks have.
_REACH = 1 << 20
_TWO_RUNS = struct.Struct("<2i").unpack
_EDGE: Bool = np.zeros(2 * _REACH, np.bool_)
_EDGE[_REACH:] = True
_EDGE.flags.writeable = False


_SCALARS = frozenset([type(None), bool, int, float, str, bytes])
_STR = frozenset([str])
#: What writing and reading back raise where a value is none of msgpack's.
_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgpack.UnpackException)


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
        # Some of what msgpack writes it does not read, such as a map whose key is a list.
        if not _usual(prompt):
            decode_prompt(packed)
        elif not _SCALARS.issuperset(map(type, (*prompt.data.values(), *prompt.sampling.values()))):
            _plain(packed)
    except (*_UNENCODABLE, WireError) as exc:
        raise InvalidPromptError(
            f"prompt of group {prompt.group!r}: {_culprit(fields)}{exc}; prompts carry only what "
            "msgpack reads: None, bool, int, float, str, bytes, lists, and maps whose keys are no "
            "lists or maps"
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
                _plain(cast(bytes, msgpack.packb({key: part})))
            except _UNENCODABLE:
                where = name if key is None else f"{name}[{key!r}]"
                return f"field {where} ({type(part).__name__}) cannot be encoded: "
    return ""


def decode_prompt(packed: bytes) -> Prompt:
    """The inverse of :func:`encode_prompt`.

    Raises:
        SchemaError: It is of another wire version.
        CodecError: It is no prompt of ours.
    """
    f = _fields(packed, "prompt", schemas.PROMPT, _PROMPT_TYPES)
    if fault := _prompt_fault(f):
        raise CodecError(f"prompt of group {f[0]!r}: {fault}")
    ids = _array(f[2], _I4, "token_ids")
    if fault := _ids_fault(ids):
        raise CodecError(f"prompt of group {f[0]!r}: {fault}")
    try:
        return Prompt(
            group=f[0],
            n=f[1],
            token_ids=ids,
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


def _usual(p: Prompt) -> bool:
    """Whether the fields of a prompt are read as they were written, if what is nested in them is."""
    return (
        type(p.data) is type(p.sampling) is dict
        and _STR.issuperset(map(type, (p.group, p.route, p.task, *p.data, *p.sampling)))
        and type(p.n) is type(p.position) is type(p.deadline_ms) is int
        and 1 <= p.n <= _INT32_MAX
        and -1 <= p.position <= _INT64_MAX
        and 0 <= p.deadline_ms <= _INT64_MAX
        and not _ids_fault(p.token_ids)
    )


def _prompt_fault(f: Sequence[Any]) -> str:
    """What is out of range among the fields of a prompt, or ""."""
    for name, value, least, most in (
        ("n", f[1], 1, _INT32_MAX),
        ("position", f[7], -1, _INT64_MAX),
        ("deadline_ms", f[9], 0, _INT64_MAX),
    ):
        if not least <= value <= most:
            return f"{name} is {value}, not from {least} to {most}"
    for name, fields in (("data", f[3]), ("sampling", f[8])):
        for key in fields:
            if type(key) is not str:
                return f"{name} has the key {key!r}, no text"
    return ""


def _ids_fault(ids: Int32) -> str:
    if len(ids) and ids[ids.argmin()] < 0:
        return f"token_ids holds {ids.min()}; ids are not negative"
    return ""


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
        header = Header(*f)
    except ValueError as exc:
        raise CodecError(f"header of group {f[0]!r}: {exc}") from exc
    if fault := _header_fault(header):
        raise CodecError(f"header of group {header.group!r} #{header.index}: {fault}")
    return header


def _header_fault(h: Header) -> str:
    """What is out of range in a header, or "": nothing that no payload could bear out."""
    if (
        0 <= h.index < h.n <= _INT32_MAX
        and 1 <= h.attempt <= _INT32_MAX
        and -1 <= h.position <= _INT64_MAX
        and 0 <= h.payload_bytes <= _INT64_MAX
        and 0 <= h.epoch <= _INT64_MAX
        and -1 <= h.min_version <= _INT32_MAX
        and -1 <= h.max_version <= _INT32_MAX
        and 1 <= h.samples <= h.tokens <= _INT32_MAX
        and 0 <= h.trained_tokens <= h.tokens
        and -MAX_FLOAT <= h.reward <= MAX_FLOAT  # NaN is in no range
        and 0 <= h.queue_ms <= _INT64_MAX
        and 0 <= h.generate_ms <= _INT64_MAX
        and 0 <= h.reward_ms <= _INT64_MAX
    ):
        return ""
    for name, least, most in (
        ("index", 0, h.n - 1),
        ("n", 1, _INT32_MAX),
        ("attempt", 1, _INT32_MAX),
        ("position", -1, _INT64_MAX),
        ("payload_bytes", 0, _INT64_MAX),
        ("epoch", 0, _INT64_MAX),
        ("min_version", -1, _INT32_MAX),
        ("max_version", -1, _INT32_MAX),
        ("tokens", 1, _INT32_MAX),
        ("samples", 1, h.tokens),
        ("trained_tokens", 0, h.tokens),
        ("queue_ms", 0, _INT64_MAX),
        ("generate_ms", 0, _INT64_MAX),
        ("reward_ms", 0, _INT64_MAX),
    ):
        value = getattr(h, name)
        if not least <= value <= most:
            return f"{name} is {value}, not from {least} to {most}"
    return f"reward is {h.reward!r}, no number that float32 holds"


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
    if s.logprobs_kind != LogprobsKind.UNKNOWN:
        packed["lk"] = str(s.logprobs_kind)
    if s.temperature is not None:
        packed["t"] = float(s.temperature)
    if s.context_full:
        packed["cx"] = True
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


def decode_samples(packed: bytes, limits: Limits | None = None) -> tuple[Sample, ...]:
    """The inverse of :func:`encode_samples`.

    Arrays are read-only, and large ones are views into `packed`, at any alignment: whoever keeps one
    keeps all of it.

    Args:
        packed: The payload.
        limits: Caps on what it holds, checked before anything is made of it; None: there are none.

    Raises:
        SchemaError: It is of another wire version.
        CodecError: It is no payload of ours.
        OversizeError: It is over a cap.
    """
    usual = unpack_usual(packed)
    if usual is not None:
        if limits is not None and (
            len(usual["ids"]) > 4 * limits.tokens or min(limits.spans, limits.names) < _REST_PARTS
        ):
            _check_limits((usual,), limits)
        return (_unpack_sample(usual, 0),)
    (samples,) = _fields(packed, "payload", schemas.PAYLOAD, (list,), unpack)
    if limits is not None:
        _check_limits(samples, limits)
    return tuple(_unpack_sample(sample, i) for i, sample in enumerate(samples))


def _check_limits(samples: Sequence[Any], limits: Limits) -> None:
    """Hold the sizes in a payload that was read, and not decoded, against `limits`."""
    limits.check(samples=len(samples))
    spans = 0
    for raw in samples:
        try:
            tokens = len(raw["ids"]) // 4
            spans += (max(len(raw["vs"]), len(raw["vv"])) + len(raw["mask"])) // 4
            names = sum(len(raw[part]) for part in ("c", "m", "a") if part in raw)
        except (KeyError, TypeError):
            return  # decoding says what is wrong, and comes to nothing large first
        if tokens > limits.tokens or spans > limits.spans or names > limits.names:
            limits.check(tokens=tokens, spans=spans, names=names)


def _unpack_sample(raw: Any, i: int) -> Sample:
    try:
        ids = _array(raw["ids"], _I4, "ids")
        return Sample(
            ids,
            _mask(raw["mask"], len(ids)),
            _array(raw["lp"], _F4, "lp"),
            VersionSpans(_array(raw["vs"], _I4, "vs"), _array(raw["vv"], _I4, "vv")),
            reward if type(reward := raw["r"]) is float else _number(reward, "r"),
            _numbers(raw["c"], "c") if "c" in raw else {},
            {_text(k, "a"): _unpack_array(v, k) for k, v in raw["a"].items()} if "a" in raw else {},
            _numbers(raw["m"], "m") if "m" in raw else {},
            reason if type(reason := raw["f"]) is str else _text(reason, "f"),
            raw["lk"] if raw.get("lk") in _KINDS else LogprobsKind.UNKNOWN,
            _temperature(raw["t"]) if "t" in raw else None,
            raw.get("cx") is True,
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


def _temperature(raw: Any) -> float:
    value = _number(raw, "t")
    if not 0.0 <= value < math.inf:
        raise CodecError(f"temperature is {value}, not a finite number of at least 0")
    return value


def _numbers(raw: Any, what: str) -> dict[str, float]:
    if type(raw) is not dict:
        raise CodecError(f"{what} is a {type(raw).__name__}, not a map of numbers")
    return {_text(k, what): _number(v, what) for k, v in raw.items()}


def _number(raw: Any, what: str) -> float:
    # Types are exact: float() would take text, too.
    if type(raw) is float:
        return raw
    if type(raw) is not int:
        raise CodecError(f"{what} holds a {type(raw).__name__}, not a number")
    return float(raw)


def _text(raw: Any, what: str) -> str:
    if type(raw) is not str:
        raise CodecError(f"{what} holds a {type(raw).__name__}, not text")
    return raw


def _unpack_array(raw: Any, name: Any) -> npt.NDArray[Any]:
    dtype, shape, data = raw
    if dtype not in ARRAY_DTYPES:
        raise CodecError(f"array {name!r} has dtype {dtype!r}, not one of {sorted(ARRAY_DTYPES)}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise CodecError(f"array {name!r} has shape {shape!r:.80}, not a list of lengths")
    if fault := shape_fault(shape):
        raise CodecError(f"array {name!r} {fault}")
    return _array(data, np.dtype(dtype), f"array {name!r}").reshape(shape)


def shape_fault(shape: Sequence[int]) -> str:
    """What is wrong with the shape of a named array, or ""."""
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dimensions, more than {MAX_DIMS}"
    # Of an array with values, its bytes bound the shape; of one without, nothing else does.
    if 0 in shape and math.prod(n or 1 for n in shape) > _MAX_EMPTY:
        return f"has shape {list(shape)}, and no values"
    return ""


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
