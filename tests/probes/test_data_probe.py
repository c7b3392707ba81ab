"""Batches and rows that come again: by chance it is silent, and each mistake is named."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

probes = importlib.import_module("lab.probes.data")
OWN = {"data.repeats", "data.duplicates", "data.held_out_seen"}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("data.")]


def test_rows_have_the_same_hash_when_they_are_the_same() -> None:
    probe = probes.Data()
    probe.lab_start()
    rows = torch.cartesian_prod(*[torch.arange(6)] * 5)  # [7776 5], every row once
    assert len(probe._hashes(rows).unique()) == len(rows)
    assert torch.equal(probe._hashes(rows.flip(0)), probe._hashes(rows).flip(0))
    state = torch.get_rng_state()
    probes.Data().lab_start()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"objective": "masked"}},
        {"train": {"objective": "seq2seq", "evaluate_every": 5}},
        {"train": {"accumulate": 2}},
        {"model": {"layers": 1, "width": 32, "heads": 2, "context": 2}, "data": {"source": "markov", "vocabulary": 2}},
        {"model": {"layers": 0, "width": 32, "context": 4}, "data": {"source": "arithmetic", "batch": 64}},
        {"model": {"layers": 1, "width": 32, "context": 1}, "data": {"source": "markov", "vocabulary": 2, "batch": 1}},
        {"data": {"source": "python-docs", "batch": 8}, "train": {"evaluate_every": 10}},
    ],
)
def test_health_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=30, **changes)
    assert named(diagnosis) == []
    assert len(history.series("data.unchanged")) == 29


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ({"id": "data.same_batch"}, {}),
        ({"id": "data.same_batch"}, {"train": {"objective": "masked", "accumulate": 2}}),
        ({"id": "data.same_batch", "from_step": 9}, {"train": {"objective": "seq2seq"}}),
        ({"id": "data.duplicate_rows"}, {}),
        ({"id": "data.duplicate_rows", "workers": 4}, {"train": {"objective": "masked"}}),
        ({"id": "data.train_in_held_out"}, {"data": {"source": "python-docs", "batch": 8}}),
        ({"id": "data.constant_input"}, {}),
        ({"id": "data.constant_input", "token": 3}, {"train": {"objective": "masked"}}),
    ],
)
def test_a_fault_is_named(small_run: SmallRun, fault: dict[str, object], changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[fault], steps=36, **changes)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault["id"], "data")]
    assert diagnosis.unexplained == ()


# ---------------------------------------------------------------- loops that the lab did not write


class Model(nn.Module):
    """A table and a head, and perhaps a word from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
        y = self.embed(x)
        return self.head(y if told is None else y + told[:, None])  # type: ignore[no-any-return]


def watched(folder: Path, *, told: bool, constant: bool, learned: int) -> lab.Diagnosis:
    """Full-batch descent on one batch."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, word = torch.randint(7, (8, 12)), torch.randn(8, 8)
    x[4:] = x[:4]
    targets = x.roll(-1, 1) if learned < 0 else torch.full_like(x, learned)
    inputs = torch.zeros_like(x) if constant else x
    with lab.watch(model, optimizer, out=folder) as watch:
        for _ in range(41):
            optimizer.zero_grad()
            logits = model(inputs, word) if told else model(inputs)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize(
    ("told", "constant", "learned", "names"),
    [
        (False, False, -1, []),  # the same rows again and again, as they may be meant
        (True, True, -1, []),  # what is told beside is what counts
        (False, True, 3, []),  # a benchmark on zeros: the answer is constant too
        (False, True, -1, ["data.constant"]),
    ],
)
def test_a_loop_of_one_s_own(tmp_path: Path, *, told: bool, constant: bool, learned: int, names: list[str]) -> None:
    diagnosis = watched(tmp_path / "run", told=told, constant=constant, learned=learned)
    assert named(diagnosis) == names
    assert diagnosis.not_checked.keys() >= OWN


# ---------------------------------------------------------------- histories made by hand


def history_of(metric: str, values: list[float], **others: float) -> lab.History:
    history = lab.History()
    columns = ((metric, ""), *((f"data.{name}", "") for name in others))
    for index, value in enumerate(values):
        history.add(index, Row(columns, np.array([value, *others.values()])))
    return history


@pytest.mark.parametrize(
    ("rule", "history", "answer"),
    [
        ("data.repeats", history_of("data.unchanged", [1] * 21, held_out_repeats=0), "found"),
        ("data.repeats", history_of("data.unchanged", [1] * 20, held_out_repeats=0), "steps in a row"),
        ("data.repeats", history_of("data.unchanged", [1.0] * 40 + [0.0], held_out_repeats=0), ""),
        ("data.repeats", history_of("data.unchanged", [1] * 30, held_out_repeats=1), "the data are few"),
        ("data.repeats", history_of("data.unchanged", [1] * 30), "nothing was held out"),
        ("data.duplicates", history_of("data.duplicates", [0.1] * 21, held_out_duplicates=0), "found"),
        ("data.duplicates", history_of("data.duplicates", [0.1] * 21, held_out_duplicates=0.1), "the data are few"),
        ("data.duplicates", history_of("data.duplicates", [0.1] * 21 + [0], held_out_duplicates=0), ""),
        ("data.duplicates", history_of("data.duplicates", [0.1] * 30), "nothing was held out"),
        (
            "data.held_out_seen",
            history_of("data.held_out_seen", [1], held_out_rows=32, rows=99, seen_before=0),
            "found",
        ),
        ("data.held_out_seen", history_of("data.held_out_seen", [0.9], held_out_rows=32, rows=99, seen_before=0), ""),
        (
            "data.held_out_seen",
            history_of("data.held_out_seen", [1], held_out_rows=32, rows=99, seen_before=0.7),
            "the data are few",
        ),
        ("data.held_out_seen", history_of("data.held_out_seen", [1], held_out_rows=4, rows=9, seen_before=0), "few"),
        ("data.constant", history_of("data.constant", [1] * 3, tokens=32), "found"),
        ("data.constant", history_of("data.constant", [1] * 3, tokens=8), ""),
        ("data.constant", history_of("data.constant", [-1] * 3), "more goes into the model"),
        ("data.constant", history_of("data.constant", [1, 1, 1, 0], tokens=32), ""),
    ],
)
def test_a_history_made_by_hand(catalogue: Catalogue, rule: str, history: lab.History, answer: str) -> None:
    try:
        found = ["found" for _ in catalogue.rules[rule].judge(history)]
    except lab.NotChecked as reason:
        found = [str(reason)]
    assert bool(found) == bool(answer)
    assert all(answer in text for text in found)
