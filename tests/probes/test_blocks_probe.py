"""Blocks: silent where parts rest on purpose, right about what is left out, unheard or all alike."""

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
    from pathlib import Path

    from conftest import SmallRun

RULES = {"path.skipped", "path.ignored", "path.unheard", "stream.collapsed"}


def named(diagnosis: lab.Diagnosis) -> list[tuple[str, str]]:
    return [(s.id, s.at) for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 3, "width": 32, "heads": 2, "context": 8, "norm_at": "post", "mixer": "lstm"}},
        {"model": {"layers": 2, "width": 32, "heads": 2, "context": 8, "norm": "rms", "activation": "swiglu"}},
        {"train": {"objective": "seq2seq"}},
    ],
)
def test_healthy_runs_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(steps=21, **changes)
    assert named(diagnosis) == []
    assert set(diagnosis.checked) >= RULES


class Part(nn.Module):
    """A block of anybody's, with a norm that it may forget."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.branch, self.forgets = nn.Linear(8, 8), forgets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        out: torch.Tensor = self.after(x + self.branch(x if self.forgets else normed))
        return out


class Model(nn.Module):
    """Three blocks in a list: which are passed, and what comes of them, depends on `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(8, 8)
        self.layers = nn.ModuleList(Part(way == "forgets" and i == 1) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x
        self.aside = torch.zeros(())
        for i, layer in enumerate(self.layers):
            if (self.way == "skips" and i == 2) or (self.way == "chooses" and i != 1):
                continue
            if self.way == "drops" and self.training and torch.rand(()) < 0.5:
                continue
            if self.way == "earlier" and i == 2:
                layer(x)  # what the layer before gives is what is wanted
                continue
            x = layer(given if self.way in ("beside", "aside") else x)
            self.aside = self.aside + x.square().mean()
        out: torch.Tensor = self.head(x)
        return out[:, :1].expand_as(out) if self.way == "first" else out


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("passes", []),
        ("drops", []),  # layers at random, in training
        ("chooses", []),  # one of several
        ("first", []),  # after the blocks
        ("frozen", []),
        ("earlier", []),
        ("aside", []),  # each with a loss of its own, in training
        ("beside", [("path.ignored", "layers.0"), ("path.ignored", "layers.1")]),
        ("skips", [("path.skipped", "layers.2")]),
        ("forgets", [("path.unheard", "layers.1.norm")]),
    ],
)
def test_foreign_blocks(tmp_path: Path, way: str, expected: list[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    model = Model(way)
    if way == "frozen":
        model.layers[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lab.watch(model, optimizer, out=tmp_path / "run", examine_every=5) as watching:
        for _ in range(21):
            x = torch.randn(4, 5, 8)
            optimizer.zero_grad()
            loss = (model(x) * x).mean()
            (loss + model.aside if way == "aside" else loss).backward()
            optimizer.step()
    assert named(watching.diagnosis) == expected


@pytest.mark.parametrize(
    ("alike", "expected"),
    [
        ([0.0, 1.0, 1.0, 1.0], [10]),
        ([1.0, 1.0, 0.0, 1.0], []),
        ([1.0, 1.0], []),
        ([float("nan")] * 4, []),
    ],
)
def test_three_looks_are_needed(alike: list[float], expected: list[int]) -> None:
    for metric in ("stream.alike", "path.skipped", "path.ignored", "path.unheard"):
        history = lab.History()
        for i, value in enumerate(alike):
            history.add(i * 10, Row(((metric, "b"),), np.array([value])))
        assert [s.since for s in judge(history, discover())[0]] == expected
