"""Project 3: log-softmax, cross-entropy in nats, label smoothing, mean squared error."""

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


def log_softmax(logits: Tensor) -> Tensor:
    """``z - logsumexp(z)`` over the last axis, [... V]: the logarithm of a softmax, without ever taking that of 0."""
    shifted = logits - logits.amax(dim=-1, keepdim=True).detach()  # [... V], at most 0
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.1, ignore: int = -100) -> Tensor:
    """Cross-entropy against the target with weight ``1 - smoothing`` and all classes evenly with weight `smoothing`.

    Args:
        logits: [N V].
        targets: [N], classes.
        smoothing: Weight of the even distribution, 0 to 1. The target keeps its share of it, `smoothing` / V.
        ignore: The target that is left out.
    """
    counted = targets != ignore
    log_p = log_softmax(logits[counted])  # [n V]
    chosen = -log_p.gather(-1, targets[counted][:, None]).squeeze(-1)  # [n]
    even = -log_p.mean(dim=-1)  # [n]
    return ((1 - smoothing) * chosen + smoothing * even).mean()


def mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Average the squared differences over all entries, for predictions and targets of one shape.

    Raises:
        ValueError: If the shapes differ: [N 1] against [N] would broadcast to [N N] and learn the mean.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions of shape {list(predictions.shape)}, targets of shape {list(targets.shape)}")
    error = predictions - targets
    return (error * error).mean()
