"""Several processes train one model: what one process alone would have trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lab import BadInput
from lab.files import METRICS
from lab.runtime.launch import JOB, LOG
from lab.runtime.run import run_scenario
from lab.scenario import Scenario
from lab.store import read_history

if TYPE_CHECKING:
    from pathlib import Path

    from lab import History
    from lab.catalogue import Catalogue

STEPS = 12


def scenario(train: dict[str, Any], **changes: Any) -> Scenario:
    return Scenario.model_validate(
        {
            "title": "team",
            "project": "distributed",
            "steps": STEPS,
            "model": {"layers": 2, "width": 32, "heads": 2, "context": 24},
            "data": {"source": "markov", "batch": 8},
            "train": {"warmup": 2, **train},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> History:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_scenario("alone", scenario({}), catalogue, folder)
    return read_history(folder / METRICS)


TEAMS: dict[str, dict[str, Any]] = {
    "data": {"ranks": 2},
    "data, two parts each": {"ranks": 2, "accumulate": 2},
    "data, optimiser shared": {"ranks": 2, "shard_optimizer": True},
    "tensor": {"ranks": 2, "parallel": "tensor"},
}


@pytest.mark.parametrize("name", TEAMS)
def test_two_processes_train_as_one(tmp_path: Path, catalogue: Catalogue, alone: History, name: str) -> None:
    folder = tmp_path / "run"
    outcome = run_scenario(name, scenario(TEAMS[name]), catalogue, folder)
    assert outcome.diagnosis.verdict == "healthy", outcome.diagnosis
    first, second = read_history(folder / METRICS), read_history(folder / "rank-1" / METRICS)
    assert first.last_step == second.last_step == STEPS - 1
    # The gradient of the first step, from equal weights, within what float32 rounds; the last, after 11 updates.
    ours, expected = first.series("gradient.total").values, alone.series("gradient.total").values
    np.testing.assert_allclose(ours[0], expected[0], rtol=2e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    np.testing.assert_allclose(first.last("loss.held_out"), alone.last("loss.held_out"), rtol=1e-4)
    for metric in ("gradient.total", "loss.held_out"):  # both ranks hold the same weights and gradients
        np.testing.assert_array_equal(first.series(metric).values, second.series(metric).values)
    if TEAMS[name].get("parallel") == "tensor":
        np.testing.assert_allclose(first.series("loss").values, alone.series("loss").values, rtol=1e-4)
    else:  # each has its own rows; together they have the batch
        both = (first.series("loss").values + second.series("loss").values) / 2
        np.testing.assert_allclose(both, alone.series("loss").values, rtol=1e-4)
        assert not np.array_equal(first.series("loss").values, second.series("loss").values)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path, catalogue: Catalogue, alone: History) -> None:
    run_scenario("parts", scenario({"accumulate": 4}), catalogue, tmp_path / "run")
    parts = read_history(tmp_path / "run" / METRICS)
    for metric in ("gradient.total", "loss"):
        np.testing.assert_allclose(parts.series(metric).values, alone.series(metric).values, rtol=1e-3)


def test_parts_with_unequal_targets_weigh_by_their_targets(tmp_path: Path, catalogue: Catalogue) -> None:
    histories = []
    for parts in (1, 4):
        asked = scenario({"objective": "masked", "accumulate": parts})
        run_scenario("masked", asked, catalogue, tmp_path / str(parts))
        histories.append(read_history(tmp_path / str(parts) / METRICS))
    for metric in ("gradient.total", "loss"):
        first, second = (history.series(metric).values for history in histories)
        np.testing.assert_allclose(first, second, rtol=1e-3)


def test_a_fault_in_every_process_is_named(tmp_path: Path, catalogue: Catalogue) -> None:
    broken = scenario({"ranks": 2}, fault=[{"id": "mask.future_leak", "at": "blocks.1.attn"}])
    outcome = run_scenario("leak", broken, catalogue, tmp_path / "run", twin=False)
    assert [(cause.id, cause.at) for cause in outcome.diagnosis.causes] == [("mask.future_leak", "blocks.1.attn")]


def test_what_a_process_refuses_is_told_in_a_line(tmp_path: Path, catalogue: Catalogue) -> None:
    refused = scenario({"ranks": 2}, fault=[{"id": "mask.future_leak", "at": "blocks.7.attn"}])
    with pytest.raises(BadInput, match=r"blocks\.7\.attn"):
        run_scenario("refused", refused, catalogue, tmp_path / "run", twin=False)
    assert (tmp_path / "run" / JOB).is_file()
    assert (tmp_path / "run" / LOG).is_file()


def test_layers_that_cannot_be_cut_are_refused(tmp_path: Path, catalogue: Catalogue) -> None:
    asked = scenario({"ranks": 2, "parallel": "tensor"})
    gated = asked.model_copy(update={"model": asked.model.model_copy(update={"activation": "swiglu"})})
    with pytest.raises(BadInput, match=r"model\.activation = 'gelu'"):
        run_scenario("gated", gated, catalogue, tmp_path / "run")


def test_rows_that_cannot_be_shared_are_refused_before_anything_starts(tmp_path: Path, catalogue: Catalogue) -> None:
    with pytest.raises(BadInput, match=r"data\.batch = 8 is no multiple of train\.ranks = 3"):
        run_scenario("odd", scenario({"ranks": 3}), catalogue, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["masked", "seq2seq"])
def test_two_processes_write_a_sample_whatever_they_are_trained_for(
    tmp_path: Path, catalogue: Catalogue, objective: str
) -> None:
    shared = scenario({"ranks": 2, "objective": objective}, steps=2, probes=[])
    outcome = run_scenario(objective, shared, catalogue, tmp_path / "run")
    assert outcome.facts["sample"]
