"""Modes: a model that is evaluated and goes on in evaluation mode is named; what is meant to sleep is not."""

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

RULES = ("mode.asleep", "mode.evaluated_awake")
DROPOUT = {"layers": 2, "width": 32, "heads": 2, "context": 24, "dropout": 0.2}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": DROPOUT},
        {"model": DROPOUT, "train": {"evaluate_every": 3, "accumulate": 2}},
        {"model": {**DROPOUT, "layers": 1, "dropout": 0.9, "norm_at": "post"}, "train": {"lr": 0.1, "warmup": 0}},
        {"model": {**DROPOUT, "mixer": "gru", "norm": "rms", "dropout": 0.01}},
    ],
)
def test_dropout_in_a_run_as_it_should_be_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert set(RULES) <= set(diagnosis.checked)
    assert diagnosis.symptoms == ()
    assert diagnosis.verdict == "healthy"
    assert history.last("mode.awake") == history.last("mode.dependent") == changes["model"]["layers"]


def test_a_model_without_such_modules_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run()
    assert all("depends on its mode" in diagnosis.not_checked[rule] for rule in RULES)


def test_training_in_evaluation_mode_is_named(small_run: SmallRun) -> None:
    fault: dict[str, object] = {"id": "loop.evaluation_mode", "from_step": 6}
    diagnosis, history = small_run(faults=[fault], model=DROPOUT)
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [("loop.evaluation_mode", "loop", 6)]
    assert diagnosis.unexplained == ()
    assert list(history.series("mode.awake").values) == [2.0] * 6 + [0.0] * 6


def test_evaluation_in_training_mode_is_named(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "loop.training_mode"}], model=DROPOUT, train={"evaluate_every": 4})
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [("loop.training_mode", "evaluation", 3)]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("id", ["loop.evaluation_mode", "loop.training_mode"])
def test_without_dropout_the_faults_mean_nothing(small_run: SmallRun, id: str) -> None:
    with pytest.raises(lab.BadInput, match="dropout"):
        small_run(faults=[{"id": id, "from_step": 1}])


# ---------------------------------------------------------------- anybody's loop


class Net(nn.Module):
    """Dropout and batch norm, and a part that may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def train(folder: Path, mode: Callable[[nn.Module, int], None]) -> lab.Diagnosis:
    """Train for 24 steps; `mode` is called at the top of each, after an evaluation at step 8."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch:
        for step in range(24):
            if step == 8:
                model.eval()
                with torch.no_grad():
                    model(torch.randn(8, 6))
            mode(model, step)
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :5].argmax(-1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


def awake(model: nn.Module, _step: int) -> None:
    model.train()


def asleep(model: nn.Module, _step: int) -> None:
    model.eval()


def frozen_norm(model: nn.Module, _step: int) -> None:
    model.train()
    model.get_submodule("body.1").eval()


def frozen_body(model: nn.Module, step: int) -> None:
    model.train()
    if step >= 12:  # as in fine-tuning in two parts
        model.get_submodule("body").eval().requires_grad_(requires_grad=False)


def now_and_then(model: nn.Module, step: int) -> None:
    model.train(step % 3 > 0)


@pytest.mark.parametrize("mode", [awake, asleep, frozen_norm, frozen_body, now_and_then])
def test_what_is_meant_to_sleep_is_silent(tmp_path: Path, mode: Callable[[nn.Module, int], None]) -> None:
    assert named(train(tmp_path / "run", mode)) == []


def test_a_loop_that_forgets_train_is_named(tmp_path: Path) -> None:
    diagnosis = train(tmp_path / "run", lambda _model, _step: None)
    assert [(c.id, c.since_step) for c in diagnosis.causes] == [("loop.evaluation_mode", 8)]


@pytest.mark.parametrize(
    ("awake", "model", "found"),
    [
        ([2, 2, 0, 0, 0], [1, 1, 0, 0, 0], [2]),
        ([2, 2, 0, 0], [1, 1, 0, 0], []),  # two updates may be a lesson of another kind
        ([2, 2, 0, 0, 0, 2], [1, 1, 0, 0, 0, 1], []),
        ([2, 2, 0, 0, 0], [1, 1, 1, 1, 1], []),  # parts that are frozen
        ([2, 2, 1, 1, 1], [1, 1, 0, 0, 0], []),
    ],
)
def test_the_rule(catalogue: Any, awake: list[int], model: list[int], found: list[int]) -> None:
    history = lab.History()
    columns = (("mode.dependent", ""), ("mode.awake", ""), ("mode.model", ""))
    for step, values in enumerate(zip(awake, model, strict=True)):
        history.add(step, Row(columns, np.array([2.0, *values])))
    assert [s.since for s in catalogue.rules["mode.asleep"].judge(history)] == found
