"""TRL's AsyncGRPOTrainer on a fleet: a tiny Llama from nothing learns to sort digits.

TRL keeps its model, optimizer, loss and checkpoints; prompts, rollouts, versions and what may be
trained on are the fleet's. Proven with trl 1.16.0 (``pip install 'rollfleet[trl]'``). First make
the model, then run the three beside each other, on a machine with a GPU:

    python examples/trl_grpo.py --make-model tiny
    VLLM_SERVER_DEV_MODE=1 vllm serve tiny --enable-scale-out --skip-tokenizer-init
    PYTHONPATH=examples rollfleet worker --redis-url redis://127.0.0.1:6379/0 --run trl \
        --server http://127.0.0.1:8000 --workflow trl_grpo:PartlySorted --stop-token-id 1
    python examples/trl_grpo.py --model tiny --server http://127.0.0.1:8000

``--resume trl-out/checkpoint-50`` goes on from a checkpoint, and trains nothing twice.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollfleet_common.errors import LostBatchesError
from rollfleet_common.messages import Int32
from rollfleet_demo.task import END_ID, PAD_ID, VOCABULARY, encode, prompts
from rollfleet_worker.workflows.single_turn import SingleTurn

GROUP = 8
PROMPTS = 2048


class PartlySorted(SingleTurn):
    """For the worker: the share of the answer that is right, so that there is a start."""

    @staticmethod
    def reward(completion: Int32, prompt: Int32, data: Mapping[str, Any]) -> float:  # noqa: ARG004
        """Right tokens in their places, from 0 to 1."""
        answer = encode(str(data["answer"]))
        right = sum(a == b for a, b in zip(completion.tolist(), answer, strict=False))
        return right / len(answer)


def make_model(folder: Path) -> None:
    """A model and a tokenizer, one character a token, as Hugging Face lays them out."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        set_seed,
    )

    ids = {character: index for index, character in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=VOCABULARY[PAD_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=VOCABULARY[PAD_ID], eos_token=VOCABULARY[END_ID]
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def train(options: argparse.Namespace) -> None:
    """TRL's trainer, with the fleet in its two seams."""
    import torch  # noqa: PLC0415 - a worker that imports the workflow has no torch
    from datasets import Dataset  # noqa: PLC0415
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer  # noqa: PLC0415

    import rollfleet  # noqa: PLC0415
    from rollfleet.adapters.trl import TrlBridge, callback, fleet_settings, load_state  # noqa: PLC0415

    pairs = [pair for pair, _ in zip(prompts(seed=0), range(PROMPTS), strict=False)]
    gpu = torch.cuda.is_available()
    args = AsyncGRPOConfig(
        str(options.output),
        max_steps=options.steps,
        num_generations=GROUP,
        per_device_train_batch_size=4 * GROUP,
        gradient_accumulation_steps=2,
        token_budget=0,  # a micro-batch is a number of samples
        max_staleness=3,
        learning_rate=3e-3,
        save_steps=options.save_steps,
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=False,
        report_to="none",
    )
    resume = options.resume
    with rollfleet.connect(
        options.redis_url,
        run=options.run,
        state=load_state(resume) if resume else None,
        servers=options.server,
        **fleet_settings(args),
    ) as fleet:
        bridge = TrlBridge(
            fleet,
            args,
            rollfleet.Epochs(
                [{"token_ids": encode(prompt), "answer": answer} for prompt, answer in pairs]
            ),
            weights=options.weights,
            commit="checkpoint",
        )
        trainer = AsyncGRPOTrainer(
            str(options.model),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in pairs]),
            rollout_worker=bridge,
            weight_transfer=bridge,
            callbacks=[callback(bridge)],
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        print(
            f"reward {rewards[0]:.3f} to {rewards[-1]:.3f} in {len(rewards)} steps", fleet.books()
        )


def main() -> None:
    """Make the model, or train it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make-model", type=Path)
    parser.add_argument("--model", type=Path, default=Path("tiny"))
    parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--run", default="trl")
    parser.add_argument("--server", action="append", default=[], help="inference server to refit")
    parser.add_argument("--weights", type=Path, default=Path("trl-weights"))
    parser.add_argument("--output", type=Path, default=Path("trl-out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--resume", type=Path, help="a checkpoint of --output")
    options = parser.parse_args()
    if options.make_model:
        make_model(options.make_model)
    else:
        train(options)


if __name__ == "__main__":
    try:
        main()
    except LostBatchesError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)  # starting it again would end the same way
