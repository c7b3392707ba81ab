"""The form of the loss: the right one is silent, each wrong one is named, and what is neither is not checked."""

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

RULES = {"objective.softmax_twice", "objective.sign", "objective.mean_of_means", "objective.clamped"}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("objective.")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"lr": 0.3, "warmup": 0}},
        {"train": {"accumulate": 2}},
        {"train": {"objective": "masked", "accumulate": 4}},
        {"train": {"objective": "seq2seq"}},
        {"model": {"layers": 0, "width": 8, "heads": 1, "context": 8}, "data": {"source": "python-docs", "batch": 2}},
    ],
)
def test_the_right_loss_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert set(diagnosis.checked) >= RULES
    assert named(diagnosis) == []
    assert history.series("objective.unevenness").values.max() < 1e-6


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ({"id": "loss.softmax_twice"}, {}),
        ({"id": "loss.softmax_twice"}, {"train": {"accumulate": 2}}),
        ({"id": "loss.wrong_sign"}, {}),
        ({"id": "loss.wrong_sign", "from_step": 2}, {}),
        ({"id": "loss.clamped", "digits": 1}, {}),
        ({"id": "loss.mean_of_means"}, {"train": {"objective": "masked", "accumulate": 4}}),
    ],
)
def test_a_wrong_form_is_named(small_run: SmallRun, fault: dict[str, object], changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[fault], steps=24, **changes)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault["id"], "loss")]
    assert diagnosis.causes[0].since_step == fault.get("from_step", 0)
    assert diagnosis.unexplained == ()


def watched(folder: Path, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> lab.Diagnosis:
    """A classifier of anybody's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(24):
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            loss_of(model(x), x[:, :5].argmax(-1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y) + 0.01 * z.square().mean(),
        lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, 6.0)),
    ],
    ids=["smoothed", "sum", "penalty", "weighted"],
)
def test_another_objective_is_not_checked(tmp_path: Path, loss_of: Callable[..., torch.Tensor]) -> None:
    diagnosis = watched(tmp_path / "run", loss_of)
    assert named(diagnosis) == []
    assert all("no form of the cross-entropy" in diagnosis.not_checked[rule] for rule in RULES)


@pytest.mark.parametrize(
    "loss_of",
    [
        F.cross_entropy,
        lambda z, y: F.cross_entropy(3 * z, y),
        lambda z, y: F.cross_entropy(z.log_softmax(-1), y),
        lambda z, y: F.nll_loss(z.log_softmax(-1), y),
        lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float()),
    ],
    ids=["plain", "scaled", "log-probabilities", "nll", "squares"],
)
def test_what_others_do_rightly_is_silent(tmp_path: Path, loss_of: Callable[..., torch.Tensor]) -> None:
    assert named(watched(tmp_path / "run", loss_of)) == []


def test_probabilities_given_to_cross_entropy_are_seen(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", lambda z, y: F.cross_entropy(z.softmax(-1), y))
    assert [cause.id for cause in diagnosis.causes] == ["loss.softmax_twice"]


def test_climbing_from_what_was_learned_is_not_judged(catalogue: Any) -> None:
    history = lab.History()
    names = ("objective.loss", "objective.cross_entropy", "objective.uniform", "objective.descends", "objective.error")
    columns = (*((name, "") for name in names), ("objective.form", "softmax_twice"))
    for index, loss in enumerate((0.5, 0.7, 1.1)):
        history.add(index, Row(columns, np.array([-loss, loss, 1.6, 1.0, 0.1, 1.2])))
    with pytest.raises(lab.NotChecked, match="unlearn"):
        list(catalogue.rules["objective.sign"].judge(history))
