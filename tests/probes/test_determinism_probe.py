"""Evaluation that draws: found as a whole, placed, and told from other noise where it is dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

SMALL = {"layers": 2, "width": 32, "heads": 2, "context": 24}


@pytest.mark.parametrize("at", ["blocks.0.attn", "blocks.1.mlp"])
def test_dropout_that_stays_on_is_placed(small_run: SmallRun, at: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": "evaluation.dropout", "at": at}], model=SMALL)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("evaluation.dropout", at)]
    assert diagnosis.unexplained == ()


def test_sites_are_looked_at_only_where_the_whole_differs(small_run: SmallRun) -> None:
    diagnosis, history = small_run()
    assert {"evaluation.random_site", "evaluation.dropped"} <= set(diagnosis.checked)
    assert not history.sites("determinism.site_difference")


class Noisy(nn.Module):
    """A classifier of tokens whose middle layer draws, in one way or another, in every mode or in training only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(11, 16)
        self.middle = Middle(kind)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(tokens)))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """What draws."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proper = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "proper":
            return self.proper(x)  # type: ignore[no-any-return]
        if self.kind == "dropout":
            return F.dropout(x)
        return x + 0.1 * (torch.rand_like(x) - 0.5 if self.kind == "noise" else torch.randn_like(x))


@pytest.mark.parametrize(
    ("kind", "causes"),
    [("proper", []), ("dropout", ["evaluation.dropout"]), ("noise", ["evaluation.random"]), ("code", [])],
)
def test_a_model_of_anybody_s(tmp_path: Path, kind: str, causes: list[str]) -> None:
    torch.manual_seed(0)
    model = Noisy(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(6):
            tokens = torch.randint(11, (6, 9))
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert [cause.id for cause in watch.diagnosis.causes] == causes
    assert all(cause.at.startswith("middle") for cause in watch.diagnosis.causes)
