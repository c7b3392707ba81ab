"""Project 18: learning from preferences: a reward model, DPO, and the pieces of PPO and GRPO.

Christiano et al., 2017, and Ouyang et al., 2022 (reward models); Rafailov et al., 2023 (DPO); Schulman et al., 2017
(PPO); Shao et al., 2024 (GRPO).
"""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from lab.context import IGNORED
from lab.errors import BadInput
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab.projects.decoder.component import Decoder

FARTHEST = 80.0  # nats; the exponential of a float32 overflows at 88.7


def token_log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:  # [B T V], [B T] -> [B T]
    """The log-probability of each target, at least in float32; 0 where the target is ignored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = targets != IGNORED  # [B T]
    chosen = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]  # [B T]
    return (chosen - logits.logsumexp(dim=-1)).where(kept, torch.zeros((), dtype=logits.dtype, device=logits.device))


def sequence_log_probability(logits: Tensor, targets: Tensor) -> Tensor:  # [B T V], [B T] -> [B]
    """The log-probability of a row's targets together: a sum, so that a longer answer is less likely."""
    return token_log_probabilities(logits, targets).sum(dim=-1)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model, in evaluation mode, and that no optimiser can move."""
    return copy.deepcopy(model).eval().requires_grad_(requires_grad=False)


class RewardModel(Component):
    """The body of a language model with one number at the last token of a row: how good the row is.

    Args:
        decoder: The language model; its head is not used.
        width: C, of its stream.
    """

    SITES = MappingProxyType({"reward": "B"})

    def __init__(self, decoder: Decoder, width: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.score = Linear(width, 1)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:  # [B T], [B] -> [B]
        """Score each row at its last token.

        Args:
            tokens: Rows, padded on the right.
            lengths: Of the rows, from 1 to T; T if None.

        Raises:
            BadInput: A length is below 1 or above T.
        """
        rows, longest = tokens.shape
        if lengths is None:
            lengths = torch.full((rows,), longest, device=tokens.device)
        if rows and (int(lengths.min()) < 1 or int(lengths.max()) > longest):
            raise BadInput(
                f"lengths from {int(lengths.min())} to {int(lengths.max())}; they must be from 1 to {longest}"
            )
        x = self.decoder.embed(tokens)  # [B T C]
        for block in self.decoder.blocks:
            x = block(x)
        last = self.decoder.norm(x)[torch.arange(rows, device=tokens.device), lengths - 1]  # [B C]
        return self.tap("reward", self.score(last[:, None])[:, 0, 0])


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:  # [B], [B] -> []
    """``-log sigmoid(chosen - rejected)``: how surprising the choice is to Bradley and Terry's model of it."""
    return F.softplus(rejected - chosen).mean()


def dpo_margin(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:  # [B] each -> [B]
    """By how much the policy rewards the chosen more than the rejected; a reward is beta times a log-ratio."""
    return beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:  # [B] each -> []
    """``-log sigmoid(margin)`` (Rafailov et al., 2023, equation 7).

    Args:
        policy_chosen: Log-probabilities of the answers that are preferred.
        policy_rejected: Of those that are not.
        reference_chosen: As `policy_chosen`, by the reference.
        reference_rejected: As `policy_rejected`, by the reference.
        beta: How much a nat of distance to the reference costs.
        smoothing: The share of pairs whose order is taken to be wrong.
    """
    margin = dpo_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return ((1 - smoothing) * F.softplus(-margin) + smoothing * F.softplus(margin)).mean()


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:  # [B T], [B T] -> [B T]
    """An estimate of KL(policy, reference) from the log-probabilities of tokens that the policy drew.

    ``e^r - 1 - r`` with r = reference - policy: never below 0, and unbiased, since the mean of e^r is 1 (Schulman,
    2020, "Approximating KL divergence", k3).
    """
    ratio = reference - policy
    return torch.expm1(ratio) - ratio


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:  # [G N] -> [G N]
    """Each reward against the others of its group: less their mean, over their standard deviation (GRPO).

    The standard deviation is that of the group itself, over N and not N - 1: no larger population is estimated, the
    mean square is 1 for every N, and a group of one has 0 rather than 0 / 0. A group whose rewards are all equal
    teaches nothing: its advantages are exactly 0, where rounding over a deviation of rounding would not be.
    """
    away = rewards - rewards.mean(dim=-1, keepdim=True)
    advantages: Tensor = away / (away.square().mean(dim=-1, keepdim=True).sqrt() + eps)
    alike = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)  # [G 1]
    return advantages.masked_fill(alike, 0.0)


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, present: Tensor, *, clip: float = 0.2
) -> Tensor:  # [B T], [B T], [B] or [B T], [B T] -> []
    """PPO's clipped objective, as a loss: the mean over the present tokens (Schulman et al., 2017, equation 7).

    Args:
        new: Log-probabilities of the drawn tokens, now.
        old: The same when they were drawn.
        advantages: Of each row, or of each token.
        present: True where a token counts.
        clip: How far the ratio of probabilities may move from 1 before it has no more gradient.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # [B 1]
    moved = (new - old).where(present, torch.zeros_like(new))  # [B T]
    # An infinite ratio has no gradient of 0 beyond the clip, but 0 x inf = NaN.
    ratio = moved.clamp_max(FARTHEST).exp()  # [B T]
    worse = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # [B T]
    return -worse.where(present, torch.zeros_like(worse)).sum() / present.sum().clamp_min(1)
