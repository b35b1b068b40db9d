"""A whole trainer: GRPO teaches a small transformer to sort digits, through the fleet.

Run it in three terminals (or ``docker compose up``, which does the same):

    python examples/train_sort.py --redis-url embedded:///tmp/sort --server http://127.0.0.1:8000
    python -m rollfleet_demo.server --port 8000 --version 0 \
        --weights weights/v0.safetensors --wait-weights-s 60
    rollfleet worker --redis-url embedded:///tmp/sort --run sort --server http://127.0.0.1:8000 \
        --workflow rollfleet_demo.workflow:Sort --stop-token-id 1
"""

import argparse
import logging
from pathlib import Path

import rollfleet
from rollfleet_demo.grpo import GrpoTrainer, group_advantages
from rollfleet_demo.model import TinyPolicy, save, warm_start
from rollfleet_demo.task import encode, prompts


def main() -> None:
    """Train for a number of steps, publishing the weights of every one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--server", action="append", default=[], help="inference server to refit")
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    policy = TinyPolicy(seed=0)
    warm_start(policy, steps=20)
    trainer = GrpoTrainer(policy)
    args.weights.mkdir(exist_ok=True)
    save(policy, args.weights / "v0.safetensors", 0)

    with rollfleet.connect(args.redis_url, run="sort", fresh=True, servers=args.server) as fleet:
        fleet.feed({"token_ids": encode(p), "answer": a} for p, a in prompts(seed=0))
        for batch in fleet.batches(args.steps):
            t = batch.tensors
            advantages, _ = group_advantages(t.rewards, t.group_ids)
            trainer.step(t.input_ids, t.loss_mask, t.logprobs, advantages)

            path = args.weights / f"v{batch.version + 1}.safetensors"
            save(policy, path, batch.version + 1)
            fleet.publish(weights=str(path.resolve()))
            reward, stale = t.rewards.mean().item(), max(batch.staleness)
            print(f"step {batch.number}: reward {reward:.3f}, at most {stale} versions old")


if __name__ == "__main__":
    main()
