"""What changes between two updates: what a loop changes on purpose is silent, one bit and lost rows are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.store import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

RULES = {"integrity.weight_bit", "integrity.state_bit", "integrity.rows_reset"}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("integrity.")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"lr": 0.3, "warmup": 0, "accumulate": 2}},
        {"model": {"layers": 1, "width": 96, "heads": 2, "context": 8, "tied": True}},
        {"model": {"layers": 0, "width": 8, "heads": 1, "context": 8}, "train": {"evaluate_every": 3}},
        {"train": {"objective": "masked"}},
    ],
)
def test_an_update_is_all_that_changes_weights(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert set(diagnosis.checked) >= RULES
    assert named(diagnosis) == []
    assert history.series("integrity.changed").values.max() == 0
    assert history.series("integrity.state_changed").values.max() == 0


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ({"id": "weights.bit_flip", "from_step": 5}, "blocks.0.mlp.up.weight"),
        ({"id": "weights.bit_flip", "from_step": 1, "bit": 31, "at": "head"}, "head.weight"),
        (
            {"id": "weights.bit_flip", "from_step": 11, "bit": 0, "at": "blocks.1.attn.proj"},
            "blocks.1.attn.proj.weight",
        ),
        ({"id": "optimizer.state_flip", "from_step": 5}, "blocks.0.mlp.up.weight"),
        ({"id": "optimizer.state_flip", "from_step": 5, "key": "exp_avg", "bit": 23, "at": "tokens"}, "tokens.weight"),
    ],
)
def test_one_bit_is_named_with_its_place(small_run: SmallRun, fault: dict[str, object], at: str) -> None:
    diagnosis, history = small_run(faults=[fault])
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [
        (fault["id"], at, fault["from_step"])
    ]
    assert diagnosis.unexplained == ()
    kind = "state_" if fault["id"] == "optimizer.state_flip" else ""
    bits = history.series(f"integrity.{kind}bit").values
    assert bits[bits >= 0].tolist() == [fault.get("bit", 30)]


def test_a_bit_of_a_large_matrix_is_found_in_the_sum_of_its_row(small_run: SmallRun) -> None:
    fault = {"id": "weights.bit_flip", "from_step": 4, "bit": 13, "element": 4000}
    diagnosis, _ = small_run(faults=[fault], model={"layers": 1, "width": 64, "heads": 2, "context": 8}, steps=8)
    assert [(cause.id, cause.since_step) for cause in diagnosis.causes] == [("weights.bit_flip", 4)]


def test_rows_that_are_lost_are_named(small_run: SmallRun) -> None:
    fault = {"id": "weights.reset_rows", "from_step": 35, "std": 0.0}
    diagnosis, history = small_run(faults=[fault], steps=40, train={"lr": 0.01}, data={"source": "markov", "batch": 16})
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [("weights.reset_rows", "head.weight", 35)]
    rows = history.series("integrity.rows", "head.weight").values[0]
    assert history.series("integrity.rows_changed", "head.weight").values.max() == (rows + 1) // 2


@pytest.mark.parametrize(
    ("changed", "learned", "losses", "found"),
    [
        (4, 3, (2.0, 2.0, 2.0, 2.0, 2.0, 2.5), 1),
        (4, 3, (2.0, 2.0, 2.0, 2.0, 2.0, float("nan")), 1),
        (8, 5, (2.0, 2.0, 2.0, 2.0, 2.0, 2.5), 0),  # another checkpoint is loaded
        (4, 1, (2.0, 2.0, 2.0, 2.0, 2.0, 2.5), 0),  # classes that are new
        (4, 3, (2.0, 2.6, 2.0, 2.0, 2.0, 2.5), None),  # it may have been meant
    ],
)
def test_rows_have_to_be_learned_and_missed(
    catalogue: Any, changed: int, learned: int, losses: tuple[float, ...], found: int | None
) -> None:
    history = lab.History()
    columns = (
        ("integrity.rows_changed", "head"),
        ("integrity.rows_learned", "head"),
        ("integrity.rows", "head"),
        ("integrity.rows_turned", "head"),
        ("loss", ""),
    )
    for step, loss in enumerate(losses):
        last = step == len(losses) - 1
        history.add(step, Row(columns, np.array([changed * last, learned * last, 8.0, 0.0, loss])))
    rule = catalogue.rules["integrity.rows_reset"]
    if found is None:
        with pytest.raises(lab.NotChecked, match="does not show harm"):
            list(rule.judge(history))
    else:
        assert len(list(rule.judge(history))) == found


def clip(model: nn.Sequential, _step: int) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def normalise(model: nn.Sequential, _step: int) -> None:
    model.get_parameter("0.weight").data.div_(model.get_parameter("0.weight").data.norm(dim=1, keepdim=True))


def swap(model: nn.Sequential, step: int) -> None:
    if step == 12:
        for p in model.parameters():
            p.data.copy_(p.data * 0.5)


def prune(model: nn.Sequential, step: int) -> None:
    if step == 12:
        model.get_parameter("2.weight").data[torch.rand_like(model.get_parameter("2.weight")) < 0.5] = 0


def pad(model: nn.Sequential, _step: int) -> None:
    model.get_parameter("2.weight").data[0] = 0


def one_number(model: nn.Sequential, step: int) -> None:
    if step == 12:
        model.get_parameter("0.bias").data[0] = 0.3


def all_rows(model: nn.Sequential, step: int) -> None:
    if step == 12:
        model[2].reset_parameters()  # type: ignore[operator]


def shrink(model: nn.Sequential, step: int) -> None:
    if step == 12:
        model.get_parameter("2.weight").data[:2] *= 0.9


def nothing(_model: nn.Sequential, _step: int) -> None:
    pass


def watched(folder: Path, change: Callable[[nn.Sequential, int], None], kind: Any) -> lab.Diagnosis:
    """A classifier of anybody's, whose loop does something to the weights before each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 5))
    optimizer = kind(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=folder, probes=["integrity", "loss"]) as watch:
        for step in range(24):
            change(model, step)
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :5].argmax(-1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watch.diagnosis


@pytest.mark.parametrize("change", [nothing, clip, normalise, swap, prune, shrink, pad, one_number, all_rows])
def test_what_a_loop_does_on_purpose_is_silent(tmp_path: Path, change: Callable[[nn.Sequential, int], None]) -> None:
    assert named(watched(tmp_path / "run", change, torch.optim.Adam)) == []


def test_rows_that_are_drawn_anew_are_seen_before_the_loss_shows_it(tmp_path: Path) -> None:
    def redraw(model: nn.Sequential, step: int) -> None:
        if step == 3:
            model.get_parameter("2.weight").data[:2] = torch.randn(2, 64) * 0.05

    diagnosis = watched(tmp_path / "run", redraw, torch.optim.Adam)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [
        ("weights.reset_rows", "2.weight", 3)
    ]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam])
def test_a_bit_is_seen_in_any_loop(tmp_path: Path, kind: Any) -> None:
    def flip(model: nn.Sequential, step: int) -> None:
        if step == 9:
            model.get_parameter("0.weight").data.view(torch.int32)[3, 2] ^= 1 << 25

    diagnosis = watched(tmp_path / "run", flip, kind)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [
        ("weights.bit_flip", "0.weight", 9)
    ]
