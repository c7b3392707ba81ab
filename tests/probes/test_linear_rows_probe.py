"""Rows of matrices: told where three follow each other, silent where something is between them or they are factors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path


def lin(*widths: int) -> list[nn.Module]:
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


class Holder(nn.Module):
    """A model with one sequence."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("layers", "at"),
    [
        (lin(6, 32, 32, 4), ["net"]),
        ([*lin(6, 32), nn.Dropout(0.1), *lin(32, 16), nn.Identity(), *lin(16, 4)], ["net"]),
        ([nn.Linear(6, 8), nn.ReLU(), nn.Sequential(*lin(8, 8, 8, 4))], ["net.2"]),
        ([*lin(6, 32), nn.ReLU(), *lin(32, 32), nn.ReLU(), *lin(32, 4)], []),
        ([*lin(6, 32, 32), nn.LayerNorm(32), *lin(32, 4)], []),
        (lin(6, 32, 4), []),  # a new head behind an old one
        (lin(6, 2, 32, 4), []),  # a factor of low rank
        ([frozen(nn.Linear(6, 32)), *lin(32, 32, 4)], []),  # what is frozen is somebody else's
        ([nn.Linear(6, 32), nn.Sequential(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 4)], []),
    ],
)
def test_three_in_a_row(tmp_path: Path, layers: list[nn.Module], at: list[str]) -> None:
    torch.manual_seed(0)
    model = Holder(layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    diagnosis = watching.diagnosis
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("ffn.no_activation", place) for place in at]
    assert diagnosis.unexplained == ()
