"""What a data set yields, as prompts, pulled in a thread of its own.

- Any iterable feeds; it may block (a DataLoader does). A few items are pulled ahead of what is
  submitted, and numbered in order: the number is the position in the data set.
- A stateful source's states are kept by position: what was pulled ahead is not lost with them.
- A bad prompt is refused with its position and field; nothing of it is sent.
"""

import asyncio
import contextlib
import operator
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rollfleet.sources import STRIDE, Mark, Marks, Stateful, mark_of
from rollfleet_common.errors import InvalidPromptError, RollfleetError
from rollfleet_common.keys import check_name
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Int32, Kind, Prompt

__all__ = ["Feeder", "to_prompt"]

T = TypeVar("T")

log = get_logger("rollfleet.trainer")

#: Prompts pulled ahead of the ledger.
AHEAD = 64
_FIELDS = frozenset(["token_ids", "data", "kind", "route", "task", "sampling", "n", "deadline_ms"])
_INT32_MAX = 2**31 - 1


def to_prompt(item: Any, *, group: str, group_size: int, position: int = -1) -> Prompt:
    """A prompt from what a data set yields.

    Args:
        item: A :class:`Prompt`; a mapping with `token_ids` and/or fields of your own (what is no
            field of Prompt goes into `data`); or token ids alone (list, array or tensor of ints).
        group: The group's name.
        group_size: Samples, if the item does not say `n`.
        position: Position in the data set.

    Raises:
        InvalidPromptError: The message names position and field.
    """
    where = f"prompt {position}" if position >= 0 else f"prompt of group {group}"
    if isinstance(item, Prompt):
        fields = {name: getattr(item, name) for name in _FIELDS}
    elif isinstance(item, Mapping):
        fields = {str(key): value for key, value in item.items()}
    elif hasattr(item, "__len__") and not isinstance(item, str | bytes):
        fields = {"token_ids": item}
    else:
        raise InvalidPromptError(
            f"{where} is a {type(item).__name__}; give a mapping with token_ids and fields of your "
            "own, or token ids alone"
        )
    own = fields.pop("data", {})
    if not isinstance(own, Mapping):
        raise InvalidPromptError(f"{where}: field data is a {type(own).__name__}, not a mapping")
    data = {**own, **{key: fields.pop(key) for key in [*fields] if key not in _FIELDS}}

    def read(name: str, convert: Callable[[Any], T], otherwise: Any) -> T:
        value = fields.get(name, otherwise)
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidPromptError(f"{where}: field {name} is {_shown(value)}: {exc}") from exc

    return Prompt(
        group=group,
        n=read("n", _count, group_size),
        token_ids=read("token_ids", _token_ids, ()),
        data={key: _plain(value) for key, value in data.items()},
        kind=read("kind", Kind, Kind.TRAIN),
        route=read("route", lambda value: check_name(value, "route"), "default"),
        task=str(fields.get("task", "default")),
        position=position,
        sampling=read("sampling", dict, {}),
        deadline_ms=read("deadline_ms", int, 0),
    )


def _shown(value: Any) -> str:
    """A value in a few words: an array by its dtype and shape."""
    array = value if hasattr(value, "dtype") else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        with contextlib.suppress(ValueError):
            array = np.asarray(value)
    return f"{value!r:.80}" if array is None else f"{array.dtype}{list(array.shape)}"


def _count(value: Any) -> int:
    n = 0 if isinstance(value, bool) else operator.index(value)
    if n < 1:
        raise ValueError("it must be an integer of at least 1")
    return n


def _token_ids(value: Any) -> Int32:
    raw = np.asarray(value)
    if raw.size == 0:
        return np.zeros(0, np.int32)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise ValueError("give one row of integers")
    if raw.min() < 0 or raw.max() > _INT32_MAX:
        raise ValueError(f"it reaches from {raw.min()} to {raw.max()}; ids are 0 to 2^31 - 1")
    return raw.astype(np.int32)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists: what a DataLoader makes of numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


class Feeder:
    """Pulls an iterable in a thread, and hands its prompts to the loop in order.

    Args:
        source: Yields items for :func:`to_prompt`, or lists of such items.
        skip: Items with a lower position were submitted before, and are passed over.
        group_size: Samples of a prompt.
        loop: Where prompts are taken.
        again: Positions below `skip` that are to be submitted all the same.
        stood: Where a stateful source stood; not beyond the first position that is due.
        oldest: Asked, in the loop, for the oldest position that must stay within reach.
        dated: Gives a prompt its deadline by Redis's clock.
    """

    def __init__(
        self,
        source: Iterable[Any],
        skip: int,
        group_size: int,
        loop: asyncio.AbstractEventLoop,
        again: Collection[int] = (),
        stood: Mark | None = None,
        oldest: Callable[[], int] | None = None,
        dated: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ) -> None:
        self.source = source
        self._dated = dated
        self.stood = stood
        #: Where the source stood at the positions that may be due again.
        self.marks = Marks()
        #: Everything below was submitted.
        self.reached = min((skip, *again))
        self._oldest: Callable[[], int] = oldest or (lambda: self.reached)
        self.skip = skip
        self.again = again
        self.group_size = group_size
        #: What the source raised, or yielded; told once everything before it was taken.
        self.error: RollfleetError | None = None
        #: Whether the source has ended.
        self.exhausted = False
        self._loop = loop
        self._ready: deque[Prompt] = deque()
        self._some = asyncio.Event()
        self._room = threading.Semaphore(AHEAD)
        self._stopped = threading.Event()
        if stood is not None:
            self.marks.add(stood, self.reached)
        self._thread = threading.Thread(target=self._pull, name="rollfleet-feed", daemon=True)

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def stop(self) -> None:
        """Pull no more. An item that is being made may still be made, and is forgotten."""
        self._stopped.set()
        self._room.release()

    async def peek(self) -> Prompt | None:
        """The next prompt, once there is one; None when the source is exhausted.

        Raises:
            RollfleetError: The source raised, or yielded what is no prompt.
        """
        while not self._ready:
            if self.error is not None:
                raise self.error
            if self.exhausted:
                return None
            self._some.clear()
            await self._some.wait()
        return self._ready[0]

    def more(self, samples: int) -> Sequence[Prompt]:
        """The prompts at hand that fit into `samples`, in order, without removing them."""
        fit: list[Prompt] = []
        for prompt in self._ready:
            samples -= prompt.n
            if samples < 0:
                break
            fit.append(prompt)
        return fit

    def took(self, count: int) -> None:
        """The first `count` prompts were submitted."""
        for _ in range(count):
            self.reached = self._ready.popleft().position + 1
            self._room.release()

    def _pull(self) -> None:
        try:
            for position, item in self._items():
                if self._stopped.is_set():
                    return
                if position < self.skip and position not in self.again:
                    continue
                prompt = to_prompt(
                    item, group=f"p{position}", group_size=self.group_size, position=position
                )
                prompt = self._dated(prompt)
                self._room.acquire()
                self._tell(lambda prompt=prompt: self._ready.append(prompt))  # type: ignore[misc]
        except RollfleetError as exc:
            self._tell(lambda exc=exc: setattr(self, "error", exc))  # type: ignore[misc]
        except BaseException as exc:  # noqa: BLE001 - the user's iterable may raise anything, and
            # a feed that ended without a word (SystemExit, a cancellation) would be waited for.
            error = RollfleetError(f"the source of prompts raised {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            self._tell(lambda: setattr(self, "error", error))
        else:
            self._tell(lambda: setattr(self, "exhausted", True))

    def _items(self) -> Iterator[tuple[int, Any]]:
        """Items by position, from where the source stood."""
        source, position = self.source, 0
        if self.stood is not None and isinstance(source, Stateful):
            source.load_state_dict(self.stood.state)
            position = self.stood.position
        items = iter(source)
        if self.stood is None:
            self._keep(mark_of(source, position))
        kept = position
        for item in items:
            # A DataLoader with `collate_fn=list` yields lists of items.
            several = isinstance(item, list) and item and isinstance(item[0], Mapping | Prompt)
            for each in item if several else [item]:
                yield position, each
                position += 1
            if position >= kept + STRIDE:
                self._keep(mark_of(source, position))
                kept = position

    def _keep(self, mark: Mark | None) -> None:
        if mark is not None:
            self._tell(lambda: self.marks.add(mark, self._oldest()))

    def _tell(self, change: Callable[[], Any]) -> None:
        def apply() -> None:
            change()
            self._some.set()

        if not self._stopped.is_set():
            try:
                self._loop.call_soon_threadsafe(apply)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._stopped.set()
