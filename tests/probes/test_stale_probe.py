"""A layer that is computed with an old copy of its weights is named; autocast as it should be used is not."""

from __future__ import annotations

from contextlib import nullcontext
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


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.at for s in diagnosis.symptoms if s.id == "stale.same"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 1, "width": 32, "heads": 2, "context": 24, "dropout": 0.3}},
        {"model": {"layers": 2, "width": 16, "heads": 1, "context": 12, "activation": "relu"}, "train": {"lr": 0.3}},
        {"train": {"lr": 0.0}},
    ],
)
def test_a_run_as_it_should_be_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(steps=24, **changes)
    assert named(diagnosis) == []
    assert ("stale.same" in diagnosis.not_checked) == (changes.get("train") == {"lr": 0.0})


@pytest.mark.parametrize("at", ["blocks.0.mlp.up", "head"])
def test_an_old_copy_is_named(small_run: SmallRun, at: str) -> None:
    diagnosis, history = small_run(faults=[{"id": "precision.stale_copy", "at": at}], steps=24, train={"lr": 0.01})
    assert [(c.id, c.at) for c in diagnosis.causes] == [("precision.stale_copy", at)]
    assert diagnosis.unexplained == ()
    assert [name for name, series in history.each("stale.same") if series.values.any()] == [at]


def test_a_table_that_is_looked_up_is_no_such_layer(small_run: SmallRun) -> None:
    with pytest.raises(lab.BadInput, match="no layer with a weight matrix"):
        small_run(faults=[{"id": "precision.stale_copy", "at": "blocks.0.attn_norm"}])


def train(folder: Path, around: str, kind: torch.dtype = torch.float32) -> lab.Diagnosis:
    """Train under autocast around the forward pass, around each step, or around the whole loop."""

    def cast(place: str) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if place == around else nullcontext()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 5)).to(kind)
    model[3].requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch, cast("loop"):
        for _ in range(34):
            with cast("step"):
                x = torch.randn(32, 6, dtype=kind)
                optimizer.zero_grad()
                with cast("forward"):
                    loss = F.cross_entropy(model(x).float(), x[:, :5].argmax(-1))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize("around", ["nothing", "forward", "step"])
def test_autocast_as_it_should_be_is_silent(tmp_path: Path, around: str) -> None:
    diagnosis = train(tmp_path / "run", around)
    assert "stale.same" in diagnosis.checked
    assert named(diagnosis) == []


def test_weights_that_are_kept_in_bfloat16_are_silent(tmp_path: Path) -> None:
    assert named(train(tmp_path / "run", "nothing", torch.bfloat16)) == []


def test_autocast_around_the_whole_loop_is_named(tmp_path: Path) -> None:
    diagnosis = train(tmp_path / "run", "loop")
    assert named(diagnosis) == ["0", "4"]
    assert "precision.stale_copy" in [cause.id for cause in diagnosis.causes]


@pytest.mark.parametrize(
    ("same", "moved", "found"),
    [
        ([1, 1, 1], [0.01, 0.02, 0.03], [1]),
        ([0, 1, 1], [0.02, 0.02, 0.03], []),
        ([1, 1], [0.0, 0.0], []),
        ([1, 1, 1], [float("nan")] * 3, []),
    ],
)
def test_the_rule(catalogue: Any, same: list[float], moved: list[float], found: list[int]) -> None:
    history = lab.History()
    for step, values in enumerate(zip(same, moved, strict=True)):
        history.add(step, Row((("stale.same", "a"), ("stale.moved", "a")), np.array(values, dtype=float)))
    try:
        assert [s.since for s in catalogue.rules["stale.same"].judge(history)] == found
    except lab.NotChecked:
        assert found == []
