"""The start of the head and of the matrices: a factor on the logits, and matrices that are all too small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

FOUND = {"head.multiplied", "start.scale_low"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"layers": 6, "width": 32, "heads": 2, "context": 8, "tied": True}},
        {"model": {"layers": 0, "width": 8, "heads": 1, "context": 8}},
        {"train": {"accumulate": 2, "lr": 0.3, "warmup": 0}},
        {"train": {"objective": "masked"}},
    ],
)
def test_a_standard_start_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=2, **changes)
    assert set(diagnosis.checked) >= FOUND
    assert diagnosis.symptoms == ()
    assert history.last("head.factor", "head") == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"train": {"accumulate": 2}}])
def test_a_factor_is_measured_and_named(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(faults=[{"id": "head.scaled", "factor": 40.0}], steps=2, **changes)
    assert [(c.id, c.at) for c in diagnosis.causes] == [("head.scaled", "head")]
    assert diagnosis.unexplained == ()
    assert history.last("head.factor", "head") == pytest.approx(40, rel=1e-4)


def test_a_head_that_is_too_large_is_not_called_multiplied(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "init.too_large"}], steps=2)
    assert [c.id for c in diagnosis.causes] == ["init.too_large"]


@pytest.mark.parametrize("factor", [1e-3, 1e-6])
def test_matrices_that_are_all_too_small_are_named(small_run: SmallRun, factor: float) -> None:
    diagnosis, _ = small_run(faults=[{"id": "init.too_small", "factor": factor}], steps=2)
    assert [(c.id, c.at) for c in diagnosis.causes] == [("init.too_small", "blocks.0.attn.qkv.weight")]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize(
    ("scales", "loss", "count"),
    [
        ((1e-4, 1e-4, 1e-4, 1e-4, 0.1), 2.3, 4),
        ((1e-4, 1e-4, 1e-4, 1e-4, 0.1), 1.0, 0),  # a model that was trained before, with adapters
        ((1e-4, 1e-4, 1e-4, 0.0, 0.0), 2.3, 0),  # 0 on purpose
        ((1e-4, 0.1, 1e-4, 0.1, 1e-4), 2.3, 0),  # the last of each branch
        ((0.0041,) * 5, 2.3, 0),  # GPT-2's with a hundred layers, of 16 inputs
    ],
)
def test_all_matrices_have_to_be_small(catalogue: Any, scales: tuple[float, ...], loss: float, count: int) -> None:
    history = lab.History()
    names = [f"m{i}" for i in range(len(scales))]
    columns = [("start.loss", ""), ("start.error", ""), ("start.classes", "")]
    columns += [("start.scale", n) for n in names] + [("start.inputs", n) for n in names]
    history.add(0, Row(tuple(columns), np.array([loss, 0.01, 10.0, *scales, *[64.0] * len(scales)])))
    assert len(list(catalogue.rules["start.scale_low"].judge(history))) == count


class Classifier(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.fc, self.factor = nn.Linear(6, 32), nn.Linear(32, 5), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.factor * self.fc(F.relu(self.body(x)))
        return answer


@pytest.mark.parametrize(
    ("factor", "outside", "found"), [(1.0, 1.0, 0), (0.1, 1.0, 0), (1.2, 1.0, 0), (30.0, 1.0, 1), (1.0, 30.0, 1)]
)
def test_in_a_loop_of_ones_own(tmp_path: Path, factor: float, outside: float, found: int) -> None:
    torch.manual_seed(0)
    model = Classifier(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(3):
            x = torch.randn(64, 6)
            optimizer.zero_grad()
            F.cross_entropy(outside * model(x), torch.randint(5, (64,))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert [s.at for s in watch.diagnosis.symptoms if s.id == "head.multiplied"] == ["fc"] * found
    assert not any(module._forward_pre_hooks for module in model.modules())
