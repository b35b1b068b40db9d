"""What TRL's trainer says about its progress: how many rows it has trained, and its checkpoints.

- Counted by step: with `token_budget` <= 0 a step has a fixed number of samples; else TRL's log
  says how many it had (`batch/samples_per_step`).
- The fleet's state is written into a checkpoint when TRL has finished it. Nothing that it holds is
  freed before, so that a checkpoint without one (a crash came between) is refused, and the one
  before it is still good.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from rollfleet.adapters.trl_seam import by_count
from rollfleet_common.errors import SettingsError

__all__ = ["STATE_FILE", "Watched", "Watcher", "callback", "load_state"]

#: In every checkpoint of TRL's: what `rollfleet.connect(state=...)` takes.
STATE_FILE = "rollfleet.pt"


class Watched(Protocol):
    """What a :class:`Watcher` tells: the bridge."""

    watched: bool

    def trained(self, rows: int) -> None:
        """So many more rows were trained."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        ...

    def saved(self) -> None:
        """A checkpoint that holds it is durable."""
        ...


class Watcher:
    """The events of a TrainerCallback that matter here."""

    def __init__(self, bridge: Watched) -> None:
        self.bridge = bridge

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """It is in place: TRL starts its rollout worker after this."""
        self.bridge.watched = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step's samples were trained."""
        if by_count(args):
            micro = args.per_device_train_batch_size * args.world_size
            self.bridge.trained(micro * args.gradient_accumulation_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """A step's samples were trained; the log says how many they were."""
        samples = (logs or {}).get("batch/samples_per_step")
        if samples is not None and not by_count(args):
            self.bridge.trained(round(samples))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is on disk."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        temporary = folder / f".{STATE_FILE}.tmp"
        torch.save(self.bridge.state_dict(), temporary)
        temporary.replace(folder / STATE_FILE)
        self.bridge.saved()


def callback(bridge: Watched) -> Any:
    """A TrainerCallback for ``AsyncGRPOTrainer(callbacks=[...])``; without it nothing is settled."""
    base = import_module("transformers").TrainerCallback
    return type("RollfleetCallback", (Watcher, base), {})(bridge)


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """What to give to ``rollfleet.connect(state=...)`` to go on from one of TRL's checkpoints.

    Raises:
        SettingsError: There is no state in it: it was written without our callback, or is not whole.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except FileNotFoundError as exc:
        raise SettingsError(
            f"{path} does not exist: the checkpoint was written without callback(bridge), or a "
            "crash came first; go on from an earlier one"
        ) from exc
    return state
