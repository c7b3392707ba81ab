"""Heads and the projection that they are split from: silent where each has its slice, and on nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from attach_loops import train

import lab
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.split")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 1, "width": 32, "heads": 1, "context": 8}},
        {"model": {"layers": 2, "width": 32, "heads": 8, "kv_heads": 2, "positions": "rope", "context": 24}},
        {"model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 1, "positions": "rope", "context": 24}},
        {"train": {"objective": "masked"}},
        {"train": {"objective": "seq2seq", "lr": 0.1, "warmup": 0}},
    ],
)
def test_heads_that_are_split_rightly_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert "split.bare" in diagnosis.checked
    assert not [s for s in diagnosis.symptoms if s.id.startswith("split.")]
    assert max(series.values.max() for _, series in history.each("split.error")) < 1e-5


def test_a_model_of_anybody_s_is_not_asked(tmp_path: Path) -> None:
    watch = train(tmp_path / "run", steps=3).watch
    assert watch is not None
    assert "no attention in this model" in watch.diagnosis.not_checked["split.bare"]


@pytest.mark.parametrize("choices", [{}, {"positions": "rope", "heads": 4, "kv_heads": 1}])
def test_a_bare_view_is_told_from_a_bare_merge(small_run: SmallRun, choices: dict[str, Any]) -> None:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24, **choices}
    for id in ("attention.wrong_split", "attention.wrong_merge"):
        diagnosis, _ = small_run(faults=[{"id": id, "at": "blocks.1.attn"}], model=model)
        assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "blocks.1.attn")]
        assert diagnosis.unexplained == ()


def test_both_together_pass_causality_and_are_found(small_run: SmallRun) -> None:
    both: list[dict[str, object]] = [
        {"id": f"attention.wrong_{name}", "at": "blocks.1.attn"} for name in ("split", "merge")
    ]
    diagnosis, history = small_run(faults=both)
    assert history.series("causality.future").values.max() < 1e-6
    assert {(cause.id, cause.at) for cause in diagnosis.causes} == {(str(part["id"]), str(part["at"])) for part in both}


@pytest.mark.parametrize(
    ("bare", "right", "found"),
    [(1e-7, 0.5, 1), (1e-7, 1e-7, 0), (0.5, 1e-7, 0), (0.4, 0.5, 0), (1e-7, 0.01, 0), (np.nan, np.nan, 0)],
)
def test_a_bare_view_and_nothing_else(bare: float, right: float, found: int) -> None:
    history = lab.History()
    for step in (0, 1):
        history.add(step, Row((("split.bare_error", "a.q"), ("split.error", "a.q")), np.array([bare, right])))
        assert len([*probes.split_bare.judge(history)]) == (found if step else 0)
