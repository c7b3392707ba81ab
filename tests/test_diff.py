"""Two runs are compared in the order in which things came about, and by what rounding was measured to do in them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lab
from lab.cli import status_of
from lab.diff import compare
from lab.explain import explain
from lab.points import distance, merged, points
from lab.results import Results, load
from lab.runtime.run import run_once
from lab.scenario import Scenario, make_faults
from lab.stages import PARTS
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from lab.catalogue import Catalogue, Plugin


def run(
    folder: Path, catalogue: Catalogue, *faults: dict[str, object], plugins: tuple[Plugin, ...] = (), **changes: object
) -> Results:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24}
    about = {"title": "small", "project": "decoder", "steps": 3, "model": model, "fault": [*faults]}
    scenario = Scenario.model_validate({**about, "data": {"source": "markov", "batch": 4}, **changes})
    made = make_faults(scenario, catalogue, "small")
    run_once("small", scenario, catalogue, folder, made, torch.device("cpu"), [*plugins])
    return load(folder)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Results:
    return run(tmp_path_factory.mktemp("healthy") / "run", catalogue)


def test_a_run_is_equal_to_itself_done_again(tmp_path: Path, catalogue: Catalogue, healthy: Results) -> None:
    again = run(tmp_path / "run", catalogue)
    for tolerance in (None, 0.0):
        found = compare(again, healthy, tolerance)
        assert found.first is None
        assert found.where == ""
        assert found.settings == {}
        assert found.count > 400
        assert max(agreed.closest for agreed in (*found.earlier, *found.before)) == 0.0
    assert "equal to the last bit" in explain(found)


# ---------------------------------------------------------------- float noise, and what is more than that


class Replaces(lab.Plugin):
    """Replaces the value at some sites, from a step on."""

    def __init__(self, pattern: str, change: Callable[[Tensor], Tensor], from_step: int = 0) -> None:
        self.pattern, self.change, self.from_step = pattern, change, from_step

    def lab_start(self, run: lab.Run) -> None:
        run.sites.replace(self.pattern, self.change, lambda: run.step.index >= self.from_step)


def explicit() -> Replaces:
    """What replaces scores, by themselves, takes the fused kernel away: the same sums in another order."""
    return Replaces("blocks.*.attn.scores", lambda x: x)


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": {"lr": 0.01, "warmup": 0}}, {"model": {"layers": 4, "width": 64, "heads": 4, "positions": "rope"}}],
    ids=["plain", "fast", "deep"],
)
def test_attention_by_another_kernel_agrees_within_float_noise(
    tmp_path: Path, catalogue: Catalogue, changes: dict[str, Any]
) -> None:
    fused = run(tmp_path / "fused", catalogue, steps=12, **changes)
    plain = run(tmp_path / "explicit", catalogue, plugins=(explicit(),), steps=12, **changes)
    found = compare(fused, plain)
    assert found.first is None, explain(found)
    assert found.lost is None
    assert compare(fused, plain, 0.0).first is not None  # they do differ
    assert "agree within what rounding explains" in explain(found)


def test_a_batch_in_two_parts_agrees_within_float_noise(tmp_path: Path, catalogue: Catalogue) -> None:
    whole = run(tmp_path / "whole", catalogue, steps=6)
    parts = run(tmp_path / "parts", catalogue, steps=6, train={"accumulate": 2})
    found = compare(whole, parts)
    assert found.first is None, explain(found)
    assert found.only == ((), ())
    assert found.settings == {"train.accumulate": (1, 2)}
    compared = {agreed.part for agreed in (*found.earlier, *found.before)}
    assert {"weight", "batch", "value", "loss", "gradient", "norm", "update"} <= compared


SMALL_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": lambda x: x * (1 + 1e-4),
    "another": lambda x: x + 1e-4 * x.detach().std() * torch.sin(torch.arange(x.numel()).view_as(x) * 1.7),
    "one row": lambda x: torch.cat([x[:1] * (1 + 1e-3), x[1:]]),
}


@pytest.mark.parametrize("beside", ["same kernel", "another kernel"])
@pytest.mark.parametrize("change", SMALL_CHANGES)
def test_a_change_of_one_in_ten_thousand_is_found_where_it_is(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, change: str, beside: str
) -> None:
    plugins = (Replaces("blocks.1.mlp.out", SMALL_CHANGES[change]), *([explicit()] if beside != "same kernel" else []))
    found = compare(run(tmp_path / "run", catalogue, plugins=plugins), healthy)
    assert found.first is not None
    assert (found.first.step, found.first.part, found.first.at) == (0, "value", "blocks.1.mlp.out")
    assert found.where == "blocks.1.mlp"
    assert found.after == "blocks.1.mlp.down.out"
    assert found.first.relative > 2e-5
    assert max(agreed.closest for agreed in found.before) < 2e-6


def test_elements_that_only_change_places_are_seen(tmp_path: Path, catalogue: Catalogue, healthy: Results) -> None:
    found = compare(run(tmp_path / "run", catalogue, plugins=(Replaces("blocks.0.mlp.hidden", _turned),)), healthy)
    assert found.first is not None
    assert (found.first.at, found.first.metric) == ("blocks.0.mlp.hidden", "fingerprint.value_signed")


def _turned(x: Tensor) -> Tensor:
    return x.roll(1, -1)


def test_a_change_that_begins_late_is_dated_where_all_before_is_equal(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    plugins = (Replaces("blocks.0.out", SMALL_CHANGES["another"], from_step=2),)
    found = compare(run(tmp_path / "run", catalogue, plugins=plugins), healthy)
    assert found.first is not None
    assert (found.first.step, found.where) == (2, "blocks.0")
    assert all(agreed.closest == 0 for agreed in found.earlier)
    assert "numbers of the steps before step 2 are equal to the last bit" in explain(found)


def test_where_nobody_looked_the_step_is_told_and_the_place_is_not(tmp_path: Path, catalogue: Catalogue) -> None:
    late = {"id": "attention.no_scale", "at": "blocks.1.attn", "from_step": 7}
    a, b = run(tmp_path / "a", catalogue, late, steps=12), run(tmp_path / "b", catalogue, steps=12)
    found = compare(a, b)
    assert found.first is not None
    assert found.place is not None
    assert (found.first.step, found.first.part, found.where) == (7, "loss", "loss")
    assert found.place.step == 10  # weights have moved apart since
    assert "next recorded by both at step 10, when weights had moved apart" in explain(found)
    assert 7 not in found.compared


def test_a_run_in_another_format_is_named_as_such(tmp_path: Path, catalogue: Catalogue, healthy: Results) -> None:
    half = Replaces("blocks.1.attn.out", lambda x: x.bfloat16().mul(1).float())
    found = compare(run(tmp_path / "run", catalogue, plugins=(half,)), healthy)
    assert found.coarser is not None
    assert found.coarser[0] == "blocks.1.attn.out"
    assert found.coarser[1] > 1e-3
    assert found.coarser[2] < 1e-5
    assert found.where == "blocks.1.attn"
    assert "they compute in other formats" in explain(found)


# ---------------------------------------------------------------- what is not in the model


class Draws(lab.Plugin):
    """Draws one number more than the run it is in, as somebody's new code might."""

    def lab_update(self, run: lab.Run) -> None:
        if run.step.index == 1:
            torch.rand(1)


def test_a_number_that_one_run_drew_and_the_other_did_not(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    found = compare(run(tmp_path / "run", catalogue, plugins=(Draws(),)), healthy)
    assert found.first is not None
    assert (found.first.step, found.first.part, found.first.at) == (2, "random", "torch")
    assert found.where == "random numbers"
    assert "drew numbers that the other did not" in explain(found)


def test_another_seed_shows_in_the_first_thing_that_it_changes(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    found = compare(run(tmp_path / "run", catalogue, seed=1), healthy)
    assert found.settings == {"seed": (1, 0)}
    assert found.first is not None
    assert (found.first.part, found.where) == ("weight", "model")


def test_another_rate_is_seen_before_what_it_does(tmp_path: Path, catalogue: Catalogue, healthy: Results) -> None:
    found = compare(run(tmp_path / "run", catalogue, train={"lr": 0.0030003}), healthy)
    assert found.first is not None
    assert (found.first.step, found.first.part, found.where) == (0, "rate", "schedule")
    assert found.settings == {"train.lr": (0.0030003, 0.003)}


def test_settings_of_modules_and_of_the_optimiser_are_told(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    found = compare(run(tmp_path / "run", catalogue, train={"weight_decay": 0.2}), healthy)
    assert found.settings == {"train.weight_decay": (0.2, 0.1), "set.optimizer.0.weight_decay": (0.2, 0.1)}
    assert found.first is not None
    assert (found.first.part, found.where) == ("update", "optimizer")


def test_a_layer_that_one_model_has_and_the_other_has_not(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    three = run(tmp_path / "run", catalogue, model={"layers": 3, "width": 32, "heads": 2, "context": 24})
    found = compare(three, healthy)
    assert "blocks.2.attn.out" in found.only[0]
    assert found.only[1] == ()
    assert found.settings["model.layers"] == (3, 2)


def test_runs_of_different_length_are_compared_as_far_as_both_go(
    tmp_path: Path, catalogue: Catalogue, healthy: Results
) -> None:
    # Other than in length: no rate depends on it while it is warmed up.
    found = compare(run(tmp_path / "run", catalogue, steps=5), healthy)
    assert found.first is None
    assert found.steps == (5, 3)
    assert "The first run has 5 steps, the second 3 steps; only those of both are compared." in explain(found)


# ---------------------------------------------------------------- the order, and what a distance is


def history(values: dict[tuple[str, str], list[float]], order: dict[str, int], **stages: lab.Stage) -> History:
    made = lab.History(order=order, stages=stages)
    for step in range(max(map(len, values.values()))):
        present = {key: series[step] for key, series in values.items() if step < len(series)}
        made.add(step, Row(tuple(present), np.array([*present.values()])))
    return made


def test_values_go_forward_gradients_backward_and_a_later_step_comes_later() -> None:
    order = {"a.out": 0, "b.out": 1}
    stages = {"back": lab.Stage("gradient"), "loss": lab.Stage("loss"), "size": lab.Stage("value")}
    names = [("back", "a.out"), ("back", "b.out"), ("size", "b.out"), ("loss", ""), ("unstaged", "")]
    same = history({**{name: [1.0, 1.0] for name in names}, ("size", "a.out"): [1.0, 1.0]}, order, **stages)
    seen = [(point.step, point.metric, point.at) for point in points(same, same, order)]
    one = [("size", "a.out"), ("size", "b.out"), ("loss", ""), ("back", "b.out"), ("back", "a.out")]
    assert seen == [(step, *name) for step in (0, 1) for name in one]


def test_parts_stand_in_the_order_in_which_a_step_goes_through_them(healthy: Results) -> None:
    steps = [(point.step, list(PARTS).index(point.part)) for point in points(healthy.history, healthy.history, {})]
    assert steps == sorted(steps)


@given(st.floats(), st.floats())
def test_a_distance_is_symmetric_and_0_only_between_equals(x: float, y: float) -> None:
    assert distance(x, y) == distance(y, x)
    assert distance(x, x) == 0
    if np.isfinite(x) != np.isfinite(y):
        assert distance(x, y) == np.inf


def test_a_signed_number_is_measured_against_its_size() -> None:
    stages = {"size": lab.Stage("value"), "signed": lab.Stage("value", "signed", "size")}
    a, b = (history({("size", "x"): [2.0], ("signed", "x"): [near]}, {"x": 0}, **stages) for near in (1e-9, -1e-9))
    assert [point.relative for point in points(a, b, {"x": 0})] == [0.0, 1e-9]


def test_a_gradient_that_only_one_run_has_is_a_difference_and_a_site_that_has_another_name_is_none() -> None:
    stages = {"w": lab.Stage("weight"), "g": lab.Stage("gradient"), "v": lab.Stage("value")}
    values = {("w", "a"): [1.0], ("w", "b"): [1.0], ("g", "a"): [1.0], ("v", "x"): [1.0]}
    a = history(values, {}, **stages)
    b = history({**values, ("g", "b"): [1.0], ("v", "y"): [1.0]}, {}, **stages)
    assert [(p.at, p.part) for p in points(a, b, {}) if p.relative] == [("b", "gradient")]


def test_orders_are_joined_with_what_one_lacks_in_its_place() -> None:
    a, b = {"in": 0, "mid": 1, "out": 2}, {"in": 0, "norm": 1, "out": 2}
    assert [*merged(a, b)] == ["in", "norm", "mid", "out"]
    assert merged(a, a) == a


# ---------------------------------------------------------------- from the folders alone


@lab.probe("spread", title="Widths", stages={"spread.width": lab.Stage("value")})
class Spread(lab.Probe):
    """A stranger's probe: its metric takes part in a comparison since it says where it belongs."""

    def lab_start(self, run: lab.Run) -> None:
        self._run = run
        self.read(run, "blocks.*.out", self._see)

    def _see(self, site: lab.Site, value: Tensor) -> None:
        self._run.step.record("spread.width", value.detach().amax() * (2.0 if site.name.startswith("blocks.1") else 1))


def test_a_plugins_metric_takes_part_and_its_folder_says_so(tmp_path: Path, catalogue: Catalogue) -> None:
    a = run(tmp_path / "a", catalogue, plugins=(Spread(),), probes=["loss"])
    b = run(tmp_path / "b", catalogue, plugins=(Spread(), Replaces("blocks.1.out", _turned)), probes=["loss"])
    assert "spread" not in catalogue.probes
    assert load(a.folder).history.stages["spread.width"] == lab.Stage("value")
    found = compare(load(a.folder), load(b.folder), 0.0)
    assert found.first is not None
    assert {point.metric for point in points(a.history, b.history, {})} == {"spread.width", "loss", "loss.held_out"}
    assert not compare(a, a).measured
    assert "was measured in neither run" in explain(compare(a, b))


def test_stages_of_a_later_version_are_passed_over() -> None:
    assert lab.Stage.read("value signed fingerprint.value") == lab.Stage("value", "signed", "fingerprint.value")
    for stage in (
        lab.Stage("loss"),
        lab.Stage("value", "signed", "size"),
        lab.Stage("experiment", "share", about="cache"),
        lab.Stage("value", "signed", "size", "cache"),
    ):
        assert lab.Stage.read(stage.text) == stage
    assert lab.Stage("loss").text == "loss number"
    assert lab.Stage.read("dream number") is None
    assert lab.Stage.read("value unheard_of") is None


# ---------------------------------------------------------------- the command


def test_the_command_tells_where_and_answers_with_its_status(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run(tmp_path / "run", catalogue, {"id": "attention.no_scale", "at": "blocks.1.attn"})
    assert status_of(["diff", str(broken.folder), str(healthy.folder)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "they part at step 0 at blocks.1.attn.pattern, in the value" in told
    assert (
        "At step 0 the weights before the step, random state, training mode, weights that the optimiser holds, "
        "learning rate and batch are equal to the last bit. "
        "The first difference is blocks.1.attn.pattern, in the value, at step 0:"
    ) in told
    assert "is equal to the last bit" in told
    assert "look at blocks.1.attn.pattern" in told
    assert status_of(["diff", str(healthy.folder), str(healthy.folder), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["equal"]
    assert "equal to the last bit" in same["explanation"]
    assert status_of(["diff", str(broken.folder), str(healthy.folder), "--json"]) == 1
    other = json.loads(capsys.readouterr().out)
    assert (other["first"]["at"], other["first"]["step"], other["where"]) == (
        "blocks.1.attn.pattern",
        0,
        "blocks.1.attn.pattern",
    )


def test_a_tolerance_is_used_in_place_of_what_was_measured(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", catalogue, train={"lr": 0.0030003}).folder
    assert status_of(["diff", str(folder), str(healthy.folder), "--tolerance", "0.05"]) == 0
    assert "agree within the tolerance" in " ".join(capsys.readouterr().out.split())
    assert status_of(["diff", str(folder), str(healthy.folder), "--tolerance", "5e-5"]) == 1
    assert "relative, where 5e-05 is allowed" in capsys.readouterr().out


def test_what_cannot_be_compared(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(["diff", str(healthy.folder), str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    bare = run(tmp_path / "bare", catalogue, probes=[])
    assert status_of(["diff", str(healthy.folder), str(bare.folder)]) == 2
    assert "recorded by no probe that takes part in a comparison" in capsys.readouterr().err
    other = run(tmp_path / "other", catalogue, probes=["modes"])
    few = run(tmp_path / "few", catalogue, probes=["data"])
    assert status_of(["diff", str(other.folder), str(few.folder)]) == 2
    assert "recorded nothing that can be compared" in capsys.readouterr().err


def test_the_earliest_difference_of_several_processes_is_told(
    tmp_path: Path, catalogue: Catalogue, healthy: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run(tmp_path / "run", catalogue, {"id": "head.scaled"})
    for name, of_first, of_second in (("a", healthy, healthy), ("b", healthy, broken)):
        shutil.copytree(of_first.folder, tmp_path / name)
        shutil.copytree(of_second.folder, tmp_path / name / "rank-1")
    assert status_of(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["process"], found["where"]) == (1, "head")
