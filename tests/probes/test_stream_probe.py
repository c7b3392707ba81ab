"""The stream: silent on every block that adds to its input, and right about those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from lab.attach.watch import watch
from lab.diagnosis.diagnose import judge
from lab.manager import discover
from lab.store import History, Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

SIZES: list[dict[str, object]] = [
    {"layers": 1, "width": 32, "heads": 2, "context": 24},
    {"layers": 8, "width": 32, "heads": 4, "context": 8, "norm": "rms", "activation": "swiglu"},
    {"layers": 2, "width": 32, "heads": 2, "context": 24, "norm_at": "post", "tied": True},
    {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": "rope", "activation": "relu"},
    {"layers": 2, "width": 32, "heads": 2, "context": 24, "mixer": "lstm"},
]


@pytest.mark.parametrize("model", SIZES)
def test_healthy_runs_are_silent(small_run: SmallRun, model: dict[str, object]) -> None:
    diagnosis, history = small_run(model=model, train={"lr": 0.03, "warmup": 0})
    assert diagnosis.verdict == "healthy"
    assert "stream.blocked" in diagnosis.checked
    assert len(history.sites("stream.carried")) == model["layers"]
    if "norm_at" not in model:
        assert history.last("stream.factor", "blocks.0") == pytest.approx(1, abs=1e-5)


def test_without_blocks_it_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(model={"layers": 0, "width": 32, "heads": 2, "context": 24})
    assert "no attention in this model" in diagnosis.not_checked["stream.blocked"]


@pytest.mark.parametrize("first", [True, False])
def test_pytorchs_own_layers_are_silent(tmp_path: Path, first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6, 16)).square().mean().backward()
            optimizer.step()
    assert not [s for s in watching.diagnosis.symptoms if s.id.startswith("stream")]
    assert len(watching.run.history.sites("stream.carried")) == 3


def history_of(factors: list[float], rest: float = 0.0) -> History:
    history = History()
    for i, factor in enumerate(factors):
        columns = (("stream.carried", "b"), ("stream.factor", "b"), ("stream.rest", "b"))
        history.add(i * 10, Row(columns, torch.tensor([abs(factor), factor, rest]).double().numpy()))
    return history


def found(history: History) -> set[str]:
    return {s.id for s in judge(history, discover())[0]}


@pytest.mark.parametrize(
    ("factors", "rest", "expected"),
    [
        ([1.0] * 5, 0.0, set()),
        ([0.5] * 5, 0.0, set()),
        ([0.36] * 5, 0.0, set()),
        ([0.1, 0.11, 0.12], 0.0, set()),  # learned
        ([0.1] * 5, 0.3, set()),  # a norm stands on the stream
        ([0.1] * 2, 0.0, set()),  # too few to tell
        ([0.1] * 3, 0.0, {"stream.scaled"}),
        ([5.0] * 3, 0.0, {"stream.scaled"}),
        ([0.0] * 3, 0.0, {"stream.blocked"}),
    ],
)
def test_what_is_wrong_with_a_factor(factors: list[float], rest: float, expected: set[str]) -> None:
    assert found(history_of(factors, rest)) == expected
