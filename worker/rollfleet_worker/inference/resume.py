"""Going on with a generation that was cut off, from the tokens it had, on what is left of its budget.

- Nothing is truncated silently: the budget counts down by the tokens made, and only by those;
  whoever gives up raises.
- Ids, logprobs and versions stay piecewise true: every segment keeps what its server said of it.
- Sampling that looks back on the completion (stop strings, penalties, grammars) cannot go on from
  a longer prompt as if nothing had happened; such a generation starts over instead.
- Knows no server: any client, or a pool of them, may be what continues.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rollfleet_common.errors import EngineUnavailableError
from rollfleet_common.messages import Float32, Int32, VersionSpans
from rollfleet_worker.inference.engine import Generation, Request

__all__ = ["ABORTED", "continue_generation", "resumable"]

#: What `finish_reason` says of a generation that was cut off by the server.
ABORTED = "abort"
_LOOKS_BACK = frozenset(
    {
        "bad_words",
        "frequency_penalty",
        "guided_decoding",
        "presence_penalty",
        "repetition_detection",
        "response_format",
        "stop",
        "structured_outputs",
        "thinking_token_budget",
    }
)
_PAUSE_S = 0.05
_PAUSE_MAX_S = 2.0


def resumable(extra: Mapping[str, Any]) -> bool:
    """Whether sampling with these further fields may go on from a longer prompt."""
    return not any(extra.get(name) for name in _LOOKS_BACK)


async def continue_generation(
    request: Request,
    first: Generation,
    ask: Callable[[Request, int], Awaitable[Generation]],
    *,
    max_resumes: int,
) -> Generation:
    """One whole completion of `request`, of which `first` is what came before it was cut off.

    Args:
        request: What was asked for originally.
        first: A generation whose `finish_reason` is :data:`ABORTED`; it may be empty.
        ask: Makes one completion of a request; its second argument counts segments from 1.
        max_resumes: How many times to go on before giving up.

    Returns:
        A generation of at most ``request.sampling.max_tokens`` tokens that was not cut off.

    Raises:
        EngineUnavailableError: Cut off more than `max_resumes` times; or whatever `ask` raises.
    """
    segments = [first]
    idle = 0
    for segment in range(1, max_resumes + 1):
        if not resumable(request.sampling.extra):
            segments = []
        done = sum(len(piece.token_ids) for piece in segments)
        if done >= request.sampling.max_tokens:
            return _join(segments, "length")
        # A server that aborts at once would otherwise be asked again as fast as it can answer.
        idle = 0 if segments and len(segments[-1].token_ids) else idle + 1
        if idle > 1:
            await asyncio.sleep(min(_PAUSE_S * 2**idle, _PAUSE_MAX_S))
        piece = await ask(_rest(request, segments, done), segment)
        segments.append(piece)
        if piece.finish_reason != ABORTED:
            return _join(segments, piece.finish_reason)
    done = sum(len(piece.token_ids) for piece in segments)
    raise EngineUnavailableError(
        f"{first.server} aborted a generation {max_resumes + 1} times "
        f"({done} of at most {request.sampling.max_tokens} tokens made)"
    )


def _rest(request: Request, segments: list[Generation], done: int) -> Request:
    """What is left to ask for after `done` tokens."""
    sampling = request.sampling
    extra = dict(sampling.extra)
    if extra.get("min_tokens"):
        extra["min_tokens"] = max(0, extra["min_tokens"] - done)
    return replace(
        request,
        token_ids=np.concatenate([request.token_ids, *(piece.token_ids for piece in segments)]),
        sampling=replace(
            sampling,
            max_tokens=sampling.max_tokens - done,
            # The same seed again would replay the random numbers of the first segment.
            seed=None if sampling.seed is None else sampling.seed + done,
            extra=extra,
        ),
    )


def _join(segments: list[Generation], finish_reason: str) -> Generation:
    """One generation out of its segments."""
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
    )
