"""Choosing the next token for a batch of sequences that each have settings of their own.

- Log-probabilities are those of the raw logits, before temperature and filters: vLLM's default
  (`raw_logprobs`). At temperature 1 without filters they are what the token was sampled with.
- A seeded sequence draws from its own generator: its tokens do not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Chosen", "SamplerSettings", "choose"]

#: Temperatures below this are greedy, as in vLLM.
_GREEDY = 1e-5


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """How to sample; names and meaning as in vLLM's SamplingParams."""

    n: int = 1
    #: None: up to the model's limit.
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0 or -1: no limit.
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    #: Texts that end a choice, wherever in it they end; their tokens are part of it.
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    #: Choice i of a request draws from seed + i.
    seed: int | None = None
    #: Alternatives to report for each token, besides the sampled one; None reports nothing.
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature < _GREEDY


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token for each sequence of the batch."""

    token_ids: list[int]
    logprobs: list[float]
    #: 1 for the likeliest token, 2 for the next, ...
    ranks: list[int]
    #: For each sequence its likeliest ``(token id, logprob)``; empty lists where none were asked.
    tops: list[list[tuple[int, float]]]


def _filtered(logits: Tensor, settings: Sequence[SamplerSettings]) -> Tensor:
    """float32[rows, vocabulary]: the logits, -inf where top_k, top_p or min_p exclude a token."""
    vocabulary = logits.shape[1]
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    top_k = torch.tensor([s.top_k if s.top_k > 0 else vocabulary for s in settings])
    top_p = torch.tensor([s.top_p for s in settings])
    min_p = torch.tensor([s.min_p for s in settings])
    drop = torch.arange(vocabulary) >= top_k.unsqueeze(1)
    # A token stays while those before it have not yet filled top_p: the likeliest always stays.
    drop |= probabilities.cumsum(-1) - probabilities >= top_p.unsqueeze(1)
    drop |= probabilities < min_p.unsqueeze(1) * probabilities[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def choose(
    logits: Tensor,
    settings: Sequence[SamplerSettings],
    generators: Sequence[torch.Generator | None],
    shared: torch.Generator,
) -> Chosen:
    """Sample one token per row.

    Args:
        logits: float32[rows, vocabulary].
        settings: One per row.
        generators: One per row; None draws from `shared`.
        shared: Generator of all rows without a seed.
    """
    raw = logits.log_softmax(-1)
    temperatures = torch.tensor([s.temperature for s in settings])
    greedy = torch.tensor([s.greedy for s in settings])
    scaled = logits / temperatures.masked_fill(greedy, 1.0).unsqueeze(1)
    if any(s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0 for s in settings):
        scaled = _filtered(scaled, settings)
    # argmax(p / e) with e ~ Exp(1) is a draw from p: one kernel for the whole batch.
    noise = torch.empty_like(scaled).exponential_(generator=shared)
    for row, generator in enumerate(generators):
        if generator is not None:
            noise[row].exponential_(generator=generator)
    drawn = (scaled.softmax(-1) / noise).argmax(-1)
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    chosen = raw.gather(1, tokens.unsqueeze(1))
    ranks = (raw > chosen).sum(-1) + 1
    most = max((s.logprobs or 0 for s in settings), default=0)
    tops: list[list[tuple[int, float]]] = [[] for _ in settings]
    if most:
        values, ids = raw.topk(min(most, raw.shape[1]), -1)
        for row, (s, row_ids, row_values) in enumerate(
            zip(settings, ids.tolist(), values.tolist(), strict=True)
        ):
            tops[row] = list(zip(row_ids, row_values, strict=True))[: s.logprobs or 0]
    return Chosen(tokens.tolist(), chosen.squeeze(1).tolist(), ranks.tolist(), tops)
