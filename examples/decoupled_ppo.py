"""Decoupled PPO in sixty lines: a clipped ratio to the proximal policy, a capped weight to correct it.

    loss = - mean over trained tokens of  w * min(r * A, clip(r, 1 - low, 1 + high) * A)
    r = pi_theta / pi_prox        how far this step has gone; PPO's clip bounds it
    w = pi_prox / pi_behave       how far the sampling policy lay behind; a constant, and capped

Split this way, a stale token does not eat up the clip range before the step begins (Hilton et al.
2021, arXiv:2110.00641). In a training loop, with `batch` from `fleet.batches()`:

    t = batch.tensors
    proximal = proximal_logprobs(t, batch.version, forward)
    loss, stats = decoupled_ppo_loss(theta, proximal, t.logprobs, t.loss_mask, advantages)

Run ``python examples/decoupled_ppo.py`` for a small check.
"""

from typing import Literal

import torch
from torch import Tensor


def decoupled_ppo_loss(
    theta: Tensor,
    proximal: Tensor,
    behaviour: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float = 5.0,
    over_cap: Literal["mask", "clamp"] = "mask",
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what the clip and the cap did.

    Args:
        theta: float [B, T]: logprobs under the policy that is trained; gradients flow here only.
        proximal: float [B, T]: under the proximal policy, as ``proximal_logprobs`` returns them.
        behaviour: float [B, T]: under the policy that sampled, ``batch.tensors.logprobs``.
        loss_mask: bool[B, T].
        advantages: float [B] or [B, T].
        clip_low: The ratio's range below 1.
        clip_high: And above it.
        cap: Largest weight of a token.
        over_cap: "mask": a token over the cap gives nothing; "clamp": it gives `cap` times.
    """
    advantages = advantages.unsqueeze(-1) if advantages.ndim == 1 else advantages
    # Masked before exp: whatever stands outside of the mask can then be neither inf nor NaN.
    ratio = torch.where(loss_mask, theta - proximal.detach(), 0.0).exp()
    weight = torch.where(loss_mask, (proximal - behaviour).detach(), 0.0).exp()
    over = loss_mask & (weight > cap)
    weight = weight.masked_fill(over, 0.0) if over_cap == "mask" else weight.clamp(max=cap)

    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    # A masked token still counts below the line: else few tokens would speak for many.
    tokens = loss_mask.sum().clamp(min=1)
    loss = -torch.where(loss_mask, weight * objective, 0.0).sum() / tokens

    used = torch.where(loss_mask, weight, 0.0)
    square = used.square().sum().clamp(min=torch.finfo(used.dtype).tiny)
    return loss, {
        "clipped_share": ((clipped * advantages < ratio * advantages) & loss_mask).sum().item()
        / tokens.item(),
        "over_cap_share": over.sum().item() / tokens.item(),
        "weight_mean": (used.sum() / tokens).item(),
        # Kish: as many equally weighted tokens would estimate as well.
        "effective_token_share": (used.sum().square() / square / tokens).item(),
    }


def main() -> None:
    """Two tokens by hand: ratios 1.5 and 0.5, weights 2 and 8, advantage 1."""
    theta = torch.tensor([[1.5, 0.5]]).log().requires_grad_()
    behaviour = torch.tensor([[0.5, 0.125]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = decoupled_ppo_loss(theta, torch.zeros(1, 2), behaviour, mask, torch.ones(1))
    loss.backward()
    # The first is clipped at 1.28 and counts twice; the second, 8 times as likely, is over the cap.
    assert abs(loss.item() + 2 * 1.28 / 2) < 1e-6  # noqa: S101 - a check is what this program is
    print(f"loss {loss.item():.3f} (by hand: -1.280)", stats)


if __name__ == "__main__":
    main()
