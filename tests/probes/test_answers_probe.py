"""Which targets count: the same in training and evaluation is silent, and what differs is named."""

from __future__ import annotations

from types import SimpleNamespace
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

SFT: dict[str, Any] = {"train": {"objective": "sft"}, "data": {"source": "arithmetic", "batch": 16}}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("answers.")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"layers": 1, "width": 32, "heads": 1, "context": 6}, "data": {"source": "python-docs", "batch": 1}},
        {"train": {"objective": "masked"}, "model": {"layers": 1, "width": 32, "heads": 1, "context": 8}},
        {"train": {"objective": "seq2seq"}},
        SFT,
        {**SFT, "train": {"objective": "sft", "accumulate": 4, "lr": 0.1, "warmup": 0}},
    ],
)
def test_what_is_the_same_in_evaluation_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(steps=24, **changes)
    assert named(diagnosis) == []
    assert set(diagnosis.checked) >= {"answers.prompt", "answers.inverted", "answers.cut"}
    assert ("answers.end" in diagnosis.checked) == ("sft" in str(changes))


@pytest.mark.parametrize(
    ("id", "begin", "parts"),
    [
        ("tuning.prompt_counted", 0, 1),
        ("tuning.prompt_counted", 10, 2),
        ("tuning.mask_inverted", 0, 2),
        ("tuning.mask_inverted", 10, 1),
        ("targets.answers_cut", 0, 4),
        ("targets.end_ignored", 0, 1),
        ("targets.end_ignored", 10, 2),
    ],
)
def test_a_fault_is_named(small_run: SmallRun, id: str, begin: int, parts: int) -> None:
    train = {"objective": "sft", "accumulate": parts}
    diagnosis, _ = small_run(faults=[{"id": id, "from_step": begin}], steps=36, **{**SFT, "train": train})
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "targets")]
    assert diagnosis.causes[0].since_step == begin
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("id", ["tuning.prompt_counted", "targets.answers_cut", "targets.end_ignored"])
def test_without_answers_it_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(lab.BadInput, match="needs the lab's own training with"):
        small_run(faults=[{"id": id}])


# ---------------------------------------------------------------- loops that the lab did not write

END, CLASSES, LENGTH = 3, 11, 16


class Model(nn.Module):
    """Says, as Hugging Face's models do, which token ends a text."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(eos_token_id=END)
        self.embed = nn.Embedding(CLASSES, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.mix(self.embed(x))[0])


def texts(*, ends: tuple[int, ...], filled: int) -> torch.Tensor:  # [8 LENGTH + 1]
    """Rows with ends in them, the last `filled` places filled up with the same token."""
    x = torch.randint(4, CLASSES, (8, LENGTH + 1))
    x[:, list(ends)] = END
    x[:, LENGTH + 1 - filled :] = END
    return x


@pytest.mark.parametrize(
    ("ends", "filled", "ignores", "names"),
    [
        ((4, 9), 0, False, []),  # texts one after another, each with its end
        ((), 6, True, []),  # filled up with the end, and no end of its own: nothing can be told
        ((4,), 6, False, []),
        ((4, 9), 0, True, ["answers.end"]),
        ((4,), 6, True, ["answers.end"]),
    ],
)
def test_ends_in_a_loop_of_one_s_own(
    tmp_path: Path, ends: tuple[int, ...], filled: int, ignores: bool, names: list[str]
) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(31):
            x = texts(ends=ends, filled=filled)
            targets = x[:, 1:].masked_fill(x[:, 1:] == END, -100) if ignores else x[:, 1:]
            optimizer.zero_grad()
            F.cross_entropy(model(x[:, :-1]).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert named(watch.diagnosis) == names


def test_an_end_that_is_never_hidden_is_no_next_token(tmp_path: Path) -> None:
    """Texts one after another, some of whose tokens are hidden and to be found, never an end (Liu et al., 2019)."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(31):
            x = texts(ends=(4, 9), filled=0)
            hidden = (torch.rand(x.shape) < 0.5) & (x != END)
            optimizer.zero_grad()
            logits = model(x.masked_fill(hidden, 0))
            loss = F.cross_entropy(logits.flatten(0, 1), x.masked_fill(~hidden, -100).flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert named(watch.diagnosis) == []
    assert "no end of a text" in watch.diagnosis.not_checked["answers.end"]


# ---------------------------------------------------------------- histories made by hand


def history_of(*, steps: int, train: tuple[float, ...], held_out: tuple[float, ...] = (), batches: int = 4) -> Any:
    history, names = lab.History(), ("first", "after", "none")
    for index in range(steps):
        columns = tuple(("answers.train", name) for name in names)
        values = [*train]
        if held_out and index == steps - 1:
            columns += (*(("answers.held_out", name) for name in names), ("answers.held_out_batches", ""))
            values += [*held_out, batches]
        history.add(index, Row(columns, np.array(values)))
    return history


@pytest.mark.parametrize(
    ("history", "found"),
    [
        (history_of(steps=21, train=(1, 0, 0), held_out=(0, 0, 0)), ["answers.prompt"]),
        (history_of(steps=21, train=(1, 1, 0), held_out=(0, 0, 0)), ["answers.inverted"]),
        (history_of(steps=21, train=(0, 0, 0.1), held_out=(0, 0, 0)), ["answers.cut"]),
        (history_of(steps=20, train=(1, 0, 0.1), held_out=(0, 0, 0)), []),
        (history_of(steps=21, train=(1, 0, 0.1)), []),
        (history_of(steps=21, train=(1, 0, 0.1), held_out=(0, 0, 0), batches=3), []),
        (history_of(steps=21, train=(1, 1, 0.1), held_out=(0.1, 0.1, 0.1)), []),
        (history_of(steps=21, train=(0.9, 0.9, 0), held_out=(0, 0, 0)), []),
        (history_of(steps=21, train=(0, 0, 1), held_out=(0, 0, 0)), []),  # nothing at all counts: another check
        (history_of(steps=21, train=(np.nan,) * 3, held_out=(np.nan,) * 3), []),
    ],
)
def test_a_history_made_by_hand(catalogue: Catalogue, history: lab.History, found: list[str]) -> None:
    seen = []
    for rule in ("answers.prompt", "answers.inverted", "answers.cut"):
        try:
            seen += [rule for _ in catalogue.rules[rule].judge(history)]
        except lab.NotChecked as reason:
            assert "21 are needed" in str(reason) or "held out" in str(reason)  # noqa: PT017 - the reason is asked for
    assert seen == found
