"""Sampling out of fields that somebody wrote: a prompt from the wire, or a workflow.

- Whatever comes out is of the types that `Sampling` says; lists from the wire become tuples.
- Only types are judged here: which values make sense is for the server to say.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rollfleet_common.errors import DataError
from rollfleet_engines.interface import Sampling

__all__ = ["sampled"]


def sampled(base: Sampling, fields: Mapping[str, Any]) -> Sampling:
    """`base` with `fields` in place of its own.

    Raises:
        DataError: A field that there is not, or of another type than it must be.
    """
    return replace(base, **{name: _read(name, value) for name, value in fields.items()})


def _read(name: str, value: Any) -> Any:
    if name not in _FIELDS:
        raise DataError(
            f"there is no sampling field {name!r}, only {', '.join(_FIELDS)}; what else a server "
            "takes goes into `extra`"
        )
    what, read = _FIELDS[name]
    try:
        return read(value)
    except (TypeError, ValueError) as exc:
        said = f"{value!r:.80} ({type(value).__name__})"
        raise DataError(f"sampling field {name!r} is {said}; it must be {what}") from exc


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str | bytes) or not math.isfinite(value):
        raise TypeError("no finite number")
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError("no list")
    return tuple(map(_whole, value))


def _seed(value: Any) -> int | None:
    return None if value is None else _whole(value)


def _further(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError("no mapping")
    return value


#: What each field must be, and how it is read.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "max_tokens": ("a whole number", _whole),
    "temperature": ("a finite number", _number),
    "top_p": ("a finite number", _number),
    "top_k": ("a whole number", _whole),
    "min_p": ("a finite number", _number),
    "stop_token_ids": ("a list of whole numbers", _ids),
    "seed": ("a whole number or None", _seed),
    "extra": ("a mapping of names to values", _further),
}
