"""Convolutions: silent where they are causal or need not be, and named where they stand in the wrong place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.attach.watch import watch

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun
    from torch import Tensor

CONV: dict[str, object] = {"layers": 2, "width": 32, "heads": 2, "context": 24, "mixer": "convolution"}
faults = importlib.import_module("lab.faults.convolution")


@pytest.mark.parametrize(
    "model", [{}, {"context": 5, "layers": 6, "norm": "rms"}, {"norm_at": "post", "positions": "none", "tied": True}]
)
def test_causal_convolutions_are_silent(small_run: SmallRun, model: dict[str, object]) -> None:
    diagnosis, history = small_run(model=CONV | model, train={"lr": 0.03, "warmup": 0})
    assert diagnosis.symptoms == ()
    assert {"convolution.later", "convolution.own"} <= set(diagnosis.checked)
    assert max(series.values.max() for _, series in history.each("convolution.later")) == 0


def test_without_a_convolution_it_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(steps=2)
    assert diagnosis.verdict == "healthy"
    assert "no convolution" in diagnosis.not_checked["convolution.own"]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fault", ["convolution.not_causal", "convolution.shifted"])
def test_each_fault_is_named_in_its_layer(small_run: SmallRun, fault: str, layer: int) -> None:
    at = f"blocks.{layer}.attn.conv"
    diagnosis, _ = small_run(model=CONV, faults=[{"id": fault, "at": at}])
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault, at)]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("places", [-1, 0, 1, 2, 5])
def test_a_window_ends_so_many_places_later(places: int) -> None:
    windows = torch.stack([F.pad(torch.arange(1.0, 10.0), (2, 0)).unfold(0, 3, 1)])  # [1 9 3]
    last = faults.moved(windows, 3, places)[0, :, -1]
    assert [int(x) for x in last] == [t + places if 1 <= t + places <= 9 else 0 for t in range(1, 10)]


class Chomped(nn.Module):
    """As Bai et al., 2018, in channels first; `pad` zeros before the beginning."""

    def __init__(self, pad: int, *, both: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding="same" if both else 0)
        self.head = nn.Linear(16, 8)
        self.pad = pad

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = self.conv(F.pad(x.transpose(1, 2), (self.pad, 0))).transpose(1, 2)
        out: Tensor = self.head(x + y[:, : tokens.shape[1]])
        return out


@pytest.mark.parametrize(("model", "found"), [(Chomped(2), False), (Chomped(0, both=True), True)])
def test_convolutions_of_others(tmp_path: Path, model: nn.Module, found: bool) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            rows = torch.randint(8, (5, 13))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    diagnosis = watching.diagnosis
    assert [s.at for s in diagnosis.symptoms if s.id.startswith("convolution")] == (["conv"] if found else [])
    assert [cause.id for cause in diagnosis.causes] == (["convolution.not_causal"] if found else [])


class Padded(nn.Module):
    """A convolution whose padding stands beside it."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__()
        self.conv, self.ends = nn.Conv1d(16, 16, 3), (before, behind)

    def forward(self, x: Tensor) -> Tensor:  # [B C T]
        y: Tensor = self.conv(F.pad(x, self.ends))
        return y


class ClassesSecond(nn.Module):
    """Convolutions from tokens to logits [B V T]."""

    def __init__(self, classes: int, before: int, behind: int) -> None:
        super().__init__()
        self.tokens, self.padded = nn.Embedding(classes, 16), Padded(before, behind)
        self.head = nn.Conv1d(16, classes, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.padded(self.tokens(tokens).transpose(1, 2))))
        return out


@pytest.mark.parametrize("classes", [7, 12, 30])  # fewer than positions, as many, and more
@pytest.mark.parametrize("ends", [(2, 0), (1, 1)])
def test_a_model_that_answers_with_classes_second(tmp_path: Path, classes: int, ends: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = ClassesSecond(classes, *ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            rows = torch.randint(classes, (5, 13))
            optimizer.zero_grad()
            F.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    diagnosis = watching.diagnosis
    assert watching.run.classes_second
    assert {"causality.future", "convolution.later"} <= set(diagnosis.checked)
    named = [] if ends == (2, 0) else [("convolution.not_causal", "padded")]
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == named
    assert diagnosis.unexplained == ()


def test_an_answer_that_the_loop_turns_is_taken_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chomped(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for length in (8, 12):  # as many positions as classes, and others
            rows = torch.randint(8, (5, length + 1))
            optimizer.zero_grad()
            F.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            assert not watching.run.classes_second
    assert watching.diagnosis.causes == ()
