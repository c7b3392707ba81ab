"""Whether a start can be judged by the size of the weights: only where the logits follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab import Diagnosis, History


@pytest.mark.parametrize(
    "faults",
    [[], [{"id": "init.too_large"}], [{"id": "head.scaled"}], [{"id": "init.too_large", "at": "tokens", "std": 30.0}]],
)
def test_logits_of_a_linear_head_are_halved_with_it(small_run: SmallRun, faults: list[dict[str, Any]]) -> None:
    _, history = small_run(faults=faults, steps=2)
    assert 0.3 < history.last("start.response") < 0.55


class Linear(nn.Module):
    """Scores by a linear head of this standard deviation; the loss inside, or the features too, if asked."""

    def __init__(self, std: float, answers: str = "logits") -> None:
        super().__init__()
        self.body, self.head, self.answers = nn.Linear(6, 32), nn.Linear(32, 8), answers
        nn.init.normal_(self.head.weight, std=std)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = F.dropout(F.relu(self.body(x)), 0.5, self.training)
        if self.answers == "features":
            return features
        logits: Tensor = self.head(features)
        return F.cross_entropy(logits, y) if self.answers == "loss" else logits


class Cosine(nn.Module):
    """Scores by the angle between features and one vector for each class, as in recognition of faces."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(6, 32), nn.Parameter(torch.randn(8, 32))
        self.scale = nn.Parameter(torch.full((1, 1), scale))

    def forward(self, x: Tensor, _y: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.body(x)), F.normalize(self.weight))


def watched(out: Path, model: nn.Module) -> tuple[Diagnosis, History]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=out) as watch:
        for _ in range(3):
            x, y = torch.randn(64, 6), torch.randint(8, (64,))
            answer = model(x, y)
            if answer.dim() and answer.shape[-1] == 32:
                answer = model.head(answer)  # type: ignore[operator]
            loss = F.cross_entropy(answer, y) if answer.dim() else answer
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watch.diagnosis, watch.run.history


@pytest.mark.parametrize("answers", ["logits", "loss"])
def test_a_large_linear_head_is_named(tmp_path: Path, answers: str) -> None:
    torch.manual_seed(0)
    diagnosis, history = watched(tmp_path / "run", Linear(8.0, answers))
    assert history.last("start.response") < 0.6
    assert [cause.id for cause in diagnosis.causes] == ["init.too_large"]


def test_a_head_outside_the_model_is_not_judged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diagnosis, history = watched(tmp_path / "run", Linear(8.0, "features"))
    assert not len(history.series("start.response"))
    assert history.last("start.loss") > 5
    assert "not known" in diagnosis.not_checked["start.loss_high"]
    assert diagnosis.causes == ()


@pytest.mark.parametrize("size", [1.0, 50.0])
def test_a_scale_between_normalised_vectors_is_a_choice(tmp_path: Path, size: float) -> None:
    torch.manual_seed(0)
    model = Cosine(30.0)
    with torch.no_grad():
        model.weight.mul_(size)
    diagnosis, history = watched(tmp_path / "run", model)
    assert history.last("start.loss") > 5  # ln 8 + 1 is 3.1
    assert history.last("start.response") > 0.9
    assert "keep" in diagnosis.not_checked["start.loss_high"]
    assert diagnosis.not_checked["start.scale_high"] == diagnosis.not_checked["start.loss_high"]
    assert diagnosis.causes == ()


def test_weights_are_put_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cosine(30.0)
    seen: list[Tensor] = []

    class Before(lab.Plugin):
        def lab_step_end(self) -> None:
            seen.append(model.weight.detach().clone())

        def lab_metrics(self) -> None:
            assert torch.equal(model.weight, seen[-1])

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run", plugins=[Before()]):
        for _ in range(2):
            loss = F.cross_entropy(model(torch.randn(9, 6), torch.empty(0)), torch.randint(8, (9,)))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert len(seen) == 2
    assert torch.equal(model.weight, seen[-1])
