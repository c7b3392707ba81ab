"""The fused kernel against the formula step by step: it holds one array of N x V numbers, not three."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.losses.component import cross_entropy, cross_entropy_explicit

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 1024 targets among 4096 classes; the first is the one to beat."""
    torch.manual_seed(0)
    logits = torch.randn(1024, 4096, requires_grad=True)
    targets = torch.randint(4096, (1024,))

    def run(path: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path(logits, targets), logits)

    return {"explicit": run(cross_entropy_explicit), "fused": run(cross_entropy)}
