"""One matmul over unfolded patches, and torch's fused kernel, against a loop over the places of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.convolution.component import Conv2d, conv2d_im2col, conv2d_loops

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of 3 x 3 from 16 to 32 channels over 8 images of 16 x 16; the first is the one to beat."""
    torch.manual_seed(0)
    made = Conv2d(16, 32, 3, padding=1)
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    leaves = [x, made.weight, made.bias]

    def run(path: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path().sum(), leaves)

    return {
        "loops": run(lambda: conv2d_loops(x, made.weight, made.bias, padding=1)),
        "im2col": run(lambda: conv2d_im2col(x, made.weight, made.bias, padding=1)),
        "fused": run(lambda: made(x)),
    }
