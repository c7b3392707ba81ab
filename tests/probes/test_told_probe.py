"""What a decoder is told: silent where it sees the past of it only, in models of the lab and of others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab
from lab import NotChecked

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.told")


@pytest.mark.parametrize("changes", [{}, {"data": {"source": "markov", "batch": 2}}, {"train": {"lr": 1.0}}])
def test_a_decoder_that_is_causal_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    train = {**changes.get("train", {}), "objective": "seq2seq"}
    diagnosis, history = small_run(**{**changes, "train": train})
    assert {"told.future", "told.leak"} <= set(diagnosis.checked)
    assert not [s for s in diagnosis.symptoms if s.id.startswith("told.")]
    assert history.series("told.future").values.max() == 0


def test_a_decoder_that_sees_ahead_is_placed(small_run: SmallRun) -> None:
    fault: dict[str, object] = {"id": "mask.told_future", "at": "blocks.1.attn"}
    diagnosis, _ = small_run(faults=[fault], train={"objective": "seq2seq"})
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("mask.told_future", "blocks.1.attn")]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("train", [{}, {"objective": "masked"}])
def test_who_is_told_nothing_is_not_asked(small_run: SmallRun, train: dict[str, Any]) -> None:
    diagnosis, _ = small_run(train=train, steps=2)
    assert "need not be causal" in diagnosis.not_checked["told.future"]
    assert "need not be causal" in diagnosis.not_checked["told.leak"]


class Translator(nn.Module):
    """``nn.Transformer`` with a causal mask for what it is told, or without one; it may shift that by itself."""

    def __init__(self, *, causal: bool, shifts: bool = False) -> None:
        super().__init__()
        self.causal, self.shifts = causal, shifts
        self.embed = nn.Embedding(12, 16)
        self.core = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 12)

    def forward(self, source: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(told.shape[1]) if self.causal else None
        there = self.embed(told)
        if self.shifts:
            there = F.pad(there[:, :-1], (0, 0, 1, 0))
        return self.head(self.core(self.embed(source), there, tgt_mask=mask))  # type: ignore[no-any-return]


def watched(folder: Path, model: nn.Module, *, shifted: bool = True, more: int = 0, **along: bool) -> lab.Diagnosis:
    """Train on sequences that are to be turned round, with so many tokens more behind them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=folder / "run") as watch:
        for _ in range(24):
            source = torch.randint(11, (6, 9))
            targets = F.pad(source.flip(1), (0, more))
            told = torch.cat([torch.full((6, 1), 11), targets[:, :-1]], dim=1) if shifted else targets
            optimizer.zero_grad()
            logits = model(source, told, labels=targets) if along else model(source, told)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_a_model_of_anybody_s(tmp_path: Path, causal: bool, more: int) -> None:
    torch.manual_seed(0)
    diagnosis = watched(tmp_path, Translator(causal=causal), more=more)
    found = [s.id for s in diagnosis.symptoms if s.id.startswith("told.")]
    assert ("told.future" in found) != causal
    assert "told.future" in diagnosis.checked
    places = [] if causal else ["core.decoder.layers.0.self_attn"]
    assert [cause.at for cause in diagnosis.causes] == places


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, True),
        ({"more": 2}, True),
        ({"labels": True}, True),
        ({"shifts": True}, False),  # it shifts what it is told, and its output sees none of what it has to give
        ({"causal": False}, False),  # it sees all, as what encodes an answer to a code does: it predicts nothing
        ({"shifted": True, "labels": True}, False),
    ],
)
def test_a_decoder_that_is_told_what_it_has_to_give(tmp_path: Path, options: dict[str, Any], *, named: bool) -> None:
    torch.manual_seed(0)
    model = Translator(causal=options.pop("causal", True), shifts=options.pop("shifts", False))
    diagnosis = watched(tmp_path, model, **{"shifted": False, **options})
    assert [(c.id, c.at) for c in diagnosis.causes] == [("targets.not_shifted", "targets")] * named
    assert diagnosis.unexplained == ()


def test_nothing_is_judged_before_it_was_tried() -> None:
    with pytest.raises(NotChecked, match="need not be causal"):
        [*probes.told_future.judge(lab.History())]
