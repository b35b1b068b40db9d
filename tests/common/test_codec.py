"""The wire: what goes in comes out, what is not ours is refused, and the bytes stay the same."""

import math
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from rollfleet_common.codec import (
    decode_header,
    decode_prompt,
    decode_samples,
    encode_header,
    encode_prompt,
    encode_samples,
)
from rollfleet_common.errors import (
    CodecError,
    InvalidPromptError,
    OversizeError,
    SchemaError,
    WireError,
)
from rollfleet_common.limits import Limits
from rollfleet_common.messages import Header, Kind, Prompt, Sample, VersionSpans

CAP = 1 << 20
DECODERS = (decode_prompt, decode_header, decode_samples)

# ---- golden bytes: docs/wire.md shows the same ones -------------------------------------------

PROMPT = Prompt(
    group="g1",
    n=8,
    token_ids=np.array([1, 2, 300], np.int32),
    data={"answer": "42"},
    task="math",
    position=7,
    sampling={"temperature": 0.5},
)
PROMPT_HEX = (
    "9b01a2673108c40c01000000020000002c01000081a6616e73776572a23432a5747261696ea764656661756c74"
    "a46d6174680781ab74656d7065726174757265cb3fe000000000000000"
)
HEADER = Header(
    group="g1",
    index=3,
    n=8,
    attempt=1,
    kind=Kind.TRAIN,
    route="default",
    task="math",
    position=7,
    entry="1700000000000-0",
    payload="1700000000000-0:ab12",
    payload_bytes=163,
    epoch=2,
    min_version=5,
    max_version=5,
    samples=1,
    tokens=4,
    trained_tokens=2,
    reward=1.0,
    worker="w1",
    server="http://s1",
    queue_ms=12,
    generate_ms=340,
    reward_ms=5,
)
HEADER_HEX = (
    "dc001801a26731030801a5747261696ea764656661756c74a46d61746807af313730303030303030303030302d"
    "30b4313730303030303030303030302d303a61623132cca3020505010402cb3ff0000000000000a27731a96874"
    "74703a2f2f73310ccd015405"
)
SAMPLE = Sample(
    token_ids=np.array([1, 2, 300, 4], np.int32),
    loss_mask=np.array([False, False, True, True]),
    logprobs=np.array([0, 0, -0.5, -1.5], np.float32),
    versions=VersionSpans.of([(2, -1), (2, 5)]),
    reward=1.0,
    components={"fmt": 0.5},
    arrays={"score": np.array([[1], [2], [3], [4]], np.uint8)},
    metrics={"turns": 2.0},
)
PAYLOAD_HEX = (
    "9201918aa3696473c41001000000020000002c01000004000000a26c70c4100000000000000000000000bf0000"
    "c0bfa46d61736bc4080200000002000000a27673c4080000000002000000a27676c408ffffffff05000000a172"
    "cb3ff0000000000000a166a473746f70a16381a3666d74cb3fe0000000000000a16d81a57475726e73cb400000"
    "0000000000a16181a573636f726593a37c7531920401c40401020304"
)


def same(a: Any, b: Any) -> bool:
    """Whether two messages are equal, arrays with their dtypes."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


HOW = {"logprobs_kind": "tempered", "temperature": 0.7, "context_full": True}


def test_how_a_sample_was_sampled_travels_in_keys_of_its_own() -> None:
    told = replace(SAMPLE, **HOW)
    assert same(decode_samples(encode_samples([told])), (told,))
    # Large arrays take the short cut of usual payloads.
    large = replace(
        told,
        token_ids=np.zeros(4096, np.int32),
        logprobs=np.zeros(4096, np.float32),
        loss_mask=np.arange(4096) > 9,
    )
    assert same(decode_samples(encode_samples([large])), (large,))
    # Older readers ignore them, older writers do not write them.
    raw = msgpack.unpackb(encode_samples([told]))
    assert {name: raw[1][0].pop(name) for name in ("lk", "t", "cx")} == {
        "lk": "tempered",
        "t": 0.7,
        "cx": True,
    }
    assert same(decode_samples(msgpack.packb(raw)), (SAMPLE,))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "hot", None, [1.0]])
def test_a_temperature_that_is_none_is_refused(value: object) -> None:
    raw = msgpack.unpackb(encode_samples([SAMPLE]))
    raw[1][0]["t"] = value
    with pytest.raises(CodecError, match="sample 0"):
        decode_samples(msgpack.packb(raw))


@pytest.mark.parametrize("value", ["cooked", "", 7, None])
def test_another_kind_of_logprobs_is_unknown(value: object) -> None:
    raw = msgpack.unpackb(encode_samples([SAMPLE]))
    raw[1][0]["lk"] = value
    assert decode_samples(msgpack.packb(raw))[0].logprobs_kind == "unknown"


def test_golden_bytes() -> None:
    assert encode_prompt(PROMPT, CAP).hex() == PROMPT_HEX
    assert encode_header(HEADER).hex() == HEADER_HEX
    assert encode_samples([SAMPLE]).hex() == PAYLOAD_HEX
    assert same(decode_prompt(bytes.fromhex(PROMPT_HEX)), PROMPT)
    assert same(decode_header(bytes.fromhex(HEADER_HEX)), HEADER)
    assert same(decode_samples(bytes.fromhex(PAYLOAD_HEX)), (SAMPLE,))


def test_the_documented_bytes_are_these() -> None:
    wire = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    joined = wire.replace("\n", "")
    for golden in (PROMPT_HEX, HEADER_HEX, PAYLOAD_HEX):
        assert golden in joined


# ---- round trips ------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
int64 = st.integers(-(2**63), 2**63 - 1)
small = st.integers(0, 2**31 - 1)
keys = st.none() | st.booleans() | int64 | numbers | st.text(max_size=8) | st.binary(max_size=8)
plain = st.recursive(
    keys | st.integers(-(2**63), 2**64 - 1) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
ids = stn.arrays(np.int32, st.integers(0, 40), elements=st.integers(0, 2**31 - 1))
prompts = st.builds(
    Prompt,
    group=names,
    n=st.integers(1, 64),
    token_ids=ids,
    data=st.dictionaries(names, plain, max_size=4),
    kind=st.sampled_from(Kind),
    route=names,
    task=names,
    position=st.integers(-1, 2**63 - 1),
    sampling=st.dictionaries(names, plain, max_size=3),
    deadline_ms=st.integers(0, 2**63 - 1),
)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Headers whose numbers a payload could bear out."""
    n = draw(st.integers(1, 2**31 - 1))
    tokens = draw(st.integers(1, 2**31 - 1))
    drawn: dict[str, Any] = {
        f.name: draw({str: names, int: small, Kind: st.sampled_from(Kind)}[f.type])  # type: ignore[index]
        for f in fields(Header)
        if f.type in (str, int, Kind)
    }
    drawn |= {
        "n": n,
        "index": draw(st.integers(0, n - 1)),
        "attempt": draw(st.integers(1, 2**31 - 1)),
        "position": draw(st.integers(-1, 2**63 - 1)),
        "min_version": draw(st.integers(-1, 2**31 - 1)),
        "max_version": draw(st.integers(-1, 2**31 - 1)),
        "tokens": tokens,
        "samples": draw(st.integers(1, tokens)),
        "trained_tokens": draw(st.integers(0, tokens)),
        "reward": draw(st.floats(width=32, allow_nan=False, allow_infinity=False)),
    }
    return Header(**drawn)


array_dtypes = st.sampled_from(["?", "u1", "i1", "<i2", "<i4", "<i8", "<u4", "<f2", "<f4", "<f8"])


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    tokens = draw(st.integers(1, 40))
    runs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 5)), min_size=1, max_size=6))
    length = sum(n for n, _ in runs)
    tokens = max(tokens, length)
    runs.append((tokens - length, 6))
    shapes = stn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    arrays = st.dictionaries(names, array_dtypes.flatmap(lambda d: stn.arrays(d, shapes)))
    return Sample(
        token_ids=draw(stn.arrays(np.int32, tokens, elements=st.integers(0, 2**31 - 1))),
        loss_mask=draw(stn.arrays(np.bool_, tokens)),
        logprobs=draw(stn.arrays(np.float32, tokens, elements=st.floats(-50, 0, width=32))),
        versions=VersionSpans.of(runs),
        reward=draw(numbers),
        components=draw(st.dictionaries(names, numbers, max_size=2)),
        arrays={
            # NaN is not equal to itself, which is all that this test could find out about it.
            name: np.nan_to_num(array) if array.dtype.kind == "f" else array
            for name, array in draw(arrays).items()
        },
        metrics=draw(st.dictionaries(names, numbers, max_size=2)),
        finish_reason=draw(names),
    )


@given(prompts)
def test_prompts_come_back(prompt: Prompt) -> None:
    assert same(decode_prompt(encode_prompt(prompt, CAP)), prompt)


@given(headers())
def test_headers_come_back(header: Header) -> None:
    assert same(decode_header(encode_header(header)), header)


@given(st.lists(samples(), max_size=3))
def test_payloads_come_back_forks_and_all(forks: list[Sample]) -> None:
    assert same(decode_samples(encode_samples(forks)), tuple(forks))


def test_big_endian_arrays_travel_as_little_endian() -> None:
    sample = Sample(
        token_ids=np.array([1, 2], ">i4"),
        loss_mask=np.array([False, True]),
        logprobs=np.array([0, -1], ">f4"),
        versions=VersionSpans.constant(1),
        reward=0.0,
        arrays={"x": np.array([1.5], ">f8")},
    )
    (back,) = decode_samples(encode_samples([sample]))
    assert back.token_ids.tolist() == [1, 2]
    assert back.arrays["x"].dtype == np.dtype("<f8")
    assert back.arrays["x"].tolist() == [1.5]


def test_decoded_arrays_cannot_be_written() -> None:
    (back,) = decode_samples(bytes.fromhex(PAYLOAD_HEX))
    with pytest.raises(ValueError, match="read-only"):
        back.token_ids[0] = 1


# ---- bytes that are not ours ------------------------------------------------------------------


def _message_or_wire_error(packed: bytes) -> None:
    for decode in DECODERS:
        with suppress(WireError):
            decode(packed)


def pack(raw: Any) -> bytes:
    packed: bytes | None = msgpack.packb(raw)
    assert packed is not None
    return packed


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_wire_error(packed: bytes) -> None:
    _message_or_wire_error(packed)


@given(
    st.sampled_from([PROMPT_HEX, HEADER_HEX, PAYLOAD_HEX]).map(bytes.fromhex),
    st.lists(st.tuples(st.integers(0, 162), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 163),
)
def test_broken_messages_give_a_message_or_a_wire_error(
    packed: bytes, changes: list[tuple[int, int]], keep: int
) -> None:
    broken = bytearray(packed)
    for at, byte in changes:
        broken[at % len(broken)] = byte
    _message_or_wire_error(bytes(broken))
    _message_or_wire_error(packed[:keep])


_SAMPLE: dict[str, Any] = {
    "ids": b"\1\0\0\0",
    "lp": b"\0\0\0\0",
    "mask": b"\0\0\0\0\1\0\0\0",
    "vs": b"\0\0\0\0",
    "vv": b"\0\0\0\0",
    "r": 0.0,
    "f": "stop",
}


@given(st.sampled_from([*_SAMPLE, "a", "c", "m"]), plain)
def test_any_value_in_a_sample_gives_a_payload_or_a_wire_error(field: str, value: Any) -> None:
    _message_or_wire_error(pack([1, [{**_SAMPLE, field: value}]]))


@given(st.sampled_from(["<f4", "|b1"]), plain, plain)
def test_any_array_in_a_sample_gives_a_payload_or_a_wire_error(
    dtype: str, shape: Any, data: Any
) -> None:
    _message_or_wire_error(pack([1, [{**_SAMPLE, "a": {"x": [dtype, shape, data]}}]]))


def test_an_array_of_endless_length_is_a_wire_error() -> None:
    with pytest.raises(CodecError):
        decode_samples(pack([1, [{**_SAMPLE, "a": {"x": ["<f4", [float("inf")], b""]}}]]))


@pytest.mark.parametrize(
    ("fields_of", "says"),
    [
        ({"mask": b"\xff\xff\xff\x7f" * 3}, "do not add up to 1 tokens"),  # 6 billion tokens
        ({"mask": b"\xff\xff\xff\xff\2\0\0\0"}, "do not add up"),  # a run of -1
        ({"ids": "text"}, "ids is a str, not bytes"),
        ({"r": "0.5"}, "r holds a str, not a number"),
        ({"r": b"1"}, "r holds a bytes, not a number"),
        ({"r": True}, "r holds a bool, not a number"),
        ({"f": b"stop"}, "f holds a bytes, not text"),
        ({"f": None}, "f holds a NoneType, not text"),
        ({"c": {"fmt": "1.5"}}, "c holds a str, not a number"),
        ({"c": {b"fmt": 1.5}}, "c holds a bytes, not text"),
        ({"m": {"turns": b"1"}}, "m holds a bytes, not a number"),
        ({"a": {3: ["<f4", [0], b""]}}, "a holds a int, not text"),
        ({"a": {"x": ["<f4", "3", b"\0" * 12]}}, "shape '3', not a list of lengths"),
        ({"a": {"x": ["<f4", ["3"], b"\0" * 12]}}, "shape ['3'], not a list of lengths"),
        ({"a": {"x": ["<f4", [3.0], b"\0" * 12]}}, "shape [3.0], not a list of lengths"),
        ({"a": {"x": ["<f4", [-1], b"\0" * 12]}}, "shape [-1], not a list of lengths"),
        ({"a": {"x": ["<f4", [0, 2**40], b""]}}, "and no values"),
        ({"lp": b"\0\0\0"}, "lp has 3 bytes, no multiple of 4"),
        ({"c": [1]}, "c is a list, not a map of numbers"),
        ({"a": {"x": ["|O", [1], b"\0" * 8]}}, "array 'x' has dtype '|O'"),
        ({"a": {"x": ["<f4", [1] * 9, b"\0" * 4]}}, "9 dimensions, more than 8"),
        ({"a": {"x": ["<f4", [2**40], b"\0" * 4]}}, "payload, sample 0"),
        ({"a": {"x": ["<f4", [2], b"\0" * 4]}}, "payload, sample 0"),
    ],
)
def test_malformed_samples_are_named(fields_of: dict[str, Any], says: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode_samples(pack([1, [{**_SAMPLE, **fields_of}]]))
    assert says in str(caught.value)


def test_lengths_that_the_bytes_do_not_hold_cost_nothing() -> None:
    # msgpack's array32 and bin32 with 4 billion elements, of which none follows.
    for bomb in (b"\xdd\xff\xff\xff\xff", b"\x92\x01\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        for decode in DECODERS:
            with pytest.raises(CodecError):
                decode(bomb)
    with pytest.raises(CodecError):
        decode_samples(b"\x91" * 100_000)  # nested beyond msgpack's stack


def test_another_wire_version_is_told_apart() -> None:
    for decode in DECODERS:
        with pytest.raises(SchemaError, match="wire version 2, this release speaks 1"):
            decode(pack([2, "whatever came later"]))


def test_fields_are_counted_and_typed() -> None:
    with pytest.raises(CodecError, match="header has 1 fields, not 23"):
        decode_header(pack([1, "g"]))
    raw = msgpack.unpackb(bytes.fromhex(HEADER_HEX))
    with pytest.raises(CodecError, match="header, field 1: a str, not a int"):
        decode_header(pack([*raw[:2], "3", *raw[3:]]))
    with pytest.raises(CodecError, match="'nonsense' is not a valid Kind"):
        decode_header(pack([*raw[:5], "nonsense", *raw[6:]]))
    # Other languages write a whole float as an int.
    assert decode_header(pack([*raw[:18], 1, *raw[19:]])).reward == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": -7}, "tokens is -7, not from 1 to"),
        ({"tokens": 2**64 - 1}, "tokens is 18446744073709551615, not from 1 to"),
        ({"samples": 0}, "samples is 0, not from 1 to 4"),
        ({"samples": 5}, "samples is 5, not from 1 to 4"),
        ({"trained_tokens": 5}, "trained_tokens is 5, not from 0 to 4"),
        ({"trained_tokens": -1}, "trained_tokens is -1"),
        ({"index": 8}, "index is 8"),
        ({"index": -1}, "index is -1"),
        ({"n": 0}, "index is "),
        ({"n": 2**40}, "n is 1099511627776"),
        ({"attempt": 0}, "attempt is 0"),
        ({"position": -2}, "position is -2"),
        ({"payload_bytes": -1}, "payload_bytes is -1"),
        ({"epoch": -1}, "epoch is -1"),
        ({"min_version": -2}, "min_version is -2"),
        ({"max_version": 2**31}, "max_version is 2147483648"),
        ({"reward": float("nan")}, "reward is nan, no number that float32 holds"),
        ({"reward": float("inf")}, "reward is inf"),
        ({"reward": 1e39}, "reward is 1e+39"),
        ({"queue_ms": -1}, "queue_ms is -1"),
        ({"generate_ms": 2**63}, "generate_ms is 9223372036854775808"),
        ({"reward_ms": -5}, "reward_ms is -5"),
    ],
)
def test_a_header_that_no_payload_could_bear_out_is_garbage(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CodecError) as caught:
        decode_header(encode_header(replace(HEADER, **changes)))
    assert says in str(caught.value)


def test_a_prompt_out_of_range_is_garbage() -> None:
    raw = msgpack.unpackb(bytes.fromhex(PROMPT_HEX), strict_map_key=False)
    for at, value, says in (
        (2, 0, "n is 0"),
        (3, np.array([-1], np.int32).tobytes(), "token_ids holds -1"),
        (4, {1: 2}, "data has the key 1"),
        (8, -2, "position is -2"),
        (9, {b"a": 2}, "sampling has the key b'a'"),
        (10, -1, "deadline_ms is -1"),
    ):
        with pytest.raises(CodecError, match=says):
            decode_prompt(pack([*raw[:at], value, *raw[at + 1 :]]))


# ---- caps --------------------------------------------------------------------------------------

LIMITS = Limits(samples=2, tokens=8, spans=6, names=3)


@pytest.mark.parametrize(
    ("forks", "says"),
    [
        ([SAMPLE], ""),
        ([SAMPLE] * 2, "8 version spans and mask runs"),
        ([SAMPLE] * 3, "3 sequences in one rollout, over the cap of 2 (max_rollout_samples)"),
        ([replace(SAMPLE, token_ids=np.zeros(9, np.int32))], "9 tokens in one sequence"),
        ([replace(SAMPLE, metrics={"a": 1.0, "b": 2.0})], "4 named numbers and arrays"),
    ],
)
def test_what_is_over_a_cap_is_refused(forks: list[Sample], says: str) -> None:
    packed = encode_samples(forks)
    if not says:
        assert len(decode_samples(packed, LIMITS)) == 1
        return
    with pytest.raises(OversizeError) as caught:
        decode_samples(packed, LIMITS)
    assert says in str(caught.value)


def test_the_reader_that_copies_nothing_has_the_same_caps() -> None:
    tokens = 1000
    long = Sample(
        token_ids=np.zeros(tokens, np.int32),
        loss_mask=np.ones(tokens, np.bool_),
        logprobs=np.zeros(tokens, np.float32),
        versions=VersionSpans.constant(1),
        reward=0.0,
    )
    packed = encode_samples([long])
    decode_samples(packed, Limits(tokens=1000, spans=3, names=0))
    with pytest.raises(OversizeError, match="1,000 tokens in one sequence, over the cap of 999"):
        decode_samples(packed, Limits(tokens=999))


# ---- prompts that cannot travel ---------------------------------------------------------------


def prompt(**changes: Any) -> Prompt:
    return Prompt(**{"group": "g", "n": 1, "token_ids": np.array([1], np.int32), **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"ok": 1, "image": object()}}, "field data['image'] (object)"),
        ({"data": {"big": 2**80}}, "field data['big'] (int)"),
        ({"sampling": {"seed": np.int64(3)}}, "field sampling['seed'] (int64)"),
        ({"task": b"x".decode() + "\ud800"}, "field task (str)"),
        ({"data": {"set": {1, 2}}}, "field data['set'] (set)"),
        ({"data": {"grid": {(0, 1): 5}}}, "field data['grid'] (dict) cannot be encoded"),
        ({"data": {"grid": [{"a": {((),): 5}}]}}, "field data['grid'] (list) cannot be encoded"),
        ({"data": {3: 4}}, "data has the key 3, no text"),
        ({"sampling": {b"seed": 4}}, "sampling has the key b'seed', no text"),
        ({"n": 0}, "n is 0, not from 1"),
        ({"n": 2**31}, "n is 2147483648, not from 1"),
        ({"n": True}, "a bool, not a int"),
        ({"position": -2}, "position is -2"),
        ({"deadline_ms": -1}, "deadline_ms is -1"),
        ({"token_ids": np.array([4, -3], np.int32)}, "token_ids holds -3"),
    ],
)
def test_what_cannot_be_encoded_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        encode_prompt(prompt(**changes), CAP)
    assert says in str(caught.value)


#: Values of every kind that a data set may hold, and what msgpack cannot take or give back.
anything = st.recursive(
    keys
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=4)
    | st.sampled_from([object(), {1}, 1j, bytearray(b"x"), ("\ud800",)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys | st.tuples(keys) | st.text(st.characters(codec=None)), inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(names | keys, anything, max_size=3))
def test_what_can_be_encoded_can_be_decoded(data: dict[Any, Any]) -> None:
    try:
        packed = encode_prompt(prompt(data=data), CAP)
    except InvalidPromptError:
        return
    once = decode_prompt(packed)
    assert same(decode_prompt(encode_prompt(once, CAP)), once)


@pytest.mark.parametrize("depth", [1, 100, 300, 500, 508, 509, 510, 511, 512, 1000, 5000])
def test_nesting_is_refused_or_comes_back(depth: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    try:
        packed = encode_prompt(prompt(data={"deep": deep}), CAP)
    except InvalidPromptError as exc:
        assert depth > 500
        assert "field data['deep'] (list)" in str(exc)  # noqa: PT017 - either is right
        return
    back = decode_prompt(packed).data["deep"]
    for _ in range(depth):
        (back,) = back
    assert back == 1


def test_a_prompt_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(InvalidPromptError, match="field data"):
        encode_prompt(prompt(data=endless), CAP)


def test_an_oversize_prompt_names_its_largest_field() -> None:
    with pytest.raises(OversizeError) as caught:
        encode_prompt(prompt(data={"image": b"\0" * 5000}), 1000)
    assert "over the cap of 1,000" in str(caught.value)
    assert "its largest field is 'data' with 5,0" in str(caught.value)


# ---- size -------------------------------------------------------------------------------------


def test_a_single_turn_sample_costs_eight_bytes_a_token_and_little_more() -> None:
    tokens, prompt_tokens = 2048, 512
    rng = np.random.default_rng(0)
    sample = Sample(
        token_ids=rng.integers(0, 150_000, tokens).astype(np.int32),
        loss_mask=np.arange(tokens) >= prompt_tokens,
        logprobs=-rng.random(tokens).astype(np.float32),
        versions=VersionSpans.of([(prompt_tokens, -1), (1000, 7), (536, 8)]),
        reward=1.0,
    )
    wire = len(encode_samples([sample])) + len(encode_header(HEADER))
    assert wire / tokens < 8.5
