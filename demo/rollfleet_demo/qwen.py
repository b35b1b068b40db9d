"""The demo's policy for a real vLLM: Qwen2's architecture at 0.6 M parameters, and its checkpoints.

- Trainer and server must agree on every operation, so this is Qwen2 as published: RMS norms, rotary
  positions, biased queries, keys and values, a gated MLP; float32 throughout.
- The output head is not tied to the embedding: vLLM 0.32 on a CPU keeps the old head over a reload
  if it is (docs/vllm.md).
- A checkpoint is a folder as Hugging Face lays it out, which appears whole or not at all; it has no
  tokenizer, because the demo speaks in token ids.
- All checkpoints stay until the end of the run: they are what the audit judges tokens by.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rollfleet_demo.model import MAX_TOKENS, CausalPolicy
from rollfleet_demo.task import END_ID, PAD_ID, VOCABULARY

__all__ = ["Checkpoints", "QwenPolicy", "QwenShape"]

#: As in Qwen2's published configurations.
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class QwenShape:
    """Sizes of a policy; the defaults are the demo's."""

    #: Rounded up to a multiple that kernels like; the ids beyond the task's are never wanted.
    vocabulary: int = -(-len(VOCABULARY) // 16) * 16
    width: int = 128
    inner: int = 384
    layers: int = 3
    heads: int = 4
    max_tokens: int = MAX_TOKENS


class _Norm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        scaled: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * scaled


class _Attention(nn.Module):
    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Of x [rows, seq, width] with rotations [2, seq, head width]."""
        rows, seq, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, seq, self.heads, width // self.heads).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            _turned(split(self.q_proj(x)), turn),
            _turned(split(self.k_proj(x)), turn),
            split(self.v_proj(x)),
            is_causal=True,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        return out


class _Mlp(nn.Module):
    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = _Norm(shape.width)
        self.post_attention_layernorm = _Norm(shape.width)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Same shape as x."""
        x = x + self.self_attn(self.input_layernorm(x), turn)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Body(nn.Module):
    def __init__(self, shape: QwenShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width)

    def forward(self, ids: Tensor, turn: Tensor) -> Tensor:
        """float32[rows, seq, width] of ids int64[rows, seq]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, turn)
        out: Tensor = self.norm(x)
        return out


class QwenPolicy(CausalPolicy):
    """The model; names of its parameters are those of a Hugging Face checkpoint."""

    def __init__(self, shape: QwenShape | None = None, *, seed: int = 0) -> None:
        """Weights drawn from `seed`, without touching torch's global generator."""
        super().__init__()
        self.shape = shape or QwenShape()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _Body(self.shape)
            self.lm_head = nn.Linear(self.shape.width, self.shape.vocabulary, bias=False)
            nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        head = self.shape.width // self.shape.heads
        speed = ROPE_THETA ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        angle = torch.arange(self.shape.max_tokens, dtype=torch.float32)[:, None] * speed
        both = torch.cat([angle, angle], -1)
        #: float32[2, max_tokens, head width]: cosines and sines by position; no parameter.
        self._turns = torch.stack([both.cos(), both.sin()])

    def logits(self, ids: Tensor) -> Tensor:
        """float32[rows, seq, vocabulary]: the next token's logits after each of ids int64[rows, seq].

        Raises:
            RuntimeError: A row is longer than the policy's positions.
        """
        logits: Tensor = self.lm_head(self.model(ids, self._turns[:, : ids.shape[1]]))
        return logits


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions on x [rows, heads, seq, head width]; halves are paired, as in Qwen2."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], -1) * turn[1]


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of a policy in a folder, one for each version."""

    policy: QwenPolicy
    folder: Path

    def path(self, version: int) -> Path:
        """Where a version's checkpoint is."""
        return self.folder / f"version-{version}"

    def write(self, version: int) -> Path:
        """Write the policy's weights as a checkpoint; returns its folder.

        Raises:
            OSError: The folder is missing, full or not writable.
        """
        path = self.path(version)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.mkdir()
        try:
            tensors = {
                name: t.detach().contiguous() for name, t in self.policy.state_dict().items()
            }
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            said = json.dumps(_config(self.policy.shape))
            (temporary / "config.json").write_text(said, encoding="utf-8")
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def load(self, version: int, into: QwenPolicy) -> None:
        """Read a version's weights into another policy of this shape.

        Raises:
            FileNotFoundError: There is no such checkpoint.
        """
        into.load_state_dict(load_file(self.path(version) / "model.safetensors"))


def _config(shape: QwenShape) -> dict[str, object]:
    """What Hugging Face calls the model's configuration."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.max_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
    }
