"""The demo's policy: a three-layer causal transformer of 0.6 M parameters that fits one CPU core.

- Pre-LN, learned positions, fp32; a row never looks to its right, so right padding is harmless.
- A weights file names itself: the buffer `weights_id` travels with the parameters, so that what
  made a token can be read off the weights and need not be believed from a label.
- Cached decoding (:meth:`TinyPolicy.prefill`, :meth:`TinyPolicy.decode`) gives the logits of
  :meth:`TinyPolicy.logits` up to rounding, for rows that stand at different positions.
- :func:`save` is atomic: a reader sees the old file or the new one, never half of one.
"""

import math
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rollfleet_demo.task import ANSWER_TOKENS, VOCABULARY, encode, prompts

__all__ = [
    "MAX_TOKENS",
    "Cache",
    "CausalPolicy",
    "PolicyShape",
    "TinyPolicy",
    "greedy_accuracy",
    "load_into",
    "save",
    "warm_start",
]

#: Prompt and completion together; positions are learned, so this is a hard limit.
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """Sizes of a policy; the defaults are the demo's."""

    vocabulary: int = len(VOCABULARY)
    width: int = 128
    layers: int = 3
    heads: int = 4
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of every row's past. Rows 0 .. k-1 are in use; the rest is room."""

    #: float32[layers, rows, heads, max_tokens, width / heads]
    keys: Tensor
    #: Same shape as `keys`.
    values: Tensor

    def compact(self, holes: list[int], movers: list[int]) -> None:
        """Move row ``movers[i]`` into row ``holes[i]``, in all layers at once."""
        if holes:
            self.keys[:, holes] = self.keys[:, movers]
            self.values[:, holes] = self.values[:, movers]


class _Block(nn.Module):
    """One pre-LN layer: attention, then a fourfold MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values [rows, heads, seq, width / heads] of x [rows, seq, width]."""
        rows, seq, width = x.shape
        parts = self.qkv(self.norm_1(x)).view(rows, seq, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output [rows, heads, seq, width / heads] and the MLP to x."""
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        mlp: Tensor = self.down(functional.gelu(self.up(self.norm_2(x))))
        return x + mlp


class CausalPolicy(nn.Module):
    """What a trainer needs of a policy."""

    def logits(self, ids: Tensor) -> Tensor:
        """float32[rows, seq, vocabulary]: the next token's logits after each of ids int64[rows, seq]."""
        raise NotImplementedError

    def logprobs(self, ids: Tensor) -> Tensor:
        """float32[rows, seq]: log-probability of each token of ids int64[rows, seq].

        Aligned with `ids`: entry t belongs to token t given the tokens before it, so the first
        column, which nothing predicts, is 0.
        """
        scores = self.logits(ids[:, :-1]).log_softmax(-1)
        chosen = scores.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return functional.pad(chosen, (1, 0))


class TinyPolicy(CausalPolicy):
    """The model that the demo trains and serves."""

    #: int64[]: which weights these are; set by the trainer before each :func:`save`.
    weights_id: Tensor

    def __init__(self, shape: PolicyShape | None = None, *, seed: int = 0) -> None:
        """Weights drawn from `seed`, without touching torch's global generator."""
        super().__init__()
        self.shape = shape or PolicyShape()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = self.shape.width
            self.token = nn.Embedding(self.shape.vocabulary, width)
            self.position = nn.Embedding(self.shape.max_tokens, width)
            self.blocks = nn.ModuleList(
                _Block(width, self.shape.heads) for _ in range(self.shape.layers)
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, self.shape.vocabulary, bias=False)
            for embedding in (self.token, self.position):
                nn.init.normal_(embedding.weight, std=0.02)
        self.register_buffer("weights_id", torch.tensor(-1, dtype=torch.int64))

    def _stack(self) -> list[_Block]:
        """The layers, typed."""
        return [block for block in self.blocks if isinstance(block, _Block)]

    def _read_out(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of the stream [..., width]."""
        logits: Tensor = self.head(self.norm(x))
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """float32[rows, seq, vocabulary]: the next token's logits after each of ids int64[rows, seq].

        Raises:
            IndexError: A row is longer than the policy's positions, or an id is unknown.
        """
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self._stack():
            query, key, value = block.project(x)
            x = block.finish(
                x, functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            )
        return self._read_out(x)

    def new_cache(self, rows: int) -> Cache:
        """An empty cache with room for `rows` sequences."""
        shape = self.shape
        size = (shape.layers, rows, shape.heads, shape.max_tokens, shape.width // shape.heads)
        return Cache(torch.zeros(size), torch.zeros(size))

    def prefill(
        self, ids: Tensor, lengths: Tensor, rows: Tensor, cache: Cache, first: int
    ) -> Tensor:
        """Run whole prompts and store their past.

        Args:
            ids: int64[prompts, seq], padded on the right.
            lengths: int64[prompts], each at least 1.
            rows: int64[new]: which prompt each new cache row continues; prompts may repeat, so
                the samples of a group cost one pass.
            cache: Rows ``first .. first + new - 1`` are written.
            first: First row to write.

        Returns:
            float32[new, vocabulary]: logits of each new row's first token.
        """
        seq = ids.shape[1]
        x = self.token(ids) + self.position(torch.arange(seq))
        place = slice(first, first + len(rows))
        for layer, block in enumerate(self._stack()):
            query, key, value = block.project(x)
            cache.keys[layer, place, :, :seq] = key[rows]
            cache.values[layer, place, :, :seq] = value[rows]
            x = block.finish(
                x, functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            )
        last = x[torch.arange(len(ids)), lengths - 1]
        return self._read_out(last)[rows]

    def decode(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One more token for cache rows ``0 .. k-1``.

        Args:
            ids: int64[k]: each row's newest token, not yet in the cache; it is stored there.
            positions: int64[k]: where in its row that token stands.
            cache: The rows' past.

        Returns:
            float32[k, vocabulary]: logits of the token after it.
        """
        count = len(ids)
        every = torch.arange(count)
        seen = int(positions.max()) + 1
        # Stale keys of shorter rows lie beyond their position: never let them be looked at.
        hidden = (torch.arange(seen) > positions.unsqueeze(1)).view(count, 1, 1, seen)
        ragged = bool(hidden.any())
        scale = 1.0 / math.sqrt(self.shape.width // self.shape.heads)
        x = (self.token(ids) + self.position(positions)).unsqueeze(1)
        for layer, block in enumerate(self._stack()):
            query, key, value = block.project(x)
            cache.keys[layer][every, :, positions] = key.squeeze(2)
            cache.values[layer][every, :, positions] = value.squeeze(2)
            scores = query @ cache.keys[layer, :count, :, :seen].transpose(-1, -2) * scale
            if ragged:
                scores = scores.masked_fill(hidden, -torch.inf)
            x = block.finish(x, scores.softmax(-1) @ cache.values[layer, :count, :, :seen])
        return self._read_out(x.squeeze(1))


def save(policy: TinyPolicy, path: Path, weights_id: int) -> None:
    """Write the weights, named `weights_id`, as one safetensors file that appears whole or not.

    Raises:
        OSError: The folder is missing or not writable.
    """
    policy.weights_id.fill_(weights_id)
    tensors = {name: tensor.detach().contiguous() for name, tensor in policy.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_into(policy: TinyPolicy, path: Path) -> None:
    """Replace the policy's weights in place, all of them or (on an error) none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no policy of this shape.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise
    except Exception as exc:  # safetensors raises its own class, which derives from Exception
        raise ValueError(f"{path} is no safetensors file: {exc}") from exc
    state = policy.state_dict()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(
            name for name in {*expected, *found} if expected.get(name) != found.get(name)
        )
        raise ValueError(f"{path} does not fit this policy, see {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def warm_start(policy: CausalPolicy, steps: int = 30, batch: int = 256, *, seed: int = 0) -> float:
    """Teach the policy the format, and a little of the task, by imitation of right answers.

    Args:
        policy: Trained in place.
        steps: Optimiser steps.
        batch: Examples in a step.
        seed: Seed of the examples.

    Returns:
        The last step's loss, in nats per answer token.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    examples = prompts(seed)
    loss = torch.tensor(math.nan)
    for _ in range(steps):
        ids = torch.tensor([encode(p + a) for p, a in islice(examples, batch)])
        loss = -policy.logprobs(ids)[:, -ANSWER_TOKENS:].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return loss.item()


@torch.inference_mode()
def greedy_accuracy(policy: TinyPolicy, count: int = 256, *, seed: int = 10_000) -> float:
    """Share of `count` held-out prompts that the policy, taking its likeliest token, gets right."""
    asked = list(islice(prompts(seed), count))
    ids = torch.tensor([encode(prompt) for prompt, _ in asked])
    right = torch.tensor([encode(answer) for _, answer in asked])
    cache = policy.new_cache(count)
    lengths = torch.full((count,), ids.shape[1])
    token = policy.prefill(ids, lengths, torch.arange(count), cache, 0).argmax(-1)
    answers = [token]
    for step in range(ANSWER_TOKENS - 1):
        token = policy.decode(token, lengths + step, cache).argmax(-1)
        answers.append(token)
    return (torch.stack(answers, 1) == right).all(1).float().mean().item()
