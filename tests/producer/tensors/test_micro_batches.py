"""Micro-batches hold every row once, and their weighted losses add up to the loss in one go."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.rollouts import make_header
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from rollfleet.batch import Batch
from rollfleet.policy.metrics import BiasMeter
from rollfleet.tensors.balance import Cost
from rollfleet.tensors.collate import TensorBatch, collate, group_stats
from rollfleet.tensors.micro_batches import (
    MicroBatch,
    MicroBatches,
    micro_batches,
    micro_batches_of,
)
from rollfleet.tensors.packing import StepTotals, plan_headers
from rollfleet.tensors.sequences import shorten
from rollfleet_common.codec import encode_samples
from rollfleet_common.errors import CodecError
from rollfleet_common.messages import Rollout, Sample, VersionSpans

#: The machine may be busy.
timeless = hypothesis_settings(deadline=None)


def sample(tokens: int, *, trained: int | None = None, reward: float = 1.0, **more: Any) -> Sample:
    trained = tokens // 2 if trained is None else trained
    mask = np.arange(tokens) >= tokens - trained
    fields: dict[str, Any] = {
        "token_ids": np.arange(tokens, dtype=np.int32) + 7 * tokens,
        "loss_mask": mask,
        "logprobs": np.where(mask, -np.float32(0.1) * np.arange(tokens, dtype=np.float32), 0),
        "versions": VersionSpans.of([(tokens - trained, -1), (trained, 3)]),
        "reward": reward,
    }
    return Sample(**{**fields, **more})


def rollout(*samples: Sample, group: str = "g", index: int = 0) -> Rollout:
    return Rollout(make_header(samples, group=group, index=index), samples)


SOME = [
    rollout(sample(9, reward=1.0), group="a"),
    rollout(sample(30, reward=2.0), sample(12, trained=0, reward=2.0), group="a", index=1),
    rollout(sample(4, reward=5.0), group="b"),
    rollout(sample(1, trained=1), sample(21), sample(2), group="b", index=1),
]


def loss_of(batch: Any) -> Tensor:
    """Some loss for every token."""
    return batch.logprobs * batch.input_ids.float().cos() * 3 + batch.loss_mask * 0.25


def by_rows(micros: MicroBatches) -> list[int]:
    return sorted(row for micro in micros if not micro.filler for row in micro.rows.tolist())


# ---- the loss ---------------------------------------------------------------------------------

shapes = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=3),
    min_size=1,
    max_size=8,
)


def made(shape: list[list[tuple[int, int]]]) -> list[Rollout]:
    return [
        rollout(*(sample(n, trained=min(k, n)) for n, k in forks), group=f"g{i // 2}", index=i % 2)
        for i, forks in enumerate(shape)
    ]


def in_one_go(rollouts: list[Rollout]) -> dict[str, float]:
    """The three means, by definition."""
    batch = collate(rollouts)
    loss, mask = loss_of(batch).double(), batch.loss_mask
    rows = [(loss[r][mask[r]], int(batch.rollout_ids[r])) for r in range(batch.rows)]
    by_rollout: dict[int, list[Tensor]] = {}
    for tokens, of in rows:
        by_rollout.setdefault(of, []).append(tokens)
    wholes = [torch.cat(parts) for parts in by_rollout.values()]
    trained = [tokens for tokens, _ in rows if len(tokens)]
    joined = [tokens for tokens in wholes if len(tokens)]
    if not trained:
        return dict.fromkeys(("token", "row", "rollout"), 0.0)
    return {
        "token": float(torch.cat(trained).mean()),
        "row": float(torch.stack([t.mean() for t in trained]).mean()),
        "rollout": float(torch.stack([t.mean() for t in joined]).mean()),
    }


@timeless
@given(
    shapes,
    st.integers(1, 4),
    st.integers(8, 90),
    st.sampled_from(["packed", "padded"]),
    st.booleans(),
)
def test_losses_add_up_to_the_loss_in_one_go(
    shape: list[list[tuple[int, int]]], ranks: int, budget: int, form: Any, as_bytes: bool
) -> None:
    rollouts = made(shape)
    plan = plan_headers(
        [r.header for r in rollouts], ranks=ranks, budget_tokens=budget, whole_groups=False
    )
    shares = [[rollouts[i] for i in plan.share(rank)] for rank in range(ranks)]
    mine = [
        micro_batches(
            [(r.header, encode_samples(r.samples)) for r in share] if as_bytes else share,
            budget_tokens=budget,
            form=form,
            pad_multiple=8,
            at_least=1,
        )
        for share in shares
    ]
    step = sum((micros.totals for micros in mine), StepTotals())
    every = [micros.within(step) for micros in mine]
    assert {len(micros) for micros in every} == {step.micro_batches}
    wanted = in_one_go(rollouts)
    for mean, want in wanted.items():
        got = sum(
            float((loss_of(micro.tensors) * micro.weights(mean)).double().sum())  # type: ignore[arg-type]
            for micros in every
            for micro in micros
        )
        assert got == pytest.approx(want, abs=1e-5), mean
    for share, micros in zip(shares, every, strict=True):
        assert by_rows(micros) == list(range(sum(len(r.samples) for r in share)))


def test_the_example_of_the_documentation_is_a_mean() -> None:
    theta = torch.tensor(2.0, requires_grad=True)
    whole = collate(SOME)
    ((loss_of(whole) * theta * whole.loss_mask).sum() / whole.loss_mask.sum()).backward()
    assert theta.grad is not None
    want = theta.grad.clone()
    theta.grad = None
    for micro in micro_batches(SOME, budget_tokens=32):
        (loss_of(micro.tensors) * theta * micro.weights()).sum().backward()
    assert torch.allclose(theta.grad, want)


# ---- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_micro_batches_hold_the_rows_of_the_batch(form: Any) -> None:
    whole = collate(SOME)
    micros = micro_batches(SOME, budget_tokens=40, form=form, pad_multiple=4)
    assert by_rows(micros) == list(range(7))
    assert len(micros) > 1
    for micro in micros:
        t = micro.tensors
        assert t.input_ids.numel() <= 40
        assert torch.equal(t.lengths, whole.lengths[micro.rows])
        assert torch.equal(t.group_ids, whole.group_ids[micro.rows])
        assert torch.equal(t.rollout_ids, whole.rollout_ids[micro.rows])
        assert torch.equal(t.oldest, whole.oldest[micro.rows])
        assert t.groups == whole.groups
        mask = torch.nn.utils.rnn.pad_sequence(
            [whole.input_ids[row, : whole.lengths[row]] for row in micro.rows], batch_first=True
        )
        ours = (
            t.input_ids[t.attention_mask] if isinstance(t, TensorBatch) else t.input_ids[: t.tokens]
        )
        lengths = whole.lengths[micro.rows]
        real = torch.arange(mask.shape[1]) < lengths[:, None]
        assert torch.equal(ours, mask[real])


def test_statistics_are_of_the_whole_step() -> None:
    micros = micro_batches(SOME, budget_tokens=32)
    stats, want = group_stats(micros), group_stats(collate(SOME))
    assert torch.equal(stats.mean, want.mean)
    assert stats.mean.tolist() == [1.5, 3.0]
    advantages = micros.rewards - stats.mean[micros.group_ids]
    for micro in micros:
        same = micro.tensors.rewards - stats.mean[micro.tensors.group_ids]
        assert torch.equal(advantages[micro.rows], same)


def test_statistics_of_one_micro_batch_leave_out_who_is_not_there() -> None:
    micros = micro_batches_of(SOME, [(0, 1), (2, 3)])
    first = group_stats(micros[0].tensors)
    assert first.size.tolist() == [2, 0]
    assert first.mean.tolist()[0] == 1.5
    assert first.mean[1].isnan()
    assert first.std[1].isnan()


def test_a_plan_from_headers_is_followed_forks_and_all() -> None:
    micros = micro_batches_of(SOME, [(1,), (), (3, 0), (2,)], form="padded")
    assert [micro.rows.tolist() for micro in micros] == [[1, 2], [-1], [4, 5, 6, 0], [3]]
    assert [micro.filler for micro in micros] == [False, True, False, False]
    assert [micro.last for micro in micros] == [False, False, False, True]
    for wrong in ([(0, 1), (2,)], [(0, 1), (2, 3, 3)]):
        with pytest.raises(ValueError, match="4 rollouts, each of them once"):
            micro_batches_of(SOME, wrong)


def test_they_are_a_sequence() -> None:
    micros = micro_batches(SOME, budget_tokens=32)
    assert isinstance(micros[-1], MicroBatch)
    assert micros[-1].last
    assert [micro.index for micro in micros[1:]] == list(range(1, len(micros)))
    with pytest.raises(IndexError):
        micros[len(micros)]


# ---- fillers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_a_filler_weighs_nothing_and_runs(form: Any) -> None:
    extras = {"metrics": {"turns": 2.0}, "arrays": {"x": np.ones((3, 2)), "y": np.ones(7)}}
    micros = micro_batches(
        [rollout(sample(3, **extras))],
        budget_tokens=8,
        form=form,
        at_least=2,
        pad_multiple=4,
        pad_id=9,
    )
    real, filler = micros
    assert (real.filler, filler.filler) == (False, True)
    t = filler.tensors
    assert t.input_ids.unique().tolist() == [9]
    assert t.input_ids.numel() == 4
    assert not t.loss_mask.any()
    assert (t.group_ids.tolist(), t.rollout_ids.tolist()) == ([-1], [-1])
    assert set(t.arrays) == set(real.tensors.arrays) == {"x"}
    assert t.arrays["x"].shape[-1] == 2
    assert t.metrics["turns"].isnan().all()
    assert t.lists == {"y": [None]}
    for mean in ("token", "row", "rollout"):
        assert not filler.weights(mean).any()  # type: ignore[arg-type]
    assert group_stats(t).mean.isnan().all()
    advantages = torch.ones(1)
    assert (advantages[filler.rows] * filler.weights().sum()).tolist() == [0.0]


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("value", [3, True, 2.5])
def test_a_filler_has_a_value_of_what_every_row_has_one_of(form: Any, value: Any) -> None:
    """Without dimensions, and of a dtype that cannot say NaN: nobody fills in for it."""
    array = np.array(value)
    only = [rollout(sample(4, arrays={"turns": array}))]
    real, filler = micro_batches(only, budget_tokens=8, at_least=2, form=form)
    assert filler.filler
    there, here = real.tensors.arrays["turns"], filler.tensors.arrays["turns"]
    assert there.tolist() == [value]
    assert here.dtype == there.dtype
    assert here.isnan().all() if array.dtype.kind == "f" else here.tolist() == [0]


def test_a_rank_without_rollouts_has_fillers() -> None:
    none = micro_batches([], budget_tokens=8, at_least=2)
    assert [micro.filler for micro in none] == [True, True]
    step = none.totals + micro_batches(SOME, budget_tokens=32).totals
    assert len(none.within(step)) == step.micro_batches
    assert none.within(step)[0].step.trained_tokens == step.trained_tokens
    with pytest.raises(ValueError, match="empty batch"):
        micro_batches([], budget_tokens=8)


def test_what_is_no_sum_of_all_ranks_is_refused() -> None:
    micros = micro_batches(SOME, budget_tokens=32)
    with pytest.raises(ValueError, match="not the sum of all ranks"):
        micros.within(replace(micros.totals, micro_batches=1))


# ---- bad input --------------------------------------------------------------------------------


def test_a_row_over_the_budget() -> None:
    alone = micro_batches(SOME, budget_tokens=24)
    assert max(micro.tensors.tokens for micro in alone) == 30
    assert [len(micro.rows) for micro in alone if micro.tensors.tokens == 30] == [1]
    cut = micro_batches(SOME, budget_tokens=24, over="truncate")
    assert max(micro.tensors.tokens for micro in cut) == 24
    assert by_rows(cut) == list(range(7))
    assert cut.totals.trained_tokens == alone.totals.trained_tokens - 6
    with pytest.raises(ValueError, match="longer than the budget"):
        micro_batches(SOME, budget_tokens=24, over="refuse")


def test_a_shortened_sample_is_the_beginning_of_it() -> None:
    whole = sample(8, arrays={"a": np.arange(8), "b": np.arange(3), "c": np.array(4)})
    short = shorten(whole, 5)
    assert short.token_ids.tolist() == whole.token_ids[:5].tolist()
    assert short.versions.expand(5).tolist() == whole.versions.expand(8)[:5].tolist()
    assert [len(np.atleast_1d(short.arrays[k])) for k in "abc"] == [5, 3, 1]
    assert shorten(whole, 4).versions.versions.tolist() == [-1]


def test_nothing_is_trained_at_all() -> None:
    micros = micro_batches([rollout(sample(3, trained=0))], budget_tokens=8)
    assert micros.totals == StepTotals(0, 0, 0, 1)
    (micro,) = micros
    for mean in ("token", "row", "rollout"):
        assert not micro.weights(mean).any()  # type: ignore[arg-type]
    assert micro.tensors.oldest.tolist() == [-1]
    with pytest.raises(ValueError, match="mean 'sequence'"):
        micro.weights("sequence")  # type: ignore[arg-type]


def test_mixed_extras_have_one_form_in_all_micro_batches() -> None:
    rollouts = [
        rollout(sample(4, metrics={"a": 1.0}, arrays={"x": np.ones(4), "n": np.array(3)})),
        rollout(sample(6), index=1),
        rollout(sample(5, arrays={"x": np.ones(9)}), index=2),
    ]
    with pytest.raises(ValueError, match="is missing in row"):
        micro_batches(rollouts, budget_tokens=6)
    micros = micro_batches(rollouts, budget_tokens=6, missing="fill")
    assert len(micros) == 3
    for micro in micros:
        # Somewhere x is not of one value a token, so it is a list everywhere.
        assert set(micro.tensors.lists) == {"x"}
        assert set(micro.tensors.arrays) == {"n"}
        assert micro.tensors.arrays["n"].dtype == torch.float64
        assert set(micro.tensors.metrics) == {"a"}


def test_a_corrupted_payload_is_a_codec_error() -> None:
    packed = bytearray(encode_samples([sample(600)]))
    packed[9:11] = b"\xff\xff"
    with pytest.raises(CodecError):
        micro_batches([(make_header([sample(600)]), bytes(packed))], budget_tokens=1000)


@pytest.mark.parametrize(
    "said",
    [{"pad_multiple": 0}, {"budget_tokens": 0}, {"form": "ragged"}, {"ids_dtype": torch.int16}],
)
def test_what_cannot_be_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(said))):
        micro_batches(SOME, **{"budget_tokens": 40, **said})


# ---- where a trainer meets them ---------------------------------------------------------------


def test_a_batch_gives_micro_batches_with_its_own_options() -> None:
    batch = Batch(1, 3, SOME, {}, BiasMeter(), [], collate={"pad_id": 5, "pad_multiple": 8})
    micros = batch.micro_batches(40, cost=Cost.attention(8))
    assert by_rows(micros) == list(range(7))
    for micro in micros:
        assert micro.tensors.input_ids.shape[0] % 8 == 0
    moved = batch.micro_batches(40, form="padded", device="meta")
    assert moved[0].tensors.input_ids.device.type == "meta"
    assert moved[0].weights().device.type == "meta"
    assert moved.rewards.device.type == "meta"
