"""Losses of distances: silent where each prediction meets its own target, or all on purpose; right about the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Loss = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def watched(folder: Path, loss_of: Loss, rows: int = 16, out: int = 1) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, out))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(14):
            x = torch.randn(rows, 6)
            optimizer.zero_grad()
            loss_of(model(x), x[:, :out].sin()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


def l1_of_the_target_first(prediction: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(target.squeeze(-1), prediction)


def summed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(prediction.squeeze(-1), target, reduction="sum") / len(target)


def beside_another(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target) + 0.5 * F.smooth_l1_loss(prediction, target[:, 0])


@pytest.mark.parametrize(
    "loss",
    [lambda p, t: nn.MSELoss()(p, t.squeeze(1)), l1_of_the_target_first, summed, beside_another],
)
def test_a_lost_axis_is_told(tmp_path: Path, loss: Loss) -> None:
    diagnosis = watched(tmp_path / "run", loss)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [("loss.broadcast", "loss", 0)]
    assert diagnosis.unexplained == ()
    assert "with 16 targets" in diagnosis.symptoms[0].text


def quantiles(prediction: Tensor, target: Tensor) -> Tensor:
    """Dabney et al., 2018: each quantile is compared with each of the target."""
    levels = torch.linspace(0.1, 0.9, prediction.shape[1])
    each = F.smooth_l1_loss(prediction.unsqueeze(2), target.unsqueeze(1), reduction="none")  # [N Q Q]
    below = (target.unsqueeze(1) < prediction.unsqueeze(2)).float()
    return (each * (levels[:, None] - below).abs()).mean()


def all_with_all(prediction: Tensor, target: Tensor) -> Tensor:
    """The nearest of several: both are given an axis of their own."""
    far = F.mse_loss(prediction[:, None], target[None, :], reduction="none").mean(-1)
    return far.diagonal().mean() + 0.1 * F.mse_loss(prediction[:, None], prediction.detach()[None, :])


def to_zero(prediction: Tensor, target: Tensor) -> Tensor:
    """A least-squares adversary: all are compared with one number."""
    return F.mse_loss(prediction, torch.zeros(())) + F.mse_loss(prediction, target) + F.l1_loss(target, torch.ones(1))


def one_for_each_row(prediction: Tensor, target: Tensor) -> Tensor:
    """Every output of a row has the row's one target."""
    return F.mse_loss(prediction, target[:, :1].expand_as(prediction)) + F.mse_loss(prediction, target[:1])


@pytest.mark.filterwarnings("error::UserWarning:lab")
@pytest.mark.parametrize(
    ("loss", "out"),
    [
        (F.mse_loss, 1),
        (lambda p, t: F.huber_loss(p.squeeze(-1), t.squeeze(-1)), 1),
        (lambda p, t: F.l1_loss(p, t[None]), 3),  # one more axis, and as many entries
        (quantiles, 5),
        (all_with_all, 3),
        (to_zero, 1),
        (one_for_each_row, 4),
    ],
)
def test_what_is_meant_is_silent(tmp_path: Path, loss: Loss, out: int) -> None:
    diagnosis = watched(tmp_path / "run", loss, out=out)
    assert diagnosis.symptoms == ()
    assert diagnosis.verdict == "healthy"
    # Without a reduction nobody knows what is added up.
    assert ("comparison.broadcast" in diagnosis.checked) == (loss is not quantiles)


def test_what_is_compared_without_a_gradient_is_not_asked(tmp_path: Path) -> None:
    def logged(prediction: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            F.mse_loss(prediction, target.squeeze(-1))
        return (prediction - target).square().mean()

    assert "no such loss" in watched(tmp_path / "run", logged).not_checked["comparison.broadcast"]


def test_a_batch_of_one_row_is_the_same_either_way(tmp_path: Path) -> None:
    loss: Loss = lambda p, t: F.mse_loss(p, t.squeeze(-1))  # noqa: E731
    assert watched(tmp_path / "run", loss, rows=1).symptoms == ()


# ---------------------------------------------------------------- probabilities in place of logits or of logarithms


def binary(made: Callable[[Tensor], Tensor]) -> Loss:
    return lambda p, t: nn.BCEWithLogitsLoss()(made(p), (t > 0).float().reshape(made(p).shape))


def divergence(made: Callable[[Tensor], Tensor]) -> Loss:
    return lambda p, t: F.kl_div(made(p), (9 * t).softmax(-1), reduction="batchmean")


def pair(p: Tensor) -> Tensor:
    return p.sigmoid()[:, :].double().float()


@pytest.mark.parametrize(
    ("loss", "id"),
    [
        (binary(torch.sigmoid), "loss.sigmoid_twice"),
        (binary(pair), "loss.sigmoid_twice"),  # a view of it, in another type and back
        (binary(lambda p: p.softmax(-1)), "loss.sigmoid_twice"),
        (divergence(lambda p: p.softmax(-1)), "loss.kl_of_probabilities"),
        (divergence(lambda p: F.softmax(p.float(), dim=-1).unsqueeze(0)[0]), "loss.kl_of_probabilities"),
    ],
)
def test_probabilities_are_told(tmp_path: Path, loss: Loss, id: str) -> None:
    diagnosis = watched(tmp_path / "run", loss, out=4)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [(id, "loss", 0)]
    assert diagnosis.unexplained == ()


def unlike(p: Tensor, t: Tensor) -> Tensor:
    """Both take part, each where it belongs: a weight by the probability, as in focal losses, and a gate."""
    weight = (1 - p.detach().sigmoid()).square()
    gated = p * p.sigmoid()
    return F.binary_cross_entropy_with_logits(gated, (t > 0).float(), weight=weight)


def a_logarithm(p: Tensor, t: Tensor) -> Tensor:
    """Smoothed, so that the logarithm is taken by hand; the teacher's side needs none."""
    smooth = 0.9 * p.softmax(-1) + 0.1 / p.shape[-1]
    return F.kl_div(smooth.log(), t.softmax(-1), reduction="batchmean") + F.binary_cross_entropy(
        p.sigmoid(), (t > 0).float()
    )


def from_the_teacher(p: Tensor, t: Tensor) -> Tensor:
    """The other way round: what is learned is the target."""
    return F.kl_div((9 * t).log_softmax(-1), p.softmax(-1), reduction="batchmean")


@pytest.mark.parametrize(
    "loss", [binary(lambda p: p), divergence(lambda p: p.log_softmax(-1)), unlike, a_logarithm, from_the_teacher]
)
def test_logits_and_logarithms_are_silent(tmp_path: Path, loss: Loss) -> None:
    diagnosis = watched(tmp_path / "run", loss, out=4)
    assert diagnosis.symptoms == ()
    assert {"comparison.sigmoid", "comparison.kl"} & set(diagnosis.checked) or loss is from_the_teacher
