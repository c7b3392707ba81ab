"""Rows of a batch that are told by their place: named where positions run along the batch, and nowhere else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab
from lab.files import METRICS
from lab.store import Row, read_history

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.places")

B, T, C, V = 7, 9, 16, 20


class Table(nn.Module):
    """Positions, by the axis that a size is taken of."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.table = nn.Buffer(torch.randn(40, C))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[: x.shape[self.axis]]
        return x + (rows[:, None] if self.axis == 0 else rows)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.into = nn.Embedding(V, C), nn.Linear(3, C)
        self.places = Table(0 if kind in ("wrong", "time first") else 1)
        layer = nn.TransformerEncoderLayer(C, 2, C, dropout=0.1, batch_first=kind != "time first")
        self.body = nn.TransformerEncoder(layer, 1)
        self.rnn, self.norm = nn.GRU(C, C, batch_first=True), nn.BatchNorm1d(C)
        self.head, self.other = nn.Linear(C, V), nn.Linear(C, V)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x) if x.is_floating_point() else self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0 if self.kind == "time first" else 1])
        if self.kind == "recurrent":
            x = self.rnn(x)[0]
        elif self.kind == "batch norm":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "attends along the batch":
            x = self.body(self.places(x).transpose(0, 1)).transpose(0, 1)
        else:
            x = self.body(self.places(x), mask=mask)
        if self.kind == "halves":  # one head for the first half, as where two sources stand in a batch
            half = len(x) // 2
            return torch.cat([self.head(x[:half]), self.other(x[half:])])
        out: Tensor = self.head(x)
        return out


def diagnosed(kind: str, data: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = Model(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    chosen = ["places", "determinism"]
    with lab.watch(model, optimizer, out=folder, probes=chosen) as watching:
        for _ in range(4):
            tokens = (torch.randint(V, (B, 1)) + torch.arange(T + 1)) % V
            if data == "tokens":
                loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            elif data == "time first":
                loss = F.cross_entropy(model(tokens[:, :-1].T).flatten(0, 1), tokens[:, 1:].T.flatten())
            else:
                loss = F.cross_entropy(model(torch.randn(B, T, 3)).mean(1), tokens[:, 0])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


@pytest.mark.parametrize("data", ["tokens", "series"])
def test_positions_along_the_batch_are_named_where_they_are(tmp_path: Path, data: str) -> None:
    diagnosis = diagnosed("wrong", data, tmp_path / "run")
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("positions.along_batch", "places")]
    assert diagnosis.unexplained == ()


def test_modules_are_asked_only_where_two_equal_rows_differ(tmp_path: Path) -> None:
    for kind, asked in (("right", False), ("wrong", True)):
        diagnosed(kind, "tokens", tmp_path / kind)
        history = read_history(tmp_path / kind / METRICS)
        assert bool(history.sites("places.others")) is asked
        assert bool(history.sites("places.module_apart")) is asked


@pytest.mark.parametrize("data", ["tokens", "series"])
@pytest.mark.parametrize("kind", ["right", "recurrent", "batch norm", "halves", "attends along the batch"])
def test_who_does_not_count_along_the_batch_is_silent(tmp_path: Path, kind: str, data: str) -> None:
    """Nor where rows reach each other: that is another mistake, and may be none."""
    diagnosis = diagnosed(kind, data, tmp_path / "run")
    assert "places.row" in diagnosis.checked
    assert diagnosis.symptoms == ()


def test_where_time_comes_first_it_is_not_asked(tmp_path: Path) -> None:
    diagnosis = diagnosed("time first", "time first", tmp_path / "run")
    assert "which axis is the batch" in diagnosis.not_checked["places.row"]
    assert diagnosis.symptoms == ()


@pytest.mark.parametrize("objective", ["next", "masked", "seq2seq"])
def test_the_lab_s_own_models_are_checked(small_run: SmallRun, objective: str) -> None:
    train = {} if objective == "next" else {"objective": objective}
    diagnosis, _ = small_run(train=train, data={"source": "markov", "batch": 6}, steps=4)
    assert "places.row" in diagnosis.checked, diagnosis.not_checked
    assert not [s for s in diagnosis.symptoms if s.id.startswith(("places.", "attending.", "attention."))]


def test_what_is_not_finite_when_it_is_tried_again_is_not_called_right() -> None:
    names = [("places.batch_first", ""), ("places.rounding", ""), ("places.twice", "")]
    history = lab.History()
    history.add(0, Row(tuple(names), np.array([1.0, 1e-4, 0.5])))
    with pytest.raises(lab.LookAgain):
        [*probes.places_row.judge(history)]
    history.add(1, Row((*names[:2], ("places.apart", ""), ("places.others", "")), np.array([1.0, 1e-4, *[np.nan] * 2])))
    with pytest.raises(lab.NotChecked, match="not finite"):
        [*probes.places_row.judge(history)]
