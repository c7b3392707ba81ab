"""Recurrences: silent where they remember as they should, and named where they do not."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from judging import told
from torch import nn
from torch.nn import functional as F

from lab.attach.watch import watch
from lab.store import History, Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun
    from torch import Tensor

probes = importlib.import_module("lab.probes.recurrence")
RULES = {"recurrence.reset", "recurrence.grows", "recurrence.carried"}
BASE: dict[str, object] = {"layers": 2, "width": 32, "heads": 2, "context": 24}


@pytest.mark.parametrize("mixer", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("model", [{"positions": "none"}, {"norm_at": "post", "context": 60, "layers": 1}])
def test_healthy_recurrences_are_silent(small_run: SmallRun, mixer: str, model: dict[str, object]) -> None:
    diagnosis, history = small_run(model=BASE | {"mixer": mixer} | model, train={"lr": 0.03, "warmup": 0}, steps=21)
    assert diagnosis.symptoms == ()
    assert set(diagnosis.checked) >= RULES
    assert ("recurrence.forgets" in diagnosis.checked) == (mixer == "lstm")
    assert max(series.values.max() for _, series in history.each("recurrence.growth")) < 6
    assert max(series.values.max() for _, series in history.each("recurrence.carried")) == 0


def test_without_a_recurrence_it_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(steps=2)
    assert diagnosis.verdict == "healthy"
    assert all("no recurrence in this model" in diagnosis.not_checked[rule] for rule in RULES)


@pytest.mark.parametrize(
    ("fault", "mixer"),
    [
        ("recurrent.state_carried", "rnn"),
        ("recurrent.state_carried", "lstm"),
        ("recurrent.state_reset", "gru"),
        ("recurrent.state_reset", "lstm"),
        ("recurrent.explodes", "rnn"),
        ("recurrent.forget_closed", "lstm"),
    ],
)
def test_each_fault_is_named_in_its_layer(small_run: SmallRun, fault: str, mixer: str) -> None:
    at = "blocks.1.attn.core"
    model = BASE | {"mixer": mixer, "context": 64 if mixer == "rnn" else 24}
    diagnosis, _ = small_run(model=model, faults=[{"id": fault, "at": at}], steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault, at)]
    assert diagnosis.unexplained == ()


class Words(nn.Module):
    """A language model of torch's own recurrence; it keeps its state where it is told to."""

    def __init__(self, core: nn.Module, *, keeps: bool = False) -> None:
        super().__init__()
        self.tokens, self.core, self.head = nn.Embedding(8, 16), core, nn.Linear(16, 8)
        self.keeps, self.first = keeps, bool(getattr(core, "batch_first", False))
        self.state: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        fits = self.state is not None and self.state.shape[1] == len(tokens)
        states, last = self.core(x if self.first else x.transpose(0, 1), self.state if fits else None)
        if self.keeps:
            self.state = last.detach()
        logits: Tensor = self.head(states if self.first else states.transpose(0, 1))
        return logits


@pytest.mark.parametrize(
    ("core", "keeps", "follows", "found"),
    [
        (nn.LSTM(16, 16, 2, batch_first=True, dropout=0.3), False, False, False),
        (nn.LSTM(16, 16), False, False, False),
        (nn.RNN(16, 16, nonlinearity="relu", batch_first=True), False, False, False),
        (nn.GRU(16, 16, batch_first=True), True, True, False),  # states go on where rows go on
        (nn.GRU(16, 16, batch_first=True), True, False, True),
    ],
)
def test_recurrences_of_others(tmp_path: Path, core: nn.Module, keeps: bool, follows: bool, found: bool) -> None:
    torch.manual_seed(0)
    model = Words(core, keeps=keeps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(8, (5, 24 * 13 + 1))
    with watch(model, optimizer, out=tmp_path / "run") as watching:
        for i in range(24):
            at = 13 * i if follows else int(torch.randint(24 * 13 - 13, ()))
            rows = text[:, at : at + 14]
            optimizer.zero_grad()
            F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    symptoms = [s.at for s in watching.diagnosis.symptoms if s.id.startswith("recurrence")]
    assert symptoms == (["core"] if found else [])
    assert set(watching.diagnosis.checked) >= RULES


def looks(metric: str, *values: float) -> History:
    made = History()
    for index, value in enumerate(values):
        made.add(index * 10, Row(((metric, "core"),), np.array([value])))
    return made


@pytest.mark.parametrize(
    ("rule", "metric", "values", "found"),
    [
        ("recurrence_reset", "recurrence.earlier", (0.0, 0.0), False),  # a matrix may start from 0
        ("recurrence_reset", "recurrence.earlier", (0.0, 0.1, 0.2), False),
        ("recurrence_reset", "recurrence.earlier", (0.0, 0.0, 0.0), True),
        ("recurrence_grows", "recurrence.growth", (5.0, 25.0, 5.0), False),
        ("recurrence_grows", "recurrence.growth", (25.0, 25.0), True),
        ("recurrence_forgets", "recurrence.forget", (1e-5, 1e-5, 1e-3), False),
        ("recurrence_forgets", "recurrence.forget", (1e-5, 1e-5, 1e-5), True),
    ],
)
def test_what_rules_ask(rule: str, metric: str, values: tuple[float, ...], found: bool) -> None:
    assert bool(told(getattr(probes, rule).judge(looks(metric, *values)))) is found


def test_a_share_and_a_growth() -> None:
    size = torch.tensor([64.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0])
    assert float(probes._share(size)) == pytest.approx(85 / 86)
    assert float(probes._growth(size)) == 6
    assert float(probes._share(size * 0)) == 1  # dead, not forgetful
    assert float(probes._growth(size * 0)) == 0
    assert float(probes._growth(size.flip(0))) == -5
