"""Weights that can learn: silent on every start that training leaves, right about those that it cannot leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
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


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 1, "width": 32, "heads": 2, "context": 24, "tied": True},
        {"layers": 4, "width": 32, "heads": 4, "context": 8, "norm": "rms", "activation": "swiglu"},
        {"layers": 2, "width": 32, "heads": 2, "context": 24, "mixer": "convolution", "activation": "relu"},
        {"layers": 0, "width": 32, "heads": 2, "context": 24},
    ],
)
@pytest.mark.parametrize("lr", [1e-5, 0.03])
def test_healthy_runs_are_silent(small_run: SmallRun, model: dict[str, object], lr: float) -> None:
    diagnosis, _ = small_run(model=model, train={"lr": lr, "warmup": 0}, steps=22)
    assert diagnosis.verdict == "healthy"
    assert "flow.zero" in diagnosis.checked


def flow(tmp_path: Path, model: nn.Module) -> set[str]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(22):
            x = torch.randint(0, 20, (4, 6))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {s.id for s in watching.diagnosis.symptoms if s.id.startswith("flow")}


def parts() -> tuple[nn.Embedding, nn.Linear, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 50)


def test_a_head_at_0_and_tokens_that_never_come_are_healthy(tmp_path: Path) -> None:
    table, up, down, head = parts()
    nn.init.zeros_(head.weight)
    nn.init.ones_(table.weight)
    assert flow(tmp_path, nn.Sequential(table, up, nn.GELU(), down, head)) == set()


def test_one_matrix_of_two_at_0_is_healthy(tmp_path: Path) -> None:
    table, up, down, head = parts()
    nn.init.zeros_(down.weight)
    assert flow(tmp_path, nn.Sequential(table, up, nn.GELU(), down, head)) == set()


def test_both_at_0_are_found(tmp_path: Path) -> None:
    table, up, down, head = parts()
    for p in (*up.parameters(), *down.parameters()):
        nn.init.zeros_(p)
    assert flow(tmp_path, nn.Sequential(table, up, nn.GELU(), down, head)) == {"flow.zero"}


def test_neurons_that_are_copies_are_found(tmp_path: Path) -> None:
    table, up, down, head = parts()
    for p in (up.weight, up.bias, down.weight):
        nn.init.constant_(p, 0.1)
    nn.init.normal_(table.weight)
    assert "flow.twins" in flow(tmp_path, nn.Sequential(table, up, nn.GELU(), down, head))


@pytest.mark.parametrize(
    ("twins", "size", "expected"),
    [
        ([1, 1, 1], [0.1, 0.2, 0.3], {"flow.twins"}),
        ([1, 0, 0], [0.1, 0.2, 0.3], set()),  # they part
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], set()),  # some only
        ([1, 1, 1], [0.1, 0.1, 0.1], set()),  # nothing has moved yet
        ([1, 1], [0.1, 0.2], set()),  # too early
        ([0, 0, 0], [0, 0, 0], {"flow.zero"}),
    ],
)
def test_what_a_history_shows(twins: list[float], size: list[float], expected: set[str]) -> None:
    history = History()
    columns = (("flow.twins", "w"), ("flow.size", "w"), ("flow.slope", "w"))
    for i, pair in enumerate(zip(twins, size, strict=True)):
        history.add(10 * i, Row(columns, np.array([*pair, float(size[0] > 0)])))
    found = judge(history, discover())
    assert {s.id for s in found.symptoms} == expected
    assert ("flow.zero" in found.not_checked) == (len(size) < 3)
