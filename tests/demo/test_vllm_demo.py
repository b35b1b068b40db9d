"""What the demo needs for a real vLLM, without one: its policy, its checkpoints, its judge."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollfleet_common.errors import RollfleetError, SettingsError
from rollfleet_demo import job
from rollfleet_demo.audit import Audit, Trained
from rollfleet_demo.judge import TOLERANCE, judge
from rollfleet_demo.qwen import Checkpoints, QwenPolicy, QwenShape
from rollfleet_demo.report import MIN_APART
from rollfleet_demo.task import encode, exact
from rollfleet_demo.vllm_server import find_vllm

SHAPE = QwenShape(layers=2, width=32, inner=64)
ANSWER = "01234789|"


@pytest.fixture
def files(tmp_path: Path) -> Checkpoints:
    """Three versions, each of other weights."""
    for version in range(3):
        Checkpoints(QwenPolicy(SHAPE, seed=version), tmp_path).write(version)
    return Checkpoints(QwenPolicy(SHAPE), tmp_path)


@torch.inference_mode()
def row(
    files: Checkpoints, index: int, made_by: Sequence[int], *, prompt: str = "83920174="
) -> Trained:
    """A right answer, whose tokens were made by these versions, and labelled so."""
    ids = encode(prompt + ANSWER)
    policy = QwenPolicy(SHAPE)
    said = []
    for place, version in enumerate(made_by):
        files.load(version, policy)
        said.append(float(policy.logprobs(torch.tensor([ids]))[0, len(prompt) + place]))
    return Trained(
        step=3,
        version=2,
        group="p0",
        index=index,
        prompt=tuple(ids[: len(prompt)]),
        completion=tuple(ids[len(prompt) :]),
        versions=tuple(made_by),
        reward=exact(ANSWER, ANSWER) if prompt == "83920174=" else 0.0,
        logprobs=tuple(said),
    )


def judged(files: Checkpoints, *rows: Trained) -> Audit:
    return judge(rows, files.load, QwenPolicy(SHAPE))


# ---- the policy --------------------------------------------------------------------------------


def test_a_policy_is_causal_and_knows_its_positions() -> None:
    policy = QwenPolicy(SHAPE)
    ids = torch.tensor([encode("83920174=01")])
    other = ids.clone()
    other[0, -1] += 1
    with torch.inference_mode():
        assert torch.allclose(policy.logits(ids)[0, :-1], policy.logits(other)[0, :-1], atol=1e-6)
        turned = policy.logits(ids[:, [1, 0, *range(2, 11)]])
    assert not torch.allclose(policy.logits(ids)[0, -1], turned[0, -1], atol=1e-6)
    with pytest.raises(RuntimeError):
        policy.logits(torch.zeros((1, SHAPE.max_tokens + 1), dtype=torch.int64))


def test_a_checkpoint_is_one_that_others_can_load(files: Checkpoints) -> None:
    path = files.path(1)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is False
    names = set(load_file(path / "model.safetensors"))
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight",
    } <= names
    assert not [*path.parent.glob(".*.tmp")]


def test_a_checkpoint_that_could_not_be_written_is_not_there(
    files: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rollfleet_demo.qwen.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(7)
    assert sorted(path.name for path in files.folder.iterdir()) == [
        f"version-{version}" for version in range(3)
    ]


# ---- the judge ---------------------------------------------------------------------------------


def test_true_labels_are_found_true(files: Checkpoints) -> None:
    rows = [row(files, 0, [2] * 9), row(files, 1, [0] * 4 + [1] * 3 + [2] * 2)]
    found = judged(files, *rows)
    assert (found.rows, found.mislabelled_tokens, found.duplicates, found.wrong_rewards) == (
        (2, 0, 0, 0)
    )
    assert found.largest_gap < TOLERANCE / 10
    assert (found.mixed, found.max_staleness) == (1, 2)
    assert found.by_step[3] == {0: 1, 2: 1}
    assert found.tokens_made == 18


def test_a_label_one_token_off_is_seen(files: Checkpoints) -> None:
    true = row(files, 0, [0] * 4 + [1] * 5)
    found = judged(files, replace(true, versions=(0,) * 5 + (1,) * 4))
    assert found.mislabelled_tokens == 1
    assert found.largest_gap > TOLERANCE


def test_a_row_that_nobody_made_fits_no_weights(files: Checkpoints) -> None:
    true, other = row(files, 0, [1] * 9), row(files, 1, [1] * 9, prompt="11111111=")
    mixed_up = replace(true, logprobs=other.logprobs)
    assert judged(files, mixed_up).mislabelled_tokens >= 8


def test_the_same_prompt_twice_is_seen_under_any_name(files: Checkpoints) -> None:
    true = row(files, 0, [1] * 9)
    assert judged(files, true, true).duplicates == 1
    assert judged(files, true, replace(true, group="p1")).duplicates == 1
    assert judged(files, true, replace(true, index=1)).duplicates == 0


def test_weights_that_hardly_differ_are_said_to_prove_little(files: Checkpoints) -> None:
    same = QwenPolicy(SHAPE, seed=1)
    for version in (5, 6):
        Checkpoints(same, files.folder).write(version)
    rows = [row(files, index, [5 + index % 2] * 9) for index in range(2)]
    found = judged(files, *rows)
    assert found.mislabelled_tokens == 0
    assert found.told_apart < MIN_APART


# ---- how it is started ---------------------------------------------------------------------------


def test_a_missing_vllm_is_said_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RollfleetError, match="run `make vllm`"):
        find_vllm(None)
    with pytest.raises(RollfleetError, match="no vLLM at nowhere/vllm"):
        job.main({"engine": "vllm", "vllm": Path("nowhere/vllm")})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "sglang"}, "engine 'sglang' is none of tiny, vllm"),
        ({"steps": 5, "kill_server_at": 6, "servers": 2}, "the steps are 1 to 5"),
        ({"kill_server_at": 2}, "add --servers 2"),
        ({"servers": 0}, r"servers \(0\)"),
    ],
)
def test_bad_options_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        job.Options(**given)  # type: ignore[arg-type]
