"""Text and numbers that others wrote: read strictly, and made safe to print.

- Plain fields in Redis hold arbitrary bytes. :func:`whole`, :func:`state_int` and :func:`parse_json`
  return a value or raise ValueError (CodecError for :func:`state_int`), and nothing else.
- A terminal obeys control characters, and JSON written as UTF-8 cannot hold a lone surrogate:
  :func:`printable` and :func:`json_safe` replace both. Everything that prints passes through them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from rollfleet_common.errors import CodecError

__all__ = [
    "I31",
    "I63",
    "broken",
    "cleaned",
    "decoded",
    "json_int",
    "json_safe",
    "parse_json",
    "printable",
    "state_int",
    "whole",
]

T = TypeVar("T")

#: Largest values of 32-bit and 64-bit signed integers: the range of counts, and of ids and times.
I31, I63 = 2**31 - 1, 2**63 - 1
#: Characters of one text that are printed.
PRINTED = 4000
#: Levels of nesting that are printed.
DEPTH = 32

_WHOLE = re.compile(rb"-?[0-9]{1,19}")
# Controls (C0 but for tab and newline, DEL, C1), marks and overrides of direction, line and
# paragraph separators, lone surrogates, and what a terminal draws as nothing.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def decoded(raw: Any) -> str:
    """Bytes of Redis as text; bytes that are no UTF-8 become U+FFFD."""
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)


def whole(raw: Any, least: int = -I63, most: int = I63) -> int:
    """A whole number as it stands in a field: ASCII digits, and a minus sign at most.

    Raises:
        ValueError: It is none, or not within `least` and `most`.
    """
    if not isinstance(raw, bytes) or not _WHOLE.fullmatch(raw):
        raise ValueError(f"{_shown(raw)} is not a whole number")
    number = int(raw)
    if not least <= number <= most:
        raise ValueError(f"{number} is not between {least} and {most}")
    return number


def state_int(key: str, name: str, raw: Any, least: int = -I63, most: int = I63) -> int:
    """:func:`whole` for a field of the run's own state.

    Raises:
        CodecError: It is no such number; the message names the key and the field.
    """
    try:
        return whole(raw, least, most)
    except ValueError as exc:
        raise broken(key, name, str(exc)) from None


def broken(key: str, name: str, why: str) -> CodecError:
    """The error of a field of the run's own state that cannot be read."""
    return CodecError(
        f"field {name!r} of {key} cannot be read: {why}. rollfleet did not write this; put the value "
        "right by hand, or open the run anew with fresh=True"
    )


def parse_json(raw: bytes | str) -> Any:
    """JSON that others wrote.

    Raises:
        ValueError: It is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError(f"{len(raw):,} characters of JSON are nested too deeply") from None


def json_int(value: Any, least: int = -I63, most: int = I63) -> int:
    """A number of JSON as a whole one, its fraction cut off.

    Raises:
        ValueError: It is no number, or not within `least` and `most`.
    """
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is not a number between {least} and {most}")
    return int(value)


def _shown(raw: Any) -> str:
    try:
        text = repr(raw)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"a {type(raw).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str, most: int = PRINTED, *, lines: bool = False) -> str:
    r"""`text` as a terminal or a log may show it.

    Args:
        text: Anything, with escape sequences and all.
        most: Characters that are kept; what was cut is told.
        lines: Keep newlines and tabs; otherwise they are shown as ``\n`` and ``\t``.
    """
    cut = text[:most]
    safe = _UNSAFE.sub(_escaped, cut)
    if not lines:
        safe = safe.replace("\n", "\\n").replace("\t", "\\t")
    else:
        safe = safe.replace("\t", "    ")
    return safe if len(text) <= most else f"{safe}... ({len(text):,} characters)"


def _escaped(found: "re.Match[str]") -> str:
    code = ord(found[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def cleaned(thing: T) -> T:
    """A dataclass, list, tuple or mapping of them with every text in it :func:`printable`.

    What is none of these stays as it is.
    """
    return _cleaned(thing)  # type: ignore[no-any-return]


def _cleaned(thing: Any) -> Any:
    if type(thing) is str:
        return printable(thing)
    if isinstance(thing, list | tuple):
        return type(thing)(_cleaned(each) for each in thing)
    if isinstance(thing, Mapping):
        return {_cleaned(key): _cleaned(value) for key, value in thing.items()}
    if is_dataclass(thing) and not isinstance(thing, type):
        changed = {f.name: _cleaned(getattr(thing, f.name)) for f in fields(thing) if f.init}
        return replace(thing, **changed)
    return thing


def json_safe(tree: Any, depth: int = DEPTH) -> Any:
    """`tree` in types that JSON knows, with every text :func:`printable` and nesting bounded.

    Bytes become hex, keys text, numbers that JSON has no word for (NaN, infinities) text.
    """
    if isinstance(tree, str):
        return printable(tree, lines=True)
    if tree is None or isinstance(tree, bool | int):
        return tree
    if isinstance(tree, float):
        return tree if tree - tree == 0 else repr(tree)
    if isinstance(tree, bytes):
        return tree.hex()
    if depth <= 0:
        return "..."
    if isinstance(tree, Mapping):
        return {printable(str(k)): json_safe(v, depth - 1) for k, v in tree.items()}
    if isinstance(tree, Iterable):
        return [json_safe(v, depth - 1) for v in tree]
    return printable(str(tree))
