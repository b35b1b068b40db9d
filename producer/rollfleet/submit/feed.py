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

from rollfleet.submit.resumable import STRIDE, Mark, Marks, Stateful, mark_of
from rollfleet_common.errors import InvalidPromptError, RollfleetError
from rollfleet_common.keys import check_name
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import SAMPLING_FIELDS, Int32, Kind, Prompt

__all__ = ["Feeder", "to_prompt"]

T = TypeVar("T")

log = get_logger("rollfleet.trainer")

#: Prompts pulled ahead of the ledger.
AHEAD = 64
_FIELDS = frozenset(["token_ids", "data", "kind", "route", "task", "sampling", "n", "deadline_ms"])
_INT32_MAX = 2**31 - 1
_NO_IDS: Int32 = np.zeros(0, np.int32)
_SCALARS = frozenset([type(None), bool, int, float, str, bytes])
#: Columns that hold text which was meant to be tokenized.
_TEXTS = ("prompt", "text")


def to_prompt(item: Any, *, group: str, group_size: int, position: int = -1) -> Prompt:
    """A prompt from what a data set yields.

    Args:
        item: A :class:`Prompt`; a mapping; or token ids alone (list, array or tensor of ints). In a
            mapping ``token_ids``, ``n``, ``kind``, ``route``, ``task``, ``sampling`` and
            ``deadline_ms`` are the fields of :class:`Prompt`, and None stands for what is not
            given. Every other key is the user's own, and goes into `Prompt.data`. Or, where columns
            of a data set have reserved names, ``data`` is a mapping with all that is the user's
            own, taken as it is; then nothing else of the user's may stand beside it.
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
        fields = dict(item)
    elif hasattr(item, "__len__") and not isinstance(item, str | bytes):
        fields = {"token_ids": item}
    else:
        raise InvalidPromptError(
            f"{where} is a {type(item).__name__}; give a mapping with token_ids and fields of your "
            "own, or token ids alone"
        )

    def read(name: str, convert: Callable[[Any], T], otherwise: T) -> T:
        value = fields.get(name)
        if value is None:  # what a data set fills in where a row has no such column
            return otherwise
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidPromptError(f"{where}: field {name} is {_shown(value)}: {exc}") from exc

    own = _own(fields, where)
    nothing: dict[str, Any] = {}
    _check_tokenized(fields, own, where)
    return Prompt(
        group=group,
        n=read("n", _count, group_size),
        token_ids=read("token_ids", _token_ids, _NO_IDS),
        data=_plain_fields("data", own, where),
        kind=read("kind", Kind, Kind.TRAIN),
        route=read("route", lambda value: check_name(value, "route"), "default"),
        task=read("task", _text, "default"),
        position=position,
        sampling=_plain_fields("sampling", read("sampling", _sampling, nothing), where),
        deadline_ms=read("deadline_ms", _time, 0),
    )


def _own(fields: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """What is the user's own in an item."""
    beside = {key: value for key, value in fields.items() if key not in _FIELDS}
    whole = fields.get("data")
    if whole is None:
        own = beside
    elif not isinstance(whole, Mapping):
        raise InvalidPromptError(
            f"{where}: field data is a {type(whole).__name__}, not a mapping: it is taken whole as "
            'the data of the prompt; a column of that name goes inside, {"data": {"data": ...}}'
        )
    elif beside:
        raise InvalidPromptError(
            f"{where}: field data is taken whole as the data of the prompt, and "
            f"{', '.join(map(repr, beside))} stand beside it: put everything of your own into data"
        )
    else:
        own = dict(whole)
    for key in own:
        if not isinstance(key, str):
            raise InvalidPromptError(
                f"{where}: its data has the key {key!r:.80} ({type(key).__name__}), no text"
            )
    return {str(key): value for key, value in own.items()}


def _check_tokenized(fields: Mapping[Any, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse an item that was meant to be generated from and has no token ids."""
    if fields.get("token_ids") is not None:
        return
    if "token_ids" in fields and not own:
        raise InvalidPromptError(f"{where}: field token_ids is None, and there is nothing else")
    if fields.get("data") is None and (
        text := next((name for name in _TEXTS if isinstance(own.get(name), str)), None)
    ):
        raise InvalidPromptError(
            f"{where} has {text!r}, which is text, and no token_ids: rollfleet does not tokenize. "
            "Give token_ids, such as those of tokenizer.apply_chat_template(messages, "
            'add_generation_prompt=True); for a workflow that makes its own, give {"data": '
            f"{{{text!r}: ...}}}}"
        )


def _shown(value: Any) -> str:
    """A value in a few words: an array by its dtype and shape."""
    array = value if hasattr(value, "dtype") else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        with contextlib.suppress(ValueError):
            array = np.asarray(value)
    return f"{value!r:.80}" if array is None else f"{array.dtype}{list(array.shape)}"


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("it must be an integer")
    return operator.index(value)


def _count(value: Any) -> int:
    n = _whole(value)
    if not 1 <= n <= _INT32_MAX:
        raise ValueError("it must be an integer of at least 1")
    return n


def _time(value: Any) -> int:
    at = _whole(value)
    if not 0 <= at < 2**63:
        raise ValueError("it must be Unix time in milliseconds, or 0 for never")
    return at


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it must be text, not a {type(value).__name__}")
    return str(value)


def _sampling(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"it must be a mapping, not a {type(value).__name__}")
    for name in value:
        if name not in SAMPLING_FIELDS:
            raise ValueError(
                f"there is no sampling field {name!r}, only {', '.join(SAMPLING_FIELDS)}; what else "
                "a server takes goes into `extra`"
            )
    return {str(name): part for name, part in value.items() if part is not None}


def _token_ids(value: Any) -> Int32:
    raw = np.asarray(value)
    if raw.size == 0:
        return np.zeros(0, np.int32)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise ValueError("give one row of integers")
    if raw.min() < 0 or raw.max() > _INT32_MAX:
        raise ValueError(f"it reaches from {raw.min()} to {raw.max()}; ids are 0 to 2^31 - 1")
    return raw.astype(np.int32)


def _plain_fields(field: str, parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in parts.items():
        try:
            plain[key] = _plain(value)
        except RecursionError:
            raise InvalidPromptError(
                f"{where}: field {field}[{key!r}] is nested too deep"
            ) from None
    return plain


def _plain(value: Any) -> Any:
    """Tensors, arrays and numpy's scalars as Python's, at any depth; a tuple as a list."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list or kind is tuple:
        # Most lists are of one kind of number: nothing is looked at twice.
        return list(value) if _SCALARS.issuperset(map(type, value)) else list(map(_plain, value))
    if isinstance(value, Mapping):
        return {_plain_key(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        made = value.tolist()
        return made if type(made) is kind else _plain(made)
    return value


def _plain_key(key: Any) -> Any:
    return key.tolist() if isinstance(key, np.generic) else key


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

    @property
    def silent(self) -> bool:
        """Whether the source has yielded nothing that is not submitted, and has not ended."""
        return not self._ready and not self.exhausted and self.error is None

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
