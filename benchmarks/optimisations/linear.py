"""One fused product over all positions against a product for each: the weights are read once, not once a position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.projects.linear.component import Linear

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 8 sequences of 128 positions, width 256 to 1024; the first is the one to beat."""
    torch.manual_seed(0)
    made = Linear(256, 1024)
    weight, bias = made.weight, made.bias
    assert bias is not None
    x = torch.randn(8, 128, 256, requires_grad=True)

    def each_position(x: Tensor) -> Tensor:
        rows = [weight @ row + bias for sequence in x.unbind() for row in sequence.unbind()]  # each [outputs]
        return torch.stack(rows).view(8, 128, 1024)

    def each_sequence(x: Tensor) -> Tensor:
        return torch.stack([sequence @ weight.t() + bias for sequence in x.unbind()])  # [B T outputs]

    def run(path: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path(x).sum(), (x, weight, bias))

    return {
        "a product for each position": run(each_position),
        "a product for each sequence": run(each_sequence),
        "one fused addmm": run(made),
    }
