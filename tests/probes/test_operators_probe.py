"""Counting operators: silent on healthy models of any kind, and right about hand-made ones."""

from __future__ import annotations

import copy
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab import History, NotChecked, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun
    from torch import Tensor

dispatch = importlib.import_module("lab.probes.dispatch")
operators = importlib.import_module("lab.probes.operators")

HEALTHY: list[dict[str, Any]] = [
    {"model": {"layers": 0, "width": 32, "heads": 1, "context": 8}},
    {"model": {"layers": 6, "width": 48, "heads": 8, "kv_heads": 2, "context": 24, "positions": "rope"}},
    {"model": {"layers": 2, "width": 32, "heads": 4, "context": 40, "positions": "alibi", "activation": "swiglu"}},
    {"model": {"layers": 2, "width": 32, "heads": 4, "context": 16, "norm": "rms", "norm_at": "post", "tied": True}},
    {"model": {"layers": 2, "width": 32, "mixer": "lstm", "positions": "sinusoidal", "context": 24}},
    {"model": {"layers": 2, "width": 32, "mixer": "gru", "positions": "none", "context": 24}},
    {"model": {"layers": 2, "width": 32, "mixer": "convolution", "context": 24}},
    {"train": {"objective": "masked"}},
    {"train": {"objective": "seq2seq"}, "model": {"layers": 1, "width": 32, "heads": 4, "context": 16}},
    {"train": {"accumulate": 2}},
]


@pytest.mark.parametrize("changes", HEALTHY)
def test_it_is_silent_on_healthy_models(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=2, **changes)
    assert not [s for s in diagnosis.symptoms if s.id.startswith("operators.")]
    assert {id for id in diagnosis.checked if id.startswith("operators.")} == {
        f"operators.{name}" for name in ("promoted", "host_reads", "again", "slices", "by_position", "joined")
    }
    assert history.last("operators.slices") <= 1


class Model(nn.Module):
    """An embedding, something in the middle, and a head."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.tokens, self.middle, self.head = nn.Embedding(16, 32), middle, nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.tokens(tokens)))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """What a function makes of a vector of each position, with a linear layer."""

    def __init__(self, function: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.linear)


class Recurrent(nn.Module):
    """A cell that is called for each position; what it says is stacked, or written into a tensor made for all."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.cell, self.written = nn.GRUCell(32, 32), written

    def forward(self, x: Tensor) -> Tensor:
        state, said, room = x.new_zeros(len(x), 32), [], torch.zeros_like(x)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            room[:, t] = state
            said.append(state)
        return room if self.written else torch.stack(said, dim=1)


def heads(x: Tensor, linear: nn.Linear, count: int = 4) -> Tensor:
    """Attend in a loop, as a tutorial does it: a slice of the width for each head, scaled first."""
    q = linear(x)
    made = []
    for part in q.chunk(count, dim=-1):
        scores = (part * part.shape[-1] ** -0.5) @ part.transpose(-2, -1)
        made.append(F.softmax(scores, dim=-1) @ part)
    return torch.cat(made, dim=-1)


def in_chunks(x: Tensor, linear: nn.Linear) -> Tensor:
    """Attend for four positions at a time, to save memory."""
    q = linear(x)
    return torch.cat([F.softmax(part @ q.transpose(-2, -1), dim=-1) @ q for part in q.split(4, dim=1)], dim=1)


def densely(x: Tensor, linear: nn.Linear) -> Tensor:
    """Concatenate as a DenseNet does: each part is used before it is extended."""
    joined = x[:, :, :8]
    for i in range(1, 4):
        joined = torch.cat([joined, (joined.mean(-1, keepdim=True) + x)[:, :, 8 * i : 8 * i + 8]], dim=-1)
    return linear(joined)  # type: ignore[no-any-return]


def changed(x: Tensor) -> Tensor:
    """The product of the same memory with itself, before and after it is written to."""
    return (x @ x.mT).mean() + (x.mul_(2) @ x.mT).mean()


def appended(x: Tensor, linear: nn.Linear) -> Tensor:
    made = linear(x[:, :1])
    for t in range(1, x.shape[1]):
        made = torch.cat([made, linear(x[:, t : t + 1])], dim=1)
    return made  # type: ignore[no-any-return]


WIDE = torch.ones(32, dtype=torch.float64)
SILENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: First(nn.LSTM(32, 32, num_layers=2, batch_first=True)),
    "cell": lambda: Recurrent(written=False),
    "cell that writes": lambda: Recurrent(written=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 8, 64, batch_first=True), 2),
    "two attentions": lambda: Middle(lambda x, linear: heads(x, linear, 2)),
    "chunks": lambda: Middle(in_chunks),
    "dense": lambda: Middle(densely),
    "asked for": lambda: Middle(lambda x, linear: (linear(x).double() * WIDE).float()),
    "a number of float64": lambda: Middle(lambda x, linear: linear(x) * torch.tensor(0.5, dtype=torch.float64)),
    "a parameter is read": lambda: Middle(lambda x, linear: linear(x) * linear.weight.mean().item()),
    "counted": lambda: Middle(lambda x, linear: linear(x) / (x > 0).sum().item()),
    "of another input": lambda: Middle(lambda x, linear: linear(linear(x))),
    "drawn again": lambda: Middle(lambda x, linear: linear(F.dropout(x)) + linear(F.dropout(x))),
    "changed in between": lambda: Middle(lambda x, linear: linear(x) + changed(x.detach().clone())),
}
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "head loop": (lambda: Middle(heads), "operators.slices"),
    "promoted": (lambda: Middle(lambda x, linear: (linear(x) * WIDE).float()), "operators.promoted"),
    "read": (lambda: Middle(lambda x, linear: linear(x) / x.abs().max().item()), "operators.host_reads"),
    "read, detached": (lambda: Middle(lambda x, linear: linear(x) / float(x.detach().norm())), "operators.host_reads"),
    "again": (lambda: Middle(lambda x, linear: linear(x) * linear(x).sigmoid()), "operators.again"),
    "position loop": (
        lambda: Middle(lambda x, linear: torch.stack([linear(x[:, t]) for t in range(x.shape[1])], dim=1)),
        "operators.by_position",
    ),
    "appended": (lambda: Middle(appended), "operators.joined"),
}


class First(nn.Module):
    """The first of what a module answers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]  # type: ignore[no-any-return]


def watched(model: nn.Module, folder: Path, inputs: Tensor | None = None) -> lab.Diagnosis:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(2):
            tokens = torch.randint(16, (4, 24)) if inputs is None else inputs
            loss = model(tokens).float().pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watching.diagnosis


@pytest.mark.parametrize("name", SILENT)
def test_it_is_silent_on_what_is_meant(tmp_path: Path, name: str) -> None:
    diagnosis = watched(Model(SILENT[name]()), tmp_path / "run")
    assert not [s for s in diagnosis.symptoms if s.id.startswith("operators.")]
    assert "operators.joined" in diagnosis.checked


@pytest.mark.parametrize("name", WRONG)
def test_it_finds_and_places_what_is_not(tmp_path: Path, name: str) -> None:
    make, check = WRONG[name]
    found = [s for s in watched(Model(make()), tmp_path / "run").symptoms if s.id.startswith("operators.")]
    assert {s.id for s in found} == {check}
    assert all(s.at.startswith("middle") for s in found)


def test_a_call_that_cannot_be_cut_in_half_is_judged_by_the_rest(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    diagnosis = watched(model, tmp_path / "run", torch.randn(6, 1, 8, 8))
    assert "operators.again" in diagnosis.checked
    assert "half could be passed" in diagnosis.not_checked["operators.by_position"]


def test_a_model_that_raises_on_fewer_rows_is_not_judged(tmp_path: Path) -> None:
    def whole(x: Tensor, linear: nn.Linear) -> Tensor:
        if len(x) != 4:
            raise ValueError("four rows, please")
        return linear(x)  # type: ignore[no-any-return]

    diagnosis = watched(Model(Middle(whole)), tmp_path / "run")
    assert "cannot be called as in this experiment (ValueError" in diagnosis.not_checked["operators.again"]


def test_following_a_pass_changes_no_number() -> None:
    model = Model(Middle(heads))
    tokens, made = torch.randint(16, (2, 12)), []
    plain = copy.deepcopy(model)(tokens)
    dispatch.Trace(12).run(model, [tokens], lambda: made.append(model(tokens)))
    assert torch.equal(made[0], plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_rules_on_made_histories() -> None:
    assert not list(operators.operators_slices.judge(made(slices=3)))
    assert [s.seen for s in operators.operators_slices.judge(made(slices=4))] == [4]
    assert not list(operators.operators_joined.judge(made(joined=3, joined_half=2.5)))
    assert [s.seen for s in operators.operators_joined.judge(made(joined=4.5, joined_half=2.5))] == [4.5]
    for rule in (operators.operators_by_position, operators.operators_joined):
        with pytest.raises(NotChecked, match="half could be passed"):
            list(rule.judge(made(again=0)))


def made(**values: float) -> History:
    history = History()
    columns = tuple((f"operators.{name}", "") for name in values)
    history.add(0, Row(columns, np.array([*values.values()], dtype=float)))
    return history
