"""Rows and gradients of several processes: silent where nothing is wrong, and right about chance."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from processes import in_processes

from lab import NotChecked
from lab.context import Step
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

shards = importlib.import_module("lab.probes.shards")
RULES = {"ranks.apart", "shards.same", "shards.overlap"} | {
    f"reduction.{name}" for name in ("summed", "divided", "early", "left_out")
}

HEALTHY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"accumulate": 4, "clip": 0.01, "lr": 0.03}, {}),
    ({"ranks": 3, "shard_optimizer": True}, {"data": {"source": "python-docs", "batch": 9}}),
    ({"parallel": "tensor"}, {}),
    ({}, {"data": {"source": "markov", "batch": 2}}),  # one row each
    # One token, or very few: rows are equal by nature.
    (
        {},
        {"data": {"source": "markov", "batch": 32, "vocabulary": 2}, "model": {"layers": 1, "width": 32, "context": 8}},
    ),
]


@pytest.mark.parametrize(("train", "changes"), HEALTHY)
def test_healthy_processes_are_silent(
    tmp_path: Path, catalogue: Catalogue, train: dict[str, Any], changes: dict[str, Any]
) -> None:
    diagnosis, histories = in_processes(tmp_path, catalogue, train_=train, **{"steps": 21, **changes})
    assert diagnosis.verdict == "healthy", diagnosis.symptoms
    if train.get("parallel") == "tensor":
        assert all("weights are cut" in diagnosis.not_checked[name] for name in RULES - {"ranks.apart"})
        return
    assert {"shards.same", "shards.overlap", "reduction.left_out"} <= diagnosis.checked.keys()
    for history in histories:
        assert history.series("reduction.ratio").values == pytest.approx(1, rel=1e-5)
        assert history.series("reduction.error", "mean").values == pytest.approx(0, abs=1e-5)


def test_one_process_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, history = small_run(steps=2)
    assert all("there is one process" in diagnosis.not_checked[name] for name in RULES)
    assert not {"shards.shared", "reduction.ratio"} & set(history.metrics)


# ---------------------------------------------------------------- rows dealt out by hand


def dealt(looks: Iterator[torch.Tensor], catalogue: Catalogue) -> dict[str, int]:
    """Show rows [W B] of each look to the probe; return the rules that find something, and since when."""
    probe, history = shards.Shards(), History()
    probe.lab_start()
    for index, rows in enumerate(looks):
        step = Step(index)
        message = torch.zeros(len(rows), 1 + 2 * shards.EDGE, dtype=torch.int64)
        message[:, 0] = rows.shape[1]
        message[:, 1 : 1 + rows.shape[1]] = rows
        probe._compare(step, message, 0)
        step.record("ranks.alike", 1.0)
        history.add(index, step.flush()[0])
    found: dict[str, int] = {}
    for name in ("shards.same", "shards.overlap"):
        try:
            found |= {symptom.id or name: symptom.since for symptom in catalogue.rules[name].judge(history)}
        except NotChecked:
            continue
    return found


def rows_of(kind: str, seed: int, size: int, kinds: int = 1 << 40) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for index in range(20):
        rows = torch.randint(1, kinds, (3, size), generator=draw)
        if kind == "same":
            rows[:] = rows[0]
        elif kind == "late" and index >= 8:
            rows[1, 0] = rows[0, -1]
        elif kind == "overlap":
            rows[1:, 0] = rows[:-1, -1]
        elif kind == "anchor":  # each process is shown one row again in every step
            rows[:, 0] = 7
        elif kind == "repeats":  # within a process
            rows[:, 0] = rows[:, 1]
        elif kind == "constant":
            rows[:] = 7
        elif kind == "fixed":  # one batch for ever, for all
            rows[:] = torch.arange(1, size + 1)
        elif kind == "sampler" and index == 3:  # the end of an epoch is filled up
            rows[1, -1] = rows[0, 0]
        yield rows


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("apart", {}),
        ("same", {"shards.same": 0}),
        ("overlap", {"shards.overlap": 0}),
        ("late", {"shards.overlap": 8}),
        ("anchor", {}),
        ("repeats", {}),
        ("constant", {}),
        ("fixed", {}),
        ("sampler", {}),
    ],
)
def test_who_has_which_rows(catalogue: Catalogue, kind: str, size: int, answer: dict[str, int]) -> None:
    assert dealt(rows_of(kind, 0, size), catalogue) == answer


@pytest.mark.parametrize("kinds", [2, 3, 5, 9, 33])
def test_few_rows_are_equal_by_chance(catalogue: Catalogue, kinds: int) -> None:
    for seed in range(8):
        for size in (1, 2, 6):
            assert dealt(rows_of("apart", seed, size, kinds), catalogue) == {}


def test_one_row_each_says_nothing(catalogue: Catalogue) -> None:
    assert dealt(rows_of("same", 0, 1), catalogue) == {}


def test_matchings() -> None:
    for rows in range(1, 7):
        assert shards._matchings(rows) == pytest.approx(math.log10(math.prod(range(1, 2 * rows, 2))))


# ---------------------------------------------------------------- gradients by hand


def reductions(loss: float, ratio: list[float], error: float, alike: float = 1.0) -> History:
    history = History()
    columns = (
        *((f"reduction.{name}", "") for name in ("ratio", "world", "parts", "averaged")),
        *(("reduction.error", form) for form in ("mean", "early")),
        *(("ranks.alike", ""), ("objective.loss", ""), ("objective.cross_entropy", "")),
    )
    for index, value in enumerate(ratio):
        history.add(index, Row(columns, np.array([value, 4, 2, 3, error, 0 if error else 1, alike, loss, 2.0])))
    return history


@pytest.mark.parametrize(
    ("rule", "history", "answer"),
    [
        ("summed", reductions(2, [4, 4], 0), "found"),
        ("summed", reductions(2, [1, 4], 0), ""),  # one look
        ("summed", reductions(2, [4, 4, 1], 0), ""),  # it was, and is not any more
        ("summed", reductions(2, [3.5, 3.5], 0), ""),
        ("summed", reductions(0.5, [4, 4], 0), "no mean over tokens"),  # divided beforehand
        ("summed", reductions(2, [4, 4], 0.1), "no multiple"),
        ("summed", reductions(2, [math.nan] * 3, math.nan), "no multiple"),
        ("summed", reductions(2, [4, 4], 0, alike=0.5), "weights are cut"),
        ("divided", reductions(2, [0.25, 0.25], 0), "found"),
        ("divided", reductions(2, [1, 1], 0), ""),
        ("divided", reductions(8, [0.25, 0.25], 0), "no mean over tokens"),  # multiplied beforehand
        ("early", reductions(2, [1, 1], 0.3), "found"),
        ("early", reductions(2, [1, 1], 0.005), ""),
        ("early", reductions(2, [1], 0.3), ""),
        ("early", reductions(2, [1, 1], math.nan), ""),
    ],
)
def test_what_a_gradient_is_a_multiple_of(catalogue: Catalogue, rule: str, history: History, answer: str) -> None:
    try:
        found = ["found" for _ in catalogue.rules[f"reduction.{rule}"].judge(history)]
    except NotChecked as reason:
        found = [str(reason)]
    assert bool(found) == bool(answer)
    assert all(answer in text for text in found)


def test_a_batch_that_is_no_tokens_takes_part_in_the_message() -> None:
    for inputs in (None, torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)):
        message = shards._edges(inputs)
        assert message.shape == (1 + 2 * shards.EDGE,)
        assert not message.any()
    many = shards._edges(torch.randint(9, (100, 5)))
    assert many[0] == 2 * shards.EDGE
    assert len(many) == 1 + 2 * shards.EDGE
