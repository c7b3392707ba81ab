"""Loaders that begin anew in each step: told where they give the same batch, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

STEPS = 40


def trained(folder: Path, way: str) -> lab.Diagnosis:
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    size = 96 if way == "whole" else 16
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=size, shuffle=way == "shuffled")
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept = next(iter(loader))

    def batch() -> tuple[Tensor, Tensor]:
        found = kept if way == "one" else next(iter(loader))
        return found[0], found[1]

    with lab.watch(model, optimizer, out=folder) as watching:
        epochs = iter(pair for _ in range(STEPS) for pair in loader)
        for _ in range(STEPS):
            inputs, targets = next(epochs) if way == "epochs" else batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


def test_the_first_batch_again_and_again_is_named(tmp_path: Path) -> None:
    diagnosis = trained(tmp_path / "run", "anew")
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("data.iterator_anew", "data")]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("way", ["epochs", "one", "whole", "shuffled"])
def test_batches_that_are_meant_are_silent(tmp_path: Path, way: str) -> None:
    """In epochs; one batch on purpose; the whole data set in each step; a new iterator that shuffles."""
    assert trained(tmp_path / "run", way).symptoms == ()
