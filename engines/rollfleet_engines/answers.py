"""Turning what servers say into arrays and version spans that can be trained on, or an error.

- Ids are non-negative int32, logprobs finite, as many as tokens; nothing is padded or guessed.
- Lists become arrays in one conversion, without a Python loop over tokens.
- Spans cover exactly the tokens they speak of: no gap, no overlap, no remainder.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollfleet_common.errors import EngineProtocolError
from rollfleet_common.messages import NO_VERSION, Float32, Int32, VersionSpans

__all__ = ["logprob_array", "parse_version", "span_array", "token_array"]

_INT32_MAX = 2**31 - 1
#: vLLM writes -9999.0 for NaN and minus infinity alike: no probability of a sampled token.
_FLOOR = -9999.0


def token_array(value: Any, where: str) -> Int32:
    """int32[T] from a JSON list of token ids.

    Raises:
        EngineProtocolError: Not a list of non-negative ints within int32.
    """
    if not isinstance(value, list):
        raise EngineProtocolError(
            f"{where}: no token ids (got {type(value).__name__}); this client trains on ids and "
            f"cannot use a server that does not return them"
        )
    if not value:
        return np.zeros(0, np.int32)
    try:
        ids = np.array(value)
    except (ValueError, OverflowError) as exc:
        raise EngineProtocolError(f"{where}: token ids are no flat list ({exc})") from exc
    # Kind "i" and no cast yet: a float, a bool, a null or a 2**70 shows as another kind.
    if ids.ndim != 1 or ids.dtype.kind != "i":
        raise EngineProtocolError(f"{where}: token ids are not all integers ({ids.dtype})")
    if ids.min() < 0 or ids.max() > _INT32_MAX:
        raise EngineProtocolError(
            f"{where}: token ids from {ids.min()} to {ids.max()} are not within 0 .. 2**31 - 1"
        )
    return ids.astype(np.int32)


def logprob_array(value: Any, tokens: int, where: str) -> Float32:
    """float32[tokens] from a JSON list of log-probabilities.

    Raises:
        EngineProtocolError: Missing, another length, or not all finite numbers.
    """
    if not isinstance(value, list):
        raise EngineProtocolError(f"{where}: no logprobs (got {type(value).__name__})")
    if len(value) != tokens:
        raise EngineProtocolError(f"{where}: {tokens} tokens but {len(value)} logprobs")
    if not value:
        return np.zeros(0, np.float32)
    try:
        logprobs = np.array(value)
    except (ValueError, OverflowError) as exc:
        raise EngineProtocolError(f"{where}: logprobs are no flat list ({exc})") from exc
    if logprobs.ndim != 1 or logprobs.dtype.kind not in "fi":
        raise EngineProtocolError(f"{where}: logprobs are not all numbers ({logprobs.dtype})")
    usable = np.isfinite(logprobs) & (logprobs > _FLOOR)
    if not usable.all():
        at = int(np.argmin(usable))
        raise EngineProtocolError(
            f"{where}: the logprob of token {at} of {tokens} is {logprobs[at]}: "
            f"not finite, or the floor that stands for NaN and minus infinity"
        )
    return logprobs.astype(np.float32)


def parse_version(said: Any, where: str) -> int | None:
    """The version in a server's own tag; None where the tag says "default": never refitted.

    Raises:
        EngineProtocolError: A tag that is no version number of ours.
    """
    if isinstance(said, int) and not isinstance(said, bool) and 0 <= said <= _INT32_MAX:
        return said
    if isinstance(said, str):
        if said in ("default", ""):
            return None
        if said.isascii() and said.isdecimal() and int(said) <= _INT32_MAX:
            return int(said)
    raise EngineProtocolError(
        f"{where}: weights are tagged {said!r}, which is no version number: "
        f"tag them with the version that the trainer published"
    )


def span_array(value: Any, tokens: int, untagged: int, where: str) -> VersionSpans:
    """Versions over `tokens` tokens from spans ``{"version", "start", "end"}``.

    Tokens tagged "default" were made by the weights that the server started with, and get
    `untagged`; where later tokens carry a number, those before them are older than that.

    Raises:
        EngineProtocolError: The spans do not cover exactly ``[0, tokens)`` in order.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise EngineProtocolError(f"{where}: version spans are {type(value).__name__}, not a list")
    runs: list[tuple[int, int | None]] = []
    at = 0
    for span in value:
        start, end = (
            (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
        )
        if type(start) is not int or type(end) is not int or start != at or end <= start:
            raise EngineProtocolError(
                f"{where}: version spans must cover [0, {tokens}) in order, got {value!r:.200}"
            )
        runs.append((end - start, parse_version(span.get("version"), where)))
        at = end
    if at != tokens:
        raise EngineProtocolError(f"{where}: version spans cover {at} of {tokens} tokens")
    told = min((version for _, version in runs if version is not None), default=math.inf)
    if untagged != NO_VERSION and told <= untagged:
        untagged = max(int(told) - 1, 0)
    return VersionSpans.of([(n, untagged if v is None else v) for n, v in runs])
