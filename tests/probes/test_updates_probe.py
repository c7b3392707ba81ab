"""Updates against their formula: silent on right ones of any kind, and on optimisers that it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

RULES = {"update.uncorrected", "update.coupled"}


@pytest.mark.parametrize(
    "train",
    [
        {"lr": 1e-6, "warmup": 0},
        {"lr": 0.3, "warmup": 5, "weight_decay": 1.0},
        {"weight_decay": 0.0, "clip": 1e-3},
        {"accumulate": 2},
    ],
)
def test_it_is_silent_on_healthy_runs(small_run: SmallRun, train: dict[str, Any]) -> None:
    diagnosis, history = small_run(train=train, steps=24)
    assert set(diagnosis.checked) >= RULES
    assert not RULES & {s.id for s in diagnosis.symptoms}
    assert history.series("update.error").values.max() < 8  # of the 64 units of rounding that are allowed


def watched(folder: Path, make: Any, dtype: torch.dtype = torch.float32) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    optimizer = make(model.parameters())
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(22):
            x, y = torch.randn(16, 8, dtype=dtype), torch.randint(0, 3, (16,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert watching.diagnosis is not None
    return watching.diagnosis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 2.0}])
def test_the_optimiser_of_torch_follows_its_formula(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    diagnosis = watched(tmp_path / "run", lambda p: torch.optim.AdamW(p, lr=1e-2, **options), dtype)
    assert set(diagnosis.checked) >= RULES
    assert not RULES & {s.id for s in diagnosis.symptoms}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "the formula of Adam is not known here"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "the formula of SGD is not known here"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
    ],
)
def test_what_it_cannot_judge(tmp_path: Path, make: Any, reason: str) -> None:
    diagnosis = watched(tmp_path / "run", make)
    for rule in RULES:
        assert reason in diagnosis.not_checked[rule]
