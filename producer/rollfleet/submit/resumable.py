"""Data sets that know where they stand, and passes over a data set.

- A stateful source (torchdata's StatefulDataLoader, a streaming data set of Hugging Face, ...) is
  put back where it stood; what lies between that place and the prompt that is due is read again
  and passed over. A source without state is read from its beginning, and passed over likewise.
- A state is taken between two items, in the thread that pulls them, and copied: it says what comes
  next and nothing else, however far the source has read ahead since.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from rollfleet_common.errors import SettingsError

__all__ = ["STRIDE", "Epochs", "Mark", "Marks", "Stateful", "mark_of"]

#: Positions between two states that are kept: taking one costs more than reading an item again.
STRIDE = 16


@runtime_checkable
class Stateful(Protocol):
    """What a source must have, to be put back where it stood."""

    def state_dict(self) -> Any:
        """Where it stands, between two items."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Iterate from there next time."""
        ...


@dataclass(frozen=True, slots=True)
class Mark:
    """Once `state` is loaded, the source yields the prompt of `position` next."""

    position: int
    state: Any

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a checkpoint."""
        return {"position": self.position, "state": self.state}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Mark":
        """The inverse of :meth:`as_dict`.

        Raises:
            SettingsError: It is no mark.
        """
        try:
            return cls(int(saved["position"]), saved["state"])
        except (KeyError, TypeError, ValueError) as exc:
            raise SettingsError(
                f"the state's field source is none that state_dict() made: {exc!r}"
            ) from exc


class Marks:
    """The states of one source, by position: from the oldest prompt that may be due, on."""

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque()

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, mark: Mark, oldest: int) -> None:
        """Keep a mark, and forget those that no prompt from position `oldest` on needs."""
        self._marks.append(mark)
        while len(self._marks) > 1 and self._marks[1].position <= oldest:
            self._marks.popleft()

    def before(self, position: int) -> Mark | None:
        """The last mark from which `position` can be reached; None if there is none."""
        return next((m for m in reversed(self._marks) if m.position <= position), None)


class Epochs:
    """`source`, again and again: `epochs` passes, or until a pass yields nothing.

    Before each pass, `set_epoch(pass)` is called on the source or its sampler, if they have it. It
    is stateful, and if `source` is, so is the place within a pass. A source that shuffles must do
    so from a seed of its own (a generator, or `set_epoch`): then a pass that is begun again after a
    crash comes in the same order.

    Args:
        source: Can be iterated more than once.
        epochs: How many passes; None for ever.
    """

    def __init__(self, source: Iterable[Any], epochs: int | None = None) -> None:
        if epochs is not None and epochs < 0:
            raise SettingsError(f"epochs is {epochs}; it must be None, or at least 0")
        self.source = source
        self.epochs = epochs
        self._epoch = 0
        self._taken = 0
        self._loaded = False

    def __iter__(self) -> Iterator[Any]:
        items = self._again() if self._loaded else self._begin(0)
        self._loaded = False
        while self.epochs is None or self._epoch < self.epochs:
            for item in items:
                self._taken += 1
                yield item
            if not self._taken:
                return
            items = self._begin(self._epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The pass, the items taken from it, and the source's own state if it has one."""
        inner = self.source.state_dict() if isinstance(self.source, Stateful) else None
        return {"epoch": self._epoch, "taken": self._taken, "source": inner}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on there when iterated next."""
        self._epoch, self._taken = int(state_dict["epoch"]), int(state_dict["taken"])
        self._loaded = True
        self._set_epoch()
        inner = state_dict["source"]
        if inner is not None and isinstance(self.source, Stateful):
            self.source.load_state_dict(inner)

    def _begin(self, epoch: int) -> Iterator[Any]:
        self._epoch, self._taken = epoch, 0
        self._set_epoch()
        return iter(self.source)

    def _again(self) -> Iterator[Any]:
        """What is left of the pass that was loaded."""
        if isinstance(self.source, Stateful):
            return iter(self.source)
        return islice(iter(self.source), self._taken, None)

    def _set_epoch(self) -> None:
        batches = getattr(self.source, "batch_sampler", None)
        samplers = getattr(self.source, "sampler", None), getattr(batches, "sampler", None)
        for each in (self.source, *samplers):
            set_epoch = getattr(each, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
                return


def mark_of(source: Any, position: int) -> Mark | None:
    """Where `source` stands, as it is about to yield `position`; None if it cannot say."""
    state = source.state_dict() if isinstance(source, Stateful) else None
    # Copied: some sources hand out what they go on changing.
    return None if state is None else Mark(position, copy.deepcopy(state))
