"""Pairs of answers: DPO in its own form is silent, and what is exchanged or scored otherwise is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from judging import told

import lab
from lab.manager import discover
from lab.runtime.run import run_scenario
from lab.scenario import load_scenario
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

RULES = {"pairs.swapped", "pairs.scored_apart"}
SCENARIO = {
    "alignment.pairs_swapped": "the-worse-the-better",
    "alignment.reference_averaged": "not-even-at-the-start",
}


def outcome_of(folder: Path, name: str, begin: int | None, **train: Any) -> lab.Diagnosis:
    """A short run of a scenario; with its fault from a step on, or without."""
    scenario = load_scenario(name)[1]
    fault = []
    if begin is not None:
        section = scenario.fault[0]
        fault = [section.model_validate({**section.model_dump(), "from_step": begin})]
    changed = {"train": scenario.train.model_copy(update=train), "steps": 34 if begin else 22}
    short = scenario.model_copy(update={**changed, "fault": fault, "check": []})
    return run_scenario(name, short, discover(), folder, twin=False).diagnosis


@pytest.mark.parametrize("train", [{"accumulate": 2}, {"lr": 3e-3, "warmup": 0, "evaluate_every": 5}, {"lora_rank": 2}])
def test_dpo_as_it_should_be_is_silent(tmp_path: Path, train: dict[str, Any]) -> None:
    diagnosis = outcome_of(tmp_path / "run", "the-worse-the-better", None, **train)
    assert set(diagnosis.checked) >= RULES
    assert not [s for s in diagnosis.symptoms if s.id in RULES]


@pytest.mark.parametrize("id", SCENARIO)
@pytest.mark.parametrize(("begin", "parts"), [(0, 2), (5, 1)])
def test_a_fault_is_named(tmp_path: Path, id: str, begin: int, parts: int) -> None:
    diagnosis = outcome_of(tmp_path / "run", SCENARIO[id], begin, accumulate=parts)
    place = "loss" if "swapped" in id else "reference"
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, place)]
    assert diagnosis.causes[0].since_step in ((5, 6, 10) if begin else (0, 1, 2))
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("id", SCENARIO)
def test_without_pairs_it_is_refused_and_not_checked(small_run: SmallRun, id: str) -> None:
    with pytest.raises(lab.BadInput, match=f"{id}: needs a reference model"):
        small_run(faults=[{"id": id}])
    assert {small_run(steps=1)[0].not_checked[rule].split(": ")[-1] for rule in RULES} == {"no reference in this run"}


def history_of(loss: float, dpo: float, swapped: float, gaps: tuple[float, ...], steps: int = 3) -> lab.History:
    history = lab.History()
    named = [("pairs.loss", ""), ("pairs.form", "dpo"), ("pairs.form", "swapped")]
    named += [("pairs.gap", f"{who}.{how}") for who in ("policy", "reference") for how in ("sum", "mean")]
    for index in range(steps):
        history.add(index, Row(tuple(named), np.array([loss, dpo, swapped, *gaps])))
    return history


BOTH_SUMS = (0.0, 0.8, 0.0, 0.8)


@pytest.mark.parametrize(
    ("history", "found"),
    [
        (history_of(0.7, 0.6, 0.7, BOTH_SUMS), {"pairs.swapped"}),
        (history_of(0.7, 0.6, 0.7, BOTH_SUMS, steps=2), set()),
        (history_of(0.6931, 0.6931, 0.6931, BOTH_SUMS), set()),  # a margin of 0
        (history_of(0.65, 0.6, 0.7, BOTH_SUMS), set()),  # smoothed, or another loss
        (history_of(0.6, 0.6, 0.7, (0.8, 0.0, 0.8, 0.0)), set()),  # means on both sides
        (history_of(0.6, 0.6, 0.7, (0.0, 0.0, 0.0, 0.0)), set()),  # answers of one token
        (history_of(0.6, 0.6, 0.7, (0.0, 0.8, 0.8, 0.0)), {"pairs.scored_apart"}),
        (history_of(0.6, 0.6, 0.7, (0.8, 0.0, 0.0, 0.8)), {"pairs.scored_apart"}),
        (history_of(0.6, 0.6, 0.7, (0.0, 0.8, 0.3, 0.4)), set()),  # a reference that has moved
        (history_of(np.nan, np.nan, np.nan, (np.nan,) * 4), set()),
    ],
)
def test_a_history_made_by_hand(catalogue: Catalogue, history: lab.History, found: set[str]) -> None:
    assert {rule for rule in RULES for _ in told(catalogue.rules[rule].judge(history))} == found
