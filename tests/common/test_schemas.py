"""What two releases say of their schemas, and whether they agree."""

import json
from typing import Any

import numpy as np
import pytest
from fixtures.rig import Rig
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.run.releases import strangers
from rollfleet_common import schemas
from rollfleet_common.codec import SchemaError, decode_prompt, encode_prompt
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Prompt
from rollfleet_common.schemas import KINDS, RELEASE, Schemas, clash, spoken

numbers = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda p: (p[0], p[0] + p[1]))
sides = st.builds(Schemas, numbers, numbers, numbers, st.sampled_from(["", "0.1.0"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(KINDS), inner),
)


@given(sides, sides)
def test_sides_agree_where_their_ranges_meet(trainer: Schemas, worker: Schemas) -> None:
    meet = all(
        set(range(a[0], a[1] + 1)) & set(range(b[0], b[1] + 1))
        for a, b in ((getattr(trainer, kind), getattr(worker, kind)) for kind in KINDS)
    )
    assert (clash(trainer, worker) == "") == meet
    assert (clash(worker, trainer) == "") == meet


@given(sides)
def test_they_come_back_from_the_board(said: Schemas) -> None:
    assert Schemas.loads(said.dumps()) == said


@given(st.binary() | json_values.map(lambda v: json.dumps(v).encode()))
def test_anything_may_stand_on_a_board_or_a_card(text: bytes) -> None:
    read = Schemas.loads(text)
    for kind in KINDS:
        low, high = getattr(read, kind)
        assert isinstance(low, int)
        assert isinstance(high, int)
    for sentence in strangers({b"w\xff\x1b": text}):
        assert sentence.isprintable()


def test_a_clash_says_both_numbers_and_which_side_is_older() -> None:
    old, new = Schemas(release="0.1.0"), Schemas((2, 2), (2, 3), release="0.3.0")
    assert clash(new, old) == (
        "the trainer has prompt schema 2, the worker 1; the trainer has header schema 2 to 3, the "
        "worker 1: upgrade the worker (release 0.1.0) to the release of the trainer (release 0.3.0)"
    )
    assert "upgrade the trainer (release 0.1.0) to the release of the worker" in clash(old, new)
    crossed = clash(Schemas((2, 2)), Schemas((1, 1), (2, 2)))
    assert crossed.endswith("run one release on both sides: trainer, worker")


def test_cards_of_the_first_release_say_nothing_and_speak_schema_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards: dict[bytes, Any] = {
        f"w{i}".encode(): json.dumps({"version": "0.1.0"}).encode() for i in range(5)
    }
    cards[b"mine"] = json.dumps({"version": RELEASE, "schemas": spoken().as_dict()}).encode()
    cards[b"broken"] = b"{"
    assert strangers(cards) == []
    monkeypatch.setattr(schemas, "PROMPT", 2)
    cards[b"mine"] = json.dumps({"version": RELEASE, "schemas": spoken().as_dict()}).encode()
    (said,) = strangers(cards)
    assert said.startswith("5 workers cannot work for this trainer (w0, w1, w2, ...): ")


def test_each_kind_has_a_version_and_prompts_a_place_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = PartitionKeys("r", 0)
    first = encode_prompt(Prompt("g", 1, np.array([1], np.int32)), 1 << 20)
    assert keys.prompts("a") == "rf:{r/0}:prompts:a"
    monkeypatch.setattr(schemas, "PROMPT", 2)
    assert keys.prompts("a") == "rf:{r/0}:prompts.2:a"
    assert keys.delayed("a") == "rf:{r/0}:delayed.2:a"
    assert keys.parked("a") == "rf:{r/0}:parked.2:a"
    assert keys.prompts("a", 1) == "rf:{r/0}:prompts:a"
    with pytest.raises(SchemaError, match="wire version 1, this release speaks 2"):
        decode_prompt(first)


async def test_what_a_later_trainer_said_does_not_hold_for_one_of_0_1_0(rig: Rig) -> None:
    assert await rig.board.schemas() == spoken()
    # A trainer of 0.1.0 raises the epoch and writes nothing else of this.
    await rig.client.hincrby(rig.board.keys.board, "epoch", 1)
    assert await rig.board.schemas() == Schemas()
    await rig.client.delete(rig.board.keys.board)
    assert await rig.board.schemas() == Schemas()
