"""Norms: silent on every kind that normalises, and right about those that do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from lab.context import Step
from lab.diagnosis.diagnose import judge
from lab.manager import discover
from lab.projects.normalisation.component import LayerNorm, RMSNorm
from lab.store import History

if TYPE_CHECKING:
    from conftest import SmallRun

RULES = {"norm.identity", "norm.eps", "norm.other_tokens", "norm.offset", "norm.sum"}


def seen(norm: nn.Module, x: torch.Tensor) -> set[str]:
    """What the rules say of one norm that is given `x`."""
    catalogue = discover()
    model = nn.Sequential(norm)
    run: Any = SimpleNamespace(model=model, call=lambda batch: model(x))
    step = Step(0)
    step.batch = SimpleNamespace(inputs=x, rows=lambda count: step.batch)  # type: ignore[assignment]
    catalogue.probes["normalisation"]().lab_examine(run, step)  # type: ignore[attr-defined]
    history = History()
    history.add(0, step.flush()[0])
    return {symptom.id for symptom in judge(history, catalogue)[0]}


def plain(shape: tuple[int, ...] = (2, 9, 32), scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape) * scale + shift


class MeanLayerNorm(nn.Module):
    """Written by hand, over a dimension that one may choose."""

    def __init__(self, width: int, dim: int = -1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.dim, self.eps = nn.Parameter(torch.ones(width)), dim, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(self.dim, keepdim=True)) / (x.std(self.dim, keepdim=True) + self.eps) * self.weight


class ScaledRMSNorm(RMSNorm):
    """What passes its input on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class FormRMSNorm(nn.Module):
    """In one of the ways in which libraries write it."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.form, self.width = form, width
        start = {"zero-centred": 0.0, "long": width**0.5}.get(form, 1.0)
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        unit: torch.Tensor = nn.functional.normalize(x, dim=-1)
        plain: torch.Tensor = unit * self.width**0.5
        if self.form == "zero-centred":
            return plain * (1 + weight)
        if self.form == "wrongly centred":
            return plain * weight + 1
        if self.form == "by depth":
            return plain * weight * 0.158
        return (plain if self.form == "right" else unit) * weight


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("right", set()),
        ("zero-centred", set()),
        ("long", set()),  # of length 1, and a gain that starts at sqrt(C)
        ("by depth", set()),  # the LayerNorm Scaling of the fortieth layer
        ("wrongly centred", {"norm.offset"}),
        ("unit", {"norm.sum"}),
    ],
)
def test_forms_of_a_norm(form: str, expected: set[str], trained: bool) -> None:
    norm = FormRMSNorm(32, form)
    if trained:
        with torch.no_grad():
            norm.weight.add_(0.2 * torch.randn(32))
    assert seen(norm, plain(scale=3.0)) == expected
    assert seen(norm.bfloat16(), plain().bfloat16()) == expected


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm, nn.LayerNorm, nn.RMSNorm, MeanLayerNorm])
@pytest.mark.parametrize("width", [4, 32, 513])
@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (1e-4, 0.0), (0.0, 0.0), (1e3, 0.0), (0.02, 5.0), (1e-9, 0.0)]
)
def test_what_normalises_is_healthy(norm: type[nn.Module], width: int, scale: float, shift: float) -> None:
    assert seen(norm(width), plain((2, 9, width), scale, shift)) == set()


def test_gains_shifts_and_massive_tokens_are_healthy() -> None:
    norm = LayerNorm(32)
    with torch.no_grad():
        norm.weight.normal_(std=5)
        norm.bias.normal_(std=5)
    x = plain(scale=1e-3)
    x[:, 0] *= 1e6
    assert seen(norm, x) == set()
    assert seen(norm, plain((2, 32, 32))) == set()
    assert seen(nn.LayerNorm(32, elementwise_affine=False), plain()) == set()
    assert seen(nn.LayerNorm(32).bfloat16(), plain().bfloat16()) == set()


def test_a_norm_over_more_than_the_width_is_not_judged() -> None:
    assert seen(nn.LayerNorm((9, 32)), plain()) == set()


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
def test_a_default_eps_is_healthy_however_small_the_input(eps: float) -> None:
    assert seen(LayerNorm(32, eps=eps), plain(scale=1e-3)) == set()


def test_what_does_not_normalise_is_found() -> None:
    assert seen(ScaledRMSNorm(32), plain(scale=0.1)) == {"norm.identity"}
    assert seen(MeanLayerNorm(32, dim=1), plain()) == {"norm.other_tokens"}
    assert seen(MeanLayerNorm(32, dim=0), plain()) == {"norm.other_tokens"}
    assert seen(MeanLayerNorm(32, dim=1), plain((2, 32, 32))) == {"norm.other_tokens"}
    assert seen(LayerNorm(32, eps=10.0), plain()) == {"norm.eps"}


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 1, "width": 32, "heads": 2, "context": 32},
        {"layers": 6, "width": 64, "heads": 4, "context": 8, "norm": "rms", "tied": True},
        {"layers": 2, "width": 32, "heads": 2, "context": 24, "norm_at": "post"},
        {"layers": 2, "width": 32, "heads": 2, "context": 24, "mixer": "gru"},
    ],
)
def test_healthy_runs_are_silent(small_run: SmallRun, model: dict[str, object]) -> None:
    diagnosis, history = small_run(model=model, train={"lr": 0.03, "warmup": 0})
    assert diagnosis.verdict == "healthy"
    assert diagnosis.checked.keys() >= RULES
    assert len(history.sites("norm.eps")) > 1


def test_a_model_without_norms_is_not_checked() -> None:
    catalogue = discover()
    run: Any = SimpleNamespace(model=nn.Linear(4, 4))
    step = Step(0)
    step.batch = SimpleNamespace(inputs=torch.ones(1))  # type: ignore[assignment]
    with pytest.raises(Exception, match="no layer norm and no RMS norm in this model"):
        catalogue.probes["normalisation"]().lab_examine(run, step)  # type: ignore[attr-defined]


class LayerNormalization(nn.Module):
    """By hand, with names and an eps of its own, and statistics over this axis."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.a_2, self.b_2, self.axis = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), axis

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        mean, deviation = z.mean(self.axis, keepdim=True), z.std(self.axis, keepdim=True)
        return (z - mean) / (deviation + 1e-3) * self.a_2 + self.b_2


class GlobalLayerNorm(LayerNormalization):
    """Over all tokens, as in the separation of sources."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean((1, 2), keepdim=True)) / (z.std((1, 2), keepdim=True) + 1e-8) * self.a_2 + self.b_2


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # beside the deviation, its eps counts for more than in the root
def test_a_norm_by_hand(scale: float) -> None:
    assert seen(LayerNormalization(32, -1), plain(scale=scale, shift=1.0)) == set()
    assert seen(LayerNormalization(32, 1), plain(scale=scale)) == {"norm.other_tokens"}
    assert seen(LayerNormalization(32, 0), plain(scale=scale)) == {"norm.other_tokens"}
    assert seen(GlobalLayerNorm(32, -1), plain(scale=scale)) == set()
