"""Project 3: cross-entropy, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_explicit(logits: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """``mean(logsumexp(z) - z_target)`` over the targets that are not `ignore`.

    The largest logit is subtracted before the exponential, which then cannot overflow.

    Args:
        logits: [N V].
        targets: [N], classes.
        ignore: The target that is left out.
    """
    kept = targets != ignore
    z, y = logits[kept], targets[kept]  # [n V], [n]
    top = z.amax(dim=-1, keepdim=True)  # [n 1]
    log_sum = (z - top).exp().sum(dim=-1).log() + top.squeeze(-1)  # [n]
    return (log_sum - z.gather(-1, y[:, None]).squeeze(-1)).mean()


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """Compute `cross_entropy_explicit` by the fused kernel, for logits [... V] and targets [...]."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore)


@torch.no_grad()
def token_losses(logits: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """The loss of each token that counts, [n], without gradient."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore, reduction="none"
    )
    return flat[targets.reshape(-1) != ignore]
