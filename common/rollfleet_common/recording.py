"""A recording: the rollouts that a run trained on or dropped, in one file that only grows.

- Msgpack, one message after the other: first who and what, then a row for every rollout, in the
  order in which the trainer settled them. Headers and payloads are the bytes of the wire.
- A file that was cut off (a crash, a full disk) is read to its last whole row.
- Rows can be read by anything that reads msgpack; docs/wire.md has the fields.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgpack

from rollfleet_common.codec import decode_header
from rollfleet_common.errors import CodecError, SchemaError, WireError
from rollfleet_common.messages import NO_VERSION, Header

__all__ = ["RECORDING", "Row", "Writer", "read_rows"]

#: Version of the file's form.
RECORDING = 1
_MAGIC = "rollfleet recording"
_READ_BYTES = 1 << 20
#: No row is longer: rollouts have a cap far below it.
_MAX_ROW_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout, and what became of it."""

    #: "" if it was trained on, else why it was dropped.
    dropped: str
    #: Number of the batch that it was trained in, and the trainer's version when that batch was
    #: handed over; 0 and NO_VERSION for what was dropped.
    batch: int
    version: int
    header: Header
    #: None: it was gone before it could be recorded.
    payload: bytes | None

    @classmethod
    def of(cls, verb: str, header: bytes, payload: bytes | None) -> "Row":
        """What a partition's tap says: ``commit[:batch:version]`` or ``drop:<reason>``.

        Raises:
            CodecError, SchemaError: `verb` or `header` is none of ours, or `payload` is no bytes.
        """
        if payload is not None and not isinstance(payload, bytes):
            raise CodecError(f"the payload is {type(payload).__name__}, not bytes")
        verdict, _, rest = verb.partition(":")
        if verdict == "drop" and rest:
            return cls(rest, 0, NO_VERSION, decode_header(header), payload)
        batch, _, version = rest.partition(":")
        if verdict != "commit":
            raise CodecError(f"the tap says {verb!r}, which is neither commit nor drop")
        try:
            number, at = int(batch or 0), int(version or NO_VERSION)
        except ValueError:
            raise CodecError(f"the tap says {verb!r}, which names no batch") from None
        return cls("", number, at, decode_header(header), payload)


class Writer:
    """Appends rows to a file.

    Raises:
        OSError: The file cannot be made; one that exists is never overwritten.
    """

    def __init__(self, path: Path, run: str) -> None:
        # Unbuffered: what a buffer held would be written twice if we were forked.
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._packer = msgpack.Packer()
        #: Bytes written so far.
        self.bytes = 0
        self._write([_MAGIC, RECORDING, run])

    def write(self, verb: str, header: bytes, payload: bytes | None) -> None:
        """Append one rollout, as the tap told it."""
        self._write([verb, header, payload])

    def flush(self) -> None:
        """What was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, row: list[Any]) -> None:
        packed = self._packer.pack(row)
        self.bytes += len(packed)
        left = memoryview(packed)
        while left:
            left = left[self._file.write(left) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a recording, in order; a last one that was cut off is left out.

    Raises:
        CodecError, SchemaError: It is no recording, one of another release, or damaged.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(
            file, read_size=_READ_BYTES, max_buffer_size=_MAX_ROW_BYTES, strict_map_key=False
        )
        messages = _messages(unpacker, path)
        head = next(messages, None)
        if not isinstance(head, list) or len(head) < 2 or head[0] != _MAGIC:
            raise CodecError(f"{path} is no recording of rollfleet")
        if head[1] != RECORDING:
            raise SchemaError(
                f"{path} is a recording of form {head[1]!r}, this release reads {RECORDING}"
            )
        for number, message in enumerate(messages, 1):
            try:
                verb, header, payload = message
                row = Row.of(verb, header, payload)
            except (ValueError, TypeError, AttributeError, WireError) as exc:
                raise CodecError(f"{path}, row {number}: {type(exc).__name__}: {exc}") from exc
            yield row


def _messages(unpacker: Any, path: Path) -> Iterator[Any]:
    try:
        yield from unpacker
    except Exception as exc:
        raise CodecError(f"{path}, near byte {unpacker.tell():,}: {exc}") from exc
