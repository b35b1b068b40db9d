"""Whatever a workflow returns leaves its episode as a delivery that can be read, or as a failure."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
from fixtures.rig import Rig, delivery_of, prompt_of
from fixtures.workflows import answer

from rollfleet_common.codec import decode_header, decode_samples, encode_header
from rollfleet_common.errors import FailureKind
from rollfleet_common.leases import AttemptFailure
from rollfleet_common.limits import Limits
from rollfleet_common.messages import (
    Claim,
    LogprobsKind,
    PolicyVersion,
    Prompt,
    Sample,
    VersionSpans,
)
from rollfleet_common.streams import Delivery
from rollfleet_common.validate import check_samples
from rollfleet_engines.interface import Sampling
from rollfleet_worker.deliver import Outbox
from rollfleet_worker.episode import Episodes
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings

POLICY = PolicyVersion(version=3, epoch=1)
LIMITS = Limits(samples=4, tokens=64, spans=16, names=4)


class Returns:
    """A workflow that returns what it was given, or what comes of calling it."""

    def __init__(self, made: Any) -> None:
        self.made = made

    async def run(self, prompt: Prompt, context: Any) -> Any:
        return self.made(prompt, context) if callable(self.made) else self.made


def outcome_of(made: Any) -> Delivery | AttemptFailure:
    """What comes of an episode whose workflow returns `made`."""
    episodes = Episodes(
        worker="w1",
        workflows={"default": Returns(made)},
        engine=None,
        rewards=cast(Any, None),
        sampling=Sampling(max_tokens=8),
        timeout_s=5.0,
        max_rollout_bytes=1 << 20,
        metrics=Metrics(),
        limits=LIMITS,
    )
    claim = Claim(prompt_of("g"), 0, 1, "1-0", 0, 1)
    return asyncio.run(episodes.run(claim, POLICY))


class Lies(float):
    """A number that is another one whenever it is asked."""

    def __float__(self) -> float:
        raise ZeroDivisionError("no number today")


class Moody(Sample):
    """A sample whose reward raises when it is looked at."""

    @property
    def reward(self) -> float:  # type: ignore[override]
        raise ZeroDivisionError("no reward today")


class Spans(VersionSpans):
    """Spans that claim to be newer than they are."""

    def oldest(self, mask: Any) -> int:
        return 10**6

    def newest(self) -> int:
        return -(10**6)


class Unshown:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise ValueError("no text")


class Shifting(Mapping[str, Any]):
    """A mapping that has other keys each time."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, key: str) -> Any:
        return 1.0

    def __iter__(self) -> Iterator[str]:
        self.asked += 1
        return iter(["good"] if self.asked == 1 else ["\ud800"])

    def __len__(self) -> int:
        return 1


def sample(**changes: Any) -> Callable[[Prompt, Any], Sample]:
    return lambda prompt, context: answer(prompt, context.version, **changes)


def context_with(**fields: Any) -> Callable[[Prompt, Any], Sample]:
    def run(prompt: Prompt, context: Any) -> Sample:
        for name, value in fields.items():
            setattr(context, name, value)
        return answer(prompt, context.version)

    return run


def moody(prompt: Prompt, context: Any) -> Sample:
    made = object.__new__(Moody)
    good = answer(prompt, context.version)
    for name in (
        "token_ids",
        "loss_mask",
        "logprobs",
        "versions",
        "components",
        "arrays",
        "metrics",
    ):
        object.__setattr__(made, name, getattr(good, name))
    return made


@dataclass
class Duck:
    """Looks like a sample."""

    token_ids: Any = None


T = 9  # tokens of an answer to five
HOSTILE: dict[str, tuple[Any, str]] = {
    "an unknown kind of logprobs": (
        sample(logprobs_kind="odd"),
        "logprobs_kind is 'odd', not one of",
    ),
    "a number for a kind": (sample(logprobs_kind=3), "logprobs_kind is 3, not one of"),
    "a temperature that is text": (sample(temperature="1"), "temperature is '1', neither None"),
    "a temperature below zero": (sample(temperature=-0.5), "temperature is -0.5, neither None"),
    "an endless temperature": (sample(temperature=float("inf")), "temperature is inf, neither"),
    "an enum for finish_reason": (sample(finish_reason=Enum("E", "A").A), "finish_reason is a E"),
    "a number for finish_reason": (sample(finish_reason=3), "finish_reason is 3"),
    "a surrogate in a name": (sample(components={"\ud800": 1.0}), "components has the key"),
    "a surrogate in a metric": (sample(metrics={"\udfff": 1.0}), "metrics has the key"),
    "a surrogate in an array's name": (sample(arrays={"\ud800": np.zeros(1)}), "arrays has the"),
    "bytes for a name": (sample(components={b"a": 1.0}), "components has the key a bytes"),
    "text for a reward": (sample(reward="1"), "reward is '1'"),
    "nothing for a reward": (sample(reward=None), "reward is None"),
    "a reward that lies": (sample(reward=Lies(1)), "reward is a Lies"),
    "a reward that is not shown": (sample(reward=Unshown()), "reward is a Unshown"),
    "an endless reward": (sample(reward=10**5000), "reward is a int"),
    "an infinite reward": (sample(reward=1e39), "reward is 1e+39"),
    "an array for a reward": (sample(reward=np.zeros(3)), "reward is an array of float64[3]"),
    "a component that is infinite": (sample(components={"a": 1e300}), "components['a'] is 1e+300"),
    "a component that is no number": (
        sample(components={"a": Unshown()}),
        "components['a'] is a U",
    ),
    "a list of components": (sample(components=[1]), "components is a list"),
    "no metrics": (sample(metrics=None), "metrics is a NoneType"),
    "no arrays": (sample(arrays=None), "arrays is a NoneType"),
    "a list in arrays": (sample(arrays={"x": [1]}), "arrays['x'] is a list"),
    "objects in arrays": (sample(arrays={"x": np.array([None])}), "dtype object"),
    "structured arrays": (sample(arrays={"x": np.zeros(1, [("a", "i4")])}), "does not travel"),
    "dates in arrays": (sample(arrays={"x": np.zeros(1, "M8[s]")}), "does not travel"),
    "a masked array": (sample(arrays={"x": np.ma.zeros(1)}), "is a MaskedArray"),
    "an array of nine axes": (sample(arrays={"x": np.zeros((1,) * 9)}), "9 dimensions"),
    "ids in a list": (sample(token_ids=[1, 2]), "token_ids is a list"),
    "no ids": (sample(token_ids=None), "token_ids is a NoneType"),
    "no mask": (sample(loss_mask=None), "loss_mask is a NoneType"),
    "a masked mask": (sample(loss_mask=np.ma.ones(T, bool)), "loss_mask is a MaskedArray"),
    "no versions": (sample(versions=None), "versions is a NoneType"),
    "a number for versions": (sample(versions=3), "versions is a int"),
    "versions in lists": (sample(versions=VersionSpans([0], [3])), "versions.starts is a list"),  # type: ignore[arg-type]
    "versions of nobody": (sample(versions=VersionSpans.constant(-1)), "no policy made it"),
    "no sample": (None, "it returned None"),
    "text": ("abc", "it returned a str"),
    "a set": ({1}, "it returned a set"),
    "a duck": (Duck(), "it returned a Duck"),
    "a list of ducks": ([Duck()], "it returned a list of ['Duck']"),
    "a class": ([Sample], "it returned a list of ['type']"),
    "an empty list": ([], "a rollout without samples"),
    "a moody sample": (moody, "ZeroDivisionError"),
    "too many samples": (lambda p, _: [answer(p, 3)] * 5, "5 sequences in one rollout"),
    "too many tokens": (
        lambda p, _: answer(replace(p, token_ids=np.zeros(99, "i4")), 3),
        "103 tok",
    ),
    "too many names": (sample(metrics=dict.fromkeys("abcde", 1.0)), "5 named numbers and arrays"),
    "too many spans": (
        sample(
            token_ids=np.zeros(40, np.int32),
            loss_mask=np.arange(40) % 2 > 0,
            logprobs=np.zeros(40, np.float32),
            versions=VersionSpans.constant(3),
        ),
        "version spans and mask runs in one rollout, over the cap of 16",
    ),
    "too many bytes": (sample(arrays={"x": np.zeros(1 << 20)}), "over the cap of 1,048,576"),
    "a server that is bytes": (context_with(server=b"x"), "a bytes, not a str"),
    "a server that is broken": (context_with(server="\ud800"), "surrogates not allowed"),
    "a time that is text": (context_with(generate_s="x"), "the samples of group g"),
    "a time before time": (context_with(generate_s=-5.0), "generate_ms is -5000"),
    "a time that is no number": (context_with(reward_s=float("nan")), "cannot convert float NaN"),
}


@pytest.mark.parametrize(("made", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_sample_is_a_data_failure_that_says_what_is_wrong(made: Any, says: str) -> None:
    failure = outcome_of(made)
    assert isinstance(failure, AttemptFailure), failure
    assert failure.kind is FailureKind.DATA
    assert says in failure.detail
    failure.detail.encode()
    failure.record(1, 0)


@pytest.mark.parametrize(
    "made",
    [
        sample(),
        sample(reward=np.float32(0.1), metrics={"a": np.int8(1), "b": True}),
        sample(components=MappingProxyType({"a": 1})),
        sample(metrics=Shifting()),
        sample(finish_reason="\u00e9\U0001f600"),
        sample(arrays={"x": np.zeros((T, 0)), "y": np.array(3.0)}),
        lambda prompt, _: (answer(prompt, 3), answer(prompt, 2)),
        lambda prompt, _: answer(prompt, 3, versions=Spans(*map(np.int32, ([0, 5], [-1, 3])))),
    ],
)
def test_what_is_delivered_says_in_its_header_what_is_in_its_payload(made: Any) -> None:
    delivery = outcome_of(made)
    assert isinstance(delivery, Delivery), delivery
    header = decode_header(encode_header(delivery.header))
    samples = decode_samples(delivery.payload, LIMITS)
    check_samples(samples, where="test")
    assert header.samples == len(samples)
    assert header.tokens == sum(len(s.token_ids) for s in samples)
    assert header.trained_tokens == sum(int(s.loss_mask.sum()) for s in samples)
    assert header.reward == samples[0].reward
    assert header.payload_bytes == len(delivery.payload)
    assert header.min_version == min(s.versions.oldest(s.loss_mask) for s in samples)
    assert header.max_version == max(s.versions.newest() for s in samples)


def test_every_field_of_a_sample_arrives() -> None:
    changed = {
        "components": {"a": 1.0},
        "arrays": {"x": np.arange(3)},
        "metrics": {"m": 2.0},
        "finish_reason": "length",
        "logprobs_kind": LogprobsKind.PROCESSED.value,
        "temperature": 0.5,
        "context_full": True,
    }
    made = answer(prompt_of("g"), 3, **changed)
    delivery = outcome_of(made)
    assert isinstance(delivery, Delivery), delivery
    (read,) = decode_samples(delivery.payload, LIMITS)
    np.testing.assert_equal(asdict(read), asdict(made))
    untouched = [f.name for f in fields(Sample) if getattr(read, f.name) is f.default]
    assert not untouched, "fields that have their default prove nothing"


@pytest.mark.leaves_keys("dead letters stay until they are purged", "rf:*:dead")
async def test_a_rollout_that_cannot_be_sent_takes_no_other_with_it(rig: Rig) -> None:
    settings = WorkerSettings(workflows={"default": "a:B"}, attempts_data=1)
    outbox = Outbox(rig.streams, rig.leases(), settings, Metrics(), lambda *_: None)
    await rig.submit(prompt_of("g", 3))
    claims = await rig.claim()
    deliveries = [delivery_of(claim) for claim in claims]
    bad = replace(deliveries[1], header=replace(deliveries[1].header, server=cast(Any, object())))
    pump = asyncio.create_task(outbox.pump())
    try:
        outcomes = (deliveries[0], bad, deliveries[2])
        await asyncio.gather(*map(outbox.deliver, claims, outcomes))
    finally:
        pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pump
    assert [header.index for _, header in await rig.headers()] == [0, 2]
    (letter,) = await rig.dead()
    assert letter["why"] == "data"
    assert "its rollout cannot be sent: TypeError" in letter["e"]
    assert (await rig.books()).in_flight == 0
