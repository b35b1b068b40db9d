"""What a parked generation looks like in Redis: msgpack, arrays as raw little-endian bytes.

- Bytes from Redis are never trusted: what could not have been made by :func:`encode_partial` is a
  :class:`CodecError`, and so nothing of it reaches a sample.
- 8 bytes a token, and about 70 besides.
"""

from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import pairwise
from json import dumps
from typing import Any, cast

import msgpack
import numpy as np

from rollfleet_common.errors import CodecError, SchemaError
from rollfleet_common.messages import NO_VERSION, LogprobsKind, VersionSpans
from rollfleet_common.validate import AMBIGUOUS_LOGPROB, LOGPROB_SLACK
from rollfleet_engines.interface import Generation, Request, Sampling
from rollfleet_engines.resume import ABORTED

__all__ = ["PARTIAL_SCHEMA", "Partial", "decode_partial", "encode_partial", "request_digest"]

#: Version of this layout; another one is no progress of ours.
PARTIAL_SCHEMA = 2

_TYPES = (int, bytes, int, str, bytes, bytes, bytes, bytes, str, str, bool)
_REASONS = frozenset({"stop", "length", "repetition", ABORTED})
_I4 = np.dtype("<i4")
_F4 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Partial:
    """What is done of one call."""

    #: Of what was asked for; see :func:`request_digest`.
    digest: bytes
    #: Of the versions below.
    epoch: int
    #: Its `finish_reason` is ABORTED while more is to come.
    generation: Generation


def request_digest(request: Request, fresh: int) -> bytes | None:
    """16 bytes by which the same call is known again; None: it cannot be told from others.

    Args:
        request: Whose prompt and sampling count; versions and affinity do not.
        fresh: Tries that must not go on from one another differ in it.
    """
    sampling: dict[str, Any] = {
        one.name: getattr(request.sampling, one.name) for one in fields(Sampling)
    }
    sampling["extra"] = dict(request.sampling.extra)
    try:
        words = dumps([PARTIAL_SCHEMA, fresh, sampling], sort_keys=True).encode()
    except (TypeError, ValueError):
        return None
    ids = np.ascontiguousarray(request.token_ids, _I4)
    return blake2b(words + b"\0" + ids.tobytes(), digest_size=16).digest()


def encode_partial(parked: Partial) -> bytes:
    """The inverse of :func:`decode_partial`."""
    made = parked.generation
    return cast(
        bytes,
        msgpack.packb(
            [
                PARTIAL_SCHEMA,
                parked.digest,
                parked.epoch,
                made.finish_reason,
                np.ascontiguousarray(made.token_ids, _I4).tobytes(),
                np.ascontiguousarray(made.logprobs, _F4).tobytes(),
                np.ascontiguousarray(made.versions.starts, _I4).tobytes(),
                np.ascontiguousarray(made.versions.versions, _I4).tobytes(),
                made.server,
                str(made.logprobs_kind),
                made.context_full,
            ]
        ),
    )


def decode_partial(packed: bytes) -> Partial:
    """What a worker parked.

    Raises:
        SchemaError: It is of another layout.
        CodecError: It is nothing that a worker parks.
    """
    try:
        raw = msgpack.unpackb(packed)
    except Exception as exc:
        raise CodecError(f"parked bytes ({len(packed)}) are not msgpack: {exc}") from exc
    if not isinstance(raw, list) or not raw or type(raw[0]) is not int:
        raise CodecError(f"parked bytes ({len(packed)}) are no message of rollfleet")
    if raw[0] != PARTIAL_SCHEMA:
        raise SchemaError(f"parked in layout {raw[0]}, this release knows {PARTIAL_SCHEMA}")
    if tuple(map(type, raw)) != _TYPES:
        raise CodecError(f"parked fields are {[type(one).__name__ for one in raw]}")
    _, digest, epoch, reason, ids, logprobs, starts, versions, server, kind, full = raw
    if reason not in _REASONS:
        raise CodecError(f"parked generation ended by {reason!r}")
    if kind not in frozenset(LogprobsKind):
        raise CodecError(f"parked log-probabilities are {kind!r}")
    try:
        made = Generation(
            np.frombuffer(ids, _I4).astype(np.int32),
            np.frombuffer(logprobs, _F4).astype(np.float32),
            VersionSpans(
                np.frombuffer(starts, _I4).astype(np.int32),
                np.frombuffer(versions, _I4).astype(np.int32),
            ),
            reason,
            server,
            logprobs_kind=kind,
            context_full=full,
        )
    except ValueError as exc:
        raise CodecError(f"parked arrays are cut short: {exc}") from exc
    if wrong := _fault(made):
        raise CodecError(f"parked generation: {wrong}")
    return Partial(digest, epoch, made)


def _fault(made: Generation) -> str:
    """What is wrong with the arrays of a generation, or ""."""
    ids, logprobs, spans = made.token_ids, made.logprobs, made.versions
    starts: list[int] = spans.starts.tolist()
    if not len(ids) or len(ids) != len(logprobs):
        return f"{len(ids)} tokens, {len(logprobs)} logprobs"
    if ids.min() < 0:
        return "a negative token id"
    # NaN fails both comparisons.
    if not (logprobs.min() > AMBIGUOUS_LOGPROB and logprobs.max() <= LOGPROB_SLACK):
        return "a logprob that is none"
    if not starts or len(starts) != len(spans.versions) or starts[0] != 0:
        return f"version spans begin at {starts[:8]}, for {len(spans.versions)} versions"
    if starts[-1] >= len(ids) or any(a >= b for a, b in pairwise(starts)):
        return f"version spans begin at {starts[:8]}, in {len(ids)} tokens"
    if spans.versions.min() < NO_VERSION:
        return f"version {spans.versions.min()}"
    return ""
