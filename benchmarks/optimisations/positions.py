"""All pairs of channels turned at once against a pair at a time, and against complex numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.projects.positions.component import rotate

if TYPE_CHECKING:
    from collections.abc import Callable


def _pair_by_pair(x: Tensor) -> Tensor:  # [B H T D] -> [B H T D]
    """Turn channels i and i + D/2, for each i."""
    length, width = x.shape[-2:]
    half, places = width // 2, torch.arange(length, dtype=torch.float32)  # [T]
    out: list[Tensor] = [x] * width
    for i in range(half):
        angle = places * 10000.0 ** (-2 * i / width)  # [T]
        a, b = x[..., i], x[..., i + half]  # [B H T] each
        out[i], out[i + half] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(out, dim=-1)


def _complex(x: Tensor) -> Tensor:  # [B H T D] -> [B H T D]
    """Multiply by ``e^(i angle)``."""
    length, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2) / width)  # [D/2]
    angles = torch.arange(length)[:, None] * rates  # [T D/2]
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)  # [B H T D/2]
    return torch.cat([z.real, z.imag], dim=-1)


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 8 x 4 heads over 256 positions of width 64; the first is the one to beat."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, 256, 64, requires_grad=True)  # [B H T D]

    def run(path: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path(x).square().sum(), x)

    return {"pair by pair": run(_pair_by_pair), "complex numbers": run(_complex), "all pairs": run(rotate)}
