"""The inputs of all positions projected by one matmul before the loop, against each position's own inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.recurrent.component import LSTM

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def inside(made: LSTM, x: Tensor) -> Tensor:  # [B T C] -> [B T F]
    """The formula, one position at a time."""
    h = c = made.zeros(x)  # [B F]
    bias, first, second = made.bias_ih + made.bias_hh, made.weight_ih.t(), made.weight_hh.t()  # as outside the loop
    states = []
    for each in x.unbind(1):  # [B C]
        part = torch.addmm(bias, each, first)  # [B 4*F]
        i, f, g, o = torch.addmm(part, h, second).chunk(4, dim=-1)  # [B F] each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states, dim=1)


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of an LSTM: 8 sequences of 128 positions, width 128; the first is the one to beat."""
    torch.manual_seed(0)
    made = LSTM(128, 128)
    x = torch.randn(8, 128, 128, requires_grad=True)
    leaves = [x, *made.parameters()]

    def run(path: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(path().sum(), leaves)

    return {"in the loop": run(lambda: inside(made, x)), "before the loop": run(lambda: made(x)[0])}
