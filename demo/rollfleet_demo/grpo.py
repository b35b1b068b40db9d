"""The demo trainer's objective: GRPO with a clipped ratio against the behaviour policy.

- The ratio is taken against the log-probabilities that the sampling server reported, so that
  samples of older versions are corrected for, up to the clip.
- A group whose rewards are all equal says nothing; it is left out, not averaged in as zero.
- The clip is asymmetric (0.2 below, 0.28 above), as in DAPO (Yu et al. 2025, arXiv:2503.14476);
  the advantage is the group-normalised reward of GRPO (Shao et al. 2024, arXiv:2402.03300).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollfleet_demo.model import CausalPolicy

__all__ = ["GrpoTrainer", "StepReport", "group_advantages", "grpo_loss"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step did."""

    #: Value of the loss; 0.0 if the step was skipped.
    loss: float
    #: Share of trained tokens whose ratio was outside of the clip range.
    clipped: float
    #: Norm of the gradient before it was clipped.
    grad_norm: float
    #: Rows and tokens that were trained on; 0 rows: nothing to learn from, weights unchanged.
    rows: int
    tokens: int


def group_advantages(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards normalised within their group.

    Args:
        rewards: float32[rows].
        groups: int64[rows]: which group each row belongs to, in any order and numbering.

    Returns:
        float32[rows], the advantages ``(r - mean) / (std + 1e-6)`` with the biased standard
        deviation, 0 where the group's rewards do not differ; and bool[rows], False on those rows.
    """
    _, member = torch.unique(groups, return_inverse=True)
    size = torch.zeros(int(member.max()) + 1 if len(member) else 0)
    size.index_add_(0, member, torch.ones_like(rewards))
    mean = torch.zeros_like(size).index_add_(0, member, rewards) / size
    centred = rewards - mean[member]
    deviation = (torch.zeros_like(size).index_add_(0, member, centred.square()) / size).sqrt()
    informative = (deviation > 1e-6)[member]
    advantages = torch.where(informative, centred / (deviation[member] + 1e-6), 0.0)
    return advantages, informative


def grpo_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, Tensor]:
    """The clipped policy-gradient loss, averaged over trained tokens.

    Args:
        logprobs: float32[rows, seq]: of the tokens under the policy that is trained.
        behaviour: float32[rows, seq]: of the tokens under the policy that sampled them.
        loss_mask: bool[rows, seq]: True on trained tokens; other entries are not looked at.
        advantages: float32[rows].
        clip_low: How far the ratio may fall below 1 before its gradient is cut.
        clip_high: How far it may rise above 1.

    Returns:
        The loss, and the share of trained tokens outside of the clip range. Both are scalars.
    """
    new, old = logprobs[loss_mask], behaviour[loss_mask]
    weight = advantages.unsqueeze(1).expand_as(logprobs)[loss_mask]
    ratio = (new - old).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * weight, bounded * weight).mean()
    return loss, (ratio != bounded).float().mean()


class GrpoTrainer:
    """A policy and its optimiser. Not thread-safe."""

    def __init__(
        self, policy: CausalPolicy, *, lr: float = 3e-4, max_grad_norm: float = 1.0
    ) -> None:
        """A fresh AdamW over the policy's parameters."""
        self.policy = policy
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)

    def step(
        self, token_ids: Tensor, loss_mask: Tensor, behaviour: Tensor, advantages: Tensor
    ) -> StepReport:
        """One optimiser step on one batch.

        Args:
            token_ids: int64[rows, seq]: prompts and completions, padded on the right.
            loss_mask: bool[rows, seq]: True on the tokens that are trained on.
            behaviour: float32[rows, seq]: log-probabilities under the sampling policy.
            advantages: float32[rows]: rows of exactly 0 carry no gradient and are left out.

        Raises:
            ValueError: The shapes disagree, or a first token, which nothing predicts, is trained.
        """
        if not token_ids.shape == loss_mask.shape == behaviour.shape:
            raise ValueError(
                f"shapes disagree: token_ids {tuple(token_ids.shape)}, "
                f"loss_mask {tuple(loss_mask.shape)}, behaviour {tuple(behaviour.shape)}"
            )
        if advantages.shape != token_ids.shape[:1]:
            raise ValueError(f"{tuple(advantages.shape)} advantages for {len(token_ids)} rows")
        if loss_mask[:, 0].any():
            raise ValueError("loss_mask is set on a first token, which no other token predicts")
        rows = (advantages != 0.0) & loss_mask.any(1)
        if not rows.any():
            return StepReport(0.0, 0.0, 0.0, 0, 0)
        mask = loss_mask[rows]
        loss, clipped = grpo_loss(
            self.policy.logprobs(token_ids[rows]), behaviour[rows], mask, advantages[rows]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return StepReport(
            loss.item(), clipped.item(), norm.item(), int(rows.sum()), int(mask.sum())
        )
