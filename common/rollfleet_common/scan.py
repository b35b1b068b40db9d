"""msgpack without copies: large byte strings stay where they are, as views into the message.

- What comes out is what msgpack gives, but for views in place of large ``bytes``. Whatever is out of
  the ordinary, broken bytes first of all, is left to msgpack itself: it alone refuses.
- Bounded: beyond :data:`MAX_DEPTH` levels or :data:`MAX_VALUES` values, msgpack takes over, too.
- The usual payload (one sequence in our own order of keys) is not looked at value by value: its two
  large arrays are cut out, and msgpack reads the hundred bytes around them.
"""

import struct
from contextlib import suppress
from typing import Any

import msgpack

__all__ = ["VIEW_BYTES", "unpack", "unpack_usual"]

#: Byte strings of this length and more are views; to copy a smaller one costs less than a view.
VIEW_BYTES = 512
#: Levels of lists and maps that are looked at here.
MAX_DEPTH = 8
#: Values in lists and maps that are looked at here.
MAX_VALUES = 4096
#: Messages of this length and more are looked at here; msgpack copies a smaller one faster.
_SCAN_BYTES = 4096
#: What may follow the arrays of a usual payload.
_REST_BYTES = 1024

_U16 = struct.Struct(">H").unpack_from
_U32 = struct.Struct(">I").unpack_from
_F32 = struct.Struct(">f").unpack_from
_F64 = struct.Struct(">d").unpack_from

#: Bytes and signedness of integers by their type byte.
_INTEGERS = {
    **{0xCC + k: (1 << k, False) for k in range(4)},
    **{0xD0 + k: (1 << k, True) for k in range(4)},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
#: What reading bytes that are not as expected may raise, here and in msgpack.
_UNUSUAL = (ValueError, TypeError, LookupError, struct.error, msgpack.UnpackException)


def unpack(packed: bytes) -> Any:
    """The one value that `packed` is.

    Byte strings of at least :data:`VIEW_BYTES` are read-only memoryviews, which keep `packed` alive.

    Raises:
        Exception: What `msgpack.unpackb` raises: it is not msgpack, or more than one value.
    """
    if len(packed) >= _SCAN_BYTES:
        with suppress(*_UNUSUAL):
            value, end = _Scan(packed).value(0, MAX_DEPTH)
            if end == len(packed):
                return value
    return msgpack.unpackb(packed, strict_map_key=False)


def unpack_usual(packed: bytes) -> dict[str, Any] | None:
    """The sequence of a payload of one, written as we write it, with views of "ids" and "lp".

    None if it is anything else, or broken: ask :func:`unpack`.
    """
    p = packed
    # An array of 2, schema 1, an array of 1, a map of at least 2 that begins with "ids".
    if p[:3] != b"\x92\x01\x91" or p[4:8] != b"\xa3ids" or not 0x82 <= p[3] <= 0x8F:
        return None
    try:
        ids, ids_end = _large(p, 8)
        if p[ids_end : ids_end + 3] != b"\xa2lp":
            return None
        logprobs, end = _large(p, ids_end + 3)
        if not 0 <= len(p) - end <= _REST_BYTES:
            return None
        # The map again, without the two. If there is anything behind it, this raises.
        rest = msgpack.unpackb(bytes((p[3] - 2,)) + p[end:], strict_map_key=False)
    except _UNUSUAL:
        return None
    view = memoryview(p)
    # A key that comes twice has its last value.
    return {"ids": view[ids:ids_end], "lp": view[logprobs:end], **rest}


def _large(p: bytes, at: int) -> tuple[int, int]:
    """Where the byte string at `at` begins and ends."""
    kind = p[at]
    if kind == 0xC5:
        return at + 3, at + 3 + int(_U16(p, at + 1)[0])
    if kind == 0xC6:
        return at + 5, at + 5 + int(_U32(p, at + 1)[0])
    raise ValueError("no large byte string")


class _Scan:
    """One message, read from left to right; whatever is unusual raises."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.view = memoryview(packed)
        self.left = MAX_VALUES

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends."""
        p = self.packed
        kind = p[at]
        at += 1
        if kind < 0x80:
            return kind, at
        if kind >= 0xE0:
            return kind - 0x100, at
        if kind < 0xC0:
            if kind >= 0xA0:
                return self._text(at, kind & 31)
            return self._many(kind < 0x90, at, kind & 15, depth)
        if kind in _CONSTANTS:
            return _CONSTANTS[kind], at
        if kind in _INTEGERS:
            size, signed = _INTEGERS[kind]
            return int.from_bytes(p[at : at + size], "big", signed=signed), at + size
        if kind == 0xCB:
            return _F64(p, at)[0], at + 8
        if kind == 0xCA:
            return _F32(p, at)[0], at + 4
        return self._sized(kind, at, depth)

    def _sized(self, kind: int, at: int, depth: int) -> tuple[Any, int]:
        """A value whose length is written in 1, 2 or 4 bytes."""
        p = self.packed
        if kind in (0xC4, 0xD9):
            size, at = p[at], at + 1
        elif kind in (0xC5, 0xDA, 0xDC, 0xDE):
            size, at = _U16(p, at)[0], at + 2
        elif kind in (0xC6, 0xDB, 0xDD, 0xDF):
            size, at = _U32(p, at)[0], at + 4
        else:
            raise ValueError(f"type byte {kind:#x}")
        if kind <= 0xC6:
            part = self.view[at : at + size]
            return part if size >= VIEW_BYTES else bytes(part), at + size
        if kind <= 0xDB:
            return self._text(at, size)
        return self._many(kind >= 0xDE, at, size, depth)

    def _text(self, at: int, size: int) -> tuple[str, int]:
        return str(self.packed[at : at + size], "utf-8"), at + size

    def _many(self, is_map: bool, at: int, size: int, depth: int) -> tuple[Any, int]:
        self.left -= size
        if not depth or self.left < 0:
            raise ValueError("too deep or too many")
        if not is_map:
            values: list[Any] = []
            for _ in range(size):
                value, at = self.value(at, depth - 1)
                values.append(value)
            return values, at
        fields: dict[str, Any] = {}
        for _ in range(size):
            key, at = self.value(at, depth - 1)
            if type(key) is not str:
                raise TypeError("a key that is no text")
            fields[key], at = self.value(at, depth - 1)
        return fields, at
