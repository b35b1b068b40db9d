"""Log-probabilities by a direct forward pass of transformers, which shares no kernel with vLLM.

- Runs in vLLM's environment, as a process of its own: one JSON question a line in, one answer out.
- A question: ``ids``, and ``segments`` ``[weights folder, end]`` that say which weights made the
  tokens up to `end`; the first segment is the prompt's and nothing is asked of it.
- ``kept`` says what a token may look at: false, all tokens before it as its own weights see them;
  true, keys and values of the weights that wrote them, as when a server keeps them over a reload.
- An answer: ``logprobs``, one for each token after the prompt.
"""

# ruff: noqa: T201  # a program that prints

import json
import sys
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, Qwen2ForCausalLM

__all__ = ["main"]


@cache
def _model(folder: str) -> Any:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def _answer(ids: list[int], segments: list[tuple[str, int]], *, kept: bool) -> list[float]:
    every = torch.tensor(ids)
    (_, at), *made = segments
    past = DynamicCache() if kept else None
    seen = 0
    answers: list[float] = []
    for folder, end in made:
        # A token comes from the pass over the one before it.
        logits = _model(folder)(
            every[seen : end - 1][None], past_key_values=past, use_cache=kept
        ).logits[0]
        scores = logits[at - 1 - seen :].float().log_softmax(-1)
        answers += scores.gather(-1, every[at:end, None])[:, 0].tolist()
        seen = end - 1 if kept else 0
        at = end
    return answers


def main() -> None:
    """The program: until standard input ends."""
    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        said = _answer(asked["ids"], asked["segments"], kept=asked["kept"])
        print(json.dumps({"logprobs": said}), flush=True)


if __name__ == "__main__":
    main()
