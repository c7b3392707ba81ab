"""What earlier steps leave in memory, and what evaluation and generation do in vain."""

from __future__ import annotations

import importlib
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab
from lab import History, NotChecked, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

memory = importlib.import_module("lab.probes.memory")
waste = importlib.import_module("lab.probes.waste")

MINE = ("memory.", "evaluation.graphs", "generation.repeated")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 0, "width": 32, "heads": 1, "context": 8}},
        {"model": {"layers": 2, "width": 32, "mixer": "gru", "positions": "none", "context": 8}},
        {"train": {"objective": "masked"}},
        {"train": {"objective": "seq2seq"}, "model": {"layers": 1, "width": 32, "heads": 2, "context": 8}},
        {"train": {"accumulate": 2, "evaluate_every": 5}},
    ],
)
def test_it_is_silent_on_healthy_runs(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=18, **changes)
    assert not [s for s in diagnosis.symptoms if s.id.startswith(MINE)]
    assert {"memory.graphs", "memory.logits", "evaluation.graphs"} <= diagnosis.checked.keys()
    assert history.series("memory.graphs").values.max() == 0
    assert history.series("memory.logits").values.max() == 0


def trained(folder: Path, keep: Callable[[Tensor, Tensor], object], dims: int = 3) -> lab.Diagnosis:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(26):
            tokens = torch.randint(16, (4, 6) if dims == 3 else (4,))
            logits = model(tokens)
            loss = F.cross_entropy(logits.reshape(-1, 16), tokens.reshape(-1))
            keep(loss, logits)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


def test_what_a_loop_may_keep(tmp_path: Path) -> None:
    losses: list[object] = []
    recent: deque[Tensor] = deque(maxlen=10)

    def keep(loss: Tensor, logits: Tensor) -> None:
        recent.append(loss)
        losses.extend((loss.detach(), loss.item(), logits.argmax(-1), logits.detach().mean()))

    diagnosis = trained(tmp_path / "run", keep)
    assert not [s for s in diagnosis.symptoms if s.id.startswith("memory.")]
    assert {"memory.graphs", "memory.logits"} <= diagnosis.checked.keys()


def test_scores_of_whole_examples_may_be_gathered(tmp_path: Path) -> None:
    gathered: list[Tensor] = []
    diagnosis = trained(tmp_path / "run", lambda _, logits: gathered.append(logits.detach()), dims=2)
    assert not [s for s in diagnosis.symptoms if s.id.startswith("memory.")]


def test_a_cycle_is_not_kept(tmp_path: Path) -> None:
    def tie(loss: Tensor, _: Tensor) -> None:
        knot: list[object] = [loss]
        knot.append(knot)

    assert not [s for s in trained(tmp_path / "run", tie).symptoms if s.id.startswith("memory.")]


def test_a_running_sum_keeps_every_graph(tmp_path: Path) -> None:
    total: list[Tensor] = [torch.zeros(())]

    def add(loss: Tensor, _: Tensor) -> None:
        total[0] = total[0] + loss

    causes = trained(tmp_path / "run", add).causes
    assert [(c.id, c.at, c.since_step) for c in causes] == [("performance.retained_graph", "loop", 16)]


def test_logits_in_a_list_are_seen(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    causes = trained(tmp_path / "run", lambda _, logits: kept.append(logits.detach().view(-1))).causes
    assert [c.id for c in causes] == ["performance.list_grows"]


def made(metric: str, *values: float) -> History:
    history = History()
    for step, value in enumerate(values):
        history.add(step, Row(((metric, ""),), np.array([value])))
    return history


def test_the_rules_on_made_histories() -> None:
    for rule, metric in ((memory.memory_graphs, "memory.graphs"), (memory.memory_logits, "memory.logits")):
        assert not list(rule.judge(made(metric, *[1.0] * 40)))
        assert [s.since for s in rule.judge(made(metric, *range(20)))] == [16]
        with pytest.raises(NotChecked, match="too few steps"):
            list(rule.judge(made(metric, 0.0, 1.0)))
    assert [s.since for s in waste.evaluation_graphs.judge(made("evaluation.graphs", 0.0, 4.0))] == [1]
    assert not list(waste.generation_repeated.judge(made("generation.repeated", 0.0)))
    with pytest.raises(NotChecked, match="no cache was found"):
        list(waste.generation_repeated.judge(made("generation.repeated", 5.0)))
