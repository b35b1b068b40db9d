"""Going on with a generation that was cut off, from the tokens it had, on what is left of its budget.

- Nothing is truncated silently: the budget counts down by the tokens made, and only by those.
- Ids, logprobs and versions stay piecewise true: every segment keeps what its server said of it.
- Sampling that looks back on the completion (stop strings, penalties, grammars) cannot go on from
  a longer prompt as if nothing had happened; such a generation starts over instead.
- Knows no server, and waits for nothing: :mod:`~rollfleet_worker.pool.resuming` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from rollfleet_common.messages import Float32, Int32, LogprobsKind, VersionSpans
from rollfleet_engines.interface import Generation, Request, Timings

__all__ = ["ABORTED", "join", "rest", "resumable", "same"]

T = TypeVar("T")

#: What `finish_reason` says of a generation that was cut off by the server.
ABORTED = "abort"
_LOOKS_BACK = frozenset(
    {
        "bad_words",
        "dry_multiplier",
        "ebnf",
        "frequency_penalty",
        "grammar",
        "guided_decoding",
        "json_schema",
        "mirostat",
        "presence_penalty",
        "regex",
        "repetition_detection",
        "response_format",
        "stop",
        "stop_regex",
        "structural_tag",
        "structured_outputs",
        "thinking_token_budget",
    }
)


def resumable(extra: Mapping[str, Any]) -> bool:
    """Whether sampling with these further fields may go on from a longer prompt."""
    # vLLM counts repetitions over prompt and completion, SGLang over the completion alone.
    if any(extra.get(name, 1.0) != 1.0 for name in ("repetition_penalty", "repeat_penalty")):
        return False
    return not any(extra.get(name) for name in _LOOKS_BACK)


def rest(request: Request, segments: Sequence[Generation], size: int | None = None) -> Request:
    """What to ask for next after `segments`: `size` tokens at most, or all that are left."""
    sampling = request.sampling
    done = sum(len(piece.token_ids) for piece in segments)
    left = sampling.max_tokens - done if size is None else size
    extra = dict(sampling.extra)
    if extra.get("min_tokens"):
        extra["min_tokens"] = min(max(0, extra["min_tokens"] - done), left)
    newest = [int(piece.versions.versions[-1]) for piece in segments if len(piece.token_ids)]
    return replace(
        request,
        not_before=max([request.not_before, *newest[-1:]]),
        token_ids=np.concatenate([request.token_ids, *(piece.token_ids for piece in segments)]),
        sampling=replace(
            sampling,
            max_tokens=left,
            # The same seed again would replay the random numbers of the first segment.
            seed=None if sampling.seed is None else sampling.seed + done,
            extra=extra,
        ),
    )


def same(values: Sequence[T]) -> T | None:
    """What all `values` are; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def join(segments: Sequence[Generation], finish_reason: str) -> Generation:
    """One generation out of its segments, of which there is at least one."""
    runs: list[tuple[int, int]] = []
    for piece in segments:
        if not len(piece.token_ids):
            continue
        ends = np.append(piece.versions.starts[1:], len(piece.token_ids))
        lengths = (ends - piece.versions.starts).tolist()
        runs += zip(lengths, piece.versions.versions.tolist(), strict=True)
    token_ids: Int32 = np.concatenate([piece.token_ids for piece in segments])
    logprobs: Float32 = np.concatenate([piece.logprobs for piece in segments])
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        versions=VersionSpans.of(runs),
        finish_reason=finish_reason,
        server=segments[-1].server,
        logprobs_kind=same([piece.logprobs_kind for piece in segments]) or LogprobsKind.UNKNOWN,
        temperature=same([piece.temperature for piece in segments]),
        context_full=segments[-1].context_full,
        timings=Timings(
            sum(piece.timings.total_s for piece in segments),
            sum(piece.timings.server_s for piece in segments),
        ),
    )
