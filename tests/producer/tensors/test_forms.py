"""The form of named arrays: fixed by the first group, kept for the next trainer, same on all ranks."""

from typing import Any

import numpy as np
import pytest
from fixtures.rollouts import make_header, make_sample
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.tensors.forms import Form, Forms, merged
from rollfleet_common.errors import CodecError
from rollfleet_common.messages import Rollout, Sample


def sample(tokens: int = 4, **changes: Any) -> Sample:
    made = make_sample([1] * (tokens - 2))
    fields = {name: getattr(made, name) for name in Sample.__slots__}
    return Sample(**{**fields, **changes})


def group(*samples: Sample) -> list[Rollout]:
    return [Rollout(make_header([s]), (s,)) for s in samples]


def arrays(tokens: int = 4, **named: Any) -> Sample:
    return sample(tokens, arrays=named)


def token(tokens: int, *further: int, dtype: str = "<f4") -> Any:
    return np.zeros((tokens, *further), dtype)


@pytest.mark.parametrize(
    ("first", "form"),
    [
        ([arrays(x=np.float32(1).reshape(()).copy())], Form("number", "<f4", ())),
        ([arrays(4, x=token(4)), arrays(7, x=token(7))], Form("token", "<f4", ())),
        ([arrays(3, x=token(3, 0))], Form("token", "<f4", (0,))),
        ([arrays(4, x=token(4, 2, dtype="<i8"))], Form("token", "<i8", (2,))),
        ([arrays(4, x=token(4, 2, dtype=">i8"))], Form("token", "<i8", (2,))),
        ([arrays(4, x=token(4)), arrays(7, x=token(4))], Form("list", "<f4", (0,))),
        ([arrays(4, x=token(3, 5)), arrays(4, x=token(2, 6))], Form("list", "<f4", (0, 0))),
    ],
)
def test_the_first_group_fixes_the_form(first: list[Sample], form: Form) -> None:
    forms = Forms()
    assert forms.fit(group(*first))[0] == ""
    assert forms.arrays == {"x": form}
    again = Forms(known=forms.dumps())
    assert again.arrays == forms.arrays
    assert again.dumps() == forms.dumps()
    assert again.fit(group(*first))[0] == ""


@pytest.mark.parametrize(
    ("first", "later", "says"),
    [
        (token(4), token(4, dtype="<f8"), "float64[4], where the run's first group had <f4[T]"),
        (token(4), token(4, 1), "float32[4, 1], where the run's first group had <f4[T]"),
        (token(4), token(3), "float32[3], where the run's first group had <f4[T]"),
        (token(4), np.zeros((), "<f4"), "float32[], where the run's first group had <f4[T]"),
        (np.zeros((), "<f4"), token(4), "float32[4], where the run's first group had <f4[]"),
        (token(3), token(3, dtype="<i4"), "where the run's first group had <f4 with 1 axes"),
        (token(3), token(3, 3), "where the run's first group had <f4 with 1 axes"),
        (token(4, 0), token(4, 2), "where the run's first group had <f4[T, 0]"),
    ],
)
def test_what_differs_later_does_not_fit(first: Any, later: Any, says: str) -> None:
    forms = Forms()
    assert forms.fit(group(arrays(x=first)))[0] == ""
    why, _ = forms.fit(group(arrays(x=later)))
    assert why.startswith("arrays['x']: ")
    assert says in why
    # Nothing was learned from what does not fit.
    assert forms.fit(group(arrays(x=first)))[0] == ""
    assert forms.fit(group(arrays(x=later, y=token(4))))[0] == why
    assert set(forms.arrays) == {"x"}


def test_a_group_that_disagrees_with_itself_fixes_nothing() -> None:
    forms = Forms()
    why, _ = forms.fit(group(arrays(x=token(4)), arrays(x=token(4, dtype="<f8"))))
    assert "float32[4] in one row and float64[4] in another" in why
    assert forms.dumps() == ""


def test_a_list_may_be_as_long_as_its_row() -> None:
    forms = Forms()
    assert forms.fit(group(arrays(9, x=token(3))))[0] == ""
    assert forms.fit(group(arrays(3, x=token(3))))[0] == ""


def test_names_may_come_and_go_where_batches_are_filled() -> None:
    forms = Forms()
    for each in (arrays(x=token(4)), sample(metrics={"a": 1.0}), arrays(y=token(4, 2))):
        assert forms.fit(group(each))[0] == ""
    assert set(forms.arrays) == {"x", "y"}


def test_names_are_those_of_the_first_where_batches_refuse_what_is_missing() -> None:
    forms = Forms(strict=True)
    assert forms.fit(group(sample(metrics={"a": 1.0})))[0] == ""
    for other in (Forms(strict=True, known=forms.dumps()), forms):
        assert other.fit(group(sample(metrics={"a": 2.0})))[0] == ""
        assert "metrics['a'] is missing" in other.fit(group(sample()))[0]
        why, _ = other.fit(group(sample(metrics={"a": 1.0, "b": 1.0})))
        assert "metrics['b'] is not of the run" in why
    fresh = Forms(strict=True)
    assert "is missing" in fresh.fit(group(sample(metrics={"a": 1.0}), sample()))[0]
    assert fresh.dumps() == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"arrays": 3}', '{"arrays": {"x": [1]}, "names": 1}'])
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(CodecError, match="the form of the run's arrays"):
        Forms(known=text)


def test_ranks_agree_by_the_first_that_knows() -> None:
    one, two, three = Forms(), Forms(), Forms()
    one.fit(group(arrays(x=token(4))))
    two.fit(group(arrays(y=token(4))))
    three.fit(group(arrays(x=token(4, dtype="<f8"))))
    form, agreed = merged(False, [one.dumps(), "", two.dumps()])
    assert agreed
    assert set(Forms(known=form).arrays) == {"x", "y"}
    form, agreed = merged(False, [one.dumps(), three.dumps()])
    assert not agreed
    before = three.revision
    three.replace(form)
    assert three.revision > before
    assert three.arrays == one.arrays
    assert "float64" in three.fit(group(arrays(x=token(4, dtype="<f8"))))[0]
    assert merged(False, [one.dumps(), three.dumps()]) == (form, True)


@given(st.text(max_size=40) | st.recursive(st.none() | st.integers(), st.lists).map(str))
def test_any_text_is_a_form_or_refused(text: str) -> None:
    try:
        forms = Forms(known=text)
    except CodecError:
        return
    assert Forms(known=forms.dumps()).arrays == forms.arrays
