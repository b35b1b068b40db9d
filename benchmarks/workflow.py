"""The empty workflow: it returns a sample of the size that the prompt asks for, made beforehand."""

from functools import cache

import numpy as np

from rollfleet_common.messages import Prompt, Sample, VersionSpans
from rollfleet_worker.workflows.base import Context

__all__ = ["Empty", "sample_of"]

#: Bytes of a token on the wire: its id and its log-probability.
BYTES_PER_TOKEN = 8


@cache
def sample_of(prompt_tokens: int, tokens: int, version: int) -> Sample:
    """A single-turn sample of `tokens` tokens, of which the first are the prompt's."""
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, tokens).astype(np.float32)
    logprobs[:prompt_tokens] = 0.0
    spans = [(prompt_tokens, -1), (tokens - prompt_tokens, version)]
    return Sample(
        token_ids=rng.integers(0, 150_000, tokens, dtype=np.int32),
        loss_mask=np.arange(tokens) >= prompt_tokens,
        logprobs=logprobs,
        versions=VersionSpans.of(spans),
        reward=1.0,
        finish_reason="length",
    )


class Empty:
    """Does nothing: what is measured is the path."""

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """A sample of `prompt.data["tokens"]` tokens."""
        tokens: int = prompt.data["tokens"]
        return sample_of(min(len(prompt.token_ids), tokens // 2), tokens, context.version)
