import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import wait_until, wait_until_async
from torch.utils.data import DataLoader

from rollfleet.submit.feed import AHEAD, Feeder, to_prompt
from rollfleet_common.codec import decode_prompt, encode_prompt
from rollfleet_common.errors import InvalidPromptError, RollfleetError
from rollfleet_common.messages import SAMPLING_FIELDS, Kind, Prompt
from rollfleet_engines.sampling import _FIELDS

MakeFeeder = Callable[..., Feeder]
TOKENS = np.arange(3, dtype=np.int32)


@pytest_asyncio.fixture
async def feeder() -> AsyncIterator[MakeFeeder]:
    """Starts feeders, and ends them with the test."""
    made: list[Feeder] = []

    def make(source: Iterable[Any], skip: int = 0, group_size: int = 4) -> Feeder:
        made.append(Feeder(source, skip, group_size, asyncio.get_running_loop()))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop()


async def everything(feeder: Feeder) -> list[Prompt]:
    """All prompts until the source ends."""
    prompts: list[Prompt] = []
    while (prompt := await feeder.peek()) is not None:
        prompts.append(prompt)
        feeder.took(1)
    return prompts


# ---- items ---------------------------------------------------------------------------------------


def item(value: Any, **options: Any) -> Prompt:
    return to_prompt(value, **{"group": "p3", "group_size": 4, "position": 3, **options})


def test_a_mapping_gives_fields_and_keeps_its_own_under_data():
    made = item(
        {
            "token_ids": [1, 2],
            "answer": "x",
            "level": 3,
            "kind": "eval",
            "route": "math",
            "task": "sums",
            "n": 7,
            "deadline_ms": 99,
            "sampling": {"temperature": 0.5},
        }
    )
    assert made.token_ids.tolist() == [1, 2]
    assert made.token_ids.dtype == np.int32
    assert made.data == {"answer": "x", "level": 3}
    assert (made.kind, made.route, made.task, made.n) == (Kind.EVAL, "math", "sums", 7)
    assert (made.group, made.position, made.deadline_ms) == ("p3", 3, 99)
    assert made.sampling == {"temperature": 0.5}


def test_columns_of_any_name_reach_the_workflow_in_data():
    columns = {"task": "algebra", "n": 4, "secret": 5, "data": [6], "kind": None, "prompt": "6 x 7"}
    made = item({"token_ids": [1], "data": columns})
    assert made.data == columns
    assert (made.task, made.n, made.kind) == ("default", 4, Kind.TRAIN)
    # Without token ids, too: the workflow makes its own.
    assert item({"data": {"text": "6 x 7"}}).data == {"text": "6 x 7"}
    # Reserved names beside it are fields of the prompt all the same.
    assert item({"data": columns, "n": 7}).n == 7


def test_what_a_data_set_filled_with_none_was_not_said():
    reserved = dict.fromkeys(["n", "kind", "route", "task", "sampling", "deadline_ms", "data"])
    made = item({"token_ids": [1], **reserved, "answer": None})
    plain = item({"token_ids": [1], "answer": None})
    assert replace(made, token_ids=TOKENS) == replace(plain, token_ids=TOKENS)
    assert made.task == "default"
    assert made.data == {"answer": None}
    assert len(item({"token_ids": None, "question": "6 x 7"}).token_ids) == 0
    sampling = {"temperature": 0.5, "seed": None, "top_k": None}
    assert item({"token_ids": [1], "sampling": sampling}).sampling == {"temperature": 0.5}


def test_the_sampling_fields_are_those_that_workers_read():
    assert set(SAMPLING_FIELDS) == set(_FIELDS)


#: Values as data sets have them: of Python, numpy and torch, at any depth.
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.integers(-128, 127).map(np.int8)
    | st.floats(width=32, allow_nan=False).map(np.float32)
    | st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=4).map(np.str_)
    | st.lists(st.integers(0, 9), max_size=3).map(np.array)
    | st.lists(st.integers(0, 9), max_size=3).map(torch.tensor)
    | st.just(np.array([np.array([1, 2]), "x"], object))
)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9).map(np.int64), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), nested, max_size=3))
def test_nested_data_travels_whatever_it_was_made_of(data: dict[str, Any]):
    made = item({"data": data})
    back = decode_prompt(encode_prompt(made, 1 << 20))
    assert back.data == made.data
    assert repr(back.data) == repr(made.data)  # True is no 1, and no numpy is left


def test_data_nested_too_deep_or_in_itself_is_refused():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    endless: dict[str, Any] = {}
    endless["self"] = endless
    for value in (deep, endless):
        with pytest.raises(InvalidPromptError, match=r"field data\['x'\] is nested too deep"):
            item({"x": value})


def test_what_an_item_does_not_say_has_defaults():
    made = item({"question": "6 x 7"})
    assert (made.n, made.kind, made.route, made.task) == (4, Kind.TRAIN, "default", "default")
    assert made.token_ids.dtype == np.int32
    assert len(made.token_ids) == 0
    assert (made.sampling, made.deadline_ms) == ({}, 0)


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7],
        (5, 6, 7),
        np.array([5, 6, 7]),
        np.array([5, 6, 7], np.uint16),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int32),
    ],
    ids=lambda v: type(v).__name__,
)
def test_token_ids_alone_are_a_prompt(ids: Any):
    assert item(ids).token_ids.tolist() == [5, 6, 7]
    assert item({"token_ids": ids}).token_ids.tolist() == [5, 6, 7]


def test_tensors_and_arrays_among_the_fields_become_plain():
    made = item({"answer": torch.tensor([1, 2]), "level": torch.tensor(3), "w": np.float32(0.5)})
    assert made.data == {"answer": [1, 2], "level": 3, "w": 0.5}
    assert type(made.data["level"]) is int


def test_a_prompt_is_taken_as_it_is_under_the_feeds_name():
    given = Prompt("mine", 2, TOKENS, {"a": 1}, route="math", position=77)
    made = item(given)
    assert (made.group, made.position, made.n, made.route) == ("p3", 3, 2, "math")
    assert made.data == {"a": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a string", "prompt 3 is a str"),
        (b"bytes", "prompt 3 is a bytes"),
        (7, "prompt 3 is a int"),
        (None, "prompt 3 is a NoneType"),
        ({"token_ids": "abc"}, "prompt 3: field token_ids"),
        ({"token_ids": None}, "prompt 3: field token_ids is None, and there is nothing else"),
        ({"prompt": "6 x 7"}, "prompt 3 has 'prompt', which is text, and no token_ids"),
        ({"text": "6 x 7", "token_ids": None}, "prompt 3 has 'text'.*does not tokenize"),
        ({"token_ids": [1], 3: 4}, r"prompt 3: its data has the key 3 \(int\), no text"),
        ({"data": {b"a": 4}}, r"prompt 3: its data has the key b'a' \(bytes\), no text"),
        ({"data": {"a": 1}, "b": 2}, "'b' stand beside it: put everything of your own into data"),
        ({"data": "text"}, "prompt 3: field data is a str, not a mapping"),
        ({"task": 5}, "prompt 3: field task is 5: it must be text, not a int"),
        ({"n": 2**31}, "prompt 3: field n is 2147483648"),
        ({"n": 4.0}, "prompt 3: field n is 4.0"),
        ({"deadline_ms": -1}, "prompt 3: field deadline_ms is -1: it must be Unix time"),
        ({"deadline_ms": "5"}, "prompt 3: field deadline_ms is '5'"),
        ({"deadline_ms": 2**63}, "prompt 3: field deadline_ms is 9223372036854775808"),
        ({"sampling": {"temprature": 1}}, "no sampling field 'temprature', only max_tokens, temp"),
        ({"sampling": [("seed", 1)]}, "prompt 3: field sampling.*it must be a mapping, not a list"),
        ({"token_ids": [1.5]}, "prompt 3: field token_ids is float64"),
        ({"token_ids": [[1, 2]]}, r"prompt 3: field token_ids is int64\[1, 2\]"),
        ({"token_ids": [[1], [2, 3]]}, "prompt 3: field token_ids"),
        ({"token_ids": [True]}, "prompt 3: field token_ids is bool"),
        ({"token_ids": [-1]}, "prompt 3: field token_ids is int64.*reaches from -1"),
        ({"token_ids": [2**31]}, "prompt 3: field token_ids is int64.*reaches"),
        ({"token_ids": [2**70]}, "prompt 3: field token_ids"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            r"prompt 3: field token_ids is (torch.)?int64\[2, 3\]",
        ),
        ({"n": 0}, "prompt 3: field n is 0"),
        ({"n": "4"}, "prompt 3: field n is '4'"),
        ({"n": True}, "prompt 3: field n is True"),
        ({"data": [1]}, "prompt 3: field data is a list"),
        ({"kind": "test"}, "prompt 3: field kind"),
        ({"route": "two words"}, "prompt 3: field route is 'two words'"),
        ({"route": 5}, "prompt 3: field route is 5"),
        ({"sampling": 5}, "prompt 3: field sampling"),
        ({"deadline_ms": "soon"}, "prompt 3: field deadline_ms"),
        (Prompt("g", 0, TOKENS), "prompt 3: field n is 0"),
        (Prompt("g", 1, TOKENS, route="a}b"), "prompt 3: field route is 'a}b'"),
        (Prompt("g", 1, np.array([2**40])), "prompt 3: field token_ids is int64.*reaches"),  # type: ignore[arg-type]
        (Prompt("g", 1, np.array([0.5])), "prompt 3: field token_ids is float64"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_item_is_refused_by_position_and_field(bad: Any, message: str):
    with pytest.raises(InvalidPromptError, match=message):
        item(bad)


def test_an_item_without_a_position_is_named_by_its_group():
    with pytest.raises(InvalidPromptError, match="prompt of group m1-ab: field n"):
        to_prompt({"n": 0}, group="m1-ab", group_size=4)


# ---- sources -------------------------------------------------------------------------------------


def _generator(count: int) -> Iterator[dict[str, Any]]:
    for value in range(count):
        yield {"token_ids": [value]}


class _Items(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"token_ids": torch.tensor([index, index]), "answer": index}


@pytest.mark.parametrize(
    "source",
    [
        _generator(10),
        list(_generator(10)),
        [[value] for value in range(10)],
        np.arange(10).reshape(10, 1),
        DataLoader(_Items(), batch_size=4, collate_fn=list),
        DataLoader(_Items(), batch_size=None),
        [[Prompt("x", 4, TOKENS)] * 4, [Prompt("x", 4, TOKENS)] * 6],
    ],
    ids=["generator", "list", "ids", "array", "loader of lists", "loader of items", "prompts"],
)
async def test_any_iterable_feeds_in_order(feeder: MakeFeeder, source: Any):
    prompts = await everything(feeder(source))
    assert [p.position for p in prompts] == list(range(10))
    assert [p.group for p in prompts] == [f"p{i}" for i in range(10)]
    if "answer" in prompts[0].data:
        assert [p.data["answer"] for p in prompts] == list(range(10))
    if len(prompts[0].token_ids) == 1:
        assert [p.token_ids[0] for p in prompts] == list(range(10))


async def test_a_collated_batch_is_refused_by_field(feeder: MakeFeeder):
    with pytest.raises(
        InvalidPromptError, match=r"prompt 0: field token_ids is (torch.)?int64\[4, 2\]"
    ):
        await everything(feeder(DataLoader(_Items(), batch_size=4)))


async def test_what_was_submitted_before_is_passed_over(feeder: MakeFeeder):
    source = [{"n": 0}, {"n": 0}, {"token_ids": [2]}, {"token_ids": [3]}]
    prompts = await everything(feeder(source, skip=2))
    assert [p.position for p in prompts] == [2, 3]
    assert await everything(feeder(source, skip=9)) == []


async def test_an_empty_source_is_exhausted(feeder: MakeFeeder):
    made = feeder([])
    assert await made.peek() is None
    assert await made.peek() is None
    assert made.exhausted


async def test_what_came_before_a_bad_item_is_fed_first(feeder: MakeFeeder):
    made = feeder([{"token_ids": [0]}, {"token_ids": [1]}, {"token_ids": [[1]]}, {}])
    first = await made.peek()
    assert first is not None
    made.took(1)
    await made.peek()
    made.took(1)
    for _ in range(2):
        with pytest.raises(InvalidPromptError, match="prompt 2: field token_ids"):
            await made.peek()


@pytest.mark.parametrize(
    "error",
    [ValueError("disk full"), KeyError("x"), asyncio.CancelledError(), SystemExit(3)],
    ids=lambda e: type(e).__name__,
)
async def test_a_source_that_raises_ends_the_feed_with_its_error(
    feeder: MakeFeeder, error: BaseException
):
    def source() -> Iterator[dict[str, Any]]:
        yield {"token_ids": [0]}
        raise error

    made = feeder(source())
    assert await made.peek() is not None
    made.took(1)
    with pytest.raises(
        RollfleetError, match=f"source of prompts raised {type(error).__name__}"
    ) as e:
        await asyncio.wait_for(made.peek(), 5)
    assert e.value.__cause__ is error


async def test_what_is_no_iterable_ends_the_feed_with_an_error(feeder: MakeFeeder):
    with pytest.raises(RollfleetError, match="raised TypeError"):
        await feeder(5).peek()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_more_gives_what_fits_and_removes_nothing(feeder: MakeFeeder):
    made = feeder([{"n": n} for n in (2, 3, 1, 4)])
    await made.peek()
    await wait_until_async(lambda: made.exhausted, "the source to be exhausted")
    assert [p.n for p in made.more(6)] == [2, 3, 1]
    assert [p.n for p in made.more(4)] == [2]  # the third may not overtake the second
    assert list(made.more(1)) == []
    made.took(2)
    assert [p.n for p in made.more(100)] == [1, 4]


async def test_no_more_is_pulled_ahead_than_is_allowed(feeder: MakeFeeder):
    pulled: list[int] = []

    def source() -> Iterator[dict[str, Any]]:
        for value in range(AHEAD * 3):
            pulled.append(value)
            yield {"token_ids": [value]}

    made = feeder(source())
    await wait_until_async(lambda: len(pulled) == AHEAD + 1, "the feeder to have pulled ahead")
    await made.peek()
    made.took(10)
    await wait_until_async(lambda: len(pulled) == AHEAD + 11, "the feeder to go on")
    assert len(await everything(made)) == AHEAD * 3 - 10


async def test_a_source_that_blocks_holds_up_nobody_else(feeder: MakeFeeder):
    gate = threading.Event()

    def source() -> Iterator[dict[str, Any]]:
        yield {"token_ids": [0]}
        gate.wait(30)
        yield {"token_ids": [1]}

    made = feeder(source())
    assert await made.peek() is not None
    made.took(1)
    waiting = asyncio.create_task(made.peek())
    ticks = 0
    while ticks < 10:  # the loop turns
        await asyncio.sleep(0)
        ticks += 1
    assert not waiting.done()
    gate.set()
    second = await waiting
    assert second is not None
    assert second.position == 1


async def test_stop_ends_a_feeder_that_waits_for_room(feeder: MakeFeeder):
    def source() -> Iterator[dict[str, Any]]:
        while True:
            yield {"token_ids": [1]}

    made = feeder(source())
    await wait_until_async(lambda: len(made._ready) == AHEAD, "the feeder to be full")
    made.stop()
    wait_until(lambda: not made._thread.is_alive(), "the feeder's thread to end")
    assert len(made._ready) == AHEAD


def test_a_source_that_outlives_its_loop_ends_in_silence():
    gate, ended = threading.Event(), threading.Event()

    def source() -> Iterator[dict[str, Any]]:
        gate.wait(30)
        yield {"token_ids": [0]}
        ended.set()
        raise ValueError("late")

    async def begin() -> Feeder:
        made = Feeder(source(), 0, 4, asyncio.get_running_loop())
        made.start()
        return made

    made = asyncio.run(begin())  # nobody called stop
    gate.set()
    wait_until(lambda: not made._thread.is_alive(), "the feeder's thread to end")
    assert ended.is_set()
