"""A fleet as a PyTorch IterableDataset, for trainers that want a DataLoader.

    loader = DataLoader(RolloutDataset(fleet, steps=300), batch_size=None)
    for batch in loader:
        ...
        fleet.publish(weights=...)

- An item is a whole batch, judged fresh when it is read; `batch_size=None` keeps it whole.
- A batch is settled when the next is read, as with :meth:`Fleet.batches`; with `read_ahead`, so
  many reads later: some loaders read ahead of what is trained. A loop that is left early settles
  nothing more: what it held is served again by the next trainer.
- One process reads. A run has one trainer, and its connections survive no fork: worker processes
  of a DataLoader are refused.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, NoReturn

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rollfleet.batch import Batch
from rollfleet.fleet import Fleet
from rollfleet_common.errors import SettingsError

__all__ = ["RolloutDataset"]

Form = Literal["tensors", "dict", "batch"]

#: What a worker process of a DataLoader is told.
_ONE_PROCESS = (
    "a RolloutDataset is read in the trainer's own process: give DataLoader num_workers=0. A run "
    "has one trainer, and the fleet prefetches in the background by itself"
)


class RolloutDataset(IterableDataset[Any]):
    """Batches of a fleet.

    Args:
        fleet: Held by this process; it stays the caller's to close.
        steps: How many batches; None for all until the feed ends.
        commit: "step": a batch is committed when it is settled. "checkpoint": it is marked as
            trained then; call ``fleet.commit()`` when a checkpoint is durable.
        form: "tensors": ``batch.tensors``. "dict": its tensors by name (and dicts of tensors), with
            the numbers `version` and `number` of the batch. "batch": the :class:`rollfleet.Batch`.
        read_ahead: Batches that whoever iterates reads before it has trained on the one in hand:
            0 for a plain DataLoader, 1 for one that accelerate has prepared.

    Raises:
        SettingsError: `commit`, `form` or `read_ahead` is none of these.
    """

    def __init__(
        self,
        fleet: Fleet,
        steps: int | None = None,
        *,
        commit: Literal["step", "checkpoint"] = "step",
        form: Form = "tensors",
        read_ahead: int = 0,
    ) -> None:
        super().__init__()
        if form not in ("tensors", "dict", "batch"):
            raise SettingsError(f'form is {form!r}; it must be "tensors", "dict" or "batch"')
        if read_ahead < 0:
            raise SettingsError(f"read_ahead is {read_ahead}; it must be at least 0")
        fleet.aio.settler(commit)  # refuses what it does not know, here and not in the loop
        self.fleet = fleet
        self.steps = steps
        self.commit = commit
        self.form = form
        self.read_ahead = read_ahead
        self._left: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Any]:
        """Read batches.

        Raises:
            SettingsError: In a worker process of a DataLoader.
            StarvedError, RollfleetError: As :meth:`Fleet.next_batch`.
        """
        if get_worker_info() is not None:
            raise SettingsError(_ONE_PROCESS)
        self.settle()
        return self._batches()

    def settle(self) -> None:
        """Settle what was read ahead: call it after a loop that came to its end.

        Only with `read_ahead`: the reader met the end before it had trained on the last batches.
        The next loop over this data set does it, too.
        """
        while self._left:
            self._settle(self._left.popleft())

    def _batches(self) -> Iterator[Any]:
        held: deque[Batch] = deque()
        read = 0
        while (self.steps is None or read < self.steps) and (
            batch := self.fleet.next_batch()
        ) is not None:
            read += 1
            held.append(batch)
            yield self._formed(batch)
            while len(held) > self.read_ahead:
                self._settle(held.popleft())
        self._left = held

    def _settle(self, batch: Batch) -> None:
        (self.fleet.commit if self.commit == "step" else self.fleet.trained)(batch)

    def _formed(self, batch: Batch) -> Any:
        if self.form == "batch":
            return batch
        tensors = batch.tensors
        if self.form == "tensors":
            return tensors
        values = ((each.name, getattr(tensors, each.name)) for each in fields(tensors))
        named = {name: value for name, value in values if isinstance(value, Tensor | dict)}
        return {**named, "version": batch.version, "number": batch.number}

    def __reduce__(self) -> NoReturn:
        raise SettingsError(_ONE_PROCESS)
