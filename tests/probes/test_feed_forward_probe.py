"""Feed-forward layers: silent on every activation and on matrices without one that are meant; right about the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lab
from lab.diagnosis.diagnose import judge
from lab.manager import discover
from lab.store import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

SIZE: dict[str, object] = {"layers": 2, "width": 32, "heads": 2, "context": 16}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("ffn.")]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**SIZE, "activation": "relu"}, "train": {"lr": 0.1, "warmup": 0}},
        {"model": {**SIZE, "activation": "sigmoid", "norm_at": "post"}},
        {"model": {**SIZE, "activation": "swiglu", "norm": "rms", "mixer": "gru"}},
        {"model": {**SIZE, "layers": 8, "activation": "silu"}},
        {"train": {"objective": "seq2seq"}},
    ],
)
def test_healthy_layers_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=21, **changes)
    assert named(diagnosis) == []
    assert {"ffn.linear", "ffn.flat", "ffn.silent", "ffn.cut"} <= set(diagnosis.checked)
    assert history.sites("ffn.bend")


class Stream(nn.Module):
    """Adapters on a stream without norms, whose way up is followed by another one's way down."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.inward, self.head = nn.Linear(6, 64), nn.Linear(64, 6)
        self.down, self.up = (nn.ModuleList(nn.Linear(*s) for _ in range(3)) for s in ((64, 8), (8, 64)))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(self.activation(down(x)))
        out: torch.Tensor = self.head(x)
        return out


def sequential(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 64), activation, nn.Linear(64, 6))


def encoder(_: nn.Module) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def watched(folder: Path, model: nn.Module) -> lab.Diagnosis:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(22):
            x = torch.randn(8, 5, 6)
            optimizer.zero_grad()
            (model(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
    return watching.diagnosis


@pytest.mark.parametrize(
    ("make", "activation", "expected"),
    [
        (Stream, nn.ReLU(inplace=True), []),
        (Stream, nn.Identity(), []),
        (encoder, nn.Identity(), []),
        (sequential, nn.Sequential(nn.GELU(), nn.Dropout(0.5)), []),
        (sequential, nn.Sequential(nn.ReLU(inplace=True), nn.LayerNorm(64)), []),
        (sequential, nn.Identity(), ["ffn.linear"]),
        (sequential, nn.Dropout(0.5), ["ffn.linear"]),
        (sequential, nn.Hardtanh(-1e-3, 1e-3), ["ffn.flat"]),
    ],
)
def test_foreign_layers(
    tmp_path: Path, make: Callable[[nn.Module], nn.Module], activation: nn.Module, expected: list[str]
) -> None:
    torch.manual_seed(0)
    assert named(watched(tmp_path / "run", make(activation))) == expected


def history_of(**metrics: list[float]) -> lab.History:
    history = lab.History()
    for i, values in enumerate(zip(*metrics.values(), strict=True)):
        history.add(i * 10, Row(tuple((f"ffn.{name}", "b") for name in metrics), np.array(values)))
    return history


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"bend": [0.0] * 3}, {"ffn.linear": 0}),
        ({"bend": [1.0, 0.0, 0.0, 0.0]}, {"ffn.linear": 10}),
        ({"bend": [0.0] * 2}, {}),
        ({"bend": [0.0, 1e-3, 0.1]}, {}),  # learned, from the identity
        ({"silent": [1.0] * 3}, {"ffn.silent": 0}),
        ({"silent": [0.97] * 5}, {}),  # sparse, as trained ReLU networks are
        ({"flat": [0.5] * 5}, {}),  # a hardtanh of inputs of variance 2
        ({"flat": [0.95, 0.5, 0.95]}, {}),
        ({"flat": [0.95] * 3}, {"ffn.flat": 0}),
        ({"cut": [0.1] * 4, "cut_always": [0.0] * 4}, {}),  # others each time
        ({"cut": [0.0, 0.1, 0.1, 0.1], "cut_always": [0.0, 0.0, 0.0, 0.1]}, {"ffn.cut": 10}),
        ({"bend": [float("nan")] * 4}, {}),
    ],
)
def test_what_is_wrong(metrics: dict[str, list[float]], expected: dict[str, int]) -> None:
    assert {s.id: s.since for s in judge(history_of(**metrics), discover())[0]} == expected
