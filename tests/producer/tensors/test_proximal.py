"""Proximal log-probabilities are what a direct computation gives, at the tokens that need them."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from fixtures.rollouts import make_header, make_rollout, make_sample
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rollfleet.tensors.collate import collate
from rollfleet.tensors.padded import TensorBatch
from rollfleet.tensors.proximal import (
    proximal_logprobs,
    segment_mask,
    token_logprobs,
    token_staleness,
)
from rollfleet_common.messages import Rollout

VOCABULARY = 32
#: Rows: all fresh; a stale head; all stale; a stale span between two prompts' worth of tool output.
VERSIONS = [[5, 5], [3, 4, 5], [2, 3], [4, -1, -1, 5, 5]]

Side = Literal["right", "left"]


class Tiny(nn.Module):
    """A causal model: each position sees the mean of the embeddings up to it, padding left out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = attention_mask.unsqueeze(-1).float()
        total = (self.embed[input_ids] * seen).cumsum(1)
        return (total / seen.cumsum(1).clamp(min=1)) @ self.head

    def logprobs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return token_logprobs(self(input_ids, attention_mask), input_ids)


def batch_of(versions: list[list[int]] = VERSIONS, side: Side = "right") -> TensorBatch:
    return collate(
        [make_rollout(row, group=f"g{i}") for i, row in enumerate(versions)],
        pad_side=side,
        pad_multiple=4,
    )


def directly(model: Tiny, ids: list[int]) -> list[float]:
    """Token by token, from a softmax, one prefix at a time."""
    found = [0.0]
    for at in range(1, len(ids)):
        prefix = torch.tensor([ids[:at]])
        logits = model(prefix, torch.ones_like(prefix, dtype=torch.bool))[0, -1]
        found.append(logits.softmax(-1)[ids[at]].log().item())
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows_per_call", [None, 1, 2, 100])
def test_recomputed_tokens_match_a_direct_computation(
    side: Side, rows_per_call: int | None
) -> None:
    model, batch = Tiny(1), batch_of(side=side)
    proximal = proximal_logprobs(batch, 5, model.logprobs, rows_per_call=rows_per_call)
    assert proximal.shape == batch.logprobs.shape
    assert not proximal.requires_grad
    for row, versions in enumerate(VERSIONS):
        at = batch.attention_mask[row]
        direct = directly(model, batch.input_ids[row][at].tolist())
        made = proximal[row][at].tolist()
        for t, version in enumerate([-1, -1, *versions]):
            wanted = direct[t] if 0 <= version < 5 else float(batch.logprobs[row][at][t])
            assert made[t] == pytest.approx(wanted, abs=1e-5), (row, t)
    assert (proximal[~batch.attention_mask] == 0).all()


@given(
    st.lists(
        st.lists(st.integers(0, 6), min_size=1, max_size=6).map(sorted), min_size=1, max_size=5
    ),
    st.sampled_from(["right", "left"]),
)
def test_only_stale_trained_tokens_change(versions: list[list[int]], side: Side) -> None:
    batch = batch_of(versions, side)
    proximal = proximal_logprobs(batch, 6, Tiny(2).logprobs)
    changed = proximal != batch.logprobs
    assert torch.equal(changed, batch.loss_mask & (batch.versions < 6))


def test_only_rows_with_something_to_recompute_are_computed() -> None:
    model, seen = Tiny(1), []

    def recompute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(len(input_ids))
        assert not torch.is_grad_enabled()
        return model.logprobs(input_ids, attention_mask)

    proximal_logprobs(batch_of(), 5, recompute)
    proximal_logprobs(batch_of(), 5, recompute, rows="all")
    proximal_logprobs(batch_of(), 5, recompute, rows="all", rows_per_call=3)
    proximal_logprobs(batch_of([[5], [5, 5]]), 5, recompute)  # nothing is stale: not called
    assert seen == [3, 4, 3, 1]


def test_rows_all_recomputes_every_trained_token() -> None:
    model, batch = Tiny(1), batch_of()
    proximal = proximal_logprobs(batch, 5, model.logprobs, rows="all")
    direct = model.logprobs(batch.input_ids, batch.attention_mask)
    assert torch.allclose(proximal[batch.loss_mask], direct[batch.loss_mask])
    assert torch.equal(proximal[~batch.loss_mask], batch.logprobs[~batch.loss_mask])


def test_a_row_recomputed_in_its_second_segment_is_not_misaligned() -> None:
    # From the second interruption on, a known implementation wrote the last segment's numbers at
    # the first segment's place.
    batch = batch_of([[2, 2, 3, 3, 4, 4, 5, 5]])
    made = torch.arange(batch.logprobs.numel()).reshape(batch.logprobs.shape).float() / -100
    proximal = proximal_logprobs(batch, 5, lambda *_: made)
    assert proximal[0].tolist() == pytest.approx(
        [0.0, 0.0, -0.02, -0.03, -0.04, -0.05, -0.06, -0.07, -0.5, -0.5, 0.0, 0.0]
    )


def test_masked_tokens_are_not_worth_a_forward_pass() -> None:
    sample = make_sample([3, 5], mask=[False, True])
    batch = collate([Rollout(make_header([sample]), (sample,))])

    def never(*_: Tensor) -> Tensor:
        raise AssertionError

    assert torch.equal(proximal_logprobs(batch, 5, never), batch.logprobs)


# ---- approximations ------------------------------------------------------------------------------


def test_loglinear_by_hand() -> None:
    # Behind by 0, 1, 2, 4 versions: alpha = 0, 1/2, 2/3, 4/5 of the way from -0.5 to -1.0.
    batch = batch_of([[1, 3, 4, 5]])
    theta = torch.full_like(batch.logprobs, -1.0).requires_grad_()
    proximal = proximal_logprobs(batch, 5, method="loglinear", theta=theta)
    assert proximal[0].tolist() == pytest.approx(
        [0.0, 0.0, -0.9, -0.5 - 0.5 * 2 / 3, -0.75, -0.5, 0.0, 0.0]
    )
    assert not proximal.requires_grad


def test_linear_by_hand() -> None:
    batch = batch_of([[4, 5]])
    theta = torch.full_like(batch.logprobs, -1.5)
    proximal = proximal_logprobs(batch, 5, method="linear", theta=theta)
    mean = np.log((np.exp(-0.5) + np.exp(-1.5)) / 2)
    assert proximal[0].tolist() == pytest.approx([0.0, 0.0, mean, -0.5])


def test_behaviour_is_plain_ppo_and_a_copy() -> None:
    batch = batch_of()
    proximal = proximal_logprobs(batch, 5, method="behaviour")
    assert torch.equal(proximal, batch.logprobs)
    assert proximal.data_ptr() != batch.logprobs.data_ptr()


def test_loglinear_is_exact_where_policies_drift_in_a_straight_line() -> None:
    batch = batch_of([[0, 2, 3, 5]])
    drift = torch.where(batch.loss_mask, -0.1, 0.0)
    at = {v: batch.logprobs + drift * (v - batch.versions) for v in (5, 6)}
    proximal = proximal_logprobs(batch, 5, method="loglinear", theta=at[6])
    assert torch.allclose(proximal, at[5], atol=1e-6)


# ---- segments ------------------------------------------------------------------------------------


def test_segments_and_staleness_leave_prompts_and_padding_out() -> None:
    batch = batch_of([[0, 1, -1, 3], [3]])
    assert token_staleness(batch, 3).tolist() == [
        [0, 0, 3, 2, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert token_staleness(batch, 5)[1].tolist() == [0, 0, 2, 0, 0, 0, 0, 0]
    assert segment_mask(batch).sum() == 4
    assert segment_mask(batch, newest=1).nonzero().tolist() == [[0, 2], [0, 3]]
    assert segment_mask(batch, oldest=1, newest=1).nonzero().tolist() == [[0, 3]]
    assert segment_mask(batch, oldest=3).nonzero().tolist() == [[0, 5], [1, 2]]


def test_versions_counted_anew_after_a_rollback_are_versions() -> None:
    batch = batch_of([[0]])
    batch.versions[batch.loss_mask] = -3
    assert token_staleness(batch, 2)[0].tolist() == [0, 0, 5, 0]


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda ids: torch.zeros(len(ids), ids.shape[1] - 1), "put a 0.0 before each row"),
        (lambda ids: torch.zeros(*ids.shape, VOCABULARY), "token_logprobs"),
        (lambda ids: torch.zeros(len(ids) + 1, ids.shape[1]), r"shape \[4, 8\], not \[3, 8\]"),
        (lambda ids: torch.zeros(ids.numel()), "shape"),
        (torch.zeros_like, "int64, not a tensor of floats"),
        (torch.Tensor.tolist, "list, not a tensor"),
        (lambda ids: torch.full(ids.shape, float("nan")), "nan for row 0 token 2"),
    ],
)
def test_a_recompute_that_does_not_fit_is_refused_in_words(made: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        proximal_logprobs(batch_of(), 5, lambda ids, _: made(ids))


def test_not_finite_where_nothing_is_recomputed_is_no_error() -> None:
    def recompute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        made = Tiny(1).logprobs(input_ids, attention_mask)
        return made.masked_fill(~attention_mask, float("nan"))

    assert proximal_logprobs(batch_of(), 5, recompute).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs a `recompute`"),
        ({"recompute": torch.zeros, "rows_per_call": 0}, "rows_per_call is 0"),
        ({"method": "loglinear"}, "needs `theta`"),
        ({"method": "loglinear", "theta": torch.zeros(4, 7)}, r"theta has shape \[4, 7\]"),
        ({"method": "loglinear", "theta": torch.full((4, 8), torch.nan)}, "theta is nan"),
        ({"method": "guess", "theta": torch.zeros(4, 8)}, "'guess'.*recompute"),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        proximal_logprobs(batch_of(), 5, **arguments)


def test_a_version_past_the_proximal_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="version 5, newer than the proximal policy's version 4"):
        proximal_logprobs(batch_of(), 4, method="behaviour")


def test_token_logprobs() -> None:
    logits = torch.tensor([[[0.0, np.log(3.0)], [np.log(4.0), 0.0], [9.0, 9.0]]])
    ids = torch.tensor([[0, 1, 0]], dtype=torch.int32)
    assert token_logprobs(logits, ids)[0].tolist() == pytest.approx(
        [0.0, np.log(3 / 4), np.log(4 / 5)]
    )
    cool = token_logprobs(logits, ids, temperature=0.5)
    assert cool[0].tolist() == pytest.approx([0.0, np.log(9 / 10), np.log(16 / 17)])
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] do not fit input_ids \[1, 3\]"):
        token_logprobs(logits[:, 1:], ids)
