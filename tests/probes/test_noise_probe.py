"""Noise on the stream: told from dropout that is left on, and from what is random elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun


class Part(nn.Module):
    """A block that may draw random numbers, for its branch or for the stream."""

    def __init__(self, draws: str) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.branch, self.draws = nn.Linear(8, 8), draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(self.after(self.norm(x)))
        if self.draws == "dropout":
            y = F.dropout(y, 0.5)  # in evaluation too
        elif self.draws == "stream" or (self.draws == "training" and self.training):
            y = y + torch.randn_like(y)
        out: torch.Tensor = x + y
        return out


class Model(nn.Module):
    def __init__(self, draws: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Part(draws if i == 1 else "") for i in range(3))
        self.draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + torch.randn_like(x) if self.draws == "head" else x


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ("", []),
        ("training", []),
        ("dropout", ["evaluation.dropout"]),
        ("head", []),
        ("stream", ["residual.noisy"]),
    ],
)
def test_what_is_random_where(tmp_path: Path, draws: str, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = Model(draws)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lab.watch(model, optimizer, out=tmp_path / "run", examine_every=4) as watching:
        for _ in range(9):
            x = torch.randn(4, 5, 8)
            optimizer.zero_grad()
            (model(x) * x).mean().backward()
            optimizer.step()
    # Normal numbers that are added to what comes out may be meant, as in a model with a random code.
    asked = {"evaluation.random", "evaluation.dropout", "residual.noisy"}
    found = [(c.id, c.at) for c in watching.diagnosis.causes if c.id in asked]
    places = {"stream": "layers.1", "dropout": "layers.1"}
    assert found == [(id, places[draws]) for id in expected]


@pytest.mark.parametrize("start", [0, 7])
def test_noise_is_named_with_its_block(small_run: SmallRun, start: int) -> None:
    diagnosis, _ = small_run(faults=[{"id": "residual.noisy", "at": "blocks.0", "from_step": start}])
    cause = diagnosis.causes[0]
    assert (cause.id, cause.at, len(diagnosis.causes)) == ("residual.noisy", "blocks.0", 1)
    assert start <= cause.since_step <= 11
    assert diagnosis.unexplained == ()


def test_a_place_without_a_block_is_refused(small_run: SmallRun) -> None:
    with pytest.raises(BadInput, match="no site"):
        small_run(faults=[{"id": "residual.noisy", "at": "blocks.9"}])
