"""Backward through the stream of 24 blocks: every gain folded into the weights against a multiplication each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 48 additions to a stream [16 128 256]; the first is the one to beat."""
    torch.manual_seed(0)
    gain, x = 48**-0.5, torch.randn(16, 128, 256, requires_grad=True)
    branches = [torch.randn(16, 128, 256) for _ in range(4)]
    folded = [gain * branch for branch in branches]

    def run(parts: list[Tensor], scale: float) -> Callable[[], object]:
        def stream() -> object:
            out = x
            for i in range(48):
                part = parts[i % 4]
                out = out + (part if scale == 1.0 else scale * part)
            return torch.autograd.grad(out.sum(), x)

        return stream

    return {"scaled at each addition": run(branches, gain), "folded into the weights": run(folded, 1.0)}
