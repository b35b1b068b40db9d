"""Any bytes, from anybody: a message or an error of ours, in bounded time and memory.

`fuzz.readers` holds every reader of the wire; here hypothesis feeds them what is almost a message.
`python -m fuzz.coverage_guided` does the same with atheris, for as long as one likes.
"""

import json
import subprocess
import sys
import time
import tracemalloc
from typing import Any, cast

import msgpack
import numpy as np
import pytest
from fuzz import readers
from hypothesis import given, settings
from hypothesis import strategies as st

from rollfleet_common.codec import decode_header, decode_prompt, decode_samples, encode_samples
from rollfleet_common.errors import WireError
from rollfleet_common.messages import Sample, VersionSpans

SPANS = VersionSpans.of([(2, -1), (2, 5)])
IDS = np.arange(4, dtype=np.int32)
SAMPLE = Sample(IDS, IDS >= 2, np.zeros(4, np.float32), SPANS, 1.0, {"c": 1.0}, {"a": IDS})
HEADER = [1, "g", 0, 2, 1, "train", "r", "t", 0, "1-1", "1-1:n", 9, 1, 5, 5, 1, 4, 2, 1.0]
GOOD: dict[str, Any] = {
    "prompt": [1, "g", 2, b"\0" * 8, {"a": 1}, "train", "default", "t", 0, {}, 0],
    "header": [*HEADER, "w", "s", 1, 2, 3],
    "samples": msgpack.unpackb(encode_samples([SAMPLE])),
    "plan": [1, "handed", [[0, "1-1", "train", "1-1:n"]], [[0, "g"]], [[0, "2-1"]]],
    "card": {"id": "w", "seen_ms": 1, "routes": ["r"], "servers": [{"name": "s"}], "slots": 3},
    "shape": {"partitions": 1, "samples_per_version": 8, "max_staleness": 2, "pipeline_depth": 2},
}

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=24),
    st.sampled_from(["train", "eval", "<i4", "|b1", "1-1", 2**31, -1, 0, b""]),
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9)), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A good message of which some parts were replaced, left out, or repeated."""
    fate = draw(st.integers(0, 9))
    if fate == 0:
        return draw(trees)
    if isinstance(tree, dict):
        return {k: draw(changed(v)) for k, v in tree.items() if draw(st.integers(0, 19))}
    if isinstance(tree, list):
        return [draw(changed(v)) for v in tree if draw(st.integers(0, 39))]
    return tree


def packed(name: str, tree: Any) -> bytes:
    if name in ("card", "shape"):
        return json.dumps(tree, default=repr, skipkeys=True).encode()
    return cast("bytes", msgpack.packb(tree))


@pytest.mark.parametrize("name", list(readers.MESSAGES))
@given(data=st.data())
def test_what_is_almost_a_message(name: str, data: st.DataObject) -> None:
    readers.MESSAGES[name](packed(name, data.draw(changed(GOOD[name]))))


@pytest.mark.parametrize("name", list(readers.MESSAGES))
@given(data=st.data())
def test_a_message_that_was_damaged(name: str, data: st.DataObject) -> None:
    raw = bytearray(packed(name, GOOD[name]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    readers.MESSAGES[name](bytes(raw))


@pytest.mark.parametrize("name", list(readers.MESSAGES))
@given(raw=st.binary(max_size=300))
def test_any_bytes(name: str, raw: bytes) -> None:
    readers.MESSAGES[name](raw)


fields = st.dictionaries(
    st.sampled_from([b"g", b"i", b"n", b"a", b"k", b"t", b"p", b"r", b"e", b"d", b"h", b"why"])
    | st.binary(max_size=3),
    st.binary(max_size=24)
    | st.sampled_from([b"0", b"1", b"-1", b"train", b"default", b"g", b"9" * 5000, b"1_0", b" 1"])
    | changed(GOOD["prompt"]).map(lambda tree: packed("prompt", tree))
    | changed(GOOD["header"]).map(lambda tree: packed("header", tree)),
    max_size=10,
)


@pytest.mark.parametrize("name", list(readers.RECORDS))
@given(record=fields)
def test_any_fields_of_a_stream_entry(name: str, record: dict[bytes, bytes]) -> None:
    readers.RECORDS[name](record)


def test_an_entry_without_fields() -> None:
    for read in readers.RECORDS.values():
        read({})


# ---- bounded -----------------------------------------------------------------------------------

KIB = 1024
#: What claims to be large, or is deep, in a few bytes.
BOMBS: dict[str, Any] = {
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a text of 4 billion": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 billion": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 billion": b"\xc9\xff\xff\xff\xff\x01",
    "lists in lists": b"\x91" * (64 * KIB),
    "maps in maps": b"\x81\xa1a" * (64 * KIB),
    "lists that claim all of it": b"\xdd\x00\x00\xff\xff" * (13 * KIB),
    "maps that claim all of it": b"\xdf\x00\x00\xff\xff\x01" * (11 * KIB),
    "numbers that fall together": msgpack.packb([1, {(1 << 61) * k: k for k in range(8)}]),
    "a mask of 2 billion": msgpack.packb(
        [1, [{"ids": b"", "mask": b"\xff\xff\xff\x7f", "lp": b"", "vs": b"", "vv": b"", "r": 0}]]
    ),
    "an array of 8 huge axes": msgpack.packb(
        [1, [GOOD["samples"][1][0] | {"a": {"x": ["<i4", [2**31 - 1] * 8, b"\0" * 8]}}]]
    ),
    "an array of no size": msgpack.packb(
        [1, [GOOD["samples"][1][0] | {"a": {"x": ["<i4", [0, 2**62], b""]}}]]
    ),
}


@pytest.mark.parametrize("name", list(BOMBS))
@pytest.mark.parametrize("decode", [decode_prompt, decode_header, decode_samples])
def test_no_bytes_cost_much(name: str, decode: Any) -> None:
    tracemalloc.start()
    began = time.perf_counter()
    try:
        decode(BOMBS[name])
    except WireError:
        pass
    finally:
        seconds = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert seconds < 2
    # What msgpack sets aside for lists that claim to be long, whatever they are made of.
    assert peak < 128 * KIB * KIB, f"{peak:,} bytes for {len(BOMBS[name]):,}"


NESTED = """
import resource
from rollfleet_common.codec import decode_prompt
from rollfleet_common.errors import WireError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_prompt(b"\\xdd\\x00\\x0f\\xff\\xff" * ((1 << 20) // 5))
except WireError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_prompt_of_the_largest_size_costs_no_more_memory_than_it_may() -> None:
    """Lists in lists, each of which claims as many items as there are bytes: 8 GiB, never touched."""
    said = subprocess.run(
        [sys.executable, "-c", NESTED], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(said.stdout) < 200, f"{said.stdout.strip()} MiB"


@settings(max_examples=25)
@given(size=st.integers(1, 60_000), kind=st.sampled_from([b"\x00", b"\xc0", b"\x90", b"\xa1x"]))
def test_time_grows_with_the_bytes(size: int, kind: bytes) -> None:
    raw = b"\x92\x01\xdd" + size.to_bytes(4, "big") + kind * size
    began = time.perf_counter()
    with pytest.raises(WireError):
        decode_samples(raw)
    assert time.perf_counter() - began < 1
