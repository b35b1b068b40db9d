"""Decoupled PPO's inputs: proximal log-probabilities aligned token by token with a batch.

- Decoupled PPO (Hilton et al. 2021, arXiv:2110.00641; AReaL, arXiv:2505.24298) clips around a
  proximal policy that is recent, and corrects for the one that sampled by a weight. A batch brings
  the sampling side (`logprobs`, `versions`); this file makes the proximal one.
- Position t of every [B, T] tensor is about token t itself, never about the token after it.
- Only trained tokens that the proximal policy did not make are filled in; everything else, prompts
  and padding among it, stays what ``batch.logprobs`` says.
- The proximal policy is the trainer's at `current`, before the step: what it sampled by itself
  needs no recomputation, so a fresh batch costs no forward pass.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rollfleet.tensors.padded import TensorBatch
from rollfleet_common.messages import NO_VERSION

__all__ = [
    "Method",
    "Recompute",
    "proximal_logprobs",
    "segment_mask",
    "token_logprobs",
    "token_staleness",
]

#: ``recompute(input_ids, attention_mask)``, both [b, T] and padded as the batch is: float [b, T],
#: the log-probability of each token under the proximal policy. :func:`token_logprobs` makes it
#: of logits.
Recompute = Callable[[Tensor, Tensor], Tensor]

#: "recompute": a forward pass over the rows that need one; exact.
#: "loglinear", "linear": between the sampling policy and the one that is trained, by versions.
#: "behaviour": the sampling policy itself, which makes decoupled PPO plain PPO.
Method = Literal["recompute", "loglinear", "linear", "behaviour"]


def proximal_logprobs(
    batch: TensorBatch,
    current: int,
    recompute: Recompute | None = None,
    *,
    method: Method = "recompute",
    theta: Tensor | None = None,
    rows: Literal["stale", "all"] = "stale",
    rows_per_call: int | None = None,
) -> Tensor:
    """float32[B, T]: log-probabilities of a batch's tokens under the proximal policy.

    The approximations are AReaL's (areal-project/AReaL, pull request 600). With v the version that
    made a token, `current` the proximal one and ``current + 1`` the one that is being trained, it
    is put at ``alpha = (current - v) / (current + 1 - v)`` of the way from `logprobs` to `theta`,
    in logarithms (``loglinear``) or in probabilities (``linear``).

    Args:
        batch: On any device.
        current: Version of the proximal policy: ``batch.version``, the trainer's at hand-over.
        recompute: The trainer's forward pass, for ``recompute``; called without gradients.
        method: Where the numbers come from.
        theta: float [B, T]: log-probabilities under the policy that is being trained, for the
            approximations; no gradient flows through it.
        rows: "stale": recompute rows that train a token of version ``current - 1`` or older, and in
            them those tokens. "all": every row and every trained token, so that the gap between
            the server's numerics and the trainer's is out of the ratio; one more forward pass.
        rows_per_call: Most rows of one `recompute`; None for all of them at once.

    Raises:
        ValueError: A shape or argument does not fit, a number is not finite, or a token is newer
            than `current`.
    """
    behaviour = batch.logprobs
    trained = segment_mask(batch) & batch.loss_mask
    if bool((trained & (batch.versions > current)).any()):
        raise ValueError(
            f"the batch trains tokens of version {int(batch.versions.max())}, newer than the "
            f"proximal policy's version {current}: `current` must be the version of the batch"
        )
    if method == "behaviour":
        return behaviour.clone()
    wanted = trained if rows == "all" else trained & (batch.versions < current)
    if method == "recompute":
        if recompute is None:
            raise ValueError('method="recompute" needs a `recompute` function')
        return _recomputed(batch, wanted, recompute, rows_per_call)
    if method not in ("loglinear", "linear"):
        raise ValueError(f"method is {method!r}; it must be one of {Method.__args__}")  # type: ignore[attr-defined]
    if theta is None:
        raise ValueError(f"method={method!r} needs `theta`, the trained policy's logprobs")
    _check_shape("theta", theta, behaviour.shape)
    theta = theta.detach().to(behaviour.dtype)
    behind = token_staleness(batch, current).to(behaviour.dtype)
    alpha = behind / (behind + 1)
    if method == "loglinear":
        between = torch.lerp(behaviour, theta, alpha)
    else:
        between = torch.lerp(behaviour.exp(), theta.exp(), alpha).log()
    _check_finite("theta", between, wanted)
    return torch.where(wanted, between, behaviour)


def segment_mask(
    batch: TensorBatch, *, oldest: int | None = None, newest: int | None = None
) -> Tensor:
    """bool[B, T]: tokens that a policy of versions `oldest` to `newest` (each included) made.

    None leaves an end open; prompts, tool output and padding are in no segment.
    """
    made = batch.attention_mask & (batch.versions != NO_VERSION)
    if oldest is not None:
        made = made & (batch.versions >= oldest)
    if newest is not None:
        made = made & (batch.versions <= newest)
    return made


def token_staleness(batch: TensorBatch, current: int) -> Tensor:
    """int64[B, T]: versions that each token is behind `current`; 0 where no policy made it."""
    behind = current - batch.versions.to(torch.int64)
    return torch.where(segment_mask(batch), behind, 0)


def token_logprobs(logits: Tensor, input_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """float32[B, T]: log-probability of each token of `input_ids`, given those before it.

    Args:
        logits: [B, T, V]: at position t of the token t + 1, as language models return them.
        input_ids: int [B, T].
        temperature: What the tokens were sampled at; the sampling side's numbers are of it, too.

    Returns:
        0.0 at position 0, before which nothing is known.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"logits {list(logits.shape)} do not fit input_ids {list(input_ids.shape)}: they must "
            "be [B, T, V] for [B, T], one row of logits a token, the last one unused"
        )
    scaled = logits[:, :-1].float() / temperature
    following = input_ids[:, 1:].to(torch.int64).unsqueeze(-1)
    chosen = scaled.gather(-1, following).squeeze(-1) - scaled.logsumexp(-1)
    return torch.nn.functional.pad(chosen, (1, 0))


def _recomputed(
    batch: TensorBatch, wanted: Tensor, recompute: Recompute, rows_per_call: int | None
) -> Tensor:
    """The batch's logprobs, with those of the `wanted` tokens recomputed, some rows at a time."""
    proximal = batch.logprobs.clone()
    chosen = wanted.any(-1).nonzero().squeeze(-1)
    if not len(chosen):
        return proximal
    if rows_per_call is not None and rows_per_call < 1:
        raise ValueError(f"rows_per_call is {rows_per_call}; it must be at least 1")
    step = rows_per_call or len(chosen)
    for at in range(0, len(chosen), step):
        some = chosen[at : at + step]
        with torch.no_grad():
            made = recompute(batch.input_ids[some], batch.attention_mask[some])
        _check_shape("recompute's answer", made, (len(some), proximal.shape[1]))
        made = made.detach().to(proximal)
        _check_finite("recompute's answer", made, wanted[some])
        proximal[some] = torch.where(wanted[some], made, proximal[some])
    return proximal


def _check_shape(what: str, found: object, wanted: tuple[int, ...]) -> None:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{what} is {kind}, not a tensor of floats")
    if tuple(found.shape) == tuple(wanted):
        return
    hint = ""
    if found.ndim == 3:
        hint = "; of logits, token_logprobs(logits, input_ids) makes it"
    elif tuple(found.shape) == (wanted[0], wanted[1] - 1):
        hint = "; put a 0.0 before each row: position t is about token t, and the first has none"
    raise ValueError(f"{what} has shape {list(found.shape)}, not {list(wanted)}{hint}")


def _check_finite(what: str, found: Tensor, wanted: Tensor) -> None:
    bad = (wanted & ~found.isfinite()).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        raise ValueError(
            f"{what} is {found[row, token].item()} for row {row} token {token} ({len(bad)} such): "
            "every trained token has a finite log-probability"
        )
