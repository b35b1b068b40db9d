"""The demo's trainer: a plain GRPO loop that knows the fleet by feed, batches and publish only.

- Weights are named by the trainer's own count of its versions, which a server reads off the file;
  the fleet's board counts beside it, and the two must agree.
- Every row that goes into the optimiser is written to a log as the optimiser saw it (ids, label of
  every token), after the step. That log is one half of the audit; the server's is the other.
- No prompt comes twice, so that a prompt's ids name its group in both logs.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from rollfleet import Batch, Fleet, RollfleetError, TensorBatch
from rollfleet_demo.grpo import GrpoTrainer, StepReport, group_advantages
from rollfleet_demo.model import CausalPolicy
from rollfleet_demo.task import encode, prompts

if TYPE_CHECKING:
    import threading

__all__ = ["DemoTrainer", "Step", "feed"]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step, for the screen and the report."""

    #: From 1.
    number: int
    #: Version of the weights that the step began with.
    version: int
    #: Mean over the batch.
    reward: float
    samples: int
    #: Tokens that carry a loss; the prompts' are not among them.
    tokens: int
    #: Rows that had something to say: those of groups whose rewards differ.
    rows: int
    loss: float
    #: Samples by versions behind, as the fleet judged them.
    staleness: Mapping[int, int]
    #: Seconds since the loop began, at the end of the step.
    at_s: float
    #: Waiting for the batch; training on it; saving and publishing the new weights.
    wait_s: float
    train_s: float
    publish_s: float


def feed(seed: int, stopped: "threading.Event") -> Iterator[dict[str, Any]]:
    """Prompts for the fleet, each with its answer, until `stopped`."""
    seen: set[str] = set()
    for prompt, answer in prompts(seed):
        if stopped.is_set():
            return
        if prompt not in seen:
            seen.add(prompt)
            yield {"token_ids": encode(prompt), "answer": answer}


@dataclass(slots=True)
class DemoTrainer:
    """A policy in training. Not thread-safe."""

    policy: CausalPolicy
    #: Writes the policy's weights under a version's number, and says where.
    write: Callable[[int], Path]
    #: The log of what was trained, one JSON line a step.
    log: IO[str]
    #: Version of the policy's weights, by our own count.
    version: int = 0
    #: Where the newest weights are.
    newest: Path = Path()
    _grpo: GrpoTrainer = field(init=False)

    def __post_init__(self) -> None:
        self._grpo = GrpoTrainer(self.policy)

    def save(self) -> Path:
        """Write the weights under their version's number; returns where."""
        self.newest = self.write(self.version)
        return self.newest

    def step(self, tensors: TensorBatch, number: int) -> StepReport:
        """Train on a batch, and note every row of it."""
        advantages, _ = group_advantages(tensors.rewards, tensors.group_ids)
        done = self._grpo.step(tensors.input_ids, tensors.loss_mask, tensors.logprobs, advantages)
        line = {"step": number, "version": self.version, "rows": list(_rows(tensors))}
        self.log.write(json.dumps(line, separators=(",", ":")) + "\n")
        self.version += 1
        return done

    def train(self, fleet: Fleet, steps: int, each: Callable[[Step], bool]) -> None:
        """`steps` steps, each one published; `each` is told, and returns False to end here.

        Raises:
            RollfleetError: The fleet's count of versions is not ours.
        """
        began = time.monotonic()
        for number, batch in enumerate(fleet.batches(steps), 1):
            started = time.monotonic()
            behind = Counter(batch.staleness)
            done = self.step(batch.tensors, number)
            trained = time.monotonic()
            announced = fleet.publish(weights=str(self.save()))
            if announced != self.version:
                raise RollfleetError(f"published {announced}, but trained version {self.version}")
            now = time.monotonic()
            go_on = each(
                Step(
                    number=number,
                    version=self.version - 1,
                    reward=_mean_reward(batch),
                    samples=len(batch),
                    tokens=int(batch.tensors.loss_mask.sum()),
                    rows=done.rows,
                    loss=done.loss,
                    staleness=dict(sorted(behind.items())),
                    at_s=now - began,
                    wait_s=batch.stats["rollfleet/wait_s"],
                    train_s=trained - started,
                    publish_s=now - trained,
                )
            )
            if not go_on:
                # Left by break, the loop would not come back to commit this batch.
                fleet.commit(batch)
                break


def _mean_reward(batch: Batch) -> float:
    return float(batch.tensors.rewards.mean())


def _rows(tensors: TensorBatch) -> Iterator[dict[str, Any]]:
    """What the optimiser saw of each row, in plain types."""
    # By version, not by loss mask: a policy may have masked stale tokens of a completion.
    completions = tensors.versions >= 0
    prompts = tensors.attention_mask & ~completions
    for row in range(tensors.rows):
        mask = completions[row]
        group = int(tensors.group_ids[row])
        yield {
            "group": tensors.groups[group],
            "index": tensors.headers[int(tensors.rollout_ids[row])].index,
            "prompt": _picked(tensors.input_ids[row], prompts[row]),
            "completion": _picked(tensors.input_ids[row], mask),
            "versions": _picked(tensors.versions[row], mask),
            "trained": tensors.loss_mask[row][mask].tolist(),
            "logprobs": tensors.logprobs[row][mask].tolist(),
            "reward": float(tensors.rewards[row]),
        }


def _picked(values: torch.Tensor, mask: torch.Tensor) -> list[int]:
    picked: list[int] = values[mask].tolist()
    return picked
