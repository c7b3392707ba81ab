"""Threads, passes, padding and waiting: silent on loops that are as they are for a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from judging import told
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lab
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

RULES = {"threads.too_many", "calls.in_vain", "padding.unneeded", "loader.waiting"}

HEALTHY: list[dict[str, Any]] = [
    {"train": {"accumulate": 2, "lr": 0.03, "warmup": 0}},
    {"train": {"objective": "masked"}, "data": {"source": "markov", "batch": 1}},
    {"train": {"objective": "seq2seq"}},
    {"model": {"layers": 0, "width": 32, "context": 8}, "data": {"source": "python-docs", "batch": 2}},
    {"model": {"layers": 8, "width": 64, "heads": 4, "context": 16, "mixer": "lstm"}},
]


@pytest.mark.parametrize("changes", HEALTHY)
def test_healthy_runs_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(**{"steps": 22, **changes})
    assert not [symptom for symptom in diagnosis.symptoms if symptom.id in RULES]
    assert {"threads.too_many", "calls.in_vain", "loader.waiting"} <= diagnosis.checked.keys()


class Net(nn.Module):
    """Tokens in, logits out; told which tokens are there, by keyword as in transformers."""

    def __init__(self, dropout: float = 0.0, *, again: bool = False) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.dropout, self.again = nn.Dropout(dropout), again

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.tokens(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.again:
            return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.body(x)


def once(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def r_drop(model: nn.Module, x: Tensor) -> Tensor:
    return once(model, x) + once(model, x)


def consistency(model: nn.Module, x: Tensor) -> Tensor:
    target: Tensor = model(x).detach().softmax(-1)
    told: Tensor = model(x).softmax(-1)
    return once(model, x) + (told - target).square().mean()


def sharpness(model: nn.Module, x: Tensor) -> Tensor:
    """Sharpness-aware: the gradient at other weights."""
    once(model, x).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.add_(p.grad, alpha=0.01)
            p.grad = None
    return once(model, x)


def micro_batches(model: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        once(model, torch.randint(11, x.shape)).backward()  # type: ignore[no-untyped-call]
    return once(model, x)


def metric_without_graph(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model(x).argmax(-1)
    return once(model, x)


def metric_with_graph(model: nn.Module, x: Tensor) -> Tensor:
    model(x).argmax(-1)
    return once(model, x)


def watched(folder: Path, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> list[str]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            loss(model, torch.randint(11, (4, 9))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert RULES - {"loader.waiting", "padding.unneeded"} <= watch.diagnosis.checked.keys()
    return [symptom.id for symptom in watch.diagnosis.symptoms if symptom.id in RULES]


@pytest.mark.parametrize(
    ("model", "loss", "found"),
    [
        (Net(), once, []),
        (Net(again=True), once, []),
        (Net(0.1), r_drop, []),
        (Net(0.1), consistency, []),
        (Net(), sharpness, []),
        (Net(), micro_batches, []),
        (Net(), metric_without_graph, []),
        (Net(), metric_with_graph, ["calls.in_vain"]),
    ],
)
def test_loops_that_call_the_model_twice(
    tmp_path: Path, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], found: list[str]
) -> None:
    assert watched(tmp_path / "run", model, loss) == found


def padded(lengths: list[int], width: int, *, opposite: bool = False) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        there = torch.arange(width) < torch.tensor(lengths)[:, None]
        x = torch.randint(1, 11, (len(lengths), width)).masked_fill(~there & (not opposite), 0)
        logits = model(x, attention_mask=(there ^ opposite).long())
        return F.cross_entropy(logits.flatten(0, 1), x.masked_fill(~there, -100).flatten())

    return loss


@pytest.mark.parametrize(
    ("lengths", "width", "opposite", "found"),
    [
        ([3, 40, 5], 40, False, []),  # a long row needs it
        ([20, 30, 24], 40, False, []),  # a little is no matter
        ([9, 3, 5], 40, False, ["padding.unneeded"]),
        ([40, 40, 40], 40, True, []),  # a mask that says which tokens are not there
        ([9, 3, 5], 128, False, []),  # to a multiple of 128
        ([9, 3, 5], 512, False, ["padding.unneeded"]),
    ],
)
def test_padding_that_no_row_needs(
    tmp_path: Path, lengths: list[int], width: int, *, opposite: bool, found: list[str]
) -> None:
    assert watched(tmp_path / "run", Net(), padded(lengths, width, opposite=opposite)) == found


def history_of(metric: str, values: list[float], **others: float) -> History:
    history = History()
    columns = ((metric, ""), *((name.replace("_", ".", 1), "") for name in others))
    for index, value in enumerate(values):
        history.add(index, Row(columns, np.array([value, *others.values()])))
    return history


@pytest.mark.parametrize(
    ("rule", "history", "since"),
    [
        ("threads.too_many", history_of("threads.intra_op", [3] * 3, threads_cores=2), 0),
        ("threads.too_many", history_of("threads.intra_op", [2, 3, 3], threads_cores=2), None),
        ("threads.too_many", history_of("threads.intra_op", [2, 3, 3, 3], threads_cores=2), 1),
        ("threads.too_many", history_of("threads.intra_op", [3, 3, 3, 2], threads_cores=2), None),
        ("threads.too_many", history_of("threads.intra_op", [2] * 9, threads_cores=2), None),
        ("calls.in_vain", history_of("calls.in_vain", [0, 1, 2, 1]), 1),
        ("calls.in_vain", history_of("calls.in_vain", [1, 1, 1, 0]), None),
        ("padding.unneeded", history_of("padding.columns", [0.5] * 4, padding_empty=20), None),
        ("padding.unneeded", history_of("padding.columns", [0.6] * 4, padding_empty=200), 0),
        ("loader.waiting", history_of("loader.share", [0.1] * 9 + [0.7] * 40), 9),
        ("loader.waiting", history_of("loader.share", [0.7] * 40 + [0.1] * 11), None),
        ("loader.waiting", history_of("loader.share", [0.9] + [0.1] * 29), None),
        ("loader.waiting", history_of("loader.share", [0.4, 0.6, 0.7] * 10), 1),
    ],
)
def test_a_history_made_by_hand(catalogue: Catalogue, rule: str, history: History, since: int | None) -> None:
    assert [symptom.since for symptom in told(catalogue.rules[rule].judge(history))] == (
        [] if since is None else [since]
    )
