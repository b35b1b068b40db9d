"""Batches hold what the samples held, and padding can be told from it in every field."""

import gc
import inspect
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.batch import check_collate
from rollfleet.tensors.collate import TensorBatch, collate, group_stats
from rollfleet.tensors.memory import BlockPool
from rollfleet.tensors.micro_batches import micro_batches
from rollfleet_common.codec import encode_samples
from rollfleet_common.errors import CodecError, SettingsError
from rollfleet_common.messages import Header, Kind, Rollout, Sample, VersionSpans


def header(group: str = "g", index: int = 0) -> Header:
    return Header(
        group=group,
        index=index,
        n=8,
        attempt=1,
        kind=Kind.TRAIN,
        route="default",
        task="default",
        position=-1,
        entry="1-0",
        payload="1-0:x",
        payload_bytes=0,
        epoch=1,
        min_version=0,
        max_version=0,
        samples=1,
        tokens=0,
        trained_tokens=0,
        reward=0.0,
        worker="w",
        server="s",
        queue_ms=0,
        generate_ms=0,
        reward_ms=0,
    )


def sample(tokens: int, *, prompt: int = 1, version: int = 3, **changes: Any) -> Sample:
    mask = np.arange(tokens) >= min(prompt, tokens - 1)
    made = Sample(
        token_ids=np.arange(100, 100 + tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, np.float32(-0.5), np.float32(0)),
        versions=VersionSpans.of([(int((~mask).sum()), -1), (int(mask.sum()), version)]),
        reward=1.0,
    )
    return replace(made, **changes)


def rollout(*samples: Sample, group: str = "g", index: int = 0) -> Rollout:
    return Rollout(header(group, index), samples)


TWO = [rollout(sample(3)), rollout(sample(5, version=4), index=1)]
TOKEN_FIELDS = {
    "input_ids": torch.int64,
    "attention_mask": torch.bool,
    "loss_mask": torch.bool,
    "logprobs": torch.float32,
    "versions": torch.int32,
}
ROW_FIELDS = {
    "rewards": torch.float32,
    "group_ids": torch.int64,
    "rollout_ids": torch.int64,
    "lengths": torch.int64,
    "oldest": torch.int64,
}


def test_shapes_and_dtypes() -> None:
    batch = collate(TWO, pad_multiple=4)
    for name, dtype in TOKEN_FIELDS.items():
        assert getattr(batch, name).shape == (2, 8), name
        assert getattr(batch, name).dtype == dtype, name
        assert getattr(batch, name).is_contiguous(), name
    for name, dtype in ROW_FIELDS.items():
        assert getattr(batch, name).shape == (2,), name
        assert getattr(batch, name).dtype == dtype, name
    assert (batch.rows, batch.tokens) == (2, 8)
    assert collate(TWO, ids_dtype=torch.int32).input_ids.dtype == torch.int32


def test_padding_on_the_right() -> None:
    batch = collate(TWO, pad_id=9)
    assert batch.input_ids.tolist() == [[100, 101, 102, 9, 9], [100, 101, 102, 103, 104]]
    assert batch.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.loss_mask.tolist() == [[False, True, True, False, False], [False] + [True] * 4]
    assert batch.logprobs.tolist() == [[0, -0.5, -0.5, 0, 0], [0] + [-0.5] * 4]
    assert batch.versions.tolist() == [[-1, 3, 3, -1, -1], [-1] + [4] * 4]
    assert batch.lengths.tolist() == [3, 5]


def test_padding_on_the_left() -> None:
    batch = collate(TWO, pad_side="left", pad_multiple=6)
    assert batch.input_ids.tolist() == [[0] * 3 + [100, 101, 102], [0, 100, 101, 102, 103, 104]]
    assert batch.attention_mask.tolist() == [[False] * 3 + [True] * 3, [False] + [True] * 5]
    assert batch.versions.tolist() == [[-1] * 4 + [3, 3], [-1, -1] + [4] * 4]


def test_oldest_counts_trained_tokens_only() -> None:
    mixed = VersionSpans.of([(1, 0), (1, -1), (2, 5), (1, 6)])
    mask = np.array([False, False, False, True, True])
    batch = collate(
        [
            rollout(sample(5, versions=mixed, loss_mask=mask)),
            rollout(sample(5, versions=VersionSpans.constant(2))),
            rollout(sample(5, versions=mixed, loss_mask=np.zeros(5, bool))),
        ]
    )
    assert batch.oldest.tolist() == [5, 2, -1]
    assert batch.staleness(7).tolist() == [2, 5, 0]


def test_groups_and_forks_get_dense_ids() -> None:
    batch = collate(
        [
            rollout(sample(2), sample(3), group="b", index=4),
            rollout(sample(2), group="a"),
            rollout(sample(2), group="b", index=5),
        ]
    )
    assert batch.groups == ("b", "a")
    assert batch.group_ids.tolist() == [0, 0, 1, 0]
    assert batch.rollout_ids.tolist() == [0, 0, 1, 2]
    assert [batch.headers[i].index for i in batch.rollout_ids] == [4, 4, 0, 5]
    assert batch.finish_reasons == ("stop",) * 4


def test_rows_say_how_they_were_sampled_and_a_mixture_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hot = {"logprobs_kind": "raw", "temperature": 1.5, "context_full": True}
    cold = {"logprobs_kind": "tempered", "temperature": 0.25}
    rows = [rollout(sample(2, **hot), sample(3), group="a"), rollout(sample(2, **cold), group="b")]
    for form in ("padded", "packed"):
        batch = collate(rows, form=form)
        assert batch.logprobs_kinds == ("raw", "unknown", "tempered")
        assert batch.temperatures == (1.5, None, 0.25)
        assert batch.context_full == (True, False, False)
    micro_batches(rows, budget_tokens=8)
    collate(rows[1:])
    (told,) = [one.fields["mixes"] for one in caplog.records if "mixes" in one.fields]
    assert "log-probabilities that are raw, tempered, unknown" in told
    assert "temperatures 0.25, 1.5, unknown" in told


def test_one_token_is_enough() -> None:
    batch = collate([rollout(sample(1, prompt=0))])
    assert batch.input_ids.tolist() == [[100]]
    assert batch.loss_mask.tolist() == [[True]]
    assert batch.versions.tolist() == [[3]]


# ---- the same, for any samples ----------------------------------------------------------------


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    def fork() -> Sample:
        runs = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(-1, 4)), min_size=1))
        tokens = sum(length for length, _ in runs)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return Sample(
            token_ids=rng.integers(0, 2**31, tokens).astype(np.int32),
            loss_mask=rng.random(tokens) < 0.5,
            logprobs=-rng.random(tokens, np.float32),
            versions=VersionSpans.of(runs),
            reward=float(rng.random()),
            components={"fmt": float(rng.random())},
            arrays={"scores": rng.random((tokens, 2)), "image": rng.random(3)[: tokens % 3]},
            metrics={"turns": float(rng.integers(5))},
        )

    forks = tuple(fork() for _ in range(draw(st.integers(1, 3))))
    return Rollout(header(draw(st.sampled_from("abc")), draw(st.integers(0, 7))), forks)


@given(
    st.lists(rollouts(), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.integers(1, 9),
    st.sampled_from([torch.int32, torch.int64]),
    st.booleans(),
)
def test_rows_hold_what_the_samples_held(
    batch_of: list[Rollout],
    side: Literal["left", "right"],
    multiple: int,
    dtype: torch.dtype,
    as_bytes: bool,
) -> None:
    given_form: Any = [(r.header, encode_samples(r.samples)) for r in batch_of]
    batch = collate(
        given_form if as_bytes else batch_of,
        pad_side=side,
        pad_multiple=multiple,
        pad_id=77,
        ids_dtype=dtype,
    )
    samples = [s for r in batch_of for s in r.samples]
    width = batch.input_ids.shape[1]
    longest = max(len(s.token_ids) for s in samples)
    assert width % multiple == 0
    assert longest <= width < longest + multiple
    assert batch.rows == len(samples)
    assert batch.tokens == sum(len(s.token_ids) for s in samples)
    for row, s in enumerate(samples):
        n = len(s.token_ids)
        at = slice(0, n) if side == "right" else slice(width - n, width)
        gap = slice(n, width) if side == "right" else slice(0, width - n)
        for name, value, pad in (
            ("input_ids", s.token_ids, 77),
            ("attention_mask", np.ones(n, bool), False),
            ("loss_mask", s.loss_mask, False),
            ("logprobs", s.logprobs, 0.0),
            ("versions", s.versions.expand(n), -1),
        ):
            tensor = getattr(batch, name)[row].numpy()
            assert (tensor[at] == value).all(), name
            assert (tensor[gap] == pad).all(), name
        assert batch.rewards[row] == np.float32(s.reward)
        assert batch.lengths[row] == n
        assert batch.oldest[row] == s.versions.oldest(s.loss_mask)
        assert batch.groups[batch.group_ids[row]] == batch.headers[batch.rollout_ids[row]].group
        assert batch.components["fmt"][row] == np.float32(s.components["fmt"])
        assert batch.metrics["turns"][row] == s.metrics["turns"]
        assert (batch.arrays["scores"][row].numpy()[at] == s.arrays["scores"]).all()
        assert (batch.arrays["scores"][row].numpy()[gap] == 0).all()


# ---- the user's own fields --------------------------------------------------------------------


def test_arrays_take_the_form_that_fits_all_rows() -> None:
    def row(tokens: int, image: int) -> Rollout:
        arrays = {
            "entropy": np.full(tokens, 2, np.float16),
            "experts": np.ones((tokens, 2, 3), np.uint8),
            "seed": np.array(tokens, np.int64),
            "image": np.zeros(image, np.float32),
        }
        return rollout(sample(tokens, arrays=arrays))

    batch = collate([row(2, 2), row(3, 7)])
    assert batch.arrays["entropy"].tolist() == [[2, 2, 0], [2, 2, 2]]
    assert batch.arrays["entropy"].dtype == torch.float16
    assert batch.arrays["experts"].shape == (2, 3, 2, 3)
    assert batch.arrays["experts"].sum((1, 2, 3)).tolist() == [12, 18]
    assert batch.arrays["seed"].tolist() == [2, 3]
    assert batch.arrays["seed"].dtype == torch.int64
    assert [len(image) for image in batch.lists["image"] if image is not None] == [2, 7]
    assert set(batch.arrays) == {"entropy", "experts", "seed"}


@pytest.mark.parametrize(
    "extra",
    [
        {"metrics": {"turns": 2.0}},
        {"components": {"turns": 2.0}},
        {"arrays": {"turns": np.zeros(3, np.float32)}},
    ],
)
def test_a_key_that_a_row_lacks_is_named(extra: dict[str, Any]) -> None:
    lacking = rollout(sample(3), group="h", index=6)
    with pytest.raises(ValueError, match="turns") as caught:
        collate([rollout(sample(3, **extra)), lacking])
    assert f"{next(iter(extra))}['turns'] is missing in row 1 (group 'h' #6)" in str(caught.value)


def test_missing_keys_may_be_filled() -> None:
    arrays = {"scores": np.ones(3, np.float32), "seed": np.array(7), "image": np.zeros(9)}
    full = sample(3, metrics={"turns": 2.0}, arrays=arrays)
    batch = collate([rollout(sample(2)), rollout(full)], missing="fill")
    assert torch.isnan(batch.metrics["turns"]).tolist() == [True, False]
    assert batch.arrays["scores"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert torch.isnan(batch.arrays["seed"]).tolist() == [True, False]
    assert batch.lists["image"][0] is None


# ---- what cannot be collated ------------------------------------------------------------------


def test_what_cannot_be_collated_is_said() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        collate([])
    with pytest.raises(ValueError, match="group 'h' #2 has no samples"):
        collate([rollout(group="h", index=2)])
    with pytest.raises(ValueError, match="pad_multiple 0"):
        collate(TWO, pad_multiple=0)
    with pytest.raises(ValueError, match=r"torch\.int16"):
        collate(TWO, ids_dtype=torch.int16)
    with pytest.raises(CodecError):
        collate([(header(), b"garbage")])


# ---- memory -----------------------------------------------------------------------------------


def test_a_block_is_used_again_when_its_last_view_is_gone() -> None:
    pool = BlockPool(spare=1)
    first = pool.take(1000)
    place = first.data_ptr()
    view = first[10:20].numpy()
    del first
    gc.collect()
    other = pool.take(1000)
    assert other.data_ptr() != place, "a view still looks into the block"
    view[:] = 1
    del view
    gc.collect()
    assert pool.take(900).data_ptr() == place


def test_a_spare_block_that_is_too_small_goes() -> None:
    pool = BlockPool(spare=1)
    pool.take(100)
    gc.collect()
    assert len(pool.take(10_000)) == 10_000
    gc.collect()
    assert len(pool._spare) == 1


def test_batches_that_are_alive_share_no_memory() -> None:
    batches = [collate([rollout(sample(4, version=v))]) for v in range(5)]
    assert [int(batch.versions.max()) for batch in batches] == [0, 1, 2, 3, 4]


def test_pinning_falls_back_without_a_device() -> None:
    batch = collate(TWO, pin=True)
    assert batch.input_ids.is_pinned() == torch.cuda.is_available()


def test_moving_a_batch_moves_every_tensor() -> None:
    full = sample(3, metrics={"a": 1.0}, components={"b": 1.0}, arrays={"c": np.ones(3)})
    batch = collate([rollout(full)])
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, TensorBatch)
    for name in (*TOKEN_FIELDS, *ROW_FIELDS):
        assert getattr(moved, name).device.type == "meta"
    for tensors in (moved.metrics, moved.components, moved.arrays):
        assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert moved.headers is batch.headers
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    batch = collate(TWO, pin=True)
    moved = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.input_ids.cpu(), batch.input_ids)
    assert collate(TWO).pin_memory().versions.is_pinned()
    assert group_stats(moved).size.tolist() == [2]


# ---- groups -----------------------------------------------------------------------------------


def test_group_statistics_count_a_rollout_once() -> None:
    def scored(reward: float) -> Sample:
        return sample(2, reward=reward)

    batch = collate(
        [
            rollout(scored(1.0), scored(9.0), scored(9.0), group="a"),
            rollout(scored(5.0), group="b"),
            rollout(scored(3.0), group="a", index=1),
        ]
    )
    stats = group_stats(batch)
    assert stats.size.tolist() == [2, 1]
    assert stats.mean.tolist() == [2.0, 5.0]
    assert torch.allclose(stats.std, torch.tensor([2.0**0.5, 0.0]))
    assert group_stats(batch, correction=0).std.tolist() == [1.0, 0.0]
    assert stats.mean[batch.group_ids].tolist() == [2.0, 2.0, 2.0, 5.0, 2.0]


def test_options_that_a_fleet_takes_are_those_of_collate() -> None:
    names = [*inspect.signature(collate).parameters][1:]
    check_collate(dict.fromkeys([*names, "device"]))
    with pytest.raises(SettingsError) as said:
        check_collate({"devcie": "cuda"})
    assert str(said.value).endswith(", ".join(sorted([*names, "device"])))
