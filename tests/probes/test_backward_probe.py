"""Cuts in the graph, and gradients rounded to nothing, are named; what gets no gradient on purpose is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from judging import told
from torch import nn
from torch.nn import functional as F

import lab
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

RULES = ("backward.cut", "backward.lost")


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 2, "width": 32, "heads": 2, "context": 24, "dropout": 0.3}},
        {"train": {"objective": "seq2seq", "accumulate": 2}},
        {"model": {"layers": 6, "width": 16, "heads": 1, "context": 12, "norm_at": "post", "tied": True}},
        {"model": {"layers": 1, "width": 32, "heads": 2, "context": 16, "activation": "relu"}, "train": {"lr": 0.3}},
    ],
)
def test_a_run_as_it_should_be_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert set(RULES) <= set(diagnosis.checked)
    assert named(diagnosis) == []
    assert history.sites("backward.cut") == []
    assert all(series.values.max() == 0 for _, series in history.each("backward.lost"))


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ({"id": "loop.detached", "at": "blocks.0"}, "blocks.0"),
        ({"id": "loop.detached", "at": "blocks.1.mlp"}, "blocks.1.mlp"),
        ({"id": "precision.gradient_underflow", "at": "blocks.0"}, "blocks.0.mlp.down"),
    ],
)
def test_each_fault_is_named_where_it_is(small_run: SmallRun, fault: dict[str, object], at: str) -> None:
    diagnosis, _ = small_run(faults=[fault], steps=24)
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [(fault["id"], at, 0)]
    assert diagnosis.unexplained == ()


def test_the_last_layer_cannot_be_cut_off(small_run: SmallRun) -> None:
    with pytest.raises(lab.BadInput, match="before its last layer"):
        small_run(faults=[{"id": "loop.detached", "at": "head"}])


# ---------------------------------------------------------------- anybody's model


class Net(nn.Module):
    """Three layers; `how` says what becomes of the gradient between them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.shift = nn.Parameter(torch.randn(16))
        self.unused = nn.Linear(16, 3)  # as the pooler of an encoder that is given another head
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.first(x).relu()
        else:
            h = self.first(x).relu()
        if self.how == "detached":
            h = h.detach()
        if self.how != "layer drop" or not self.training or self.calls % 4 == 0:
            h = h + self.second(h).relu()
        if self.how == "stopped beside":
            h = h + self.first(x).detach()
        if self.how in ("data", "moved"):
            h = h + self.shift.data
        if self.how == "moved":
            self.shift.data.mul_(0.9)  # somebody keeps an average in it, or another such state
        out: torch.Tensor = self.head(h)
        return out


def train(folder: Path, how: str, scale: float = 1.0, kind: torch.dtype = torch.float32) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = Net(how).to(kind)
    if how == "frozen":
        model.first.requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(34):
            x = torch.randn(32, 6, dtype=kind)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), x[:, :5].argmax(-1)) * scale).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize("how", ["plain", "frozen", "no_grad", "layer drop", "stopped beside", "moved"])
def test_what_gets_no_gradient_on_purpose_is_silent(tmp_path: Path, how: str) -> None:
    diagnosis = train(tmp_path / "run", how)
    assert set(RULES) <= set(diagnosis.checked)
    assert named(diagnosis) == []


def test_a_cut_in_anybodys_model_is_named(tmp_path: Path) -> None:
    diagnosis = train(tmp_path / "run", "detached")
    assert [(c.id, c.at) for c in diagnosis.causes] == [("loop.detached", "first")]


def test_a_parameter_that_left_the_graph_is_named(tmp_path: Path) -> None:
    diagnosis = train(tmp_path / "run", "data")
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [("loop.detached", "shift", 0)]


def test_a_cut_in_a_model_that_answers_with_its_loss(tmp_path: Path) -> None:
    class Loss(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.net = Net(how)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.net(x), x[:, :5].argmax(-1))

    torch.manual_seed(0)
    for how, at in (("plain", []), ("detached", ["net.first"])):
        model = Loss(how)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with lab.watch(model, optimizer, out=tmp_path / how) as watch:
            for _ in range(34):
                optimizer.zero_grad()
                model(torch.randn(32, 6)).backward()
                optimizer.step()
        assert [c.at for c in watch.diagnosis.causes if c.id == "loop.detached"] == at


@pytest.mark.parametrize(
    ("kind", "scale", "found"),
    [
        (torch.float16, 1e-5, True),  # the size of gradients in a large model
        (torch.float16, 1.0, False),
        (torch.bfloat16, 1e-5, False),
        (torch.float32, 1e-20, False),
    ],
)
def test_float16_without_loss_scaling(tmp_path: Path, kind: torch.dtype, scale: float, found: bool) -> None:
    diagnosis = train(tmp_path / "run", "plain", scale, kind)
    assert ("backward.lost" in named(diagnosis)) == found
    assert ("precision.gradient_underflow" in [c.id for c in diagnosis.causes]) == found


@pytest.mark.parametrize(
    ("values", "found"),
    [([0.9, 0.9, 0.9], [0]), ([0.9, 0.1, 0.9, 0.9], []), ([0, 0.6, 0.6, 0.6], [1]), ([float("nan")] * 4, [])],
)
def test_most_is_lost_in_three_looks_up_to_now(catalogue: Any, values: list[float], found: list[int]) -> None:
    history = lab.History()
    for step, value in enumerate(values):
        history.add(step, Row((("backward.lost", "a.weight"),), np.array([value])))
    assert [s.since for s in told(catalogue.rules["backward.lost"].judge(history))] == found
