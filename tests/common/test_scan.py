"""Large byte strings are views, everything else is as msgpack reads it, and msgpack alone refuses."""

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rollfleet_common import scan
from rollfleet_common.codec import decode_prompt, decode_samples, encode_prompt, encode_samples
from rollfleet_common.errors import CodecError, WireError
from rollfleet_common.messages import Prompt, Sample, VersionSpans

#: The machine may be busy.
timeless = hypothesis_settings(deadline=None)

LARGE = b"\7" * scan.VIEW_BYTES


def sample(tokens: int, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "token_ids": np.arange(tokens, dtype=np.int32),
        "loss_mask": np.arange(tokens) >= tokens // 2,
        "logprobs": np.full(tokens, -0.5, np.float32),
        "versions": VersionSpans.of([(tokens // 2, -1), (tokens - tokens // 2, 3)]),
        "reward": 1.0,
        "metrics": {"turns": 2.0},
    }
    return Sample(**{**fields, **changes})


def pack(raw: Any) -> bytes:
    packed: bytes | None = msgpack.packb(raw)
    assert packed is not None
    return packed


def reads(packed: bytes) -> Any:
    """What msgpack makes of it: its value, or that it refuses."""
    try:
        return plain(msgpack.unpackb(packed, strict_map_key=False))
    except Exception as exc:  # noqa: BLE001 - which one is what is compared
        return type(exc)


def plain(value: Any) -> Any:
    """The same, comparable: views as bytes, floats as their text, so that NaN is itself."""
    if isinstance(value, memoryview):
        assert value.readonly
        return ("bytes", bytes(value))
    if isinstance(value, float):
        return ("float", repr(value))
    if isinstance(value, bool | int | str | bytes | None):
        return (type(value).__name__, value)
    if type(value) is list:
        return [plain(each) for each in value]
    if type(value) is dict:
        assert not any(isinstance(key, memoryview) for key in value)
        return {plain(k) if type(k) is not str else k: plain(v) for k, v in value.items()}
    return repr(value)


def ours(packed: bytes) -> Any:
    try:
        return plain(scan.unpack(packed))
    except Exception as exc:  # noqa: BLE001 - which one is what is compared
        return type(exc)


def alike(packed: bytes) -> bool:
    return bool(ours(packed) == reads(packed))


@pytest.fixture(autouse=True)
def _scan_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small messages, too, or the fuzzers would only meet msgpack."""
    monkeypatch.setattr(scan, "_SCAN_BYTES", 0)


# ---- the same as msgpack ----------------------------------------------------------------------

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=32)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.sampled_from([LARGE, LARGE * 200, "x" * 300, "y" * 70_000])
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
)
keys = st.text(max_size=12) | st.integers(-5, 5) | st.binary(max_size=3) | st.just(LARGE)
messages = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(keys, inner, max_size=20),
    max_leaves=40,
)


@timeless
@given(messages, st.booleans())
def test_a_message_is_what_msgpack_makes_of_it(value: Any, single: bool) -> None:
    packed: bytes = msgpack.packb(value, use_single_float=single)
    assert alike(packed)


@timeless
@given(st.binary(max_size=60))
@example(b"\xd9")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xa5ab")
@example(b"\xa2\xff\xfe")
@example(b"\xcb\0")
@example(b"\x01\x02")
def test_any_bytes_are_what_msgpack_makes_of_them(packed: bytes) -> None:
    assert alike(packed)


PAYLOADS = [
    encode_samples([sample(600)]),
    encode_samples([sample(128)]),
    encode_samples([sample(600), sample(40)]),
    encode_samples([sample(200, arrays={"x": np.zeros((200, 3)), "y": np.zeros(2000, np.uint8)})]),
]


@timeless
@given(
    st.sampled_from(PAYLOADS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_broken_payload_is_refused_or_read_alike(
    packed: bytes, changes: list[tuple[float, int]], keep: float, cut: bool
) -> None:
    broken = bytearray(packed)
    structure = [i for i in range(len(broken)) if i < 20 or broken[i : i + 1].isalpha()]
    for at, byte in changes:
        # Where something can break: not in the middle of an array.
        broken[structure[int(at * (len(structure) - 1))]] = byte
    both = bytes(broken[: int(keep * len(broken))] if cut else broken)
    assert alike(both)
    usual = scan.unpack_usual(both)
    if usual is not None:
        assert bool(reads(both) == plain([1, [usual]]))
    # The whole way, too: the same samples, or a refusal on both sides.
    assert decoded(both) == decoded_by_msgpack(both)


def decoded(packed: bytes) -> str:
    try:
        return repr([(s, bytes(s.token_ids), bytes(s.logprobs)) for s in decode_samples(packed)])
    except WireError as exc:
        return type(exc).__name__


def decoded_by_msgpack(packed: bytes) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollfleet_common.codec.unpack_usual", lambda _packed: None)
        patch.setattr("rollfleet_common.scan._SCAN_BYTES", 1 << 40)
        return decoded(packed)


def test_the_usual_payload_may_end_anywhere() -> None:
    packed = encode_samples([sample(200, metrics={})])
    bare = b"\x92\x01\x91\x82" + packed[4 : packed.index(b"\xa4mask")]
    for message in (packed, bare):
        for end in (*range(20), *range(len(message) - 200, len(message) + 1)):
            cut = message[:end]
            usual = scan.unpack_usual(cut)
            assert (usual is not None) == (end == len(message)), end
        assert scan.unpack_usual(message + b"\0") is None


def test_a_key_that_comes_twice_has_its_last_value() -> None:
    packed = encode_samples([sample(200)])
    twice = packed[:3] + bytes([packed[3] + 1]) + packed[4:] + b"\xa3ids\xc4\4\1\0\0\0"
    usual = scan.unpack_usual(twice)
    assert usual is not None
    assert usual["ids"] == b"\1\0\0\0"
    assert reads(twice) == plain([1, [usual]])


# ---- no copies, and no traps ------------------------------------------------------------------


@pytest.mark.parametrize("packed", PAYLOADS)
def test_arrays_are_views_into_the_payload(packed: bytes) -> None:
    whole = np.frombuffer(packed, np.uint8)
    for each in decode_samples(packed):
        for array in (each.token_ids, each.logprobs, *each.arrays.values()):
            assert np.shares_memory(array, whole) == (array.nbytes >= scan.VIEW_BYTES)
            assert not array.flags.writeable
        assert not each.loss_mask.flags.writeable


def test_arrays_outlive_the_name_of_the_payload() -> None:
    packed = bytes(bytearray(PAYLOADS[0]))
    (back,) = decode_samples(packed)
    del packed
    assert back.token_ids.tolist() == list(range(600))


def test_bytes_in_a_prompt_stay_bytes() -> None:
    prompt = Prompt("g", 1, np.array([1], np.int32), data={"image": LARGE * 10})
    assert type(decode_prompt(encode_prompt(prompt, 1 << 20)).data["image"]) is bytes


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x01\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff" + b"\xa1a\0" * 2000,
        b"\x92\x01\x91\x82\xa3ids\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 50_000,
        b"\x92\x01" + b"\x9f" * 5 + b"\0" * 10_000,
    ],
)
def test_a_bomb_is_left_to_msgpack(bomb: bytes) -> None:
    assert alike(bomb)
    with pytest.raises(CodecError):
        decode_samples(bomb)


def test_many_small_values_are_left_to_msgpack(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    value = scan._Scan.value

    def counting(self: Any, at: int, depth: int) -> Any:
        nonlocal looked_at
        looked_at += 1
        return value(self, at, depth)

    monkeypatch.setattr(scan._Scan, "value", counting)
    packed = pack([list(range(100)) for _ in range(1000)])
    assert alike(packed)
    assert looked_at <= 3 * scan.MAX_VALUES


# ---- masks ------------------------------------------------------------------------------------


@timeless
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_masks_of_any_runs_come_back(runs: list[int]) -> None:
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    tokens = len(mask)
    made = sample(tokens, loss_mask=mask, versions=VersionSpans.constant(1))
    (back,) = decode_samples(encode_samples([made]))
    assert back.loss_mask.tolist() == mask.tolist()


def test_a_mask_longer_than_the_shared_edge_comes_back() -> None:
    tokens = (1 << 20) + 5
    for prompt in (0, 1, tokens - 1, tokens):
        made = sample(tokens, loss_mask=np.arange(tokens) >= prompt)
        (back,) = decode_samples(encode_samples([made]))
        assert np.array_equal(back.loss_mask, made.loss_mask)
