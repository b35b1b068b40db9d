"""The reference loss gives the numbers that a hand computation gives."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "decoupled_ppo.py"


@pytest.fixture(name="loss")
def import_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import decoupled_ppo  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - no package

    return decoupled_ppo.decoupled_ppo_loss


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_the_example_runs() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    assert "loss -1.280 (by hand: -1.280)" in done.stdout


def test_a_hand_computation(loss: Any) -> None:
    # token          0      1      2      3 (not trained)
    # theta        0.6    0.2    0.9    1.0
    # prox         0.4    0.4    0.6    0.1
    # behave       0.2    0.5    0.1    0.9
    # r            1.5    0.5    1.5
    # w            2.0    0.8    6.0 > cap
    # A = 1: min(r, clip) 1.28   0.5    1.28
    theta = logs(0.6, 0.2, 0.9, 1.0).requires_grad_()
    proximal, behaviour = logs(0.4, 0.4, 0.6, 0.1), logs(0.2, 0.5, 0.1, 0.9)
    mask = torch.tensor([[True, True, True, False]])
    value, stats = loss(theta, proximal, behaviour, mask, torch.tensor([1.0]), cap=5.0)
    assert value.item() == pytest.approx(-(2 * 1.28 + 0.8 * 0.5 + 0) / 3)
    assert stats["clipped_share"] == pytest.approx(2 / 3)
    assert stats["over_cap_share"] == pytest.approx(1 / 3)
    assert stats["weight_mean"] == pytest.approx((2 + 0.8) / 3)
    assert stats["effective_token_share"] == pytest.approx(2.8**2 / (4 + 0.64) / 3)
    value.backward()
    # d/dtheta of -w * r * A / 3 is -w * r / 3 where the ratio is not clipped, else 0.
    assert theta.grad is not None
    assert theta.grad[0].tolist() == pytest.approx([0.0, -0.8 * 0.5 / 3, 0.0, 0.0])


def test_clamping_instead_of_masking(loss: Any) -> None:
    mask = torch.tensor([[True, True]])
    args = logs(0.6, 0.6), logs(0.6, 0.6), logs(0.1, 0.6), mask, torch.tensor([1.0])
    assert loss(*args, cap=5.0, over_cap="clamp")[0].item() == pytest.approx(-(5 + 1) / 2)
    assert loss(*args, cap=5.0, over_cap="mask")[0].item() == pytest.approx(-1 / 2)


def test_a_negative_advantage_is_clipped_from_below(loss: Any) -> None:
    # r = 0.5 is out of the range with A < 0: the larger loss, 0.8, is taken, and no gradient flows.
    theta = logs(0.2).requires_grad_()
    value, stats = loss(theta, logs(0.4), logs(0.4), torch.tensor([[True]]), torch.tensor([-1.0]))
    value.backward()
    assert value.item() == pytest.approx(0.8)
    assert stats["clipped_share"] == 1
    assert theta.grad is not None
    assert theta.grad.item() == 0


def test_no_gradient_flows_through_what_is_given(loss: Any) -> None:
    proximal, behaviour = logs(0.4).requires_grad_(), logs(0.2).requires_grad_()
    theta = logs(0.4).requires_grad_()
    loss(theta, proximal, behaviour, torch.tensor([[True]]), torch.tensor([1.0]))[0].backward()
    assert theta.grad is not None
    assert proximal.grad is None
    assert behaviour.grad is None


def test_on_policy_it_is_the_policy_gradient(loss: Any) -> None:
    theta = logs(0.3, 0.6, 0.1).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -2.0, 0.5]])
    loss(theta, theta.detach(), theta.detach(), mask, advantages)[0].backward()
    assert theta.grad is not None
    assert torch.allclose(theta.grad, -advantages / 3)


def test_without_the_clip_it_is_importance_sampling_from_the_behaviour_policy(loss: Any) -> None:
    # w * r telescopes to pi_theta / pi_behave, wherever the proximal policy stands.
    generator = torch.Generator().manual_seed(0)
    theta, behaviour, *proximals = -torch.rand(4, 1, 5, generator=generator)
    mask, advantages = torch.ones(1, 5, dtype=torch.bool), torch.tensor([0.7])
    wide = {"clip_low": 1.0, "clip_high": 1e9, "cap": 1e9}
    direct = -((theta - behaviour).exp() * 0.7).mean()
    for proximal in proximals:
        assert torch.allclose(loss(theta, proximal, behaviour, mask, advantages, **wide)[0], direct)


def test_what_is_masked_may_be_anything(loss: Any) -> None:
    nan = torch.tensor([[-0.5, float("nan")]])
    theta = torch.tensor([[-0.5, float("-inf")]]).requires_grad_()
    mask = torch.tensor([[True, False]])
    value, stats = loss(theta, nan, nan, mask, torch.tensor([1.0]))
    value.backward()
    assert value.item() == -1
    assert theta.grad is not None
    assert theta.grad[0].tolist() == [-1.0, 0.0]
    assert all(number == number for number in stats.values())  # noqa: PLR0124 - NaN differs from itself


def test_a_batch_without_trained_tokens_is_zero(loss: Any) -> None:
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    value, stats = loss(logs(0.5, 0.5), logs(0.5, 0.5), logs(0.5, 0.5), nothing, torch.ones(1))
    assert value.item() == 0
    assert set(stats.values()) == {0.0}
