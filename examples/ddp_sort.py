"""The trainer of train_sort.py on several ranks, with checkpoints: DDP, or FSDP2 with --fsdp.

    torchrun --standalone --nproc-per-node 2 examples/ddp_sort.py --redis-url embedded:///tmp/sort \
        --server http://127.0.0.1:8000
    python -m rollfleet_demo.server --port 8000 --version 0 \
        --weights weights/v0.safetensors --wait-weights-s 60
    rollfleet worker --redis-url embedded:///tmp/sort --run sort --server http://127.0.0.1:8000 \
        --workflow rollfleet_demo.workflow:Sort --stop-token-id 1

Kill any of it with -9 and start it again: the trainer goes on from its last checkpoint, with as many
ranks as it is given then, and is handed exactly what was trained since, once more.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rollfleet
from rollfleet_demo.grpo import group_advantages
from rollfleet_demo.model import TinyPolicy, save, warm_start
from rollfleet_demo.task import encode, prompts

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Scorer(nn.Module):
    """The policy with a forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, policy: TinyPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, ids: Tensor) -> Tensor:
        """float32[rows, seq]: log-probabilities of the tokens."""
        return self.policy.logprobs(ids)


def wrap(policy: TinyPolicy, *, fsdp: bool) -> nn.Module:
    """The model on all ranks: a copy each, or a piece each."""
    scorer = Scorer(policy)
    if not fsdp:
        return DistributedDataParallel(scorer)
    # A larger model has its blocks sharded first, one by one; they are called by their forward pass.
    fully_shard(scorer)
    return scorer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: rollfleet.RankBatch) -> None:
    """One optimiser step on the whole batch, of which this rank has a share."""
    optimizer.zero_grad(set_to_none=True)
    micros = batch.micro_batches()
    advantages, _ = group_advantages(micros.rewards, micros.group_ids)
    advantages = torch.cat([advantages, torch.zeros(1)])  # row -1 is a filler's
    for micro in micros:
        t = micro.tensors
        advantage = advantages[micro.rows].unsqueeze(1)
        ratio = (model(t.input_ids) - t.logprobs).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        # The weights make it the mean over all ranks' tokens; DDP and FSDP average over ranks.
        ((loss * micro.weights()).sum() * batch.ranks).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def export(model: nn.Module, path: Path, version: int) -> None:
    """Write the weights for the servers; all ranks gather them, rank 0 writes."""
    tensors = get_model_state_dict(model, options=WHOLE)
    if dist.get_rank() == 0:
        served = TinyPolicy()
        served.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items()})
        save(served, path, version)


def checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fleet: rollfleet.RankFleet
) -> None:
    """Make what was trained durable, and only then let the fleet free it."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)
    if fleet.rank == 0:
        state = {"model": weights, "optimizer": moments, "fleet": fleet.state_dict()}
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    fleet.commit()


def main() -> None:
    """Train for a number of steps, or on from the last checkpoint up to it."""
    parser = argparse.ArgumentParser(description="GRPO on several ranks")
    parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--server", action="append", default=[], help="inference server to refit")
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256, help="samples of one step, on all ranks")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--warm-steps", type=int, default=20, help="steps of imitation before")
    parser.add_argument("--members", type=Path, help="folder for what each rank trained on")
    parser.add_argument("--fsdp", action="store_true")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    policy = TinyPolicy(seed=0)
    args.weights.mkdir(exist_ok=True)
    path = args.weights.resolve() / "checkpoint.pt"
    saved: dict[str, Any] = torch.load(path) if path.exists() else {}
    if not saved:
        warm_start(policy, steps=args.warm_steps)
    model = wrap(policy, fsdp=args.fsdp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    if saved:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=WHOLE,
        )

    with rollfleet.connect_ranks(
        args.redis_url,
        run="sort",
        state=saved.get("fleet"),
        samples_per_version=args.batch,
        form="padded",
        servers=args.server,
        lease_s=2.0,
    ) as fleet:
        weights = args.weights.resolve() / f"v{fleet.version}.safetensors"
        export(model, weights, fleet.version)
        if saved:  # the servers may be further than the checkpoint
            fleet.publish(fleet.version, str(weights))
        fleet.feed({"token_ids": encode(p), "answer": a} for p, a in prompts(seed=0))
        for batch in fleet.batches(args.steps - fleet.version, commit="checkpoint"):
            step(model, optimizer, batch)
            if args.members:
                with (args.members / f"rank{fleet.rank}.jsonl").open("a") as log:
                    seen = [[r.header.group, r.header.index] for r in batch.rollouts]
                    print(json.dumps({"batch": batch.number, "seen": seen}), file=log, flush=True)
            version = batch.version + 1
            weights = args.weights.resolve() / f"v{version}.safetensors"
            export(model, weights, version)
            fleet.publish(weights=str(weights))
            if fleet.rank == 0:
                reward, stale = (
                    batch.stats[f"rollfleet/{k}"] for k in ("reward_mean", "staleness_max")
                )
                print(
                    f"step {version}: reward {reward:.3f}, at most {stale} versions old", flush=True
                )
            if version % args.every == 0 or version == args.steps:
                fleet.trained(batch)
                checkpoint(path, model, optimizer, fleet)
        if fleet.leader is not None:
            print(fleet.leader.books())
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except rollfleet.LostBatchesError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)  # starting it again would end the same way
