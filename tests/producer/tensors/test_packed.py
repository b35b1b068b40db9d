"""A packed batch holds what the padded one holds, and a model gives the same on both."""

from typing import Any

import numpy as np
import pytest
import torch
from fixtures.rollouts import make_header
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rollfleet.tensors.collate import PackedBatch, TensorBatch, collate, group_stats
from rollfleet.tensors.proximal import token_logprobs
from rollfleet_common.codec import encode_samples
from rollfleet_common.messages import Rollout, Sample, VersionSpans

#: The machine may be busy.
timeless = hypothesis_settings(deadline=None)

TOKEN_FIELDS = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "row_ids": torch.int32,
    "loss_mask": torch.bool,
    "logprobs": torch.float32,
    "versions": torch.int32,
}


def sample(tokens: int, seed: int = 0, **changes: Any) -> Sample:
    rng = np.random.default_rng(seed)
    prompt = tokens // 2
    fields: dict[str, Any] = {
        "token_ids": rng.integers(0, 50, tokens).astype(np.int32),
        "loss_mask": np.arange(tokens) >= prompt,
        "logprobs": np.where(np.arange(tokens) >= prompt, np.float32(-0.5), np.float32(0)),
        "versions": VersionSpans.of([(prompt, -1), (tokens - prompt, 3 + seed)]),
        "reward": float(seed),
    }
    return Sample(**{**fields, **changes})


def rollout(*samples: Sample, group: str = "g", index: int = 0) -> Rollout:
    return Rollout(make_header(samples, group=group, index=index), samples)


THREE = [
    rollout(sample(3), group="a"),
    rollout(sample(5, 1), sample(1, 2), group="b"),
]


def test_shapes_and_dtypes() -> None:
    batch = collate(THREE, form="packed", pad_multiple=4)
    assert isinstance(batch, PackedBatch)
    for name, dtype in TOKEN_FIELDS.items():
        assert getattr(batch, name).shape == (12,), name
        assert getattr(batch, name).dtype == dtype, name
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.rows, batch.tokens, batch.tail, batch.max_seqlen) == (3, 9, 3, 5)
    small = collate(THREE, form="packed", ids_dtype=torch.int32)
    assert small.input_ids.dtype == small.position_ids.dtype == torch.int32


def test_rows_lie_one_behind_the_other_and_the_tail_is_its_own() -> None:
    batch = collate(THREE, form="packed", pad_multiple=4, pad_id=77)
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert batch.row_ids.tolist() == [0] * 3 + [1] * 5 + [2] + [-1] * 3
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 9, 12]
    assert batch.input_ids[9:].tolist() == [77] * 3
    assert not batch.loss_mask[9:].any()
    assert batch.versions[9:].tolist() == [-1] * 3
    assert batch.logprobs[9:].tolist() == [0.0] * 3
    assert collate(THREE, form="packed").cu_seqlens.tolist() == [0, 3, 8, 9]


def test_a_long_tail_is_the_longest_sequence() -> None:
    batch = collate(THREE, form="packed", pad_multiple=64)
    assert (batch.tail, batch.max_seqlen) == (55, 55)


@timeless
@given(
    st.lists(
        st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6
    ),
    st.integers(1, 16),
    st.booleans(),
)
def test_it_holds_what_the_padded_batch_holds(
    shape: list[tuple[int, ...]], multiple: int, as_bytes: bool
) -> None:
    def extras(n: int) -> dict[str, Any]:
        return {
            "components": {"fmt": float(n)},
            "arrays": {"score": np.full((n, 2), n, np.float16), "image": np.zeros(n % 3)},
        }

    rollouts = [
        rollout(*(sample(n, i, **extras(n)) for i, n in enumerate(forks)), group=f"g{k // 2}")
        for k, forks in enumerate(shape)
    ]
    given_form: Any = [(r.header, encode_samples(r.samples)) for r in rollouts]
    packed = collate(given_form if as_bytes else rollouts, form="packed", pad_multiple=multiple)
    padded = collate(rollouts)
    assert packed.input_ids.shape[0] % multiple == 0
    assert packed.tokens == padded.tokens
    assert 0 <= packed.tail < multiple
    real = padded.attention_mask
    for name in ("input_ids", "loss_mask", "logprobs", "versions"):
        assert torch.equal(getattr(packed, name)[: packed.tokens], getattr(padded, name)[real])
    assert torch.equal(packed.arrays["score"][: packed.tokens], padded.arrays["score"][real])
    assert not packed.arrays["score"][packed.tokens :].any()
    for name in ("rewards", "group_ids", "rollout_ids", "lengths", "oldest"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    assert torch.equal(packed.components["fmt"], padded.components["fmt"])
    assert (packed.groups, packed.headers) == (padded.groups, padded.headers)
    assert packed.max_seqlen == max(*packed.lengths.tolist(), packed.tail)
    stats, same = group_stats(packed), group_stats(padded)
    assert torch.equal(stats.mean, same.mean)
    assert torch.equal(stats.size, same.size)
    assert torch.equal(packed.staleness(9), padded.staleness(9))
    sums = packed.row_sum(packed.logprobs * packed.loss_mask)
    assert torch.allclose(sums, (padded.logprobs * padded.loss_mask).sum(1))


def test_no_padding_on_the_left_of_what_has_none() -> None:
    with pytest.raises(ValueError, match="pad_side"):
        collate(THREE, form="packed", pad_side="left")
    with pytest.raises(ValueError, match="form 'ragged'"):
        collate(THREE, form="ragged")  # type: ignore[call-overload]


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = collate([rollout(sample(3, metrics={"a": 1.0}))], form="packed")
    moved = batch.to("meta")
    for name in (*TOKEN_FIELDS, "cu_seqlens", "rewards", "lengths", "oldest"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.metrics["a"].device.type == "meta"
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    batch = collate(THREE, form="packed", pin=True)
    moved = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.input_ids.cpu(), batch.input_ids)
    assert torch.equal(moved.row_sum(moved.logprobs).cpu(), batch.row_sum(batch.logprobs))


# ---- a model ----------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two layers of causal attention; which tokens may see each other is said by `allowed`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(128, 32)
        self.places = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(32, 96), nn.Linear(32, 32)]) for _ in range(2)
        )
        self.head = nn.Linear(32, 128)

    def forward(self, ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(positions)
        for qkv, out in self.blocks:  # type: ignore[misc]
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
            x = x + torch.tanh(out(seen.transpose(1, 2).flatten(2)))
        return self.head(x)  # type: ignore[no-any-return]


def on_padded(model: Tiny, batch: TensorBatch) -> Tensor:
    """[tokens, 128]: logits of the real tokens."""
    width = batch.input_ids.shape[1]
    positions = torch.arange(width).expand_as(batch.input_ids)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    allowed = causal & batch.attention_mask[:, None, :]
    return model(batch.input_ids, positions, allowed)[batch.attention_mask]


def on_packed(model: Tiny, batch: PackedBatch) -> Tensor:
    """The same, by the sequences that cu_seqlens says."""
    total = batch.input_ids.shape[0]
    lengths = batch.cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    allowed = causal & (sequence[:, None] == sequence[None, :])
    logits = model(batch.input_ids[None], batch.position_ids[None], allowed[None])[0]
    assert torch.isfinite(logits).all(), "the tail, too, is defined"
    return logits[: batch.tokens]


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_model_gives_the_same_logits(multiple: int) -> None:
    rollouts = [rollout(sample(n, n), group=str(n)) for n in (7, 1, 12, 20, 3)]
    model = Tiny().eval()
    padded, packed = collate(rollouts), collate(rollouts, form="packed", pad_multiple=multiple)
    with torch.no_grad():
        one, other = on_padded(model, padded), on_packed(model, packed)
    assert torch.allclose(one, other, atol=1e-5)
    # Log-probabilities, too, when rows' first tokens are left out.
    with torch.no_grad():
        scattered = torch.zeros(*padded.input_ids.shape, 128)
        scattered[padded.attention_mask] = one
    want = token_logprobs(scattered, padded.input_ids)[padded.attention_mask]
    got = token_logprobs(other[None], packed.input_ids[None, : packed.tokens])[0]
    inside = packed.position_ids[: packed.tokens] > 0
    assert torch.allclose(got[inside], want[inside], atol=1e-5)
    # It can fail: with rows that see each other it does.
    merged = PackedBatch(
        **{
            **{name: getattr(packed, name) for name in packed.__slots__},
            "cu_seqlens": torch.tensor([0, packed.input_ids.shape[0]]),
        }
    )
    with torch.no_grad():
        assert not torch.allclose(one, on_packed(model, merged), atol=1e-3)
