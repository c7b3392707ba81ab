"""Classes: as many as there are tokens, rounded up, and each counts; silent elsewhere."""

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

    from lab.catalogue import Catalogue

RULES = {"vocabulary.class_left_out", "vocabulary.too_many"}
FEW: dict[str, Any] = {"source": "markov", "vocabulary": 12, "batch": 4}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"accumulate": 2, "lr": 0.3, "warmup": 0}},
        {"model": {"layers": 0, "width": 32, "heads": 1, "context": 8}, "data": {"source": "markov", "vocabulary": 2}},
        {"train": {"objective": "masked", "accumulate": 2}},
        {"train": {"objective": "seq2seq"}},
        {"train": {"objective": "sft"}, "data": {"source": "arithmetic", "batch": 8}},
    ],
)
def test_all_classes_that_count_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=12, **changes)
    assert set(diagnosis.checked) >= RULES
    assert named(diagnosis) == []
    assert history.series("vocabulary.unevenness").values.max() < 1e-5


@pytest.mark.parametrize(("token", "begin", "parts"), [(-1, 0, 1), (-1, 10, 2)])
def test_a_class_that_is_left_out_is_named(small_run: SmallRun, token: int, begin: int, parts: int) -> None:
    fault = {"id": "targets.class_ignored", "token": token, "from_step": begin}
    diagnosis, _ = small_run(faults=[fault], steps=36, data=FEW, train={"accumulate": parts})
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("targets.class_ignored", "loss")]
    assert diagnosis.causes[0].since_step == begin
    assert diagnosis.unexplained == ()


def test_tables_that_are_too_large_are_named(small_run: SmallRun) -> None:
    model = {"layers": 1, "width": 8, "heads": 1, "context": 8}
    fault = {"id": "data.vocabulary_mismatch", "rows": 2049}
    diagnosis, history = small_run(faults=[fault], steps=3, data=FEW, model=model)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("data.vocabulary_mismatch", "head")]
    assert history.last("vocabulary.tokens") == 12


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"id": "targets.class_ignored", "token": 50}, "no target of the first batch"),
        ({"id": "data.vocabulary_mismatch", "rows": 12}, "there are 12 tokens"),
        ({"id": "data.vocabulary_mismatch", "from_step": 2}, "acts when the run is built"),
    ],
)
def test_where_it_means_nothing_it_is_refused(small_run: SmallRun, fault: dict[str, object], match: str) -> None:
    with pytest.raises(lab.BadInput, match=match):
        small_run(faults=[fault], data=FEW)


def test_padding_that_the_loss_leaves_out_is_not_judged(tmp_path: Path) -> None:
    """ignore_index as in PyTorch's own tutorial of translation: 0 fills up rows, and a table is rounded up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4096, 8), nn.Linear(8, 4096))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(22):
            x = torch.randint(1, 11, (4, 9)).masked_fill(torch.arange(9) > torch.randint(4, 9, (4, 1)), 0)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), ignore_index=0)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert named(watch.diagnosis) == []
    assert "not the lab's own" in watch.diagnosis.not_checked["vocabulary.class_left_out"]


def history_of(rows: list[tuple[float, float, float, float]], classes: float, tokens: float) -> lab.History:
    history = lab.History()
    names = ("loss", "whole", "without", "left_out", "present", "classes", "tokens")
    for index, row in enumerate(rows):
        history.add(index, Row(tuple((f"vocabulary.{n}", "") for n in names), np.array([*row, 1, classes, tokens])))
    return history


@pytest.mark.parametrize(
    ("rows", "classes", "tokens", "found"),
    [
        ([(2.0, 2.1, 2.0, 5)] * 3, 16, 16, {"vocabulary.class_left_out"}),
        ([(2.0, 2.1, 2.0, 5)] * 2, 16, 16, set()),
        ([(2.0, 2.1, 2.0, 5), (2.0, 2.1, 2.0, 5), (2.0, 2.1, 2.0, 6)], 16, 16, set()),  # one fits by chance each time
        ([(2.0, 2.00001, 2.0, 5)] * 3, 16, 16, set()),
        ([(np.nan, np.nan, np.nan, 0)] * 3, 16, 16, set()),
        ([(2.0, 2.0, 1.9, 5)] * 3, 51_200, 50_295, set()),  # Phi-2: a multiple of 2048
        ([(2.0, 2.0, 1.9, 5)] * 3, 152_064, 151_665, set()),  # Qwen2.5-72B
        ([(2.0, 2.0, 1.9, 5)] * 3, 32_128, 32_100, set()),  # T5
        ([(2.0, 2.0, 1.9, 5)] * 3, 50_304, 65, {"vocabulary.too_many"}),
    ],
)
def test_a_history_made_by_hand(
    catalogue: Catalogue, rows: Any, classes: float, tokens: float, found: set[str]
) -> None:
    seen = set()
    for rule in RULES:
        try:
            seen |= {rule for _ in told(catalogue.rules[rule].judge(history_of(rows, classes, tokens)))}
        except lab.NotChecked as reason:
            assert "no form of the cross-entropy" in str(reason)  # noqa: PT017 - the reason is asked for
    assert seen == found
