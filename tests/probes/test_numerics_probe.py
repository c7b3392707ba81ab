"""A loss that is not finite where its logits are is named by its kind; where they are not either, it is not."""

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
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

RULES = ("loss.infinite", "loss.undefined")
NAN, INF = float("nan"), float("inf")


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"lr": 1.0, "warmup": 0}},
        {"train": {"objective": "masked", "accumulate": 4}},
        {"faults": [{"id": "numerics.nonfinite", "at": "blocks.1.mlp.out", "from_step": 5}]},
        {"faults": [{"id": "numerics.nonfinite", "at": "head.out", "value": "inf", "from_step": 5}]},
        {"faults": [{"id": "targets.all_ignored", "from_step": 5}]},
    ],
)
def test_what_is_not_the_fault_of_the_loss_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(**changes)
    assert set(RULES) <= set(diagnosis.checked)
    assert named(diagnosis) == []


@pytest.mark.parametrize(
    ("fault", "train"),
    [
        ({"id": "loss.log_of_zero", "smallest": 0.2, "from_step": 5}, {}),
        ({"id": "loss.log_of_zero", "smallest": 0.2, "from_step": 5}, {"accumulate": 2}),
        ({"id": "loss.division_by_zero", "from_step": 5}, {}),
        ({"id": "loss.division_by_zero", "from_step": 5}, {"objective": "masked", "accumulate": 2}),
    ],
)
def test_each_fault_is_named_from_its_first_step_on(small_run: SmallRun, fault: Any, train: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[fault], train=train)
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [(fault["id"], "loss", 5)]
    assert diagnosis.unexplained == ()


def test_the_logarithm_of_what_is_left_is_the_cross_entropy(small_run: SmallRun) -> None:
    _, history = small_run(faults=[{"id": "loss.log_of_zero", "smallest": 1e-12}])
    assert history.series("objective.unevenness").values.max() < 1e-6


@pytest.mark.parametrize(
    ("loss_of", "found"),
    [
        (lambda z, y: F.nll_loss((200 * z).softmax(-1).log(), y), ["loss.infinite"]),
        (lambda z, y: F.nll_loss((200 * z).log_softmax(-1), y), []),
        (lambda z, y: F.cross_entropy(z, y, reduction="none")[z.amax(-1) > 1e6].mean(), ["loss.undefined"]),
    ],
    ids=["log of softmax", "log_softmax", "mean of nothing"],
)
def test_anybodys_loss(tmp_path: Path, loss_of: Callable[..., torch.Tensor], found: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(8):
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            z, y = model(x), x[:, :5].argmax(-1)
            F.cross_entropy(z, y)  # tells the lab which are the logits
            loss_of(z, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert named(watch.diagnosis) == found


@pytest.mark.parametrize(
    ("spread", "targets", "loss", "found"),
    [
        ([4, 4, NAN], [9, 9, 9], [1, INF, NAN], "loss.infinite"),
        ([4, 4, 4], [9, 9, 9], [1, NAN, INF], "loss.undefined"),
        ([4, INF, 4], [9, 9, 9], [1, INF, INF], ""),  # the logits were first
        ([4, 4, 4], [9, 0, 9], [1, NAN, NAN], ""),  # nothing to learn from
        ([4, 4, 4], [9, 9, 9], [1, 1e30, 1], ""),
    ],
)
def test_the_rules(catalogue: Any, spread: list[float], targets: list[float], loss: list[float], found: str) -> None:
    history = lab.History()
    columns = (("logits.spread", ""), ("logits.targets", ""), ("logits.loss", ""))
    for step, values in enumerate(zip(spread, targets, loss, strict=True)):
        history.add(step, Row(columns, np.array(values, dtype=float)))
    assert [name for name in RULES if list(catalogue.rules[name].judge(history))] == ([found] if found else [])
