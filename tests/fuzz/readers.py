"""Everything that reads bytes which somebody else wrote: one function each, for every fuzzer.

- A reader answers with a message, or raises what its callers catch; anything else is a finding.
- What it answers with must also survive the next step: a header is encoded again, samples are
  checked. Bytes that are a message but cannot be used would only break something later.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rollfleet.records import Plan
from rollfleet_common.board import Shape
from rollfleet_common.codec import (
    decode_header,
    decode_prompt,
    decode_samples,
    encode_header,
    encode_prompt,
    encode_samples,
)
from rollfleet_common.errors import InvalidSampleError, WireError
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Claim
from rollfleet_common.streams import Garbage, Streams, _read_header, _read_tombstone, _sort
from rollfleet_common.validate import check_samples
from rollfleet_console.dead_letters import _letter
from rollfleet_console.status.snapshot import _read_cards, _worker

__all__ = ["MESSAGES", "RECORDS"]

CAP = 1 << 30
_STREAMS = Streams(None, PartitionKeys("fuzz", 0))


def prompt(packed: bytes) -> None:
    try:
        found = decode_prompt(packed)
    except WireError:
        return
    decode_prompt(encode_prompt(found, CAP))


def header(packed: bytes) -> None:
    try:
        found = decode_header(packed)
    except WireError:
        return
    again = decode_header(encode_header(found))
    assert again == found or found.reward != found.reward, "a header that does not come back"


def samples(packed: bytes) -> None:
    try:
        found = decode_samples(packed)
    except WireError:
        return
    try:
        check_samples(found, where="fuzz", need_trained=False)
    except InvalidSampleError:
        return
    decode_samples(encode_samples(found))


def plan(packed: bytes) -> None:
    try:
        found = Plan.loads(1, packed)
    except WireError:
        return
    Plan.loads(1, found.dumps())


def card(packed: bytes) -> None:
    cards, unreadable = _read_cards({b"w": packed}, 0)
    assert len(cards) + len(unreadable) == 1
    for each in cards:
        _worker(each, {}, 0)


def shape(packed: bytes) -> None:
    """The board is the trainer's alone, so nothing needs to catch more than this."""
    try:
        Shape.loads(packed.decode("utf-8", "replace"))
    except (ValueError, KeyError, TypeError, OverflowError):
        return


def claim(fields: Mapping[bytes, bytes]) -> None:
    found = _STREAMS.read_claim("default", "1-1", fields)
    assert isinstance(found, Claim | Garbage)


def arrival(fields: Mapping[bytes, bytes]) -> None:
    for read in (_read_header, _read_tombstone):
        good: list[tuple[str, Any]] = []
        bad: list[Garbage] = []
        _sort(good, bad, "1-1", fields, read)
        assert len(good) + len(bad) == 1


def letter(fields: Mapping[bytes, bytes]) -> None:
    _letter(0, "1-1", fields, 1)


#: Readers of one value.
MESSAGES: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (prompt, header, samples, plan, card, shape)
}
#: Readers of the fields of a stream entry.
RECORDS: dict[str, Callable[[Mapping[bytes, bytes]], None]] = {
    each.__name__: each for each in (claim, arrival, letter)
}
