"""Rows and padding: silent where nothing is mixed, in models of the lab and of others."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attach_loops import train

import lab
from lab.context import Batch, Step
from lab.errors import NotChecked
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.mixing")


@pytest.mark.parametrize("mixer", ["attention", "convolution", "gru", "none"])
@pytest.mark.parametrize("batch", [2, 24])
def test_decoders_mix_no_rows(small_run: SmallRun, mixer: str, batch: int) -> None:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24, "mixer": mixer}
    diagnosis, history = small_run(model=model, data={"source": "markov", "batch": batch}, steps=2)
    assert history.series("mixing.rows").values.max() == 0
    assert not [s for s in diagnosis.symptoms if s.id.startswith("mixing.")]
    assert "padding" in diagnosis.not_checked["mixing.padding"]


def test_an_encoder_that_is_told_of_padding_is_checked(small_run: SmallRun) -> None:
    diagnosis, history = small_run(train={"objective": "masked"})
    assert diagnosis.symptoms == ()
    assert {"mixing.rows", "mixing.padding"} <= set(diagnosis.checked)
    assert history.series("mixing.padding").values.max() == 0


def test_padding_that_is_seen_is_found_where_it_comes_in(small_run: SmallRun) -> None:
    fault: dict[str, object] = {"id": "mask.padding_seen", "at": "blocks.1.attn"}
    diagnosis, _ = small_run(train={"objective": "masked"}, faults=[fault], steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("mask.padding_seen", "blocks.1.attn")]


def test_a_causal_mask_in_an_encoder_is_found(small_run: SmallRun) -> None:
    fault: dict[str, object] = {"id": "mask.causal_in_encoder", "at": "blocks.1.attn"}
    diagnosis, _ = small_run(train={"objective": "masked"}, faults=[fault], steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("mask.causal_in_encoder", "blocks.1.attn")]


def test_rows_that_are_mixed_are_found_where_they_meet(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "attention.rows_mixed", "at": "blocks.1.attn"}], steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("attention.rows_mixed", "blocks.1.attn")]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"dropout": 0.5}])
def test_a_model_of_anybody_s_is_silent(tmp_path: Path, options: dict[str, Any]) -> None:
    watch = train(tmp_path / "run", steps=12, **options).watch
    assert watch is not None
    assert "mixing.rows" in watch.diagnosis.checked
    assert watch.diagnosis.symptoms == ()


class TimeFirst(torch.nn.Module):
    """A recurrent model that is called with tokens [T B]: its first axis is time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.cell = torch.nn.GRU(8, 8)
        self.head = torch.nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embed(tokens))[0])  # type: ignore[no-any-return]


def test_time_is_not_taken_for_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TimeFirst()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            tokens = torch.randint(11, (9, 5))
            optimizer.zero_grad()
            logits = model(tokens[:-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert not [s for s in watch.diagnosis.symptoms if s.id.startswith("mixing.")]
    assert "which axis" in watch.diagnosis.not_checked["mixing.rows"]


def asked(model: torch.nn.Module, batch: Batch) -> Step:
    run: Any = SimpleNamespace(
        model=model,
        sites=SimpleNamespace(match=lambda _: []),
        history=lab.History(),
        call=lambda b: model(*b.args, **b.kwargs),
    )
    step, probe = Step(0), probes.Mixing()
    step.batch = batch
    probe.lab_start(run)
    probe.lab_examine(run, step)
    return step


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch((torch.randn(4, 8),)), "tokens"),
        (Batch((torch.ones(1, 8, dtype=torch.long),)), "too few"),
        (Batch((torch.ones(5, 2, dtype=torch.long),)), "which axis"),
        (Batch((torch.ones(4, 8, dtype=torch.long), [1])), "cannot be told"),
        (Batch((torch.ones(8, 8, dtype=torch.long), torch.ones(8, 8))), "cannot be told"),
        (Batch((torch.ones(4, 8, dtype=torch.long), torch.ones(4, 4))), "cannot be told"),
    ],
)
def test_what_cannot_be_tried_says_why(batch: Batch, reason: str) -> None:
    with pytest.raises(NotChecked, match=reason):
        asked(TimeFirst(), batch)


class Mixes(torch.nn.Module):
    """Gives each row the mean of all; notes how many it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.rows: list[int] = []

    def forward(self, tokens: torch.Tensor, marks: torch.Tensor | None = None) -> torch.Tensor:
        self.rows.append(len(tokens))
        x = self.embed(tokens)
        return x + x.mean(0, keepdim=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("marked", [False, True])
def test_a_third_row_is_asked_only_where_something_may_say_what_is_padding(*, marked: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (5, 8))
    marks = torch.ones(5, 8, dtype=torch.bool)
    model = Mixes()
    step = asked(model, Batch((tokens, marks) if marked else (tokens,), {}, tokens.clone()))
    assert model.rows == ([3, 3] if marked else [2, 2])
    row, _ = step.flush()
    found = dict(zip(row.columns, row.values, strict=True))
    assert found["mixing.rows", ""] > 0.01
    assert found["mixing.padding", ""] == -1


def test_a_router_may_mix_rows() -> None:
    model = torch.nn.ModuleDict({"experts": TimeFirst()})
    with pytest.raises(NotChecked, match="router"):
        asked(model, Batch((torch.ones(4, 8, dtype=torch.long),)))


def test_padding_is_known_either_way_round_and_only_on_the_right() -> None:
    tokens = torch.arange(8).view(2, 4)
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    targets = tokens.masked_fill(~present, -100)
    for mask in (present, ~present, present.long()):
        assert probes._present(Batch((tokens, mask), targets=targets), tokens).equal(present)
        assert probes._present(Batch((tokens,), {"any": mask}, targets=targets), tokens).equal(present)
    everywhere = torch.ones_like(present)
    assert probes._present(Batch((tokens, present), targets=tokens), tokens).equal(everywhere)  # padding is learned
    left = Batch((tokens, present.flip(1)), targets=targets.flip(1))
    assert probes._present(left, tokens).equal(everywhere)
    assert probes._present(Batch((tokens, torch.arange(4).expand(2, 4)), targets=targets), tokens).equal(everywhere)


def test_evaluation_that_is_random_says_nothing_of_rows() -> None:
    names = [("mixing.rows", ""), ("mixing.padding", ""), ("mixing.batch_first", ""), ("determinism.difference", "")]
    for noise, found in ((0.0, 1), (0.1, 0)):
        history = lab.History()
        history.add(0, Row(tuple(names), np.array([0.2, 0.2, 1.0, noise])))
        for rule in (probes.mixing_rows, probes.mixing_padding):
            if found:
                assert len([*rule.judge(history)]) == 1
            else:
                with pytest.raises(NotChecked, match="random"):
                    [*rule.judge(history)]


def test_time_is_not_taken_for_the_batch_when_windows_overlap() -> None:
    tokens = torch.arange(9)[:, None] + torch.arange(5)  # [T B]: the next column is the next token too
    assert probes._rows_first(Batch((tokens,), targets=tokens + 1), tokens) == 0
    tokens = torch.randperm(36).view(4, 9)
    assert probes._rows_first(Batch((tokens,), targets=tokens.roll(-1, 1)), tokens) == 1


def test_a_norm_over_the_batch_is_not_asked() -> None:
    model = torch.nn.ModuleDict({"norm": torch.nn.BatchNorm1d(4, track_running_stats=False)})
    with pytest.raises(NotChecked, match="statistics"):
        asked(model, Batch((torch.ones(4, 8, dtype=torch.long),)))


class Padded(torch.nn.Module):
    """An encoder of PyTorch's own that is told of padding, with a mask that it may forget to hand on."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.forgets = forgets
        self.embed = torch.nn.Embedding(11, 16)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(16, 11)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        mask = None if self.forgets else padding
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=mask))  # type: ignore[no-any-return]


@pytest.mark.parametrize("forgets", [False, True])
def test_padding_in_a_model_of_anybody_s(forgets: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (5, 8))
    padding = torch.arange(8) >= torch.tensor([8, 7, 6, 4, 3])[:, None]
    batch = Batch((tokens, padding), targets=tokens.masked_fill(padding, -100))
    row, _ = asked(Padded(forgets=forgets), batch).flush()
    found = {metric: value for metric, _, value in row}
    assert found["mixing.rows"] == 0
    assert (found["mixing.padding"] > 1e-4) == forgets
