"""What validation accepts, every form of collation takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fixtures.rollouts import make_header, make_rollout, make_sample
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.tensors.collate import collate
from rollfleet.tensors.forms import Forms
from rollfleet.tensors.micro_batches import micro_batches, micro_batches_of
from rollfleet_common.codec import ARRAY_DTYPES, decode_samples, encode_samples
from rollfleet_common.errors import InvalidSampleError, OversizeError
from rollfleet_common.limits import Limits
from rollfleet_common.messages import Header, Rollout, Sample, VersionSpans
from rollfleet_common.validate import check_samples

LIMITS = Limits(samples=8, tokens=64, spans=64, names=8)

dtypes = st.sampled_from([*sorted(ARRAY_DTYPES), ">i4", ">f8", "=u2"]).map(np.dtype)
further = st.lists(st.integers(0, 3), max_size=3)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
numbers = finite | finite.map(np.float32) | st.integers(-(2**100), 2**100) | st.booleans()
numbers = numbers | numbers | numbers | st.floats() | st.integers()


@st.composite
def arrays(draw: st.DrawFn, dtype: "np.dtype[Any]", tokens: int) -> Any:
    shape = draw(further)
    if draw(st.booleans()):
        shape = [tokens, *shape]
    size = int(np.prod(shape)) * dtype.itemsize
    raw = (draw(st.binary(min_size=8, max_size=8)) * (size // 8 + 1))[:size]
    if dtype.kind == "b":
        raw = bytes(size)
    made = np.frombuffer(raw, dtype).reshape(shape)
    return made if draw(st.booleans()) else np.asfortranarray(made)


@st.composite
def samples(draw: st.DrawFn, dtype: "np.dtype[Any]") -> Sample:
    tokens = draw(st.integers(1, 12))
    mask = np.array(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    mask[draw(st.integers(0, tokens - 1))] = True
    cuts = sorted(draw(st.sets(st.integers(1, tokens), max_size=3)))
    starts = [0, *(cut for cut in cuts if cut < tokens)]
    return Sample(
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.full(tokens, -0.5, np.float32),
        versions=VersionSpans(
            np.array(starts, np.int32),
            np.array(
                draw(
                    st.lists(st.integers(0, 2**31 - 1), min_size=len(starts), max_size=len(starts))
                ),
                np.int32,
            ),
        ),
        reward=draw(numbers),
        components=draw(st.dictionaries(st.sampled_from(["a", "\u00e9", ""]), numbers, max_size=2)),
        metrics=draw(st.dictionaries(st.sampled_from(["a", "b"]), numbers, max_size=2)),
        arrays={
            name: draw(arrays(dtype, tokens))
            for name in draw(st.sets(st.sampled_from(["x", "y", "a"]), max_size=2))
        },
        finish_reason=draw(st.text(max_size=3)),
    )


@st.composite
def groups(draw: st.DrawFn) -> list[Rollout]:
    dtype = draw(dtypes)
    rollouts: list[Rollout] = []
    for index in range(draw(st.integers(1, 2))):
        forks = tuple(draw(st.lists(samples(dtype), min_size=1, max_size=2)))
        rollouts.append(Rollout(make_header(forks, index=index, n=2), forks))
    return rollouts


def accepted(drawn: Sequence[list[Rollout]], strict: bool) -> list[Rollout]:
    """What a trainer would hand over of these groups."""
    forms = Forms(strict)
    rollouts: list[Rollout] = []
    for at, group in enumerate(drawn):
        try:
            for rollout in group:
                check_samples(rollout.samples, where="test", limits=LIMITS)
        except InvalidSampleError:
            continue
        if not forms.fit(group)[0]:
            rollouts += [
                Rollout(make_header(r.samples, group=f"g{at}", index=r.header.index), r.samples)
                for r in group
            ]
    return rollouts


@given(st.lists(groups(), min_size=1, max_size=3), st.booleans())
def test_what_is_accepted_is_collated_in_every_form(
    drawn: list[list[Rollout]], strict: bool
) -> None:
    rollouts = accepted(drawn, strict)
    if not rollouts:
        return
    packed = [(r.header, encode_samples(r.samples)) for r in rollouts]
    read = [Rollout(h, decode_samples(p, LIMITS)) for h, p in packed]
    for rollout in read:
        check_samples(rollout.samples, where="test")
    missing: Any = "error" if strict else "fill"
    forms: list[Any] = [rollouts, packed, read]
    for source in forms:
        for side, multiple in (("right", 1), ("left", 4)):
            batch = collate(source, pad_side=side, pad_multiple=multiple, missing=missing)  # type: ignore[call-overload]
            assert batch.rows == sum(len(r.samples) for r in rollouts)
            assert bool(batch.rewards.isfinite().all())
        assert collate(source, form="packed", pad_multiple=4, missing=missing).rows == batch.rows
        for form in ("packed", "padded"):
            for over in ("alone", "truncate"):
                micros = micro_batches(
                    source,
                    budget_tokens=8,
                    form=form,  # type: ignore[arg-type]
                    over=over,  # type: ignore[arg-type]
                    at_least=3,
                    missing=missing,
                )
                made = list(micros.within(micros.totals))
                assert sum(m.tensors.rows for m in made if not m.filler) == batch.rows
            parts = [list(range(len(source))), []]
            assert len(list(micro_batches_of(source, parts, form=form, missing=missing))) == 2  # type: ignore[arg-type]


def test_an_array_without_values_is_collated() -> None:
    """Its form is one value a token, of no numbers."""
    sample = make_sample([1])
    empty = Sample(
        **{
            **{name: getattr(sample, name) for name in Sample.__slots__},
            "arrays": {"topk": np.zeros((3, 0), np.float32)},
        }
    )
    rollout = Rollout(make_header([empty]), (empty,))
    assert collate([rollout]).arrays["topk"].shape == (1, 3, 0)
    assert collate([rollout], form="packed").arrays["topk"].shape == (3, 0)
    (micro,) = micro_batches([rollout], budget_tokens=8)
    assert micro.tensors.arrays["topk"].shape == (3, 0)


def test_padding_beyond_the_cap_is_refused_with_the_numbers() -> None:
    rollouts = [make_rollout([1] * 998), *[make_rollout([1]) for _ in range(99)]]
    collate(rollouts, max_bytes=4 << 20)
    with pytest.raises(OversizeError) as caught:
        collate(rollouts, max_bytes=1 << 20)
    said = str(caught.value)
    assert "a padded batch of 100 rows of 1,000 tokens, the length of row 0 (group 'g' #0)" in said
    assert "of which 1,297 tokens are no padding" in said
    assert "over the cap of 1,048,576 (max_batch_bytes)" in said
    assert 'form="packed"' in said
    assert "micro_batches" in said
    assert collate(rollouts, form="packed", max_bytes=1 << 20).tokens == 1297
    with pytest.raises(OversizeError, match="a packed batch of 1,297 tokens would take"):
        collate(rollouts, form="packed", max_bytes=1 << 10)
    for form in ("packed", "padded"):
        micros = micro_batches(rollouts, budget_tokens=1000, form=form, max_bytes=1 << 17)  # type: ignore[arg-type]
        assert sum(micro.tensors.rows for micro in micros) == 100


def test_terabytes_are_refused_before_they_are_asked_for() -> None:
    """A payload of ten megabytes can ask for this."""
    header: Header = make_rollout([1]).header
    rows = [make_sample([1])] * 2000
    wide = make_sample([1] * 300_000)
    with pytest.raises(OversizeError, match="padded batch of 2,001 rows of 300,002 tokens"):
        collate([Rollout(header, (*rows, wide))], max_bytes=1 << 30)
