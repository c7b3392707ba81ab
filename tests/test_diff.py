"""Two runs are compared in the order in which things came about."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab
from lab.cli import status_of
from lab.diff import compare, distance, points
from lab.results import Results, load
from lab.runtime.run import run_scenario
from lab.scenario import Scenario
from lab.store import History, Row

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue

# A fault, where it acts, what differs first there, and at which step.
FAULTS = {
    "mask.future_leak": ({"at": "blocks.1.attn"}, "blocks.1.attn.pattern", "value", 0),
    "attention.no_scale": ({"at": "blocks.1.attn"}, "blocks.1.attn.pattern", "value", 0),
    # A norm that is missing is no site: what comes after it is the first that both recorded.
    "norm.missing": ({"at": "blocks.0.mlp_norm"}, "blocks.0.mlp.up.out", "value", 0),
    "ffn.no_activation": ({"at": "blocks.1.mlp"}, "blocks.1.mlp.hidden", "value", 0),
    "head.scaled": ({}, "head.out", "value", 0),
    "loop.no_zero_grad": ({}, "head.weight", "gradient", 1),
    "targets.not_shifted": ({}, "", "loss", 0),
    "data.same_batch": ({}, "", "batch", 1),
    "init.too_large": ({"at": "blocks.0.mlp"}, "blocks.0.mlp.up.weight", "weights at the start", 0),
}


def run(folder: Path, catalogue: Catalogue, *faults: dict[str, object], **changes: object) -> Results:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24}
    about = {"title": "small", "project": "decoder", "steps": 3, "model": model, "fault": [*faults]}
    scenario = Scenario.model_validate({**about, "data": {"source": "markov", "batch": 4}, **changes})
    run_scenario("small", scenario, catalogue, folder, twin=False)
    return load(folder)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Results:
    return run(tmp_path_factory.mktemp("healthy") / "run", catalogue)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_where_two_runs_part(tmp_path: Path, catalogue: Catalogue, healthy: Results, fault: str) -> None:
    parameters, at, stage, step = FAULTS[fault]
    found = compare(run(tmp_path / "run", catalogue, {"id": fault, **parameters}), healthy, 0.0)
    assert found.first is not None
    assert (found.first.at, found.first.stage, found.first.step) == (at, stage, step)
    assert found.closest == 0.0  # all before it is equal to the last bit
    assert found.settings.keys() == {"fault"}


def test_a_run_is_equal_to_itself_done_again(tmp_path: Path, catalogue: Catalogue, healthy: Results) -> None:
    found = compare(run(tmp_path / "run", catalogue), healthy, 0.0)
    assert found.first is None
    assert found.settings == {}
    assert sum(found.compared.values()) > 100


def test_another_seed_shows_in_the_first_thing_that_it_changes(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    found = compare(run(tmp_path / "run", catalogue, seed=1), healthy)
    assert found.settings == {"seed": (1, 0)}
    assert found.first is not None
    assert found.first.stage == "weights at the start"


def history(values: dict[tuple[str, str], list[float]], order: dict[str, int]) -> History:
    made = lab.History(order=order)
    for step in range(max(map(len, values.values()))):
        present = {key: series[step] for key, series in values.items() if step < len(series)}
        made.add(step, Row(tuple(present), np.array([*present.values()])))
    return made


def test_values_go_forward_gradients_backward_and_a_later_step_comes_later() -> None:
    order = {"a.out": 0, "b.out": 1}
    names = [("gradient.site", "a.out"), ("gradient.site", "b.out"), ("activation.rms", "b.out"), ("loss", "")]
    same = history({**{name: [1.0, 1.0] for name in names}, ("activation.rms", "a.out"): [1.0, 1.0]}, order)
    seen = [(point.step, point.metric, point.at) for point in points(same, same)]
    one = [
        ("activation.rms", "a.out"),
        ("activation.rms", "b.out"),
        ("loss", ""),
        ("gradient.site", "b.out"),
        ("gradient.site", "a.out"),
    ]
    assert seen == [(step, *name) for step in (0, 1) for name in one]


@given(st.floats(), st.floats())
def test_a_distance_is_symmetric_and_0_only_between_equals(x: float, y: float) -> None:
    assert distance(x, y) == distance(y, x)
    assert distance(x, x) == 0
    if np.isfinite(x) != np.isfinite(y):
        assert distance(x, y) == np.inf


# ---------------------------------------------------------------- the command


def test_the_command_tells_where_and_answers_with_its_status(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run(tmp_path / "run", catalogue, {"id": "norm.missing", "at": "blocks.0.mlp_norm"})
    assert status_of(["diff", str(broken.folder), str(healthy.folder)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "agree to the last bit weights at the start" in told
    assert "they part at step 0, in the value of blocks.0.mlp.up.out: activation.rms" in told
    assert status_of(["diff", str(healthy.folder), str(healthy.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]


def test_what_cannot_be_compared(tmp_path: Path, healthy: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["diff", str(healthy.folder), str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_a_fault_that_begins_late_is_dated_by_what_is_recorded_in_each_step(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    late = {"id": "attention.no_scale", "at": "blocks.1.attn", "from_step": 7}
    a, b = run(tmp_path / "a", catalogue, late, steps=12), run(tmp_path / "b", catalogue, steps=12)
    found = compare(a, b)
    assert found.first is not None
    assert found.place is not None
    assert (found.first.step, found.first.stage) == (7, "loss")
    assert found.place.step == 10  # weights have moved apart since: what is inside was not recorded between
