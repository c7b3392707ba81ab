"""Updates that a format loses: silent on float32 at any rate, and on bfloat16 that is added to with care."""

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

ID = "precision.update_lost"


@pytest.mark.parametrize("lr", [1e-7, 1e-4, 0.1])
def test_float32_is_silent(small_run: SmallRun, lr: float) -> None:
    diagnosis, history = small_run(train={"lr": lr, "warmup": 5})
    assert ID in diagnosis.checked
    assert ID not in {s.id for s in diagnosis.symptoms}
    assert history.series("precision.lost").values.max() < 0.01


def test_lost_updates_are_found(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(train={"lr": 1e-5, "warmup": 0}, faults=[{"id": ID}], steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(ID, "optimizer")]
    assert diagnosis.unexplained == ()


def trained(folder: Path, dtype: torch.dtype, optimizer: Any = torch.optim.AdamW) -> Any:
    """A classifier of anybody's at a small rate, its weights in some dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 5)).to(dtype)
    made = optimizer(model.parameters(), lr=1e-5)
    with lab.watch(model, made, out=folder) as watch:
        for _ in range(24):
            x = torch.randn(32, 16)
            made.zero_grad()
            F.cross_entropy(model(x.to(dtype)).float(), x[:, :5].argmax(-1)).backward()  # type: ignore[no-untyped-call]
            made.step()
    return watch.diagnosis


def test_pure_bfloat16_at_a_small_rate_is_found_in_a_loop_of_one_s_own(tmp_path: Path) -> None:
    assert ID in {s.id for s in trained(tmp_path / "run", torch.bfloat16).symptoms}


def test_float32_in_a_loop_of_one_s_own_is_silent(tmp_path: Path) -> None:
    assert ID not in {s.id for s in trained(tmp_path / "run", torch.float32).symptoms}


def test_an_optimiser_without_adam_s_state_is_not_judged(tmp_path: Path) -> None:
    diagnosis = trained(tmp_path / "run", torch.bfloat16, optimizer=torch.optim.SGD)
    assert "precision.lost" in diagnosis.not_checked[ID]


COLUMNS = tuple((f"precision.{name}", "") for name in ("lost", "bfloat16", "moved", "small"))


def told(catalogue: Any, *rows: tuple[float, float, float, float]) -> list[lab.Symptom]:
    history = lab.History()
    for index, row in enumerate(rows):
        history.add(index, Row(COLUMNS, np.array(row)))
    return list(catalogue.rules[ID].judge(history))


@pytest.mark.parametrize(
    "row",
    [
        (0.0, 1.0, 0.1, 0.9),  # stochastic rounding, or a compensation: some move
        (0.3, 1.0, 0.0, 0.3),  # most updates are large enough
        (0.001, 0.001, 0.0, 0.9),  # float32
    ],
)
def test_histories_that_are_healthy(catalogue: Any, row: tuple[float, float, float, float]) -> None:
    assert told(catalogue, row, row, row, row) == []


def test_histories_that_are_not(catalogue: Any) -> None:
    row = (0.9, 1.0, 0.0, 0.9)
    assert [s.since for s in told(catalogue, row, row, row)] == [0]
    with pytest.raises(lab.NotChecked, match="fewer than three"):
        told(catalogue, row, row)
