"""What a data set yields, as prompts, pulled in a thread of its own.

- Any iterable feeds; it may block (a DataLoader does). A few items are pulled ahead of what is
  submitted, and numbered in order: the number is the position in the data set.
- A bad prompt is refused with its position and field; nothing of it is sent.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import structlog

from rollfleet_common.errors import InvalidPromptError, RollfleetError
from rollfleet_common.keys import check_name
from rollfleet_common.messages import Int32, Kind, Prompt

__all__ = ["Feeder", "to_prompt"]

log = structlog.get_logger("rollfleet.trainer")

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
        return replace(item, group=group, position=position)
    if isinstance(item, Mapping):
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
    n = fields.get("n", group_size)
    if not isinstance(n, int) or n < 1:
        raise InvalidPromptError(f"{where}: field n is {n!r}; it must be an integer of at least 1")
    try:
        return Prompt(
            group=group,
            n=n,
            token_ids=_token_ids(fields.get("token_ids", ()), where),
            data={key: _plain(value) for key, value in data.items()},
            kind=Kind(fields.get("kind", Kind.TRAIN)),
            route=check_name(fields.get("route", "default"), f"{where}: field route"),
            task=str(fields.get("task", "default")),
            position=position,
            sampling=dict(fields.get("sampling", {})),
            deadline_ms=int(fields.get("deadline_ms", 0)),
        )
    except InvalidPromptError:
        raise
    except (TypeError, ValueError) as exc:
        raise InvalidPromptError(f"{where}: {exc}") from exc


def _token_ids(value: Any, where: str) -> Int32:
    raw = np.asarray(value)
    if raw.size == 0:
        return np.zeros(0, np.int32)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise InvalidPromptError(
            f"{where}: field token_ids is {raw.dtype}{list(raw.shape)}; give one row of integers"
        )
    if raw.min() < 0 or raw.max() > _INT32_MAX:
        raise InvalidPromptError(
            f"{where}: field token_ids reaches from {raw.min()} to {raw.max()}; ids are 0 to 2^31 - 1"
        )
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
        loop: Where `take` is awaited.
    """

    def __init__(
        self, source: Iterable[Any], skip: int, group_size: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.source = source
        self.skip = skip
        self.group_size = group_size
        #: Position of the next item that will be pulled.
        self.position = 0
        #: Set when the source is exhausted and everything pulled was taken.
        self.error: RollfleetError | None = None
        self.exhausted = False
        self._loop = loop
        self._ready: deque[Prompt] = deque()
        self._some = asyncio.Event()
        self._room = threading.Semaphore(AHEAD)
        self._stopped = threading.Event()
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
            self._ready.popleft()
            self._room.release()

    def _pull(self) -> None:
        try:
            for position, item in enumerate(self._items()):
                if self._stopped.is_set():
                    return
                if position < self.skip:
                    continue
                prompt = to_prompt(
                    item, group=f"p{position}", group_size=self.group_size, position=position
                )
                self._room.acquire()
                self._tell(lambda prompt=prompt: self._ready.append(prompt))  # type: ignore[misc]
        except RollfleetError as exc:
            self._tell(lambda exc=exc: setattr(self, "error", exc))  # type: ignore[misc]
        except Exception as exc:  # noqa: BLE001 - the user's iterable may raise anything
            error = RollfleetError(f"the source of prompts raised {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            self._tell(lambda: setattr(self, "error", error))
        else:
            self._tell(lambda: setattr(self, "exhausted", True))

    def _items(self) -> Iterator[Any]:
        for item in self.source:
            # A DataLoader with `collate_fn=list` yields lists of items.
            if isinstance(item, list) and item and isinstance(item[0], Mapping | Prompt):
                yield from item
            else:
                yield item

    def _tell(self, change: Callable[[], Any]) -> None:
        def apply() -> None:
            change()
            self._some.set()

        if not self._stopped.is_set():
            self._loop.call_soon_threadsafe(apply)
