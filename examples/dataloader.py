"""A trainer that wants a DataLoader, fed by one that knows where it stands.

Prompts come from torchdata's StatefulDataLoader, shuffled anew in every pass; batches come out of a
plain DataLoader. ``fleet.state_dict()`` holds both places, so a run that is started again after a
crash goes on in the same pass, with the same order. Run it beside a server and a worker, as
train_sort.py says, and stop it and start it again as you like:

    python examples/dataloader.py --redis-url embedded:///tmp/sort --server http://127.0.0.1:8000
"""

import argparse
import logging
import sys
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

import rollfleet
from rollfleet.adapters.loader import RolloutDataset
from rollfleet_demo.grpo import GrpoTrainer, group_advantages
from rollfleet_demo.model import TinyPolicy, save, warm_start
from rollfleet_demo.task import encode, prompts

PROMPTS = 4096


def source() -> rollfleet.Epochs:
    """All prompts, again and again, in an order of each pass's own."""
    rows = [{"token_ids": encode(p), "answer": a} for p, a in islice(prompts(seed=0), PROMPTS)]
    # The sampler's own generator: from one that the loader is given, it draws seeds as well, and a
    # pass that is begun after a crash would come in another order.
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    return rollfleet.Epochs(
        StatefulDataLoader(rows, batch_size=32, sampler=sampler, collate_fn=list)
    )


def main() -> None:
    """Train, with a checkpoint now and then; go on from one if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--server", action="append", default=[], help="inference server to refit")
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=256, help="in a batch")
    parser.add_argument("--warm-start-steps", type=int, default=20)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    args.weights.mkdir(exist_ok=True)
    checkpoint = args.weights / "checkpoint.pt"
    policy, state, done = TinyPolicy(seed=0), None, 0
    trainer = GrpoTrainer(policy)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        state, done = saved["fleet"], saved["done"]
        policy.load_state_dict(saved["policy"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
    else:
        warm_start(policy, steps=args.warm_start_steps)
        save(policy, args.weights / "v0.safetensors", 0)

    with rollfleet.connect(
        args.redis_url,
        run="sort",
        state=state,
        samples_per_version=args.samples,
        servers=args.server,
    ) as fleet:
        if state is not None:  # the servers may have gone on to weights that no longer exist
            weights = args.weights / f"v{fleet.version}.safetensors"
            fleet.publish(fleet.version, weights=str(weights.resolve()))
        fleet.feed(source())

        def checkpointed() -> None:
            """Make what was trained durable, and only then let the fleet free it."""
            saved = {"policy": policy.state_dict(), "optimizer": trainer.optimizer.state_dict()}
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({**saved, "done": done, "fleet": fleet.state_dict()}, temporary)
            temporary.replace(checkpoint)
            fleet.commit()

        dataset = RolloutDataset(fleet, args.steps - done, commit="checkpoint", form="dict")
        for batch in DataLoader(dataset, batch_size=None):
            # Here all batches before this one are settled, and trained: the moment to save.
            if done and done % args.checkpoint_every == 0:
                checkpointed()
            advantages, _ = group_advantages(batch["rewards"], batch["group_ids"])
            trainer.step(batch["input_ids"], batch["loss_mask"], batch["logprobs"], advantages)
            done += 1
            path = args.weights / f"v{fleet.version + 1}.safetensors"
            save(policy, path, fleet.version + 1)
            fleet.publish(weights=str(path.resolve()))
            print(f"step {done}: reward {batch['rewards'].mean().item():.3f}", flush=True)
        checkpointed()
        print(fleet.books())


if __name__ == "__main__":
    try:
        main()
    except rollfleet.LostBatchesError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)  # starting it again would end the same way
