"""Layers in a Python list: told where nobody trains them, silent where somebody does or they are hidden on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh())


class Net(nn.Module):
    """Two layers in a container of this kind, and two copies of them, of which `teachers` makes targets."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.head, self.kind = nn.Linear(6, 16), nn.Linear(16, 5), kind
        layers = [layer(), layer()]
        if kind == "module list":
            self.layers: object = nn.ModuleList(layers)
        elif kind == "dict":
            self.layers = {str(i): each for i, each in enumerate(layers)}
        elif kind == "tuple":
            self.layers = tuple(layers)
        else:
            self._layers = layers
        if kind == "added":
            for i, each in enumerate(layers):
                self.add_module(f"layer{i}", each)
        self.plain = layers
        self.teachers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        self.teacher = [nn.Linear(16, 16)]
        if kind == "module list":
            self.plain = list(self.layers)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for each in self.plain:
            x = each(x)
        with torch.no_grad():
            y = sum(teacher(x) for teacher in self.teachers)
        (teacher,) = self.teacher
        out: Tensor = self.head(x + 0.1 * y + 0.1 * teacher(x))
        return out


def watched(folder: Path, kind: str) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = Net(kind)
    plain = [p for each in model.plain for p in each.parameters()] if kind in ("held", "two") else []
    first = [*model.parameters(), *(plain if kind == "held" else ())]
    optimizer = torch.optim.AdamW(first, lr=3e-3)
    second = torch.optim.SGD(plain, lr=1e-3) if kind == "two" else None
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(24):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            if second is not None:
                second.zero_grad()
            F.cross_entropy(model(x), x[:, :5].argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if second is not None:
                second.step()
    return watching.diagnosis


@pytest.mark.parametrize(("kind", "at"), [("list", "_layers"), ("dict", "layers"), ("tuple", "layers")])
def test_layers_that_nobody_trains_are_told(tmp_path: Path, kind: str, at: str) -> None:
    diagnosis = watched(tmp_path / "run", kind)
    assert {cause.id for cause in diagnosis.causes} == {"model.unregistered"}
    assert {s.at for s in diagnosis.symptoms} == {at, "plain"}
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("kind", ["module list", "added", "held", "two"])
def test_layers_that_somebody_trains_are_silent(tmp_path: Path, kind: str) -> None:
    diagnosis = watched(tmp_path / "run", kind)
    assert diagnosis.symptoms == ()
    assert "registered.hidden" in diagnosis.checked
