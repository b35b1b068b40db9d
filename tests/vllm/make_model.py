"""Builds a tiny random Qwen2 with a character tokenizer, and other weights for it: no download.

- Runs in vLLM's environment: ``python make_model.py FOLDER``.
- ``FOLDER/v0`` is a whole checkpoint with its tokenizer; ``v1`` .. ``v3`` are the same model with
  other weights, for reloads. Equal seeds make equal files.
- Deep for its width, so that a generation lasts long enough to be interrupted.
- The output head is not tied to the embedding: vLLM 0.32 on a CPU keeps the old head over a reload
  if it is (docs/vllm.md).
- The weights are drawn wider than usual: what one token says depends visibly on all those before
  it, so that a key or value of other weights shows in the log-probabilities.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

__all__ = ["main"]

VERSIONS = 4
SPECIAL = ["<pad>", "<eos>", "<unk>"]
CONTEXT_TOKENS = 16384


def main(arguments: Sequence[str]) -> None:
    """The program."""
    folder = Path(arguments[0])
    for version in range(VERSIONS):
        torch.manual_seed(version)
        model = Qwen2ForCausalLM(_config()).to(torch.float32)
        model.save_pretrained(folder / f"v{version}")
    _tokenizer().save_pretrained(folder / "v0")


def _config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.06,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character."""
    characters = [*SPECIAL, *map(chr, range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
