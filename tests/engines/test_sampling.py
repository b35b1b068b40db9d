"""Sampling that a prompt brings from the wire: read in any form that can be meant, else refused."""

from typing import Any

import msgpack
import numpy as np
import pytest

from rollfleet_common.errors import DataError
from rollfleet_common.messages import Claim, Prompt
from rollfleet_engines.interface import Sampling, TextAnswer
from rollfleet_engines.sampling import sampled
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.workflows.base import Context

BASE = Sampling(max_tokens=8, temperature=0.5, stop_token_ids=(1,))


def test_what_comes_from_the_wire_is_what_was_meant() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 4,
        "temperature": 1,
        "stop_token_ids": (7, 9),
        "seed": None,
        "extra": {"min_tokens": 2},
    }
    wired = msgpack.unpackb(msgpack.packb(fields))
    assert isinstance(wired["stop_token_ids"], list)
    made = sampled(BASE, wired)
    assert made == Sampling(4, 1.0, stop_token_ids=(7, 9), extra={"min_tokens": 2})
    assert type(made.temperature) is float
    assert sampled(BASE, {}) == BASE
    ids = sampled(BASE, {"stop_token_ids": np.array([3], np.int32)}).stop_token_ids
    assert (ids, type(ids[0])) == ((3,), int)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stop_token_ids", 7, "must be a list of whole numbers"),
        ("stop_token_ids", ["</s>"], "must be a list of whole numbers"),
        ("stop_token_ids", "ab", "must be a list of whole numbers"),
        ("stop_token_ids", None, "must be a list of whole numbers"),
        ("max_tokens", 1.5, "is 1.5 .float.; it must be a whole number"),
        ("max_tokens", True, "must be a whole number"),
        ("temperature", "1", "is '1' .str.; it must be a finite number"),
        ("temperature", float("nan"), "must be a finite number"),
        ("top_p", None, "must be a finite number"),
        ("top_k", "7", "must be a whole number"),
        ("seed", 0.0, "must be a whole number or None"),
        ("extra", [1], "must be a mapping"),
        ("extra", {1: 2}, "must be a mapping"),
        ("stop", ["x"], "no sampling field 'stop', only max_tokens, .* into `extra`"),
    ],
)
def test_another_type_is_refused_by_name(name: str, value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        sampled(BASE, {"min_p": 0.1, name: value})
    assert repr(name) in str(caught.value)


class Noting:
    """An engine, and a text engine, that only remember."""

    def __init__(self) -> None:
        self.seen: list[Sampling] = []

    async def generate(self, request: Any, n: int = 1) -> Any:
        self.seen.append(request.sampling)
        raise DataError("enough")

    async def chat(self, messages: Any, sampling: Sampling) -> TextAnswer:
        self.seen.append(sampling)
        return TextAnswer("", "stop", "s")


async def test_a_context_reads_both_faces_and_siblings_take_it() -> None:
    engine: Any = Noting()
    prompt = Prompt("g", 1, np.array([1], np.int32), sampling={"stop_token_ids": [7]})
    claim = Claim(prompt, 0, 1, "1-1", 0, 0)
    context = Context(claim, 0, CoalescingEngine(engine), BASE, None, engine)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="enough"):
        await context.generate([1])
    with pytest.raises(DataError, match="enough"):
        await context.generate([1], stop_token_ids=[8])
    await context.chat([], stop_token_ids=[9])
    assert [one.stop_token_ids for one in engine.seen] == [(7,), (8,), (9,)]
    with pytest.raises(DataError, match="stop_token_ids"):
        await context.chat([], stop_token_ids=9)
