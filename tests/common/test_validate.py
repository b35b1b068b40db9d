"""Samples that cannot be trained on are refused, with the field and the token that is wrong."""

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest

from rollfleet_common.errors import InvalidSampleError
from rollfleet_common.messages import Sample, VersionSpans
from rollfleet_common.validate import check_samples, coerce_sample

WHERE = "group 3f2a #4 from worker w1"


def sample(**changes: Any) -> Sample:
    made = Sample(
        token_ids=np.array([5, 6, 7, 8], np.int32),
        loss_mask=np.array([False, False, True, True]),
        logprobs=np.array([0.0, 0.0, -0.5, -1.5], np.float32),
        versions=VersionSpans.of([(2, -1), (1, 3), (1, 4)]),
        reward=1.0,
    )
    return replace(made, **changes)


def spans(starts: list[int], versions: list[int]) -> VersionSpans:
    return VersionSpans(np.array(starts, np.int32), np.array(versions, np.int32))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    "good",
    [
        sample(),
        sample(logprobs=floats(0.0, 0.0, 0.005, -1.5)),  # rounding of half precision
        sample(logprobs=floats(0.7, -9999.0, -0.5, -20000.0)),  # only trained tokens count
        sample(versions=VersionSpans.constant(0)),
        sample(versions=spans([0, 2, 3], [9, 3, 3])),  # backwards where nothing is trained
        sample(versions=spans([0, 3], [4, 3])),  # two calls, two servers, a refit that rolls
        sample(reward=-2, components={"a": 1}, metrics={"b": np.float32(2)}),
        sample(arrays={"x": np.zeros((4, 2), np.float16), "y": np.array(3)}),
        Sample(
            token_ids=np.array([0], np.int32),
            loss_mask=np.array([True]),
            logprobs=floats(-1.0),
            versions=VersionSpans.constant(2),
            reward=0.0,
        ),
    ],
)
def test_good_samples_pass(good: Sample) -> None:
    check_samples([good, good], newest=9, where=WHERE)


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "ids of another dtype": ({"token_ids": np.arange(4)}, "token_ids has dtype int64, not int32"),
    "ids in a list": ({"token_ids": [1, 2, 3, 4]}, "token_ids is a list"),
    "ids in two dimensions": ({"token_ids": np.zeros((2, 2), np.int32)}, "shape (2, 2)"),
    "no ids": ({"token_ids": np.zeros(0, np.int32)}, "token_ids is empty"),
    "negative id": ({"token_ids": np.array([1, 2, -3, 4], np.int32)}, "token_ids[2] is -3"),
    "short mask": ({"loss_mask": np.array([True])}, "loss_mask has 1 values for 4 token_ids"),
    "mask of ints": ({"loss_mask": np.ones(4, np.int8)}, "loss_mask has dtype int8"),
    "no trained token": ({"loss_mask": np.zeros(4, bool)}, "nothing to learn"),
    "short logprobs": ({"logprobs": floats(0.0)}, "logprobs has 1 values for 4 token_ids"),
    "double logprobs": ({"logprobs": np.zeros(4)}, "logprobs has dtype float64"),
    "NaN": ({"logprobs": floats(0, 0, float("nan"), -1)}, "logprobs[2] is nan (1 such)"),
    "NaN, untrained": ({"logprobs": floats(float("nan"), 0, -1, -1)}, "logprobs[0] is nan"),
    "-inf": ({"logprobs": floats(0, 0, -1, -float("inf"))}, "logprobs[3] is -inf"),
    "positive": ({"logprobs": floats(0, 0, 0.5, -1)}, "logprobs[2] is 0.5"),
    "ambiguous": ({"logprobs": floats(0, 0, -1, -9999.0)}, "vLLM"),
    "no spans": ({"versions": spans([], [])}, "0 starts for 0 versions"),
    "spans disagree": ({"versions": spans([0, 2], [1])}, "2 starts for 1 versions"),
    "late first span": ({"versions": spans([1], [3])}, "versions.starts[0] is 1"),
    "equal starts": ({"versions": spans([0, 2, 2], [1, 2, 3])}, "[0, 2, 2] must increase"),
    "start past the end": ({"versions": spans([0, 4], [1, 2])}, "stay under 4"),
    "many bad starts": ({"versions": spans([0] * 9, [1] * 9)}, "... (9)"),
    "less than -1": ({"versions": spans([0, 1], [-2, 3])}, "versions.versions[0] is -2"),
    "trained by nobody": ({"versions": spans([0, 3], [-1, 3])}, "no policy made it"),
    "constant nobody": ({"versions": VersionSpans.constant(-1)}, "no policy made it"),
    "future": ({"versions": spans([0, 3], [3, 10])}, "a rollout from the future"),
    "NaN reward": ({"reward": float("nan")}, "reward is nan"),
    "reward beyond float32": ({"reward": 1e39}, "reward is 1e+39, no number that is finite in"),
    "metric beyond float32": ({"metrics": {"x": -1e300}}, "metrics['x'] is -1e+300"),
    "component beyond float32": ({"components": {"x": np.float64(1e300)}}, "components['x'] is"),
    "int beyond float32": ({"components": {"x": 2**128}}, "components['x'] is 3402823669209384634"),
    "integer subclass": ({"reward": IntEnum("E", "A").A}, "reward is a E, no number"),
    "components in a list": ({"components": [("a", 1.0)]}, "components is a list, not a mapping"),
    "metrics of nothing": ({"metrics": None}, "metrics is a NoneType, not a mapping"),
    "arrays in a list": ({"arrays": []}, "arrays is a list, not a mapping"),
    "surrogate": ({"components": {"\ud800": 1.0}}, "components has the key '\\ud800', no text"),
    "surrogate in arrays": ({"arrays": {"\udfff": np.zeros(1)}}, "arrays has the key '\\udfff'"),
    "enum": ({"finish_reason": Enum("E", "A").A}, "finish_reason is a E, no text that travels"),
    "no finish_reason": ({"finish_reason": None}, "finish_reason is None"),
    "broken finish_reason": ({"finish_reason": "\ud800"}, "finish_reason is '\\ud800'"),
    "no versions": ({"versions": None}, "versions is a NoneType, not VersionSpans"),
    "masked array": ({"arrays": {"x": np.ma.zeros(4)}}, "arrays['x'] is a MaskedArray"),
    "nothing, endless": ({"arrays": {"x": np.zeros((4, 0, 2**30))}}, "and no values"),
    "no reward": ({"reward": None}, "reward is None"),
    "huge int": ({"reward": 10**400}, "reward is 1000000"),
    "inf component": ({"components": {"fmt": float("inf")}}, "components['fmt'] is inf"),
    "text metric": ({"metrics": {"len": "4"}}, "metrics['len'] is '4'"),
    "metric key": ({"metrics": {3: 1.0}}, "metrics has the key 3, no text"),
    "array of objects": ({"arrays": {"x": np.array([None])}}, "arrays['x'] has dtype object"),
    "complex array": ({"arrays": {"x": np.zeros(1, np.complex64)}}, "does not travel"),
    "array in a list": ({"arrays": {"x": [1]}}, "arrays['x'] is a list"),
    "array key": ({"arrays": {3: np.zeros(1)}}, "arrays has the key 3"),
    "deep array": ({"arrays": {"x": np.zeros((1,) * 9)}}, "9 dimensions"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_samples_are_refused_by_field(changes: Mapping[str, Any], says: str) -> None:
    with pytest.raises(InvalidSampleError) as caught:
        check_samples([sample(), sample(**changes)], newest=9, where=WHERE)
    assert str(caught.value).startswith(f"{WHERE}: sample 1 of 2: ")
    assert says in str(caught.value)


def test_a_rollout_has_samples() -> None:
    with pytest.raises(InvalidSampleError, match="without samples"):
        check_samples([], where=WHERE)


def test_evaluation_may_train_nothing() -> None:
    untrained = sample(loss_mask=np.zeros(4, bool), versions=VersionSpans.constant(-1))
    check_samples([untrained], where=WHERE, need_trained=False)


def test_without_newest_no_version_is_too_new() -> None:
    check_samples([sample(versions=VersionSpans.constant(10**6))], where=WHERE)


def test_loose_input_becomes_a_valid_sample() -> None:
    made = coerce_sample(
        [5, 6, 7.0, 8],
        [0, 0, 1, True],
        [0, 0, -0.5, -1.5],
        [-1, -1, 3, 4],
        1,
        components={"a": np.float64(2)},
        arrays={"x": [[1], [2], [3], [4]]},
        metrics={"b": True},
    )
    check_samples([made], newest=4, where=WHERE)
    assert made.token_ids.tolist() == [5, 6, 7, 8]
    assert made.loss_mask.tolist() == [False, False, True, True]
    assert made.versions.expand(4).tolist() == [-1, -1, 3, 4]
    assert made.versions.starts.tolist() == [0, 2, 3]
    assert made.components == {"a": 2.0}
    assert made.metrics == {"b": 1.0}
    assert made.arrays["x"].shape == (4, 1)


@pytest.mark.parametrize(
    "versions", [7, np.int64(7), [7, 7], (7.0, 7.0), np.array([7, 7]), VersionSpans.constant(7)]
)
def test_versions_come_in_several_forms(versions: Any) -> None:
    made = coerce_sample([1, 2], [False, True], [0.0, -1.0], versions, 0.0)
    check_samples([made], where=WHERE)
    assert made.versions.expand(2).tolist() == [7, 7]


def test_what_is_right_already_is_not_copied() -> None:
    ids = np.arange(4, dtype=np.int32)
    assert coerce_sample(ids, [1] * 4, [0.0] * 4, 1, 0.0).token_ids is ids


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("token_ids", [1, 2.5], "token_ids[1] is 2.5, no whole number"),
        ("token_ids", [1, 2**31], "token_ids[1] is 2147483648"),
        ("token_ids", [1, 2**70], "token_ids holds object values"),
        ("token_ids", [1, float("nan")], "token_ids[1] is nan"),
        ("token_ids", [1, -1], "token_ids[1] is -1"),
        ("token_ids", ["a", "b"], "token_ids holds <U1 values"),
        ("token_ids", [True, False], "token_ids holds bool values"),
        ("token_ids", [[1, 2]], "token_ids has shape (1, 2)"),
        ("token_ids", [1, [2]], "token_ids is no array"),
        ("loss_mask", [0, 2], "loss_mask[1] is 2; a mask is binary"),
        ("loss_mask", ["0", "1"], "loss_mask holds <U1 values"),
        ("logprobs", [None, 0.0], "logprobs holds object values"),
        ("versions", [1.5, 2], "versions[0] is 1.5"),
        ("versions", -2, "versions[0] is -2"),
        ("reward", None, "reward is None, no number"),
        ("reward", "1.0", "reward is the text '1.0'"),
        ("components", {"x": [1, 2]}, "components['x'] is [1, 2], no number"),
        ("metrics", {"x": None}, "metrics['x'] is None"),
        ("arrays", {"x": [1, [2]]}, "arrays['x'] is no array"),
    ],
)
def test_what_would_lose_something_is_refused_by_field(field: str, value: Any, says: str) -> None:
    loose: dict[str, Any] = {
        "token_ids": [1, 2],
        "loss_mask": [0, 1],
        "logprobs": [0.0, -1.0],
        "versions": 1,
        "reward": 0.0,
        field: value,
    }
    with pytest.raises(InvalidSampleError) as caught:
        coerce_sample(**loose)
    assert says in str(caught.value)


def test_an_empty_list_is_left_for_the_check() -> None:
    made = coerce_sample([], [], [], 1, 0.0)
    with pytest.raises(InvalidSampleError, match="token_ids is empty"):
        check_samples([made], where=WHERE)
