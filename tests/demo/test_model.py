import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from rollfleet_demo.grpo import GrpoTrainer, group_advantages, grpo_loss
from rollfleet_demo.model import (
    PolicyShape,
    TinyPolicy,
    greedy_accuracy,
    load_into,
    save,
    warm_start,
)
from rollfleet_demo.sampling import SamplerSettings, choose
from rollfleet_demo.task import (
    ANSWER_TOKENS,
    END,
    PROMPT_TOKENS,
    VOCABULARY,
    answer_to,
    decode,
    encode,
    exact,
    prompts,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The task.


def test_the_task_sorts_digits():
    assert answer_to("83920174=") == "01234789|"
    assert answer_to("11000000=") == "00000011|"


def test_prompts_repeat_with_their_seed_and_fit_their_documented_length():
    first = list(islice(prompts(3), 20))
    assert first == list(islice(prompts(3), 20))
    assert first != list(islice(prompts(4), 20))
    for prompt, answer in first:
        assert len(encode(prompt)) == PROMPT_TOKENS
        assert len(encode(answer)) == ANSWER_TOKENS
        assert decode(encode(prompt + answer)) == prompt + answer
        assert answer.endswith(END)


def test_the_codec_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'x'"):
        encode("1x=")
    with pytest.raises(ValueError, match="99"):
        decode([99])
    with pytest.raises(ValueError, match="-1"):
        decode([-1])


def test_the_reward_wants_the_whole_answer_and_nothing_else():
    answer = "01234789|"
    assert exact(encode(answer), answer) == 1.0
    assert exact(encode(answer)[:-1], answer) == 0.0
    assert exact(encode(answer) + encode("0"), answer) == 0.0
    assert exact(encode("01234798|"), answer) == 0.0
    assert exact([], answer) == 0.0
    assert exact("01234789", answer) == exact("01234789|", answer) == 1.0
    assert exact("0123478", answer) == 0.0


# The model.


def test_cached_decoding_equals_the_full_forward_for_rows_at_different_positions():
    policy = TinyPolicy(seed=1)
    generator = torch.Generator().manual_seed(0)
    prompt_rows = [[3, 4, 5, 2], [9, 2], [7, 7, 7, 7, 7, 2]]
    which = [0, 1, 2, 1]
    rows = [list(prompt_rows[i]) for i in which]
    cache = policy.new_cache(8)
    with torch.inference_mode():
        padded = torch.tensor([r + [0] * (6 - len(r)) for r in prompt_rows])
        lengths = torch.tensor([len(r) for r in prompt_rows])
        # The cache is full of rubbish, as after other sequences: nobody may look at it.
        cache.keys.fill_(50.0)
        cache.values.fill_(-50.0)
        logits = policy.prefill(padded, lengths, torch.tensor(which), cache, 0)
        for _ in range(6):
            for row, got in zip(rows, logits, strict=True):
                expected = policy.logits(torch.tensor([row]))[0, -1]
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
            tokens = torch.randint(0, 13, (len(rows),), generator=generator)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            logits = policy.decode(tokens, torch.tensor([len(r) - 1 for r in rows]), cache)


def test_logprobs_are_aligned_with_their_tokens_and_padding_does_not_matter():
    policy = TinyPolicy(seed=2)
    ids = torch.tensor([[3, 4, 2, 5], [6, 7, 2, 8]])
    with torch.no_grad():
        got = policy.logprobs(ids)
        expected = policy.logits(ids).log_softmax(-1)
    assert got.shape == ids.shape
    assert got[:, 0].tolist() == [0.0, 0.0]
    for row in range(2):
        for t in range(1, 4):
            assert math.isclose(got[row, t], expected[row, t - 1, ids[row, t]], abs_tol=1e-5)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], 1)
    with torch.no_grad():
        torch.testing.assert_close(policy.logprobs(padded)[:, :4], got, atol=1e-5, rtol=1e-5)


def test_the_seed_makes_the_weights_and_leaves_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = TinyPolicy(seed=1), TinyPolicy(seed=1), TinyPolicy(seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert 550_000 < sum(p.numel() for p in one.parameters()) < 650_000


def test_save_and_load_carry_the_weights_and_their_id(tmp_path: Path):
    source, target = TinyPolicy(seed=1), TinyPolicy(seed=2)
    save(source, tmp_path / "w.safetensors", 7)
    load_into(target, tmp_path / "w.safetensors")
    assert int(target.weights_id) == 7
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch):
    policy = TinyPolicy(seed=1)
    path = tmp_path / "w.safetensors"
    save(policy, path, 1)
    before = path.read_bytes()

    def no_space(tensors, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("rollfleet_demo.model.save_file", no_space)
    with pytest.raises(OSError, match="no space"):
        save(policy, path, 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_loading_something_else_changes_nothing(tmp_path: Path):
    policy = TinyPolicy(seed=1)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    save(TinyPolicy(PolicyShape(layers=2), seed=3), tmp_path / "small", 3)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_into(policy, tmp_path / "rubbish")
    with pytest.raises(ValueError, match=r"does not fit.*blocks\.2"):
        load_into(policy, tmp_path / "small")
    with pytest.raises(FileNotFoundError):
        load_into(policy, tmp_path / "missing")
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_short_warm_start_reaches_answers_that_are_right():
    policy = TinyPolicy(seed=0)
    assert greedy_accuracy(policy, 64) == 0.0
    assert warm_start(policy, steps=30, batch=64, seed=0) < 1.0
    assert greedy_accuracy(policy, 256) > 0.02


# Sampling.


def sample(logits, settings, seed=0):
    shared = torch.Generator().manual_seed(seed)
    generators = [
        None if s.seed is None else torch.Generator().manual_seed(s.seed) for s in settings
    ]
    return choose(logits, settings, generators, shared)


def test_draws_follow_the_distribution_and_report_raw_logprobs():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    rows = 4000
    got = sample(logits.repeat(rows, 1), [SamplerSettings()] * rows)
    counts = torch.bincount(torch.tensor(got.token_ids), minlength=4) / rows
    torch.testing.assert_close(counts, logits.exp(), atol=0.03, rtol=0)
    for token, logprob, rank in zip(got.token_ids, got.logprobs, got.ranks, strict=True):
        assert math.isclose(logprob, logits[token].item(), abs_tol=1e-5)
        assert rank == token + 1


def test_filters_exclude_and_greedy_takes_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rows = 300

    def seen(**settings):
        return set(sample(logits.repeat(rows, 1), [SamplerSettings(**settings)] * rows).token_ids)

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_p=0.01) == {0}
    assert seen(min_p=0.2) == {0, 1, 2}
    assert seen(temperature=0.0) == {0}
    hot = sample(logits.repeat(2, 1), [SamplerSettings(temperature=3.0, logprobs=2)] * 2)
    assert math.isclose(hot.logprobs[0], logits[hot.token_ids[0]].item(), abs_tol=1e-5)
    assert [token for token, _ in hot.tops[0]] == [0, 1]


def test_a_seeded_row_does_not_depend_on_its_neighbours():
    logits = torch.zeros(3, len(VOCABULARY))
    alone = sample(logits[:1], [SamplerSettings(seed=9)], seed=1).token_ids[0]
    among = sample(
        logits, [SamplerSettings(), SamplerSettings(seed=9), SamplerSettings()], seed=2
    ).token_ids[1]
    assert alone == among


# The objective.


def test_advantages_are_normalised_within_groups_and_even_groups_left_out():
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    groups = torch.tensor([4, 9, 4, 9, 4, 7, 7])
    advantages, informative = group_advantages(rewards, groups)
    assert informative.tolist() == [True, False, True, False, True, False, False]
    # Group 4: mean 2/3, standard deviation sqrt(2)/3.
    high, low = (1 / 3) / (math.sqrt(2) / 3), (-2 / 3) / (math.sqrt(2) / 3)
    expected = torch.tensor([high, 0.0, high, 0.0, low, 0.0, 0.0])
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)
    nothing, none = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(nothing) == len(none) == 0


def test_the_loss_by_hand():
    behaviour = torch.tensor([[0.0, -1.0, -1.0], [0.0, -2.0, -2.0]])
    ratios = torch.tensor([[9.0, 1.5, 1.1], [9.0, 0.5, 1.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    logprobs = (behaviour + ratios.log()).requires_grad_()
    loss, clipped = grpo_loss(logprobs, behaviour, mask, torch.tensor([2.0, -1.0]))
    # Row 0, advantage 2: min(1.5, 1.28) * 2 = 2.56 and 1.1 * 2 = 2.2.
    # Row 1, advantage -1: min(-0.5, -0.8) = -0.8. The mean over the three, negated.
    assert math.isclose(loss.item(), -(2.56 + 2.2 - 0.8) / 3, abs_tol=1e-5)
    assert math.isclose(clipped.item(), 2 / 3, abs_tol=1e-6)
    loss.backward()
    # Only the token inside of the clip range moves: d(-ratio * A / 3)/d logprob = -1.1 * 2 / 3.
    expected = torch.tensor([[0.0, 0.0, -2.2 / 3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-5, rtol=0)


def test_a_step_makes_rewarded_tokens_likelier_and_skips_what_says_nothing():
    policy = TinyPolicy(seed=0)
    trainer = GrpoTrainer(policy)
    ids = torch.tensor([encode("21=12|"), encode("21=21|"), encode("33=33|")])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:] = True
    with torch.no_grad():
        behaviour = policy.logprobs(ids)
    idle = trainer.step(ids, mask, behaviour, torch.zeros(3))
    assert idle.rows == idle.tokens == 0
    report = trainer.step(ids, mask, behaviour, torch.tensor([1.0, -1.0, 0.0]))
    assert (report.rows, report.tokens, report.clipped) == (2, 6, 0.0)
    assert report.grad_norm > 0.0
    with torch.no_grad():
        change = ((policy.logprobs(ids) - behaviour) * mask).sum(1)
    assert change[0] > change[1]


def test_a_step_refuses_parts_that_disagree():
    trainer = GrpoTrainer(TinyPolicy(seed=0))
    ids = torch.tensor([encode("1=1|")])
    mask = torch.tensor([[False, False, True, True]])
    behaviour = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="shapes disagree"):
        trainer.step(ids, mask[:, 1:], behaviour, torch.ones(1))
    with pytest.raises(ValueError, match="advantages"):
        trainer.step(ids, mask, behaviour, torch.ones(2))
    with pytest.raises(ValueError, match="first token"):
        trainer.step(ids, torch.ones_like(mask), behaviour, torch.ones(1))


def test_the_reward_is_importable_without_torch():
    code = "import sys; sys.modules['torch'] = None; import rollfleet_demo.task as t; "
    code += "assert t.exact('12|', '12|') == 1.0"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
