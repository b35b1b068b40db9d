"""What goes through the demo's engine: requests, their choices, and what is known of each token.

- A request (:class:`Ticket`) has `n` choices (:class:`Completion`); each is scheduled on its own
  (:class:`Sequence`), and the request is done with its last one.
- Nothing here is locked: until a ticket's future resolves, its parts belong to the engine's thread.
"""

import json
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from rollfleet_demo.sampling import SamplerSettings
from rollfleet_demo.task import END_ID, decode

__all__ = ["Completion", "EngineClosedError", "Sequence", "Stats", "Ticket", "log_line"]


class EngineClosedError(RuntimeError):
    """The engine has been closed, or its thread has failed: nothing more will be generated."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the schedule, in sequences."""

    running: int = 0
    waiting: int = 0
    paused: bool = False
    #: Share of the cache's token slots that hold a token.
    cache_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    version: str = ""


@dataclass(slots=True)
class Completion:
    """One choice of a request; all lists have one entry per generated token."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    #: Likeliest ``(token id, logprob)`` at each position, as many as were asked for.
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    #: "stop", "length" or "abort".
    finish_reason: str = "abort"
    #: The stop token or text that ended it; None for the end-of-sequence token, length and abort.
    stop_reason: int | str | None = None
    #: First token and label of each run of tokens with one version.
    version_starts: list[tuple[int, str]] = field(default_factory=list)
    #: `weights_id` of the weights that made each token.
    truth: list[int] = field(default_factory=list)

    def spans(self) -> list[tuple[str, int, int]]:
        """``(version, start, end)`` over the tokens, contiguous; none if there are no tokens."""
        borders = [*self.version_starts, (len(self.token_ids), "")]
        return [(version, start, end) for (start, version), (end, _) in pairwise(borders)]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was taken; `result` resolves with one completion per choice, in order."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplerSettings
    result: "Future[list[Completion]]" = field(default_factory=Future)
    done: list[Completion] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a ticket, in the schedule."""

    ticket: Ticket
    out: Completion
    limit: int
    generator: torch.Generator | None

    def ended(self) -> bool:
        """Whether the newest token was the last one; the completion then says why."""
        out, sampling = self.out, self.ticket.sampling
        token = out.token_ids[-1]
        if token == END_ID and not sampling.ignore_eos:
            out.finish_reason = "stop"
        elif token in sampling.stop_token_ids:
            out.finish_reason, out.stop_reason = "stop", token
        elif text := self._stopped():
            out.finish_reason, out.stop_reason = "stop", text
        elif len(out.token_ids) >= self.limit:
            out.finish_reason = "length"
        else:
            return False
        return True

    def _stopped(self) -> str:
        """The stop text that the newest token completes; "" if it completes none."""
        stop = self.ticket.sampling.stop
        if not stop:
            return ""
        said = decode(self.out.token_ids)
        return next((text for text in stop if said.endswith(text)), "")


def log_line(ticket: Ticket, out: Completion) -> str:
    """One line of the token log."""
    entry = {
        "request_id": ticket.request_id,
        "index": out.index,
        "prompt": ticket.prompt,
        "token_ids": out.token_ids,
        "logprobs": out.logprobs,
        "truth": out.truth,
        "finish_reason": out.finish_reason,
    }
    return json.dumps(entry, separators=(",", ":")) + "\n"
